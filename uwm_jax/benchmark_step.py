"""Times the training step of a config's model, part by part, and its samples, on synthetic data and random weights.

    python -m uwm_jax.benchmark_step --config=configs/droid.py --config.batch_size=1
    python -m uwm_jax.benchmark_step --config=configs/droid.py --part=latents,network/forward,policy --steps=10

Rows of the whole model are `latents/...` (batches that hold the codec's latents of the next frames) and `pixels/...`
(the frozen codec encodes them), as in training with and without `config.data.latents`. Each has `forward`,
`forward_backward` (the gradients of all trained parameters) and `step` (AdamW too). Rows of its parts are
`network/forward` and `network/forward_backward` (the transformer alone; the gradients of its parameters and of the
features that it is given), the same of `encoder` (from float images), `codec` (next frames to latents) and
`preprocessing` (uint8 frames to float images, augmented). `policy` and `forward_dynamics` are samples for one
observation, of actions and of the next frames' latents. `--part` picks some.

On a CPU with torch installed, the same network runs as a plain eager torch loop in a process of its own, block by
block in turns with ours; `ours/torch` is the median over the blocks, with its range. CPU seconds are those of all
threads of a process; a pause before each block lets the idle threads of the other side, which spin for a while, fall
asleep. One device is used.

    python -m uwm_jax.benchmark_step --config=configs/quickstart.py --part=policy --memory=policy,pixels/step

`--memory` measures the peak resident memory of rows, each in fresh processes that hold what the row needs and run it
twice: one of ours, which compiles it too, and one of torch. Linux only.

Nothing is read from disk or a hub, so any config runs anywhere: it answers whether a model fits the machine and
what a step costs there. Compilation is reported apart from the steps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from uwm_jax import cli, config_help, files
from uwm_jax import config as config_lib
from uwm_jax.benchmarking import memory, timing
from uwm_jax.benchmarking.names import PARTS, ROWS, SAMPLES, select
from uwm_jax.benchmarking.rows import Model, fitting
from uwm_jax.benchmarking.torch_process import TorchProcess
from uwm_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument]; fields change with --config.any.field=value")
    flags.DEFINE_integer("steps", 3, "timed blocks of each row; the median counts", lower_bound=1)
    flags.DEFINE_integer("action_dim", 10, "columns of the synthetic actions", lower_bound=1)
    flags.DEFINE_list("part", ["latents", "pixels", "policy"], f"what to time: {', '.join(PARTS)}, or single rows")
    flags.DEFINE_list("frame_size", None, "HEIGHT,WIDTH of the raw frames; by default that of config.data.resize")
    flags.DEFINE_list("memory", None, "rows whose peak memory is measured, on a CPU, each in a process of its own")
    flags.DEFINE_bool("torch", None, "compare with a plain torch loop; by default on a CPU where torch is installed")
    flags.DEFINE_string("json", None, "also write the numbers to this file")
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    config = config_lib.load(cli.required("config"), call.overrides)
    rows, frame_size = select(FLAGS.part), _frame_size(FLAGS.frame_size)
    beside_torch, note = _torch_wanted(FLAGS.torch, config)
    memory_rows = _memory_rows(FLAGS.memory)
    output = cli.optional_path("json")
    if output:
        files.check_output_file(output, "--json")
    results = benchmark(config, FLAGS.steps, FLAGS.action_dim, rows, beside_torch, frame_size, memory_rows)
    print(table(results))
    if note:
        print(note)
    if output:
        files.write_text(output, json.dumps(results, indent=2) + "\n")


def _frame_size(flag: list[str] | None) -> tuple[int, int] | None:
    if flag is None:
        return None
    if len(flag) != 2 or not all(part.strip().isdecimal() and int(part) for part in flag):
        raise UserError(f"--frame_size: expected HEIGHT,WIDTH in pixels such as 180,320; found {','.join(flag)!r}.")
    return int(flag[0]), int(flag[1])


def _torch_wanted(flag: bool | None, config: ConfigDict) -> tuple[bool, str]:
    """Whether to run torch next to ours, and a line about what is missing."""
    installed, cpu = importlib.util.find_spec("torch") is not None, jax.default_backend() == "cpu"
    missing = "torch is not installed: `pip install 'uwm-jax[torch]'` adds a plain torch loop to compare with."
    if flag and not cpu:
        raise UserError("--torch: the comparison runs on CPUs only (JAX_PLATFORMS=cpu); leave the flag out.")
    if flag and not installed:
        raise UserError(f"--torch: {missing}")
    if (adaln := config.model.get("adaln", "official")) != "official":
        note = f"config.model.adaln={adaln!r} is not in the official code, so there is no torch loop to compare with."
        if flag:
            raise UserError(f"--torch: {note}")
        return False, note
    wanted = cpu and flag is not False
    return wanted and installed, missing if wanted and not installed else ""


def _memory_rows(flag: list[str] | None) -> list[str]:
    if flag is None:
        return []
    if jax.default_backend() != "cpu":
        raise UserError("--memory: resident memory is measured on CPUs only (JAX_PLATFORMS=cpu); leave the flag out.")
    memory.check_platform("--memory")
    return select(flag, "--memory")


# --- the benchmark -----------------------------------------------------------------------------------


def benchmark(
    config: ConfigDict,
    steps: int,
    action_dim: int,
    rows: Sequence[str] = ("pixels/step", "policy"),
    beside_torch: bool = False,
    frame_size: tuple[int, int] | None = None,
    memory_rows: Sequence[str] = (),
) -> dict[str, Any]:
    """Times `rows` of the model that `config` describes, on one device.

    Args:
      steps: timed blocks of each row, whose median counts; a block is as many calls as fill `BLOCK_SECONDS`.
      action_dim: columns of the actions.
      beside_torch: runs blocks of a plain torch loop, in a process of its own, in turns with ours.
      frame_size: (height, width) of the raw frames; None for the size that they are resized to.
      memory_rows: rows whose peak memory is measured, in processes of their own.

    Returns:
      Flat keys. For each row: `<row>/seconds`, `/seconds_range` (over the blocks), `/cpu_seconds` (of all threads of
      the process), `/samples_per_second`, `/gflop_per_sample` (of the model; neither the optimizer nor recomputation
      counts), `/tflop_per_second`, `/mfu` where the chip's peak is known, `/memory_gib` (what the compiler planned:
      arguments, results and temporaries), `/compile_and_first_s`; in torch also `/torch_seconds`,
      `/torch_seconds_range`, `/torch_cpu_seconds`, and `/torch_ratio`, `/torch_ratio_range`, `/torch_cpu_ratio` (median
      and range over the blocks of ours / torch). For each of `memory_rows`: `<row>/peak_memory_gib` and, in torch,
      `/torch_peak_memory_gib` and `/torch_memory_ratio`.
      `device`, `batch_size`, `dtype`, `<part>_parameters_m`, `loss_after_steps` where a step was timed, and
      `peak_memory_gib` where the device reports it. `pixels_to_latents/seconds` and `pixels_to_latents/flops`, where
      the step was timed from both: how many times as much it takes from pixels. The step from pixels and the policy's
      sample are also `train_step_s`, `samples_per_second`, `compile_and_first_step_s`, `policy_sample_s`,
      `compile_and_first_sample_s`.

    Raises:
      UserError: the model or a row does not fit into the device's memory.
      RunError: the process of torch, or one that measures memory, failed.
    """
    peaks = _peaks(config, action_dim, memory_rows, beside_torch, frame_size)  # first, while this process is small
    with fitting("the training state with its synthetic batches"):
        model = Model(config, action_dim, rows, frame_size)
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        **{f"{name}_parameters_m": count / 1e6 for name, count in model.parameters.items()},
    }
    with contextlib.ExitStack() as closing:
        torch = closing.enter_context(TorchProcess(model.description(), rows)) if beside_torch else None
        if torch:
            results["torch_threads"] = torch.threads
        for row in rows:
            with fitting(row):
                runner = model.runner(row)
                torch_block = torch.block if torch and torch.load(row, model.inputs(row)) else None
                timed = timing.measure(runner, torch_block, steps)
            results |= {f"{row}/{name}": value for name, value in _numbers(model, row, timed).items()}
    if model.loss is not None:
        results["loss_after_steps"] = float(model.loss)
    results |= _summary(results) | peaks
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return results | ({"peak_memory_gib": peak / 2**30} if peak else {})


def _peaks(
    config: ConfigDict,
    action_dim: int,
    rows: Sequence[str],
    beside_torch: bool,
    frame_size: tuple[int, int] | None,
) -> dict[str, float]:
    peaks: dict[str, float] = {}
    model = Model(config, action_dim, [], frame_size) if rows else None  # shapes alone
    for row in rows:
        ours = memory.of_ours(config, action_dim, frame_size, row)
        peaks[f"{row}/peak_memory_gib"] = ours / 2**30
        torch = memory.of_torch(model.description(), model.inputs(row), row) if beside_torch and model else None
        if torch is not None:
            peaks |= {f"{row}/torch_peak_memory_gib": torch / 2**30, f"{row}/torch_memory_ratio": ours / torch}
    return peaks


def _summary(results: Mapping[str, Any]) -> dict[str, float]:
    """What people ask for first, under short names: two rows, and the step from pixels next to that from latents."""
    short = {
        "pixels/step/compile_and_first_s": "compile_and_first_step_s",
        "pixels/step/seconds": "train_step_s",
        "pixels/step/samples_per_second": "samples_per_second",
        "policy/compile_and_first_s": "compile_and_first_sample_s",
        "policy/seconds": "policy_sample_s",
    }
    found = {name: results[key] for key, name in short.items() if key in results}
    for name, key in (("seconds", "seconds"), ("flops", "gflop_per_sample")):
        pixels, latents = (results.get(f"{source}/step/{key}") for source in ("pixels", "latents"))
        if pixels and latents:
            found[f"pixels_to_latents/{name}"] = pixels / latents
    return found


def _numbers(model: Model, row: str, timed: timing.Timing) -> dict[str, Any]:
    seconds = float(np.median(timed.ours.wall))
    rate = (1 if row in SAMPLES else model.config.batch_size) / seconds
    operations, ideal_seconds = model.operations(row)
    numbers: dict[str, Any] = {**_side(timed.ours), "samples_per_second": rate}
    if operations:
        numbers["gflop_per_sample"] = operations / 1e9
        numbers["tflop_per_second"] = operations * rate / 1e12
        if ideal_seconds is not None:
            numbers["mfu"] = ideal_seconds * rate
    if timed.runner.memory_bytes is not None:
        numbers["memory_gib"] = timed.runner.memory_bytes / 2**30
    numbers["compile_and_first_s"] = timed.runner.compile_seconds + timed.first
    if timed.torch.wall:
        numbers |= {f"torch_{name}": value for name, value in _side(timed.torch).items()}
        ratios, cpu_ratios = (
            [ours / torch for ours, torch in zip(*both, strict=True)]
            for both in ((timed.ours.wall, timed.torch.wall), (timed.ours.cpu, timed.torch.cpu))
        )
        numbers["torch_ratio"] = float(np.median(ratios))
        numbers["torch_ratio_range"] = [min(ratios), max(ratios)]
        numbers["torch_cpu_ratio"] = float(np.median(cpu_ratios))
    return numbers


def _side(side: timing.Side) -> dict[str, Any]:
    return {
        "seconds": float(np.median(side.wall)),
        "seconds_range": [min(side.wall), max(side.wall)],
        "cpu_seconds": float(np.median(side.cpu)),
    }


# --- the tables --------------------------------------------------------------------------------------

_Columns = Mapping[str, tuple[str, int, int]]  # title: (key, width, digits)

_COLUMNS: _Columns = {
    "seconds": ("seconds", 10, 4),
    "samples/s": ("samples_per_second", 10, 3),
    "GFLOP/sample": ("gflop_per_sample", 13, 1),
    "TFLOP/s": ("tflop_per_second", 9, 3),
    "MFU": ("mfu", 7, 3),
    "memory GiB": ("memory_gib", 11, 2),
    "compile s": ("compile_and_first_s", 10, 1),
}
_TORCH_COLUMNS: _Columns = {
    "seconds": ("seconds", 9, 4),
    "(range)": ("seconds_range", 19, 4),
    "torch s": ("torch_seconds", 9, 4),
    "(range) ": ("torch_seconds_range", 19, 4),
    "ours/torch": ("torch_ratio", 11, 3),
    "(range)  ": ("torch_ratio_range", 17, 3),
    "CPU s": ("cpu_seconds", 9, 4),
    "torch CPU s": ("torch_cpu_seconds", 12, 4),
    "ours/torch ": ("torch_cpu_ratio", 11, 3),
}
_MEMORY_COLUMNS: _Columns = {
    "peak GiB": ("peak_memory_gib", 10, 3),
    "torch peak GiB": ("torch_peak_memory_gib", 16, 3),
    "ours/torch": ("torch_memory_ratio", 12, 3),
}


def table(results: Mapping[str, Any]) -> str:
    """The results of `benchmark` for people: a table of ours, and one of both sides where torch ran."""
    rows = [row for row in ROWS if f"{row}/seconds" in results]
    beside_torch = "torch_threads" in results
    threads = f", torch on {results['torch_threads']} threads" if beside_torch else ""
    counts = {name: results[f"{name}_parameters_m"] for name in ("network", "encoder", "codec")}
    lines = [
        f"{results['device']}, batch {results['batch_size']}, {results['dtype']}{threads}",
        "parameters in millions: " + ", ".join(f"{name} {count:.2f}" for name, count in counts.items()),
        "",
        *_lines(results, rows, _COLUMNS),
    ]
    with_torch = [row for row in rows if f"{row}/torch_seconds" in results]
    if with_torch:
        lines += ["", *_lines(results, with_torch, _TORCH_COLUMNS)]
    if beside_torch and len(with_torch) < len(rows):
        lines.append("torch encodes pixels with diffusers, which is not installed: pip install diffusers")
    measured = [row for row in ROWS if f"{row}/peak_memory_gib" in results]
    if measured:
        lines += ["", *_lines(results, measured, _MEMORY_COLUMNS)]
    if "pixels_to_latents/seconds" in results:
        seconds, flops = (results[f"pixels_to_latents/{name}"] for name in ("seconds", "flops"))
        more = f"{seconds:.2f} times the time and {flops:.2f} times the operations"
        lines += ["", f"a step from pixels takes {more} of one from latents"]
    if "loss_after_steps" in results:
        lines += ["", f"loss after the timed steps: {results['loss_after_steps']:.4f}"]
    if "peak_memory_gib" in results:
        lines.append(f"most device memory in use at any time: {results['peak_memory_gib']:.2f} GiB")
    return "\n".join(lines)


def _lines(results: Mapping[str, Any], rows: Sequence[str], columns: _Columns) -> list[str]:
    """A title and a line for each row, of the columns that have numbers."""
    present = {title: c for title, c in columns.items() if any(f"{row}/{c[0]}" in results for row in rows)}
    lines = [" " * 24 + "".join(f"{title.strip():>{width}}" for title, (_, width, _) in present.items())]
    for row in rows:
        cells = []
        for key, width, digits in present.values():
            value = results.get(f"{row}/{key}")
            if isinstance(value, list):
                text = f"({value[0]:.{digits}f} to {value[1]:.{digits}f})"
            else:
                text = "-" if value is None else f"{value:.{digits}f}"
            cells.append(f"{text:>{width}}")
        lines.append(f"{row:<24}{''.join(cells)}")
    return lines


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
