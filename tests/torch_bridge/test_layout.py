"""The map between official tensors and our tree: names, exactness, and what it says of a bad file."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import reference
from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.systems.uwm import official
from uwm_jax.systems.uwm.network import network_from_config
from uwm_jax.torch_bridge import layout

GOLDEN = Path(__file__).parents[1] / "golden"
ENTRY_OF = official.entry_of((2, 4, 4))


def _tree(views: int = 2, action_dim: int = 7, text: bool = False, latent_size: int = 8, **model_fields: int) -> dict:
    """Shapes of parameters; by default those of the small LIBERO model."""
    model = config_lib.base().model
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_registers": 24, "timestep_embed_dim": 32}
    model.update(**(model_fields or small))
    model.encoder.use_language = text
    latent = (views, 2, latent_size, latent_size, 4)
    network = network_from_config(
        model, action_dim=action_dim, action_len=16, num_views=views, num_frames=2, latent_shape=latent
    )
    noisy = {"action": jnp.zeros((1, 16, action_dim)), "next_obs": jnp.zeros((1, *latent))}
    timestep = {m: jnp.zeros((1,), jnp.int32) for m in noisy}

    def init(key: jax.Array) -> dict:
        text_embedding = jnp.zeros((1, 512)) if text else None
        images = jnp.zeros((1, views, 2, 64, 64, 3))
        return network.init(key, images, {}, text_embedding, noisy, timestep, method="init_all")["params"]

    return jax.eval_shape(init, jax.random.key(0))


def _manifest() -> dict[str, tuple[int, ...]]:
    stored = json.loads((GOLDEN / "uwm_libero_small.manifest.json").read_text())
    return {name: tuple(shape) for name, shape, _ in stored["tensors"] if ".vae." not in name}


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_names_and_shapes_are_the_official_ones() -> None:
    entries = layout.table(_tree(), ENTRY_OF)
    assert {e.name: e.torch_shape for e in entries} == _manifest()


def test_the_paper_s_model_has_the_official_tensors() -> None:
    entries = {e.name: e.torch_shape for e in layout.table(_tree(3, 10, latent_size=28, depth=12), ENTRY_OF)}
    assert len(entries) == 454 - 248 - 2  # without the VAE and its two constants
    for name, shape in {
        "noise_pred_net.registers": (1, 8, 768),
        "noise_pred_net.pos_embed": (1, 171, 768),
        "noise_pred_net.obs_patchifier.patch_encoder.weight": (768, 4, 2, 4, 4),
        "noise_pred_net.obs_patchifier.patch_decoder.weight": (128, 768),
        "noise_pred_net.timestep_embedding.proj.0.weight": (2048, 1024),
        "noise_pred_net.blocks.11.adaLN_modulation.1.weight": (4608, 5120),
        "noise_pred_net.blocks.0.attn.qkv.weight": (2304, 768),
        "noise_pred_net.head.adaLN_modulation.1.bias": (1536,),
        "obs_encoder.img_encoder.model.fc.weight": (768, 512),
        "obs_encoder.img_encoder.model.layer4.0.downsample.0.weight": (512, 256, 1, 1),
    }.items():
        assert entries[name] == shape
    sizes = {part: sum(np.prod(s) for n, s in entries.items() if n.startswith(part)) for part in ("noise", "obs")}
    assert {part: round(size / 1e6, 2) for part, size in sizes.items()} == {"noise": 384.92, "obs": 11.57}


def test_there_and_back_is_bit_equal() -> None:
    tensors = _random(_manifest())
    params = layout.from_official(tensors, _tree(), ENTRY_OF, "x")
    like = _tree()
    assert jax.tree.structure(params) == jax.tree.structure(like)
    assert jax.tree.map(lambda p: p.shape, params) == jax.tree.map(lambda p: p.shape, like)
    back = layout.to_official(params, ENTRY_OF)
    assert back.keys() == tensors.keys()
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_layouts_hold_on_single_elements() -> None:
    # Written out from the official shapes: torch index -> our index.
    t = _random(_manifest())
    net = layout.from_official(t, _tree(), ENTRY_OF, "x")["noise_pred_net"]
    encoder = t["noise_pred_net.obs_patchifier.patch_encoder.weight"]  # (D, c, pt, ph, pw)
    assert net["patch_encoder"]["kernel"].reshape(2, 4, 4, 4, 48)[1, 2, 3, 0, 5] == encoder[5, 0, 1, 2, 3]
    decoder = t["noise_pred_net.obs_patchifier.patch_decoder.weight"].reshape(4, 2, 4, 4, 48)
    assert net["patch_decoder"]["kernel"].reshape(48, 2, 4, 4, 4)[7, 1, 2, 3, 0] == decoder[0, 1, 2, 3, 7]
    bias = t["noise_pred_net.obs_patchifier.patch_decoder.bias"].reshape(4, 2, 4, 4)
    assert net["patch_decoder"]["bias"].reshape(2, 4, 4, 4)[1, 2, 3, 0] == bias[0, 1, 2, 3]
    qkv = t["noise_pred_net.blocks.1.attn.qkv.weight"].reshape(3, 3, 16, 48)  # (q|k|v, head, channel, in)
    assert net["blocks"]["qkv"]["kernel"][1, 40, 2, 1, 9] == qkv[2, 1, 9, 40]
    proj = t["noise_pred_net.blocks.0.attn.proj.weight"].reshape(48, 3, 16)
    assert net["blocks"]["proj"]["kernel"][0, 2, 5, 11] == proj[11, 2, 5]
    adaln = t["noise_pred_net.blocks.1.adaLN_modulation.1.weight"].reshape(6, 48, 224)
    assert net["blocks"]["adaln"]["kernel"][1, 200, 4, 3] == adaln[4, 3, 200]


def test_text_head_has_a_name() -> None:
    names = {e.name: e.torch_shape for e in layout.table(_tree(text=True), ENTRY_OF)}
    assert names["obs_encoder.text_encoder.head.weight"] == (48, 512)
    assert names["obs_encoder.text_encoder.head.bias"] == (48,)


def test_every_bad_tensor_is_named_in_one_error() -> None:
    tensors = _random(_manifest())
    del tensors["noise_pred_net.registers"]
    del tensors["noise_pred_net.blocks.1.mlp.fc1.bias"]
    tensors["obs_encoder.img_encoder.model.fc.weight"] = np.zeros((48, 511), np.float32)
    tensors["noise_pred_net.pos_embed"] = tensors["noise_pred_net.pos_embed"].astype(np.int32)
    tensors["critic.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        layout.from_official(tensors, _tree(), ENTRY_OF, "weights.safetensors")
    for part in (
        "weights.safetensors",
        "missing tensor noise_pred_net.registers (1, 24, 48)",
        "missing tensor noise_pred_net.blocks.1.mlp.fc1.bias (192,)",
        "tensor obs_encoder.img_encoder.model.fc.weight has shape (48, 511), expected (48, 512)",
        "tensor noise_pred_net.pos_embed is int32",
        "extra tensor critic.weight",
    ):
        assert part in str(error.value)


def test_golden_filler_has_the_published_values() -> None:
    np.testing.assert_allclose(
        reference.filler(5, 0), [0.24008482, 0.06439513, -0.04525074, -0.22759926, 0.32344871], atol=5e-9
    )
    np.testing.assert_allclose(reference.filler(3, 7), [0.47321649, -0.29698814, -0.26779176], atol=5e-9)
