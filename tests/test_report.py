"""The report: its words follow the intervals, its sections the files, and it needs nothing outside of itself."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from uwm_jax import cli, report
from uwm_jax.config import base, to_json
from uwm_jax.evaluation import comparison
from uwm_jax.evaluation.results import Run
from uwm_jax.training import record

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGD4DwABBAEAX+XDSwAAAABJRU5ErkJggg=="
)


def stored(mean: float, half: float = 0.01, n: int = 64) -> dict[str, float]:
    return {"mean": mean, "lo": mean - half, "hi": mean + half, "n": n, "episodes": 12}


def make_run(workdir: Path, *, gain: float = 0.05, policy: float = 0.06, seed: int = 0, execute: int = 7) -> Path:
    """A run's directory; `gain`: what the paired differences are."""
    config = base()
    config.seed, config.data.path = seed, "a<b"
    folder, closed = workdir / "eval" / "20", workdir / "rollout" / "20"
    folder.mkdir(parents=True)
    closed.mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(config))
    metrics = {
        "policy/action_mse": stored(policy),
        "forward/pixel_mse": stored(0.2),
        "forward/changed_mse": stored(0.2),
        "control/forward_shuffled/pixel_mse": stored(0.3),
        "control/shuffle_gap": stored(gain),
        "baseline/mean_action/action_mse": stored(0.14),
        "baseline/copied_frame/pixel_mse": stored(0.3),
        "paired/forward_vs_copied_frame/pixel_mse": stored(0.1),
        "paired/forward_vs_mean_image/pixel_mse": stored(0.005),
        "paired/policy_vs_mean_action/action_mse": stored(gain),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    use = record.describe_use(
        ["python", "-m", "uwm_jax.evaluate", "--step=20"], config, ["diffusion.num_inference_steps"]
    )
    (folder / "about.json").write_text(json.dumps({"datasets": {"a": "1"}, "own_data": True, **use}))
    few = {"sampler": "trailing", "steps": 2, "seconds_per_sample": 0.0125}
    few["metrics"] = {"policy/action_mse": stored(policy), "closed_loop/max_coverage": stored(0.4)}
    few_how = {"windows": 32, "episodes": 7, "ways": 6, **use}
    (folder / "few_steps.json").write_text(json.dumps({"about": few_how, "rows": [few]}))
    for name in ("idea.png", "modes.png", "actions.png"):
        (folder / name).write_bytes(PIXEL)
    episodes = {f"{who}/max_coverage": stored(0.5) for who in ("policy", "random_uniform", "random_held", "expert")}
    episodes |= {f"paired/policy_vs_{who}/max_coverage": stored(gain) for who in ("random_uniform", "random_held")}
    (closed / "metrics.json").write_text(json.dumps(episodes))
    how = {"env": "pusht", "execute": execute, "sampler_steps": 4, "episodes": {"policy": [{"seed": 5}, {"seed": 9}]}}
    (closed / "episodes.json").write_text(json.dumps(how))
    lines = [
        {"step": s, "loss/action": 1 / s, "loss/next_obs": 2 / s, "samples_per_second": 100.0, "goodput": 0.75}
        | {"time/step": 30.0 * s, "time/compile": 10.0 * s}
        for s in (1, 20)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = "from uwm_jax.config import base as get_config"
    (file := workdir / "my file.py").write_text(f'"""It pushes a block & wins."""\n{code}\n')
    config.total_steps = 123
    start = record.describe(
        ["python", "-m", "uwm_jax.train", "--config=my file.py"], str(file), config, ["total_steps"]
    )
    record.add_start(workdir, start)
    return workdir


def answers(page: str) -> dict[str, str]:
    """{question: answer} of the table of claims."""
    return dict(re.findall(r'<tr><td>([^<]*)</td><td class="\w[^"]*">([^<]*)</td>', page))


def assert_alone(page: str) -> None:
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "<script" not in page and "url(http" not in page


def test_the_words_follow_the_intervals(tmp_path):
    for gain, answer in ((0.05, "yes"), (-0.05, "no, it is worse"), (0.005, "not shown")):
        found = answers(report._answers(Run.read(make_run(tmp_path / str(gain), gain=gain))))
        for start in ("Does it act?", "Does it predict what actions do?", "In the simulator: does it"):
            assert [a for question, a in found.items() if question.startswith(start)] == [answer], start
        few = Run.read(tmp_path / str(gain))
        few.rollouts[20] = {name: m._replace(episodes=5) for name, m in few.rollout.items()}
        assert [a for q, a in answers(report._answers(few)).items() if "random" in q] == ["too few episodes"] * 2
        few.evaluations[20] = {name: m._replace(episodes=5) for name, m in few.metrics.items()}
        assert set(answers(report._answers(few)).values()) == {"too few episodes"}
        frames = [a for question, a in found.items() if question.startswith("Are ")]
        assert frames == ["yes", "not shown"]  # against the copied frame, and against the mean image


def test_a_full_run_has_all_sections_and_stands_alone(tmp_path):
    workdir = make_run(tmp_path / "run")
    page = report.write(workdir).read_text()
    assert_alone(page)
    assert page.count("data:image/png;base64,") == 3 and "not made yet" not in page
    assert "python -m uwm_jax.train &#x27;--config=my file.py&#x27;" in page
    changed = "<tr><th></th><th>the file</th><th>this run</th></tr><tr><th>total_steps</th><td>100000</td><td>123</td>"
    assert changed in page
    assert "<b>run</b>. It pushes a block &amp; wins." in page
    assert "a&lt;b" in page and "a<b" not in page
    assert "pusht, seeds 5 to 9, chunks of actions sampled in 4 evaluations of the network, of which 7 steps" in page
    assert "19 steps of an episode: 2 frames" in page and "1 of 6 ways, since it was stopped; 32 windows of 7" in page
    assert page.count("<pre>python -m uwm_jax.evaluate --step=20</pre>") == 2  # and of the comparison of samplers
    assert "12.5 ms" in page and "closed loop<br>max coverage" in page  # few steps
    assert "75.0 %" in page and "360 ms a step" in page and "13:20" in page  # 36 windows at 100 a second; 800 s
    assert "forward, but with the actions of a window of another episode" in page
    assert "means over 64 windows of 12 held-out episodes" in page
    assert "<tr><th></th><th>training</th><th>here</th></tr><tr><th>diffusion.num_inference_steps</th>" in page
    assert not list(workdir.glob("*.tmp"))


def test_sections_without_files_say_which_command_makes_them(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(base()))
    page = report.write(tmp_path / "run").read_text()
    assert_alone(page)
    where = f"--workdir={tmp_path / 'run'}"
    for command in (
        f"python -m uwm_jax.evaluate {where}</code>",
        f"python -m uwm_jax.rollout {where} --env=pusht</code>",
        f"python -m uwm_jax.evaluate {where} --sampler=leading,trailing --steps=10,4,2</code>",
    ):
        assert command in page
    assert "<img" not in page and "What the numbers say" not in page


def test_a_comparison_marks_what_is_apart_and_names_what_differs(tmp_path):
    runs = [make_run(tmp_path / "a", policy=0.03), make_run(tmp_path / "b", policy=0.07, seed=1)]
    page = report.compare(runs, tmp_path / "both.html").read_text()
    assert_alone(page)
    row = re.search(r"<tr><th>policy/action_mse</th>(.*?)</tr>", page).group(1)
    assert [("best" in cell) for cell in row.split("</td>")[:2]] == [True, False]
    row = re.search(r"<tr><th>rollout/policy/max_coverage</th>(.*?)</tr>", page).group(1)
    assert "best" not in row
    assert "<tr><th>seed</th><td>0</td><td>1</td></tr>" in page
    assert "Held-out windows are the same" in page and "<svg" in page


def test_closed_loops_that_were_run_otherwise_are_compared_with_a_warning(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", execute=4)]
    page = report.compare(runs, tmp_path / "both.html").read_text()
    assert "These runs differ in rollout&#x27;s execute</b>" in page
    about = tmp_path / "b" / "eval" / "20" / "about.json"
    older = json.loads(about.read_text())
    del older["own_data"]  # older versions did not record it
    about.write_text(json.dumps(older))
    assert "evaluate&#x27;s" not in report.compare(runs, tmp_path / "both.html").read_text()
    about.write_text(json.dumps({"datasets": {"a": "1"}, "changed": {"diffusion.clip.next_obs": 1.0}}))
    page = report.compare(runs, tmp_path / "both.html").read_text()
    assert "evaluate&#x27;s --config.diffusion.clip.next_obs" in page


def test_runs_on_other_data_are_compared_with_a_warning(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    config = base()
    config.data.val_ratio = 0.3
    (runs[1] / "config.json").write_text(to_json(config))
    page = report.compare(runs, tmp_path / "both.html").read_text()
    assert "differ in data.path, data.val_ratio</b>" in page


def test_datasets_of_one_path_and_other_files_are_compared_with_a_warning(tmp_path):
    runs = [Run.read(make_run(tmp_path / name)) for name in ("a", "b", "c")]
    runs[0].manifests, runs[1].manifests = ({"": {"splits": {"train": digest}}} for digest in ("1", "1"))
    assert "Held-out windows are the same" in comparison.body(runs)
    runs[2].manifests = {"": {"splits": {"train": "2"}}}
    assert "differ in the files of their datasets</b>" in comparison.body(runs)
    runs[2].manifests = {}
    runs[2].eval_how = runs[2].eval_how | {"datasets": {"a": "2"}}
    assert "differ in the files of their datasets</b>" in comparison.body(runs)
    del runs[2].eval_how["datasets"]
    assert "Whether their held-out windows are the same is not known" in comparison.body(runs)


def test_an_evaluation_of_other_data_says_so(tmp_path):
    run = make_run(tmp_path / "run")
    about = run / "eval" / "20" / "about.json"
    assert "may be among those that it learned from" not in report.write(run).read_text()
    for own, words in ((False, "of other data than the run was trained on"), (None, "not known what this run was")):
        about.write_text(json.dumps(json.loads(about.read_text()) | {"own_data": own}))
        page = report.write(run).read_text()
        assert page.count(words) == 1 and "an episode that was held out of training" not in page
        few = run / "eval" / "20" / "few_steps.json"
        stored_few = json.loads(few.read_text())
        stored_few["about"]["own_data"] = own
        few.write_text(json.dumps(stored_few))
        assert report.write(run).read_text().count(words) == 2, "in both sections, each by its own record"
        stored_few["about"]["own_data"] = True
        few.write_text(json.dumps(stored_few))


def test_what_is_no_merit_is_not_marked(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for name in ("a", "b"):
        file = tmp_path / name / "eval" / "20" / "metrics.json"
        metrics = json.loads(file.read_text())
        for metric in ("control/forward_shuffled/pixel_mse", "baseline/mean_action/action_mse", "control/shuffle_gap"):
            metrics[metric] = stored(0.9 if name == "a" else 0.1)
        file.write_text(json.dumps(metrics))
    page = report.compare(runs, tmp_path / "both.html").read_text()
    rows = dict(re.findall(r"<tr><th>([\w/]+)</th>(.*?)</tr>", page))
    assert "best" in rows["control/shuffle_gap"]
    assert "best" not in rows["control/forward_shuffled/pixel_mse"] + rows["baseline/mean_action/action_mse"]


def test_runs_evaluated_on_other_numbers_of_windows_are_compared_with_a_warning(tmp_path):
    runs = [Run.read(make_run(tmp_path / name)) for name in ("a", "b")]
    runs[1].evaluations[20] = {name: m._replace(n=32) for name, m in runs[1].metrics.items()}
    assert "differ in the number of held-out windows that were evaluated</b>" in comparison.body(runs)


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / name / "run") for name in ("x", "y")]
    page = report.compare(runs, tmp_path / "both.html").read_text()
    assert str(runs[0]) in page and str(runs[1]) in page


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b")

    def call(*arguments: object) -> tuple[int, str]:
        status = cli.call(report.main, ["report", *map(str, arguments)], report.define_flags)
        return status, capsys.readouterr().err

    assert call(run) == (0, "") and (run / "report.html").is_file()
    assert call(run, f"--output={tmp_path / 'one.html'}") == (0, "") and (tmp_path / "one.html").is_file()
    assert call(run, other, f"--output={tmp_path / 'two.html'}") == (0, "") and (tmp_path / "two.html").is_file()
    for arguments, message in (
        ((), "expected the directory of a run"),
        ((tmp_path,), "not a run's directory"),
        ((run, tmp_path / "nowhere"), "not a run's directory"),
        ((run, run), "expected different runs"),
        ((run, f"--output={tmp_path / 'no' / 'x.html'}"), "No such file"),
    ):
        status, error = call(*arguments)
        assert status == 2 and message in error, (status, error)
