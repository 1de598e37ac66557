"""Requests and replies of the server, in a thread and on a stub model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from tests.serving.clients import Client, fetch, running, unpack, wait_until
from tests.serving.small_model import FRAME, WIDTH, make_contract, make_server, observation
from uwm_jax.serving import connections
from uwm_jax.serving.connections import Server
from uwm_jax.serving.contract import Request
from uwm_jax.serving.messages import encode


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Server, str]]:
    with running() as both:
        yield both


@pytest.fixture
def address(served: tuple[Server, str]) -> str:
    return served[1]


def test_a_reply_has_openpis_fields_and_no_array_but_the_actions(address: str) -> None:
    client = Client(address)
    first, second = client.ask(request_id="a"), client.ask()
    assert first["actions"].dtype == np.float32 and first["actions"].shape == (16, WIDTH)
    assert [key for key, value in first.items() if isinstance(value, np.ndarray)] == ["actions"]
    assert first["server_timing"].keys() == {"infer_ms"} and first["policy_timing"].keys() == {"infer_ms"}
    assert second["server_timing"].keys() == {"infer_ms", "prev_total_ms"}
    assert first["request_id"] == "a" and "request_id" not in second
    assert first["history"] == "repeated"
    client.socket.send(encode(observation(frames=2)))
    assert unpack(client.socket.recv())["history"] == "given"


def test_noise_follows_the_seed_or_the_count_of_the_connections_requests(address: str) -> None:
    one, two = Client(address), Client(address)
    ones, twos = [one.ask()["actions"] for _ in range(3)], [two.ask()["actions"] for _ in range(3)]
    for a, b in zip(ones, twos, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(ones[0] - ones[1]).max() > 1e-3 and np.abs(ones[0] - ones[2]).max() > 1e-3
    np.testing.assert_array_equal(one.ask(seed=9)["actions"], two.ask(seed=9)["actions"])
    np.testing.assert_array_equal(one.ask(reset=True)["actions"], ones[0])


def test_other_uses_reply_with_the_keys_of_sample_files(address: str) -> None:
    reply = Client(address).ask(mode="forward", action=np.zeros((16, WIDTH)))
    assert reply["next_obs/front"].shape == (2, *FRAME, 3) and "actions" not in reply


def test_promised_rows_come_back(address: str) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, WIDTH)
    np.testing.assert_array_equal(Client(address).ask(promised=rows)["actions"][:2], rows)


def test_a_model_without_text_says_once_that_it_ignores_the_prompt(address: str) -> None:
    client = Client(address)
    assert client.ask(prompt="push")["prompt"] == "ignored: this model reads no text"
    assert "prompt" not in client.ask(prompt="push")


def test_a_remark_is_told_once_in_a_connection(address: str) -> None:
    client = Client(address)
    assert "state is far outside" in client.ask(state=16.0)["warnings"][0]
    assert "warnings" not in client.ask(state=16.0)


def test_an_error_is_text_and_the_connection_goes_on(address: str) -> None:
    client = Client(address)
    assert "missing obs/front" in client.refused(encode({"obs/state": np.zeros(2)}))
    assert "dtype 'O'" in client.refused(
        msgpack.packb({"obs/state": {b"__ndarray__": True, b"data": b"\1" * 16, b"dtype": "O", b"shape": [2]}})
    )
    assert "not finite" in client.refused(encode(observation(state=float("nan"))))
    assert "not a msgpack map" in client.refused(b"\xc1")
    assert "expected a binary frame" in client.refused("text")
    assert "expected at most" in client.refused(b"\0" * (client.metadata["most_bytes"] + 1))
    assert client.refused(encode({"request_id": 5})).startswith("request 5: missing")
    assert client.ask()["actions"].shape == (16, WIDTH)


def test_a_message_far_too_long_closes_its_connection_and_says_why(served: tuple[Server, str]) -> None:
    client, other = Client(served[1]), Client(served[1])
    with pytest.raises(ConnectionClosed) as error:
        client.socket.send(b"\0" * (3 * client.metadata["most_bytes"]))
        client.socket.recv(10)
    assert error.value.rcvd is not None and error.value.rcvd.code == 1009
    assert other.ask()["actions"].shape == (16, WIDTH)


def test_fragments_are_joined_and_too_many_are_refused(address: str) -> None:
    client, message = Client(address), encode(observation() | {"seed": 3})
    client.socket.send(iter([message[:10], message[10:11], b"", message[11:]]))
    np.testing.assert_array_equal(unpack(client.socket.recv(10))["actions"], client.ask(seed=3)["actions"])
    with pytest.raises(ConnectionClosed) as error:
        client.socket.send(iter([b"\0"] * (connections.MOST_FRAGMENTS + 50)))
        client.socket.recv(10)
    assert error.value.rcvd is not None and error.value.rcvd.code == 1008


def test_failures_of_the_model_are_told_and_counted() -> None:
    server = make_server()
    run = server.engine.run

    def fails(kind: Any, jobs: Any) -> Any:
        if any(job.request.seed == 13 for job in jobs):
            raise ValueError("device lost\nwith a second line")
        return run(kind, jobs)

    server.engine.run = fails  # type: ignore[method-assign]
    with running(server) as (_, address):
        client = Client(address)
        for _ in range(3):
            told = client.refused(encode(observation() | {"seed": 13, "request_id": 1}))
            assert told == "request 1: the model failed: ValueError: device lost"
        assert fetch(address, "/healthz") == (503, "the last 3 batches failed\n")
        assert client.ask()["actions"].shape == (16, WIDTH)
        assert fetch(address, "/healthz") == (200, "ok\n")
    assert (server.status.of("failed"), server.status.of("answered")) == (3, 1)


# --- Stepwise ------------------------------------------------------------------------------------


class Notes:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def step(self, connection: int, request: Request, action: np.ndarray) -> None:
        self.lines.append((connection, float(request.inputs["obs/state"][0]), request.reset, action.copy()))

    def end(self, connection: int) -> None:
        self.lines.append((connection, "end"))


def test_stepwise_keeps_the_history_and_replies_with_one_row() -> None:
    notes = Notes()
    with running(make_server(make_contract(stepwise=True, execute=3), recorder=notes)) as (server, address):
        client = Client(address)
        assert client.metadata["stepwise"] and client.metadata["execute"] == 3
        rows = [client.ask(state=9.0 + i / 10) for i in range(7)]
        assert all(reply["actions"].shape == (1, WIDTH) and reply["history"] == "kept" for reply in rows)
        shown = np.array([reply["actions"][0, :2] for reply in rows])
        # (oldest, newest) state that the chunk was made of: at steps 0, 3 and 6; the first fills the history.
        made = np.array([[9.0, 9.0], [9.2, 9.3], [9.5, 9.6]], np.float32)
        np.testing.assert_allclose(shown, made[[0, 0, 0, 1, 1, 1, 2]], rtol=1e-6)
        noise = [float(reply["actions"][0, 2]) for reply in rows]
        assert noise[0] == noise[2] != noise[3]
        # Neither a refused step nor one of another connection counts.
        assert "missing obs/state" in client.refused(encode({"obs/front": np.zeros((*FRAME, 3), np.uint8)}))
        other = Client(address)
        np.testing.assert_array_equal(other.ask(state=9.0)["actions"], rows[0]["actions"])
        again = client.ask(state=9.0, reset=True)
        np.testing.assert_array_equal(again["actions"], rows[0]["actions"])
        client.socket.close()
        wait_until(lambda: (1, "end") in notes.lines)
    assert [line[1:3] for line in notes.lines if line[0] == 1 and len(line) == 4][-1] == (9.0, True)
    steps = [line[3] for line in notes.lines if line[0] == 1 and len(line) == 4]
    np.testing.assert_array_equal(steps, [reply["actions"][0] for reply in (*rows, again)])


def test_an_episode_that_is_written_holds_up_no_other_robot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_UNRECORDED", 6)
    written = threading.Event()

    class Slow(Notes):
        def end(self, connection: int) -> None:
            assert written.wait(20)
            super().end(connection)

    notes = Slow()
    with running(make_server(make_contract(stepwise=True), recorder=notes)) as (server, address):
        leaves, stays = Client(address), Client(address)
        leaves.ask()
        leaves.socket.close()
        wait_until(lambda: server.status.open == 1)
        replies = [stays.ask() for _ in range(5)]
        assert [line[0] for line in notes.lines] == [1]
        written.set()
    assert [line[:2] if line[1] == "end" else line[0] for line in notes.lines] == [1, (1, "end"), *[2] * 5, (2, "end")]
    np.testing.assert_array_equal([line[3] for line in notes.lines[2:7]], [reply["actions"][0] for reply in replies])


def test_a_recorder_that_fails_is_left_out_and_the_robot_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(Notes):
        def step(self, *_: Any) -> None:
            raise OSError(28, "No space left on device")

    with running(make_server(make_contract(stepwise=True), recorder=Full())) as (_, address):
        client = Client(address)
        assert all(client.ask()["actions"].shape == (1, WIDTH) for _ in range(3))
    assert capsys.readouterr().err.count("recording ends here: OSError: [Errno 28] No space left on device") == 1
