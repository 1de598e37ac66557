"""TensorBoard's event file, written by a thread of its own: it may fail, once and loudly, and it never blocks a run."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from uwm_jax.errors import warn

FLUSH_SECONDS = 30.0
CLOSE_SECONDS = 10.0  # for what is queued to be written at the end
QUEUE_LINES = 1000  # lines that may wait for a slow disk

_Events = Callable[[], Iterator[Event]]


class Board:
    """Scalars and pictures for TensorBoard.

    Everything that touches the disk is done by a thread. Whatever goes wrong there is told in one line on stderr, and
    the board is off from then on: `add` and `close` raise nothing and wait for nothing but, at the end, a few seconds.

    Args:
      folder: of the event files; each start of a run writes one of its own.
      first_step: TensorBoard drops what earlier files of the folder have from this step on.
    """

    def __init__(self, folder: str | os.PathLike[str], first_step: int):
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = Path(folder) / name
        self._queue: queue.Queue[_Events | None] = queue.Queue(QUEUE_LINES)
        self._lock = threading.Lock()
        self._off = False
        self._thread = threading.Thread(target=self._work, args=(first_step,), name="tensorboard", daemon=True)
        self._thread.start()

    def add(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Path] | None = None) -> None:
        """Queues the scalars of a step, and pictures {name: file}, which are read later."""
        scalars, pictures, now = dict(scalars), dict(pictures or {}), time.time()

        def events() -> Iterator[Event]:
            for name, value in scalars.items():
                yield Event(wall_time=now, step=step, summary=summary.scalar(name, value))
            for name, file in pictures.items():
                pixels = np.asarray(Image.open(file).convert("RGB"))
                yield Event(wall_time=now, step=step, summary=summary.image(name, pixels, dataformats="HWC"))

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
            self.file.parent.mkdir(parents=True, exist_ok=True)
            writer = RecordWriter(str(self.file))
            now = time.time()
            head = [
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START)),
            ]
            events: _Events | None = lambda: iter(head)  # noqa: E731 - the first of many
            flushed = -FLUSH_SECONDS
            while events is not None and not self._off:
                for event in events():
                    writer.write(event.SerializeToString())
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


def _nothing() -> Iterator[Event]:
    return iter(())
