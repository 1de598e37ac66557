"""Conversion of official weights and back: bit-equal, self-describing, and clear about unfit files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file

from uwm_jax import cli, convert
from uwm_jax import config as config_lib
from uwm_jax.data.normalize import Normalizer
from uwm_jax.models.codecs import PCACodec, fit_pca
from uwm_jax.system import DataFacts, System
from uwm_jax.training import checkpoint

_SPEC = importlib.util.spec_from_file_location("reference", Path(__file__).parent / "golden" / "reference.py")
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

LIBERO = "uwm_libero_small"


def command(*arguments: str) -> int:
    """Runs the command in this process; returns its exit status."""
    before = set(flags.FLAGS)
    convert.define_flags()
    try:
        return cli.call(convert.main, ["convert", *arguments])
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with official weights of each golden set."""
    folder = tmp_path_factory.mktemp("official")
    for name in reference.NAMES:
        save_file(reference.weights(name), folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("name", reference.NAMES)
def test_round_trip_is_bit_equal(official: Path, tmp_path: Path, name: str) -> None:
    g = reference.numbers(name)
    normalizer = {"action/scale": g["action_scale"], "action/offset": g["action_offset"]}
    np.savez(tmp_path / "normalizer.npz", **normalizer)
    source, workdir, back = official / f"{name}.safetensors", tmp_path / "run", tmp_path / "out" / "back.safetensors"
    line = [
        "from-torch",
        f"--input={source}",
        f"--official-config={reference.official_yaml(name)}",
        f"--normalizer={tmp_path / 'normalizer.npz'}",
        f"--workdir={workdir}",
    ]
    if name == LIBERO:  # as a user runs it, once
        run = [sys.executable, "-m", "uwm_jax.convert"]
        for arguments in (line, ["to-torch", f"--workdir={workdir}", f"--output={back}"]):
            result = subprocess.run([*run, *arguments], capture_output=True, text=True, timeout=300)
            assert result.returncode == 0, result.stderr
            assert "warning" not in result.stderr
    else:
        assert command(*line) == 0
        assert command("to-torch", f"--workdir={workdir}", f"--output={back}") == 0
    assert_same_bits(load_file(back), load_file(source))
    assert sorted(p.name for p in back.parent.iterdir()) == ["back.json", "back.safetensors"]

    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["dtype"] == "float32"
    described = json.loads(back.with_suffix(".json").read_text())
    assert described["config"] == config
    assert described["cameras"].keys() == set(config["data"]["cameras"])
    assert (described["format"], described["format_version"]) == ("uwm_jax.torch", 1)
    stored = described["normalizers"]["action"]
    for part in ("scale", "offset"):  # JSON numbers give back the float32 exactly
        assert np.array_equal(np.float32(stored[part]), g[f"action_{part}"])
    assert described["window"] == {"obs": [0, 1], "action": list(range(1, 17)), "next_obs": [17, 18]}
    assert described["diffusion"]["timesteps"] == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    assert described["diffusion"]["hidden_timestep"] == 90
    assert described["modes"]["inverse"] == {"action": "generate", "next_obs": "given"}
    codec = described["codec"]
    assert (codec["name"], codec["scaling_factor"], codec["divisor"]) == ("vae", 0.13025, 3.0)
    manifest = json.loads((reference.FOLDER / f"{name}.manifest.json").read_text())
    assert codec["diffusers_config"]["block_out_channels"] == manifest["vae_channels"]
    assert codec["diffusers_config"]["norm_num_groups"] == 32
    assert described["shapes"]["next_obs_latent"] == [len(described["cameras"]), 2, 8, 8, 4]
    assert described["tensors"].keys() == load_file(source).keys()


def libero_line(official: Path, workdir: Path, **changed: object) -> list[str]:
    given = {
        "input": official / f"{LIBERO}.safetensors",
        "official-config": reference.official_yaml(LIBERO),
        "workdir": workdir,
        **changed,
    }
    return ["from-torch", *(f"--{key}={value}" for key, value in given.items() if value is not None)]


def test_without_a_normalizer_there_is_one_warning(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*libero_line(official, tmp_path / "run")) == 0
    assert capsys.readouterr().err.count("warning") == 1
    system = checkpoint.load_for_inference(tmp_path / "run")[0]
    value = np.float32([[0.5] * 7])
    np.testing.assert_array_equal(system.facts.normalizer.normalize("action", value), value)


def test_every_unfit_tensor_is_named(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = reference.weights(LIBERO)
    del tensors["noise_pred_net.blocks.0.mlp.fc2.bias"]
    del tensors["obs_encoder.vae.vae.decoder.conv_norm_out.weight"]
    del tensors["obs_encoder.vae.vae.quant_conv.weight"]
    tensors["obs_encoder.img_encoder.model.bn1.bias"] = np.zeros(63, np.float32)
    tensors["obs_encoder.vae.scale"] = np.full((1, 4, 1, 1), 2.5, np.float32)
    tensors["obs_encoder.img_encoder.model.bn1.running_mean"] = np.zeros(64, np.float32)
    save_file(tensors, tmp_path / "bad.safetensors")
    assert command(*libero_line(official, tmp_path / "run", input=tmp_path / "bad.safetensors")) == 2
    message = capsys.readouterr().err
    for part in (
        "bad.safetensors",
        "missing tensor noise_pred_net.blocks.0.mlp.fc2.bias (48,)",
        "missing tensor obs_encoder.vae.vae.decoder.conv_norm_out.weight (32,)",
        "missing tensor obs_encoder.vae.vae.quant_conv.weight (8, 8, 1, 1)",
        "tensor obs_encoder.img_encoder.model.bn1.bias has shape (63,), expected (64,)",
        "tensor obs_encoder.vae.scale is (1, 4, 1, 1) with [2.5 2.5 2.5 2.5]",
        "extra tensor obs_encoder.img_encoder.model.bn1.running_mean",
    ):
        assert part in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists() and list(tmp_path.iterdir()) == [tmp_path / "bad.safetensors"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": "none.safetensors"}, "none.safetensors"),
        ({"input": "{tmp}/text.safetensors"}, "not a readable safetensors file"),
        ({"input": "{tmp}/weights.ckpt"}, ".safetensors or .pt"),
        ({"input": None}, "--input is required"),
        ({"official-config": None}, "--official-config is required"),
        ({"official-config": "{tmp}/none.yaml"}, "none.yaml"),
        ({"official-config": "{droid}"}, "uwm_droid_small.config.yaml"),
        ({"normalizer": "{tmp}/wrong_size.npz"}, "(3,), expected (7,)"),
        ({"normalizer": "{tmp}/half.npz"}, "action/offset"),
        ({"normalizer": "{tmp}/zero.npz"}, "zeros"),
        ({"normalizer": "{tmp}/name.npz"}, "'scale'"),
        ({"workdir": "{tmp}"}, "not empty"),
    ],
)
def test_unusable_inputs_end_with_status_2(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, str | None], message: str
) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "weights.ckpt").write_text("")
    ones = np.ones(7, np.float32)
    np.savez(tmp_path / "wrong_size.npz", **{"action/scale": ones[:3], "action/offset": ones[:3]})
    np.savez(tmp_path / "half.npz", **{"action/scale": ones})
    np.savez(tmp_path / "zero.npz", **{"action/scale": 0 * ones, "action/offset": ones})
    np.savez(tmp_path / "name.npz", scale=ones)
    droid = reference.official_yaml("uwm_droid_small")
    filled = {key: value and value.format(tmp=tmp_path, droid=droid) for key, value in changed.items()}
    assert command(*libero_line(official, **{"workdir": tmp_path / "run", **filled})) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


@pytest.mark.parametrize("words", [(), ("to_torch",), ("from-torch", "to-torch")])
def test_the_words_of_the_command(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    assert command(*words) == 2
    assert "from-torch and to-torch" in capsys.readouterr().err


# --- official .pt files -----------------------------------------------------------------------------


@pytest.fixture(params=["a dict", "an attribute"])
def official_classes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Classes under the names that official checkpoints pickle; the nested one is or has a dictionary."""
    modules = [ModuleType(name) for name in ("datasets", "datasets.utils", "datasets.utils.normalizer")]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    last = modules[-1]

    class LinearNormalizer:
        def __init__(self, scale: np.ndarray, offset: np.ndarray):
            self.scale, self.offset = scale, offset

    class NestedDictLinearNormalizer(dict):
        pass

    class Holder:
        pass

    class Other:
        pass

    if request.param == "an attribute":
        Holder.__name__ = NestedDictLinearNormalizer.__name__
        NestedDictLinearNormalizer = Holder
    for cls in (LinearNormalizer, NestedDictLinearNormalizer, Other):
        cls.__module__, cls.__qualname__ = last.__name__, cls.__name__
        setattr(last, cls.__name__, cls)
    return last


@pytest.mark.torch
def test_pt_checkpoints_bring_their_normalizers(tmp_path: Path, official_classes: ModuleType) -> None:
    import torch

    name = "uwm_droid_small"
    tensors, g = reference.weights(name), reference.numbers(name)
    linear = {"gripper_position": official_classes.LinearNormalizer(np.float32([0.5]), np.float32([0.25]))}
    low_dim = official_classes.NestedDictLinearNormalizer()
    if isinstance(low_dim, dict):
        low_dim.update(linear)
    else:
        low_dim.normalizers = linear
    stored = {
        "model": {key: torch.from_numpy(value) for key, value in tensors.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "action_normalizer": official_classes.LinearNormalizer(g["action_scale"], g["action_offset"]),
        "lowdim_normalizer": low_dim,
        "step": np.int64(3),
    }
    torch.save(stored, tmp_path / "models.pt")
    for module in ("datasets", "datasets.utils", "datasets.utils.normalizer"):
        del sys.modules[module]  # the reader has no such package
    line = ["from-torch", f"--input={tmp_path / 'models.pt'}", f"--official-config={reference.official_yaml(name)}"]
    assert command(*line, f"--workdir={tmp_path / 'run'}") == 0
    assert command("to-torch", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'back.safetensors'}") == 0
    assert_same_bits(load_file(tmp_path / "back.safetensors"), dict(sorted(tensors.items())))
    normalizers = json.loads((tmp_path / "back.json").read_text())["normalizers"]
    assert np.array_equal(np.float32(normalizers["action"]["scale"]), g["action_scale"])
    assert normalizers["gripper_position"] == {"scale": [0.5], "offset": [0.25]}


@pytest.mark.torch
@pytest.mark.parametrize("official_classes", ["a dict"], indirect=True)
def test_pt_files_run_no_code(tmp_path: Path, official_classes: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    torch.save({"model": {"a": torch.zeros(1)}, "x": official_classes.Other()}, tmp_path / "odd.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, message in (("odd.pt", "normalizer.Other"), ("list.pt", "state dict"), ("text.pt", "not a checkpoint")):
        line = ["from-torch", f"--input={tmp_path / name}", f"--official-config={reference.official_yaml(LIBERO)}"]
        assert command(*line, f"--workdir={tmp_path / 'run'}") == 2
        assert message in capsys.readouterr().err


def test_pt_files_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # makes the import fail
    (tmp_path / "models.pt").write_bytes(b"")
    line = ["from-torch", f"--input={tmp_path / 'models.pt'}", f"--official-config={reference.official_yaml(LIBERO)}"]
    assert command(*line, f"--workdir={tmp_path / 'run'}") == 2
    assert "needs torch" in capsys.readouterr().err


# --- our own workdirs -------------------------------------------------------------------------------


def test_a_run_with_pca_low_dim_and_text_is_exported(tmp_path: Path) -> None:
    config = config_lib.base()
    config.model.update(embed_dim=16, depth=2, num_heads=2, num_registers=1, timestep_embed_dim=8, patch=(2, 2, 2))
    config.model.encoder.update(stage_sizes=(1, 1), width=16, use_low_dim=True, use_language=True, pool="flatten")
    config.model.codec.name = "pca"
    config.data.update(cameras=("a", "b"), low_dim=("state",), text="text", resize=(32, 32), crop=(32, 32))
    config.data.window.update(obs=(0, 1), action=(1, 2, 3), next_obs=(4, 5))
    config.diffusion.prediction.update(action="sample", next_obs="sample")
    rng = np.random.default_rng(0)
    arrays = fit_pca(rng.integers(0, 256, (4, 2, 32, 32, 3), np.uint8), patch=8, channels=5)
    pair = (np.float32([0.1, 0.2]), np.float32([0.3, 1 / 3]))
    facts = DataFacts({"a": (32, 32), "b": (40, 30)}, {"state": 3}, 2, 7, Normalizer({"action": pair}))
    system = System(config, facts, PCACodec(patch=8, channels=5))
    params = jax.jit(system.init)(jax.random.key(0))
    checkpoint.save_params_only(tmp_path / "run", config, facts, params, arrays, step=12)

    out = tmp_path / "model.safetensors"
    assert command("to-torch", f"--workdir={tmp_path / 'run'}", f"--output={out}", "--step=12") == 0
    tensors, described = load_file(out), json.loads(out.with_suffix(".json").read_text())
    for key, value in arrays.items():
        np.testing.assert_array_equal(tensors[f"obs_encoder.pca.{key}"], value)
    assert tensors["obs_encoder.text_encoder.head.weight"].shape == (16, 7)
    # flattened maps: 32 -> conv 16 -> pool 8 -> second stage 4 x 4 x 32 channels, rows first
    assert tensors["obs_encoder.img_encoder.model.fc.weight"].shape == (16, 4 * 4 * 32)
    assert described["shapes"]["encoder_pool_order"] == ["row", "column", "channel"]
    qkv = np.asarray(params["noise_pred_net"]["blocks"]["qkv"]["kernel"][1]).reshape(16, 48).T
    np.testing.assert_array_equal(tensors["noise_pred_net.blocks.1.attn.qkv.weight"], qkv)
    assert not any(name.startswith("obs_encoder.vae") for name in tensors)
    assert described["codec"]["name"] == "pca" and (described["codec"]["patch"], described["step"]) == (8, 12)
    assert described["cameras"] == {"a": [32, 32], "b": [40, 30]}
    assert (described["low_dim"], described["text_dim"]) == ({"state": 3}, 7)
    assert described["diffusion"]["prediction"] == {"action": "sample", "next_obs": "sample"}
    assert np.array_equal(np.float32(described["normalizers"]["action"]["offset"]), pair[1])
