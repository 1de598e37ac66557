"""The ViT against torch's own operators, and its start."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.models.vit import ViT

NET = ViT(patch=8, width=128, depth=2, mlp_dim=48)
IMAGES = np.random.default_rng(1).normal(size=(2, 16, 24, 3)).astype(np.float32)


def torch_forward(params: dict, images: np.ndarray) -> np.ndarray:
    """The same network with torch's convolution and `MultiheadAttention`, in float64 and channels first."""
    import torch
    import torch.nn.functional as F

    def tensor(x):
        return torch.from_numpy(np.asarray(x, np.float64))

    def norm(x, p):
        return F.layer_norm(x, x.shape[-1:], tensor(p["scale"]), tensor(p["bias"]), eps=1e-6)

    kernel = tensor(params["conv_proj"]["kernel"]).reshape(8, 8, 3, 128).permute(3, 2, 0, 1)
    x = F.conv2d(tensor(images).permute(0, 3, 1, 2), kernel, tensor(params["conv_proj"]["bias"]), stride=8)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([tensor(params["class_token"]).expand(len(x), -1, -1), x], 1) + tensor(params["pos_embedding"])
    for i in range(NET.depth):
        p = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), params["encoder"]["blocks"])
        attention = torch.nn.MultiheadAttention(128, 2, batch_first=True, dtype=torch.float64)
        attention.load_state_dict(
            {
                "in_proj_weight": tensor(p["qkv"]["kernel"].reshape(128, -1).T.copy()),
                "in_proj_bias": tensor(p["qkv"]["bias"].reshape(-1)),
                "out_proj.weight": tensor(p["proj"]["kernel"].reshape(128, 128).T.copy()),
                "out_proj.bias": tensor(p["proj"]["bias"]),
            }
        )
        y = norm(x, p["norm1"])
        x = x + attention(y, y, y, need_weights=False)[0]
        y = F.gelu(norm(x, p["norm2"]) @ tensor(p["fc1"]["kernel"]) + tensor(p["fc1"]["bias"]))
        x = x + y @ tensor(p["fc2"]["kernel"]) + tensor(p["fc2"]["bias"])
    return norm(x, params["ln"]).detach().numpy()


@pytest.mark.torch
def test_against_torch():
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(NET.init, jax.random.key(0), IMAGES)["params"]
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(np.float32), shapes)
    found = jax.jit(NET.apply)({"params": params}, IMAGES)
    assert found.shape == (2, 1 + 2 * 3, 128)
    np.testing.assert_allclose(found, torch_forward(params, IMAGES), atol=1e-5)
    half = jax.jit(NET.clone(dtype=jnp.bfloat16).apply)({"params": params}, IMAGES)
    assert half.dtype == jnp.float32
    assert 0 < float(jnp.abs(half - found).max()) < 0.05 * float(jnp.abs(found).max())


def test_size_of_vit_b_32():
    shapes = jax.eval_shape(ViT().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 88_224_232 - 769_000  # torchvision's, less its head
    assert shapes["pos_embedding"].shape == (1, 50, 768)


def test_initialisation():
    start = functools.partial(ViT(patch=4, width=64, depth=2, mlp_dim=32).init, jax.random.key(0))
    params = jax.jit(start)(jnp.zeros((1, 8, 8, 3)))["params"]
    assert not params["class_token"].any() and not params["conv_proj"]["bias"].any()
    blocks = params["encoder"]["blocks"]
    for name, bound in (("qkv", np.sqrt(6 / 256)), ("fc1", np.sqrt(6 / 96)), ("proj", 1 / 8)):
        assert 0.9 * bound < np.abs(blocks[name]["kernel"]).max() <= bound
    assert not blocks["qkv"]["bias"].any() and not blocks["proj"]["bias"].any()
    assert 0 < np.abs(blocks["fc2"]["bias"]).max() < 1e-5
    assert abs(params["conv_proj"]["kernel"].std() / np.sqrt(1 / 48) - 1) < 0.05


@pytest.mark.parametrize("fields, words", [({"width": 96}, "multiple of 64"), ({"patch": 7}, "must divide")])
def test_unusable_fields_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(NET.clone(**fields).init, jax.random.key(0), IMAGES)
