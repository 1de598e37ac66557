"""The frozen codec of a run: where its arrays come from, and where they are kept.

A pretrained codec has a copy of its files in `<workdir>/frozen/<name>`; the arrays of a fitted one lie in the
checkpoints; a codec without arrays follows from the config. Systems without a codec have (None, {}).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from uwm_jax import codecs, files
from uwm_jax.codecs import Codec, VAECodec
from uwm_jax.data.fitted import read_fitted
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath
from uwm_jax.parallel import distributed
from uwm_jax.torch_bridge import diffusers_vae


class Place(NamedTuple):
    """Location of a codec's arrays.

    Attributes:
      files: a pretrained codec's folder or hub name; "" for other codecs.
      arrays: a fitted codec's; None for other codecs.
    """

    files: AnyPath = ""
    arrays: Mapping[str, Any] | None = None


class _Files(NamedTuple):
    """How the files of a pretrained codec are read, (place, `config.model.codec`) -> (codec, arrays), and copied,
    (place, folder)."""

    read: Callable[[AnyPath, ConfigDict], tuple[Codec, Any]]
    copy: Callable[[AnyPath, files.Place], Any]


def _read_vae(place: AnyPath, fields: ConfigDict) -> tuple[Codec, Any]:
    module, params, _ = diffusers_vae.load_vae(place, dtype=fields.dtype)
    return VAECodec(module, microbatch=fields.microbatch), params


_FILES: dict[str, _Files] = {"vae": _Files(_read_vae, diffusers_vae.copy_folder)}


def in_dataset(config: ConfigDict, data: RunData) -> Place:
    """The codec's location for a new run: the config's files, or what the data jobs fitted to its data.

    Raises:
      UserError: nothing was fitted to the data, or it does not fit the config.
    """
    codec = codecs.of_config(config)
    if codec is None:
        return Place()
    if codec.pretrained:
        return Place(config.model.codec[codec.name])
    if not codec.arrays:
        return Place()
    return Place(
        arrays=read_fitted(
            data.directory,
            codec.name,
            codec.arrays,
            data.camera_keys,
            crop=data.config.crop,
            val_ratio=data.config.val_ratio,
        )
    )


def in_workdir(config: ConfigDict, workdir: AnyPath, arrays: Mapping[str, Any] | None) -> Place:
    """The codec's location in a workdir; `arrays` are those of the checkpoint that is read."""
    codec = codecs.of_config(config)
    if codec is None:
        return Place()
    return Place(folder(workdir, config) if codec.pretrained else "", arrays)


def folder(workdir: AnyPath, config: ConfigDict) -> files.Place:
    """The folder in which a workdir keeps the files of its codec, if that is pretrained."""
    codec = codecs.of_config(config)
    return files.as_place(workdir) / "frozen" / (codec.name if codec else "")


def open_codec(config: ConfigDict, place: Place) -> tuple[Codec | None, Any]:
    """The codec of a run and its arrays.

    Raises:
      UserError: the files of a pretrained codec cannot be read, or a fitted one has no arrays.
    """
    codec = codecs.of_config(config)
    if codec is None:
        return None, {}
    if codec.pretrained:
        return _FILES[codec.name].read(place.files, config.model.codec)
    if not codec.arrays:
        return codec.from_config(config.model.codec), {}
    if place.arrays is None:
        raise UserError(f"config.model.codec.name is {codec.name!r}, but the checkpoint carries no codec.")
    return codec.from_arrays(place.arrays), jax.device_put(dict(place.arrays))


def keep(config: ConfigDict, place: Place, workdir: AnyPath, twin: AnyPath | None = None) -> None:
    """Copies the files of a pretrained codec into the workdir of a run that starts (the main process does).

    Args:
      twin: a workdir in which they have been kept already; the files become links to those, or copies inside of the
        bucket, if there are none.

    Raises:
      UserError: the workdir holds others.
    """
    codec = codecs.of_config(config)
    if codec is None or not codec.pretrained:
        return
    if distributed.is_main():
        kept = folder(workdir, config)
        if twin is None or not _linked(folder(twin, config), kept):
            _FILES[codec.name].copy(place.files, kept)
    distributed.barrier("the codec's files are in the workdir")


def _linked(source: files.Place, target: files.Place) -> bool:
    """Makes a folder of links to the files of another; False where there is one already, or no links are possible."""
    if target.exists():
        return False
    if not isinstance(source, Path) or not isinstance(target, Path):
        files.copy_tree(source, target, last=diffusers_vae.SUMS_FILE)
        return True
    try:
        with files.new_folder(target) as made:
            for file in source.iterdir():
                os.link(file, made / file.name)
    except OSError:
        return False
    return True


def checkpointed(codec: Codec | None, frozen: Any) -> Any:
    """The part of the codec that a checkpoint carries: a fitted codec's arrays, None for the others."""
    return frozen if codec is not None and codec.arrays else None


def describe(codec: Codec | None, frozen: Any) -> str:
    """A line for people, with its end; "" without a codec."""
    if codec is None:
        return ""
    return f"frozen codec {codec.name}: {sum(x.size for x in jax.tree.leaves(frozen)) / 1e6:.2f} M parameters\n"
