"""The devices that programs are traced for: those of this process, unless `tracing_for` names others.

A few forms of layers depend on the platform and on the number of devices. A program that is compiled for devices that
this machine does not have must take the forms that a run on those devices takes.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_OTHERS: contextvars.ContextVar[tuple[str, int] | None] = contextvars.ContextVar("target", default=None)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`."""
    others = _OTHERS.get()
    return others[0] if others else jax.default_backend()


def device_count() -> int:
    """The number of devices, of all processes."""
    others = _OTHERS.get()
    return others[1] if others else jax.device_count()


@contextlib.contextmanager
def tracing_for(platform: str, devices: int) -> Iterator[None]:
    """While it is entered, systems are built and programs traced for so many devices of a platform."""
    token = _OTHERS.set((platform, devices))
    try:
        yield
    finally:
        _OTHERS.reset(token)
