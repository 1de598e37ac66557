"""The better direction of a metric, and the best of several runs."""

from __future__ import annotations

import html
import json
import re
import shutil

import pytest

from uwm_jax.config import base, to_json
from uwm_jax.reporting import comparison
from uwm_jax.reporting.comparison import _best, more_is_better
from uwm_jax.reporting.results import Interval, Run


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("forward/psnr", True),
        ("rollout/policy/success", True),
        ("control/shuffle_gap", True),
        ("paired/inverse_vs_policy/action_mse", True),
        ("policy/action_mse", False),
        ("loss/action", False),
        ("baseline/copied_frame/changed_mse", False),
    ],
)
def test_which_way_is_better(name, more):
    assert more_is_better(name) is more


def test_the_best_is_apart_from_every_other():
    low, middle, high = (Interval(m, m - h, m + h, 90, 9) for m, h in ((1, 0.5), (1.8, 0.4), (3, 0.5)))
    assert _best([low, None, middle, high], more=True) is high
    assert _best([low, middle, high], more=False) is None  # low and middle overlap
    assert _best([low, high], more=False) is low
    assert _best([None, high], more=True) is None
    assert _best([low, high._replace(episodes=5)], more=True) is None  # by chance


def test_a_comparison_marks_what_is_apart_and_names_what_differs(make_run, parse, tmp_path):
    runs = [make_run(tmp_path / "a", policy=0.03), make_run(tmp_path / "b", policy=0.07, seed=1)]
    page = comparison.compare(runs, tmp_path / "both.html").read_text()
    parse(page)
    row = marked(page, "policy: action error (MSE)")
    assert [("best" in cell) for cell in row.split("</td>")[:2]] == [True, False]
    assert "best" not in marked(page, "in the simulator, policy: best coverage of an episode")
    assert parse(page).rows["seed"] == ["0", "1"]
    assert "Held-out windows are the same" in page and "<svg" in page


def test_a_run_without_an_evaluation_has_no_step_of_one(make_run, tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    shutil.rmtree(runs[1] / "eval")
    page = comparison.compare(runs, tmp_path / "both.html").read_text()
    assert "not evaluated, in the simulator at 20" in page and "step None" not in page


def marked(page: str, metric: str) -> str:
    """The cells of a metric's row."""
    found = re.search(rf"<tr><th[^>]*>{re.escape(html.escape(metric))}<br>.*?</th>(.*?)</tr>", page)
    assert found, metric
    return found.group(1)


def test_no_name_of_a_file_is_a_name_of_a_metric(make_run, parse, tmp_path):
    page = comparison.compare([make_run(tmp_path / "a"), make_run(tmp_path / "b")], tmp_path / "both.html").read_text()
    metrics = [row for row in parse(page).rows if re.search(r"[a-z]_[a-z]|\w/\w", row)]
    assert not metrics, metrics


def test_closed_loops_that_were_run_otherwise_are_compared_with_a_warning(make_run, tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", execute=4)]
    page = comparison.compare(runs, tmp_path / "both.html").read_text()
    assert "These runs differ in rollout&#x27;s execute</b>" in page
    about = tmp_path / "b" / "eval" / "20" / "about.json"
    older = json.loads(about.read_text())
    del older["own_data"]  # older versions did not record it
    about.write_text(json.dumps(older))
    assert "evaluate&#x27;s" not in comparison.compare(runs, tmp_path / "both.html").read_text()
    about.write_text(json.dumps({"datasets": {"a": "1"}, "changed": {"diffusion.clip.next_obs": 1.0}}))
    page = comparison.compare(runs, tmp_path / "both.html").read_text()
    assert "evaluate&#x27;s --config.diffusion.clip.next_obs" in page


def test_runs_on_other_data_are_compared_with_a_warning(make_run, tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    config = base()
    config.data.val_ratio = 0.3
    (runs[1] / "config.json").write_text(to_json(config))
    page = comparison.compare(runs, tmp_path / "both.html").read_text()
    assert "differ in data.val_ratio</b>" in page, "the data is the same, wherever it lies"
    about = runs[1] / "eval" / "20" / "about.json"
    moved = json.loads(about.read_text()) | {"datasets": {"another name": "1"}}
    about.write_text(json.dumps(moved))
    assert "differ in data.val_ratio</b>" in comparison.compare(runs, tmp_path / "both.html").read_text()
    about.write_text(json.dumps(moved | {"datasets": {"a": "2"}}))
    page = comparison.compare(runs, tmp_path / "both.html").read_text()
    assert "differ in data.path, data.val_ratio, the files of their datasets</b>" in page


def test_datasets_of_one_path_and_other_files_are_compared_with_a_warning(make_run, tmp_path):
    runs = [Run.read(make_run(tmp_path / name)) for name in ("a", "b", "c")]
    runs[0].manifests, runs[1].manifests = ({"": {"splits": {"train": digest}}} for digest in ("1", "1"))
    assert "Held-out windows are the same" in comparison.same_windows(runs)
    runs[2].manifests = {"": {"splits": {"train": "2"}}}
    assert "differ in the files of their datasets</b>" in comparison.same_windows(runs)
    runs[2].manifests = {}
    runs[2].eval_how = runs[2].eval_how | {"datasets": {"a": "2"}}
    assert "differ in the files of their datasets</b>" in comparison.same_windows(runs)
    del runs[2].eval_how["datasets"]
    assert "Whether their held-out windows are the same is not known" in comparison.same_windows(runs)


def test_a_system_without_a_codec_is_compared_without_a_warning(make_run, tmp_path):
    runs = [Run.read(make_run(tmp_path / name)) for name in ("a", "b", "c")]
    data, evaluation = (runs[0].config[name].copy_and_resolve_references() for name in ("data", "eval"))
    runs[1].config = base("dp")
    runs[1].config.data, runs[1].config.eval = data, evaluation
    assert "codec" not in runs[1].config.model
    assert "Held-out windows are the same" in comparison.same_windows(runs)
    runs[2].config.model.codec.name = "vae" if runs[0].config.model.codec.name != "vae" else "pca"
    assert "differ in model.codec.name</b>" in comparison.same_windows(runs)


def test_what_is_no_merit_is_not_marked(make_run, stored, tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for name in ("a", "b"):
        file = tmp_path / name / "eval" / "20" / "metrics.json"
        metrics = json.loads(file.read_text())
        for metric in ("control/forward_shuffled/pixel_mse", "baseline/mean_action/action_mse", "control/shuffle_gap"):
            metrics[metric] = stored(0.9 if name == "a" else 0.1)
        file.write_text(json.dumps(metrics))
    page = comparison.compare(runs, tmp_path / "both.html").read_text()
    assert "best" in marked(page, "what wrong actions cost (MSE)")
    assert "best" not in marked(page, "control, forward with another window's actions: frame error (MSE)")
    (row,) = re.findall(r"<tr><th[^>]*>control, forward[^<]*<br>.*?</tr>", page)
    assert "best" not in row
    (row,) = re.findall(r"<tr><th[^>]*>baseline, the mean action[^<]*<br>.*?</tr>", page)
    assert "best" not in row


def test_runs_evaluated_on_other_numbers_of_windows_are_compared_with_a_warning(make_run, tmp_path):
    runs = [Run.read(make_run(tmp_path / name)) for name in ("a", "b")]
    runs[1].evaluations[20] = {name: m._replace(n=32) for name, m in runs[1].metrics.items()}
    assert "differ in the number of held-out windows that were evaluated</b>" in comparison.same_windows(runs)


def test_runs_of_one_name_are_told_apart(make_run, tmp_path):
    runs = [make_run(tmp_path / name / "run") for name in ("x", "y")]
    page = comparison.compare(runs, tmp_path / "both.html").read_text()
    assert str(runs[0]) in page and str(runs[1]) in page
