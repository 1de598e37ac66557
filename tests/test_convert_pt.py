"""Official `.pt` checkpoints: their normalisers and averages come along, and nothing in them is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.golden import reference
from uwm_jax import cli, convert
from uwm_jax.training.checkpoints import checkpoint

LIBERO = "uwm_libero_small"


def command(*arguments: str) -> int:
    """Runs the command in this process; returns its exit status."""
    return cli.call(convert.main, ["convert", *arguments], convert.define_flags)


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
@pytest.mark.slow
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
    back = load_file(tmp_path / "back.safetensors")
    assert list(back) == sorted(tensors) and all(back[key].tobytes() == tensors[key].tobytes() for key in tensors)
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
    (tmp_path / "models.pt").write_bytes(b"\x80\x02")
    line = ["from-torch", f"--input={tmp_path / 'models.pt'}", f"--official-config={reference.official_yaml(LIBERO)}"]
    assert command(*line, f"--workdir={tmp_path / 'run'}") == 2
    assert "needs torch" in capsys.readouterr().err


@pytest.mark.torch
def test_averaged_weights_of_a_pt_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    tensors = {key: torch.from_numpy(value) for key, value in reference.weights(LIBERO).items()}
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    averaged = {**wrapped, "module._orig_mod.noise_pred_net.registers": tensors["noise_pred_net.registers"] + 1}
    torch.save({"model": wrapped, "ema": averaged, "step": 3}, tmp_path / "models.pt")
    line = ["from-torch", f"--input={tmp_path / 'models.pt'}", f"--official-config={reference.official_yaml(LIBERO)}"]
    for which, added in (("model", 0), ("ema", 1)):
        workdir = tmp_path / which
        assert command(*line, f"--workdir={workdir}", "--no_normalizer", f"--weights={which}") == 0
        printed = capsys.readouterr().err
        assert "'module.'" in printed and "'_orig_mod.'" in printed and "averaged weights" in printed
        params = checkpoint.Checkpoints(workdir, read_only=True).restore_arrays(0, "params")
        expected = tensors["noise_pred_net.registers"].numpy() + added
        np.testing.assert_array_equal(params["noise_pred_net"]["registers"], expected)
