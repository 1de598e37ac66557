"""A proxy in front of an emulator of Google Cloud Storage that delays requests, injects faults and counts."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import re
import socket
import struct
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from uwm_jax.benchmarking import child
from uwm_jax.benchmarking.emulator import environ_of

# (method, path with query, number of the request from 1) -> the fault, or None:
#   "401", "429", "503"  an answer with this status; the emulator never sees the request
#   "reset"              the connection is reset; the emulator never sees the request
#   "lost"               the emulator carries the request out, then the connection is reset
#   "hang"               no answer, until the client closes the connection
#   "truncate"           the emulator's answer, closed in the middle of its body
Faults = Callable[[str, str, int], str | None]

_MOST_HEAD = 1 << 20
_STATUS = {"401": "Unauthorized", "429": "Too Many Requests", "503": "Service Unavailable"}


class Proxy:
    """A running proxy.

    Attributes:
      url: `http://127.0.0.1:PORT`.
      environ: as `Emulator.environ`.
      pid: of the process that it runs in.
    """

    def __init__(self, url: str, pid: int, count: Callable[[], dict[str, int]]):
        self.url, self.environ, self.pid, self._count = url, environ_of(url), pid, count

    @property
    def requests(self) -> collections.Counter[str]:
        """Requests so far: by method and kind ("GET read", "GET stat", "GET list", "POST write", "PUT write",
        "POST copy", "DELETE delete"), and faults ("fault 503")."""
        return collections.Counter(self._count())


@contextlib.contextmanager
def fault_proxy(target: str, delay: float = 0.0, faults: Faults | None = None) -> Iterator[Proxy]:
    """Starts a proxy, and ends it after the block.

    Without faults it is a process of its own (so that it takes no time from the one that is measured), which inherits
    the cores that this one may run on; with faults it is a thread of this process.

    Args:
      target: URL of the emulator.
      delay: seconds that each request waits before it is passed on.
    """
    if faults is None:
        with child.Child(__name__, "the proxy in front of the emulator") as process:
            started = process.ask({"target": target, "delay": delay})
            yield Proxy(started["url"], started["pid"], lambda: process.ask({}))
        return
    running = _Running(target, delay, faults)
    try:
        yield Proxy(running.url, os.getpid(), lambda: dict(running.server.counted))
    finally:
        running.stop()


class _Running:
    """A server in a thread with its own event loop."""

    def __init__(self, target: str, delay: float, faults: Faults | None):
        self.server = _Server(target, delay, faults)
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="fault_proxy", daemon=True)
        self._thread.start()
        started.wait()
        self.url = f"http://127.0.0.1:{self.server.port}"

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        listening = self._loop.run_until_complete(self.server.listen())
        started.set()
        self._loop.run_forever()
        listening.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


class _Message(NamedTuple):
    """First line and headers of a request or an answer, headers as they came."""

    start: str
    headers: list[tuple[str, str]]

    def get(self, name: str) -> str:
        return next((value for found, value in self.headers if found.lower() == name), "")

    def encoded(self, **changed: str) -> bytes:
        """The head, with headers replaced where they were sent: `host="..."`."""
        lines = [f"{name}: {changed.get(name.lower(), value)}" for name, value in self.headers]
        return "\r\n".join([self.start, *lines, "", ""]).encode("latin-1")


class _Server:
    def __init__(self, target: str, delay: float, faults: Faults | None):
        self._target, self._delay, self._faults = urllib.parse.urlsplit(target), delay, faults
        self.counted: collections.Counter[str] = collections.Counter()
        self._number = 0
        self.port = 0

    async def listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_MOST_HEAD)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client, which has one to the emulator."""
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while (request := await _head(reader)) is not None:
                if request.get("expect"):
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = b"".join([part async for part in _body(reader, request)])
                method, path, _ = request.start.split(" ", 2)
                self._number += 1
                self.counted[f"{method} {kind_of(method, path)}"] += 1
                fault = self._faults(method, path, self._number) if self._faults else None
                if fault:
                    self.counted[f"fault {fault}"] += 1
                if self._delay:
                    await asyncio.sleep(self._delay)
                if fault in _STATUS:
                    writer.write(_refusal(int(fault), _STATUS[fault]))
                    await writer.drain()
                    continue
                if fault == "hang":
                    await reader.read()
                    return
                if fault == "reset":
                    return _reset(writer)
                if upstream is None:
                    upstream = await asyncio.open_connection(self._target.hostname, self._target.port, limit=_MOST_HEAD)
                upstream[1].write(request.encoded(host=self._target.netloc) + body)
                await upstream[1].drain()
                if not await self._answer(method, upstream[0], writer, fault):
                    return
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # either side went away, or the proxy was stopped
        finally:
            for open_writer in (writer, *(upstream or ())[1:]):
                with contextlib.suppress(OSError):
                    open_writer.close()

    async def _answer(
        self, method: str, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str | None
    ) -> bool:
        """Passes an answer on; False if the connection is over."""
        answer = await _head(upstream)
        if answer is None:
            return False
        location = answer.get("location").replace(self._target.netloc, f"127.0.0.1:{self.port}")
        bodiless = method == "HEAD" or answer.start.split(" ")[1] in ("204", "304")
        parts = _body(upstream, answer, as_sent=True) if not bodiless else _nothing()
        if fault == "lost":
            async for _ in parts:
                pass
            _reset(writer)
            return False
        writer.write(answer.encoded(location=location))
        if fault == "truncate":
            data = b"".join([part async for part in parts])
            writer.write(data[: len(data) // 2])
            await writer.drain()
            return False
        async for part in parts:
            writer.write(part)
            await writer.drain()
        return answer.get("connection").lower() != "close"


def kind_of(method: str, path: str) -> str:
    """`read`, `stat`, `list`, `write`, `copy`, `delete` or `bucket`, from a request of the JSON or the XML API."""
    path, _, query = path.partition("?")
    if method == "DELETE":
        return "delete"
    if method == "PUT" or "/upload/" in path:
        return "write"
    if method == "POST":
        return "copy" if re.search(r"/(rewriteTo|copyTo|compose)", path) else "bucket"
    if path.endswith("/o") or re.search(r"/o/$", path):
        return "list"
    if "alt=media" in query or path.startswith("/download/") or not re.match(r"/(storage|b)\b", path):
        return "read"
    return "stat" if "/o/" in path else "bucket"


async def _head(reader: asyncio.StreamReader) -> _Message | None:
    """The head of the next message; None at the end of the connection."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError as e:
        if e.partial:
            raise
        return None
    start, *lines = head[:-4].split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return _Message(start, [(name, value.strip()) for name, _, value in pairs])


async def _body(reader: asyncio.StreamReader, message: _Message, as_sent: bool = False) -> Any:
    """A message's body in parts, of chunked ones with their lengths, since the head is passed on too."""
    if "chunked" in message.get("transfer-encoding").lower():
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)  # the last one ends the message: no trailers are sent
            if not size:
                return
    left = int(message.get("content-length") or 0)
    while left:
        part = await reader.read(min(left, 1 << 18))
        if not part:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(part)
        yield part
    if as_sent and not message.get("content-length") and message.get("connection").lower() == "close":
        while part := await reader.read(1 << 18):
            yield part


async def _nothing() -> Any:
    parts: tuple[bytes, ...] = ()
    for part in parts:
        yield part


def _refusal(status: int, reason: str) -> bytes:
    body = json.dumps({"error": {"code": status, "message": f"{reason} (injected)"}}).encode()
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes a connection such that the other side sees a reset."""
    found = writer.get_extra_info("socket")
    if found is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def main() -> None:
    """The proxy as a process: the first line that it reads starts it, each further one asks for the counts."""
    running: list[_Running] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if not running:
            running.append(_Running(request["target"], request["delay"], None))
            return {"url": running[0].url, "pid": os.getpid()}
        return dict(running[0].server.counted)

    child.serve(answer)
    for started in running:
        started.stop()


if __name__ == "__main__":
    main()
    sys.exit(0)
