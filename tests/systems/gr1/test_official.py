"""GR1's official names and layouts."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.systems.gr1 import case
from uwm_jax.systems.gr1 import official
from uwm_jax.torch_bridge import layout


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tiny():
    return case.build(case.model_fields(), action_dim=7, views=2, size=64)[1]


def test_names_and_shapes_are_the_official_ones(tiny):
    assert case.official_names(tiny, official.entry_of(16, (16, 16))) == case.manifest("gr1_tiny")
    small = case.build(case.model_fields(**case.SMALL), action_dim=7, views=2, size=224)[1]
    assert case.official_names(small, official.entry_of(32, (32, 32))) == case.manifest("gr1_small")


def test_the_baseline_of_the_paper_has_the_official_tensors():
    fields = case.FULL_SIZE | {"depth": 12, "decoder_depth": 3, "resampler_depth": 3}
    for views, action_dim, millions in ((3, 10, 217.95), (2, 7, 217.93)):
        shapes = case.build(case.model_fields(**fields), action_dim=action_dim, views=views, size=224)[1]
        tensors = case.official_names(shapes, official.entry_of(32, (32, 32)))
        assert len(tensors) == 391
        assert round(sum(np.prod(shape) for shape in tensors.values()) / 1e6, 2) == millions
        assert tensors["obs_queries"] == (1, 20 * views, 768)
        assert tensors["action_head.4.weight"] == (action_dim, 384)
        assert tensors["decoder_head.1.weight"] == (3072, 768)


def test_the_round_trip_is_bit_exact(tiny):
    tensors, entry_of = random_tensors(case.manifest("gr1_tiny")), official.entry_of(16, (16, 16))
    params = layout.from_official(tensors, tiny, entry_of, "x")
    assert jax.tree.map(lambda p: p.shape, params) == jax.tree.map(lambda p: p.shape, tiny)
    back = layout.to_official(params, entry_of)
    assert back.keys() == tensors.keys()
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_layouts_hold_on_single_elements(tiny):
    # Written out from the official shapes: torch index -> our index.
    t = random_tensors(case.manifest("gr1_tiny"))
    params = layout.from_official(t, tiny, official.entry_of(16, (16, 16)), "x")
    vit = params["obs_encoder"]["vit"]
    conv = t["obs_encoder.img_encoder.model.conv_proj.weight"]  # (D, channel, row, column)
    assert vit["conv_proj"]["kernel"].reshape(16, 16, 3, 128)[3, 5, 1, 7] == conv[7, 1, 3, 5]
    packed = t["obs_encoder.img_encoder.model.encoder.layers.encoder_layer_1.self_attention.in_proj_weight"]
    assert vit["encoder"]["blocks"]["qkv"]["kernel"][1, 40, 2, 1, 9] == packed.reshape(3, 2, 64, 128)[2, 1, 9, 40]
    layer = params["obs_encoder"]["resampler"]["layers"]["blocks"]
    kv = t["obs_encoder.img_encoder.perceiver_resampler.layers.1.0.to_kv.weight"].reshape(2, 2, 32, 128)
    assert layer["to_kv"]["kernel"][1, 40, 1, 0, 9] == kv[1, 0, 9, 40]
    out = t["obs_encoder.img_encoder.perceiver_resampler.layers.0.0.to_out.weight"].reshape(128, 2, 32)
    assert layer["to_out"]["kernel"][0, 1, 5, 11] == out[11, 1, 5]
    head = t["decoder_head.1.weight"].reshape(3, 16, 16, 128)  # (channel, row, column)
    assert params["decoder"]["head"]["kernel"].reshape(128, 16, 16, 3)[9, 3, 5, 1] == head[1, 3, 5, 9]
    bias = t["decoder_head.1.bias"].reshape(3, 16, 16)
    assert params["decoder"]["head"]["bias"].reshape(16, 16, 3)[3, 5, 1] == bias[1, 3, 5]
    assert (params["decoder"]["proj"]["kernel"] == t["decoder_proj.weight"].T).all()
