"""A workdir's checkpoint under official names, and the description of what its tensors mean."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax import files, systems
from uwm_jax.errors import UserError, warn
from uwm_jax.files import AnyPath, Place
from uwm_jax.systems.base import System
from uwm_jax.torch_bridge import layout, official_codecs, official_pt, weights
from uwm_jax.torch_bridge.description import FORMAT, FORMAT_VERSION
from uwm_jax.training import codec_store, inference
from uwm_jax.training.provenance import code_version


def to_torch(
    workdir: AnyPath,
    output: AnyPath,
    step: int | None = None,
    overrides: Iterable[tuple[str, str]] = (),
    parameters: str | None = None,
) -> None:
    """Writes a checkpoint under official names.

    Args:
      workdir: any of our workdirs.
      output: the file, `.safetensors`, or `.pt` as the official code loads it; the description goes next to it with the
        ending `.json`.
      step: which checkpoint; None takes the newest.
      overrides: `("diffusion.spacing", "trailing")` pairs on top of the stored config.
      parameters: "raw" or "average"; None takes the average where the checkpoint has one.
    """
    workdir, output = files.place(workdir, "--workdir"), files.place(output, "--output")
    if output.suffix not in (".safetensors", ".pt"):
        raise UserError(
            f"--output: expected a name that ends in .safetensors or .pt, or a folder as DIR/, found {str(output)!r}."
        )
    if output.suffix == ".pt":
        official_pt.import_torch(f"--output: writing {output}", official_pt.WRITE_OTHERWISE)
    for path in (output, output.with_suffix(".json")):
        files.check_output_file(path)
    system, params, frozen, step = inference.load_for_inference(workdir, step, overrides, parameters)
    tensors = layout.to_official(params, systems.official(system.config.system).entry_of(system.config))
    tensors |= official_codecs.tensors(system.codec, frozen, codec_store.folder(workdir, system.config))
    described = describe(system, tensors, step, workdir)
    described |= inference.parameters_used(workdir, step, parameters)
    tensors = dict(sorted(tensors.items()))
    if output.suffix == ".pt":
        for told in unlike_official(system):
            warn(f"--output: {output}: {told}")
        official_pt.write(output, tensors, system.spec.normalizer.entries, step)
    else:
        weights.write_weights(output, tensors)
    files.write_text(output.with_suffix(".json"), json.dumps(described, indent=2) + "\n")
    print(f"wrote {output}: {len(tensors)} tensors of step {step}, described in {output.with_suffix('.json').name}")


def describe(system: System, tensors: Mapping[str, np.ndarray], step: int, workdir: Place | None) -> dict[str, Any]:
    """Everything that the tensors mean: enough to run the model without our code (JSON values only). Without a workdir,
    which keeps a codec's files, the codec is left out."""
    c, spec = system.config, system.spec
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "step": step,
        "system": c.system,
        "uses": {name: {"makes": list(use.makes), "given": list(use.given)} for name, use in system.uses.items()},
        "acting": system.acting,
        "config": c.to_dict(),
        "cameras": {key: list(spec.cameras[key]) for key in system.cameras},  # raw height, width
        "camera_order": list(system.cameras),  # of the views
        "images": {
            "resize": list(c.data.resize),
            "crop": list(c.data.crop),
            "range": [0.0, 1.0],
            "interpolation": "bilinear, antialiased, half-pixel centres",
            "crop_at": "centre",
        },
        "flip": {key: spec.flip[key] for key in sorted(spec.flip)},  # how the robot's pictures become the model's
        "low_dim": {key: spec.low_dim[key] for key in sorted(spec.low_dim)},
        "text_dim": spec.text_dim,
        **({"text_encoder": spec.text_encoder.to_json()} if spec.text_encoder else {}),
        "window": {name: list(c.data.window[name]) for name in ("obs", "action", "next_obs")},
        "shapes": {"action": [len(c.data.window.action), spec.action_dim]},
        # raw = normalised * scale + offset; an absent key is the identity
        "normalizers": spec.normalizer.to_json(),
        # the model's raw action becomes the robot's by the inverses of these (`uwm_jax.data.transforms`)
        "robots": {source: robot.to_json() for source, robot in spec.robots.items()},
        "noise": {m: list(shape) for m, shape in noise_shapes(system).items()},  # of a row, where sampling starts
        "sampling": system.describe_sampling(),
        **systems.official(c.system).describe(system),
        "codec": official_codecs.describe(system.codec, workdir and codec_store.folder(workdir, system.config)),
        "tensors": {name: {"shape": list(t.shape), "dtype": t.dtype.name} for name, t in sorted(tensors.items())},
    }


def unlike_official(system: System) -> list[str]:
    """What the official code refuses or misreads in a `.pt` of this model, a sentence for each field of the config."""
    told, c = [], system.config
    if system.codec is not None and not official_codecs.is_official(system.codec):
        told.append(
            f"config.model.codec.name={system.codec.name!r}: the official code has the VAE alone, and loads `model` "
            "strictly."
        )
    prediction = c.diffusion.prediction if "diffusion" in c and c.diffusion.get("kind") != "flow" else {}
    told += [
        f"config.diffusion.prediction.{m}={kind!r}: the official code takes what the network makes for noise."
        for m, kind in prediction.items()
        if kind != "epsilon"
    ]
    return told


def noise_shapes(system: System) -> dict[str, tuple[int, ...]]:
    """{modality: shape of a row} of the noise that samples of any use start from."""
    shapes: dict[str, tuple[int, ...]] = {}
    for use in system.uses:
        like = jax.eval_shape(lambda use=use: system.noise(jax.random.key(0), jnp.zeros(1, jnp.int32), use))
        shapes |= {m: x.shape[1:] for m, x in like.items()}
    return shapes
