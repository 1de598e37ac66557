"""Inputs from a run's held-out windows: what the loader reads, in raw units, and food for every mode."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from uwm_jax import cli, codecs, sample, sample_inputs
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.training import inference
from uwm_jax.training import workdir as workdir_lib


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, make_tiny_config) -> Path:
    """An untrained model for `tiny_dataset`."""
    config = make_tiny_config()
    config.model.codec.name = "pixels"
    config.diffusion.num_inference_steps = 2
    data = RunData(config.data, seed=0)
    system = UWM(config, data.spec, codecs.from_config(config))
    folder = tmp_path_factory.mktemp("untrained") / "run"
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.01, x.dtype), shapes)  # quicker than to initialise them
    workdir_lib.save_params_only(folder, config, system.spec, params, step=3)
    return folder


def command(*arguments: str) -> int:
    return cli.call(sample_inputs.main, ["sample_inputs", *arguments], sample_inputs.define_flags)


def test_windows_are_those_of_an_evaluation_in_raw_units(workdir: Path, tmp_path: Path, tiny_config, capsys) -> None:
    assert command(f"--workdir={workdir}", "--windows=1:4", f"--output={tmp_path / 'in.npz'}") == 0
    printed = capsys.readouterr().out
    assert "held-out windows 1 to 3 of 6, of the episodes" in printed and "action (3, 4, 10)" in printed
    with np.load(tmp_path / "in.npz") as file:
        found = dict(file)
    data = RunData(tiny_config.data, seed=0)
    expected = data.held_out(6).batch(1, 4)
    inputs = {"obs/wrist", "next_obs/wrist", "obs/state", "action"}
    assert found.keys() == inputs | {f"{kind}/{m}" for kind in ("noise", "timestep") for m in ("action", "next_obs")}
    for key in inputs:
        raw = data.spec.normalizer.unnormalize(key.removeprefix("obs/"), expected[key])
        np.testing.assert_allclose(found[key], raw, rtol=1e-5, atol=1e-6)
    assert found["obs/wrist"].dtype == np.uint8
    assert command(f"--workdir={workdir}", "--windows=0:6", f"--output={tmp_path / 'all.npz'}") == 0
    with np.load(tmp_path / "all.npz") as file:
        for key in found:  # also noise and timesteps are those of the window
            np.testing.assert_array_equal(file[key][1:4], found[key])
        assert len(set(file["timestep/action"].tolist())) > 2


def test_parameters_have_no_part_in_them(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, asked = inference.load_for_inference, []

    def loads(*arguments):  # the average would bring the warning that it is still much of the start
        asked.append(arguments[3])
        return load(*arguments)

    monkeypatch.setattr(inference, "load_for_inference", loads)
    assert command(f"--workdir={workdir}", "--windows=0:1", f"--output={tmp_path / 'in.npz'}") == 0
    assert asked == ["raw"]


@pytest.mark.parametrize("field", ["diffusion.spacing=trailing", "batch_size=8", "model.dtype=bfloat16"])
def test_fields_without_a_part_in_them_are_refused(workdir: Path, tmp_path: Path, capsys, field: str) -> None:
    output = tmp_path / "in.npz"
    assert command(f"--workdir={workdir}", f"--config.{field}", f"--output={output}") == 2
    assert f"--config.{field.partition('=')[0]}=" in capsys.readouterr().err and not output.exists()


@pytest.mark.slow
def test_every_mode_takes_them(workdir: Path, tmp_path: Path, capsys) -> None:
    assert command(f"--workdir={workdir}", "--windows=0:2", f"--output={tmp_path / 'in.npz'}") == 0
    modes = ",".join(sample.known_modes())
    arguments = [f"--workdir={workdir}", f"--mode={modes}", f"--inputs={tmp_path / 'in.npz'}"]
    arguments = ["sample", *arguments, f"--output={tmp_path / 'out.npz'}"]
    assert cli.call(sample.main, arguments, sample.define_flags) == 0
    assert "far out" not in capsys.readouterr().err
    with np.load(tmp_path / "out.npz") as out, np.load(tmp_path / "in.npz") as given:
        assert {key.split("/")[0] for key in out} == set(sample.known_modes())
        assert out["policy/action"].shape == given["action"].shape
        assert out["forward/next_obs/wrist"].shape == given["next_obs/wrist"].shape


@pytest.mark.parametrize("text", ["", "8", "0:7", "3:3", "4:2", "-1:2", "0:6:2", "a:b", "0:99999999999999999999999"])
def test_windows_that_are_not_there_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"expected START:STOP with 0 <= START < STOP <= 6, the number of held-out"):
        sample_inputs.parse_windows(text, 6)
    assert sample_inputs.parse_windows("5:6", 6) == (5, 6)
