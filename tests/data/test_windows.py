from __future__ import annotations

import numpy as np
import pytest

from uwm_jax.data.windows import Windows, WindowSpec, split_episodes
from uwm_jax.errors import UserError


def window(obs: tuple, action: tuple, next_obs: tuple, pad: str = "none", reserve: tuple = ()) -> WindowSpec:
    groups = {"obs": obs, "action": action, "next_obs": next_obs}
    return WindowSpec({name: steps for name, steps in groups.items() if steps}, pad, reserve)


PAPER = window((0, 1), tuple(range(1, 17)), (17, 18))


def test_the_papers_window_has_19_steps_and_no_padding() -> None:
    assert PAPER.span == 19
    # An episode of L steps has L - 18 windows; shorter ones are dropped.
    np.testing.assert_array_equal(PAPER.count(np.array([18, 19, 20, 100, 1])), [0, 1, 2, 82, 0])
    assert PAPER.steps(PAPER.next_obs, 5, 30) == [22, 23]
    assert PAPER.describe() == (
        "19 steps of an episode: 2 frames of each camera that are seen, a chunk of 16 actions, and 2 later frames"
    )
    assert window((-1, 0), (0, 1), ()).describe().endswith("seen, a chunk of 2 actions")


@pytest.mark.parametrize("spec", [PAPER, window((0,), (0, 1), (3,)), window((2, 3), (3,), (5,))])
def test_windows_equal_a_plain_enumeration(spec: WindowSpec) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 25)
    episodes = np.array([0, 3, 4, 9, 10, 11, 20, 24])
    indices = spec.obs + spec.action + spec.next_obs
    expected = [
        (e, origin)
        for e in episodes
        for origin in range(-100, 100)
        if all(0 <= origin + i < lengths[e] for i in indices)
    ]
    windows = Windows(spec, lengths, episodes)
    assert [windows.locate(w) for w in range(len(windows))] == expected


@pytest.mark.parametrize(
    "spec",
    [
        *(PAPER, window((0,), (0, 1, 2), (1,)), window((2, 3), (3, 7), (5, 6))),
        *(window((0, 1), (1, 2), ()), window((1,), (), (4,)), window((), (2, 3), ()), window((2,), (), ())),
        *(window((0, 1), (1, 2), (), reserve=(0, 7)), window((3,), (), (), reserve=(1, 2))),
    ],
)
def test_actions_stay_within_those_of_an_episode(spec: WindowSpec) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 25)
    actions = lengths - rng.integers(0, 2, 25)
    expected = [
        (e, origin)
        for e in range(25)
        for origin in range(-100, 100)
        if all(0 <= origin + i < lengths[e] for i in spec.obs + spec.next_obs + spec.reserve)
        and all(0 <= origin + i < actions[e] for i in spec.action)
    ]
    windows = Windows(spec, lengths, np.arange(25), action_lengths=actions)
    assert [windows.locate(w) for w in range(len(windows))] == expected


def test_edge_padding_leaves_out_only_episodes_without_any_action() -> None:
    spec = window((0, 1), (1, 2, 3), (4, 5), "edge")
    assert spec.count(np.array([4, 1, 1, 7]), np.array([3, 0, 1, 7])).tolist() == [4, 0, 1, 7]


def test_a_reserve_holds_for_padded_windows_too() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 25)
    longest, padded = (
        Windows(spec, lengths, np.arange(25))
        for spec in (PAPER, window((0, 1), tuple(range(16)), (), "edge", reserve=(0, 18)))
    )
    assert [longest.locate(w) for w in range(len(longest))] == [padded.locate(w) for w in range(len(padded))]
    assert window((1,), (1, 2), (), "edge").count(lengths).tolist() == lengths.tolist()
    with pytest.raises(UserError, match=r"spans 19 steps, but the longest of 2 episodes has 12"):
        Windows(padded.spec, np.array([12, 11]), np.arange(2))


def test_absent_groups_ask_for_nothing() -> None:
    video = window((0, 1), (), (3,))
    assert video.count(np.array([5, 4]), np.array([0, 0])).tolist() == [2, 1]
    padded = window((0, 1), (), (3,), "edge")
    assert padded.count(np.array([5, 4]), np.array([0, 0])).tolist() == [5, 4]
    assert WindowSpec.from_json(video.to_json()) == video


def test_a_window_that_only_the_last_action_would_fill_is_explained() -> None:
    spec = window((0,), (0, 1, 2), (1,))
    with pytest.raises(UserError, match=r"more actions than the 2 episodes have: the longest has 3 .*last_action='kee"):
        Windows(spec, np.array([3, 2]), np.arange(2), action_lengths=np.array([2, 1]))


def test_edge_padding_observes_every_step_once_and_repeats_the_ends() -> None:
    spec = window((0, 1), (1, 2, 3), (4, 5), "edge")
    lengths = np.array([4, 1, 7])
    windows = Windows(spec, lengths, np.arange(3))
    assert len(windows) == 12
    located = [windows.locate(w) for w in range(12)]
    assert [(e, origin + 1) for e, origin in located] == [(e, t) for e in range(3) for t in range(lengths[e])]
    assert spec.steps(spec.obs, -1, 4) == [0, 0]
    assert spec.steps(spec.action, 2, 4) == [3, 3, 3]
    assert spec.steps(spec.next_obs, -1, 4) == [3, 3]
    assert spec.steps(spec.next_obs, -1, 1) == [0, 0]


def test_a_window_longer_than_every_episode_is_refused_with_the_longest_length() -> None:
    with pytest.raises(UserError, match=r"spans 19 steps, but the longest of 2 training episodes has 12"):
        Windows(PAPER, np.array([40, 12, 11]), np.array([1, 2]), "training episodes")


def test_validation_episodes_follow_the_official_rule() -> None:
    train, held_out = split_episodes(100, 0.05)
    np.testing.assert_array_equal(held_out, np.sort(np.random.default_rng(0).choice(100, 5, replace=False)))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(100))
    sizes = {(n, r): len(split_episodes(n, r)[1]) for n, r in ((25, 0.05), (3, 0.99), (2, 0.01), (1, 0.5), (9, 0.0))}
    assert sizes == {(25, 0.05): 1, (3, 0.99): 2, (2, 0.01): 1, (1, 0.5): 0, (9, 0.0): 0}
