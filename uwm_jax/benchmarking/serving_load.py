"""A policy server in a process of its own under load from this one: honest clients, and hostile ones."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from uwm_jax.benchmarking import hostile
from uwm_jax.errors import RunError

_PATIENCE = 120.0  # seconds for a reply


class ServeProcess:
    """`python -m uwm_jax.serve` on a free port of loopback; use it in a `with`, whose end kills what still runs.

    Args:
      flags: of the command.
    Raises:
      RunError: it ended before it accepted clients; with what it wrote to stderr.

    Attributes:
      address: `ws://host:port`.
      process: the process.
      line: that it printed when it began to accept clients.
    """

    def __init__(self, flags: Sequence[str]):
        self._errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "uwm_jax.serve", "--port=0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r" at (wss?://\S+)", self.line)
        if not found:
            self.process.wait()
            raise RunError(f"{' '.join(command)} ended with status {self.process.returncode}: {self._told()[-2000:]}")
        self.address = found[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._errors.close()

    def end(self, seconds: float = 60.0) -> tuple[int, str]:
        """Sends SIGTERM; the exit status, and what the server printed."""
        self.process.send_signal(signal.SIGTERM)
        printed, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, printed + self._told()

    def memory(self) -> int:
        """Resident bytes, on Linux."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _told(self) -> str:
        self._errors.seek(0)
        return self._errors.read()


class Latency(NamedTuple):
    """Of `clients` at once, each with a new request when its reply is there: ms of a request, and requests a second."""

    clients: int
    p50_ms: float
    p99_ms: float
    per_second: float


class Harm(NamedTuple):
    """Outcome of hostile messages: how many were refused in words and answered, and seconds in all."""

    refused: int
    answered: int
    seconds: float


@contextlib.contextmanager
def opened(address: str) -> Iterator[tuple[ClientConnection, dict[str, Any]]]:
    """A connection, and its metadata."""
    with connect(address, compression=None, max_size=None) as connection:
        yield connection, msgpack.unpackb(connection.recv(_PATIENCE))


def measure(address: str, clients: int, requests: int) -> Latency:
    """Latencies of `requests` honest requests of each of `clients`."""

    def work(i: int) -> list[float]:
        seconds = []
        with opened(address) as (connection, metadata):
            message = msgpack.packb(hostile.request(metadata, i))
            for number in range(requests + 1):
                began = time.perf_counter()
                connection.send(message)
                reply = connection.recv(_PATIENCE)
                if isinstance(reply, str):
                    raise RunError(f"the server refused an honest request: {reply}")
                if number:  # the first of a connection is not counted
                    seconds.append(time.perf_counter() - began)
        return seconds

    began = time.perf_counter()
    found = np.concatenate(at_once(clients, work))
    p50, p99 = np.percentile(found * 1000, (50, 99))
    return Latency(clients, float(p50), float(p99), clients * (requests + 1) / (time.perf_counter() - began))


def attack(address: str, count: int, *, clients: int = 4, seed: int = 0) -> Harm:
    """Sends `count` hostile messages, each after the reply to the one before.

    Raises:
      RunError: the server closed a connection, or its reply has a traceback in it.
    """

    def work(i: int) -> tuple[int, int]:
        refused, mine = 0, count // clients + (i < count % clients)
        with opened(address) as (connection, metadata):
            for message in hostile.messages(metadata, mine, seed * clients + i):
                try:
                    connection.send(message)
                    reply = connection.recv(_PATIENCE)
                except (OSError, ConnectionClosed) as e:
                    raise RunError(f"the server did not answer {message[:60]!r}: {e}") from e
                if isinstance(reply, str):
                    refused += 1
                    if "Traceback" in reply:
                        raise RunError(f"the server answered {message[:60]!r} with a traceback: {reply}")
        return refused, mine - refused

    began = time.perf_counter()
    refused, answered = np.sum(at_once(clients, work), axis=0)
    return Harm(int(refused), int(answered), time.perf_counter() - began)


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """The results of `work(0)`, ..., each in a thread of its own, all started together."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    gate = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            gate.wait(_PATIENCE)
            results[i] = work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
