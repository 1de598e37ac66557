"""The report: its words follow the intervals, its sections the files, and it needs nothing outside of itself."""

from __future__ import annotations

import json
import re

from PIL import Image

from uwm_jax.config import base, to_json
from uwm_jax.reporting import run_page
from uwm_jax.reporting.results import Run
from uwm_jax.reporting.sheets import Labels, write_labels


def answers(run: Run) -> dict[str, str]:
    """{question: answer} of the table of claims."""
    return dict(re.findall(r'<tr><th scope="row">([^<]*)</th><td class="\w+">([^<]*)</td>', run_page._answers(run)))


def test_the_words_follow_the_intervals(make_run, tmp_path):
    for gain, answer in ((0.05, "yes"), (-0.05, "no, it is worse"), (0.005, "undecided")):
        found = answers(Run.read(make_run(tmp_path / str(gain), gain=gain)))
        for start in ("Does it act?", "Does it predict what actions do?", "Does it do better than random"):
            assert [a for question, a in found.items() if question.startswith(start)] == [answer], start
        few = Run.read(tmp_path / str(gain))
        few.rollouts[20] = {name: m._replace(episodes=5) for name, m in few.rollout.items()}
        assert [a for q, a in answers(few).items() if "random" in q] == ["too few episodes"] * 2
        few.evaluations[20] = {name: m._replace(episodes=5) for name, m in few.metrics.items()}
        assert set(answers(few).values()) == {"too few episodes"}
        frames = [a for question, a in found.items() if question.startswith("Are ")]
        assert frames == ["yes", "undecided"]  # against the copied frame, and against the mean image


def test_a_full_run_has_all_sections_and_stands_alone(make_run, parse, tmp_path):
    workdir = make_run(tmp_path / "run")
    source = run_page.write(workdir).read_text()
    page = parse(source)
    assert source.count("data:image/png;base64,") == 3 and "not made yet" not in page.text
    assert "python -m uwm_jax.train '--config=my file.py'" in page.text
    assert page.rows["total_steps"] == ["100000", "123"]  # the file's, the flag's
    assert "It pushes a block & wins." in page.text
    assert "pusht, seeds 5 to 9, chunks of actions sampled in 4 evaluations of the network, of which 7" in page.text
    assert "19 steps of an episode: 2 frames" in page.text
    assert "1 of 6 ways, since it was stopped; 32 windows of 7" in page.text
    assert source.count("<pre>python -m uwm_jax.evaluate --step=20</pre>") == 2  # and of the comparison of samplers
    assert page.rows["trailing"][3].startswith("12.5")  # ms of a sample
    assert "75.0 %" in page.text and "360 ms a step" in page.text and "13:20" in page.text  # 36 at 100 a second; 800 s
    assert "forward, but with the actions of a window of another episode" in page.text
    assert "means over 64 windows of 12 held-out episodes" in page.text
    assert "diffusion.num_inference_steps" in page.rows
    assert not list(workdir.glob("*.tmp"))


def test_all_that_can_be_wider_than_a_phone_scrolls_in_a_box_of_its_own(make_run, parse, tmp_path):
    workdir = make_run(tmp_path / "run")
    write_labels(workdir / "eval" / "20", {"idea.png": Labels([("a", "")], ["b"])})
    with Image.open(workdir / "eval" / "20" / "idea.png") as image:
        image.save(workdir / "rollout" / "20" / "episodes.gif")
        image.save(workdir / "eval" / "20" / "denoise.gif")
    write_labels(workdir / "rollout" / "20", {"episodes.gif": Labels([("a", "")], ["b"])})
    source = run_page.write(workdir).read_text()
    boxes = re.findall(r'<div class="scroll" tabindex="0"[^>]*>(<table|<div class="moving"|<img)', source)
    assert boxes.count("<table") == source.count("<table") > 8
    assert boxes.count("<img") == 3 and boxes.count('<div class="moving"') == 1  # of pictures without labels, and with
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in source
    assert "overflow-x: auto" in source and "-webkit-scrollbar-thumb" in source, "a bar that is seen"


def test_date_data_steps_and_config_are_on_top_and_the_contents_lead_everywhere(make_run, parse, tmp_path):
    source = run_page.write(make_run(tmp_path / "run")).read_text()
    top = source[: source.index("<nav")]
    for fact in (
        "<dt>Trained</dt>",
        "UTC",
        "<dd>a&lt;b</dd>",
        "20 of 100,000, 36 windows",
        "my file.py",
        "step 20",
    ):
        assert fact in top, fact
    tags = parse(source).tags
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    sections = [f"#{attributes['id']}" for tag, attributes in tags if tag == "section"]
    assert links == sections and len(links) == 9


def test_sections_without_files_say_which_command_makes_them(parse, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(base()))
    page = run_page.write(tmp_path / "run").read_text()
    parse(page)
    where = f"--workdir={tmp_path / 'run'}"
    for command in (
        f"python -m uwm_jax.evaluate {where}</code>",
        f"python -m uwm_jax.rollout {where} --env=pusht</code>",
        f"python -m uwm_jax.compare_samplers {where} --sampler=leading,trailing --steps=10,4,2</code>",
    ):
        assert command in page
    assert "<img" not in page and "What the numbers say" not in page


def test_an_evaluation_of_other_data_says_so(make_run, tmp_path):
    run = make_run(tmp_path / "run")
    about = run / "eval" / "20" / "about.json"
    assert "may be among those that it learned from" not in run_page.write(run).read_text()
    for own, words in (
        (False, "not the datasets that this run was trained on"),
        (None, "not known what this run was trained on"),
    ):
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


def test_what_is_told_more_than_the_model_is_no_defect(make_run, parse, stored, tmp_path):
    workdir = make_run(tmp_path / "run")
    file = workdir / "eval" / "20" / "metrics.json"
    metrics = json.loads(file.read_text())
    for other in ("linear_interpolation", "mean_action"):
        metrics[f"paired/inverse_vs_{other}/action_mse"] = stored(-0.05)
    file.write_text(json.dumps(metrics))
    html = run_page._answers(Run.read(workdir))
    line = re.search(r"straight line[^<]*</th>(<td[^>]*>[^<]*</td>)", html).group(1)
    mean = re.search(r"inverse mode against the mean action</th>(<td[^>]*>[^<]*</td>)", html).group(1)
    assert line == '<td class="open">no, but that is told more</td>'
    assert mean == '<td class="no">no, it is worse</td>'


def test_numbers_of_a_column_have_one_format(make_run, parse, stored, tmp_path):
    workdir = make_run(tmp_path / "run")
    file = workdir / "eval" / "20" / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics |= {"policy/action_mse": stored(0.0041, 0.001), "baseline/mean_action/action_mse": stored(12.5, 1.0)}
    file.write_text(json.dumps(metrics))
    rows = parse(run_page.write(workdir).read_text()).rows
    assert rows["policy"][0] == "0.0041\n0.0031 to 0.0051" and rows["mean action"][0] == "12.5000\n11.5000 to 13.5000"
    assert rows["Are the forward mode's frames better than the current frame, copied?"][1] == "0.1000"
    assert rows["Are they better than the mean image?"][1] == "0.0050"


def test_a_page_tells_how_much_of_an_average_is_still_the_start(make_run, tmp_path):
    workdir = make_run(tmp_path / "run")
    about = workdir / "eval" / "20" / "about.json"
    for used, words in (
        ({"parameters": "raw", "share_of_start": None}, "held-out episodes, parameters as trained last<"),
        ({"parameters": "average", "share_of_start": 0.0001}, "held-out episodes, averaged parameters<"),
        (
            {"parameters": "average", "share_of_start": 0.96},
            "averaged parameters, of which 96.0% are still those of the ",
        ),
    ):
        about.write_text(json.dumps(json.loads(about.read_text()) | used))
        assert words in run_page.write(workdir).read_text()
