"""The page of a sweep, from made-up workdirs of its members."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.reporting.test_hostile import EVIL, NAME, assert_harmless
from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.reporting import pairs, seeds, sweep_page, tradeoff
from uwm_jax.reporting.results import Interval, Run
from uwm_jax.reporting.seeds import FIRST, SECOND, UNKNOWN, WITHIN, Spread


def describe(name, status="done", step=20, **fields):
    """The member's entry of `sweep.json`; its name is made of its overrides, as a sweep makes it."""
    overrides = {field: int(value) for field, value in (part.split("=") for part in name.split(","))}
    told = {"overrides": overrides, "status": status, "last_losses": {"loss": 0.5, "loss/action": 0.25}}
    return told | ({} if step is None else {"step": step}) | fields


@pytest.fixture
def make_sweep(make_run, stored, tmp_path):
    """A function that makes a sweep's directory of {member: (policy's action error, forward's changed error)}."""

    def make(errors, *, others=None, directory=tmp_path / "sweep", base="uwm"):
        for name, (policy, forward) in errors.items():
            told = describe(name)["overrides"]
            workdir = make_run(directory / "members" / name, policy=policy, seed=told.get("seed", 0))
            config = config_lib.base(base)
            config.seed, config.data.seed, config.batch_size = told.get("seed", 0), 0, told["batch_size"]
            (workdir / "config.json").write_text(config_lib.to_json(config))
            file = workdir / "eval" / "20" / "metrics.json"
            metrics = json.loads(file.read_text()) | {"forward/changed_mse": stored(forward)}
            file.write_text(json.dumps(metrics))
        members = {name: describe(name) for name in errors} | (others or {})
        directory.mkdir(exist_ok=True)
        (directory / "sweep.json").write_text(json.dumps({"members": members}))
        return directory

    return make


def at(x, y):
    return tuple(Interval(m, m - 0.1, m + 0.1, 90, 9) for m in (x, y))


def test_the_front_is_what_no_other_dominates():
    points = {"a": at(1, 4), "b": at(2, 2), "c": at(3, 3), "d": at(1, 5), "e": at(2, 2), "f": at(5, 1)}
    assert tradeoff.front(points, (False, False)) == ["a", "b", "e", "f"]
    assert tradeoff.front(points, (True, True)) == ["c", "d", "f"]
    assert tradeoff.front(points, (False, True)) == ["d"]


def test_an_axis_whose_values_differ_tenfold_is_logarithmic():
    def drawn(*points):
        return tradeoff.picture("a", [tradeoff.Dot(point, "#123456", "o", True) for point in points])

    exponents = [drawn(at(1, 1), point).count("10^") for point in (at(2, 20), at(20, 20), at(2, 2))]
    assert exponents[0] > 0 and exponents[1] > exponents[0] and exponents[2] == 0


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ((1.0, 0.9, 1.1, 3), (2.0, 1.9, 2.1, 3), FIRST),
        ((2.0, 1.9, 2.1, 3), (1.0, 0.9, 1.1, 3), SECOND),
        ((1.0, 0.5, 1.2, 3), (2.0, 1.1, 2.1, 3), WITHIN),  # one seed of the second is better than one of the first
        ((1.0, 0.4, 1.3, 3), (1.8, 1.4, 2.4, 3), WITHIN),  # apart, but by less than the seeds of each are
        ((1.0, 1.0, 1.0, 1), (2.0, 1.9, 2.1, 3), UNKNOWN),
        ((1.0, 1.0, 1.0, 2), (1.0, 1.0, 1.0, 2), WITHIN),
    ],
)
def test_a_difference_is_shown_only_above_the_spread_of_seeds(first, second, told):
    assert seeds.verdict(Spread(*first), Spread(*second), more=False) == told
    swapped = {FIRST: SECOND, SECOND: FIRST}
    assert seeds.verdict(Spread(*first), Spread(*second), more=True) == swapped.get(told, told)


def test_the_page_of_a_sweep(make_sweep, parse):
    others = {
        "batch_size=9": describe("batch_size=9", "diverged", 120),
        "batch_size=10": describe("batch_size=10", "waiting", None, last_losses={}),
        "batch_size=11": describe("batch_size=11", "stopped", 40),
    }
    errors = {"batch_size=4": (0.03, 0.2), "batch_size=5": (0.05, 0.1), "batch_size=6": (0.06, 0.15)}
    sweep = make_sweep(errors, others=others)
    shutil.rmtree(sweep / "members" / "batch_size=6" / "rollout")
    source = sweep_page.write(sweep).read_text()
    page = parse(source)
    assert page.rows["batch_size=4"][:2] == ["4", "done, step 20\nevaluated at step 20, in the simulator at 20"]
    assert page.rows["batch_size=6"][1] == "done, step 20\nevaluated at step 20"
    assert [page.rows[name][1] for name in others] == [
        "diverged at step 120",
        "waits for its turn",
        "stopped at step 40",
    ]
    heads = re.findall(r"<th scope=\"col\"[^>]*>(.*?)</th>", source[: source.index("</thead>")])
    columns = dict(zip([head.partition("<br>")[0] for head in heads[1:]], page.rows["batch_size=4"], strict=True))
    assert columns["policy: action error (MSE)"] == "0.0300\n0.0200 to 0.0400"
    assert columns["forward: frame error where the picture changed (MSE)"] == "0.200\n0.190 to 0.210"
    assert columns["what wrong actions cost (MSE)"].startswith("0.0500\n")
    assert columns["in the simulator, policy: best coverage of an episode"].startswith("0.500\n")
    assert (columns["loss"], columns["loss: action"]) == ("0.500", "0.250")
    front = [name for name in errors if f"{name}</b><br><small>on the front" in source]
    assert front == ["batch_size=4", "batch_size=5"]
    assert "Every setting has one seed" in source and "evaluate --workdir" not in source
    assert page.text.count("Loss: action, over training steps") == 1
    assert page.text.count("over batch_size") == 4, "of each main metric"


def test_members_that_differ_in_seed_alone_are_one_setting(make_sweep, parse):
    names = [f"batch_size={size},seed={seed}" for size in (4, 5, 6) for seed in (0, 1, 2)]
    policy = (0.030, 0.031, 0.032, 0.050, 0.051, 0.052, 0.029, 0.049, 0.036)
    sweep = make_sweep({name: (error, 0.2) for name, error in zip(names, policy, strict=True)})
    runs = [Run.read(sweep / "members" / name) for name in names]
    assert [len(setting.runs) for setting in pairs.settings(runs)] == [3, 3, 3]
    page = parse(sweep_page.write(sweep).read_text())
    assert page.rows["batch_size=4"][0] == "0.0310\n0.0300 to 0.0320"
    assert page.rows["batch_size=4, against batch_size=5"][0] == "\N{MINUS SIGN}0.0200\nthe first is better"
    assert page.rows["batch_size=4, against batch_size=6"][0].endswith("\nnot shown")
    assert page.rows["batch_size=4, against batch_size=5"][1] == "0\nnot shown"


def test_members_without_an_evaluation_are_told_how_to_get_one(make_sweep, monkeypatch):
    sweep = make_sweep({"batch_size=4": (0.03, 0.2), "batch_size=5": (0.05, 0.1), "batch_size=6": (0.05, 0.1)})
    for name in ("batch_size=5", "batch_size=6"):
        shutil.rmtree(sweep / "members" / name / "eval")
    monkeypatch.setattr(sweep_page, "latest_step", lambda workdir: None if "=6" in str(workdir) else 20)
    source = sweep_page.write(sweep).read_text()
    commands = source.replace("&#x27;", "")
    assert f"python -m uwm_jax.evaluate --workdir={sweep}/members/batch_size=5" in commands
    assert f"--workdir={sweep}/members/batch_size=6" not in commands, "it holds no checkpoint"
    assert 'id="tradeoff"' not in source


def test_axes_are_chosen(make_sweep, tmp_path):
    sweep = make_sweep({"batch_size=4": (0.03, 0.2), "batch_size=5": (0.05, 0.1)})
    page = sweep_page.write(sweep, tmp_path / "page.html", x="rollout/policy/max_coverage", y="forward/pixel_mse")
    source = page.read_text()
    assert "Across: <b>in the simulator, policy: best coverage of an episode</b>" in source
    assert "Upwards: <b>forward: frame error (MSE)</b>" in source and "or episodes in the simulator" in source
    with pytest.raises(UserError, match=r"--y=forward/change_mse: no member .* Did you mean forward/changed_mse"):
        sweep_page.write(sweep, y="forward/change_mse")


@pytest.mark.parametrize("system", ["dp", "pad", "gr1"])
def test_a_system_without_both_errors_has_no_picture(make_sweep, parse, stored, system):
    sweep = make_sweep({"batch_size=4": (0.03, 0.2), "batch_size=5": (0.05, 0.1)}, base=system)
    acting = config_lib.systems.get(system).acting
    for file in sweep.glob("members/*/eval/20/metrics.json"):
        file.write_text(json.dumps({f"{acting}/action_mse": stored(0.1)}))
    source = sweep_page.write(sweep).read_text()
    assert parse(source).rows["batch_size=4"][2].startswith("0.100\n") and 'id="tradeoff"' not in source


def test_more_settings_than_colours_have_other_markers(make_sweep):
    names = [f"batch_size={size},seed={seed}" for size in range(4, 13) for seed in (0, 1)]
    runs = [Run.read(make_sweep({name: (0.1, 0.1)}) / "members" / name) for name in names]
    looks = sweep_page._looks(pairs.settings(runs))
    assert len({look[:3] for look in looks.values()}) == 9
    assert all(looks[one] == looks[other] for one, other in zip(names[::2], names[1::2], strict=True))


def test_a_hostile_sweep_is_text(make_sweep, parse):
    evil = NAME.replace(",", "").replace("=", "")  # as one part of a name
    sweep = make_sweep({"batch_size=4": (0.03, 0.2), "batch_size=5": (0.05, 0.1)})
    for name in ("batch_size=4", "batch_size=5"):
        (sweep / "members" / name).rename(sweep / "members" / f"{name}{evil}")
    told = {"overrides": {f"field{EVIL}": f"value{EVIL}"}, "status": "done", "step": f"step{EVIL}"}
    told["last_losses"] = {f"loss/part{EVIL}": f"number{EVIL}", "loss": 10**400}
    names = [*(f"batch_size={i}{evil}" for i in (4, 5)), f"../..{EVIL}", "../members", "..", f"gone{EVIL}"]
    (sweep / "sweep.json").write_text(json.dumps({"members": dict.fromkeys(names, told)}))
    source = sweep_page.write(sweep).read_text()
    assert_harmless(parse(source), source, ("field", "value", "step", "gone"))


def test_a_sweep_is_no_run(make_sweep):
    sweep = make_sweep({"batch_size=4": (0.03, 0.2), "batch_size=5": (0.05, 0.1)})
    with pytest.raises(UserError, match=r"holds a sweep, not a run.*members/NAME.*batch_size=4, batch_size=5"):
        config_lib.read(sweep)
