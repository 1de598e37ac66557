"""Official PyTorch checkpoints become workdirs, and workdirs become official state dicts.

    python -m uwm_jax.convert from-torch --input=model.safetensors --official-config=config.yaml \\
        [--normalizer=normalizer.npz] --workdir=DIR
    python -m uwm_jax.convert to-torch --workdir=DIR --output=model.safetensors [--step=N] [--config.FIELD=VALUE]

Tensors keep their bits: from-torch, then to-torch, gives an equal file with the same names. Beside it,
`model.json` describes the model fully; normalisers are there, never among the tensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from safetensors.numpy import load_file

from uwm_jax import cli
from uwm_jax.data.normalize import Normalizer
from uwm_jax.diffusion.modes import MODES
from uwm_jax.errors import UserError
from uwm_jax.models.codecs import PCACodec, VAECodec
from uwm_jax.system import DataFacts, System
from uwm_jax.torch_bridge import diffusers_vae, layout, weights
from uwm_jax.torch_bridge.official_config import VAE, OfficialRun, read_official
from uwm_jax.torch_bridge.official_yaml import OfficialYaml
from uwm_jax.training import checkpoint, inference
from uwm_jax.training.record import code_version

FLAGS = flags.FLAGS

FORMAT = "uwm_jax.torch"
FORMAT_VERSION = 1

# Buffers of the official VAE wrapper: latents = (posterior * scaling_factor - shift) / scale
LATENT_SHIFT, LATENT_SCALE = "obs_encoder.vae.shift", "obs_encoder.vae.scale"
PCA = "obs_encoder.pca."

# What the official VAE always has; without this a missing layer would pass for another architecture.
SDXL_PARTS = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}


def define_flags() -> None:
    flags.DEFINE_string("input", None, "from-torch: official weights, .safetensors or .pt")
    flags.DEFINE_string("official_config", None, "from-torch: the run's saved YAML")
    flags.DEFINE_string("normalizer", None, "from-torch: .npz with <key>/scale and <key>/offset")
    flags.DEFINE_string("workdir", None, "from-torch: the directory to make; to-torch: the one to read")
    flags.DEFINE_string("output", None, "to-torch: the .safetensors file to write; a .json goes beside it")
    flags.DEFINE_integer("step", None, "to-torch: which checkpoint; the newest by default", lower_bound=0)
    inference.define_flags()
    cli.accept_config_overrides()


def main(argv: list[str]) -> None:
    overrides = cli.config_overrides()
    if argv == ["from-torch"]:
        if overrides:
            raise UserError(f"--config.{overrides[0][0]}: from-torch takes every field from --official-config.")
        from_torch(
            cli.required("input"), cli.required("official_config"), cli.required("workdir"), FLAGS.normalizer or None
        )
    elif argv == ["to-torch"]:
        to_torch(cli.required("workdir"), cli.required("output"), FLAGS.step, overrides, FLAGS.parameters)
    else:
        found = " ".join(argv) or "nothing"
        raise UserError(f"expected one of the words from-torch and to-torch, found {found}. Run with --help.")


def from_torch(
    input_path: str | Path, official_config: str | Path, workdir: str | Path, normalizer: str | Path | None = None
) -> None:
    """Makes an ordinary workdir, in float32, of official weights; all of it or nothing.

    Args:
      input_path: `.safetensors`, or an official `.pt` (which brings its normalisers).
      official_config: the run's saved YAML.
      workdir: a directory that does not exist yet, or is empty.
      normalizer: `.npz`; takes the place of what a `.pt` holds for the same key.
    """
    workdir = Path(workdir)
    weights.check_output(workdir, "--workdir")
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(
            f"--workdir: {str(workdir)!r} is not empty; a converted checkpoint needs a directory of its own."
        )
    tensors, stored = weights.read_weights(input_path)
    run = read_official(OfficialYaml(official_config), {name: tuple(t.shape) for name, t in tensors.items()})
    given = weights.read_normalizers(normalizer) if normalizer else {}
    facts = DataFacts(run.cameras, run.low_dim, run.action_dim, run.text_dim, _normalizer(run, stored, given))

    vae_tensors = {name.removeprefix(VAE): t for name, t in tensors.items() if name.startswith(VAE)}
    vae_config = {**diffusers_vae.infer_config({name: t.shape for name, t in vae_tensors.items()}), **SDXL_PARTS}
    network = {n: t for n, t in tensors.items() if not n.startswith(VAE) and n not in (LATENT_SHIFT, LATENT_SCALE)}
    source, patch = f"--input: {input_path}", run.config.model.patch
    faults = diffusers_vae.match_tensors(vae_config, vae_tensors, "its VAE", VAE)[1]
    faults += _faults_of_latents(tensors, vae_config["latent_channels"])
    try:
        module = diffusers_vae.module_from_config(vae_config)
        system = System(run.config, facts, VAECodec(module, run.config.model.codec.microbatch))
        like = jax.eval_shape(system.init, jax.random.key(0))
    except (UserError, ValueError) as e:  # such fields describe no model, so nothing tells which tensors to expect
        if not run.conflicts:
            raise
        raise UserError(layout.refusal(source, faults, run.conflicts)) from e
    faults = layout.find_faults(network, like, patch) + faults
    if faults or run.conflicts:
        raise UserError(layout.refusal(source, faults, run.conflicts))
    params = layout.from_official(network, like, patch, source)
    _warn_of_infinities(tensors)

    with weights.atomic_folder(workdir, "--workdir") as staging:
        diffusers_vae.write_folder(staging / "frozen" / "vae", vae_config, vae_tensors)
        origin = {"converted_from": {"weights": Path(input_path).name, "config": Path(official_config).name}}
        checkpoint.save_params_only(staging, run.config, facts, params, extra_assets=origin)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"wrote {workdir}: {count / 1e6:.2f} M trainable parameters, cameras {', '.join(sorted(run.cameras))}")


def to_torch(
    workdir: str | Path,
    output: str | Path,
    step: int | None = None,
    overrides: Iterable[tuple[str, str]] = (),
    parameters: str | None = None,
) -> None:
    """Writes a checkpoint under official names.

    Args:
      workdir: any of our workdirs.
      output: the `.safetensors` file; the description goes beside it with the ending `.json`.
      step: which checkpoint; None takes the newest.
      overrides: `("diffusion.spacing", "trailing")` pairs on top of the stored config.
      parameters: "raw" or "average"; None takes the average where the checkpoint has one.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output: expected a name that ends in .safetensors, found {str(output)!r}.")
    for path in (output, output.with_suffix(".json")):
        weights.check_output_file(path)
    system, params, frozen, step = inference.load_for_inference(workdir, step, overrides, parameters)
    tensors = layout.to_official(params, system.config.model.patch)
    tensors |= _codec_tensors(system, frozen, Path(workdir))
    description = describe(system, tensors, step, Path(workdir))
    description |= inference.parameters_used(workdir, step, parameters)
    weights.write_weights(output, dict(sorted(tensors.items())))
    with weights.atomic(output.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n")
    print(f"wrote {output}: {len(tensors)} tensors of step {step}, described in {output.with_suffix('.json').name}")


def describe(system: System, tensors: Mapping[str, np.ndarray], step: int, workdir: Path) -> dict[str, Any]:
    """Everything that the tensors mean: enough to run the model without our code (JSON values only)."""
    c, facts, schedule = system.config, system.facts, system.schedule
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "step": step,
        "config": c.to_dict(),
        "cameras": {key: list(facts.cameras[key]) for key in sorted(facts.cameras)},  # raw height, width
        "images": {"resize": list(c.data.resize), "crop": list(c.data.crop), "range": [0.0, 1.0]},
        "low_dim": {key: facts.low_dim[key] for key in sorted(facts.low_dim)},
        "text_dim": facts.text_dim,
        "window": {name: list(c.data.window[name]) for name in ("obs", "action", "next_obs")},
        "shapes": {
            "action": list(system.action_shape),
            "next_obs_latent": list(system.latent_shape),  # V, T, h, w, C
            "encoder_pool_order": ["row", "column", "channel"] if c.model.encoder.pool == "flatten" else [],
        },
        # raw = normalised * scale + offset; an absent key is the identity
        "normalizers": facts.normalizer.to_json(),
        "diffusion": {
            **c.diffusion.to_dict(),
            "timesteps": schedule.timesteps.tolist(),
            "given_timestep": 0,
            "hidden_timestep": schedule.sample_hidden_timestep,
            "alphas_cumprod": [float(a) for a in schedule.alphas_cumprod],
        },
        "modes": {mode: {m: role.value for m, role in roles.items()} for mode, roles in MODES.items()},
        "codec": _codec_json(system, workdir),
        "tensors": {name: {"shape": list(t.shape), "dtype": t.dtype.name} for name, t in sorted(tensors.items())},
    }


def _normalizer(run: OfficialRun, stored: weights.Normalizers, given: weights.Normalizers) -> Normalizer:
    """The run's normaliser, `given` before `stored`.

    Says once which keys the model reads or makes without one, and which of the given ones belong to nothing.
    """
    pairs = {**stored, **given}
    sizes = {"action": run.action_dim, **run.low_dim_seen}
    for key, (scale, _) in pairs.items():
        if key in sizes and scale.shape != (sizes[key],):
            raise UserError(f"--normalizer: {key}/scale has shape {scale.shape}, expected ({sizes[key]},).")
        if key in ("action", *run.low_dim) and not scale.all():
            raise UserError(f"--normalizer: {key}/scale has zeros, so {key} cannot be normalised; put 1 there.")
    absent = [key for key in ("action", *run.low_dim) if key not in pairs]
    unknown = [key for key in given if key not in sizes]
    warnings = [f"no normaliser for {', '.join(absent)}; raw and normalised values are equal"] if absent else []
    if unknown:
        warnings += [f"--normalizer has {', '.join(unknown)}, but the run's keys are {', '.join(sizes)}"]
    if warnings:
        print(f"warning: {'; '.join(warnings)}.", file=sys.stderr)
    return Normalizer(pairs)


def _warn_of_infinities(tensors: Mapping[str, np.ndarray]) -> None:
    bad = [name for name in sorted(tensors) if not np.isfinite(tensors[name]).all()]
    if bad:
        print(f"warning: {len(bad)} tensors hold values that are not finite, first {bad[0]}.", file=sys.stderr)


def _faults_of_latents(tensors: Mapping[str, np.ndarray], channels: int) -> list[str]:
    """The wrapper's buffers are constants of our codec, so they must hold what the official code puts there."""
    faults, shape = [], (1, channels, 1, 1)
    for name, constant in ((LATENT_SHIFT, 0.0), (LATENT_SCALE, VAECodec.divisor)):
        if name not in tensors:
            faults.append(f"missing tensor {name} {shape}")
        elif tensors[name].shape != shape or not (tensors[name] == constant).all():
            found = f"{tensors[name].shape} with {tensors[name].ravel()[:4]}"
            faults.append(f"tensor {name} is {found}, expected {shape} with {constant:g} everywhere")
    return faults


def _codec_tensors(system: System, frozen: Any, workdir: Path) -> dict[str, np.ndarray]:
    if isinstance(system.codec, VAECodec):
        stored = load_file(workdir / "frozen" / "vae" / diffusers_vae.WEIGHTS_FILE)
        shape = (1, system.latent_shape[-1], 1, 1)
        constants = {
            LATENT_SHIFT: np.zeros(shape, np.float32),
            LATENT_SCALE: np.full(shape, VAECodec.divisor, np.float32),
        }
        return {VAE + name: tensor for name, tensor in stored.items()} | constants
    return {PCA + name: np.asarray(value) for name, value in frozen.items()}


def _codec_json(system: System, workdir: Path) -> dict[str, Any]:
    codec = system.codec
    if isinstance(codec, VAECodec):
        return {
            "name": "vae",
            "tensors": VAE,
            "latents": "(mode of the posterior of images * 2 - 1, minus shift_factor) * scaling_factor / divisor",
            "scaling_factor": codec.vae.scaling_factor,
            "shift_factor": codec.vae.shift_factor,
            "divisor": codec.divisor,
            "diffusers_config": json.loads((workdir / "frozen" / "vae" / diffusers_vae.CONFIG_FILE).read_text()),
        }
    if isinstance(codec, PCACodec):
        return {
            "name": "pca",
            "tensors": PCA,
            "latents": "patches (row, column, colour) of images - mean, times components / scale",
            "patch": codec.patch,
            "channels": codec.channels,
        }
    return {"name": "pixels", "latents": "images * 2 - 1"}


if __name__ == "__main__":
    cli.run(main, define_flags)
