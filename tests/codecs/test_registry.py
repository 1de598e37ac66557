from __future__ import annotations

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from uwm_jax import codecs
from uwm_jax import config as config_lib
from uwm_jax.codecs.base import Codec
from uwm_jax.errors import UserError


def test_a_config_without_a_codec_has_none():
    config = ConfigDict({"model": {}})
    assert codecs.of_config(config) is None and codecs.from_config(config) is None


def test_an_unknown_name_is_refused_with_the_known_ones():
    config = config_lib.base()
    config.model.codec.name = "pac"
    with pytest.raises(UserError, match=r"codec.name='pac': expected one of vae, pixels, pca. Did you mean pca"):
        codecs.of_config(config)


@pytest.mark.parametrize("name", codecs.names())
def test_synthetic_arrays_fit_the_codec(name):
    config = config_lib.base()
    config.model.codec.name = name
    codec = codecs.from_config(config)
    assert codec.name == codec.describe()["name"] == name
    arrays = jax.eval_shape(lambda: codec.synthetic_arrays(2, 16, 24))
    frames = jax.ShapeDtypeStruct((1, 2, 3, 16, 24, 3), jnp.float32)
    latents = jax.eval_shape(lambda p, x: codec.encode(p, x, None), arrays, frames)
    assert latents.shape[1:] == codec.latent_shape(2, 3, 16, 24)
    assert jax.eval_shape(codec.decode, arrays, latents).shape == frames.shape
    if codec.arrays:
        assert {name: x.ndim for name, x in arrays.items()} == {name: len(axes) for name, axes in codec.arrays.items()}
        assert type(codec).from_arrays(arrays) == codec and type(codec).fitted_on(arrays) == (2, 16, 24)


def test_a_fitted_or_pretrained_codec_is_one_of_both():
    kinds: list[type[Codec]] = [codecs.get(name) for name in codecs.names()]
    assert {kind.name: (bool(kind.arrays), kind.pretrained) for kind in kinds} == {
        "vae": (False, True), "pixels": (False, False), "pca": (True, False),
    }  # fmt: skip


def test_only_readers_of_files_know_a_codec_by_its_class():
    package = Path(codecs.__file__).parents[1]
    classes = {codecs.get(name).__name__ for name in codecs.names()} | {"AutoencoderKL"}
    found = {}
    for file in package.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        ours = [node for node in nodes if (node.module or "").startswith("uwm_jax.codecs")]
        if known := classes & {alias.name for node in ours for alias in node.names}:
            found[file.relative_to(package).as_posix()] = known
    outside = {name: known for name, known in found.items() if not name.startswith("codecs/")}
    assert outside == {
        "training/codec_store.py": {"VAECodec"},
        "torch_bridge/diffusers_vae.py": {"AutoencoderKL"},
        "torch_bridge/official_codecs.py": {"VAECodec"},
    }
