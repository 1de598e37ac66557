"""Measures what a training run's telemetry costs: the step and the loop with it against the same without.

    python -m uwm_jax.benchmark_overhead --config=configs/quickstart.py

Telemetry is everything that the training does not need: loss by timestep, gradient norms by group, the window of
metrics with its guard against NaN, named wall time, and every `config.log_every` steps a line of progress, of
`metrics.jsonl` and of TensorBoard's events. The bare step returns its loss alone, and the compiler removes all that
only the other metrics needed. Short blocks of both alternate in one process, so that a machine whose speed drifts
treats them alike; data and weights are synthetic.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from uwm_jax import cli, config_help
from uwm_jax import config as config_lib
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.synthetic import synthetic_batch, synthetic_codec, synthetic_spec
from uwm_jax.training.build import build
from uwm_jax.training.flops import Mfu
from uwm_jax.training.goodput import Goodput
from uwm_jax.training.metrics import Metric, MetricAccumulator
from uwm_jax.training.step import make_train_step
from uwm_jax.training.telemetry import trackers
from uwm_jax.training.telemetry.log import MetricsLog, progress_line

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument]; fields change with --config.any.field=value")
    flags.DEFINE_integer("pairs", 60, "blocks with telemetry, and as many without", lower_bound=2)
    flags.DEFINE_integer("steps", 2, "training steps in a block", lower_bound=1)
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    config = config_lib.load(cli.required("config"), call.overrides)
    print(json.dumps(benchmark(config, FLAGS.pairs, FLAGS.steps), indent=2))


def benchmark(config: ConfigDict, pairs: int, steps: int) -> dict[str, Any]:
    """Seconds of a step both ways, and the overhead in percent of the bare step.

    Returns:
      `bare_step_ms`, `step_ms`: medians over blocks. `wall_overhead_percent` and `cpu_overhead_percent`: median over
      pairs of blocks, with a 95 % interval (bootstrap); CPU time counts all threads of the process, and other processes
      on the machine touch it less. Its parts, alone: `host_ms_per_step`, the CPU time of the telemetry's own Python,
      and `compiled_flops_percent`, `compiled_bytes_percent`, what XLA counts more of in the step's program.
    """
    codec, arrays = synthetic_codec(config)
    mesh = mesh_lib.make_mesh(config)
    program = build(config, synthetic_spec(config, action_dim=10), codec, mesh)
    frozen = mesh_lib.place(arrays, mesh_lib.replicated(mesh))
    batch = mesh_lib.place(synthetic_batch(program.system, config.batch_size), mesh_lib.batch_sharding(mesh))
    full = make_train_step(config, program.system, program.optimizer, mesh)

    def bare(state: Any, frozen: Any, batch: Any) -> tuple[Any, Metric]:
        state, metrics = full(state, frozen, batch)
        return state, metrics["loss"]

    init = program.compile_init()
    states = [program.system.held(init()) for _ in range(2)]
    full_step = program.compile_step(frozen)
    bare_step = program.compile(bare, program.like, frozen, program.batch_like, updates_state=True)
    goodput = Goodput(total_steps=10**6, batch_size=config.batch_size)
    mfu = Mfu(program.system, list(mesh.devices.flat))
    accumulator, step_number = MetricAccumulator(), itertools.count(1)

    host_seconds = 0.0

    @contextlib.contextmanager
    def on_host() -> Iterator[None]:
        nonlocal host_seconds
        began = time.thread_time()
        yield
        host_seconds += time.thread_time() - began

    def with_telemetry(state: Any, log: MetricsLog) -> Any:
        for _ in range(steps):
            step = next(step_number)
            with on_host(), goodput.spend("data_wait"):
                rows = batch
            state, metrics = full_step(state, frozen, rows)
            with on_host():
                accumulator.add(step, metrics)
            if step % config.log_every == 0:
                with on_host():
                    means = accumulator.means()
                    rates = goodput.rates(step)
                    rates |= mfu(rates["samples_per_second"])
                    progress_line(step, 10**6, means | rates)
                    with goodput.spend("other"):
                        log.write(step, means | rates)
        return jax.block_until_ready(state)

    def without(state: Any, log: MetricsLog) -> Any:
        before: list[Metric] = []  # as many steps in flight as `MetricAccumulator` allows
        for _ in range(steps):
            state, loss = bare_step(state, frozen, batch)
            before.append(loss)
            if len(before) > 2:
                jax.block_until_ready(before[-3])
        return jax.block_until_ready(state)

    loops: list[Callable[[Any, MetricsLog], Any]] = [without, with_telemetry]
    seconds: dict[str, list[list[float]]] = {"wall": [[], []], "cpu": [[], []]}
    with tempfile.TemporaryDirectory() as directory:
        log = MetricsLog(directory, 0, trackers.start(config, Path(directory), 0, writes=True))
        goodput.begin(0)
        for pair in range(-1, pairs):  # the first one warms up
            for which in (0, 1) if pair % 2 else (1, 0):
                wall, cpu = time.perf_counter(), time.process_time()
                states[which] = loops[which](states[which], log)
                if pair >= 0:
                    seconds["wall"][which].append(time.perf_counter() - wall)
                    seconds["cpu"][which].append(time.process_time() - cpu)
        log.close()

    def cost(program: Any) -> Any:
        return program.cost_analysis()

    wall_bare, wall_full = np.array(seconds["wall"])
    return {
        "device": jax.devices()[0].device_kind,
        "batch_size": config.batch_size,
        "pairs": pairs,
        "steps_per_block": steps,
        "bare_step_ms": round(1e3 * float(np.median(wall_bare)) / steps, 3),
        "step_ms": round(1e3 * float(np.median(wall_full)) / steps, 3),
        "host_ms_per_step": round(1e3 * host_seconds / (steps * (pairs + 1)), 4),
        **{
            f"compiled_{name}_percent": round(100 * (cost(full_step)[key] / cost(bare_step)[key] - 1), 5)
            for name, key in (("flops", "flops"), ("bytes", "bytes accessed"))
        },
        **{f"{kind}_overhead_percent": _overhead(*np.array(both)) for kind, both in seconds.items()},
    }


def _overhead(bare: np.ndarray, full: np.ndarray) -> dict[str, float]:
    percent = 100 * (full / bare - 1)
    picks = np.random.default_rng(0).integers(0, len(percent), (2000, len(percent)))
    low, high = np.percentile(np.median(percent[picks], axis=1), (2.5, 97.5))
    named = {"median": np.median(percent), "lo": low, "hi": high}
    return {name: round(float(value), 3) for name, value in named.items()}


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
