"""Whether TPU chips are attached to this machine, and libtpu where they are not.

An installed libtpu is no sign of a TPU: `uwm_jax.plan` compiles with it on any machine. But JAX tries every platform
that is installed, and libtpu, which finds no TPU, then prints what it could not find out.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# What libtpu asks about, so that it does not look it up and complain: the kind of slice, and its hosts.
ABSENT = {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}


def attached() -> bool:
    """Whether this is a TPU host: libtpu is installed, and there are the device files of chips."""
    devices = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return devices and find_spec("libtpu") is not None


def quiet_where_absent() -> None:
    """Keeps libtpu quiet on machines without TPUs; call it before JAX makes its devices."""
    if find_spec("libtpu") is not None and not attached():
        for name, value in ABSENT.items():
            os.environ.setdefault(name, value)
