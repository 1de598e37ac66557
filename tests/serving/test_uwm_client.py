"""`uwm_client.py` against a server that follows a script: replies late, wrong, cut off."""

from __future__ import annotations

import ast
import base64
import hashlib
import http
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.sync.server import serve

from tests.serving.fake_server import METADATA, fake_server, reply
from tests.serving.small_model import make_server, observation
from uwm_jax.serving import uwm_client
from uwm_jax.serving.connections import in_thread
from uwm_jax.serving.uwm_client import (
    ChunkLoop,
    Client,
    ClientError,
    Disconnected,
    Late,
    ProtocolError,
    Refused,
    RequestError,
    Stopped,
    pack,
    unpack,
)

FILE = Path(uwm_client.__file__)
NUMPY_1 = Path(sys.prefix) / "numpy1/bin/python"  # launch/test.sh makes it


def echo(connection: Any, request: dict[str, Any], number: int) -> None:
    reply(connection, request, number=number, **{k: v for k, v in request.items() if k != "request_id"})


def test_imports_only_what_a_robot_installs() -> None:
    names = set()
    for node in ast.walk(ast.parse(FILE.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"websockets", "msgpack", "numpy"}


def test_metadata_token_and_arrays_of_every_dtype() -> None:
    arrays = {d: np.arange(6).reshape(2, 3).astype(d) for d in uwm_client.DTYPES}
    with fake_server(echo) as server, Client(server.url, "secret", wait=5) as client:
        assert client.metadata["action_horizon"] == 8 and server.tokens == ["Api-Key secret"]
        found = client.infer({**arrays, "seed": np.int64(3), "mode": "policy", "turned": arrays["<f4"].T})
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
        np.testing.assert_array_equal(found["turned"], arrays["<f4"].T)
        assert found["seed"] == 3 and found["mode"] == "policy"
        assert server.requests[0]["request_id"] != client.infer({})["request_id"]


def test_the_form_of_arrays_is_that_of_openpi() -> None:
    # openpi's msgpack_numpy: keys are bytes, `dtype` is numpy's name with its byte order.
    sent = msgpack.unpackb(pack({"x": np.ones((1, 2), np.float32), "y": np.int32(4)}))
    assert sent["x"] == {b"__ndarray__": True, b"data": b"\0\0\x80?" * 2, b"dtype": "<f4", b"shape": [1, 2]}
    assert sent["y"] == {b"__npgeneric__": True, b"data": 4, b"dtype": "<i4"}


@pytest.mark.parametrize(
    ("dtype", "sent"), [("float16", "<f4"), (">f4", "<f4"), ("int16", "<i4"), ("uint32", "<i8"), ("int8", "<i4")]
)
def test_other_numbers_are_sent_as_what_servers_take(dtype: str, sent: str) -> None:
    found = unpack(pack({"x": np.array([1, 2, 3], dtype)}))["x"]
    assert found.dtype.str == sent and found.tolist() == [1, 2, 3]


@pytest.mark.parametrize("value", [np.array([None]), np.array(["a"]), np.ones(2, complex), object()])
def test_what_cannot_be_sent_is_told(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot send"):
        pack({"x": value})


def test_a_refused_request_leaves_the_connection_open() -> None:
    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        connection.send("obs/front: expected uint8, found float32") if number == 0 else echo(
            connection, request, number
        )

    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with pytest.raises(RequestError, match=r"^obs/front: expected uint8, found float32$"):
            client.infer({})
        assert client.infer({})["number"] == 1 and server.connections == 1


def test_late_replies_and_late_errors_are_dropped() -> None:
    given_up = threading.Event()

    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        given_up.wait(30)
        connection.send("too late") if number == 1 else echo(connection, request, number)

    with fake_server(script) as server, Client(server.url, wait=5) as client:
        for _ in range(2):
            start = time.monotonic()
            with pytest.raises(Late, match="no reply to request"):
                client.infer({}, deadline=0.1)
            assert time.monotonic() - start < 5
        given_up.set()
        assert client.infer({})["number"] == 2
        assert client.dropped == 2 and server.connections == 1


def test_an_error_that_names_its_request_is_that_ones() -> None:
    given_up = threading.Event()

    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        if number == 0:
            given_up.wait(30)
            return
        connection.send(f"request {request['request_id']}: mode: no such")  # before the answer to the first one
        connection.send("the first one's")

    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with pytest.raises(Late):
            client.infer({}, deadline=0.1)
        given_up.set()
        with pytest.raises(RequestError, match="^mode: no such$"):
            client.infer({})


def test_replies_with_another_id_are_dropped() -> None:
    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        for other in ("another", 7, None):
            reply(connection, {"request_id": other}, number=-1)
        echo(connection, request, number)

    with fake_server(script) as server, Client(server.url, wait=5) as client:
        assert client.infer({})["number"] == 0 and client.dropped == 3


def test_a_lost_connection_is_made_again_and_the_request_sent_again() -> None:
    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        connection.close() if number == 1 else echo(connection, request, number)

    with fake_server(script) as server, Client(server.url, wait=5) as client:
        client.infer({"x": 0})
        assert client.infer({"x": 1})["x"] == 1
        assert [r["x"] for r in server.requests] == [0, 1, 1] and client.reconnected == 1


def test_a_server_that_comes_up_later_or_drains_is_waited_for() -> None:
    answers = [503, 503]

    def process_request(connection: Any, request: Any) -> Any:
        return connection.respond(http.HTTPStatus(answers.pop()), "draining\n") if answers else None

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    found: list[Client] = []
    thread = threading.Thread(target=lambda: found.append(Client(f"ws://127.0.0.1:{port}", wait=10)))
    thread.start()
    time.sleep(0.3)
    with serve(
        lambda c: (c.send(pack(METADATA)), c.recv()), "127.0.0.1", port, process_request=process_request
    ) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        thread.join()
        found[0].close()
        server.shutdown()
        serving.join()
    assert found[0].metadata["execute"] == 4 and not answers


def test_nobody_there_ends_with_the_wait() -> None:
    start = time.monotonic()
    with pytest.raises(Disconnected, match="no connection within the deadline"):
        Client("ws://127.0.0.1:9", wait=0.5)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_token_is_told_at_once(status: int) -> None:
    def process_request(connection: Any, request: Any) -> Any:
        return connection.respond(http.HTTPStatus(status), "expected a token\n")

    with fake_server(echo, process_request=process_request) as server:
        with pytest.raises(Refused, match=f"{status}: expected a token"):
            Client(server.url, "wrong", wait=30)


def test_another_model_after_a_reconnection_is_refused() -> None:
    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        connection.close() if number == 1 else echo(connection, request, number)

    def metadata(connection: int) -> dict[str, Any]:
        return METADATA if connection == 1 else {**METADATA, "action_horizon": 16}

    with fake_server(script, metadata) as server, Client(server.url, wait=5) as client:
        client.infer({})
        with pytest.raises(Disconnected, match="another model now: action_horizon"):
            client.infer({})


@pytest.mark.parametrize(
    ("first", "what"),
    [("an error of another server", "metadata"), (b"\xc1\xc1", "msgpack"), (msgpack.packb([1]), "metadata")],
)
def test_another_server_is_told(first: Any, what: str) -> None:
    with fake_server(echo, first) as server, pytest.raises(ProtocolError, match=what):
        Client(server.url, wait=2)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        ({b"__ndarray__": True, b"data": b"a" * 8, b"dtype": "O", b"shape": [1]}, "'O'"),
        ({b"__ndarray__": True, b"data": b"a" * 8, b"dtype": "<f4", b"shape": [3]}, "bytes are not"),
        ({b"__ndarray__": True, b"dtype": "<f4", b"shape": [3]}, "bytes are not"),
        ({b"__npgeneric__": True, b"data": "a", b"dtype": "<M8"}, "M8"),
    ],
)
def test_a_reply_with_another_array_is_refused(x: dict[bytes, Any], what: str) -> None:
    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        connection.send(msgpack.packb({"request_id": request["request_id"], "x": x}))

    with fake_server(script) as server, Client(server.url, wait=5) as client, pytest.raises(ProtocolError, match=what):
        client.infer({})


def test_a_reply_without_an_id_is_told() -> None:
    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        connection.send(pack({"actions": np.zeros((8, 2), np.float32)}))

    with fake_server(script) as server, Client(server.url, wait=5) as client, pytest.raises(ProtocolError):
        client.infer({})


def test_a_server_that_reads_nothing_cannot_hold_a_request() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    accepted: list[socket.socket] = []

    def half_a_server() -> None:
        while True:
            try:
                peer, _ = listening.accept()
            except OSError:
                return
            accepted.append(peer)
            key = next(x for x in peer.recv(4096).split(b"\r\n") if x.lower().startswith(b"sec-websocket-key"))
            proof = hashlib.sha1(key.split()[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
            first = pack({"inputs": {}})
            peer.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + base64.b64encode(proof) + b"\r\n\r\n" + bytes([0x82, len(first)]) + first
            )

    thread = threading.Thread(target=half_a_server)
    thread.start()
    try:
        client = Client(f"ws://127.0.0.1:{listening.getsockname()[1]}", wait=5)
        start = time.monotonic()
        with pytest.raises((Disconnected, Late)):
            client.infer({"obs/front": np.zeros(1 << 26, np.uint8)}, deadline=0.5)
        assert time.monotonic() - start < 30
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()
        for peer in accepted:
            peer.close()


def test_stepwise_an_episode_that_was_cut_off_is_told() -> None:
    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        connection.close() if number == 2 else echo(connection, request, number)

    with fake_server(script, {**METADATA, "stepwise": True}) as server, Client(server.url, wait=5) as client:
        client.reset()
        client.infer({})
        client.infer({})
        with pytest.raises(Disconnected, match="the next request starts a new episode"):
            client.infer({})
        assert client.infer({})["number"] == 3 and server.connections == 2
        client.reset()
        client.infer({})
    assert ["reset" in request for request in server.requests] == [True, False, False, False, True]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -keyout {folder / 'key.pem'} -out {folder / 'cert.pem'}"
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl: apt-get install openssl")
    yield folder


def test_tls_with_a_certificate_of_its_own(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")

    def handler(connection: Any) -> None:
        connection.send(pack(METADATA))
        for frame in connection:
            echo(connection, unpack(frame), 0)

    with serve(handler, "127.0.0.1", 0, ssl=context) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"wss://localhost:{server.socket.getsockname()[1]}"
        with Client(url, wait=5, tls=str(certificate / "cert.pem")) as client:
            assert client.infer({"x": 5})["x"] == 5
        with pytest.raises(Refused, match="CERTIFICATE_VERIFY_FAILED"):
            Client(url, wait=30)
        server.shutdown()
        thread.join()


# --- ChunkLoop -----------------------------------------------------------------------------------------------------


class Chunks:
    """Answers with rows (number of the chunk, step that the row is for), as a server that knows the robot's step, which
    travels as `obs/state`. The answer to a request of `held` waits for `let_go`."""

    def __init__(self, *held: int):
        self.held, self.let_go = held, threading.Event()
        self.stacked: list[list[float]] = []

    def __call__(self, connection: Any, request: dict[str, Any], number: int) -> None:
        self.stacked.append(request["obs/state"][:, 0].tolist())
        if number in self.held:
            self.let_go.wait(60)
        step = request["obs/state"][-1, 0]
        rows = np.array([[number, step + k] for k in range(8)], np.float32)
        if "promised" in request:
            rows[: len(request["promised"])] = request["promised"]
        reply(connection, request, actions=rows)


def act(loop: ChunkLoop, step: int, wait: bool = True) -> list[float]:
    """The row of a step; an answer that is under way is there before, unless `wait` is False."""
    while wait and loop._asked is not None and not loop._asked.done():
        time.sleep(0.002)
    return loop.act({"obs/state": np.full(3, step, np.float32), "obs/text": np.zeros(5)}).tolist()


def act_and_give_up(loop: ChunkLoop, step: int) -> list[float]:
    """The row of a step at which a chunk is asked for in vain."""
    before, loop._deadline = loop._deadline, 0.3
    row, loop._deadline = act(loop, step), before
    assert isinstance(loop._asked, Future) and isinstance(loop._asked.exception(30), Late)
    return row


@pytest.mark.parametrize(("execute", "delay"), [(4, 0), (4, 2), (1, 0), (5, 3), (3, 1), (4, 4)])
def test_rows_are_those_of_their_steps_and_what_was_executed_is_promised(execute: int, delay: int) -> None:
    script = Chunks()
    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with ChunkLoop(client, execute, delay) as loop:
            rows = [act(loop, step) for step in range(24)]
    assert [row[1] for row in rows] == list(range(24))
    asked = [int(r["obs/state"][-1, 0]) for r in server.requests]
    assert asked == list(range(0, 24, execute))
    for number, (step, request) in enumerate(zip(asked, server.requests, strict=True)):
        assert script.stacked[number] == [max(step - 1, 0), step] and request["obs/text"].shape == (5,)
        executed = rows[step : step + delay] if number else []
        assert request.get("promised", np.zeros((0, 2))).tolist()[: len(executed)] == executed
        # From step + delay on it is this chunk's rows that are executed.
        own = rows[step + delay if number else 0 : step + delay + execute]
        assert {row[0] for row in own} <= {number}
    assert loop.late_steps == loop.stops == 0


def test_a_server_that_cannot_hold_promised_rows_gets_none() -> None:
    with fake_server(Chunks(), {**METADATA, "promised": False}) as server, Client(server.url, wait=5) as client:
        with pytest.warns(UserWarning, match="switches naively"):
            loop = ChunkLoop(client, 4, 2)
        with loop:
            rows = [act(loop, step) for step in range(12)]
    assert [row[0] for row in rows] == [0] * 6 + [1] * 4 + [2] * 2 and [row[1] for row in rows] == list(range(12))
    assert not any("promised" in request for request in server.requests)


def test_a_frame_may_be_overwritten_by_the_next() -> None:
    script, state = Chunks(), np.zeros(3, np.float32)
    with fake_server(script) as server, Client(server.url, wait=5) as client, ChunkLoop(client, 1, 0) as loop:
        for step in range(3):
            state[:] = step
            loop.act({"obs/state": state})
    assert script.stacked == [[0, 0], [0, 1], [1, 2]]


@pytest.mark.parametrize("delay", [0, 3])
def test_a_loop_with_the_server_itself(delay: int) -> None:
    """Whose rows tell the oldest and the newest state that they were sampled from; promised ones come back as sent."""
    with in_thread(make_server()) as address, Client(address, wait=10) as client:
        with ChunkLoop(client, 5, delay) as loop:
            rows = []
            for step in range(20):
                while loop._asked is not None and not loop._asked.done():
                    time.sleep(0.002)
                rows.append(loop.act(observation(10.0 + step)))
    asked = [0] * (5 + delay) + [5] * 5 + [10] * 5 + [15] * 5
    np.testing.assert_allclose([row[1] for row in rows], [10 + step for step in asked[:20]])
    np.testing.assert_allclose([row[0] for row in rows], [10 + max(step - 1, 0) for step in asked[:20]])
    assert loop.late_steps == loop.stops == 0


def test_a_late_answer_goes_on_in_the_old_chunk() -> None:
    script = Chunks(1)
    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with ChunkLoop(client, 4, 1) as loop:
            rows = [act(loop, step, wait=False) for step in range(7)]
            script.let_go.set()
            rows += [act(loop, step) for step in range(7, 16)]
    assert [row[1] for row in rows] == list(range(16))
    # The second chunk was asked for at step 4 and due at 5; it came between steps 6 and 7.
    assert [row[0] for row in rows] == [0] * 7 + [1] * 2 + [2] * 4 + [3] * 3
    assert loop.late_steps == 2 and loop.stops == 0


def test_no_answer_stops_by_name_and_then_starts_anew() -> None:
    script = Chunks(1)
    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with ChunkLoop(client, 4, 2) as loop:
            for step in range(8):
                act(loop, step, wait=False)
            with pytest.raises(Stopped, match="step 8: no answer in time"):
                act(loop, 8, wait=False)
            assert loop.stops == 1 and loop.late_steps == 3  # steps 6, 7 and 8
            script.let_go.set()
            assert act(loop, 8) == [2, 8] and "promised" not in server.requests[2]


def test_an_answer_past_its_deadline_is_asked_for_again() -> None:
    script = Chunks(1)
    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with ChunkLoop(client, 2, 2, deadline=30.0) as loop:
            rows = [act(loop, step) for step in range(2)]
            rows.append(act_and_give_up(loop, 2))
            rows += [act(loop, step) for step in range(3, 5)]
            script.let_go.set()
            rows += [act(loop, step) for step in range(5, 12)]
    assert [row[1] for row in rows] == list(range(12)) and loop.late_steps == 1 and loop.stops == 0
    assert client.dropped == 1


def test_an_answer_is_used_as_soon_as_the_old_chunk_ends() -> None:
    script = Chunks(1)
    with fake_server(script) as server, Client(server.url, wait=5) as client:
        with ChunkLoop(client, 4, 3, deadline=30.0) as loop:
            rows = [act(loop, step) for step in range(4)]
            rows.append(act_and_give_up(loop, 4))
            rows += [act(loop, step) for step in range(5, 8)]  # at step 7 it is asked for again
            script.let_go.set()
            rows += [act(loop, step) for step in range(8, 14)]  # the old chunk's last row was that of step 7
    assert [row[1] for row in rows] == list(range(14)) and loop.stops == 0
    assert len(server.requests[2]["promised"]) == 1 and [row[0] for row in rows[6:10]] == [0, 0, 2, 2]


def test_a_refused_request_ends_the_loop() -> None:
    def script(connection: Any, request: dict[str, Any], number: int) -> None:
        Chunks()(connection, request, number) if number == 0 else connection.send("promised: expected (d, 2)")

    with fake_server(script) as server, Client(server.url, wait=5) as client, ChunkLoop(client, 4, 2) as loop:
        with pytest.raises(RequestError, match="promised: expected"):
            for step in range(12):
                act(loop, step)


@pytest.mark.parametrize(("execute", "delay"), [(8, 1), (0, 0), (4, -1), (9, 0)])
def test_what_does_not_fit_a_chunk_is_refused_at_the_start(execute: int, delay: int) -> None:
    with fake_server(echo) as server, Client(server.url, wait=5) as client:
        with pytest.raises(ValueError, match="8 together at most"):
            ChunkLoop(client, execute, delay)


def test_a_delay_beyond_what_is_executed_is_refused_at_the_start() -> None:
    with fake_server(echo) as server, Client(server.url, wait=5) as client:
        with pytest.raises(ValueError, match="delay=3: expected at most execute=2"):
            ChunkLoop(client, 2, 3)


def test_a_stepwise_server_is_refused() -> None:
    with fake_server(echo, {**METADATA, "stepwise": True}) as server, Client(server.url, wait=5) as client:
        with pytest.raises(ValueError, match="stepwise"):
            ChunkLoop(client, 4)


def test_errors_are_of_one_family() -> None:
    for error in (RequestError, ProtocolError, Refused, Late, Disconnected, Stopped):
        assert issubclass(error, ClientError)


UNDER_NUMPY_1 = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from uwm_client import ChunkLoop, Client, DTYPES
assert np.__version__.startswith("1."), np.__version__
arrays = {d: np.arange(6).reshape(2, 3).astype(d) for d in DTYPES}
with Client(sys.argv[2], "secret", wait=5) as client:
    found = client.infer({**arrays, "half": np.ones(2, np.float16), "n": np.int64(3), "f": np.float32(0.5)})
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and (found[name] == array).all(), name
    assert found["half"].dtype == np.float32 and found["n"] == 3 and found["f"] == 0.5
print("numpy", np.__version__)
"""


def test_under_numpy_1() -> None:
    environment = [str(NUMPY_1), "-c", "import msgpack, numpy, websockets"]
    if not NUMPY_1.exists() or subprocess.run(environment, capture_output=True).returncode:
        pytest.skip(
            f"no environment with numpy 1: {sys.executable} -m venv {NUMPY_1.parents[1]} && {NUMPY_1} -m pip install "
            "'numpy<2' msgpack websockets"
        )
    with fake_server(echo) as server:
        done = subprocess.run(
            [str(NUMPY_1), "-c", UNDER_NUMPY_1, str(FILE.parent), server.url],
            capture_output=True,
            text=True,
            timeout=60,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
    assert done.returncode == 0 and done.stdout.startswith("numpy 1."), done.stderr
