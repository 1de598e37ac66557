"""Closed loops that are paired start by start, over training seeds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from uwm_jax.errors import UserError
from uwm_jax.reporting import comparison, pairs
from uwm_jax.reporting.results import Run

STARTS = range(12)


@pytest.fixture
def run(make_run, tmp_path):
    """A function that makes a run whose policy has these best scores, one a start."""

    def make(name, scores, seed=0, *, solved=(), batch_size=36, starts=12, **how):
        workdir = make_run(tmp_path / name, seed=seed)
        config = json.loads((workdir / "config.json").read_text())
        (workdir / "config.json").write_text(json.dumps(config | {"batch_size": batch_size}))
        file = workdir / "rollout" / "20" / "episodes.json"
        episodes = [{"seed": s, "max_coverage": x, "success": s in solved} for s, x in zip(STARTS, scores, strict=True)]
        episodes = episodes[:starts]
        told = {"max_steps": 200, "score_range": [0.0, 1.0], "episodes": {"policy": episodes}}
        file.write_text(json.dumps(json.loads(file.read_text()) | told | how))
        return workdir

    return make


def scores(mean, seed=0):
    return np.clip(mean + 0.05 * np.random.default_rng(seed).standard_normal(len(STARTS)), 0, 1)


def test_a_difference_is_that_of_the_same_starts(run):
    one, other = scores(0.6), scores(0.4, seed=1)
    runs = [Run.read(run("a", one)), Run.read(run("b", other, solved=STARTS))]
    first, second = pairs.settings([runs[0]])[0], pairs.settings([runs[1]])[0]
    found = pairs.differences(first, second)
    assert found["max_coverage"].mean == pytest.approx((one - other).mean())
    student = stats.ttest_rel(one, other).confidence_interval()  # the mean's, without the bounds of the score
    assert found["max_coverage"].lo == pytest.approx(student.low, abs=2e-3)
    assert found["max_coverage"].hi == pytest.approx(student.high, abs=2e-3)
    assert found["success"].mean == -1 and found["success"].hi < 0
    back = pairs.differences(second, first)["max_coverage"]
    assert (back.mean, back.lo, back.hi) == pytest.approx(
        (-found["max_coverage"].mean, -found["max_coverage"].hi, -found["max_coverage"].lo)
    )


def test_a_difference_is_shown_only_where_all_pairs_of_seeds_agree(run, parse, tmp_path):
    better = [run(f"better_{s}", scores(0.8, s), s) for s in (0, 1, 2)]
    worse = [run(f"worse_{s}", scores(0.3, s + 3), s, batch_size=7) for s in (0, 1, 2)]
    page = comparison.compare([*better, *worse], tmp_path / "page.html").read_text()
    assert parse(page).rows["better (seeds 0, 1, 2), against worse (seeds 0, 1, 2)"][-1] == "yes"
    assert "3 x 3 training seeds<" in page
    worse.append(run("worse_3", scores(0.9, 9), 3, batch_size=7))  # as good as the better ones
    page = comparison.compare([*better, *worse], tmp_path / "page.html").read_text()
    assert parse(page).rows["better (seeds 0, 1, 2), against worse (seeds 0, 1, 2, 3)"][-1] == "undecided"


def test_one_seed_says_so(run, tmp_path):
    runs = [run("a", scores(0.6)), run("b", scores(0.4), batch_size=7)]
    page = comparison.compare(runs, tmp_path / "page.html").read_text()
    assert "1 x 1 training seeds: another seed may say otherwise" in page


@pytest.mark.parametrize(
    "other",
    [{"execute": 3}, {"env": "other"}, {"score_range": [0.0, None]}, {"episodes": {}}, {"starts": 7}],
)
def test_other_starts_are_not_paired(run, make_run, tmp_path, other):
    a, b = run("a", scores(0.6)), run("b", scores(0.4), batch_size=7, **other)
    runs = [Run.read(workdir) for workdir in (a, b, make_run(tmp_path / "c"))]
    assert not pairs.section(runs)
    assert not pairs.section([runs[0], runs[0]]), "of one setting"


@pytest.mark.parametrize(
    "damage",
    [
        {"env": 3},
        {"score_range": None},
        {"score_range": [0.0]},
        {"score_range": ["0", "1"]},
        {"episodes": {"policy": [{"seed": 0, "success": False}]}},
        {"episodes": {"policy": [{"seed": 0, "success": False, "max_coverage": float("nan")}]}},
        {"episodes": {"policy": [{"seed": 0, "success": False, "max_coverage": "much"}]}},
        {"episodes": {"policy": [{"seed": 0, "max_coverage": 0.5}]}},
    ],
)
def test_a_damaged_record_is_named(run, damage):
    runs = [Run.read(run("a", scores(0.6), **damage)), Run.read(run("b", scores(0.4), batch_size=7))]
    with pytest.raises(UserError, match=r"episodes\.json: .* Delete it, and make it again"):
        pairs.section(runs)


def test_runs_of_one_seed_are_one_seed(run, tmp_path):
    again = [run("a_1", scores(0.6)), run("a_2", scores(0.6, 1)), run("b", scores(0.1), batch_size=7)]
    page = comparison.compare(again, tmp_path / "page.html").read_text()
    assert "1 x 1 training seeds: another seed may say otherwise" in page


def test_no_success_at_all_has_an_interval(run, parse, tmp_path):
    runs = [run("a", scores(0.6)), run("b", scores(0.4), batch_size=7)]
    page = comparison.compare(runs, tmp_path / "page.html").read_text()
    row = parse(page).rows["a, against b"]
    assert row[1].splitlines()[-1] == "\N{MINUS SIGN}0.242 to 0.242", "of Wilson's for none of 12"
