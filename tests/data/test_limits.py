"""Limits of windows: ranges of steps of the present frame, and bounds of actions; against plain loops."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data import loader_case as case
from tests.data.test_windows import PAPER, window
from uwm_jax.config import source
from uwm_jax.data.columns import Column
from uwm_jax.data.limits import ActionBound, StepRanges, _is_beyond, of_openpi
from uwm_jax.data.run_data import RunData
from uwm_jax.data.selection import steps_where
from uwm_jax.data.stats import column_stats
from uwm_jax.data.transforms import Columns
from uwm_jax.data.windows import Windows, WindowSpec
from uwm_jax.errors import UserError

made, config, open_loader, take, source_of = case.made, case.config, case.open_loader, case.take, case.source_of

SPECS = [
    *(PAPER, window((0,), (0, 1, 2), (3,)), window((0, 1), (2, 3, 7), (9,)), window((1,), (0, 4, 5, 9), ())),
    *(window((0, 1), (1, 2, 3, 4), (5,), "edge"), window((-1, 0), (-2, 0, 1, 5), (), "edge", reserve=(0, 7))),
]


@pytest.mark.parametrize("spec", SPECS)
def test_windows_equal_a_plain_loop_over_ranges_and_actions(spec: WindowSpec) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 40)
    actions = lengths - rng.integers(0, 2, 40)
    used = np.flatnonzero(rng.random(40) < 0.8)
    which = rng.integers(0, 40, 60)
    starts, stops = rng.integers(-3, 50, 60), rng.integers(0, 70, 60)
    ranges = StepRanges.of(which, starts, stops, lengths)
    values = np.where(rng.random((lengths.sum(), 2)) < 0.01, -3.0, 0.5)
    begins = np.cumsum(lengths) - lengths
    first, last = (np.flatnonzero(actions)[i::8] for i in (0, 4))  # large at the ends, which padded windows repeat
    values[begins[first]] = values[begins[last] + actions[last] - 1] = 2.5
    bound = ActionBound("action", 2.0, *_beyond(values, 2.0, lengths, actions))

    free = Windows(spec, lengths, used, action_lengths=actions)
    everything = [free.locate(w) for w in range(len(free))]

    def in_range(episode: int, origin: int) -> bool:
        present = origin + max(spec.obs)
        of = which == episode
        return any(a <= present < b for a, b in zip(starts[of], stops[of], strict=True)) and present < lengths[episode]

    def bounded(episode: int, origin: int) -> bool:
        steps = spec.steps(spec.action, origin, int(actions[episode]))
        return all((abs(values[begins[episode] + s]) <= 2).all() for s in steps)

    inside = [place for place in everything if in_range(*place)]
    small = [place for place in everything if bounded(*place)]
    for limits, expected in (
        ((ranges,), inside),
        ((bound,), small),
        ((ranges, bound), [place for place in inside if place in small]),
    ):
        windows = Windows(spec, lengths, used, action_lengths=actions, limits=limits)
        assert [windows.locate(w) for w in range(len(windows))] == expected
        assert (windows.total, windows.num_episodes) == (len(everything), len({e for e, _ in expected}))
    assert 0 < len(expected) < len(small) < len(everything) and len(expected) < len(inside)
    assert windows.left_out == {
        ranges.name: len(everything) - len(inside),
        bound.name: len(everything) - len(small),
    }
    # The steps that the windows hold at the indices of a group.
    for indices, ends in ((spec.action, actions), (spec.obs, lengths)):
        held = np.zeros(lengths.sum(), bool)
        for episode, origin in expected:
            for step in spec.steps(indices, origin, int(ends[episode])):
                held[begins[episode] + step] = True
        np.testing.assert_array_equal(windows.steps_held(indices, ends, begins, len(held)), held)


def _beyond(column: Column, bound: float, lengths: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return steps_where(lambda x: np.any(np.abs(x) > bound, axis=1), column, lengths, counted, block=7)


def test_limits_that_leave_nothing_are_named_with_counts() -> None:
    lengths = np.array([20, 30])
    ranges = StepRanges.of(np.array([0]), np.array([0]), np.array([1]), lengths, "the ranges 'idle'")
    with pytest.raises(UserError, match="none of the 14 windows of 2 episodes is left: 14 left out by the ranges 'i"):
        Windows(PAPER, lengths, np.arange(2), limits=[ranges])


def test_ranges_are_told_apart_by_their_content_alone() -> None:
    lengths = np.array([20, 9, 30])
    one = StepRanges.of(np.array([2, 0, 2]), np.array([5, -4, 0]), np.array([90, 7, 5]), lengths, "a")
    same = StepRanges.of(np.array([0, 2, 1]), np.array([0, 0, 3]), np.array([7, 30, 3]), lengths, "b", ("remark",))
    assert (one.ends.tolist(), one.starts.tolist(), one.stops.tolist()) == ([1, 1, 2], [0, 0], [7, 30])
    assert one.rule == same.rule and one.rule.startswith("present frames in ranges of 37 steps (")
    assert one.rule != StepRanges.of(np.array([1, 2]), np.array([0, 0]), np.array([7, 30]), lengths).rule


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float32])
def test_bounds_hold_for_numbers_of_any_type(dtype: type) -> None:
    values = np.array([[0, 100], [0, 127], [128 if dtype is np.uint8 else -128, 0]], dtype)
    assert _is_beyond(Columns("a"), 120.0, values).tolist() == [False, True, True]
    assert _is_beyond(Columns("a", 1), 120.0, values).tolist() == [False, True, False]


def test_bounds_are_told_apart_by_all_digits() -> None:
    nowhere = np.zeros(0, np.int64)
    rules = [ActionBound("action", bound, nowhere, nowhere).rule for bound in (2.0, 0.12345678, 0.12345679)]
    assert rules == ["action within 2", "action within 0.12345678", "action within 0.12345679"]


LENGTHS = np.array([20, 60, 40, 30])
NAMES = [f"gs://r2d2/lab/{i}/recordings/MP4--/nfs/lab/{i}/trajectory.h5" for i in range(4)]


def dataset(directory: str = "droid") -> Any:
    """As far as `of_openpi` asks a dataset."""
    texts = {
        key: [name.split("--")[i] for name in NAMES] for i, key in enumerate(("recording_folderpath", "file_path"))
    }
    return types.SimpleNamespace(
        directory=directory, num_episodes=4, episode_lengths=LENGTHS, episode_texts=texts.__getitem__
    )


def test_openpis_json_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "droid_sample_ranges.json"
    stored = {NAMES[2]: [[0, 5], [9, 9], [12, 30]], "elsewhere--x": [[0, 9]], NAMES[0]: [[3, 25]], NAMES[3]: [[7, 3]]}
    file.write_text(json.dumps(stored))
    found = of_openpi(dataset(), file)
    assert found.ends.tolist() == [1, 1, 3, 3]
    assert (found.starts.tolist(), found.stops.tolist()) == ([3, 0, 12], [20, 5, 30])
    assert found.remarks == (
        "1 of 4 episodes are not in it and have no windows",
        "1 of its 4 entries match no episode",
        "1 ranges reach beyond their episode's end and were cut there",
        "2 ranges have no steps",
    )
    # The older form leaves its last steps to the reader.
    file.write_text(json.dumps({"metadata": {"filter_last_n_in_ranges": 4}, "keep_ranges": stored}))
    older = of_openpi(dataset(), file)
    assert (older.starts.tolist(), older.stops.tolist()) == ([3, 0, 12], [20, 1, 26])


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"a--b": [[0, 5]]}, r"names none of the 4 episodes of droid: expected keys .* found 'a--b'"),
        ({}, r"names none of the 4 episodes of droid: .* found 'none'"),
        (
            {NAMES[1]: [[0, 5, 6]]},
            r"/1/trajectory\.h5': expected a list of \[start, end\) .*found \[\[0, 5, 6\]\]",
        ),
        ({NAMES[1]: [[-1, 5]]}, r"expected a list of \[start, end\)"),
        ({NAMES[1]: "all"}, r"expected a list of \[start, end\)"),
        ({"keep_ranges": {}, "metadata": 3}, r"expected an integer in metadata\.filter_last_n_in_ranges, found None"),
        ({"keep_ranges": {}, "metadata": {"filter_last_n_in_ranges": 1 << 80}}, r"expected an integer in metadata"),
        ([], r"ranges\.json: expected a JSON object"),
        (None, r"there is no file .*ranges\.json"),
    ],
)
def test_another_json_is_refused(tmp_path: Path, stored: Any, message: str) -> None:
    file = tmp_path / "ranges.json"
    if stored is not None:
        file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=message):
        of_openpi(dataset(), file)


def test_a_dataset_without_these_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ranges.json").write_text(json.dumps({NAMES[0]: [[0, 5]]}))

    def lacks(key: str) -> list[str]:
        raise UserError(f"droid: no episode text {key!r}; it has: none.")

    other = types.SimpleNamespace(**{**vars(dataset()), "episode_texts": lacks})
    with pytest.raises(
        UserError, match=r"ranges\.json' names episodes by their recording_folderpath and file_path: dro"
    ):
        of_openpi(other, tmp_path / "ranges.json")


def _write_ranges(file: Path, episodes: list[dict[str, Any]], ranges: dict[int, list[list[int]]]) -> str:
    metadata = [episode["episode_metadata"] for episode in episodes]
    names = {e: f"{metadata[e]['recording_folderpath']}--{metadata[e]['file_path']}" for e in ranges}
    file.write_text(json.dumps({names[e]: of for e, of in ranges.items()}))
    return str(file)


RANGES = {0: [[3, 9]], 2: [[0, 20], [40, 61], [95, 100]], 3: [[1, 2], [8, 31]], 4: [[0, 3]], 5: [[5, 33]]}


def test_a_run_sees_only_windows_within_the_limits(made, config: ConfigDict, tmp_path: Path) -> None:
    config.val_ratio = 0.3
    plain = open_loader(config)
    config.ranges = _write_ranges(tmp_path / "kept.json", made[1], RANGES)
    config.max_action = (("action", 2.5),)
    loader = open_loader(config)
    of_run = source_of(loader)
    large = [np.stack([np.abs(s["action"]).max() > 2.5 for s in episode["steps"]]) for episode in made[1]]
    assert 5 < sum(map(np.sum, large)) < 40

    def allowed(episode: int, origin: int) -> bool:
        inside = any(a <= origin + 1 < b for a, b in RANGES.get(episode, []))
        return inside and not large[episode][origin + 1 : origin + 7].any()

    for windows, free in (
        (of_run.windows, source_of(plain).windows),
        (of_run.held_out_windows(), source_of(plain).held_out_windows()),
    ):
        expected = [place for place in map(free.locate, range(len(free))) if allowed(*place)]
        assert 2 < len(expected) < len(free)
        assert [windows.locate(w) for w in range(len(windows))] == expected
    # Rows, whatever the number of processes, are of these windows.
    batches = take(loader, 4)
    for index in range(2):
        parts = take(open_loader(config, process_index=index, process_count=2), 4)
        for batch, part in zip(batches, parts, strict=True):
            assert all(np.array_equal(part[key], batch[key][index::2]) for key in part)
    traces = [loader.describe(n) for n in range(32)]
    assert all(allowed(trace.episode, trace.origin) for trace in traces)
    # The normaliser counts the steps of training windows alone, each once.
    held = {(e, o + i) for e, o in map(of_run.windows.locate, range(len(of_run.windows))) for i in range(1, 7)}
    values = np.stack([case.raw_actions(made[1][e])[t] for e, t in sorted(held)])
    stats = of_run.stats()["action"]
    assert stats["count"] == len(held) < source_of(plain).stats()["action"]["count"]
    np.testing.assert_allclose(stats["mean"], values.astype(np.float64).mean(axis=0), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(stats["max"], values.max(axis=0))
    assert stats["max"][-7:] <= [2.5] * 7
    seen = {(e, o + i) for e, o in map(of_run.windows.locate, range(len(of_run.windows))) for i in (0, 1)}
    states = np.stack([made[1][e]["steps"][t]["observation"]["state"] for e, t in sorted(seen)])
    np.testing.assert_array_equal(of_run.stats()["state"]["max"], states.max(axis=0))
    text = loader.data.summary()
    (used,) = loader.data.used().values()
    assert used.startswith(f"{len(of_run.windows)} training windows in {of_run.windows.num_episodes} episodes, 2 epi")
    assert "; ".join(of_run.left_out()) in text and used.endswith("; ".join(of_run.left_out()))
    assert f"{len(of_run.windows)} of {of_run.windows.total} training windows in " in text
    assert "left out by the ranges of kept.json" in text
    assert "left out by action beyond 2.5 (at " in text and "1 of 6 episodes are not in it and have no windows" in text


def test_a_run_continues_on_the_same_ranges_alone(made, config: ConfigDict, tmp_path: Path) -> None:
    config.ranges = _write_ranges(tmp_path / "kept.json", made[1], RANGES)
    state = open_loader(config).state(3)
    config.ranges = _write_ranges(tmp_path / "moved.json", made[1], RANGES)
    open_loader(config, start_step=3, state=state)
    config.ranges = _write_ranges(tmp_path / "moved.json", made[1], RANGES | {5: [[5, 32]]})
    with pytest.raises(UserError, match=r"has datasets/out = '\w+ \(present frames in ranges of .* Continue with"):
        open_loader(config, start_step=3, state=state)
    config.ranges = ""
    with pytest.raises(UserError, match="has datasets/out = "):
        open_loader(config, start_step=3, state=state)


def test_without_limits_statistics_are_those_of_all_training_steps(made, config: ConfigDict) -> None:
    loader = open_loader(config)
    of_run = source_of(loader)
    assert of_run.identity == of_run.dataset.fingerprint
    keep = np.isin(np.repeat(np.arange(6), case.LENGTHS), of_run.episodes)
    column = of_run.dataset.column("action")
    expected = column_stats(column, lambda x: np.asarray(x, np.float32), keep)
    found = of_run.stats()["action"]
    assert {k: v[-7:] if isinstance(v, list) else v for k, v in found.items()} == expected


def test_sources_have_limits_of_their_own(made, config: ConfigDict, tmp_path: Path) -> None:
    config.ranges = _write_ranges(tmp_path / "kept.json", made[1], RANGES)
    config.sources.a = source(max_action=(("action", 3.0),))
    config.sources.b = source(ranges="none")
    config.sources.c = source(ranges="none", use_actions=False)
    sources = RunData(config, seed=0).sources
    assert [limit.rule.split()[0] for limit in sources["a"].limits] == ["present", "action"]
    assert sources["b"].limits == sources["c"].limits == []
    config.max_action = (("action[6:]", 0.4), ("action[:6]", 3.0))  # the last column is 0.5 everywhere
    with pytest.raises(UserError, match=r"is left: 129 left out by action\[6:\] beyond 0\.4 \(at 203 steps\); 19 l"):
        RunData(config, seed=0)
    for key, message in (("action[:9]", r"config\.data\.max_action: action\[:9\] takes"), ("a[", r"found 'a\['")):
        config.max_action = ((key, 3.0),)
        with pytest.raises(UserError, match=message):
            RunData(config, seed=0)
    config.max_action = (("gripper_position", 0.5),)
    with pytest.raises(UserError, match=r"max_action: no source has 'gripper_position' in its action, whose keys"):
        RunData(config, seed=0)
    config.max_action = (("action_dict/gripper_position", 0.99),)
    sources = RunData(config, seed=0).sources
    assert [[limit.rule for limit in s.limits][-1:] for s in sources.values()] == [
        ["action within 3"],
        ["action_dict/gripper_position within 0.99"],
        [],
    ]
    config.sources.c.max_action = (("action", 3.0),)
    with pytest.raises(UserError, match=r"sources\.c\.max_action: 'action' is none of the keys of this source's acti"):
        RunData(config, seed=0)
    config.sources.c.max_action, config.sources.b.ranges = (), "slow"
    with pytest.raises(
        UserError,
        match=r"config\.data\.sources\.b\.ranges='slow': .*data_prep\.ranges --dataset=.* --name=slow`.* "
        r"config\.data\.sources\.b\.ranges='none' exempts this source\.",
    ):
        RunData(config, seed=0)
    for value in ("/data/out/ranges/slow", "../slow"):
        config.sources.b.ranges = value
        with pytest.raises(
            UserError, match=r"sources\.b\.ranges='.*slow': expected the name that data_prep\.ranges gav"
        ):
            RunData(config, seed=0)
