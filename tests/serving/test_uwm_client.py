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
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.sync.server import serve

from tests.serving.fake_server import METADATA, echo, fake_server, reply
from uwm_jax.serving import uwm_client
from uwm_jax.serving.uwm_client import (
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
