"""Clients for the tests of the server: one that behaves, and frames by hand for those that do not."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import msgpack
import numpy as np
from websockets.sync.client import ClientConnection, connect

from tests.serving.small_model import make_server, observation
from uwm_jax.serving.connections import Server, in_thread
from uwm_jax.serving.messages import encode


def unpack(frame: bytes | str) -> dict[str, Any]:
    """A reply as openpi's client unpacks it."""

    def hook(fields: dict[Any, Any]) -> Any:
        if b"__ndarray__" in fields:
            return np.ndarray(buffer=fields[b"data"], dtype=np.dtype(fields[b"dtype"]), shape=fields[b"shape"])
        return fields

    assert isinstance(frame, bytes), frame
    return msgpack.unpackb(frame, object_hook=hook)


class Client:
    """One connection; `metadata` are its first frame."""

    def __init__(self, address: str, **options: Any):
        self.socket: ClientConnection = connect(address, compression=None, max_size=None, **options)
        self.metadata = unpack(self.socket.recv(10))

    def ask(self, state: float = 10.0, pixel: int = 7, **fields: Any) -> dict[str, Any]:
        """The reply to a request of the stub model."""
        return self.ask_with(observation(state, pixel) | fields)

    def ask_with(self, request: dict[str, Any]) -> dict[str, Any]:
        self.socket.send(encode(request))
        return unpack(self.socket.recv(30))

    def refused(self, message: bytes | str) -> str:
        self.socket.send(message)
        told = self.socket.recv(20)
        assert isinstance(told, str) and "Traceback" not in told
        return told


@contextlib.contextmanager
def running(server: Server | None = None, **options: Any) -> Iterator[tuple[Server, str]]:
    server = server or make_server(**options)
    with in_thread(server) as address:
        yield server, address


def fetch(address: str, path: str, **headers: str) -> tuple[int, str]:
    """Status and body of a plain HTTP request."""
    url = address.replace("ws://", "http://") + path
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def wait_until(what: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def raw(address: str) -> socket.socket:
    """A connection after the opening handshake, by hand."""
    parts = urlsplit(address)
    assert parts.hostname and parts.port
    found = socket.create_connection((parts.hostname, parts.port), timeout=10)
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
    found.sendall(
        f"GET / HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}\r\n\r\n".encode()
    )
    assert b"101" in found.recv(12)
    return found


def frame(data: bytes, opcode: int = 2, size: int | None = None) -> bytes:
    """A masked frame of a client, mask 0; `size` is what it says of its length."""
    return (
        bytes([0x80 | opcode, 0x80 | 127]) + struct.pack("!Q", len(data) if size is None else size) + b"\0" * 4 + data
    )
