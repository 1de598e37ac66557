"""Official PyTorch checkpoints become workdirs, and workdirs become official state dicts.

    python -m uwm_jax.convert from-torch --input=model.safetensors --official-config=config.yaml \\
        [--normalizer=normalizer.npz] --workdir=DIR
    python -m uwm_jax.convert to-torch --workdir=DIR --output=model.safetensors [--step=N]

Tensors keep their bits: from-torch, then to-torch, gives an equal file with the same names. Beside it,
`model.json` describes the model fully; normalisers are there, never among the tensors.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from safetensors.numpy import load_file

import uwm_jax
from uwm_jax import cli
from uwm_jax.data.normalize import Normalizer
from uwm_jax.diffusion.modes import MODES
from uwm_jax.errors import UserError
from uwm_jax.models.codecs import PCACodec, VAECodec
from uwm_jax.system import DataFacts, System
from uwm_jax.torch_bridge import diffusers_vae, layout, weights
from uwm_jax.torch_bridge.official_config import VAE, OfficialRun, OfficialYaml, read_official
from uwm_jax.training import checkpoint

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


def main(argv: list[str]) -> None:
    if argv == ["from-torch"]:
        from_torch(
            cli.required("input"), cli.required("official_config"), cli.required("workdir"), FLAGS.normalizer or None
        )
    elif argv == ["to-torch"]:
        to_torch(cli.required("workdir"), cli.required("output"), FLAGS.step)
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
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(
            f"--workdir: {str(workdir)!r} is not empty; a converted checkpoint needs a directory of its own."
        )
    tensors, stored = weights.read_weights(input_path)
    run = read_official(OfficialYaml(official_config), {name: tuple(t.shape) for name, t in tensors.items()})
    pairs = {**stored, **(weights.read_normalizers(normalizer) if normalizer else {})}
    facts = DataFacts(run.cameras, run.low_dim, run.action_dim, run.text_dim, _normalizer(run, pairs))

    source = f"--input: {input_path}"
    vae_tensors = {name.removeprefix(VAE): t for name, t in tensors.items() if name.startswith(VAE)}
    complaints: list[str] = []
    vae_config = {**diffusers_vae.infer_config(vae_tensors, VAE), **SDXL_PARTS}
    try:
        diffusers_vae.params_from_tensors(vae_config, vae_tensors, "its VAE", VAE)
    except UserError as e:
        complaints.append(str(e))
    complaints += _complaints_about_latents(tensors, vae_config["latent_channels"])
    network = {n: t for n, t in tensors.items() if not n.startswith(VAE) and n not in (LATENT_SHIFT, LATENT_SCALE)}
    module = diffusers_vae.module_from_config(vae_config)
    system = System(run.config, facts, VAECodec(module, run.config.model.codec.microbatch))
    like = jax.eval_shape(system.init, jax.random.key(0))
    params = layout.from_official(network, like, run.config.model.patch, source, complaints)

    workdir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{workdir.name}.", dir=workdir.parent))
    try:
        diffusers_vae.write_folder(staging / "frozen" / "vae", vae_config, vae_tensors)
        origin = {"converted_from": {"weights": Path(input_path).name, "config": Path(official_config).name}}
        checkpoint.save_params_only(staging, run.config, facts, params, extra_assets=origin)
        staging.chmod(0o755)
        if workdir.exists():
            workdir.rmdir()
        os.replace(staging, workdir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"wrote {workdir}: {count / 1e6:.2f} M trainable parameters, cameras {', '.join(sorted(run.cameras))}")


def to_torch(workdir: str | Path, output: str | Path, step: int | None = None) -> None:
    """Writes a checkpoint (its averaged parameters, where it keeps them) under official names.

    Args:
      workdir: any of our workdirs.
      output: the `.safetensors` file; the description goes beside it with the ending `.json`.
      step: which checkpoint; None takes the newest.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output: expected a name that ends in .safetensors, found {str(output)!r}.")
    system, params, frozen, step = checkpoint.load_for_inference(workdir, step)
    tensors = layout.to_official(params, system.config.model.patch)
    tensors |= _codec_tensors(system, frozen, Path(workdir))
    description = describe(system, tensors, step, Path(workdir))
    with weights.atomic(output.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n")
    weights.write_weights(output, dict(sorted(tensors.items())))
    print(f"wrote {output}: {len(tensors)} tensors of step {step}, described in {output.with_suffix('.json').name}")


def describe(system: System, tensors: Mapping[str, np.ndarray], step: int, workdir: Path) -> dict[str, Any]:
    """Everything that the tensors mean: enough to run the model without our code (JSON values only)."""
    c, facts, schedule = system.config, system.facts, system.schedule
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "code_version": uwm_jax.__version__,
        "step": step,
        "parameters": "ema_params" if c.optimizer.ema_decay else "params",
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


def _normalizer(run: OfficialRun, pairs: weights.Normalizers) -> Normalizer:
    """The run's normaliser; says once which keys the model reads or makes without one."""
    sizes = {"action": run.action_dim, **run.low_dim_seen}
    for key, (scale, _) in pairs.items():
        if key in sizes and scale.shape != (sizes[key],):
            raise UserError(f"--normalizer: {key}/scale has shape {scale.shape}, expected ({sizes[key]},).")
        if key in ("action", *run.low_dim) and not scale.all():
            raise UserError(f"--normalizer: {key}/scale has zeros, so {key} cannot be normalised; put 1 there.")
    absent = [key for key in ("action", *run.low_dim) if key not in pairs]
    if absent:
        print(f"warning: no normaliser for {', '.join(absent)}; raw and normalised values are equal.", file=sys.stderr)
    return Normalizer(dict(pairs))


def _complaints_about_latents(tensors: Mapping[str, np.ndarray], channels: int) -> list[str]:
    """The wrapper's buffers are constants of our codec, so they must hold what the official code puts there."""
    complaints, shape = [], (1, channels, 1, 1)
    for name, constant in ((LATENT_SHIFT, 0.0), (LATENT_SCALE, VAECodec.divisor)):
        if name not in tensors:
            complaints.append(f"missing tensor {name} {shape}")
        elif tensors[name].shape != shape or not (tensors[name] == constant).all():
            found = f"{tensors[name].shape} with {tensors[name].ravel()[:4]}"
            complaints.append(f"tensor {name} is {found}, expected {shape} with {constant:g} everywhere")
    return complaints


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
    define_flags()
    cli.run(main)
