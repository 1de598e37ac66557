"""The observation encoder against published numbers; order and width of its options."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.models.obs_encoder import ObsEncoder
from uwm_jax.models.resnet import ResNet


def u(n: int, k: int) -> np.ndarray:
    """The k-th deterministic sequence in [-0.5, 0.5), float64, to which the expected numbers belong."""
    x = 43758.5453 * np.sin(12.9898 * np.arange(1, n + 1, dtype=np.float64) + 78.233 * (k + 1))
    return x - np.floor(x) - 0.5


def resnet18_order() -> list[str]:
    """torchvision's registration order of ResNet-18's modules, in our names."""
    names = ["conv1", "bn1"]
    for stage in range(1, 5):
        for index in range(2):
            block = [f"layer{stage}_{index}/{name}" for name in ("conv1", "bn1", "conv2", "bn2")]
            if stage > 1 and index == 0:
                block += [f"layer{stage}_{index}/downsample_{i}" for i in range(2)]
            names += block
    return [*names, "fc"]


def reference_params(shapes: dict) -> dict:
    """Formula weights, numbered in torchvision's order and filled in torch's layout."""
    params, k = {}, 0
    for name in resnet18_order():
        norm = re.search(r"bn\d|downsample_1", name) is not None
        leaves = {}
        for leaf in ("scale" if norm else "kernel", "bias"):
            node = shapes
            for part in name.split("/"):
                node = node[part]
            if leaf not in node:
                continue
            shape = node[leaf].shape
            torch_shape = tuple(shape[i] for i in (3, 2, 0, 1)) if len(shape) == 4 else shape[::-1]
            value = (0.2 * u(int(np.prod(shape)), k)).astype(np.float32).reshape(torch_shape)
            if leaf == "scale":
                value = value + np.float32(1)
            leaves[leaf] = jnp.asarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)
            k += 1
        target = params
        *parents, last = name.split("/")
        for part in parents:
            target = target.setdefault(part, {})
        target[last] = leaves
    assert k == 62
    return params


def test_published_features():
    encoder = ObsEncoder(embed_dim=8)
    images = (u(2 * 3 * 2 * 64 * 64, 1007) + 0.5).astype(np.float32).reshape(1, 2, 3, 2, 64, 64)
    images = jnp.asarray(images.transpose(0, 1, 3, 4, 5, 2))  # (B, V, C, T, H, W) -> channels last
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)["params"]["img_encoder"]
    params = {"img_encoder": reference_params(shapes)}
    features = np.asarray(jax.jit(encoder.apply)({"params": params}, images))
    assert features.shape == (1, 32) and features.dtype == np.float32
    np.testing.assert_allclose([features.mean(), features.std()], [-0.1751449, 1.1243242], atol=4e-6)
    np.testing.assert_allclose(features[0, :5], [0.729113, -2.437508, 0.894957, -0.12738, 1.035589], atol=4e-6)
    np.testing.assert_allclose(features[0, -3:], [-1.042441, -0.353726, -0.061039], atol=4e-6)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return {
        "images": jnp.asarray(rng.random((2, 3, 2, 32, 32, 3), np.float32)),
        "low_dim": {  # deliberately not in sorted order
            "wrist": jnp.asarray(rng.normal(size=(2, 2, 2)).astype(np.float32)),
            "arm": jnp.asarray(rng.normal(size=(2, 2, 3)).astype(np.float32)),
        },
        "text": jnp.asarray(rng.normal(size=(2, 5)).astype(np.float32)),
    }


def small(**fields) -> ObsEncoder:
    return ObsEncoder(stage_sizes=(1,), width=16, embed_dim=4, **fields)


@pytest.mark.parametrize("outermost", ["view", "frame"])
def test_order_of_features(inputs, outermost):
    encoder = small(use_low_dim=True, use_language=True, outermost=outermost)
    variables = jax.jit(encoder.init)(jax.random.key(0), **inputs)
    features = np.asarray(jax.jit(encoder.apply)(variables, **inputs))
    assert features.shape == (2, 3 * 2 * 4 + 2 * (3 + 2) + 4)
    net = jax.jit(ResNet((1,), width=16, embed_dim=4).apply)
    for view in range(3):
        for frame in range(2):
            start = 4 * (view * 2 + frame if outermost == "view" else frame * 3 + view)
            wanted = net({"params": variables["params"]["img_encoder"]}, inputs["images"][:, view, frame])
            np.testing.assert_allclose(features[:, start : start + 4], wanted, atol=1e-6)
    low_dim = np.asarray(inputs["low_dim"]["arm"]), np.asarray(inputs["low_dim"]["wrist"])
    wanted = np.concatenate([part[:, frame] for frame in range(2) for part in low_dim], axis=-1)
    np.testing.assert_array_equal(features[:, 24:34], wanted)
    head = variables["params"]["text_head"]
    np.testing.assert_allclose(features[:, 34:], inputs["text"] @ head["kernel"] + head["bias"], atol=1e-6)


@pytest.mark.parametrize("fields, width", [({}, 24), ({"use_low_dim": True}, 34), ({"use_language": True}, 28)])
def test_width_of_features(inputs, fields, width):
    features, variables = jax.eval_shape(small(**fields).init_with_output, jax.random.key(0), **inputs)
    assert features.shape == (2, width) and features.dtype == jnp.float32
    assert ("text_head" in variables["params"]) == ("use_language" in fields)


def test_text_head_starts_as_torch_does(inputs):
    wide = {**inputs, "text": jnp.ones((2, 400))}
    head = jax.jit(small(use_language=True).init)(jax.random.key(0), **wide)["params"]["text_head"]
    kernel = np.asarray(head["kernel"])
    assert kernel.shape == (400, 4) and 0.045 < np.abs(kernel).max() <= 0.05
    assert 0 < np.abs(np.asarray(head["bias"])).max() <= 0.05


@pytest.mark.parametrize("missing", ["low_dim", "text"])
def test_missing_inputs_are_named(inputs, missing):
    encoder = small(use_low_dim=True, use_language=True)
    with pytest.raises(ValueError, match="use_low_dim" if missing == "low_dim" else "use_language"):
        jax.eval_shape(encoder.init, jax.random.key(0), **{**inputs, missing: None})


def test_unusable_order_is_named(inputs):
    with pytest.raises(ValueError, match="outermost must be view or frame, found 'time'"):
        jax.eval_shape(small(outermost="time").init, jax.random.key(0), **inputs)
