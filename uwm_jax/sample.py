"""One mode (or several) of a trained model on a file of inputs.

    python -m uwm_jax.sample --workdir=DIR --mode=policy,forward --inputs=IN.npz --output=OUT.npz

A mode is a use of the run's system, such as `policy` or `joint`, or `denoise`, one training evaluation.

IN holds `obs/<key>` (cameras uint8 (B, To, H, W, 3), low-dim float (B, To, D) in raw units, `obs/text`
(B, E) where the model reads text) and what else the mode needs: `action` (B, Ta, Da) in raw units for
`forward`; `next_obs/<camera>` or `next_obs_latent` for `inverse`; optionally `noise/action` and
`noise/next_obs`, else drawn from `--seed`. `denoise` needs `action`, `next_obs`, `noise/*` and `timestep/*`, of these
what the system takes in training, and takes `action_mask` (B,), False for rows without actions. Of flow matching,
`timestep/action` is the time in [0, 1). Known keys that a mode does not use are ignored, also those of the
run's data that the model does not read; unknown ones are refused. `uwm_jax.sample_inputs` makes such a file.

OUT holds `action` (raw units), `action_normalized`, `next_obs_latent` and `next_obs/<camera>` (uint8,
cropped size), those that the mode makes, with `--float_frames` also `next_obs_float/<camera>` (float32, [0, 1] units,
not clipped); for `denoise` `loss/*` and what the system shows of an evaluation, such as `noise_pred/*`, `obs_feat` and
`next_obs_latent`. With several modes every key starts with `<mode>/`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from uwm_jax import cli, config_help, files, systems
from uwm_jax.backend import JaxBackend
from uwm_jax.data.value_ranges import far_out
from uwm_jax.errors import UserError, closest, warn
from uwm_jax.systems.base import System
from uwm_jax.torch_bridge import npz_file
from uwm_jax.training import inference

FLAGS = flags.FLAGS

DENOISE = "denoise"


def define_flags() -> None:
    flags.DEFINE_string(
        "workdir", None, "directory of a run or of a converted checkpoint, or owner/name[@revision] on the hub"
    )
    flags.DEFINE_string("mode", None, f"one or more of {', '.join(known_modes())}, separated by commas")
    flags.DEFINE_string("inputs", None, "the .npz of inputs")
    flags.DEFINE_string("output", None, "the .npz to write")
    flags.DEFINE_integer("seed", 0, "of the noise that the inputs do not give", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_bool("float_frames", False, "also write frames as float32 that is not clipped")
    flags.DEFINE_integer("step", None, "which checkpoint; the newest by default", lower_bound=0)
    inference.define_flags()
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    workdir, output = cli.required_run(), cli.required_path("output")
    modes = parse_modes(cli.required("mode"))
    files.check_output_file(output)
    with npz_file.NpzArrays(cli.required_path("inputs"), "--inputs") as arrays:
        system, params, frozen, step = inference.load_for_inference(
            workdir, FLAGS.step, call.overrides, FLAGS.parameters
        )
        check_modes(system, modes)
        inputs = check_inputs(system, modes, arrays, arrays.where, inference.data_keys(workdir, step))
    for told in far_out_inputs(system, inputs):
        warn(f"{arrays.where}: {told}")
    results: dict[str, np.ndarray] = {}
    made_of = run(system, system.held(params), frozen, inputs, FLAGS.seed, float_frames=FLAGS.float_frames)
    for mode, made in made_of.items():
        results |= {f"{mode}/{key}" if len(modes) > 1 else key: value for key, value in made.items()}
    check_results(results, ",".join(modes))
    with files.writing(output, "wb") as file:
        np.savez(file, **results)  # type: ignore[arg-type]  # numpy's types take any keyword for allow_pickle
    shapes = ", ".join(f"{key} {value.shape}" for key, value in results.items())
    used = inference.parameters_used(workdir, step, FLAGS.parameters)["parameters"]
    print(f"wrote {output} (step {step}, {used} parameters): {shapes}")


def known_modes() -> tuple[str, ...]:
    """The modes of all systems."""
    return (*dict.fromkeys(use for name in systems.names() for use in systems.get(name).uses), DENOISE)


def parse_modes(text: str) -> list[str]:
    """`policy,forward` -> ["policy", "forward"]; UserError names a repeated mode, and one that no system has."""
    modes = [part.strip() for part in text.split(",") if part.strip()]
    for mode in modes:
        if mode not in known_modes():
            raise UserError(f"--mode: expected one or more of {', '.join(known_modes())}; found {mode!r}.")
    if not modes or len(set(modes)) < len(modes):
        raise UserError(f"--mode: expected different modes separated by commas, found {text!r}.")
    return modes


def check_modes(system: System, modes: Sequence[str]) -> None:
    """Raises UserError for a mode that the system has not."""
    for mode in modes:
        if mode not in (*system.uses, DENOISE):
            raise UserError(
                f"--mode={mode}: this workdir is a {system.config.system} run, whose modes are "
                f"{', '.join((*system.uses, DENOISE))}."
            )


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of some modes.

    batch: `obs/*`, `next_obs/*` or `next_obs_latent`, `action`, `action_mask`, as the file has them (raw units).
    noise: {modality: float32}, those that the file gives. timestep: {modality: (B,) int32 or float32} for `denoise`.
    """

    modes: tuple[str, ...]
    batch_size: int
    batch: dict[str, np.ndarray]
    noise: dict[str, np.ndarray]
    timestep: dict[str, np.ndarray]


def check_inputs(
    system: System,
    modes: Sequence[str],
    arrays: Mapping[str, np.ndarray],
    where: str = "--inputs",
    data_keys: Iterable[str] | None = (),
) -> Inputs:
    """Takes from `arrays` what `modes` read.

    Args:
      data_keys: what the run's data holds, without `obs/`: known keys, whether or not the model reads them. None where
        that is not known: further observations are ignored, but for those that resemble a missing one.

    Raises:
      UserError: naming every key that is unknown or missing, and every one with an unfit shape, dtype or value.
    """
    like, uses = system.spec.batch_like(1), system.uses
    denoise = DENOISE in modes
    trained = tuple(m for m in ("action", "next_obs") if system.spec.window.groups.get(m))
    known = {m for mode in modes for m in (trained if mode == DENOISE else uses[mode].given)}
    problems = _unknown_keys(system, arrays, data_keys)
    batch_size: int | None = None

    def take(key: str, shape: tuple[int, ...], kind: str, needed: bool = True) -> np.ndarray | None:
        nonlocal batch_size
        expected = f"{kind} (B{''.join(f', {n}' for n in shape)})"
        if key not in arrays:
            if needed:
                problems.append(f"missing {key}: expected {expected}")
            return None
        try:
            value = arrays[key]
        except UserError as e:  # the file has it, but in no readable form
            problems.append(str(e))
            return None
        fits = {
            "uint8": value.dtype == np.uint8,
            "float32": np.issubdtype(value.dtype, np.floating),
            "integer": np.issubdtype(value.dtype, np.integer),
            "bool": value.dtype == np.bool_,
        }[kind]
        if not fits or value.ndim != 1 + len(shape) or value.shape[1:] != shape or not value.shape[0]:
            problems.append(f"{key}: expected {expected}, found {value.dtype} {value.shape}")
            return None
        if batch_size is not None and value.shape[0] != batch_size:
            problems.append(f"{key}: expected B = {batch_size} rows like the keys before it, found {value.shape[0]}")
            return None
        batch_size = value.shape[0]
        if kind == "float32":
            with np.errstate(over="ignore"):
                value = value.astype(np.float32)
            if not np.isfinite(value).all():
                problems.append(f"{key}: holds values that are not finite (in float32)")
        return value

    of_group: dict[str, list[str]] = {}
    for key in like:
        of_group.setdefault(key.partition("/")[0], []).append(key)
    batch: dict[str, np.ndarray | None] = {}
    for group in ("obs", *(m for m in ("action", "next_obs") if m in known)):
        if group == "next_obs" and system.codec and "next_obs_latent" in arrays:
            batch["next_obs_latent"] = take("next_obs_latent", _latent_shape(system), "float32")
            continue
        batch |= {key: take(key, like[key].shape[1:], like[key].dtype.name) for key in of_group.get(group, ())}
        if group == "next_obs" and system.codec and not any(key in arrays for key in of_group.get(group, ())):
            shape = ", ".join(map(str, _latent_shape(system)))
            problems.append(f"(or next_obs_latent: expected float32 (B, {shape}))")
    if denoise:
        batch["action_mask"] = take("action_mask", (), "bool", needed=False)

    draws = _draws_like(system)
    used = [m for m in draws["noise"] if any(mode == DENOISE or m not in uses[mode].given for mode in modes)]
    noise = {m: take(f"noise/{m}", draws["noise"][m].shape[1:], "float32", needed=denoise) for m in used}
    timestep: dict[str, np.ndarray | None] = {}
    for m, x in draws["timestep"].items() if denoise else ():
        whole = np.issubdtype(x.dtype, np.integer)
        timestep[m] = t = take(f"timestep/{m}", x.shape[1:], "integer" if whole else "float32")
        end = system.config.diffusion.num_train_steps if whole else 1
        if t is not None and (t.min() < 0 or t.max() >= end):
            expected = f"0 to {end - 1}" if whole else "at least 0 and less than 1"
            problems.append(f"timestep/{m}: expected {expected}, found {t.min()} to {t.max()}")
    if denoise and all(t is not None for t in timestep.values()):
        problems += system.misfits({m: t for m, t in timestep.items() if t is not None})
    if problems or batch_size is None:
        raise UserError(f"{where}, for mode {', '.join(modes)}:\n  " + "\n  ".join(problems))
    return Inputs(
        tuple(modes),
        batch_size,
        {k: v for k, v in batch.items() if v is not None},
        {m: v for m, v in noise.items() if v is not None},
        {m: t.astype(draws["timestep"][m].dtype) for m, t in timestep.items() if t is not None},
    )


def _draws_like(system: System) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """{"noise": ..., "timestep": ...}, each {modality: shape and dtype} of one row's draws of one evaluation."""
    like = jax.eval_shape(lambda: system.one_draw(jax.random.key(0), jnp.zeros(1, jnp.int32)))
    return {kind: like.get(kind, {}) for kind in ("noise", "timestep")}


def _latent_shape(system: System) -> tuple[int, ...]:
    assert system.codec is not None
    frames = len(system.spec.window.next_obs)
    return system.codec.latent_shape(len(system.cameras), frames, *system.config.data.crop)


def _unknown_keys(system: System, keys: Iterable[str], data_keys: Iterable[str] | None) -> list[str]:
    """A line about every key that no mode knows, with the known one that it resembles."""
    keys, spec = set(keys), system.spec
    observed = {*spec.cameras, *spec.low_dim, *system.config.data.low_dim, "text", *(data_keys or ())}
    known = {f"{group}/{key}" for group in ("obs", "next_obs") for key in observed}
    known |= {f"{group}/{m}" for group in ("noise", "timestep") for m in ("action", "next_obs")}
    known |= {"action", "action_mask", "next_obs_latent"}
    lines = []
    for key in sorted(keys - known):
        group = key.partition("/")[0] + "/"
        candidates = sorted(name for name in known if name.startswith(group)) or sorted(known)
        close = closest(key, candidates, cutoff=0.8)[:1]
        if data_keys is None and group in ("obs/", "next_obs/") and not set(close) - keys:
            continue
        expected = f"did you mean {close[0]}?" if close else f"known are {', '.join(candidates)}."
        lines.append(f"unknown key {key}: {expected}")
    return lines


def far_out_inputs(system: System, inputs: Inputs) -> list[str]:
    """A sentence for each key in raw units that leaves the range of the run's normaliser by far."""
    raw = {"action": "action", **{f"obs/{key}": key for key in system.spec.low_dim}}
    found = [far_out(system.spec.normalizer, raw[key], x) for key, x in inputs.batch.items() if key in raw]
    return [told for told in found if told]


def run(
    system: System, params: Any, frozen: Any, inputs: Inputs, seed: int = 0, *, float_frames: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Runs the modes of `inputs`; returns {mode: arrays of OUT, without the mode's prefix}.

    Args:
      inputs: from `check_inputs`.
      seed: of the noise that the inputs do not give; row i's noise is a function of (seed, i), and the
        same for every mode.
      float_frames: whether to return frames as float32 that is not clipped, too.
    """
    root, rows = jax.random.key(seed), jnp.arange(inputs.batch_size)
    uses = tuple(mode for mode in inputs.modes if mode != DENOISE)
    noise = {use: {**system.noise(root, rows, use), **inputs.noise} for use in uses}
    made: dict[str, dict[str, np.ndarray]] = {}
    if uses:
        backend = JaxBackend(system, params, frozen)
        made = backend.answers(uses, inputs.batch, noise, float_frames=float_frames)
    if DENOISE in inputs.modes:
        batch = {"action_mask": np.ones(inputs.batch_size, bool), **system.spec.normalized(inputs.batch)}
        batch["row"] = np.arange(inputs.batch_size, dtype=np.int32)
        evaluated = _denoising(system)(params, frozen, batch, inputs.noise, inputs.timestep)
        made[DENOISE] = {key: np.asarray(value) for key, value in evaluated.items()}
    return {mode: made[mode] for mode in inputs.modes}


def check_results(results: Mapping[str, np.ndarray], modes: str) -> None:
    """Raises UserError that names the mode and every key of OUT that holds NaN or infinity."""
    if bad := [key for key, value in results.items() if not np.isfinite(value).all()]:
        raise UserError(
            f"--mode={modes}: the results {', '.join(bad)} hold values that are not finite, so nothing was written. "
            "Check the inputs for extreme values, and the checkpoint's parameters."
        )


# Cached, so that repeated calls compile once.
@functools.lru_cache(maxsize=4)
def _denoising(system: System) -> Callable[..., Any]:
    def denoise(params: Any, frozen: Any, batch: Any, noise: Any, timestep: Any) -> dict[str, jax.Array]:
        encoded = system.encode(frozen, batch)
        found = system.losses(params, encoded, {"noise": noise, "timestep": timestep})
        shares = system.shares(batch, jax.random.key(0))
        return {**{f"loss/{name}": (shares[name] * x).sum() for name, x in found.parts.items()}, **found.outputs}

    return jax.jit(denoise)


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
