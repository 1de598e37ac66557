"""The server: websocket connections that speak openpi's protocol, health and metrics on the same port, and a drain.

The first frame of a connection is the metadata. Every binary frame of the client is a request, answered in order by a
binary frame, or by a text frame that says what is wrong, after which the connection goes on.

Threads: the event loop moves bytes and nothing else. Requests are read (decoded, checked, resized, embedded) in a few
threads, the model runs in one, and the recorder writes in one.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.reading import cause_of
from uwm_jax.serving import access, messages
from uwm_jax.serving.batching import Answer, Batcher, Engine, Job
from uwm_jax.serving.contract import Contract, Request
from uwm_jax.serving.episodes import Episode
from uwm_jax.serving.front import Front, Pages
from uwm_jax.serving.status import ANSWERED, FAILED, GONE, REFUSED, Status

MOST_FRAGMENTS = 4096  # of one message
MOST_WAITING = 2  # messages of a connection, besides the one that is answered
MOST_UNRECORDED = 64  # steps that wait for the recorder; then robots wait for it too
GRACE = 0.1  # seconds in which a draining server still takes what was on its way
CLOSING_SECONDS = 5.0  # for the closing handshake of a client
GOING_AWAY, POLICY_VIOLATION = 1001, 1008
IGNORED = "ignored: this model reads no text"

# Its messages have headers in them, and tracebacks for what is only a bad request.
_quiet = logging.getLogger("uwm_jax.serving.websockets")
_quiet.setLevel(logging.CRITICAL + 1)
_quiet.propagate = False


class Recorder(Protocol):
    """Keeps the episodes of a server with `stepwise`; called in one thread, in the order of a connection's steps."""

    def step(self, connection: int, request: Request, action: np.ndarray) -> None:
        """A step that was answered: its observation (`request.inputs`, single frames) and the action (Dr,) float32."""

    def end(self, connection: int) -> None:
        """A connection was closed."""


@dataclasses.dataclass
class _Connection:
    """A client.

    Attributes:
      inbox: messages that were received whole; news: set when there are more, or none will come; room: set when there
        is room for more.
      closed: whether the client is gone; leaving: whether the server takes no more of its messages.
      count: requests so far, from which the noise of the next follows.
      episode: its history, where the server keeps it.
      last_total: seconds of the last request.
      pending: the answer that it waits for.
      told: the remarks that it was told already.
    """

    number: int
    socket: ServerConnection
    episode: Episode
    count: int = 0
    last_total: float | None = None
    pending: asyncio.Future[Answer] | None = None
    told: set[str] = dataclasses.field(default_factory=set)
    inbox: collections.deque[_Received] = dataclasses.field(default_factory=collections.deque)
    news: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    room: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    closed: bool = False
    leaving: bool = False


class _Received(NamedTuple):
    message: bytes | str
    at: float  # on the clock of `time.perf_counter`


class _Gone(Exception):
    """The client closed its connection while its request ran."""


class Server:
    """Serves one model.

    Args:
      contract, engine: the model's messages and its batches.
      host, port: to listen on; port 0 takes a free one.
      token: that clients must send; "" for none.
      tls: certificate; None for an unencrypted connection.
      deadline: seconds that a request waits for others to make a batch.
      most: connections at once.
      drain_seconds: after which a draining server closes connections whose requests are still unanswered.
      recorder: of the steps; None for none.
      pages: further HTTP pages; they must not block.
    Raises:
      UserError: the address is taken or is not this machine's.
    """

    def __init__(
        self,
        contract: Contract,
        engine: Engine,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        deadline: float = 0.005,
        most: int = 64,
        drain_seconds: float = 30.0,
        recorder: Recorder | None = None,
        pages: Pages = lambda path, authorized: None,
    ):
        self.contract, self.engine, self.status = contract, engine, Status()
        self._token, self._tls, self._deadline, self._most = token, tls, deadline, most
        self._drain_seconds, self._recorder, self._pages = drain_seconds, recorder, pages
        self._loopback = access.is_loopback(host)
        self._socket = _bound(host, port)
        self._numbers = 0
        self._open: dict[int, _Connection] = {}
        self._submitted = 0  # connections whose request is in the batcher
        self._drained: asyncio.Event | None = None
        self._drain_began = float("inf")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unrecorded = asyncio.Semaphore(MOST_UNRECORDED)
        self._metadata = messages.encode(contract.metadata())

    @property
    def address(self) -> str:
        """`ws://host:port`, or `wss://`."""
        host, port = self._socket.getsockname()[:2]
        return f"{'wss' if self._tls else 'ws'}://{f'[{host}]' if ':' in host else host}:{port}"

    def warm(self, progress: str = "") -> None:
        """Compiles all programs; called before `run`. `progress` is the title of a bar; "" for none."""
        self.contract.actor.cut = 1  # limits say once what they cut, and that is for a robot's request
        self.engine.warm([Job(request, 0, 0) for request in self.contract.examples()], progress)
        self.contract.actor.cut = 0
        self.status.warmed()

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Accepts clients until it has drained; `ready` is called when it does."""
        self._loop, self._drained = asyncio.get_running_loop(), asyncio.Event()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        limit = self.contract.limit
        batcher = self._batcher = Batcher(
            self.engine.run,
            self.engine.sizes[-1],
            deadline=self._deadline,
            others=lambda: len(self._open) - self._submitted,
            tell=self.status.batch,
        )
        batches = asyncio.create_task(batcher.serve())
        front = Front(
            self.status,
            self._pages,
            token=self._token,
            loopback=self._loopback,
            encrypted=self._tls is not None,
            most=self._most,
            busy_since=lambda: batcher.busy_since,
            cut=lambda: self.contract.actor.cut,
        )
        with (
            concurrent.futures.ThreadPoolExecutor(2, "reader") as self._readers,
            concurrent.futures.ThreadPoolExecutor(1, "recorder") as self._records,
        ):
            try:
                async with serve(
                    self._connected,
                    sock=self._socket,
                    ssl=self._tls,
                    process_request=front.answer,
                    compression=None,
                    server_header=None,
                    max_size=2 * limit,  # up to here the connection survives a message that is too long
                    max_queue=4,
                    close_timeout=CLOSING_SECONDS,
                    logger=_quiet,
                ):
                    ready()
                    ended = asyncio.create_task(self._drained.wait())
                    await asyncio.wait([ended, batches], return_when=asyncio.FIRST_COMPLETED)
                    ended.cancel()
            finally:
                batches.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await batches

    def drain(self) -> None:
        """Answers what was received whole, then closes all connections and ends `run`; from any thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        if self.status.draining:
            return
        self.status.draining, self._drain_began = True, time.perf_counter()
        for connection in self._open.values():
            connection.news.set()
        self._ending = asyncio.create_task(self._finish_draining())

    async def _finish_draining(self) -> None:
        end = time.perf_counter() + self._drain_seconds
        await asyncio.sleep(GRACE)
        while self._open and time.perf_counter() < end:
            await asyncio.sleep(0.01)
        assert self._drained is not None
        self._drained.set()

    # --- Connections -------------------------------------------------------------------------------

    async def _connected(self, socket: ServerConnection) -> None:
        """Serves a client until it or the server goes away."""
        self._numbers += 1
        fresh = Episode(self.contract.history, self.contract.execute)
        connection = self._open[self._numbers] = _Connection(self._numbers, socket, fresh)
        self.status.open, self.status.connections = len(self._open), self.status.connections + 1
        reader = asyncio.create_task(self._receive(connection))
        try:
            await socket.send(self._metadata)
            while received := await self._next(connection):
                await self._answer(connection, received)
            connection.leaving = True
            if self.status.draining:
                await socket.close(GOING_AWAY, "the server is draining")
        except ConnectionClosed:
            pass
        finally:
            reader.cancel()
            self._open.pop(connection.number)
            self.status.open = len(self._open)
            self._batcher.look()
            await self._record("end", connection.number)

    async def _receive(self, connection: _Connection) -> None:
        """Puts messages into the connection's inbox as they come in, until it is closed."""
        try:
            while True:
                message = await _whole_message(connection.socket)
                if connection.leaving:
                    continue  # read, so that the closing handshake behind it is seen
                connection.inbox.append(_Received(message, time.perf_counter()))
                connection.news.set()
                while len(connection.inbox) >= MOST_WAITING:
                    connection.room.clear()
                    await connection.room.wait()
        except ConnectionClosed:
            pass
        finally:
            connection.closed = True
            connection.news.set()
            if connection.pending is not None and not connection.pending.done():
                connection.pending.set_exception(_Gone())

    async def _next(self, connection: _Connection) -> _Received | None:
        """The next message; None when the client is gone or, while draining, none is left."""
        while not connection.inbox:
            if connection.closed or connection.leaving:
                return None
            connection.news.clear()
            try:
                await asyncio.wait_for(connection.news.wait(), GRACE if self.status.draining else None)
            except TimeoutError:
                return None
        connection.room.set()
        return connection.inbox.popleft()

    async def _answer(self, connection: _Connection, received: _Received) -> None:
        """Sends the reply to a message, or what is wrong with it; raises ConnectionClosed where nobody is left."""
        self.status.received += 1
        outcome, mode, infer = FAILED, "", 0.0
        packed: bytes | str
        request, action = None, None
        try:
            try:
                request = await self._read(connection, received)
                mode = request.mode
                reply, infer = await self._reply(connection, request)
                action = reply.get("actions")
                packed, outcome = messages.encode(reply), ANSWERED
            except UserError as e:
                packed, outcome = str(e), REFUSED
            except RunError as e:
                packed = str(e)
            if outcome == FAILED and request and request.request_id is not None:
                packed = f"request {request.request_id}: {packed!s}"
            await connection.socket.send(packed)
        except (ConnectionClosed, _Gone):
            outcome = GONE
        finally:
            connection.last_total = time.perf_counter() - received.at
            self.status.done(outcome, mode, connection.last_total, infer)
        if outcome == ANSWERED and request and action is not None:
            await self._record("step", connection.number, request, action[0])

    async def _read(self, connection: _Connection, received: _Received) -> Request:
        if isinstance(received.message, str):
            raise UserError("expected a binary frame with a msgpack map, found a text frame.")
        if received.at > self._drain_began + GRACE:
            connection.leaving = True
            raise UserError("the server is draining: this request was not accepted.")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._readers, self.contract.read, received.message)
        except (UserError, RunError):
            raise
        except Exception as e:  # of a text encoder, say: the client did nothing wrong
            raise RunError(f"the request could not be read: {type(e).__name__}: {cause_of(e)}") from e

    async def _reply(self, connection: _Connection, request: Request) -> tuple[dict[str, Any], float]:
        """The reply to a request, and the seconds of the model."""
        began = time.perf_counter()
        if request.reset:
            connection.count = 0
        if self.contract.stepwise:
            episode, seconds = connection.episode.seen(request), 0.0
            if not episode.left:
                whole = dataclasses.replace(request, inputs=episode.inputs(request))
                answer = await self._infer(connection, Job(whole, episode.seed, episode.decisions))
                episode, seconds = episode.planned(answer.outputs["actions"]), answer.seconds
            action, connection.episode = episode.stepped()
            outputs = {"actions": action}
        else:
            decision = connection.count if request.seed is None else 0
            answer = await self._infer(connection, Job(request, request.seed or 0, decision))
            outputs, seconds = answer.outputs, answer.seconds
        connection.count += 1
        history = "kept" if self.contract.stepwise else "repeated" if request.repeated else "given"
        reply: dict[str, Any] = {**outputs, "history": history}
        reply["server_timing"] = {"infer_ms": (time.perf_counter() - began) * 1000}
        if connection.last_total is not None:
            reply["server_timing"]["prev_total_ms"] = connection.last_total * 1000
        reply["policy_timing"] = {"infer_ms": seconds * 1000}
        if request.request_id is not None:
            reply["request_id"] = request.request_id
        self.status.remarks += len(request.remarks)
        if told := [line for line in request.remarks if line not in connection.told]:
            reply["warnings"] = told
            connection.told.update(told)
        if request.prompt is not None and not self.contract.reads_text and IGNORED not in connection.told:
            reply["prompt"] = IGNORED
            connection.told.add(IGNORED)
        return reply, seconds

    async def _infer(self, connection: _Connection, job: Job) -> Answer:
        """The model's answer to a job."""
        if connection.closed:
            raise _Gone
        connection.pending = self._batcher.submit(job)
        self._submitted += 1
        self._batcher.look()
        try:
            return await connection.pending
        finally:
            self._submitted -= 1
            connection.pending = None

    async def _record(self, what: str, *values: Any) -> None:
        """Queues a call for the recorder's thread, which makes them in order. Writing one robot's episode takes a
        while, and does not hold up another robot."""
        if self._recorder is None:
            return
        await self._unrecorded.acquire()
        call = asyncio.get_running_loop().run_in_executor(self._records, self._recorded, what, values)
        call.add_done_callback(lambda _: self._unrecorded.release())

    def _recorded(self, what: str, values: tuple[Any, ...]) -> None:
        """Calls the recorder, and lets it go where it fails."""
        if self._recorder is None:
            return
        try:
            getattr(self._recorder, what)(*values)
        except Exception as e:
            self._recorder = None
            warn(f"recording ends here: {type(e).__name__}: {cause_of(e)}")


@contextlib.contextmanager
def in_thread(server: Server) -> Iterator[str]:
    """A warm server that runs in a thread; gives its address, and drains it at the end."""
    ready = threading.Event()

    def run() -> None:
        try:
            asyncio.run(server.run(ready.set))
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    ready.wait()
    try:
        yield server.address
    finally:
        server.drain()
        thread.join()


async def _whole_message(socket: ServerConnection) -> bytes | str:
    """The next message. Fragments are joined as they come: thousands that wait would take many times their bytes."""
    joined = bytearray()
    first: bytes | str | None = None
    closing: asyncio.Task[None] | None = None
    count = 0
    async for part in socket.recv_streaming():
        count += 1
        if count == 1:
            first = part
            continue
        if count == 2 and isinstance(first, bytes):
            joined += first
        if isinstance(part, bytes) and closing is None:
            joined += part
        if count == MOST_FRAGMENTS + 1:  # what still comes is read, so that the closing handshake behind it is seen
            reason = f"a message of more than {MOST_FRAGMENTS} fragments"
            closing = asyncio.create_task(socket.close(POLICY_VIOLATION, reason))
            joined.clear()
    if closing is not None:
        await closing
        return await _whole_message(socket)  # raises ConnectionClosed
    assert first is not None
    return first if count == 1 or isinstance(first, str) else bytes(joined)


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address, on which nobody listens yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger here
        bound.bind(address)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # until `run` listens, nobody else may bind it
    except (OSError, OverflowError) as e:
        raise UserError(f"--host={host}, --port={port}: cannot listen here: {cause_of(e)}.") from e
    return bound
