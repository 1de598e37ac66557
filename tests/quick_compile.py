"""How tests compile: with few optimisations, since compilation is most of their time, and this leaves about a third.

`conftest.py` asks for it by `ENVIRON`, in which processes that tests start find it too. Programs run slower and round
otherwise than those of a user, by as much as two of a user's own do.
"""

from __future__ import annotations

import os

ENVIRON = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # LLVM's level 0 among others
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",  # the older ones make code several times sooner
}


def with_devices(count: int) -> str:
    """The variable XLA_FLAGS of a process with as many simulated devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
