"""`convert check`: an export's probe rerun in PyTorch, and exports that are not what they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.systems.small import on_tiny_dataset, small_config
from uwm_jax import cli, convert
from uwm_jax.actor import Actor
from uwm_jax.backend import JaxBackend
from uwm_jax.train import train
from uwm_jax.training import inference

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

from uwm_jax.torch_bridge.torch_backend import TorchBackend  # noqa: E402


def command(*arguments: str) -> int:
    return cli.call(convert.main, ["convert", *map(str, arguments)], convert.define_flags)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("check")
    config = on_tiny_dataset(small_config("dp"), tiny_dataset)
    config.total_steps = config.checkpoint.every = 12
    config.optimizer.learning_rate, config.eval.every = 1e-2, 0  # large steps: it should not act as if it saw nothing
    train(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def folder(workdir: Path) -> Path:
    """An export, not to be changed."""
    assert command("to-torch", f"--workdir={workdir}", f"--output={workdir.parent / 'DIR'}/", "--limits=-2:2") == 0
    return workdir.parent / "DIR"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """An export that may be changed."""
    return Path(shutil.copytree(folder, tmp_path / "DIR"))


def test_the_probe_is_rerun(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check", folder) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["use", "largest", "difference", "in", "at", "most"]
    use, largest, _, most = row.split()
    assert use == "policy" and 0 <= float(largest) < 1e-4 and float(most) == 1e-4


def test_a_repository_of_the_hub_is_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"owner/name@v1": folder}
    monkeypatch.setattr(convert.runs, "export", lambda value, flag: found[value])
    assert command("check", "owner/name@v1") == 0
    assert "policy" in capsys.readouterr().out


def change_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["noise_pred_net.output_decoder.2.bias"][0] += 0.01
    save_file(tensors, path)


def change_program(folder: Path) -> None:
    path = folder / "uwm_torch.py"
    text = path.read_text()
    assert text.count("IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)") == 1
    path.write_text(text.replace("(0.229, 0.224, 0.225)", "(0.225, 0.224, 0.229)"))


def change_normalizer(folder: Path) -> None:
    path = folder / "model.json"
    described = json.loads(path.read_text())
    described["normalizers"]["action"]["offset"][0] += 0.1
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_weight, "model.safetensors is not the file that was exported"),
        (change_program, "model.safetensors is the file that was exported; uwm_torch.py"),
        (change_normalizer, "(action)"),
    ],
)
def test_a_change_shows(copy: Path, capsys: pytest.CaptureFixture[str], change, told: str) -> None:
    change(copy)
    assert command("check", copy) == 1
    out, err = capsys.readouterr()
    assert float(out.splitlines()[1].split()[1]) > 1e-4
    assert "PyTorch differs from JAX's outputs by more than 0.0001: policy by" in err and told in err


def rewrite_probe(folder: Path, key: str, value: np.ndarray) -> None:
    with np.load(folder / "probe.npz") as file:
        arrays = dict(file)
    np.savez(folder / "probe.npz", **arrays | {key: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), "there is no such folder"),
        (lambda d: (d / "model.json").unlink(), "it has no model.json"),
        (lambda d: (d / "model.safetensors").unlink(), "it has no model.safetensors"),
        (lambda d: (d / "uwm_torch.py").unlink(), "there is no uwm_torch.py"),
        (lambda d: (d / "probe.npz").unlink(), "probe.npz"),
        (lambda d: (d / "probe.npz").write_bytes(b"PK"), "not a readable .npz"),
        (lambda d: np.savez(d / "probe.npz", x=np.zeros(2)), "expected inputs and outputs of policy"),
        (lambda d: rewrite_probe(d, "noise/action", np.zeros((2, 3), np.float32)), "noise/action: expected float32"),
        (lambda d: rewrite_probe(d, "policy/action", np.full((2, 4, 7), "x")), "policy/action: it has <U1 (2, 4, 7)"),
        (lambda d: (d / "model.json").write_text("{}"), "expected the description"),
        (lambda d: (d / "model.safetensors").write_bytes(b"no tensors"), "not a readable safetensors file"),
        (lambda d: (d / "uwm_torch.py").write_text("def load(:"), "not a program"),
        (lambda d: (d / "uwm_torch.py").write_text("import no_such_module"), "needs no_such_module"),
        (lambda d: (d / "uwm_torch.py").write_text("unknown"), "can be run (NameError: name 'unknown' is not defined)"),
        (lambda d: (d / "uwm_torch.py").write_text("x = 1"), "has no function load"),
    ],
)
def test_a_damaged_export_ends_with_status_2(
    copy: Path, capsys: pytest.CaptureFixture[str], damage, message: str
) -> None:
    damage(copy)
    assert command("check", copy) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


@pytest.mark.parametrize("key", ["uses", "acting", "noise", "sampling", "limits"])
def test_a_field_that_is_gone_is_named(copy: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    described = json.loads((copy / "model.json").read_text())
    del described[key]
    (copy / "model.json").write_text(json.dumps(described))
    assert command("check", copy) == 2
    assert f"model.json lacks a field of export folders (KeyError: '{key}')" in capsys.readouterr().err


def test_the_words_of_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("check") == 2 and "check and a folder" in capsys.readouterr().err
    assert command("check", folder, "--device=quantum") == 2
    assert "'quantum'" in capsys.readouterr().err
    for given, message in (
        ("--step=3", "--step is a flag of to-torch; check does not take it"),
        ("--workdir=there", "--workdir is a flag of from-torch; check does not take it"),
        ("--config.model.depth=3", "--config.model.depth: an export folder is checked as it is"),
    ):
        assert command("check", folder, given) == 2
        assert message in capsys.readouterr().err


def test_an_export_without_the_acting_use_does_not_act(copy: Path) -> None:
    described = json.loads((copy / "model.json").read_text())
    described["uses"] = {"other": {"makes": ["next_obs"], "given": []}}
    (copy / "model.json").write_text(json.dumps(described))
    backend = TorchBackend(copy)
    assert backend.acting == ""
    with pytest.raises(convert.UserError, match="or this export of it, makes no action"):
        Actor(backend)


def test_the_backend_of_an_export(folder: Path, workdir: Path) -> None:
    system, params, frozen, step = inference.load_for_inference(workdir)
    ours, theirs = JaxBackend(system, params, frozen, step=step), TorchBackend(folder)
    assert (theirs.system, theirs.acting, theirs.step, theirs.parameters) == ("dp", "policy", 12, "raw")
    assert theirs.uses.keys() == ours.uses.keys() and theirs.spec.to_json() == ours.spec.to_json()
    assert theirs.describe_sampling() == ours.describe_sampling()
    assert theirs.limits is not None and [x.tolist() for x in theirs.limits] == [[-2.0] * 7, [2.0] * 7]
    seeds, decisions = np.array([3, 4, 2**32 - 1], np.uint32), np.array([0, 7, 1], np.uint32)
    drawn = theirs.noise("policy", 9, seeds, decisions)
    for m, x in ours.noise("policy", 9, seeds, decisions).items():
        np.testing.assert_array_equal(drawn[m], x)
    rng = np.random.default_rng(0)
    inputs = {
        "obs/wrist": rng.integers(0, 256, (3, 2, *ours.spec.cameras["wrist"], 3), np.uint8),
        "obs/state": rng.normal(size=(3, 2, ours.spec.low_dim["state"])).astype(np.float32),
    }
    made, expected = theirs.sample("policy", inputs, drawn), ours.sample("policy", inputs, drawn)
    assert made.keys() == expected.keys() == {"action", "action_normalized"}
    np.testing.assert_allclose(made["action_normalized"], expected["action_normalized"], atol=1e-4)
    with pytest.raises(convert.UserError, match="answers policy; found 'video'"):
        theirs.sample("video", inputs, drawn)
    with pytest.raises(convert.UserError, match="missing obs/state"):
        theirs.sample("policy", {"obs/wrist": inputs["obs/wrist"]}, drawn)
