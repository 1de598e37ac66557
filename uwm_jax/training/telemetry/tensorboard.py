"""TensorBoard's event file.

The file (`event_file.py`) holds `Event` messages, encoded here: the packages that do this import torch or TensorFlow
where these are installed, which takes longer than all other imports of a run. Message numbers:
tensorflow/core/util/event.proto and tensorflow/core/framework/summary.proto.
"""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from PIL import Image

from uwm_jax.files import Place
from uwm_jax.training.telemetry.event_file import open_events
from uwm_jax.training.telemetry.tracker import RunFacts, Tracker


class TensorBoard(Tracker):
    """Scalars and pictures for TensorBoard, below `tensorboard/` of the workdir.

    Each start of a run writes a file of its own, which says from which step on TensorBoard drops what earlier files
    have.
    """

    _file: Any = None  # as `open_events` makes it

    def start(self, run: RunFacts) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        place = run.workdir / "tensorboard" / name
        self._file = open_events(place)
        now = time.time()
        self._file.write(event(now, 0, _VERSION, b"brain.Event:2"))
        self._file.write(event(now, run.step + 1, _SESSION, _varint(1, _START)))

    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Place]) -> None:
        now = time.time()
        for name, value in scalars.items():
            self._file.write(event(now, step, _SUMMARY, _message(1, _tag(name) + _number(2, "<f", value))))
        for name, file in pictures.items():
            self._file.write(event(now, step, _SUMMARY, _message(1, _tag(name) + _message(4, _picture(file)))))

    def flush(self) -> None:
        self._file.flush()

    def close(self, failed: bool) -> None:
        if self._file is not None:
            self._file.close()


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
