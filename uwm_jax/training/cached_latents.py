"""Training from cached latents: what a run reads of them, and whether they are those of its codec."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from uwm_jax import codecs, systems
from uwm_jax.codecs import Codec
from uwm_jax.data.fitted import content_digest
from uwm_jax.data.images import is_augmented
from uwm_jax.data.run_data import RunData
from uwm_jax.data.source_latents import LatentUse
from uwm_jax.data.spec import CachedLatents, DataSpec
from uwm_jax.errors import UserError


def use_of(config: ConfigDict) -> LatentUse | None:
    """What a run reads of its codec's latents; None for one that encodes frames."""
    if not config.data.latents:
        return None
    return LatentUse(config.data.latents, systems.get(config.system).latents, _samples(config))


def with_latents(config: ConfigDict, spec: DataSpec, codec: Codec | None) -> DataSpec:
    """The training batches of a config, from those of frames, without any data; latents are in float16."""
    if not config.data.latents or codec is None:
        return spec
    data = config.data
    *_, height, width, channels = codec.latent_shape(len(spec.cameras), 1, *data.crop)
    cached = CachedLatents(
        groups=systems.get(config.system).latents,
        shape=(height, width, channels),
        moments=_samples(config),
        augmented=is_augmented(data.resize, data.crop, data.augment),
    )
    return dataclasses.replace(spec, cached=cached)


def _samples(config: ConfigDict) -> bool:
    """Whether training samples the posterior of a frame's latents."""
    codec = codecs.of_config(config)
    return codec is not None and codec.has_posterior and config.model.codec.posterior == "sample"


def check(config: ConfigDict, data: RunData, codec: Codec | None, frozen: Any) -> None:
    """Compares the cached latents of a run with its codec; passes where it encodes frames.

    Raises:
      UserError: a cache was made with another encoder, or a source cannot show what it lacks.
    """
    if codec is None or not config.data.latents:
        return
    views = sorted(data.spec.cameras)
    digests = [encoder_digest(codec, frozen, view) for view in range(len(views))]
    for source in data.sources.values():
        assert source.samples.latents is not None
        shown = source.samples.shown_cameras
        refuse_shared(source.where, codec, shown)
        for view, digest in zip(views, digests, strict=True):
            for key in shown.get(view, ()):
                sidecar = source.samples.latents.caches[key].sidecar
                if (found := sidecar.fields["encoder"]) != digest:
                    raise UserError(
                        f"config.data.latents={config.data.latents!r}: {source.where}: {sidecar.directory}: encoder: "
                        f"expected sha256 {digest[:12]}, that of this run's codec, found {str(found)[:12]}. Use the "
                        "codec that the cache was made with, or make it again: python -m data_prep.latents --overwrite."
                    )


def refuse_shared(where: str, codec: Codec, shown: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError where a codec encodes each view in its own way, and a camera is shown in several.

    Args:
      where: what to call the source. shown: {view: step keys of the cameras that it may show}.
    """
    every = [key for keys in shown.values() for key in keys]
    if any(axes[:1] == ("view",) for axes in codec.arrays.values()) and len(set(every)) < len(every):
        raise UserError(
            f"config.data.latents={codec.name!r}: {where} shows one camera in several views, and the {codec.name} "
            "codec encodes each view in its own way: train this mixture from frames (config.data.latents='')."
        )


def encoder_digest(codec: Codec, frozen: Any, view: int) -> str:
    """sha256 of all that decides a view's latents: the codec's description and the arrays of its encoder."""
    arrays = jax.tree_util.tree_leaves_with_path(codec.encoder_arrays(codec.for_views(frozen, [view])))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in arrays}
    about = json.dumps(codec.describe(), sort_keys=True)
    return hashlib.sha256(f"{about} {content_digest(named)}".encode()).hexdigest()
