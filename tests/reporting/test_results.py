"""Results read from a workdir, and the words for intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from uwm_jax.config import base, to_json
from uwm_jax.errors import UserError
from uwm_jax.reporting.curves import Panel, curves_svg
from uwm_jax.reporting.numbers import Format
from uwm_jax.reporting.page import cell
from uwm_jax.reporting.results import Interval, Run, _curve, differing_fields, verdict


def stored(mean: float, half: float = 0.1, n: int = 8) -> dict[str, float]:
    return {"mean": mean, "lo": mean - half, "hi": mean + half, "n": n}  # as older versions stored it


def make(workdir: Path, **fields) -> Path:
    config = base()
    for name, value in fields.items():
        config[name] = value
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(config))
    return workdir


def put(workdir: Path, kind: str, step: int | str, metrics) -> None:
    folder = workdir / kind / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.mark.parametrize(
    ("lo", "hi", "answer"),
    [(0.1, 0.3, "yes"), (-0.3, -0.1, "no, it is worse"), (-0.1, 0.3, "undecided"), (0.0, 0.2, "undecided")],
)
def test_verdicts_come_from_whole_intervals(lo, hi, answer):
    assert verdict(Interval((lo + hi) / 2, lo, hi, 90, 6)) == answer
    assert verdict(Interval((lo + hi) / 2, lo, hi, 90, 5)) == "too few episodes"


def test_what_has_too_few_episodes_is_read_without_an_interval():
    none = {"mean": 0.5, "lo": None, "hi": None, "n": 90, "episodes": 5}
    assert Interval.of(none) == Interval(0.5, 0.5, 0.5, 90, 5)
    assert Interval.of({**none, "lo": -2.5, "hi": 3.2}) == Interval(0.5, 0.5, 0.5, 90, 5)  # older versions had one
    assert ">0.500<br><small>too few (5)<" in cell(Interval.of(none), Format(3))
    curve = _curve({3: {"x": Interval.of(none)}}, "x", "label", "red", "-")
    assert (curve.values, curve.low, curve.high) == ([0.5], [0.5], [0.5])
    assert "<svg" in curves_svg(Panel("title", [curve]))


def test_an_empty_run_and_its_newest_results(tmp_path):
    run = Run.read(make(tmp_path / "run"))
    assert (run.metrics, run.rollout, run.eval_step, run.score, run.manifests) == ({}, {}, None, "", {})
    for step, mean in ((900, 1.0), (1000, 2.0)):  # not in the order of their names
        metrics = {"policy/action_mse": {**stored(mean), "episodes": 3}, "x": {**stored(1), "mean": math.nan}}
        put(run.workdir, "eval", step, metrics)
        put(run.workdir, "rollout", step, {"policy/max_reward": stored(mean), "policy/success": stored(0)})
    row = {"sampler": "leading", "steps": 2, "seconds_per_sample": 0.5, "metrics": {"x": stored(1.0)}}
    few = {"about": {"windows": 9}, "rows": [row]}
    (run.workdir / "eval" / "900" / "few_steps.json").write_text(json.dumps(few))
    (run.workdir / "eval" / "1000" / "about.json").write_text(json.dumps({"windows": 8, "episodes": 3}))
    (run.workdir / "eval" / "notes").mkdir()
    (run.workdir / "eval" / "notes" / "metrics.json").write_text("not a step's")
    (run.workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 5, "loss": 1.0, "other": 2}\n')
    run = Run.read(run.workdir)
    assert run.eval_step == run.rollout_step == 1000 and run.score == "max_reward"
    assert run.metrics == {"policy/action_mse": Interval(2.0, 2.0, 2.0, 8, 3)}  # without what is not a number
    assert run.eval_how["windows"] == 8 and run.rollout["policy/success"].episodes == 8
    assert (run.few_steps_how, run.few_steps_step) == ({"windows": 9}, 900)
    assert run.few_steps == [row | {"metrics": {"x": Interval(1.0, 0.9, 1.1, 8, 8)}}]
    curve = run.evaluated("policy/action_mse", "label", "red")
    assert (curve.steps, curve.values, curve.low, curve.high) == ([900, 1000], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0])
    curve = run.rolled_out("policy/max_reward", "label", "red")
    assert (curve.low, curve.high) == ([0.9, 1.9], [1.1, 2.1])
    assert run.logged("loss", "label", "red").values == [3.0, 1.0] and run.logged("other", "l", "red").steps == [5]


def test_results_with_names_of_their_own_are_told_apart(tmp_path):
    run = make(tmp_path / "run")
    put(run, "eval", 20, {"policy/action_mse": stored(1.0)})
    put(run, "rollout", 20, {"policy/max_coverage": stored(1.0)})
    row = {"sampler": "leading", "steps": 2, "seconds_per_sample": 0.5, "metrics": {}}
    for kind, name, mean, file in (
        ("eval", "20/val", 2.0, "about.json"),
        ("eval", "10/val", 3.0, "about.json"),
        ("rollout", "20/0123456789ab", 4.0, "episodes.json"),
    ):
        put(run, kind, name, {"policy/action_mse": stored(mean)})
        (run / kind / name / file).write_text(json.dumps({"settings": {"data.split": name}}))
    (run / "eval" / "20" / "val" / "few_steps.json").write_text(json.dumps({"about": {"windows": 9}, "rows": [row]}))
    found = Run.read(run)
    assert found.evaluations.keys() == found.rollouts.keys() == {20} and not found.few_steps
    assert found.metrics["policy/action_mse"].mean == found.rollout["policy/max_coverage"].mean == 1.0
    assert [(r.kind, r.step, r.name) for r in found.others] == [
        ("eval", 10, "val"),
        ("eval", 20, "val"),
        ("rollout", 20, "0123456789ab"),
        ("few_steps", 20, "val"),
    ]
    assert [r.metrics["policy/action_mse"].mean for r in found.others[:3]] == [3.0, 2.0, 4.0]
    assert found.others[1].how["settings"] == {"data.split": "20/val"} and found.others[3].rows == [row]


def test_results_elsewhere_are_read_where_they_are_of_the_run(tmp_path):
    run, elsewhere = make(tmp_path / "run"), tmp_path / "out"
    put(run, "eval", 10, {"x": stored(1.0)})
    put(run, "eval", 20, {"x": stored(2.0)})
    for step, workdir in ((20, run), (30, tmp_path / "another")):
        put(elsewhere, "eval", step, {"x": stored(step)})
        (elsewhere / "eval" / str(step) / "about.json").write_text(json.dumps({"workdir": str(workdir)}))
    found = Run.read(run, elsewhere)
    assert {step: metrics["x"].mean for step, metrics in found.evaluations.items()} == {10: 1.0, 20: 20}
    assert found.picture("idea.png") == elsewhere / "eval" / "20" / "idea.png"
    assert {step: metrics["x"].mean for step, metrics in Run.read(run).evaluations.items()} == {10: 1.0, 20: 2.0}


def test_a_run_has_its_directorys_name(tmp_path, monkeypatch):
    make(tmp_path / "mine" / "checkpoints").rename(tmp_path / "mine" / "here")
    monkeypatch.chdir(tmp_path / "mine" / "here")
    assert Run.read(Path(".")).name == "here"


def test_what_is_no_run_or_is_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match="not a run's directory"):
        Run.read(tmp_path)
    run = make(tmp_path / "run")
    put(run, "eval", 3, {})
    for damaged, message in (
        (b'{"a":', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"policy/action_mse": 1.0}', "not all of it is"),
        (b'{"policy/action_mse": {"mean": 1.0}}', "not all of it is"),
        (b'{"policy/action_mse": {"mean": "x", "lo": 0, "hi": 1, "n": 2}}', "not all of it is"),
        (b'{"policy/action_mse": {"mean": 1%s, "lo": 0, "hi": 1, "n": 2}}' % (b"0" * 400), "not all of it is"),
    ):
        (run / "eval" / "3" / "metrics.json").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"eval/3/metrics\.json: {message}"):
            Run.read(run)
    put(run, "eval", 3, {})
    for row in ({"steps": 2}, {"sampler": "leading", "steps": 2, "seconds_per_sample": "soon", "metrics": {}}):
        (run / "eval" / "3" / "few_steps.json").write_text(json.dumps({"rows": [row]}))
        with pytest.raises(UserError, match=r"eval/3/few_steps\.json: not all of its rows are complete"):
            Run.read(run)
    (run / "eval" / "3" / "few_steps.json").unlink()
    (run / "metrics.jsonl").write_bytes(b'{"step": 1}\n7\n\xff\n{"step": 2, "x": 1%s}\n{"st' % (b"0" * 400))
    assert Run.read(run).lines == [{"step": 1}]


def test_a_damaged_checkpoint_does_not_keep_the_rest_from_being_read(tmp_path):
    run = make(tmp_path / "run")
    (run / "checkpoints" / "7").mkdir(parents=True)
    assert (Run.read(run).manifests, Run.read(run).code_version) == ({}, "")


def test_fields_that_differ(tmp_path):
    runs = [Run.read(make(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert differing_fields(runs) == ["seed"] and differing_fields(runs[:2]) == []


def test_files_of_older_versions_are_read(tmp_path):
    run = make(tmp_path / "run")
    put(run, "eval", 3, {"policy/action_mse": stored(1.0, n=256)})
    (run / "eval" / "3" / "about.json").write_text(json.dumps({"episodes": 4}))
    row = {"sampler": "leading", "steps": 2, "seconds_per_sample": 0.5, "metrics": {}}
    (run / "eval" / "3" / "few_steps.json").write_text(json.dumps([row]))
    found = Run.read(run)
    assert found.metrics["policy/action_mse"] == Interval(1.0, 1.0, 1.0, 256, 4) and found.few_steps == [row]
