"""Measures what a person waits for: seconds from the command of a training run to the end of its first step.

    python -m uwm_jax.benchmark_start --config=configs/quickstart.py

Starts `python -m uwm_jax.train` with the same flags for one step, each time in a new workdir: with an empty
compilation cache (cold), and again with what that start left in it (warm). The parts are those of the line that every
run prints after its first step (`uwm_jax/training/startup.py`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from uwm_jax import cli, config_help
from uwm_jax import config as config_lib
from uwm_jax.errors import RunError
from uwm_jax.training.startup import PARTS, read_summary

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument]; fields change with --config.any.field=value")
    flags.DEFINE_integer("starts", 3, "cold starts, and as many warm ones", lower_bound=1)
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    config_lib.load(cli.required("config"), call.overrides)  # a mistake is told before anything is started
    changed = [f"--config.{name}={value}" for name, value in call.overrides]
    print(json.dumps(benchmark([f"--config={cli.required('config')}", *changed], FLAGS.starts), indent=2))


def benchmark(arguments: Sequence[str], starts: int) -> dict[str, dict[str, float]]:
    """Medians over starts.

    Args:
      arguments: of `uwm_jax.train`, without a workdir.

    Returns:
      {"cold" and "warm": {part: seconds, "xla": seconds that XLA took within them, "first_step": seconds from the
      command to the end of the first step, "least" and "most": the range of `first_step`}}. Medians need not sum up.

    Raises:
      RunError: a run failed; with what it wrote to stderr.
    """
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as directory:
            for name, seen in found.items():
                own = [f"--workdir={Path(directory) / name}", f"--config.compilation_cache_dir={directory}/cache"]
                seen.append(_start([*arguments, *own, "--config.total_steps=1"]))
    return {name: _medians(seen) for name, seen in found.items()}


def _start(arguments: Sequence[str]) -> dict[str, float]:
    """The parts of one start, and `first_step` on this process's own clock."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "uwm_jax.train", *arguments]
    parts: dict[str, float] = {}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if read := read_summary(line):
                    parts = read | {"first_step": time.perf_counter() - began}
        if process.returncode or not parts:
            errors.seek(0)
            raise RunError(f"{' '.join(command)} ended with status {process.returncode}: {errors.read()[-2000:]}")
    return parts


def _medians(seen: Sequence[dict[str, float]]) -> dict[str, float]:
    sums = [parts["first_step"] for parts in seen]
    medians = {name: statistics.median(parts[name] for parts in seen) for name in (*PARTS, "xla", "first_step")}
    return {name: round(value, 3) for name, value in (medians | {"least": min(sums), "most": max(sums)}).items()}


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
