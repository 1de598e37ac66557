"""Whether a frozen codec suits the pictures of a run: the size of a few frames' latents, before the first step.

The model expects latents as they were where the codec was fitted. Of other pictures those of the `pca` codec may be
tens of times larger, and no loss says so: it is only high.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax import systems
from uwm_jax.codecs import Codec
from uwm_jax.data.faults import BAD
from uwm_jax.data.images import preprocess
from uwm_jax.data.run_data import RunData
from uwm_jax.data.sources import Source
from uwm_jax.data.spec import Batch
from uwm_jax.parallel.distributed import say
from uwm_jax.training.finetune import Origin
from uwm_jax.training.patterns import skip_flag

WINDOWS = 8  # of each source
FAR = 2.0  # the factor, either way, that is worth a warning


def look(config: ConfigDict, codec: Codec | None, frozen: Any, data: RunData, origin: Origin | None) -> dict[str, Any]:
    """Measures and says what is unfit, where some pictures are not those that the codec was made for.

    Args:
      origin: whose codec and layers the run takes, or None.

    Returns:
      {"latent_sizes": as `sizes`} for the checkpoint's assets; {} where there was nothing to look for.
    """
    from_origin = origin is not None and origin.gives_codec(config)
    if codec is None or codec.latent_rms is None or not (from_origin or len(data.sources) > 1):
        return {}
    found = sizes(config, codec, frozen, data)
    drawn = {name: size for name, size in found.items() if data.sources[name].weight}
    known = expected(codec, origin.latent_sizes if origin and from_origin else None)
    for line in about(codec, drawn, known, from_origin, systems.tree(config).codec_interface):
        say(line)
    return {"latent_sizes": found}


def sizes(config: ConfigDict, codec: Codec, frozen: Any, data: RunData) -> dict[str, float]:
    """{source: root mean square of the latents of `WINDOWS` windows' current frames}, on one device.

    Views without a picture (`fill_views="none"`) do not count.

    Raises:
      BadRecord, UnreadRecord, UserError: of windows that need a bad record, where the data bear none, or no more.
    """

    def encode(frozen: Any, frames: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        images, _ = preprocess(frames, None, resize=config.data.resize, crop=config.data.crop)
        seen = jnp.stack([frames[c].max(axis=(1, 2, 3, 4)) > 0 for c in sorted(frames)], axis=1)
        squares = jnp.square(codec.encode(frozen, images, None)).mean(axis=(2, 3, 4, 5))
        return jnp.where(seen, squares, 0.0).sum(), seen.sum()

    program, found = jax.jit(encode), {}
    for name, source in data.sources.items():
        batch = data.spec.empty(WINDOWS)
        for row in range(WINDOWS):
            _load(data, source, batch, row)
        frames = {camera: batch[f"obs/{camera}"] for camera in data.spec.cameras}
        total, views = jax.device_get(program(frozen, frames))
        found[name] = math.sqrt(float(total) / max(float(views), 1.0))
    return found


def _load(data: RunData, source: Source, batch: Batch, row: int) -> None:
    """One of `WINDOWS` windows of a source, evenly spread over its order; the next one that is good, where bad records
    are allowed."""
    count, failure = len(source.windows), None
    start = row * count // WINDOWS
    for place in (*range(start, count), *range(start)):
        try:
            source.load(batch, row, row, place, data.spec)
            return
        except BAD as e:
            if not data.faults.limit:
                raise
            failure = e
            data.faults.note_held_out(e, f"{source.where}: window {place} of its order", "the next good one")
    assert failure is not None
    raise failure


def expected(codec: Codec, of_origin: Mapping[str, float] | None) -> float:
    """The size of latents that a model knows: its origin's where that was measured, else what the codec is made for."""
    if of_origin:
        return float(np.mean(list(of_origin.values())))
    assert codec.latent_rms is not None
    return codec.latent_rms


def about(
    codec: Codec, found: Mapping[str, float], known: float, from_origin: bool, interface: Sequence[str]
) -> list[str]:
    """A warning for each source whose latents are `FAR` from those that are known, with the flag that mends it.

    Args:
      found: as `sizes` gives it.
      known: as `expected` gives it.
      from_origin: whether codec and layers come from another run; else the codec was fitted on a source of this one.
      interface: names of the arrays that touch latents.
    """
    lines = []
    for source, size in found.items():
        if known / FAR <= size <= known * FAR:
            continue
        told = (
            f"warning: latents of {source!r} have a root mean square of {size:.3g} under the {codec.name} codec "
            f"{'of the origin' if from_origin else 'of this run'}, where the model expects {known:.3g}: its pictures "
            "are of another kind than those that the codec is for."
        )
        if from_origin:
            told += f" A codec for these data, with layers for it that start fresh: {skip_flag(interface)}"
        elif codec.arrays:
            told += (
                " A codec for pictures of any kind is --config.model.codec.name=vae; without this source: "
                f"--config.data.sources.{source}.weight=0"
            )
        lines.append(told)
    return lines
