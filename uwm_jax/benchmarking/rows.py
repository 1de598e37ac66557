"""The rows of `benchmark_step` in JAX: the model, its synthetic inputs, and the compiled function of each row.

Rows run what training and sampling run: the step of `training.build` on one device, and the methods of `System`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax import codecs, host_memory
from uwm_jax import config as config_lib
from uwm_jax.benchmarking.names import (
    CODEC,
    ENCODER,
    NETWORK,
    PREPROCESSING,
    ROWS,
    SAMPLES,
    needs,
    part_of,
    trains,
)
from uwm_jax.benchmarking.timing import Runner
from uwm_jax.errors import UserError
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.accumulate import value_and_grad
from uwm_jax.synthetic import synthetic_arrays, synthetic_batch, synthetic_spec
from uwm_jax.systems.uwm.modes import MODES
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.training import flops
from uwm_jax.training import state as state_lib
from uwm_jax.training.build import build
from uwm_jax.training.step import make_train_step

Inputs = dict[str, jax.Array]

TREES = {NETWORK: "noise_pred_net", ENCODER: "obs_encoder"}  # of the trained parameters


@contextlib.contextmanager
def fitting(what: str) -> Iterator[None]:
    """Turns an allocation that failed into a UserError that says what to change."""
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
    """The model with the arrays and inputs that some rows need, and what each row runs.

    Args:
      action_dim: columns of the actions.
      rows: for which the arrays are made.
      frame_size: (height, width) of raw frames; by default the size that they are resized to.
      initialize: False fills all arrays with one number instead, so that nothing is compiled but the rows.
    """

    def __init__(
        self,
        config: ConfigDict,
        action_dim: int,
        rows: Sequence[str] = ROWS,
        frame_size: tuple[int, int] | None = None,
        initialize: bool = True,
    ):
        self.config = config = config.copy_and_resolve_references()
        config.data.latents = ""  # rows say themselves what they encode
        self.loss: jax.Array | None = None  # of the last step
        self._inputs: dict[str, Inputs] = {}  # of each part
        codec = codecs.from_config(config)
        assert codec is not None
        spec = synthetic_spec(config, action_dim, frame_size)
        self._program = build(config, spec, codec, mesh_lib.data_mesh(jax.devices()[:1]))
        assert isinstance(self._program.system, UWM)
        self.system = self._program.system
        arrays = jax.eval_shape(lambda: synthetic_arrays(config, codec))
        self._shapes = shapes = self._program.shapes.params
        self.parameters = {
            **{part: _size(shapes[tree]) for part, tree in TREES.items()},
            "codec": _size(arrays),
        }
        needed = {part for row in rows for part in needs(row)}
        self.frozen: Any = {}
        if CODEC in needed:
            self.frozen = synthetic_arrays(config, codec) if initialize else _filled(arrays)
        trees = [TREES[part] for part in TREES if part in needed]

        def init(key: jax.Array) -> Any:
            params = self.system.init(key)
            return {tree: params[tree] for tree in trees}

        held = self.system.held
        if initialize:
            params = held(jax.jit(init)(jax.random.key(config.seed)))
        else:
            params = _filled(held({tree: shapes[tree] for tree in trees}))
        self.state: state_lib.TrainState | None = None
        self._params = params
        if any(trains(row) for row in rows):
            self.state = state_lib.create(config, params, self._program.optimizer, self.system.tree.untrained)

    @property
    def params(self) -> Any:
        """The trained parameters that the rows need; a step replaces them."""
        return self._params if self.state is None else self.state.params

    def runner(self, row: str) -> Runner:
        """Compiles a row's function."""
        inputs, frozen = self.inputs(row), self.frozen if CODEC in needs(row) else {}
        if trains(row):
            return self._step_runner(frozen, inputs)
        function = self.function(row)

        def params() -> Any:  # those of this row alone, as they are after the steps of others
            return {tree: self.params[tree] for part, tree in TREES.items() if part in needs(row)}

        compiled, seconds = _timed(lambda: jax.jit(function).lower(params(), frozen, inputs).compile())
        return Runner(lambda: compiled(params(), frozen, inputs), seconds, _planned_bytes(compiled))

    def _step_runner(self, frozen: Any, batch: Inputs) -> Runner:
        assert self.state is not None
        program = self._program
        step = make_train_step(self.config, self.system, program.optimizer, program.mesh)
        compiled, seconds = _timed(lambda: program.compile(step, self.state, frozen, batch, updates_state=True))
        self._params = None  # donated with the state

        def call() -> Any:
            self.state, metrics = compiled(self.state, frozen, batch)
            self.loss = metrics["loss"].value
            return self.state, metrics

        return Runner(call, seconds, _planned_bytes(compiled))

    # --- what a row reads ----------------------------------------------------------------------

    def inputs(self, row: str) -> Inputs:
        """The arrays that a row reads, the same for all rows of a part."""
        part = part_of(row)
        if part not in self._inputs:
            self._inputs[part] = self._make_inputs(part)
        return self._inputs[part]

    def _make_inputs(self, part: str) -> Inputs:
        system, rows = self.system, self.config.batch_size
        if part in SAMPLES:
            batch = synthetic_batch(system, 1)
            return {name: x for name, x in batch.items() if not name.startswith("next_obs/")}
        batch = synthetic_batch(system, rows)
        if part == "latents":
            batch["next_obs_latent"] = system.noise(jax.random.key(1), batch["row"], system.acting)["next_obs"] / 3
            return {name: x for name, x in batch.items() if not name.startswith("next_obs/")}
        if part == PREPROCESSING:
            return {name: x for name, x in batch.items() if x.dtype == jnp.uint8 or name == "row"}
        images = (rows, len(system.cameras), system.num_frames, *self.config.data.crop, 3)
        encoded = _conditions(batch, jax.ShapeDtypeStruct(images, jnp.float32))
        features = jax.eval_shape(system.encode_obs, self._shapes, encoded)
        if part == CODEC:
            return {"images": _random(images), "row": batch["row"]}
        if part == ENCODER:
            conditions = {name: x for name, x in batch.items() if name.startswith("obs/") and x.dtype != jnp.uint8}
            return {"images": _random(images), "target": _random(features.shape), **conditions}
        if part == NETWORK:
            noise = {m: _random((rows, *shape)) for m, shape in system.shapes.items()}
            middle = jnp.full((rows,), self.config.diffusion.num_train_steps // 2)
            return {
                "global_cond": _random(features.shape),
                **{f"noisy/{m}": x for m, x in noise.items()},
                **{f"target/{m}": x for m, x in noise.items()},
                **{f"timestep/{m}": middle for m in noise},
            }
        return batch

    # --- what a row computes -------------------------------------------------------------------

    def function(self, row: str) -> Callable[[Any, Any, Inputs], Any]:
        """(params, frozen, inputs) -> what a row without an optimizer computes, not yet compiled."""
        part, _, stage = row.partition("/")
        if part in SAMPLES:
            return functools.partial(self._sample, SAMPLES[row])
        functions: dict[str, Callable[[Any, Any, Inputs], Any]] = {
            "network/forward": self._predict,
            "network/forward_backward": self._network_gradients,
            "encoder/forward": self._features,
            "encoder/forward_backward": self._encoder_gradients,
            CODEC: self._latents,
            PREPROCESSING: self._preprocess,
        }
        return functions.get(row) or (self._loss if stage == "forward" else self._loss_gradients)

    def _objective(self, frozen: Any) -> Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]:
        """The training loss as a sum over rows."""
        weights = self.config.loss.weights

        def objective(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            system, key = self.system, jax.random.key(0)
            encoded, draws = system.encode(frozen, batch, key), system.draws(key, batch["row"])
            errors = system.losses(params, encoded, draws, train=True).parts
            return sum(weights[m] * errors[m].sum() for m in errors) / self.config.batch_size, {}

        return objective

    def _loss(self, params: Any, frozen: Any, batch: Inputs) -> jax.Array:
        return self._objective(frozen)(params, batch)[0]

    def _loss_gradients(self, params: Any, frozen: Any, batch: Inputs) -> Any:
        steps = self.config.accumulation_steps
        return value_and_grad(self._objective(frozen), params, batch, mesh=None, steps=steps)

    def _predict(self, params: Any, frozen: Any, inputs: Inputs) -> dict[str, jax.Array]:
        noisy, timestep = ({m: inputs[f"{name}/{m}"] for m in self.system.shapes} for name in ("noisy", "timestep"))
        return self.system.predict(params, inputs["global_cond"], noisy, timestep)

    def _network_gradients(self, params: Any, frozen: Any, inputs: Inputs) -> Any:
        """The error with its gradients by the network's parameters and by the features."""

        def objective(trained: Any, inputs: Any) -> tuple[jax.Array, Any]:
            pred = self._predict(trained, frozen, inputs | {"global_cond": trained["global_cond"]})
            errors = (jnp.mean((pred[m] - inputs[f"target/{m}"]) ** 2) for m in pred)
            return sum(errors, jnp.zeros(())), {}

        return value_and_grad(objective, params | {"global_cond": inputs["global_cond"]}, inputs, mesh=None)

    def _features(self, params: Any, frozen: Any, inputs: Inputs) -> jax.Array:
        return self.system.encode_obs(params, _conditions(inputs, inputs["images"]))

    def _encoder_gradients(self, params: Any, frozen: Any, inputs: Inputs) -> Any:
        def objective(params: Any, inputs: Any) -> tuple[jax.Array, Any]:
            return jnp.mean((self._features(params, frozen, inputs) - inputs["target"]) ** 2), {}

        return value_and_grad(objective, params, inputs, mesh=None)

    def _latents(self, params: Any, frozen: Any, inputs: Inputs) -> jax.Array:
        sampled = self.config.model.codec.posterior == "sample"
        return self.system.encode_frames(frozen, inputs["images"], _keys(inputs["row"]) if sampled else None)

    def _preprocess(self, params: Any, frozen: Any, batch: Inputs) -> Any:
        return self.system.images(batch, _keys(batch["row"]))

    def _sample(self, mode: str, params: Any, frozen: Any, batch: Inputs) -> dict[str, jax.Array]:
        system = self.system
        noise = system.noise(jax.random.key(0), batch["row"], mode)
        return system.sample(params, system.encode(frozen, batch), mode, noise)

    # --- numbers -------------------------------------------------------------------------------

    def operations(self, row: str) -> tuple[float, float | None]:
        """The model's operations for one sample, and the seconds that they take at the device's peak, if known."""
        sample, needed = self.system.flops(), needs(row)
        passes = 1 if row.endswith("/forward") else 3
        network = sample.trained["network"] * (NETWORK in needed) * passes
        codec = sample.frozen * (CODEC in needed)
        if row in SAMPLES:
            passes, network = 1, self.config.diffusion.num_inference_steps * sample.trained["network"]
        trained = network + passes * sample.trained["encoder"] * (ENCODER in needed)
        kind = jax.devices()[0].device_kind
        return trained + codec, flops.seconds_at_peak(self.system, trained, codec, kind)

    def description(self) -> dict[str, Any]:
        """The model as `convert to-torch` describes it (JSON values only), as far as torch's rows need it."""
        system, schedule = self.system, self.system.schedule
        return {
            "config": self.config.to_dict(),
            "cameras": system.spec.cameras,
            "images": {"crop": self.config.data.crop},
            "low_dim": system.spec.low_dim,
            "text_dim": system.spec.text_dim,
            "shapes": {"action": system.action_shape, "next_obs_latent": system.latent_shape},
            "diffusion": {
                "timesteps": schedule.timesteps.tolist(),
                "hidden_timestep": schedule.sample_hidden_timestep,
                "alphas_cumprod": schedule.alphas_cumprod.tolist(),
            },
            "codec": system.codec.describe(),
            "modes": {mode: {m: role.value for m, role in MODES[mode].items()} for mode in SAMPLES.values()},
        }


def run_alone(row: str, config: Mapping[str, Any], action_dim: int, frame_size: Any, repetitions: int) -> None:
    """Runs one row in its own process: the arguments are JSON values of those of `Model`."""
    size = (frame_size[0], frame_size[1]) if frame_size else None
    model = Model(config_lib.from_dict(config, "--config"), action_dim, [row], size, initialize=False)
    model.runner(row).repeat(repetitions)


def _timed(compile_row: Callable[[], Any]) -> tuple[Any, float]:
    """The compiled program, and the seconds that compiling took."""
    start = time.perf_counter()
    compiled = compile_row()
    seconds = time.perf_counter() - start
    host_memory.give_back()
    return compiled, seconds


def _planned_bytes(compiled: Any) -> float | None:
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.argument_size_in_bytes + results + plan.temp_size_in_bytes


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _filled(shapes: Any) -> Any:
    """Arrays of these shapes that hold one number each."""
    return jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), shapes)


def _random(shape: Sequence[int]) -> jax.Array:
    """Numbers in [0, 1)."""
    return jnp.asarray(np.random.default_rng(0).random(shape, np.float32))


def _keys(rows: jax.Array) -> jax.Array:
    """(B,) keys, one per row."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(rows)


def _conditions(batch: Mapping[str, Any], images: Any) -> dict[str, Any]:
    """Images, low-dimensional keys and text, as a system encodes them."""
    low_dim = {name.removeprefix("obs/"): x for name, x in batch.items() if name.startswith("obs/") and x.ndim == 3}
    return {"images": images, "low_dim": dict(sorted(low_dim.items())), "text": batch.get("obs/text")}
