"""The plan that a launcher shows: cached, made, refused, or left out with the reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from launch import plan_row
from tests.planning.facts import facts
from uwm_jax.errors import UserError
from uwm_jax.planning import children

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A run whose batch divides over sixteen chips, of a config that states the sizes of its data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("UWM_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # libtpu or not: nothing here compiles
    config = ROOT / "configs" / "droid.py"
    return ["python", "-m", "uwm_jax.train", f"--config={config}", "--workdir=gs://b/x", "--config.batch_size=16"]


@pytest.fixture
def answer(monkeypatch):
    """A function that sets what compiling answers; its `asked` counts the questions."""

    def give(found) -> None:
        monkeypatch.setattr(children, "_in_child", lambda request, name, say: give.asked.append(request) or dict(found))

    give.asked = []
    give({"facts": facts()})
    return give


def check(command, **how) -> list[str]:
    said: list[str] = []
    options = {"no_plan": False, "dry_run": False} | how
    plan_row.check("v5e-16", command, say=said.append, **options)
    return said


def test_the_row_is_made_once_and_shown(command, answer):
    for _ in range(2):
        said = check(command)
        assert "v5e-16" in said[-1] and "16x1x1" in said[-1] and "yes" in said[-1]
    assert len(answer.asked) == 1 and check(command, dry_run=True) == said


def test_without_a_plan_the_reason_is_said(command, answer, monkeypatch):
    assert check(command, no_plan=True) == ["no plan: --no_plan"]
    assert check(["python", "-m", "data_prep.copy", "--input=x"]) == [
        "no plan: data_prep.copy has no --config that trains"
    ]
    [line] = check([*command, "--config.batch_size=32"], dry_run=True)
    assert line.startswith("no plan yet: python -m uwm_jax.plan --topology=v5e-16 --config=")
    assert line.endswith(" --config.batch_size=32")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert check(command)[0].startswith("no plan: libtpu is not installed here")
    assert answer.asked == []


def test_what_cannot_run_there_is_refused_without_compiling(command, answer):
    with pytest.raises(UserError, match="batch_size=15 does not divide.*--no_plan starts it all the same"):
        check([*command, "--config.batch_size=15"])
    assert answer.asked == []


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_does_not_fit_is_refused_from_the_cache_too(command, answer, dry_run):
    answer({"facts": facts(memory=facts()["memory"] | {"peak": 99 * 10**9})})
    for options in ({}, {"dry_run": dry_run}):
        with pytest.raises(UserError, match="cannot train there: the step needs more memory.*To try: config"):
            check(command, **options)
    assert len(answer.asked) == 1


def test_a_compiler_that_fails_is_no_plan(command, answer):
    answer({"failure": {"kind": "process", "message": "the compiling process ended with status 1: x"}})
    with pytest.raises(UserError, match="the compiling process ended with status 1: x"):
        check(command)


def test_evaluations_that_cannot_be_planned_do_not_stop_a_run(command, answer):
    answer({"facts": facts(evaluation_failure="no simulator", evaluation_failure_kind="config")})
    assert check(command)[-1] == "not planned: evaluations in training: no simulator"


def test_each_program_of_a_sweep_has_a_row(command, answer):
    answer({"facts": facts(members=16, mesh={"sweep": 16, "data": 1, "fsdp": 1, "tensor": 1})})
    grid = [f"--grid=seed={','.join(map(str, range(16)))}", "--grid=batch_size=16,32"]
    rows = check(["python", "-m", "launch.sweep", *command[3:5], *grid])[-1]
    assert "v5e-16 (1 of 2)" in rows and "v5e-16 (2 of 2)" in rows and len(answer.asked) == 2
