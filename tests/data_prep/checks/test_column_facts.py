from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from data_prep.checks import column_facts
from data_prep.checks.column_facts import ColumnFacts


def facts(episodes: list[Any], counted: list[int] | None = None) -> ColumnFacts:
    columns = [np.asarray(e, np.float32).reshape(len(e), -1) for e in episodes]
    lengths = np.asarray([len(c) for c in columns])
    values = np.concatenate(columns)
    dataset = types.SimpleNamespace(
        column=lambda key: values, episode_lengths=lengths, episode_starts=np.cumsum(lengths) - lengths
    )
    return column_facts.column_facts(dataset, "x", np.asarray(counted or lengths))  # type: ignore[arg-type]


@pytest.fixture(params=[1 << 18, 3], ids=["one block", "blocks of an episode"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_facts, "_BLOCK", request.param)


def test_idle_steps_are_those_that_change_nothing(block: None) -> None:
    moving = [[0.0, 0], [0.5, 0], [0.5, 0], [0.5, 0.2], [1.0, 1]]
    found = facts([moving, [[1.0, 1], [1.0, 1]]])
    assert found.idle == 2 / 5 and found.steps == 7  # the change between two episodes is none
    assert found.low.tolist() == [0, 0] and found.high.tolist() == [1, 1]


def test_an_outlier_makes_no_step_idle(block: None) -> None:
    steps = np.linspace(0, 1, 500)  # each moves by 0.002
    steps[250] = 1e6
    assert facts([steps]).idle == 0.0
    resting = np.where(np.arange(500) < 250, 0.5, steps)
    assert facts([resting]).idle == 249 / 499


def test_a_dimension_without_a_finite_value_hides_no_other(block: None) -> None:
    found = facts([[[0.0, np.nan], [1.0, np.inf], [0.0, np.nan]]])
    assert found.steps == 3 and found.two_valued == {0: (0.0, 1.0)} and found.idle == 0.0
    assert (found.low[0], found.high[0]) == (0.0, 1.0) and found.low[1] > found.high[1]


def test_two_values(block: None) -> None:
    found = facts([[[0, 0.0], [1, 0.3], [0, 0.7]], [[1, 1], [1, 1]]])
    assert found.two_valued == {0: (0.0, 1.0)} and not {0} & found.jumps.keys()
    assert facts([[[5.0], [5.0]]]).two_valued == {}, "a constant has one"
    never_together = [[0.0, np.nan], [0.5, np.nan], [1.0, np.nan], [np.nan, 1.0], [np.nan, 2.0]]
    assert facts([never_together]).two_valued == {1: (1.0, 2.0)}


def test_a_turn_through_pi_is_no_jump(block: None) -> None:
    turning = np.asarray([3.0, 3.1, -3.1, -3.0, 0.0, 1.0, 2.0, 3.1])
    found = facts([turning, [-3.1, -3.1]])
    assert found.wraps == {0: 1} and found.jumps == {}
    beyond = facts([turning * 2])
    assert beyond.wraps == {} and beyond.jumps == {0: (1, 0, 2)}, "values beyond pi are no angles of one turn"


def test_discontinuities_with_the_place_of_the_largest(block: None) -> None:
    found = facts([[0.0, 0.1, 0.2], [0.0, 0.1, 0.8, 0.9], [0.1, 1.0, 0.9, 0.3]])
    assert found.jumps == {0: (3, 2, 1)}


def test_what_does_not_count_or_is_not_finite_is_left_out(block: None) -> None:
    found = facts([[0.0, 1.0, 99.0], [0.5, np.nan, 0.4], [0.1, 0.1, 0.1]], counted=[2, 3, 3])
    assert (found.low, found.high) == (0.0, 1.0) and found.steps == 7
    assert found.idle == 2 / 3, "no change to and from a NaN"
    nothing = facts([[np.nan, np.inf]])
    assert nothing.steps == 0 and nothing.idle == 0.0
