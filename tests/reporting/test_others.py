"""Results with names of their own are shown apart, each with its settings."""

from __future__ import annotations

import json

from uwm_jax.reporting import run_page
from uwm_jax.reporting.others import others
from uwm_jax.reporting.results import Run


def put(folder, metrics, record, how):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / record).write_text(json.dumps(how))


def test_each_is_shown_with_its_settings_and_changes_nothing_else(make_run, stored, tmp_path):
    workdir = make_run(tmp_path / "run")
    before = run_page.write(workdir).read_text()
    assert "Other results" not in before and others(Run.read(workdir)) == ""
    few = {**stored(0.123), "lo": None, "hi": None, "episodes": 2}
    found = {"policy/action_mse": few, "baseline/mean_action/action_mse": stored(0.987)}
    use = {"command": ["python", "-m", "uwm_jax.evaluate", "--name=<x>"], "changed": {"data.split": "v<al"}}
    about = {"own_data": True, "settings": {"data.split": "v<al", "parameters": "raw"}, **use}
    put(workdir / "eval" / "20" / "val", found, "about.json", about)
    other = {"own_data": False, "settings": {"datasets": ["abc"]}}
    put(workdir / "eval" / "10" / "0123456789ab", found, "about.json", other)
    closed = {"policy/max_coverage": stored(0.456), "policy/success": stored(0.321)}
    put(workdir / "rollout" / "20" / "execute4", closed, "episodes.json", {"settings": {"execute": 4}})
    row = {
        "sampler": "trailing",
        "steps": 2,
        "seconds_per_sample": 0.1,
        "metrics": {"policy/action_mse": stored(0.654)},
    }
    few_steps = {"about": {"settings": {"ways": [["trailing", 2]]}}, "rows": [row]}
    (workdir / "eval" / "20" / "val" / "few_steps.json").write_text(json.dumps(few_steps))

    page = run_page.write(workdir).read_text()
    body = page[page.index('<section id="others">') : page.index('<section id="curves">')]
    for words in (
        *("Evaluation: val, step 20", "Evaluation: 0123456789ab, step 10", "Closed loop: execute4, step 20"),
        *(
            "Comparison of samplers: val, step 20",
            "&quot;v&lt;al&quot;",
            "&quot;raw&quot;",
            "&#x27;--name=&lt;x&gt;&#x27;",
        ),
        *("0.123", "too few (2)", "0.987", "0.456", "0.321", "0.654", "trailing"),
        "These are not the datasets that this run was trained on. Episodes that are held out",
    ):
        assert words in body, words
    assert body.count("These are not the datasets") == 1 and "v<al" not in page
    rest = page.replace(body, "")
    assert "0.123" not in rest and "0.456" not in rest
    assert "an episode that was held out of training" in rest


def test_a_run_that_learned_from_its_held_out_episodes_by_way_of_another_claims_nothing(make_run, tmp_path):
    workdir = make_run(tmp_path / "run")
    about = workdir / "eval" / "20" / "about.json"
    told = "58 of 65 held-out episodes were training episodes of the origin."
    about.write_text(json.dumps(json.loads(about.read_text()) | {"leak": told}))
    page = run_page.write(workdir).read_text()
    assert page.count(told) == 1 and "an episode that was held out of training" not in page
