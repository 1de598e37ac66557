"""Frozen codecs in state dicts under official names.

A codec's arrays are the tensors `obs_encoder.<codec>.<array>`. The official checkpoints know one codec, a VAE, whose
tensors are diffusers' own below `obs_encoder.vae.vae.`, with the two buffers of the official wrapper around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from uwm_jax import codecs
from uwm_jax.codecs import Codec, VAECodec
from uwm_jax.errors import UserError
from uwm_jax.files import Place, local_copy
from uwm_jax.reading import read_json
from uwm_jax.torch_bridge import description, diffusers_vae
from uwm_jax.torch_bridge.official_config import VAE

Tensors = dict[str, np.ndarray]

# Buffers of the official VAE wrapper: latents = (posterior * scaling_factor - shift) / scale
BUFFERS = _SHIFT, _SCALE = "obs_encoder.vae.shift", "obs_encoder.vae.scale"

# What the official VAE always has; without this a missing layer would pass for another architecture.
_SDXL_PARTS = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}


class _Arrays:
    """A codec whose tensors are its arrays, possibly none."""

    def __init__(self, codec: type[Codec]):
        self._codec, self._prefix = codec, f"obs_encoder.{codec.name}."

    def split(self, tensors: Mapping[str, np.ndarray]) -> tuple[Tensors, Tensors, list[str]]:
        return *description.split(tensors, self._prefix), []

    def make(self, config: ConfigDict, own: Tensors) -> Codec:
        ranks = {name: len(axes) for name, axes in self._codec.arrays.items()}
        if {name: t.ndim for name, t in own.items()} != ranks:
            expected = ", ".join(self._prefix + name for name in ranks) or "none"
            found = ", ".join(f"{self._prefix}{name} {t.shape}" for name, t in own.items()) or "none"
            raise UserError(f"--input: expected the tensors {expected} of a codec, found {found}.")
        return self._codec.from_arrays(own) if ranks else self._codec.from_config(config.model.codec)

    def keep(self, own: Tensors, folder: Place) -> Tensors | None:
        return own or None

    def tensors(self, codec: Codec, frozen: Any, folder: Place) -> Tensors:
        return {self._prefix + name: np.asarray(value) for name, value in frozen.items()}

    def describe(self, codec: Codec, folder: Place) -> dict[str, Any]:
        return {**codec.describe(), **({"tensors": self._prefix} if codec.arrays else {})}


class _OfficialVAE(_Arrays):
    """A VAE in its official wrapper; the workdir keeps it as a diffusers folder."""

    def split(self, tensors: Mapping[str, np.ndarray]) -> tuple[Tensors, Tensors, list[str]]:
        own, rest = description.split(tensors, VAE)
        rest = {name: t for name, t in rest.items() if name not in (_SHIFT, _SCALE)}
        config = _diffusers_config(own)
        faults = diffusers_vae.match_tensors(config, own, "its VAE", VAE)[1]
        return own, rest, faults + _faults_of_latents(tensors, config["latent_channels"])

    def make(self, config: ConfigDict, own: Tensors) -> Codec:
        return VAECodec(diffusers_vae.module_from_config(_diffusers_config(own)), config.model.codec.microbatch)

    def keep(self, own: Tensors, folder: Place) -> Tensors | None:
        diffusers_vae.write_folder(folder, _diffusers_config(own), own)
        return None

    def tensors(self, codec: Codec, frozen: Any, folder: Place) -> Tensors:
        stored = load_file(local_copy(folder / diffusers_vae.WEIGHTS_FILE))
        assert isinstance(codec, VAECodec)
        shape = (1, codec.vae.latent_channels, 1, 1)
        constants = {_SHIFT: np.zeros(shape, np.float32), _SCALE: np.full(shape, VAECodec.divisor, np.float32)}
        return {VAE + name: tensor for name, tensor in stored.items()} | constants

    def describe(self, codec: Codec, folder: Place) -> dict[str, Any]:
        config = read_json(folder / diffusers_vae.CONFIG_FILE)
        return {**codec.describe(), "tensors": VAE, "diffusers_config": config}


_WRAPPED: dict[str, type[_Arrays]] = {"vae": _OfficialVAE}


def _form(codec: type[Codec]) -> _Arrays:
    return _WRAPPED.get(codec.name, _Arrays)(codec)


def split(config: ConfigDict, tensors: Mapping[str, np.ndarray]) -> tuple[Tensors, Tensors, list[str]]:
    """The codec's tensors without their prefix, all others, and a line about each that does not fit the codec."""
    codec = codecs.of_config(config)
    return ({}, dict(tensors), []) if codec is None else _form(codec).split(tensors)


def make(config: ConfigDict, own: Tensors) -> Codec | None:
    """The config's codec with these tensors; None for a config without one.

    Raises:
      UserError: the tensors are not those of the codec.
    """
    codec = codecs.of_config(config)
    return None if codec is None else _form(codec).make(config, own)


def keep(codec: Codec | None, own: Tensors, folder: Place) -> Tensors | None:
    """Writes the files of a pretrained codec to `folder`; returns the arrays that a checkpoint has to hold, or None."""
    return None if codec is None else _form(type(codec)).keep(own, folder)


def tensors(codec: Codec | None, frozen: Any, folder: Place) -> Tensors:
    """The codec under official names.

    Args:
      frozen: its arrays.
      folder: where the workdir keeps the files of a pretrained codec, whose tensors are written as they were found.
    """
    return {} if codec is None else _form(type(codec)).tensors(codec, frozen, folder)


def describe(codec: Codec | None, folder: Place | None) -> dict[str, Any]:
    """JSON values: the latents, and under `tensors` the prefix of the codec's tensors where it has any; without a
    folder, of a codec that is left out."""
    if codec is None:
        return {}
    return _form(type(codec)).describe(codec, folder) if folder else {**codec.describe(), "included": False}


def _diffusers_config(own: Tensors) -> dict[str, Any]:
    return {**diffusers_vae.infer_config({name: t.shape for name, t in own.items()}), **_SDXL_PARTS}


def is_official(codec: Codec) -> bool:
    """Whether the official code has this codec."""
    return isinstance(codec, VAECodec)


def _faults_of_latents(tensors: Mapping[str, np.ndarray], channels: int) -> list[str]:
    """The wrapper's buffers are constants of our codec, so they must hold what the official code puts there."""
    faults, shape = [], (1, channels, 1, 1)
    for name, constant in ((_SHIFT, 0.0), (_SCALE, VAECodec.divisor)):
        if name not in tensors:
            faults.append(f"missing tensor {name} {shape}")
        elif tensors[name].shape != shape or not (tensors[name] == constant).all():
            found = f"{tensors[name].shape} with {tensors[name].ravel()[:4]}"
            faults.append(f"tensor {name} is {found}, expected {shape} with {constant:g} everywhere")
    return faults
