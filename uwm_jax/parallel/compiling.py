"""Compilation of a lowered program with the options that the devices of its mesh need."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from uwm_jax import host_memory
from uwm_jax.parallel.distributed import say
from uwm_jax.parallel.mesh import FSDP_AXIS

# XLA's TPU compiler turns a product with a kernel that lies in pieces on several devices into a loop over the pieces
# ("windowed einsum") where the kernel is larger than this many MiB. With kernels cut along `fsdp` that costs more than
# to gather them: convolutions then run on a few output channels at a time. This size switches the loops off.
FSDP_ON_TPU = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
_UNKNOWN = "No such compile option"


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """The options of XLA for programs of this mesh: `FSDP_ON_TPU` where TPUs share parameters along `fsdp`, else {}."""
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return dict(FSDP_ON_TPU) if on_tpu and mesh.shape[FSDP_AXIS] > 1 else {}


def compile_lowered(mesh: Mesh, lowered: Any) -> Any:
    """`lowered.compile()` with `compiler_options`; gives back the memory that the compiler has freed.

    A compiler that does not know them compiles without, and a line says so.

    Args:
      mesh: that the program was lowered for.
      lowered: of `jax.jit(...).lower(...)`.
    """
    options = compiler_options(mesh)
    if options:
        try:
            return _given_back(lowered.compile(compiler_options=options))
        except jax.errors.JaxRuntimeError as e:
            if _UNKNOWN not in str(e):
                raise
        names = ", ".join(f"{name}={value}" for name, value in options.items())
        say(f"this TPU compiler does not know {names}: compiled without, and slower under fsdp.")
    return _given_back(lowered.compile())


def _given_back(compiled: Any) -> Any:
    host_memory.give_back()
    return compiled
