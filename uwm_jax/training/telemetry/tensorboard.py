"""TensorBoard's event file, written by a thread of its own: it may fail, once and loudly, and it never blocks a run.

The file (`event_file.py`) holds `Event` messages, encoded here: the packages that do this import torch or TensorFlow
where these are installed, which takes longer than all other imports of a run. Message numbers:
tensorflow/core/util/event.proto and tensorflow/core/framework/summary.proto.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from PIL import Image

from uwm_jax.errors import warn
from uwm_jax.files import Place
from uwm_jax.training.telemetry.event_file import open_events

FLUSH_SECONDS = 30.0
CLOSE_SECONDS = 10.0  # for what is queued to be written at the end
QUEUE_LINES = 1000  # lines that may wait for a slow disk

_Events = Callable[[], Iterator[bytes]]


class Board:
    """Scalars and pictures for TensorBoard.

    Everything that touches the disk is done by a thread. Whatever goes wrong there is told in one line on stderr, and
    the board is off from then on: `add` and `close` raise nothing and wait for nothing but, at the end, a few seconds.

    Args:
      folder: of the event files; each start of a run writes one of its own.
      first_step: TensorBoard drops what earlier files of the folder have from this step on.
    """

    def __init__(self, folder: Place, first_step: int):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = folder / name
        self._queue: queue.Queue[_Events | None] = queue.Queue(QUEUE_LINES)
        self._lock = threading.Lock()
        self._off = False
        self._thread = threading.Thread(target=self._work, args=(first_step,), name="tensorboard", daemon=True)
        self._thread.start()

    def add(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Place] | None = None) -> None:
        """Queues the scalars of a step, and pictures {name: file}, which are read later."""
        scalars, pictures, now = dict(scalars), dict(pictures or {}), time.time()

        def events() -> Iterator[bytes]:
            for name, value in scalars.items():
                yield event(now, step, _SUMMARY, _message(1, _tag(name) + _number(2, "<f", value)))
            for name, file in pictures.items():
                yield event(now, step, _SUMMARY, _message(1, _tag(name) + _message(4, _picture(file))))

        self._put(events)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Ends the thread, once all is written; leaves it behind where that takes longer than `seconds`."""
        self._put(None)
        self._thread.join(0.0 if self._off else seconds)
        if self._thread.is_alive():
            self._fail(f"not all is written after {seconds:g} s")

    def _put(self, events: _Events | None) -> None:
        if self._off:
            return
        try:
            self._queue.put_nowait(events)
        except queue.Full:
            self._fail(f"the disk does not keep up: {QUEUE_LINES} lines wait for it")

    def _fail(self, reason: object) -> None:
        with self._lock:
            if self._off:
                return
            self._off = True
        warn(
            f"{self.file}: TensorBoard's curves cannot be written ({reason}). They end here; the run goes on, and "
            "metrics.jsonl has every number."
        )

    def _work(self, first_step: int) -> None:
        writer: Any = None
        try:
            writer = open_events(self.file)
            now = time.time()
            head = [event(now, 0, _VERSION, b"brain.Event:2"), event(now, first_step, _SESSION, _varint(1, _START))]
            events: _Events | None = lambda: iter(head)  # noqa: E731 - the first of many
            flushed = -FLUSH_SECONDS
            while events is not None and not self._off:
                for encoded in events():
                    writer.write(encoded)
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    writer.flush()
                    flushed = time.monotonic()
                with contextlib.suppress(queue.Empty):
                    events = self._queue.get(timeout=FLUSH_SECONDS)
                    continue
                events = _nothing
            writer.flush()
        except Exception as e:
            self._fail(e)
        finally:
            if writer is not None:
                with contextlib.suppress(OSError):  # what could not be written is still in the buffer
                    writer.close()


def _nothing() -> Iterator[bytes]:
    return iter(())


# --- Protocol buffers ------------------------------------------------------------------------------------

_VERSION, _SUMMARY, _SESSION = 3, 5, 7  # what an event holds
_START = 1  # of SessionLog.SessionStatus


def event(wall_time: float, step: int, kind: int, content: bytes) -> bytes:
    """An `Event`; `content` is its field number `kind`."""
    return _number(1, "<d", wall_time) + _varint(2, step) + _message(kind, content)


def _tag(name: str) -> bytes:
    """The tag of a `Summary.Value`, without the characters that TensorBoard does not take."""
    return _message(1, re.sub(r"[^-/\w.]", "_", name).lstrip("/").encode())


def _picture(file: Place) -> bytes:
    """A `Summary.Image`, RGB."""
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        width, height = image.size
        image.convert("RGB").save(png := io.BytesIO(), "PNG")
    return _varint(1, height) + _varint(2, width) + _varint(3, 3) + _message(4, png.getvalue())


def _message(number: int, content: bytes) -> bytes:
    return _integer(number << 3 | 2) + _integer(len(content)) + content


def _number(number: int, kind: str, value: float) -> bytes:
    """A float ("<f") or a double ("<d")."""
    return _integer(number << 3 | (1 if kind == "<d" else 5)) + struct.pack(kind, value)


def _varint(number: int, value: int) -> bytes:
    return _integer(number << 3) + _integer(value)


def _integer(value: int) -> bytes:
    """Seven bits a byte, the lowest first; 0 or more."""
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
