"""The command in tiny form: its files, and that it agrees with the trainer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from uwm_jax import cli, evaluate
from uwm_jax.config import source
from uwm_jax.evaluation.evaluator import Evaluator
from uwm_jax.evaluation.metrics import interval
from uwm_jax.reporting import pictures
from uwm_jax.train import train

PICTURES = {"idea.png", "modes.png", "actions.png", "pictures.json"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_tiny_config):
    """Two steps on a mixture, of which only the source with actions is evaluated, in training too."""
    config = make_tiny_config()
    config.total_steps, config.eval.every = 2, 2
    config.data.sources.robot, config.data.sources.video = source(), source(use_actions=False)
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train(config, workdir)
    return workdir


@pytest.mark.slow
def test_the_command_finds_what_the_trainer_found(trained, capsys):
    folder = trained / "eval" / "2"
    in_training = json.loads((folder / "metrics.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "about.json"} | PICTURES
    about = json.loads((folder / "about.json").read_text())
    for file in folder.iterdir():
        file.unlink()
    assert cli.call(evaluate.main, ["evaluate", f"--workdir={trained}"], evaluate.define_flags) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics) == list(in_training)
    for name, value in metrics.items():
        assert value["n"] == in_training[name]["n"]
        np.testing.assert_allclose(value["mean"], in_training[name]["mean"], rtol=1e-3, atol=1e-5)
        assert value["lo"] is value["hi"] is None, "of two episodes"
    assert metrics["joint/psnr"]["n"] == 6
    again = json.loads((folder / "about.json").read_text())
    assert again["command"][-1] == f"--workdir={trained}" and (again["windows"], again["episodes"]) == (6, 2)
    for name in ("windows", "episodes", "datasets", "sampler_steps", "sampler_spacing", "code_version"):
        assert again[name] == about[name], name
    assert {"denoise.gif"} | PICTURES <= {p.name for p in folder.iterdir()}
    page = (trained / "report.html").read_text()
    assert "data:image/png;base64," in page and 'src="http' not in page
    output = capsys.readouterr().out
    assert "6 held-out windows of" in output and "paired/inverse_vs_policy/action_mse" in output


@pytest.fixture
def sampled(monkeypatch):
    """Commands sample nothing; the list gets the number of windows of each evaluation in their place."""
    seen = []

    def run(self, params, frozen, **_):
        seen.append(len(self.held_out))
        return {"policy/action_mse": interval(np.ones(seen[-1]), self.held_out.episodes)}, {}

    monkeypatch.setattr(Evaluator, "compile", lambda *_: None)
    monkeypatch.setattr(Evaluator, "run", run)
    monkeypatch.setattr(pictures, "draw", lambda *_: {})
    return seen


@pytest.mark.slow
def test_other_evaluations_leave_the_runs_own_alone(trained, sampled, tmp_path, capsys):
    own, before = trained / "eval" / "2", {path.name for path in (trained / "eval" / "2").iterdir()}
    files = {path: path.read_bytes() for path in own.iterdir() if path.is_file()}

    def call(*flags):
        status = cli.call(evaluate.main, ["evaluate", f"--workdir={trained}", *flags], evaluate.define_flags)
        return status, capsys.readouterr()

    def made():
        return {path.name for path in own.iterdir()} - before

    assert call("--config.eval.num_windows=3")[0] == 0
    (digest,) = made()
    about = json.loads((own / digest / "about.json").read_text())
    assert (about["windows"], about["settings"]) == (3, {"eval.num_windows": 3}) and about["parameters"] == "average"
    assert call("--config.eval.num_windows=3")[0] == 0 and made() == {digest}
    assert call("--parameters=raw", "--name=raw")[0] == 0 and made() == {digest, "raw"}
    assert json.loads((own / "raw" / "about.json").read_text())["settings"] == {"parameters": "raw"}
    assert call("--parameters=average", "--name=raw")[0] == 2
    assert files == {path: path.read_bytes() for path in files} and sampled == [3, 3, 6]

    everything = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    output = tmp_path / "out"
    assert call(f"--output={output}", "--config.eval.num_windows=6")[0] == 0
    assert (output / "eval" / "2" / "metrics.json").exists() and (output / "report.html").exists()
    assert everything == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    (tmp_path / "file").write_text("")
    status, said = call(f"--output={tmp_path / 'file' / 'x'}")
    assert status == 2 and "cannot be written" in said.err and len(sampled) == 4 and "compiling" not in said.out


@pytest.mark.slow
def test_flags_that_would_change_what_is_held_out_or_do_nothing_are_refused(trained, capsys):
    for flag, message in (
        ("--config.data.val_ratio=0.5", "the run decided which episodes"),
        ("--steps=4,2", "python -m uwm_jax.compare_samplers --steps=4,2"),
        ("--sampler=trailing", "python -m uwm_jax.compare_samplers --sampler=trailing"),
    ):
        assert cli.call(evaluate.main, ["evaluate", f"--workdir={trained}", flag], evaluate.define_flags) == 2
        assert message in capsys.readouterr().err
