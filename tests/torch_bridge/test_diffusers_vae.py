"""Folders written by newest diffusers, read by us, compared with its torch model."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from uwm_jax.errors import UserError
from uwm_jax.torch_bridge import diffusers_vae as bridge

TINY = dict(block_out_channels=[32, 64], layers_per_block=1, latent_channels=3, norm_num_groups=8)
SDXL = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, scaling_factor=0.13025)


def save_random(folder: Path, **config):
    """A diffusers VAE with random weights, also in its norms and biases, saved by diffusers."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    levels = len(config["block_out_channels"])
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        **config, down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels
    ).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    return folder, save_random(folder, **TINY)


def assert_equal_models(torch_model, ours, params, size: int) -> None:
    """Encode and decode against torch's model evaluated in float64, so that only our own rounding counts."""
    import torch

    rng = np.random.default_rng(0)
    latent = size // ours.downsampling
    x = rng.uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    z = rng.normal(size=(1, latent, latent, ours.latent_channels)).astype(np.float32)
    exact = torch_model.double()
    with torch.no_grad():
        posterior = exact.encode(torch.from_numpy(x).double().permute(0, 3, 1, 2)).latent_dist
        image = exact.decode(torch.from_numpy(z).double().permute(0, 3, 1, 2)).sample
    run = jax.jit(
        lambda p, x, z: (*ours.apply({"params": p}, x, method="encode"), ours.apply({"params": p}, z, method="decode"))
    )
    for found, expected in zip(run(params, x, z), (posterior.mean, posterior.logvar, image), strict=True):
        expected = expected.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    torch_model.float()


@pytest.mark.torch
def test_tiny_equals_diffusers(tiny):
    folder, model = tiny
    ours, params, source = bridge.load_vae(folder)
    assert ours.downsampling == 2 and ours.norm_num_groups == 8 and ours.scaling_factor == 0.18215
    assert_equal_models(model, ours, params, 16)
    assert source["config"]["_class_name"] == "AutoencoderKL"
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(source["tensors"][name], value.numpy())


@pytest.mark.torch
@pytest.mark.slow
def test_sdxl_equals_diffusers_at_64_pixels(tmp_path):
    model = save_random(tmp_path / "sdxl", **SDXL)
    ours, params, source = bridge.load_vae(tmp_path / "sdxl")
    assert len(source["tensors"]) == 248 and sum(x.size for x in jax.tree.leaves(params)) == 83_653_863
    assert_equal_models(model, ours, params, 64)


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [{"mid_block_add_attention": False}, {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}],
)
def test_variants_equal_diffusers(tmp_path, changes):
    model = save_random(tmp_path / "vae", **TINY, **changes)
    ours, params, _ = bridge.load_vae(tmp_path / "vae")
    assert ours.shift_factor == changes.get("shift_factor", 0.0)
    assert_equal_models(model, ours, params, 8)


def with_old_names(tensors: dict[str, np.ndarray], convolutions: bool) -> dict[str, np.ndarray]:
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    result = {}
    for name, value in tensors.items():
        for ours, old in new.items():
            if f".attentions.0.{ours}." in name:
                name = name.replace(ours, old)
                value = value[:, :, None, None] if convolutions and value.ndim == 2 else value
        result[name] = value
    assert any(".proj_attn.weight" in name for name in result)
    return result


@pytest.mark.torch
@pytest.mark.parametrize("convolutions", [True, False])
def test_old_attention_names(tiny, tmp_path, convolutions):
    folder, _ = tiny
    _, params, source = bridge.load_vae(folder)
    old = with_old_names(source["tensors"], convolutions)
    bridge.write_folder(tmp_path / "old", source["config"], old)
    _, again, kept = bridge.load_vae(tmp_path / "old")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert kept["tensors"].keys() == old.keys()  # names and shapes stay as they were found
    for name in old:
        np.testing.assert_array_equal(kept["tensors"][name], old[name])


@pytest.mark.torch
def test_half_precision_weights_become_float32_parameters(tiny, tmp_path):
    import ml_dtypes

    folder, _ = tiny
    _, params, source = bridge.load_vae(folder)
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in source["tensors"].items()}
    bridge.write_folder(tmp_path / "half", source["config"], half)
    _, rounded, kept = bridge.load_vae(tmp_path / "half")
    assert {x.dtype for x in jax.tree.leaves(rounded)} == {np.dtype(np.float32)}
    assert {x.dtype for x in kept["tensors"].values()} == {np.dtype(ml_dtypes.bfloat16)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6), params, rounded)


@pytest.mark.torch
def test_every_missing_extra_and_misshaped_tensor_is_named(tiny):
    folder, _ = tiny
    config = json.loads((folder / bridge.CONFIG_FILE).read_text())
    tensors = load_file(folder / bridge.WEIGHTS_FILE)
    del tensors["quant_conv.bias"]
    tensors["encoder.conv_in.weight"] = np.zeros((32, 4, 3, 3), np.float32)
    tensors["loss.logvar"] = np.zeros(())
    tensors["encoder.mid_block.attentions.0.query.weight"] = np.zeros((64, 64))  # beside to_q
    tensors["quant_conv.weight"] = tensors["quant_conv.weight"].astype(np.int8)
    tensors |= {f"unknown.{i}": np.zeros(()) for i in range(40)}
    with pytest.raises(UserError) as error:
        bridge.params_from_tensors(config, tensors, source="some/vae")
    message = str(error.value)
    assert message.startswith("some/vae:") and "45 times" in message
    assert all(f"extra tensor unknown.{i}" in message for i in range(40))
    assert "tensor quant_conv.weight is int8, expected a floating dtype" in message
    assert "missing tensor quant_conv.bias (6,)" in message
    assert "encoder.conv_in.weight has shape (32, 4, 3, 3), expected (32, 3, 3, 3)" in message
    assert "extra tensor loss.logvar" in message
    assert "extra tensor encoder.mid_block.attentions.0." in message


@pytest.mark.torch
def test_infer_config(tiny):
    folder, model = tiny
    shapes = {name: value.shape for name, value in load_file(folder / bridge.WEIGHTS_FILE).items()}
    inferred = bridge.infer_config(shapes)
    for key, value in inferred.items():
        if key not in ("norm_num_groups", "scaling_factor", "_class_name"):
            assert model.config[key] == value, key
    assert inferred["norm_num_groups"] == 32 and inferred["scaling_factor"] == 0.13025
    for name in shapes:  # no tensor is the only one to tell, but for these two, whose presence tells
        if name not in ("quant_conv.weight", "post_quant_conv.weight"):
            others = {k: v for k, v in shapes.items() if k != name}
            others["encoder.down_blocks.9.resnets.7.conv1.weight"] = (96, 32, 3, 3)  # a stray
            assert bridge.infer_config(others) == bridge.infer_config({**others, name: (7,)}) == inferred, name


def test_without_tensors_the_configuration_is_sdxl_s():
    inferred = bridge.infer_config({})
    assert {key: inferred[key] for key in SDXL} == SDXL


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"latents_mean": [0.0]}, r"latents_mean is \[0.0\]"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        bridge.module_from_config(config)


def folder_of(tmp_path: Path) -> tuple[Path, dict, dict]:
    config, tensors = {"_class_name": "AutoencoderKL"}, {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    bridge.write_folder(tmp_path / "vae", config, tensors)
    return tmp_path / "vae", config, tensors


def test_write_folder_keeps_bits_and_leaves_equal_folders_alone(tmp_path):
    folder, config, tensors = folder_of(tmp_path)
    np.testing.assert_array_equal(load_file(folder / bridge.WEIGHTS_FILE)["a"], tensors["a"])
    stamp = (folder / bridge.WEIGHTS_FILE).stat().st_mtime_ns
    bridge.write_folder(folder, config, tensors)
    assert (folder / bridge.WEIGHTS_FILE).stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="already holds another VAE"):
        bridge.write_folder(folder, config, {"a": tensors["a"] + 1})
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]  # nothing half-written stays behind


@pytest.mark.torch
def test_copy_folder_and_a_file_that_changed_afterwards(tiny, tmp_path):
    folder, _ = tiny
    sums = bridge.copy_folder(folder, tmp_path / "copy")
    listed = (tmp_path / "copy" / bridge.SUMS_FILE).read_text()
    assert all(f"{digest}  {name}\n" in listed for name, digest in sums.items())
    a, b = load_file(folder / bridge.WEIGHTS_FILE), load_file(tmp_path / "copy" / bridge.WEIGHTS_FILE)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    b["quant_conv.bias"] += 1
    save_file(b, tmp_path / "copy" / bridge.WEIGHTS_FILE)
    with pytest.raises(UserError, match="its sha256 is not the one in SHA256SUMS"):
        bridge.load_vae(tmp_path / "copy")


def test_broken_files(tmp_path):
    folder, _, _ = folder_of(tmp_path)
    (folder / bridge.SUMS_FILE).unlink()
    (folder / bridge.WEIGHTS_FILE).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        bridge.load_vae(folder)
    (folder / bridge.CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        bridge.load_vae(folder)
    (folder / bridge.WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors is missing"):
        bridge.load_vae(folder)


def test_names_that_cannot_be_fetched(tmp_path):
    with pytest.raises(UserError, match="could not be fetched from the Hugging Face hub") as error:
        bridge.load_vae("nobody/no-such-vae")
    assert "nobody/no-such-vae" in str(error.value) and "give the folder" in str(error.value)
    for name in ("vae", str(tmp_path / "none"), "./none/vae", Path("runs/none")):
        with pytest.raises(UserError, match="there is no such folder"):
            bridge.load_vae(name)


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ("nonsense\n", "expected lines of a sha256 and a file name, found 'nonsense'"),
        ("", "does not list config.json and diffusion_pytorch_model.safetensors"),
        ("{sums}" + "0" * 64 + "  none.txt\n", "none.txt: is listed in SHA256SUMS, but there is no such file"),
        (b"\xff\xfe", "SHA256SUMS: cannot be read"),
    ],
)
def test_malformed_sums(tmp_path, listing, message):
    folder, _, _ = folder_of(tmp_path)
    sums = folder / bridge.SUMS_FILE
    sums.write_bytes(listing if isinstance(listing, bytes) else listing.format(sums=sums.read_text()).encode())
    with pytest.raises(UserError, match=message):
        bridge.load_vae(folder)
