"""Small programs compiled for TPUs, whose text the tests of the readers of HLO keep under `tpu_hlo/`.

Compiles them again with the libtpu that is installed, all or those that are named, and writes their text to a folder;
no TPU is needed:

    python -m tests.parallel.tpu_programs tests/parallel/tpu_hlo [slices ...]

What the readers do not look at (locations in source files, most of `backend_config`) is cut out.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from uwm_jax.planning.children import TPU_ENVIRONMENT

    os.environ.update(TPU_ENVIRONMENT)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from uwm_jax.config import base
from uwm_jax.parallel.mesh import make_mesh

THRESHOLD = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
Shapes = tuple[Any, Any]  # parameters, rows


def _mean_square(x: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) ** 2).mean()


def scan(shape_of: Callable[..., Any]) -> tuple[Any, Shapes]:
    """Gradients of 6 layers in a scan, recomputed: fsdp 2 cuts the kernels, data 2 sums the gradients."""

    def loss(kernels: Any, rows: Any) -> Any:
        layer = jax.checkpoint(lambda x, kernel: (jnp.tanh(x @ kernel), None))
        return _mean_square(jax.lax.scan(layer, rows, kernels)[0])

    return jax.grad(loss), (shape_of((6, 1024, 1024), None, "fsdp"), shape_of((4096, 1024), ("data", "fsdp")))


def chain(shape_of: Callable[..., Any]) -> tuple[Any, Shapes]:
    """Gradients of three layers: kernels are gathered while the layer before them runs."""

    def loss(kernels: Any, rows: Any) -> Any:
        for kernel in kernels:
            rows = jnp.tanh(rows @ kernel)
        return _mean_square(rows)

    return jax.grad(loss), ([shape_of((1024, 1024), "fsdp")] * 3, shape_of((8192, 1024), ("data", "fsdp")))


def windowed(shape_of: Callable[..., Any]) -> tuple[Any, Shapes]:
    """A product whose kernel goes round the devices in pieces."""
    return lambda kernel, rows: rows @ kernel, (shape_of((4096, 512), "fsdp"), shape_of((8192, 4096), "fsdp"))


def tensor(shape_of: Callable[..., Any]) -> tuple[Any, Shapes]:
    """Two layers cut along their hidden units, whose results are summed over tensor 2."""
    kernels = [shape_of((512, 2048), None, "tensor"), shape_of((2048, 512), "tensor")]
    return lambda kernels, rows: jax.nn.relu(rows @ kernels[0]) @ kernels[1], (kernels, shape_of((1024, 512), "data"))


def slices(shape_of: Callable[..., Any]) -> tuple[Any, Shapes]:
    """The gradient of a kernel, summed over fsdp 2 and between two slices."""
    return jax.grad(lambda kernel, rows: _mean_square(jnp.tanh(rows @ kernel))), (
        shape_of((1024, 1024)),
        shape_of((4096, 1024), ("data", "fsdp")),
    )


# Program: topology, slices, mesh, where results lie, threshold of windowed products in MiB.
PROGRAMS: dict[Callable[..., Any], tuple[str, int, tuple[int, int, int], tuple[Any, ...], int]] = {
    scan: ("v5e:2x2", 1, (2, 2, 1), (None, "fsdp"), 1_000_000),
    chain: ("v5e:2x2", 1, (1, 4, 1), ("fsdp",), 1_000_000),
    windowed: ("v5e:4x4", 1, (1, 16, 1), ("fsdp",), 1),
    tensor: ("v5e:2x2", 1, (2, 1, 2), ("data",), 1_000_000),
    slices: ("v5e:2x2", 2, (2, 2, 2), (), 1_000_000),
}


def compiled(program: Callable[..., Any]) -> str:
    """The optimised HLO text of one of `PROGRAMS`."""
    topology, count, sizes, result, threshold = PROGRAMS[program]
    several = {"num_slices": count} if count > 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    config = base()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes
    config.mesh.slices, config.batch_size = count, math.prod(sizes)
    mesh = make_mesh(config, devices)

    def shape_of(shape: tuple[int, ...], *spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    function, args = program(shape_of)
    lowered = jax.jit(lambda *args: function(*args), out_shardings=NamedSharding(mesh, PartitionSpec(*result)))
    options = {THRESHOLD: str(threshold)}
    return lowered.lower(*args).compile(compiler_options=options).as_text() or ""


def shortened(hlo: str) -> str:
    """HLO text without what no reader looks at."""
    lines = []
    for line in hlo.splitlines():
        if re.match(r"^(\d+ |FileNames|FunctionNames|FileLocations|StackFrames)", line):
            continue
        line = re.sub(r" stack_frame_id=\d+", "", line)
        head, config, tail = line.partition(", backend_config=")
        cycles = re.search(r'"estimated_cycles":"\d+"', tail)
        lines.append(head + (config + '{"window_config":{' + cycles[0] + "}}" if cycles else ""))
    return re.sub(r"\n\n+", "\n\n", "\n".join(lines)).strip() + "\n"


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for program in PROGRAMS:
        if not names or program.__name__ in names:
            Path(folder, f"{program.__name__}.txt").write_text(shortened(compiled(program)))
