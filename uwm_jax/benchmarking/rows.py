"""The rows of `benchmark_step` in JAX: the model, its synthetic inputs, and the compiled function of each row."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from uwm_jax.benchmarking.timing import Runner
from uwm_jax.errors import UserError
from uwm_jax.made_up import make_codec, make_up_arrays, make_up_batch, make_up_facts
from uwm_jax.parallel.accumulate import value_and_grad
from uwm_jax.system import System
from uwm_jax.training import flops
from uwm_jax.training import state as state_lib
from uwm_jax.training.step import make_train_step

SOURCES = ("latents", "pixels")
STAGES = ("forward", "forward_backward", "step")
POLICY = "policy"
ROWS = (*(f"{source}/{stage}" for source in SOURCES for stage in STAGES), POLICY)

Batch = dict[str, jax.Array]


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


@contextlib.contextmanager
def fitting(what: str) -> Iterator[None]:
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


class Model:
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

    def runner(self, row: str) -> Runner:
        """Compiles a row's function."""
        source, _, stage = row.partition("/")
        if row == POLICY:
            return self._runner(self._policy, lambda: self.state.params, make_up_batch(self.system, 1))
        batch = self.batches[source]
        if stage == "step":
            return self._step_runner(batch)
        function = self._forward if stage == "forward" else self._forward_backward
        return self._runner(function, lambda: self.state.params, batch)

    def _runner(self, function: Callable[..., Any], params: Callable[[], Any], batch: Batch) -> Runner:
        compiled, seconds = _compile(jax.jit(function), params(), self.frozen, batch)
        return Runner(lambda: compiled(params(), self.frozen, batch), seconds, _planned_bytes(compiled))

    def _step_runner(self, batch: Batch) -> Runner:
        step = jax.jit(make_train_step(self.config, self.system, self.optimizer), donate_argnums=0)
        compiled, seconds = _compile(step, self.state, self.frozen, batch)

        def call() -> Any:
            self.state, metrics = compiled(self.state, self.frozen, batch)
            self.loss = metrics["loss"]
            return self.state, metrics

        return Runner(call, seconds, _planned_bytes(compiled))

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
