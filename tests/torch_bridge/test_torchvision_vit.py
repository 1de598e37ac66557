from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from uwm_jax.errors import UserError
from uwm_jax.models.vit import ViT
from uwm_jax.torch_bridge import torchvision_vit
from uwm_jax.torch_bridge.torchvision_vit import load_imagenet_vit

MODEL = ViT(patch=4, width=64, depth=2, mlp_dim=96)


@pytest.fixture(scope="module")
def params():
    return jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8, 12, 3)))["params"]


def torchvision_tensors() -> dict[str, np.ndarray]:
    """The names and shapes of torchvision's `VisionTransformer` of these sizes."""
    shapes = {"class_token": (1, 1, 64), "conv_proj.weight": (64, 3, 4, 4), "conv_proj.bias": (64,)}
    shapes |= {"encoder.pos_embedding": (1, 7, 64), "encoder.ln.weight": (64,), "encoder.ln.bias": (64,)}
    for i in range(2):
        layer = f"encoder.layers.encoder_layer_{i}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{layer}.{norm}.weight": (64,), f"{layer}.{norm}.bias": (64,)}
        attention = f"{layer}.self_attention"
        shapes |= {f"{attention}.in_proj_weight": (192, 64), f"{attention}.in_proj_bias": (192,)}
        shapes |= {f"{attention}.out_proj.weight": (64, 64), f"{attention}.out_proj.bias": (64,)}
        shapes |= {f"{layer}.mlp.0.weight": (96, 64), f"{layer}.mlp.0.bias": (96,)}
        shapes |= {f"{layer}.mlp.3.weight": (64, 96), f"{layer}.mlp.3.bias": (64,)}
    shapes |= {"heads.head.weight": (1000, 64), "heads.head.bias": (1000,)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def saved(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_all_but_the_classifier_is_copied(tmp_path, params):
    tensors = torchvision_tensors()
    saved(tmp_path, tensors)
    loaded = load_imagenet_vit(tmp_path, params)
    assert jax.tree.map(lambda x: x.shape, loaded) == jax.tree.map(lambda x: x.shape, params)
    patch = loaded["conv_proj"]["kernel"].reshape(4, 4, 3, 64)
    np.testing.assert_array_equal(patch, tensors["conv_proj.weight"].transpose(2, 3, 1, 0))
    blocks, layer = loaded["encoder"]["blocks"], "encoder.layers.encoder_layer_1"
    packed = tensors[f"{layer}.self_attention.in_proj_weight"].reshape(3, 1, 64, 64)
    np.testing.assert_array_equal(blocks["qkv"]["kernel"][1], packed.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(blocks["fc2"]["kernel"][1], tensors[f"{layer}.mlp.3.weight"].T)
    np.testing.assert_array_equal(blocks["norm2"]["scale"][1], tensors[f"{layer}.ln_2.weight"])
    np.testing.assert_array_equal(loaded["pos_embedding"], tensors["encoder.pos_embedding"])


def test_half_precision_weights_become_float32(tmp_path, params):
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in torchvision_tensors().items()}
    assert load_imagenet_vit(saved(tmp_path, half), params)["class_token"].dtype == np.float32


def test_sizes_are_read_off_the_tensors():
    shapes = {name: tensor.shape for name, tensor in torchvision_tensors().items()}
    assert torchvision_vit.sizes(shapes) == {"width": 64, "patch": 4, "mlp_dim": 96, "depth": 2}
    assert torchvision_vit.sizes({"class_token": (1, 1, 64)}) == {}


def test_missing_extra_and_misshaped_tensors_are_named(tmp_path, params):
    tensors = torchvision_tensors()
    del tensors["encoder.layers.encoder_layer_0.ln_1.bias"]
    tensors["encoder.layers.encoder_layer_2.ln_1.bias"] = np.zeros(64, np.float32)
    tensors["encoder.pos_embedding"] = np.zeros((1, 50, 64), np.float32)
    with pytest.raises(UserError) as error:
        load_imagenet_vit(saved(tmp_path, tensors), params)
    for part in (
        "3 times",
        "missing tensor encoder.layers.encoder_layer_0.ln_1.bias (64,)",
        "extra tensor encoder.layers.encoder_layer_2.ln_1.bias",
        "tensor encoder.pos_embedding has shape (1, 50, 64), expected (1, 7, 64)",
        "they make a ViT with width 64, patch 4, mlp_dim 96, depth 3",
    ):
        assert part in str(error.value)


def test_files_that_cannot_be_had(tmp_path, params):
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        load_imagenet_vit(tmp_path / "bad.safetensors", params)
    with pytest.raises(UserError, match="there is no such file; expected safetensors with torchvision's ViT names"):
        load_imagenet_vit(str(tmp_path / "none.safetensors"), params)
