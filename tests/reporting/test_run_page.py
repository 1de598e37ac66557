"""The report: its words follow the intervals, its sections the files, and it needs nothing outside of itself."""

from __future__ import annotations

import json
import re

from uwm_jax.config import base, to_json
from uwm_jax.evaluation.results import Run
from uwm_jax.reporting import run_page


def answers(page: str) -> dict[str, str]:
    """{question: answer} of the table of claims."""
    return dict(re.findall(r'<tr><td>([^<]*)</td><td class="\w[^"]*">([^<]*)</td>', page))


def assert_alone(page: str) -> None:
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "<script" not in page and "url(http" not in page


def test_the_words_follow_the_intervals(make_run, tmp_path):
    for gain, answer in ((0.05, "yes"), (-0.05, "no, it is worse"), (0.005, "not shown")):
        found = answers(run_page._answers(Run.read(make_run(tmp_path / str(gain), gain=gain))))
        for start in ("Does it act?", "Does it predict what actions do?", "In the simulator: does it"):
            assert [a for question, a in found.items() if question.startswith(start)] == [answer], start
        few = Run.read(tmp_path / str(gain))
        few.rollouts[20] = {name: m._replace(episodes=5) for name, m in few.rollout.items()}
        assert [a for q, a in answers(run_page._answers(few)).items() if "random" in q] == ["too few episodes"] * 2
        few.evaluations[20] = {name: m._replace(episodes=5) for name, m in few.metrics.items()}
        assert set(answers(run_page._answers(few)).values()) == {"too few episodes"}
        frames = [a for question, a in found.items() if question.startswith("Are ")]
        assert frames == ["yes", "not shown"]  # against the copied frame, and against the mean image


def test_a_full_run_has_all_sections_and_stands_alone(make_run, tmp_path):
    workdir = make_run(tmp_path / "run")
    page = run_page.write(workdir).read_text()
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
    page = run_page.write(tmp_path / "run").read_text()
    assert_alone(page)
    where = f"--workdir={tmp_path / 'run'}"
    for command in (
        f"python -m uwm_jax.evaluate {where}</code>",
        f"python -m uwm_jax.rollout {where} --env=pusht</code>",
        f"python -m uwm_jax.evaluate {where} --sampler=leading,trailing --steps=10,4,2</code>",
    ):
        assert command in page
    assert "<img" not in page and "What the numbers say" not in page


def test_an_evaluation_of_other_data_says_so(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    about = run / "eval" / "20" / "about.json"
    assert "may be among those that it learned from" not in run_page.write(run).read_text()
    for own, words in ((False, "of other data than the run was trained on"), (None, "not known what this run was")):
        about.write_text(json.dumps(json.loads(about.read_text()) | {"own_data": own}))
        page = run_page.write(run).read_text()
        assert page.count(words) == 1 and "an episode that was held out of training" not in page
        few = run / "eval" / "20" / "few_steps.json"
        stored_few = json.loads(few.read_text())
        stored_few["about"]["own_data"] = own
        few.write_text(json.dumps(stored_few))
        assert run_page.write(run).read_text().count(words) == 2, "in both sections, each by its own record"
        stored_few["about"]["own_data"] = True
        few.write_text(json.dumps(stored_few))
