"""Times the training step of a config's model, part by part, and a policy sample, on made-up data and random weights.

    python -m uwm_jax.benchmark_step --config=configs/droid.py --config.batch_size=1
    python -m uwm_jax.benchmark_step --config=configs/droid.py --part=latents,policy --steps=10

Rows are `latents/...` (batches that hold the codec's latents of the next frames) and `pixels/...` (the frozen codec
encodes them), each with `forward`, `forward_backward` (the gradients of all trained parameters) and `step` (AdamW
too), and `policy`, a sample of actions for one observation; `--part` picks some. On a CPU with torch installed, the
same network runs beside ours as a plain eager torch loop, block by block in turns. One device is used.

Nothing is read from disk or a hub, so any config runs anywhere: it answers whether a model fits the machine and
what a step costs there. Compilation is reported apart from the steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from uwm_jax import cli, files
from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.made_up import make_codec, make_up_arrays, make_up_batch, make_up_facts
from uwm_jax.models.codecs import PCACodec, VAECodec
from uwm_jax.parallel.accumulate import value_and_grad
from uwm_jax.system import System
from uwm_jax.training import flops
from uwm_jax.training import state as state_lib
from uwm_jax.training.step import make_train_step

FLAGS = flags.FLAGS

SOURCES = ("latents", "pixels")
STAGES = ("forward", "forward_backward", "step")
POLICY = "policy"
ROWS = (*(f"{source}/{stage}" for source in SOURCES for stage in STAGES), POLICY)

BLOCK_SECONDS = 0.2  # what is timed is repeated within a block until about this long

Batch = dict[str, jax.Array]


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument]; fields change with --config.any.field=value")
    flags.DEFINE_integer("steps", 3, "timed blocks of each row; the median counts", lower_bound=1)
    flags.DEFINE_integer("action_dim", 10, "columns of the made-up actions", lower_bound=1)
    flags.DEFINE_list("part", [*SOURCES, POLICY], "what to time: latents, pixels, policy, or rows such as pixels/step")
    flags.DEFINE_bool("torch", None, "beside a plain torch loop; by default on a CPU where torch is installed")
    flags.DEFINE_string("json", None, "also write the numbers to this file")
    cli.accept_config_overrides()


def main(argv: list[str]) -> None:
    config = config_lib.load(cli.required("config"), cli.config_overrides())
    rows = select(FLAGS.part)
    beside_torch, note = _torch_wanted(FLAGS.torch)
    output = cli.optional_path("json")
    if output:
        files.check_output_file(output, "--json")
    results = benchmark(config, FLAGS.steps, FLAGS.action_dim, rows, beside_torch)
    print(table(results))
    if note:
        print(note)
    if output:
        files.write_text(output, json.dumps(results, indent=2) + "\n")


def select(parts: Sequence[str]) -> list[str]:
    """The rows that `--part` names: `latents`, `pixels`, `policy`, or single rows."""
    known = (*SOURCES, *ROWS)
    for part in parts:
        if part not in known:
            raise UserError(f"--part: expected some of {', '.join(known)}, joined by commas; found {part!r}.")
    rows = [row for row in ROWS if row in parts or row.split("/")[0] in parts]
    if not rows:
        raise UserError(f"--part: expected at least one of {', '.join(known)}.")
    return rows


def _torch_wanted(flag: bool | None) -> tuple[bool, str]:
    """Whether to run torch beside ours, and a line about what is missing."""
    installed, cpu = importlib.util.find_spec("torch") is not None, jax.default_backend() == "cpu"
    missing = "torch is not installed: `pip install 'uwm-jax[torch]'` adds a plain torch loop to compare with."
    if flag and not cpu:
        raise UserError("--torch: the comparison runs on CPUs only (JAX_PLATFORMS=cpu); leave the flag out.")
    if flag and not installed:
        raise UserError(f"--torch: {missing}")
    wanted = cpu and flag is not False
    return wanted and installed, missing if wanted and not installed else ""


# --- the benchmark -----------------------------------------------------------------------------------


def benchmark(
    config: ConfigDict,
    steps: int,
    action_dim: int,
    rows: Sequence[str] = ("pixels/step", POLICY),
    beside_torch: bool = False,
) -> dict[str, Any]:
    """Times `rows` of the model that `config` describes, on one device.

    Args:
      steps: timed blocks of each row, whose median counts; a block is as many calls as fill `BLOCK_SECONDS`.
      action_dim: columns of the actions.
      beside_torch: runs blocks of a plain torch loop in turns with ours, where a row has such a counterpart.

    Returns:
      Flat keys. For each row: `<row>/seconds`, `/samples_per_second`, `/gflop_per_sample` (of the model; neither the
      optimizer nor recomputation counts), `/tflop_per_second`, `/mfu` where the chip's peak is known, `/memory_gib`
      (what the compiler planned: arguments, results and temporaries), `/compile_and_first_s`; beside torch also
      `/torch_seconds`, `/torch_ratio` (median over the blocks of ours / torch) and `/torch_ratio_range`.
      `device`, `batch_size`, `dtype`, `<part>_parameters_m`, `loss_after_steps` where a step was timed, and
      `peak_memory_gib` where the device reports it. The step from pixels and the policy's sample are also
      `train_step_s`, `samples_per_second`, `compile_and_first_step_s`, `policy_sample_s`, `compile_and_first_sample_s`.

    Raises:
      UserError: the model or a row does not fit into the device's memory.
    """
    with _fitting("the training state with its made-up batches"):
        model = _Model(config, action_dim, needs_codec=any(row.startswith("pixels") for row in rows))
    torch_rows = _torch_rows(model, rows) if beside_torch else {}
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        **{f"{name}_parameters_m": count / 1e6 for name, count in model.parameters.items()},
    }
    if beside_torch:
        results["torch_threads"] = _threads()
    for row in rows:
        with _fitting(row):
            timing = _time(model.runner(row), torch_rows.get(row), steps)
        results |= {f"{row}/{name}": value for name, value in _numbers(model, row, timing).items()}
    if model.loss is not None:
        results["loss_after_steps"] = float(model.loss)
    results |= _summary(results)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return results | ({"peak_memory_gib": peak / 2**30} if peak else {})


def _summary(results: Mapping[str, Any]) -> dict[str, float]:
    """The two rows that people ask for first, under short names."""
    short = {
        "pixels/step/compile_and_first_s": "compile_and_first_step_s",
        "pixels/step/seconds": "train_step_s",
        "pixels/step/samples_per_second": "samples_per_second",
        "policy/compile_and_first_s": "compile_and_first_sample_s",
        "policy/seconds": "policy_sample_s",
    }
    return {name: results[key] for key, name in short.items() if key in results}


@dataclasses.dataclass
class _Runner:
    """What a row repeats: `call` starts one repetition and returns its results, which need not be there yet."""

    call: Callable[[], Any]
    compile_seconds: float
    memory_bytes: float | None

    def repeat(self, count: int) -> None:
        result = None
        for _ in range(count):
            result = self.call()
            # XLA's CPU client would run independent calls side by side.
            if jax.default_backend() == "cpu":
                jax.block_until_ready(result)
        jax.block_until_ready(result)


@dataclasses.dataclass
class _Timing:
    """Seconds per repetition, one number per block."""

    runner: _Runner
    first: float
    ours: list[float]
    torch: list[float]


def _time(runner: _Runner, torch_call: Callable[[], Any] | None, blocks: int) -> _Timing:
    """Warms up, then times blocks of ours and of torch in turns."""

    def torch_repeat(count: int) -> None:
        assert torch_call is not None
        for _ in range(count):
            torch_call()

    first = _seconds(runner.repeat, 1)
    timing = _Timing(runner, first, [], [])
    sides = [(runner.repeat, timing.ours)] + ([(torch_repeat, timing.torch)] if torch_call else [])
    if torch_call:
        torch_call()  # allocates its buffers
    counts = [max(1, min(100, math.ceil(BLOCK_SECONDS / _seconds(repeat, 1)))) for repeat, _ in sides]
    for _ in range(blocks):
        for (repeat, seconds), count in zip(sides, counts, strict=True):
            seconds.append(_seconds(repeat, count) / count)
    return timing


def _seconds(run: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start


def _numbers(model: _Model, row: str, timing: _Timing) -> dict[str, Any]:
    seconds = float(np.median(timing.ours))
    rate = (1 if row == POLICY else model.config.batch_size) / seconds
    operations, ideal_seconds = model.operations(row)
    numbers: dict[str, Any] = {
        "seconds": seconds,
        "samples_per_second": rate,
        "gflop_per_sample": operations / 1e9,
        "tflop_per_second": operations * rate / 1e12,
    }
    if ideal_seconds is not None:
        numbers["mfu"] = ideal_seconds * rate
    if timing.runner.memory_bytes is not None:
        numbers["memory_gib"] = timing.runner.memory_bytes / 2**30
    numbers["compile_and_first_s"] = timing.runner.compile_seconds + timing.first
    if timing.torch:
        ratios = [ours / torch for ours, torch in zip(timing.ours, timing.torch, strict=True)]
        numbers["torch_seconds"] = float(np.median(timing.torch))
        numbers["torch_ratio"] = float(np.median(ratios))
        numbers["torch_ratio_range"] = [min(ratios), max(ratios)]
    return numbers


@contextlib.contextmanager
def _fitting(what: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise UserError(
            f"{what} does not fit into the memory of {jax.devices()[0].device_kind}: lower config.batch_size or "
            "config.model.codec.microbatch, raise config.accumulation_steps, or set config.model.remat "
            f"({str(e).splitlines()[0]})."
        ) from e


class _Model:
    """The model, its state and its batches, and the compiled functions that the rows run."""

    def __init__(self, config: ConfigDict, action_dim: int, needs_codec: bool):
        self.config = config
        self.loss: jax.Array | None = None  # of the last step
        codec = make_codec(config)
        self.system = System(config, make_up_facts(config, action_dim), codec)
        arrays = jax.eval_shape(lambda: make_up_arrays(config, codec))
        self.frozen = make_up_arrays(config, codec) if needs_codec else {}
        self.optimizer = state_lib.make_optimizer(config)
        create = jax.jit(lambda key: state_lib.create(config, self.system.init(key), self.optimizer))
        self.state = create(jax.random.key(config.seed))
        trees = {"network": "noise_pred_net", "encoder": "obs_encoder"}
        self.parameters = {
            **{name: _size(self.state.params[key]) for name, key in trees.items()},
            "codec": _size(arrays),
        }
        pixels = make_up_batch(self.system, config.batch_size)
        latents = {name: x for name, x in pixels.items() if not name.startswith("next_obs/")}
        latents["next_obs_latent"] = self.system.draw_noise(jax.random.key(1), pixels["row"])["next_obs"] / 3
        self.batches = {"pixels": pixels, "latents": latents}

    def runner(self, row: str) -> _Runner:
        """Compiles a row's function."""
        source, _, stage = row.partition("/")
        if row == POLICY:
            return self._runner(self._policy, lambda: self.state.params, make_up_batch(self.system, 1))
        batch = self.batches[source]
        if stage == "step":
            return self._step_runner(batch)
        function = self._forward if stage == "forward" else self._forward_backward
        return self._runner(function, lambda: self.state.params, batch)

    def _runner(self, function: Callable[..., Any], params: Callable[[], Any], batch: Batch) -> _Runner:
        compiled, seconds = _compile(jax.jit(function), params(), self.frozen, batch)
        return _Runner(lambda: compiled(params(), self.frozen, batch), seconds, _planned_bytes(compiled))

    def _step_runner(self, batch: Batch) -> _Runner:
        step = jax.jit(make_train_step(self.config, self.system, self.optimizer), donate_argnums=0)
        compiled, seconds = _compile(step, self.state, self.frozen, batch)

        def call() -> Any:
            self.state, metrics = compiled(self.state, self.frozen, batch)
            self.loss = metrics["loss"]
            return self.state, metrics

        return _Runner(call, seconds, _planned_bytes(compiled))

    def _objective(self, frozen: Any) -> Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]:
        """The training loss as a sum over rows."""
        weights = self.config.loss.weights

        def objective(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            errors, _ = self.system.row_losses(params, frozen, batch, jax.random.key(0))
            return sum(weights[m] * errors[m].sum() for m in errors) / self.config.batch_size, {}

        return objective

    def _forward(self, params: Any, frozen: Any, batch: Batch) -> jax.Array:
        return self._objective(frozen)(params, batch)[0]

    def _forward_backward(self, params: Any, frozen: Any, batch: Batch) -> Any:
        steps = self.config.accumulation_steps
        return value_and_grad(self._objective(frozen), params, batch, mesh=None, steps=steps)

    def _policy(self, params: Any, frozen: Any, batch: Batch) -> jax.Array:
        noise = self.system.draw_noise(jax.random.key(0), batch["row"])
        return self.system.sample(params, frozen, batch, "policy", noise)["action"]

    def operations(self, row: str) -> tuple[float, float | None]:
        """The model's operations for one sample, and the seconds that they take at the device's peak, if known."""
        sample = flops.count(self.system, from_pixels=row.startswith("pixels/"))
        passes = 1 if row.endswith("/forward") else 3
        trained, codec = passes * (sample.network + sample.encoder), sample.codec
        if row == POLICY:
            trained, codec = self.config.diffusion.num_inference_steps * sample.network + sample.encoder, 0.0
        kind = jax.devices()[0].device_kind
        return trained + codec, flops.seconds_at_peak(self.config, trained, codec, kind)


def _compile(function: Any, *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    return compiled, time.perf_counter() - start


def _planned_bytes(compiled: Any) -> float | None:
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.argument_size_in_bytes + results + plan.temp_size_in_bytes


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch_rows(model: _Model, rows: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """What torch runs beside each row; rows that it cannot run are left out."""
    import torch

    from uwm_jax.torch_bridge.torch_loop import TorchLoop
    from uwm_jax.torch_bridge.torch_network import UWM

    torch.set_num_threads(_threads())
    system = model.system
    runs: dict[str, Callable[[], Any]] = {}
    codec = _torch_codec(system) if any(row.startswith("pixels/") for row in rows) else None
    description = {
        "config": model.config.to_dict(),
        "cameras": system.facts.cameras,
        "images": {"crop": model.config.data.crop},
        "low_dim": system.facts.low_dim,
        "text_dim": system.facts.text_dim,
        "shapes": {"action": system.action_shape, "next_obs_latent": system.latent_shape},
        "codec": codec or {"name": "pixels"},  # which has no arrays
    }
    network = UWM.from_description(description)
    loop = TorchLoop(network, model.config, system.cameras, system.facts.low_dim, system.schedule.alphas_cumprod)
    for row in rows:
        source, _, stage = row.partition("/")
        if source == "latents" or (source == "pixels" and codec is not None):
            batch = {name: torch.from_numpy(np.array(x)) for name, x in model.batches[source].items()}
            runs[row] = functools.partial(getattr(loop, stage), batch)
    return runs


def _torch_codec(system: System) -> dict[str, Any] | None:
    """The codec as `convert to-torch` describes it; None for a VAE without diffusers."""
    codec = system.codec
    if isinstance(codec, PCACodec):
        return {"name": "pca", "patch": codec.patch, "channels": codec.channels}
    if not isinstance(codec, VAECodec):
        return {"name": "pixels"}
    if importlib.util.find_spec("diffusers") is None:
        return None
    vae, levels = codec.vae, len(codec.vae.block_out_channels)
    fields = "in_channels out_channels block_out_channels layers_per_block latent_channels norm_num_groups"
    config = {
        **{name: getattr(vae, name) for name in (*fields.split(), "scaling_factor")},
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    return {"name": "vae", "diffusers_config": config}


# --- the table ---------------------------------------------------------------------------------------

# column: (key, width, digits)
_COLUMNS = {
    "seconds": ("seconds", 10, 4),
    "samples/s": ("samples_per_second", 10, 3),
    "GFLOP/sample": ("gflop_per_sample", 13, 1),
    "TFLOP/s": ("tflop_per_second", 9, 3),
    "MFU": ("mfu", 7, 3),
    "memory GiB": ("memory_gib", 11, 2),
    "compile s": ("compile_and_first_s", 10, 1),
}
_TORCH_COLUMNS = {"torch s": ("torch_seconds", 10, 4), "ours/torch": ("torch_ratio", 11, 3)}


def table(results: Mapping[str, Any]) -> str:
    """The results of `benchmark` for people."""
    rows = [row for row in ROWS if f"{row}/seconds" in results]
    beside_torch = "torch_threads" in results
    columns = _COLUMNS | (_TORCH_COLUMNS if beside_torch else {})
    columns = {title: c for title, c in columns.items() if any(f"{row}/{c[0]}" in results for row in rows)}
    threads = f", torch on {results['torch_threads']} threads" if beside_torch else ""
    counts = {name: results[f"{name}_parameters_m"] for name in ("network", "encoder", "codec")}
    lines = [
        f"{results['device']}, batch {results['batch_size']}, {results['dtype']}{threads}",
        "parameters in millions: " + ", ".join(f"{name} {count:.2f}" for name, count in counts.items()),
        "",
        " " * 24 + "".join(f"{title:>{width}}" for title, (_, width, _) in columns.items()),
    ]
    for row in rows:
        cells = []
        for key, width, digits in columns.values():
            value = results.get(f"{row}/{key}")
            cells.append(f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}")
        spread = results.get(f"{row}/torch_ratio_range")
        note = f"  ({spread[0]:.3f} to {spread[1]:.3f})" if spread else ""
        lines.append(f"{row:<24}{''.join(cells)}{note}")
    if beside_torch and any(row.startswith("pixels/") and f"{row}/torch_ratio" not in results for row in rows):
        lines.append("torch encodes pixels with diffusers, which is not installed: pip install diffusers")
    if "loss_after_steps" in results:
        lines += ["", f"loss after the timed steps: {results['loss_after_steps']:.4f}"]
    if "peak_memory_gib" in results:
        lines.append(f"most device memory in use at any time: {results['peak_memory_gib']:.2f} GiB")
    return "\n".join(lines)


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
