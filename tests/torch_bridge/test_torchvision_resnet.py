from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from uwm_jax.errors import UserError
from uwm_jax.models.resnet import ResNet
from uwm_jax.torch_bridge.torchvision_resnet import load_imagenet_resnet

MODEL = ResNet(stage_sizes=(2, 1), width=16, embed_dim=5)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def norm(name: str, channels: int) -> dict[str, np.ndarray]:
    values = {k: np.full(channels, 3.0, np.float32) for k in ("weight", "bias", "running_mean", "running_var")}
    values["num_batches_tracked"] = np.array(9, np.int64)
    return {f"{name}.{k}": v for k, v in values.items()}


def torchvision_tensors() -> dict[str, np.ndarray]:
    """The names and shapes of a torchvision ResNet with blocks (2, 1) of width 16."""
    rng = np.random.default_rng(0)

    def conv(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    tensors = {"conv1.weight": conv(16, 3, 7, 7), **norm("bn1", 16)}
    for name, before, width in (("layer1.0", 16, 16), ("layer1.1", 16, 16), ("layer2.0", 16, 32)):
        tensors[f"{name}.conv1.weight"] = conv(width, before, 3, 3)
        tensors[f"{name}.conv2.weight"] = conv(width, width, 3, 3)
        tensors |= norm(f"{name}.bn1", width) | norm(f"{name}.bn2", width)
    tensors["layer2.0.downsample.0.weight"] = conv(32, 16, 1, 1)
    tensors |= norm("layer2.0.downsample.1", 32)
    return tensors | {"fc.weight": conv(1000, 32), "fc.bias": conv(1000)}


def saved(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, folder / "resnet.safetensors")
    return folder / "resnet.safetensors"


def test_convolutions_are_copied_norms_reset_and_fc_kept(tmp_path, params):
    tensors = torchvision_tensors()
    loaded = load_imagenet_resnet(str(saved(tmp_path, tensors)), params)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, name in (
        (loaded["conv1"], "conv1"),
        (loaded["layer1_1"]["conv2"], "layer1.1.conv2"),
        (loaded["layer2_0"]["conv1"], "layer2.0.conv1"),
        (loaded["layer2_0"]["downsample_0"], "layer2.0.downsample.0"),
    ):
        np.testing.assert_array_equal(ours["kernel"], tensors[f"{name}.weight"].transpose(2, 3, 1, 0))
    for found in (loaded["bn1"], loaded["layer1_0"]["bn2"], loaded["layer2_0"]["downsample_1"]):
        assert (found["scale"] == 1).all() and (found["bias"] == 0).all()
    jax.tree.map(np.testing.assert_array_equal, loaded["fc"], params["fc"])


@pytest.mark.torch
def test_first_layer_computes_what_torch_computes(tmp_path, params):
    torch = pytest.importorskip("torch")
    tensors = torchvision_tensors()
    kernel = load_imagenet_resnet(saved(tmp_path, tensors), params)["conv1"]["kernel"]
    x = np.random.default_rng(2).normal(size=(1, 16, 16, 3)).astype(np.float32)
    ours = jax.lax.conv_general_dilated(
        x, jnp.asarray(kernel), (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    planes, weight = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(tensors["conv1.weight"])
    theirs = torch.nn.functional.conv2d(planes, weight, stride=2, padding=3)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=2e-5)


def test_half_precision_weights_become_float32(tmp_path, params):
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in torchvision_tensors().items()}
    loaded = load_imagenet_resnet(saved(tmp_path, half), params)
    assert loaded["conv1"]["kernel"].dtype == np.float32


def test_missing_extra_and_misshaped_tensors_are_named(tmp_path, params):
    tensors = torchvision_tensors()
    del tensors["layer1.0.conv2.weight"]
    tensors["layer1.0.conv3.weight"] = np.zeros((64, 16, 1, 1), np.float32)  # a bottleneck's
    tensors["conv1.weight"] = np.zeros((64, 3, 7, 7), np.float32)
    tensors |= {f"unknown.{i}": np.zeros(1, np.float32) for i in range(40)}
    with pytest.raises(UserError) as error:
        load_imagenet_resnet(saved(tmp_path, tensors), params)
    message = str(error.value)
    assert "43 times" in message and all(f"extra tensor unknown.{i}" in message for i in range(40))
    assert "missing tensor layer1.0.conv2.weight (16, 16, 3, 3)" in message
    assert "extra tensor layer1.0.conv3.weight" in message
    assert "tensor conv1.weight has shape (64, 3, 7, 7), expected (16, 3, 7, 7)" in message
    assert "config.model.encoder.stage_sizes" in message


def test_files_that_cannot_be_had(tmp_path, params):
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        load_imagenet_resnet(tmp_path / "bad.safetensors", params)
    for name in (str(tmp_path / "none.safetensors"), Path("none.safetensors"), "none.safetensors", "a/b.safetensors"):
        with pytest.raises(UserError, match="there is no such file"):
            load_imagenet_resnet(name, params)
    for name in ("nobody/no-such-resnet", "nobody/no-such-resnet/weights.safetensors"):
        with pytest.raises(UserError, match="could not be fetched from the Hugging Face hub"):
            load_imagenet_resnet(name, params)
