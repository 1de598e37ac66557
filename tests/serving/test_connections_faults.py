"""Clients that send garbage or leave, and the end of the server."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.serving.clients import Client, fetch, frame, raw, running, unpack, wait_until
from tests.serving.small_model import WIDTH, make_server, observation
from uwm_jax.serving import batching
from uwm_jax.serving.connections import Server
from uwm_jax.serving.messages import encode


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Server, str]]:
    with running() as both:
        yield both


@pytest.fixture
def address(served: tuple[Server, str]) -> str:
    return served[1]


def test_garbage_half_messages_and_clients_that_leave_harm_nobody(served: tuple[Server, str]) -> None:
    server, address = served
    good, message = Client(address), encode(observation())
    expected = good.ask(seed=1)["actions"]
    for attempt in range(5):
        random = np.random.default_rng(attempt)
        opened = [raw(address) for _ in range(6)]
        opened[0].sendall(random.bytes(500))  # no frame
        opened[1].sendall(frame(message)[: 100 + attempt])  # half a message
        opened[2].sendall(frame(message))  # a request, and the client leaves without a word
        opened[3].sendall(frame(message, size=2**62))  # a length that never comes
        opened[4].sendall(frame(random.bytes(64), opcode=3))  # no opcode
        opened[5].sendall(frame(b"\x03\xe8", opcode=8))  # a farewell
        with socket.create_connection(opened[0].getpeername(), timeout=10) as plain:
            plain.sendall(random.bytes(2000) + b"\r\n\r\n")
            np.testing.assert_array_equal(good.ask(seed=1)["actions"], expected)
        for each in opened:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets
            each.close()
        np.testing.assert_array_equal(good.ask(seed=1)["actions"], expected)
    wait_until(lambda: server.status.open == 1)  # the good client's
    status = server.status
    # Of those that leave, a request is answered, or dropped, or lost with the reset before it was read.
    assert 11 <= status.received <= 16 and status.received == status.of("answered") + status.of("gone")
    assert fetch(address, "/healthz") == (200, "ok\n")


def test_a_request_of_a_client_that_leaves_in_flight_is_counted_and_dropped() -> None:
    server = make_server(deadline=30.0)
    with running(server) as (_, address):
        stays, leaves = Client(address), raw(address)
        leaves.sendall(frame(encode(observation())))  # its batch waits for the client that stays
        wait_until(lambda: server.status.received == 1)
        leaves.close()
        wait_until(lambda: server.status.of("gone") == 1)
        assert stays.ask()["actions"].shape == (16, WIDTH)
    assert server.status.received == 2 and server.status.of("answered") == 1


def test_a_drain_under_load_answers_all_that_was_received() -> None:
    server = make_server(deadline=0.002)
    run = server.engine.run
    server.engine.run = lambda kind, jobs: (time.sleep(0.02), run(kind, jobs))[1]  # type: ignore[method-assign]
    counts = {"sent": 0, "answered": 0, "told": 0, "closed": 0}
    codes: list[int] = []
    lock = threading.Lock()

    def drive(address: str) -> None:
        client = Client(address)
        while True:
            try:
                client.socket.send(encode(observation()))
                with lock:
                    counts["sent"] += 1
                reply = client.socket.recv(20)
                with lock:
                    counts["answered" if isinstance(reply, bytes) else "told"] += 1
            except ConnectionClosed as e:
                codes.append(e.rcvd.code if e.rcvd else 0)
                return

    with running(server) as (_, address):
        threads = [threading.Thread(target=drive, args=(address,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        idle = Client(address)
        wait_until(lambda: server.status.received > 40)
        server.drain()
        wait_until(lambda: server.status.draining)
        if server.status.open:
            with contextlib.suppress(OSError):  # it may have ended already
                assert fetch(address, "/healthz") == (503, "draining\n")
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        with pytest.raises(ConnectionClosed) as error:
            idle.socket.recv(10)
        assert error.value.rcvd is not None and error.value.rcvd.code == 1001
    status = server.status
    assert codes == [1001] * 8
    assert status.received == status.of("answered") + status.of("refused") and status.of("gone") == 0
    assert counts["answered"] == status.of("answered") and counts["told"] == status.of("refused")
    assert counts["sent"] - status.received <= 8  # the last of each client, after the farewell was on its way


def test_a_draining_server_takes_no_new_clients() -> None:
    server = make_server(deadline=0.0)
    run, begun, release = server.engine.run, threading.Event(), threading.Event()

    def slow(kind: Any, jobs: Any) -> Any:
        begun.set()
        assert release.wait(20)
        return run(kind, jobs)

    server.engine.run = slow  # type: ignore[method-assign]
    with running(server) as (_, address):
        client = Client(address)
        client.socket.send(encode(observation()))
        begun.wait(10)
        server.drain()
        wait_until(lambda: server.status.draining)
        assert fetch(address, "/healthz") == (503, "draining\n")
        with pytest.raises(InvalidStatus) as error:
            Client(address)
        assert error.value.response.status_code == 503
        release.set()
        assert unpack(client.socket.recv(10))["actions"].shape == (16, WIDTH)  # what was received is answered
        with pytest.raises(ConnectionClosed) as closed:
            client.socket.recv(10)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001


def test_a_drain_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    monkeypatch.setattr(batching, "leave_behind", left.append)  # the process then ends without its thread
    server = make_server(deadline=0.0, drain_seconds=0.3)
    release = threading.Event()
    server.engine.run = lambda kind, jobs: release.wait(20)  # type: ignore[method-assign, assignment, return-value]
    with running(server) as (_, address):
        client = Client(address)
        client.socket.send(encode(observation()))
        wait_until(lambda: server.status.received == 1)
        server.drain()
        with pytest.raises(ConnectionClosed) as closed:
            client.socket.recv(10)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        release.set()
    assert server.status.of("gone") == 1 and left == ["a batch of the model"]
