"""Client of `python -m uwm_jax.serve`, in one file that a robot's machine copies.

It needs `websockets`, `msgpack` and `numpy` (1 or 2), and imports nothing else outside of the standard library:

    pip install websockets msgpack numpy

Request by request, where the robot stands still meanwhile:

    with Client("ws://gpu-host:8000", token="...") as client:
        while True:
            reply = client.infer({"obs/front": frames, "obs/state": state})  # (2, H, W, 3) uint8, (2, D)
            for row in reply["actions"][:8]:
                robot.apply(row)

Without standing still, a chunk is asked for while rows of the one before are executed (`ChunkLoop`):

    with ChunkLoop(client, execute=8, delay=3) as loop:
        while True:
            robot.apply(loop.act({"obs/front": frame, "obs/state": state}))  # of this step alone

With a server that runs `--stepwise`, a connection is an episode: `client.reset()`, then `client.infer` at every control
step with that step's observation; `reply["actions"]` has one row.
"""

from __future__ import annotations

import collections
import inspect
import secrets
import socket
import ssl
import struct
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

DTYPES = ("|u1", "|b1", "<i4", "<i8", "<f4", "<f8")  # of arrays and scalars that travel
_SENT_AS = {"|i1": "<i4", "<i2": "<i4", "<u2": "<i4", "<u4": "<i8", "<f2": "<f4"}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between two attempts to connect
_MODEL = ("inputs", "frames", "action_horizon")  # of the metadata, what a control loop is built on


class ClientError(Exception):
    """What goes wrong between this client and the server."""


class RequestError(ClientError):
    """The server refused a request; the message is the server's, and the connection stays open."""


class ProtocolError(ClientError):
    """What the server sent is not what `uwm_jax.serve` sends."""


class Refused(ClientError):
    """Connecting again will not help: a wrong token or origin, or a certificate that is not trusted."""


class Late(ClientError, TimeoutError):
    """No reply within the deadline; one that comes later is dropped."""


class Disconnected(ClientError, ConnectionError):
    """There is no connection, or it was lost in the middle of a stepwise episode, or leads to another model now."""


class Stopped(ClientError):
    """`ChunkLoop` has no row left to execute: the robot has to stop. The next call of `act` starts anew."""


class Client:
    """A connection to a server; made again with growing pauses where it is lost.

    One request at a time: calls from several threads wait for each other.

    Args:
        url: `ws://HOST:PORT` or `wss://HOST:PORT`.
        token: that the server was started with; "" for none.
        deadline: seconds from the start of a request to its reply, connecting again included.
        wait: seconds to wait for the server at first.
        tls: for `wss://`: a file of certificates to trust (PEM), or an `ssl.SSLContext`; None: the system's.
    Raises:
        Refused: the server does not take the token, or its certificate is not trusted.
        Disconnected: no server within `wait` seconds.
        ProtocolError: another server.

    Attributes:
        metadata: what the server serves: its first message.
        dropped: replies that were not for the request waited for.
        reconnected: connections made after the first one.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        *,
        deadline: float = 10.0,
        wait: float = 60.0,
        tls: str | ssl.SSLContext | None = None,
    ):
        self.url, self.deadline = url, deadline
        self.metadata: dict[str, Any] = {}
        self.dropped, self.reconnected = 0, 0
        self._headers = {"Authorization": f"Api-Key {token}"} if token else {}
        self._tls = ssl.create_default_context(cafile=tls) if isinstance(tls, str) else tls
        self._prefix, self._count = secrets.token_hex(4), 0
        self._waiting: collections.deque[str] = collections.deque()  # requests of this connection without an answer
        self._connection: ClientConnection | None = None
        self._reset, self._in_episode = False, False
        self._lock = threading.Lock()
        self._again(time.monotonic() + wait, lambda _: None)

    def infer(self, observation: Mapping[str, Any], *, deadline: float | None = None) -> dict[str, Any]:
        """The server's reply to a request: `actions` (n, Da) float32 in the robot's units, `server_timing` and more.

        Args:
            observation: what `metadata["inputs"]` names, in raw units: frames uint8 (H, W, 3) or (To, H, W, 3),
                numbers (D,) or (To, D); `prompt`, `mode`, `seed`, `promised` and other fields of a request.
            deadline: seconds; None: the client's.
        Raises:
            RequestError: the server refuses the request.
            Late: no reply within the deadline.
            Disconnected: no connection within the deadline; or a stepwise episode was cut off, whose history is gone:
                the next call starts a new one.
        """
        with self._lock:
            ends = time.monotonic() + (self.deadline if deadline is None else deadline)
            self._count += 1
            name = f"{self._prefix}-{self._count}"
            request = {**observation, "request_id": name}
            if self._reset and self.metadata.get("stepwise"):
                request["reset"] = True
            data = pack(request)
            reply = self._again(ends, lambda connection: self._ask(connection, name, data, ends))
            self._reset = False
            return reply

    def reset(self) -> None:
        """The next request starts an episode; what it is to a server without `--stepwise` is nothing."""
        self._reset, self._in_episode = True, False

    def close(self) -> None:
        """Closes the connection; a later request makes another."""
        connection, self._connection = self._connection, None
        self._waiting.clear()
        if connection is not None:
            connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _again(self, ends: float, use: Any) -> Any:
        """`use(connection)`, with another connection wherever one is lost or there is none, until `ends`."""
        pause = _FIRST_PAUSE
        while True:
            try:
                if self._connection is None:
                    self._connection = self._connect(ends)
                return use(self._connection)
            except (ConnectionClosed, InvalidHandshake, EOFError, OSError) as e:
                if isinstance(e, ClientError):
                    raise
                self.close()
                if self._in_episode and self.metadata.get("stepwise"):
                    self._in_episode = False
                    raise Disconnected(
                        f"{self.url}: the connection was lost ({_reason(e)}), and with it the episode's history. Stop "
                        "the robot; the next request starts a new episode."
                    ) from e
                if time.monotonic() + pause >= ends:
                    raise Disconnected(f"{self.url}: no connection within the deadline ({_reason(e)}).") from e
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _connect(self, ends: float) -> ClientConnection:
        options: dict[str, Any] = {"max_size": None, "compression": None, "ssl": self._tls}
        options["open_timeout"] = max(ends - time.monotonic(), 0.001)
        if "proxy" in inspect.signature(connect).parameters:  # a robot's server is not behind the web's proxy
            options["proxy"] = None
        try:
            connection = connect(self.url, additional_headers=self._headers, **options).__enter__()
        except ssl.SSLCertVerificationError as e:
            raise Refused(f"{self.url}: the server's certificate is not trusted ({e}). tls=FILE names its own.") from e
        except InvalidStatus as e:
            if e.response.status_code in (401, 403):
                text = bytes(e.response.body or b"").decode(errors="replace").strip()
                raise Refused(f"{self.url}: HTTP {e.response.status_code}: {text or 'check the token'}") from e
            raise
        try:
            first = self._metadata(connection, ends)
        except BaseException:
            connection.close()
            raise
        if self.metadata:
            self.reconnected += 1
            if changed := [key for key in _MODEL if first.get(key) != self.metadata.get(key)]:
                connection.close()
                raise Disconnected(
                    f"{self.url} serves another model now: {', '.join(changed)} of its metadata differ. Make a new "
                    "client, and check the robot's loop."
                )
        self.metadata = first
        return connection

    def _metadata(self, connection: ClientConnection, ends: float) -> dict[str, Any]:
        try:
            frame = connection.recv(timeout=max(ends - time.monotonic(), 0.001))
        except TimeoutError as e:
            raise Disconnected(f"{self.url}: connected, but no metadata within the deadline.") from e
        first = None if isinstance(frame, str) else unpack(frame)
        if not isinstance(first, dict):
            raise ProtocolError(f"{self.url}: expected metadata as the first message, found {_start(frame)}")
        return first

    def _ask(self, connection: ClientConnection, name: str, data: bytes, ends: float) -> dict[str, Any]:
        _limit_sending(connection.socket, max(ends - time.monotonic(), 0.001))
        self._waiting.append(name)
        connection.send(data)
        reply: Any
        answered: Any
        while True:
            left = ends - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError
                frame = connection.recv(timeout=left)
            except TimeoutError as e:
                self._in_episode = True  # the server may have taken it
                raise Late(f"{self.url}: no reply to request {name} within the deadline.") from e
            if isinstance(frame, str):
                answered, reply = self._refused(frame)
            else:
                reply = unpack(frame)
                if not isinstance(reply, dict) or "request_id" not in reply:
                    raise ProtocolError(f"{self.url}: expected a reply with a request_id, found {_start(frame)}")
                answered = reply["request_id"]
            if answered in self._waiting:
                self._waiting.remove(answered)
            if answered != name:
                self.dropped += 1
            elif isinstance(reply, str):
                raise RequestError(reply)
            else:
                self._in_episode = True
                return reply

    def _refused(self, text: str) -> tuple[Any, Any]:
        """The request that an error is about, and what it says: `request ID: ...`, else it is the oldest one's."""
        start, colon, rest = text.partition(": ")
        if colon and start.startswith("request ") and start[8:] in self._waiting:
            return start[8:], rest
        return self._waiting[0] if self._waiting else None, text


class ChunkLoop:
    """Real-time execution: one row at every control step, while the next chunk is asked for in a thread.

    Row k of a chunk that is asked for at step s is for step s + k; its answer is used from step s + `delay` on, and the
    `delay` rows that are executed meanwhile go along as `promised`. A server whose model cannot hold them
    (`metadata["promised"]` is False) gets none: the loop then switches naively, and warns. The first chunk is waited
    for. An answer that comes later than `delay` steps after its request is used from then on; where it does not come
    before the old chunk ends, `act` raises `Stopped`.

    Args:
        client: of a server without `--stepwise`.
        execute: rows of each chunk that are executed; None: as the server says.
        delay: control steps from a request to the use of its answer, `execute` at most; 0 waits for every answer.
        deadline: seconds for an answer; None: the client's.
    Raises:
        ValueError: `execute` and `delay` do not fit into a chunk, or the server is stepwise.

    Attributes:
        late_steps: steps executed in an old chunk, although the next one was due.
        stops: how often there was no row left.
    """

    def __init__(self, client: Client, execute: int | None = None, delay: int = 0, deadline: float | None = None):
        about = client.metadata
        horizon = int(about["action_horizon"])
        execute = int(about["execute"]) if execute is None else execute
        if about.get("stepwise"):
            raise ValueError("a stepwise server executes its chunks itself: call client.infer at every step.")
        if execute < 1 or delay < 0 or execute + delay > horizon:
            raise ValueError(
                f"execute={execute} and delay={delay}: expected 1 and 0 at least, and {horizon} together at most, the "
                "rows of a chunk."
            )
        if delay > execute:
            raise ValueError(
                f"delay={delay}: expected at most execute={execute}, since a chunk is asked for after the one before "
                "is there."
            )
        self._promises = delay > 0 and bool(about.get("promised", True))
        if delay and not self._promises:
            warnings.warn(
                "the server's model cannot hold promised rows: the loop switches naively from chunk to chunk.",
                stacklevel=2,
            )
        self.client, self.execute, self.delay, self._deadline = client, execute, delay, deadline
        self.late_steps, self.stops = 0, 0
        self._back = [int(back) for back in about.get("history", [0])]
        self._ranks = {key: len(like["shape"]) for key, like in about["inputs"].items()}
        self._thread = ThreadPoolExecutor(1)
        self._asked: Future[dict[str, Any]] | None = None
        self.reset()

    def reset(self) -> None:
        """Starts an episode: what was seen, asked for and planned is forgotten."""
        self._seen: collections.deque[dict[str, Any]] = collections.deque(maxlen=max(self._back) + 1)
        self._step = 0
        self._forget()

    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The row (Da,) float32 to execute now; called once for every control step.

        Args:
            observation: of this step, as `Client.infer` takes it with one frame: the history is kept here.
        Raises:
            Stopped: no answer in time; the other errors are those of `Client.infer`.
        """
        # Copies: a robot's drivers may write the next frame where this one lies.
        self._seen.append({k: np.array(x) if isinstance(x, np.ndarray) else x for k, x in observation.items()})
        if self._chunk is None:
            self._take(self.client.infer(self._request(0), deadline=self._deadline), self._step)
        else:
            self._answer()
            if self._asked is None and self._step >= self._next:
                self._ask()
                if not self.delay:
                    self._answer()
        assert self._chunk is not None
        at = self._step - self._start
        if at >= len(self._chunk):
            self.stops += 1
            self._forget()
            raise Stopped(
                f"step {self._step}: no answer in time, and the old chunk of {at} rows is executed. Stop the robot; "
                f"delay={self.delay} steps are too few for this connection."
            )
        self._step += 1
        return self._chunk[at]

    def close(self) -> None:
        """Ends the thread; an answer that is waited for is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> ChunkLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self) -> None:
        assert self._chunk is not None
        left = max(len(self._chunk) - (self._step - self._start), 0)  # rows that go on to be executed
        ahead = min(self.delay, left)
        self._asked_at, self._due = self._step, self._step + ahead
        arguments = {"deadline": self._deadline}
        self._asked = self._thread.submit(self.client.infer, self._request(ahead), **arguments)

    def _answer(self) -> None:
        """Takes the answer that is due, if it is there; with a delay of 0 it is waited for."""
        if self._asked is None or self._step < self._due:
            return
        if not self._asked.done() and self.delay:
            self.late_steps += 1
            return
        asked, self._asked = self._asked, None
        try:
            self._take(asked.result(), self._asked_at)
        except (Late, Disconnected):
            if not self.delay:
                raise
            self.late_steps += 1  # it is asked for again

    def _take(self, reply: Mapping[str, Any], start: int) -> None:
        self._chunk, self._start, self._next = reply["actions"], start, start + self.execute

    def _forget(self) -> None:
        if self._asked is not None:
            self._asked.cancel()
        self._asked, self._chunk = None, None
        self._start = self._next = self._asked_at = self._due = self._step

    def _request(self, promised: int) -> dict[str, Any]:
        """The last observations as one request; an episode's first one fills its history."""
        newest = len(self._seen) - 1
        request = dict(self._seen[newest])
        for key, value in request.items():
            if isinstance(value, np.ndarray) and value.ndim + 1 == self._ranks.get(key):
                request[key] = np.stack([self._seen[max(newest - back, 0)][key] for back in self._back])
        if promised and self._promises and self._chunk is not None:
            at = self._step - self._start
            request["promised"] = self._chunk[at : at + promised]
        return request


def pack(message: Mapping[str, Any]) -> bytes:
    """A message as one msgpack map: arrays and numpy's numbers as maps of openpi's form.

    Raises:
        TypeError: a value that is no array of numbers, number, string, list or map.
    """
    return msgpack.packb(dict(message), default=_encode)


def unpack(data: bytes) -> Any:
    """The inverse of `pack`.

    Raises:
        ProtocolError: the data are something else.
    """
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except ProtocolError:
        raise
    except Exception as e:  # msgpack has an exception for every way in which bytes are wrong
        raise ProtocolError(f"a message of {len(data)} bytes is not msgpack: {e}") from e


def _encode(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"cannot send {type(value).__name__}: expected arrays, numbers, strings, lists or maps")
    little = value.astype(value.dtype.newbyteorder("<"))
    text = _SENT_AS.get(little.dtype.str, little.dtype.str)
    if text not in DTYPES:
        raise TypeError(f"cannot send numbers of dtype {value.dtype}: expected one of {', '.join(DTYPES)}")
    little = little.astype(text)
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": little.item(), b"dtype": text}
    return {b"__ndarray__": True, b"data": little.tobytes(), b"dtype": text, b"shape": value.shape}


def _decode(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in found and b"__npgeneric__" not in found:
        return found
    text = found.get(b"dtype")
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    if text not in DTYPES:  # compared as text: numpy would run what some names of dtypes mean
        raise ProtocolError(f"expected numbers of dtype {', '.join(DTYPES)}, found {text!r}")
    try:
        if b"__npgeneric__" in found:
            return np.dtype(text).type(found[b"data"])
        return np.frombuffer(found[b"data"], text).reshape(found[b"shape"]).copy()
    except (KeyError, TypeError, ValueError) as e:
        raise ProtocolError(f"an array whose bytes are not its shape's: {e}") from e


def _limit_sending(to: socket.socket, seconds: float) -> None:
    """A server that reads nothing must not hold a request beyond its deadline."""
    if sys.platform != "win32":
        whole = int(seconds)
        to.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", whole, int((seconds - whole) * 1e6)))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _start(frame: str | bytes) -> str:
    return repr(frame[:200])
