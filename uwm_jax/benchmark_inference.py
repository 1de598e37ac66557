"""Times a config's model in use: frames in, actions out, in JAX, in `uwm_torch.py` and in the official eager loop.

    python -m uwm_jax.benchmark_inference --config=configs/droid.py --frame_size=180,320
    python -m uwm_jax.benchmark_inference --config=configs/droid.py --uses=policy --views=3 --steps=10 --json=FILE

A row is a use with a number of cameras and of the sampler's steps. A call takes one observation from numpy arrays on
the host, frames as uint8, to numpy arrays on the host: actions in raw units, and latents of frames, which no codec
decodes (latents stand for the frames that a use is given). So a call ends when its results are there, on every device.

The sides are `jax`; `uwm_torch`, an export folder run by its own file; `uwm_torch_graphs`, the same as CUDA graphs; and
`official`, the official network with a plain Python loop around it, in eager PyTorch. All have the same random weights,
inputs and noise, and the largest difference of their results is told with the times. Each side of PyTorch has a process
of its own. After three calls of each side, whose times do not count, the sides take turns of five calls. The first row,
of the use that acts, with the most cameras and steps, has `--calls`, the others `--other_calls`. What this machine
cannot run is "not run", with the reason below the table.

`--config.model.dtype` is that of all sides: with bfloat16 the official loop runs under autocast. One device is used.
Nothing is read from disk or a hub.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from uwm_jax import cli, config_help, files, systems
from uwm_jax import config as config_lib
from uwm_jax.benchmarking import clock
from uwm_jax.benchmarking.inference import Model, obstacle
from uwm_jax.benchmarking.latency import JAX, ROUND, SIDES, WARM_UP, Calls, Row, in_turns, rows_of
from uwm_jax.benchmarking.rows import fitting
from uwm_jax.benchmarking.torch_inference import GRAPHS, OFFICIAL, TORCH, TORCH_SIDES, TorchSide
from uwm_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument]; fields change with --config.any.field=value")
    flags.DEFINE_list("uses", None, "what to time, such as policy,forward; by default all that the system answers")
    flags.DEFINE_list("views", None, "numbers of cameras; by default 1 and all of config.data.cameras")
    flags.DEFINE_list("steps", ["10", "4", "2"], "numbers of the sampler's steps")
    flags.DEFINE_list("sides", list(SIDES), f"some of {', '.join(SIDES)}")
    flags.DEFINE_integer("calls", 200, "timed calls of the first row, for p50 and p99", lower_bound=1)
    flags.DEFINE_integer("other_calls", 20, "timed calls of the others, for p50", lower_bound=1)
    flags.DEFINE_integer("action_dim", 10, "columns of the synthetic actions", lower_bound=1)
    flags.DEFINE_list("frame_size", None, "HEIGHT,WIDTH of the raw frames; by default that of config.data.resize")
    flags.DEFINE_string("json", None, "also write the numbers to this file")
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    # JAX and PyTorch share the device's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = config_lib.load(cli.required("config"), call.overrides)
    rows = _rows(config)
    sides = [_known("sides", side, SIDES) for side in FLAGS.sides]
    frame_size = _frame_size()
    output = cli.optional_path("json")
    if output:
        files.check_output_file(output, "--json")
    results = benchmark(config, rows, sides, FLAGS.calls, FLAGS.other_calls, FLAGS.action_dim, frame_size)
    print(table(results))
    if output:
        files.write_text(output, json.dumps(results, indent=2) + "\n")


def _rows(config: ConfigDict) -> list[Row]:
    """The rows that the flags name; the first is the acting use's with the most cameras and steps."""
    kind = systems.get(config.system)
    uses = [_known("uses", use, tuple(kind.uses)) for use in FLAGS.uses or kind.uses]
    cameras = len(config.data.cameras)
    views = [_count("views", text, cameras) for text in FLAGS.views or dict.fromkeys(("1", str(cameras)))]
    steps = [_count("steps", text) for text in FLAGS.steps] if "diffusion" in config else [0]
    uses.sort(key=lambda use: use != kind.acting)
    return rows_of(uses, sorted(set(views), reverse=True), sorted(set(steps), reverse=True))


def _known(flag: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise UserError(f"--{flag}: expected some of {', '.join(known)}, joined by commas; found {name!r}.")
    return name


def _count(flag: str, text: str, most: int | None = None) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= (most or int(text)):
        expected = f"numbers from 1 to {most}, the cameras of config.data.cameras" if most else "numbers from 1 on"
        raise UserError(f"--{flag}: expected {expected}, joined by commas; found {text!r}.")
    return int(text)


def _frame_size() -> tuple[int, int] | None:
    if FLAGS.frame_size is None:
        return None
    sizes = [_count("frame_size", text) for text in FLAGS.frame_size]
    if len(sizes) != 2:
        raise UserError(f"--frame_size: expected HEIGHT,WIDTH such as 180,320; found {','.join(FLAGS.frame_size)!r}.")
    return sizes[0], sizes[1]


# --- the benchmark -----------------------------------------------------------------------------------


def benchmark(
    config: ConfigDict,
    rows: Sequence[Row],
    sides: Sequence[str] = SIDES,
    calls: int = 200,
    other_calls: int = 20,
    action_dim: int = 10,
    frame_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Times `rows` of the model that `config` describes, on one device.

    Args:
      rows: those of a number of cameras next to each other, and of a number of steps.
      sides: of `SIDES`.
      calls, other_calls: of the first row, and of each other one.
      action_dim: columns of the actions.
      frame_size: (height, width) of the raw frames; None for the size that they are resized to.

    Returns:
      Flat keys. For each row and side that ran: `<row>/<side>/p50_ms`, `/range_ms`, `/calls`, and of the first row
      alone `/p99_ms` and `/ms`, those of all calls; of those of PyTorch also `/difference`, the largest from JAX's
      results (raw actions, latents), and `/jax_ratio`, JAX's p50 over the side's. `not_run/<side>`: why a side has no
      numbers. `device`, `host`, `cores`, `dtype`, `warm_up_calls`, `calls_in_turn`, `jax`, and with PyTorch `torch`,
      `torch_threads`; `rows`, `sides`: those that were asked for.

    Raises:
      UserError: the model does not fit into the device's memory, or the config does not fit the rows.
      RunError: a process of PyTorch failed.
    """
    device = jax.devices()[0]
    results: dict[str, Any] = {
        "device": device.device_kind,
        "host": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "dtype": config.model.dtype,
        "warm_up_calls": WARM_UP,
        "calls_in_turn": ROUND,
        "jax": jax.__version__,
        "rows": [row.name for row in rows],
        "sides": list(sides),
    }
    reasons = {side: reason for side in sides if (reason := obstacle(side, config, device.platform))}
    results |= {f"not_run/{side}": reason for side, reason in reasons.items()}
    in_torch = [side for side in sides if side in TORCH_SIDES and side not in reasons]
    with contextlib.ExitStack() as closing:
        torch_device = "cuda" if device.platform == "gpu" else "cpu"
        children = {side: closing.enter_context(TorchSide(side, torch_device)) for side in in_torch}
        for child in children.values():
            results |= {"torch": child.version, "torch_threads": child.threads}
        model: Model | None = None
        views = steps = 0
        for number, row in enumerate(rows):
            folder = Path(closing.enter_context(tempfile.TemporaryDirectory())) if row.views != views else None
            with fitting(row.name):
                if folder:
                    model, place = None, folder  # the one before, whose memory the next one needs
                    model = Model(config, row.views, action_dim, frame_size, place if in_torch else None)
                assert model is not None
                if folder or row.steps != steps:
                    model.with_steps(row.steps)
                    for child in children.values():
                        child.load(place)
                views, steps = row.views, row.steps
                found = _measure(model, row.use, JAX in sides, children, other_calls if number else calls)
            if number:
                found = {name: value for name, value in found.items() if not name.endswith(("/p99_ms", "/ms"))}
            results |= {f"{row.name}/{name}": value for name, value in found.items()}
    return results


def _measure(model: Model, use: str, in_jax: bool, children: Mapping[str, TorchSide], count: int) -> dict[str, Any]:
    """The numbers of one row, without its name."""
    call: Callable[[], Any] = model.caller(use)
    wanted = call()
    found: dict[str, Any] = {}
    for side, child in children.items():
        made = child.first(use, model.inputs(use), model.noise(use))
        shared = made.keys() & wanted.keys() & {"action", "next_obs_latent"}
        found[f"{side}/difference"] = max(float(np.abs(made[key] - wanted[key]).max()) for key in shared)
    sides: dict[str, Calls] = {JAX: lambda count: clock.calls(call, count)} if in_jax else {}
    times = in_turns(sides | {side: child.calls for side, child in children.items()}, count)
    for side, seconds in times.items():
        found[f"{side}/p50_ms"], found[f"{side}/p99_ms"] = (1e3 * float(x) for x in np.percentile(seconds, (50, 99)))
        found[f"{side}/range_ms"] = [1e3 * min(seconds), 1e3 * max(seconds)]
        found[f"{side}/calls"], found[f"{side}/ms"] = len(seconds), [round(1e3 * x, 3) for x in seconds]
    if in_jax:
        ratios = {side: found[f"{JAX}/p50_ms"] / found[f"{side}/p50_ms"] for side in children}
        found |= {f"{side}/jax_ratio": ratio for side, ratio in ratios.items()}
    return found


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- the table ---------------------------------------------------------------------------------------

_TITLES = {JAX: "JAX", TORCH: "uwm_torch", GRAPHS: "uwm_torch, CUDA graphs", OFFICIAL: "official loop"}


def table(results: Mapping[str, Any]) -> str:
    """The results of `benchmark` for people."""
    sides = [side for side in SIDES if side in results["sides"]]
    compared = [side for side in sides if side in TORCH_SIDES and JAX in sides]
    lines = [["p50 of calls, ms", *(_TITLES[side] for side in sides), *(f"JAX / {_TITLES[s]}" for s in compared)]]
    for row in results["rows"]:
        cells = [_cell(results, f"{row}/{side}/p50_ms", 1) for side in sides]
        lines.append([row, *cells, *(_cell(results, f"{row}/{side}/jax_ratio", 3) for side in compared)])
    first = results["rows"][0]
    lines.append(
        [f"{first}, p99", *(_cell(results, f"{first}/{side}/p99_ms", 1) for side in sides), *("" for _ in compared)]
    )
    torch = f", torch {results['torch']} on {results['torch_threads']} threads" if "torch" in results else ""
    differences = [results[key] for key in results if key.endswith("/difference")]
    counts = sorted({results[key] for key in results if key.endswith("/calls")}, reverse=True)
    notes = [
        f"{results['device']}, {results['host']}, {results['cores']} cores, {results['dtype']}; jax {results['jax']}"
        f"{torch}. A call takes numpy arrays of one observation, and ends when its results are such on the host.",
        f"{' and '.join(map(str, counts))} calls after {results['warm_up_calls']} of each side that do not count; "
        f"turns of {results['calls_in_turn']} calls.",
    ]
    if differences:
        notes.append(f"Results differ from JAX's by {max(differences):.1e} at most.")
    notes += [
        f"not run, {_TITLES[side]}: {results[f'not_run/{side}']}." for side in sides if f"not_run/{side}" in results
    ]
    return "\n".join([cli.table(lines), "", *notes])


def _cell(results: Mapping[str, Any], key: str, digits: int) -> str:
    return f"{results[key]:.{digits}f}" if key in results else "not run"


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
