"""Conversion of official weights and back: bit-equal, self-describing, and clear about unfit files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from tests.golden import reference
from uwm_jax import cli, convert
from uwm_jax import config as config_lib
from uwm_jax.codecs import PCACodec, PixelsCodec, fit_pca
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.robot import RobotActions
from uwm_jax.data.spec import DataSpec, TextEncoder
from uwm_jax.data.windows import WindowSpec
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.training import inference
from uwm_jax.training import workdir as workdir_lib

LIBERO = "uwm_libero_small"


def command(*arguments: str) -> int:
    """Runs the command in this process; returns its exit status."""
    return cli.call(convert.main, ["convert", *arguments], convert.define_flags)


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


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "libero" in n else ()) for n in reference.NAMES]
)
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
    assert (described["parameters"], described["share_of_start"]) == ("raw", None)
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


def test_a_normalizer_that_the_run_had_must_be_given(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*libero_line(official, tmp_path / "run")) == 2
    message = capsys.readouterr().err
    for part in ("the run normalised action", "--normalizer=FILE.npz", "--no_normalizer"):
        assert part in message
    assert not (tmp_path / "run").exists()

    # A run that worked in raw units needs none, and says nothing.
    (tmp_path / "raw.yaml").write_text(
        reference.official_yaml(LIBERO).read_text().replace("normalize_action: true", "normalize_action: false")
    )
    assert command(*libero_line(official, tmp_path / "raw", **{"official-config": tmp_path / "raw.yaml"})) == 0
    assert capsys.readouterr().err == ""


def test_without_a_normalizer_there_is_one_warning(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*libero_line(official, tmp_path / "run"), "--no_normalizer") == 0
    assert capsys.readouterr().err.count("warning") == 1
    system = inference.load_for_inference(tmp_path / "run")[0]
    value = np.float32([[0.5] * 7])
    np.testing.assert_array_equal(system.spec.normalizer.normalize("action", value), value)


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
        "configuration describes (6):",
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


def faults_of(official: Path, tmp_path: Path, tensors: dict[str, np.ndarray], capsys, **changed: object) -> str:
    """Messages of from-torch about unfit tensors."""
    save_file(tensors, tmp_path / "bad.safetensors")
    line = libero_line(official, tmp_path / "run", input=tmp_path / "bad.safetensors", **changed)
    assert command(*line) == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


def test_a_tensor_that_shows_a_size_hides_no_other_fault(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, net, vae = reference.weights(LIBERO), "noise_pred_net.", "obs_encoder.vae.vae."
    del tensors[net + "registers"], tensors[vae + "encoder.down_blocks.0.resnets.0.conv1.weight"]
    del tensors[vae + "encoder.conv_in.weight"], tensors[vae + "decoder.conv_in.weight"]
    tokens = tensors[net + "pos_embed"].shape[1]
    tensors[net + "pos_embed"] = tensors[net + "pos_embed"][:, :-1].copy()
    tensors[vae + "quant_conv.bias"] = tensors[vae + "quant_conv.bias"].astype(np.int32)
    tensors |= {f"extra.{i:02}": np.zeros(1, np.float32) for i in range(30)}
    message = faults_of(official, tmp_path, tensors, capsys)
    for part in (
        "configuration describes (36):",
        f"missing tensor {net}registers (1, 24, 48)",
        f"missing tensor {vae}encoder.down_blocks.0.resnets.0.conv1.weight (",
        f"missing tensor {vae}encoder.conv_in.weight (",
        f"missing tensor {vae}decoder.conv_in.weight (",
        f"tensor {net}pos_embed has shape (1, {tokens - 1}, 48), expected (1, {tokens}, 48)",
        f"tensor {vae}quant_conv.bias is int32, expected a floating dtype",
        *(f"extra tensor extra.{i:02}" for i in range(30)),
        "tensors contradict (1):",
        "model.action_len + video tokens",
    ):
        assert part in message


def test_a_configuration_of_another_model_names_fields_and_tensors(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = reference.weights(LIBERO) | {"extra": np.zeros(1, np.float32)}
    text = reference.official_yaml(LIBERO).read_text().replace("depth: 2", "depth: 3")
    (tmp_path / "deeper.yaml").write_text(text)
    message = faults_of(official, tmp_path, tensors, capsys, **{"official-config": tmp_path / "deeper.yaml"})
    for part in ("missing tensor noise_pred_net.blocks.2.attn.qkv.weight", "extra tensor extra", "model.depth is 3"):
        assert part in message
    # Crops that the patches do not divide describe no model; then the fields alone are named.
    (tmp_path / "odd.yaml").write_text(text.replace("crop_shape:\n    - 64", "crop_shape:\n    - 60"))
    message = faults_of(official, tmp_path, tensors, capsys, **{"official-config": tmp_path / "odd.yaml"})
    assert "model.depth is 3" in message and "crop_shape has height 60" in message and "Traceback" not in message


def test_tensors_that_are_not_finite_are_counted(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = reference.weights(LIBERO)
    tensors["obs_encoder.vae.vae.encoder.conv_in.bias"][0] = np.nan
    tensors["noise_pred_net.pos_embed"][0, 0, 0] = np.inf
    save_file(tensors, tmp_path / "bad.safetensors")
    np.savez(tmp_path / "n.npz", **{"action/scale": np.ones(7, np.float32), "action/offset": np.ones(7, np.float32)})
    changed = {"input": tmp_path / "bad.safetensors", "normalizer": tmp_path / "n.npz"}
    assert command(*libero_line(official, tmp_path / "run", **changed)) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: 2 tensors hold values that are not finite, first noise_pred_net.pos_embed."


def test_unused_normalizer_keys_are_named(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ones = np.ones(7, np.float32)
    np.savez(tmp_path / "n.npz", **{"actions/scale": ones, "actions/offset": ones})
    line = libero_line(official, tmp_path / "run", normalizer=tmp_path / "n.npz")
    assert command(*line) == 2
    assert "--normalizer has actions, but the run's keys are action" in capsys.readouterr().err
    assert command(*line, "--no_normalizer") == 0
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": "none.safetensors"}, "none.safetensors"),
        ({"input": "{tmp}/text.safetensors"}, "not a readable safetensors file"),
        ({"input": "{tmp}/weights.ckpt"}, ".safetensors or .pt"),
        ({"input": "{tmp}"}, "is a folder; name the file in it"),
        ({"input": None}, "--input is required"),
        ({"official-config": None}, "--official-config is required"),
        ({"official-config": "{tmp}/none.yaml"}, "none.yaml"),
        ({"official-config": "{droid}"}, "uwm_droid_small.config.yaml"),
        ({"normalizer": "{tmp}/wrong_size.npz"}, "(3,), expected (7,)"),
        ({"normalizer": "{tmp}/half.npz"}, "action/offset"),
        ({"normalizer": "{tmp}/zero.npz"}, "zeros"),
        ({"normalizer": "{tmp}/name.npz"}, "'scale'"),
        ({"normalizer": "{tmp}/empty.npz"}, "empty.npz is empty"),
        ({"normalizer": "{tmp}/object.npz"}, "action/scale is not a readable plain array"),
        ({"workdir": "{tmp}"}, "not empty"),
        ({"workdir": "{tmp}/weights.ckpt/run"}, "weights.ckpt is a file"),
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
    np.savez(tmp_path / "empty.npz")
    np.savez(tmp_path / "object.npz", **{"action/scale": np.array([{}], object), "action/offset": ones})
    droid = reference.official_yaml("uwm_droid_small")
    filled = {key: value and value.format(tmp=tmp_path, droid=droid) for key, value in changed.items()}
    assert command(*libero_line(official, **{"workdir": tmp_path / "run", **filled})) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_a_workdir_that_may_not_be_written(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write everywhere
        assert command(*libero_line(official, tmp_path / "a" / "run")) == 2
    assert f"{str(tmp_path)!r} is not writable" in capsys.readouterr().err

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uwm_jax.training.workdir.save_params_only", full)
    assert command(*libero_line(official, tmp_path / "run"), "--no_normalizer") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_from_torch_takes_no_overrides(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*libero_line(official, tmp_path / "run"), "--config.model.depth=3") == 2
    assert "--config.model.depth: from-torch takes every field" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("to_torch",), ("from-torch", "to-torch")])
def test_the_words_of_the_command(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    assert command(*words) == 2
    assert "from-torch, to-torch and push, or check and a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "flag"),
    [("from-torch", f) for f in ("output=a.safetensors", "step=3", "parameters=raw")]
    + [
        ("to-torch", f)
        for f in (
            "input=a.pt",
            "official-config=c.yaml",
            "normalizer=n.npz",
            "no_normalizer",
            "weights=ema",
            "optimizer",
        )
    ],
)
def test_flags_of_the_other_word_are_refused(word: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(word, f"--{flag}") == 2
    name, other = flag.partition("=")[0].replace("_", "-"), {"from-torch": "to-torch", "to-torch": "from-torch"}[word]
    assert f"--{name} is a flag of {other}; {word} does not take it" in capsys.readouterr().err


# --- our own workdirs -------------------------------------------------------------------------------


def test_a_run_with_pca_low_dim_and_text_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    parts = ("relative:state[:1]:position", "gripper_scaled:-1:1")
    parts = [{"columns": f"action[{i}:{i + 1}]", "transform": name, "width": 1} for i, name in enumerate(parts)]
    robots = {"arm": {"parts": parts, "states": {"state": 3}}}
    spec = DataSpec(
        WindowSpec.from_config(config.data.window),
        {"a": (32, 32), "b": (40, 30)},
        {"state": 3},
        2,
        7,
        Normalizer({"action": pair}),
        {"b": "rows"},
        robots={name: RobotActions.from_json(robot) for name, robot in robots.items()},
        text_encoder=TextEncoder("owner/clip", "a" * 64),
    )
    system = UWM(config, spec, PCACodec(patch=8, channels=5))
    params = jax.jit(system.init)(jax.random.key(0))
    workdir_lib.save_params_only(tmp_path / "run", config, spec, params, arrays, step=12)

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
    assert described["flip"] == {"b": "rows"}
    assert described["text_encoder"] == {"name": "owner/clip", "sha256": "a" * 64}
    assert described["diffusion"]["prediction"] == {"action": "sample", "next_obs": "sample"}
    assert np.array_equal(np.float32(described["normalizers"]["action"]["offset"]), pair[1])
    assert described["robots"] == robots

    # The description takes the place of an official YAML: all comes back, bit for bit.
    line = ["from-torch", f"--input={out}", f"--official-config={out.with_suffix('.json')}"]
    assert command(*line, f"--workdir={tmp_path / 'back'}") == 0
    again = tmp_path / "back.safetensors"
    assert command("to-torch", f"--workdir={tmp_path / 'back'}", f"--output={again}") == 0
    assert_same_bits(load_file(again), tensors)
    robot = inference.load_for_inference(tmp_path / "back")[0].spec.robot()
    assert robot is not None and robot.to_json() == robots["arm"]
    differing = {
        key for key, value in json.loads(again.with_suffix(".json").read_text()).items() if value != described[key]
    }
    assert differing <= {"code_version"}
    wrong = {**tensors, "obs_encoder.pca.scale": np.zeros(2, np.float32)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    line[1] = f"--input={tmp_path / 'wrong.safetensors'}"
    assert command(*line, f"--workdir={tmp_path / 'none'}") == 2
    assert "obs_encoder.pca.scale (2,)" in capsys.readouterr().err

    # Fields are changed on top of the stored config; a folder in the way ends it before anything is written.
    out = tmp_path / "again" / "model.safetensors"
    line = ["to-torch", f"--workdir={tmp_path / 'run'}", f"--output={out}"]
    assert command(*line, "--config.diffusion.spacing=trailing") == 0
    described = json.loads(out.with_suffix(".json").read_text())
    assert described["config"]["diffusion"]["spacing"] == "trailing"
    assert described["diffusion"]["timesteps"][0] == 99
    assert command(*line, "--config.diffusion.hide_at=train") == 0
    described = json.loads(out.with_suffix(".json").read_text())["diffusion"]
    assert (described["timesteps"][0], described["hidden_timestep"]) == (90, 99)
    assert command(*line, "--config.diffusion.spacin=trailing") == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "expected a JSON object"),
        ('{"format": "uwm_jax.torch", "format_version": 2}', "('uwm_jax.torch', 2)"),
        ('{"format": "uwm_jax.torch", "format_version": 1, "config": {}}', "system: expected one of"),
        ('{"format": "uwm_jax.torch", "format_version": 1, "config": {"system": "uwm"}}', "a field is missing"),
        (
            '{"format": "uwm_jax.torch", "format_version": 1, "config": {"system": "uwm", "seeed": 1}}',
            "unknown field 'seeed'",
        ),
    ],
)
def test_descriptions_that_are_none(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "model.json").write_text(content)
    assert command(*libero_line(official, tmp_path / "run", **{"official-config": tmp_path / "model.json"})) == 2
    printed = capsys.readouterr().err
    assert message in printed and "model.json" in printed and "Traceback" not in printed


def test_no_description_is_left_without_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_lib.base()
    config.model.update(embed_dim=16, depth=1, num_heads=2, num_registers=1, timestep_embed_dim=8)
    config.model.encoder.update(stage_sizes=(1,), width=16)
    config.model.codec.name = "pixels"
    config.data.update(cameras=("a",), resize=(8, 8), crop=(8, 8))
    window = WindowSpec.from_config(config.data.window)
    spec = DataSpec(window, {"a": (8, 8)}, {}, 2, 0, Normalizer())
    params = jax.jit(UWM(config, spec, PixelsCodec()).init)(jax.random.key(0))
    workdir_lib.save_params_only(tmp_path / "run", config, spec, params)

    def full(*arguments: object, **keywords: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("uwm_jax.torch_bridge.weights.save_file", full)
    (tmp_path / "out").mkdir()
    assert command("to-torch", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out' / 'm.safetensors'}") == 1
    assert f"{tmp_path / 'out' / 'm.safetensors'} cannot be written: No space left" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
