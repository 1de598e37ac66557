"""The ResNet against torch operators, its start, and the shapes of its options."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.models.resnet import IMAGENET_MEAN, IMAGENET_STD, ResNet, max_pool


def random_params(net: ResNet, images, seed: int) -> dict:
    """Weights of a plausible size everywhere, so that no path through the network vanishes."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)["params"]

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(0, 1 / np.sqrt(np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)
        return (rng.normal(0, 0.2, leaf.shape) + (name == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_forward(params: dict, images: np.ndarray, net: ResNet) -> np.ndarray:
    """The same network from torch's operators, in float64 and channels first."""
    import torch
    import torch.nn.functional as F

    def tensor(x):
        return torch.from_numpy(np.asarray(x, np.float64))

    def conv(x, p, stride):
        kernel = tensor(p["kernel"]).permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(x, p):
        return F.group_norm(x, x.shape[1] // 16, tensor(p["scale"]), tensor(p["bias"]), eps=1e-5)

    x = (tensor(images) - tensor(IMAGENET_MEAN)) / tensor(IMAGENET_STD)
    x = F.relu(norm(conv(x.permute(0, 3, 1, 2), params["conv1"], 2), params["bn1"]))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, blocks in enumerate(net.stage_sizes):
        for index in range(blocks):
            p, stride = params[f"layer{stage + 1}_{index}"], 2 if stage and not index else 1
            y = F.relu(norm(conv(x, p["conv1"], stride), p["bn1"]))
            y = norm(conv(y, p["conv2"], 1), p["bn2"])
            if "downsample_0" in p:
                x = norm(conv(x, p["downsample_0"], stride), p["downsample_1"])
            x = F.relu(x + y)
    x = x.mean((2, 3)) if net.pool == "average" else x.permute(0, 2, 3, 1).flatten(1)
    return (x @ tensor(params["fc"]["kernel"]) + tensor(params["fc"]["bias"])).numpy()


@pytest.mark.torch
@pytest.mark.parametrize(
    "stages, pool, size",
    [((1, 2, 1), "average", (33, 46)), ((1, 1, 1, 1), "flatten", (64, 64))],  # odd sizes show the padding
)
def test_against_torch(stages, pool, size):
    images = np.random.default_rng(1).random((2, *size, 3), np.float32)
    net = ResNet(stages, width=16, embed_dim=8, pool=pool)
    params = random_params(net, images, seed=2)
    actual = jax.jit(net.apply)({"params": params}, images)
    np.testing.assert_allclose(actual, torch_forward(params, images, net), atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 3)])
def test_max_pool(size):
    """Values and gradients of flax's pooling, where no two values are equal; all below the padding's usual 0."""
    values = np.random.default_rng(0).permutation(2 * size[0] * size[1] * 3).astype(np.float32)
    x = jnp.asarray(values.reshape(2, *size, 3) - 1000)
    wanted, wanted_vjp = jax.vjp(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))), x)
    actual, vjp = jax.vjp(max_pool, x)
    np.testing.assert_array_equal(actual, wanted)
    np.testing.assert_array_equal(vjp(wanted)[0], wanted_vjp(wanted)[0])


def test_bfloat16_stays_close():
    images = np.random.default_rng(1).random((2, 32, 32, 3), np.float32)
    net = ResNet((1, 1), width=16, embed_dim=8)
    params = random_params(net, images, seed=3)
    wanted = jax.jit(net.apply)({"params": params}, images)
    actual = jax.jit(net.clone(dtype=jnp.bfloat16).apply)({"params": params}, images)
    assert actual.dtype == jnp.float32
    assert 0 < float(jnp.abs(actual - wanted).max()) < 0.05 * float(jnp.abs(wanted).max())


def test_quickstart_shape():
    """Quarter-width ResNet-10 on 64 px: a 2 x 2 map of 128 channels, flattened."""
    net = ResNet((1, 1, 1, 1), width=16, embed_dim=128, pool="flatten")
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((3, 64, 64, 3)))
    assert variables["params"]["fc"]["kernel"].shape == (2 * 2 * 128, 128)
    assert jax.eval_shape(net.apply, variables, jnp.zeros((3, 64, 64, 3))).shape == (3, 128)


def test_names_and_size_of_resnet18():
    shapes = jax.eval_shape(ResNet().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 2) == 11.57
    assert len(jax.tree.leaves(shapes)) == 62
    blocks = {f"layer{stage}_{index}" for stage in range(1, 5) for index in range(2)}
    assert set(shapes) == {"conv1", "bn1", "fc"} | blocks
    assert "downsample_0" not in shapes["layer1_0"] and "downsample_0" in shapes["layer2_0"]


def test_initialisation():
    net = ResNet((1, 1), width=32, embed_dim=64)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, leaf = "/".join(key.key for key in path), np.asarray(leaf)
        if name.startswith("fc/"):  # torch's default: uniform in +-1/sqrt(inputs), bias too
            bound = 1 / np.sqrt(64)
            assert np.abs(leaf).max() <= bound and np.abs(leaf).max() > 0.9 * bound
            assert abs(leaf.mean()) < 5 * bound / np.sqrt(3 * leaf.size)
            assert abs(leaf.std() / (bound / np.sqrt(3)) - 1) < 5 / np.sqrt(leaf.size)
        elif name.endswith("kernel"):  # He et al.: fan-out
            std = np.sqrt(2 / (leaf.shape[0] * leaf.shape[1] * leaf.shape[3]))
            assert abs(leaf.std() / std - 1) < 5 / np.sqrt(leaf.size), name
        else:
            assert (leaf == (1 if name.endswith("scale") else 0)).all(), name


@pytest.mark.parametrize("fields, words", [({"width": 24}, "multiple of 16"), ({"pool": "max"}, "pool must be")])
def test_unusable_fields_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(ResNet((1,), **fields).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
