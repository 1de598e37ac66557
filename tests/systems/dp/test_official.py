"""The map between the official tensors of Diffusion Policy and our tree."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import reference
from uwm_jax.systems.dp.network import network_from_config
from uwm_jax.systems.dp.official import entry_of
from uwm_jax.torch_bridge import layout

SIZES = {  # of the golden sets: width, levels (none: the transformer), action (length, columns)
    "dp_transformer_small": (64, (), (16, 10)),
    "dp_unet_small": (48, (16, 32, 64), (16, 7)),
    "dp_unet_fourier": (32, (16, 24), (8, 3)),
}


def tree(width: int, levels: tuple[int, ...], action: tuple[int, int], features: int, **fields) -> dict:
    """Shapes of the parameters, with or without a text embedding of 512 values."""
    encoder = {"stage_sizes": (2, 2, 2, 2), "width": 64, "pool": "average", "use_low_dim": False}
    unet = {"down_dims": levels, "kernel_size": 3, "groups": 8, "fourier": len(levels) == 2}
    text = jnp.zeros((1, 512)) if fields.get("use_language") else None
    config = {
        "predictor": "unet" if levels else "transformer",
        "encoder": SimpleNamespace(**encoder, use_language=text is not None),
        "unet": SimpleNamespace(**unet),
        "embed_dim": width,
        "timestep_embed_dim": fields.get("timestep_embed_dim", 32),
        "dtype": "float32",
        "depth": fields.get("depth", 3),
        "num_heads": 4,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "scan_blocks": True,
        "remat": "none",
        "attention": "xla",
        "adaln": "official",
        "adaln_rank": 0,
    }
    net = network_from_config(SimpleNamespace(**config), action_dim=action[1], action_len=action[0])
    images = jnp.zeros((1, 1, features // width, 64, 64, 3))
    inputs = images, {}, text, jnp.zeros((1, *action)), jnp.zeros(1, int)
    return jax.eval_shape(lambda key: net.init(key, *inputs, method="init_all"), jax.random.key(0))["params"]


def golden_tree(name: str) -> tuple[dict, layout.EntryOf]:
    width, levels, action = SIZES[name]
    features = reference.numbers(name)["obs_feat"].shape[1]
    return tree(width, levels, action, features), entry_of("unet" if levels else "transformer")


@pytest.mark.parametrize("name", SIZES)
def test_names_shapes_and_bit_equal_round_trip(name):
    like, entries = golden_tree(name)
    stored = json.loads((reference.FOLDER / f"{name}.manifest.json").read_text())["tensors"]
    shapes = {tensor: tuple(shape) for tensor, shape, _ in stored}
    assert {e.name: e.torch_shape for e in layout.table(like, entries)} == shapes
    rng = np.random.default_rng(0)
    tensors = {tensor: rng.standard_normal(shape).astype(np.float32) for tensor, shape in shapes.items()}
    back = layout.to_official(layout.from_official(tensors, like, entries, "x"), entries)
    assert back.keys() == tensors.keys()
    assert all(back[tensor].tobytes() == tensors[tensor].tobytes() for tensor in tensors)


def test_layouts_of_the_unet_hold_on_single_elements():
    # Written out from the official shapes: torch index -> our index.
    like, entries = golden_tree("dp_unet_small")
    tensors = reference.weights("dp_unet_small")
    net = layout.from_official(tensors, like, entries, "x")["noise_pred_net"]
    conv = tensors["noise_pred_net.down_modules.1.0.blocks.0.block.0.weight"]  # (out, in, taps)
    assert net["down_1_0"]["block1"]["conv"]["kernel"][2, 5, 30] == conv[30, 5, 2]
    film = tensors["noise_pred_net.up_modules.1.0.cond_encoder.1.weight"].reshape(2, 16, 224)  # (scale|shift, C, in)
    assert net["up_1_0"]["film"]["kernel"][200, 1, 3] == film[1, 3, 200]
    doubling = tensors["noise_pred_net.up_modules.0.2.conv.weight"]  # (in, out, taps)
    assert net["double_0"]["kernel"][3, 7, 20] == doubling[20, 7, 3]


def test_the_shipped_model_has_the_official_tensors():
    like = tree(768, (), (16, 10), 4608, depth=12, timestep_embed_dim=256)
    entries = {e.name: e.torch_shape for e in layout.table(like, entry_of("transformer"))}
    assert len(entries) == 199
    assert round(sum(np.prod(shape) for shape in entries.values()) / 1e6, 2) == 378.99
    assert entries["noise_pred_net.blocks.11.adaLN_modulation.1.weight"] == (4608, 4864)
    assert entries["noise_pred_net.timestep_encoder.1.weight"] == (1024, 256)
    assert entries["obs_encoder.rgb_encoder.fc.weight"] == (768, 512)


def test_text_head_has_a_name():
    names = {e.name for e in layout.table(tree(64, (), (16, 10), 256, use_language=True), entry_of("transformer"))}
    assert {"obs_encoder.text_encoder.head.weight", "obs_encoder.text_encoder.head.bias"} <= names
