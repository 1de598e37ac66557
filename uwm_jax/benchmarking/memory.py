"""Peak memory of a row in a process of its own, which holds nothing but what the row needs and runs it twice.

The process of ours starts as every command does (`cli.run`), compiles the row, and counts everything: the interpreter,
the libraries, the compiler. The process of torch imports no JAX.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from uwm_jax import cli
from uwm_jax.errors import RunError, UserError

STATUS = Path("/proc/self/status")  # Linux: its VmHWM, unlike getrusage, does not begin with the parent's memory
REPETITIONS = 2


def check_platform(flag: str) -> None:
    """Raises UserError where a process cannot tell its peak memory."""
    if not STATUS.exists():
        raise UserError(f"{flag}: the peak memory of a process is read from {STATUS}, which only Linux has.")


def of_ours(config: ConfigDict, action_dim: int, frame_size: tuple[int, int] | None, row: str) -> float:
    """Bytes that the process of a row holds at most.

    Raises:
      RunError: the process failed; the message ends with what it printed.
    """
    return _in_process(row, {"config": config.to_dict(), "action_dim": action_dim, "frame_size": frame_size})


def of_torch(description: Mapping[str, Any], inputs: Mapping[str, Any], row: str) -> float | None:
    """The same in torch; None where diffusers, which the row's codec needs, is missing.

    Args:
      description: as `TorchRows` takes it.
      inputs: {name: array} of the row, of which shapes and dtypes count.

    Raises:
      RunError: as `of_ours`.
    """
    shapes = {name: (x.shape, x.dtype.name) for name, x in inputs.items()}
    return _in_process(row, {"description": description, "inputs": shapes})


def _in_process(row: str, task: Mapping[str, Any]) -> Any:
    command = [sys.executable, "-m", "uwm_jax.benchmarking.memory"]
    result = subprocess.run(command, input=json.dumps({"row": row, **task}), capture_output=True, text=True)
    if result.returncode:
        side, last = "torch" if "description" in task else "JAX", result.stderr.strip().splitlines()[-1:]
        raise RunError(
            f"--memory: the process of {row} in {side} ended with status {result.returncode}"
            + (": " + last[0] if last else ", probably because the machine's memory was full")
        )
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Runs the task on the standard input; prints the bytes, or `null` if this machine lacks what the row needs."""
    task = json.load(sys.stdin)
    if "description" in task:  # with the C library's defaults, as `torch_process` has them
        _report(_run_torch(**task))
    else:
        cli.run(lambda call: _report(_run_ours(**task)))


def _report(ran: bool) -> None:
    print(json.dumps(_peak_bytes() if ran else None))


def _run_ours(row: str, config: dict[str, Any], action_dim: int, frame_size: list[int] | None) -> bool:
    from uwm_jax.benchmarking.rows import run_alone

    run_alone(row, config, action_dim, frame_size, REPETITIONS)
    return True


def _run_torch(row: str, description: dict[str, Any], inputs: dict[str, Any]) -> bool:
    import numpy as np

    from uwm_jax.benchmarking.torch_rows import TorchRows

    call = TorchRows(description, [row]).call(row, {name: np.ones(*array) for name, array in inputs.items()})
    for _ in range(REPETITIONS):
        if call:
            call()
    return call is not None


def _peak_bytes() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
