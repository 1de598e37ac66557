"""The loader against windows cut out of the source episodes by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data import loader_case as case
from uwm_jax import config as config_lib
from uwm_jax.data.held_out import windows_of_others
from uwm_jax.data.loader import Trace, prefetch_to_device
from uwm_jax.data.records import Dataset
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec, split_episodes
from uwm_jax.errors import UserError

LENGTHS, made, config, rlds_source = case.LENGTHS, case.made, case.config, case.rlds_source
_loader, _source, _take, _raw_actions = case.open_loader, case.source_of, case.take, case.raw_actions
_minmax = case.minmax


@pytest.mark.parametrize("pad", ["none", "edge"])
def test_batches_equal_windows_cut_by_hand(made, config: ConfigDict, pad: str) -> None:
    config.window.pad = pad
    _, episodes = made
    loader = _loader(config)
    train = split_episodes(len(LENGTHS), config.val_ratio)[0]
    action_scale, action_offset = _minmax(np.concatenate([_raw_actions(episodes[e]) for e in train]))
    states = [s["observation"]["state"] for e in train for s in episodes[e]["steps"]]
    state_scale, state_offset = _minmax(np.stack(states))
    decoded, dataset = {}, _source(loader).dataset
    for camera in rlds_source.CAMERAS:
        key = f"observation/{camera}"
        for e, length in enumerate(LENGTHS):
            decoded[camera, e] = np.zeros((length, *dataset.cameras[key], 3), np.uint8)
            dataset.frames(e, {key: range(length)}, {key: decoded[camera, e]})

    for step, batch in enumerate(_take(loader, 6)):
        np.testing.assert_array_equal(batch["row"], np.arange(8))
        assert batch["row"].dtype == np.int32 and batch["action_mask"].dtype == np.bool_
        assert batch["action_mask"].all()
        for row in range(8):
            trace = loader.describe(step * 8 + row)
            length = LENGTHS[trace.episode]

            def at(indices, origin=trace.origin, length=length):
                steps = [origin + i for i in indices]
                if pad == "none":
                    assert min(steps) >= 0 and max(steps) < length
                return [min(max(s, 0), length - 1) for s in steps]

            for camera in rlds_source.CAMERAS:
                frames = decoded[camera, trace.episode]
                np.testing.assert_array_equal(batch[f"obs/{camera}"][row], frames[at((0, 1))])
                np.testing.assert_array_equal(batch[f"next_obs/{camera}"][row], frames[at((7, 9))])
            steps = episodes[trace.episode]["steps"]
            state = np.stack([steps[t]["observation"]["state"] for t in at((0, 1))])
            np.testing.assert_allclose(batch["obs/state"][row], (state - state_offset) / state_scale, atol=1e-5)
            actions = _raw_actions(episodes[trace.episode])[at(range(1, 7))]
            expected = (actions - action_offset) / action_scale
            np.testing.assert_allclose(batch["action"][row], expected, atol=1e-5)
            np.testing.assert_array_equal(batch["obs/text"][row], steps[at((1,))[0]]["embedding"])
        for key in ("action", "obs/state", "obs/gripper", "obs/text"):
            assert batch[key].dtype == np.float32


def _mark_last(made, directory: Path, value: float) -> tuple[str, list[np.ndarray]]:
    """A copy of the dataset whose episodes' last steps are marked by `is_last` and have `value` for actions; returns
    it and the other actions of each episode."""
    shutil.copytree(made[0], directory, ignore=shutil.ignore_patterns("derived_stats"))
    ends = np.cumsum(LENGTHS) - 1
    for key in ("is_last", "action", "action_dict/cartesian_velocity", "action_dict/gripper_position"):
        column = np.array(Dataset(directory).column(key))
        column[ends] = 1 if key == "is_last" else value
        rlds_source.write_column(directory, key, column)
    return str(directory), [_raw_actions(episode)[:-1] for episode in made[1]]


@pytest.mark.parametrize(("pad", "value"), [("none", np.nan), ("edge", -1e6)])
def test_the_action_at_is_last_is_in_no_window_and_in_no_normaliser(
    made, config: ConfigDict, tmp_path: Path, pad: str, value: float
) -> None:
    config.path, actions = _mark_last(made, tmp_path / "marked", value)
    config.window.pad, config.window.action, config.window.next_obs = pad, (1, 2, 3, 4, 5, 9), (7, 9)
    config.val_ratio = 0.5
    train, held_out = split_episodes(len(LENGTHS), 0.5)
    loader = _loader(config)
    assert "the last action of 6 episodes is left out (is_last)" in loader.data.summary()
    every = np.concatenate([actions[e] for e in train])
    scale, offset = _minmax(every)
    np.testing.assert_allclose(loader.data.spec.normalizer.entries["action"][0], scale, rtol=1e-6)
    np.testing.assert_allclose(loader.data.mean_action(), ((every - offset) / scale).mean(axis=0), atol=1e-5)

    def chunk(episode: int, steps: list[int]) -> np.ndarray:
        assert pad == "edge" or max(steps) < len(actions[episode])
        return (actions[episode][np.clip(steps, 0, len(actions[episode]) - 1)] - offset) / scale

    for windows, episodes in ((loader.data.training_windows(10_000), train), (loader.data.held_out(10_000), held_out)):
        # One window fewer than with the action, in which nothing else would be new; padded, one for each step still.
        expected = sum(LENGTHS[e] if pad == "edge" else max(LENGTHS[e] - 10, 0) for e in episodes)
        assert len(windows) == expected
        batch = windows.batch(0, len(windows))
        for i, (episode, origin) in enumerate(zip(windows.episodes, windows.origins, strict=True)):
            expected = chunk(episode, [origin + i for i in config.window.action])
            np.testing.assert_allclose(batch["action"][i], expected, atol=1e-4)
            np.testing.assert_allclose(batch["last_action"][i], chunk(episode, [origin])[0], atol=1e-4)
        np.testing.assert_array_equal(batch["shuffled_action"], batch["action"][windows.shuffled])


def test_a_last_action_may_be_kept(made, config: ConfigDict, tmp_path: Path) -> None:
    """As without `is_last`: it is in the normaliser, whose statistics of either rule are kept side by side."""
    config.path, _ = _mark_last(made, tmp_path / "marked", 50.0)
    dropped = _loader(config)
    config.last_action = "keep"
    kept = _loader(config)
    kept_high, dropped_high = (next(iter(x.data.ranges().values()))["action"][1] for x in (kept, dropped))
    np.testing.assert_allclose(kept_high[-8:], 50.0, rtol=1e-6)
    assert (dropped_high < 10).all()
    for name in ("state", "gripper"):  # these are known at every step
        np.testing.assert_array_equal(
            kept.data.spec.normalizer.entries[name], dropped.data.spec.normalizer.entries[name]
        )
    config.last_action = "drop"
    assert _loader(config).data.spec.normalizer.to_json() == dropped.data.spec.normalizer.to_json()
    stored = {p.name for p in (tmp_path / "marked" / "derived_stats").iterdir()}
    action = "train.action.identity.val_0.05"
    assert {f"{action}.json", f"{action}.last_dropped.json", "train.observation.state.identity.val_0.05.json"} <= stored
    assert "train.observation.state.identity.val_0.05.last_dropped.json" not in stored

    config.path, _ = _mark_last(made, tmp_path / "broken", np.inf)
    _loader(config)
    config.last_action = "keep"
    with pytest.raises(UserError, match="NaN or infinite"):
        _loader(config)


def test_a_source_that_only_shows_has_windows_to_the_last_frame(made, config: ConfigDict, tmp_path: Path) -> None:
    path, _ = _mark_last(made, tmp_path / "marked", np.nan)
    config.window.action = (1, 2, 3, 4, 5, 9)
    config.sources = ConfigDict(
        {"robot": config_lib.source(), "video": config_lib.source(path=path, use_actions=False)}
    )
    windows = {name: len(source.windows) for name, source in _loader(config).data.sources.items()}
    assert windows["robot"] == windows["video"]


def test_the_spec(config: ConfigDict) -> None:
    loader = _loader(config)
    assert loader.data.spec == DataSpec(
        window=WindowSpec({"obs": (0, 1), "action": (1, 2, 3, 4, 5, 6), "next_obs": (7, 9)}),
        cameras={"exterior": (24, 32), "wrist": (16, 16)},
        low_dim={"gripper": 1, "state": 3},
        action_dim=17,
        text_dim=300,
        normalizer=loader.data.spec.normalizer,
        robots=loader.data.spec.robots,
    )
    robot = loader.data.spec.robot()
    assert robot is not None and [part.in_dim for part in robot.parts] == [6, 1, 7] and not robot.states
    assert set(loader.data.spec.normalizer.entries) == {"action", "state", "gripper"}
    assert f"6 episodes, {sum(LENGTHS)} steps" in loader.data.summary()


def test_every_epoch_visits_every_training_window_once(config: ConfigDict) -> None:
    loader = _loader(config, batch_size=1)
    train, held_out = split_episodes(len(LENGTHS), config.val_ratio)
    assert len(held_out) == 1
    expected = {(e, o) for e in train for o in range(LENGTHS[e] - 9)}
    source = _source(loader)
    streams = source.order.num_streams
    assert len(source.windows) == len(expected)
    seen: dict[tuple[int, int], int] = {}
    for stream in range(streams):
        start, stop = source.order.stream_range(stream)
        for draw in range(2 * (stop - start)):
            trace = loader.describe(draw * streams + stream)
            seen[trace.episode, trace.origin] = seen.get((trace.episode, trace.origin), 0) + 1
    assert seen == dict.fromkeys(expected, 2)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(config: ConfigDict, processes: int) -> None:
    whole = _take(_loader(config), 3)
    parts = [_take(_loader(config, process_index=p, process_count=processes), 3) for p in range(processes)]
    for step in range(3):
        joined = {k: np.concatenate([part[step][k] for part in parts]) for k in whole[step]}
        order = np.argsort(joined["row"])
        for key, value in whole[step].items():
            np.testing.assert_array_equal(joined[key][order], value)


def test_processes_own_ranges_of_windows(config: ConfigDict) -> None:
    order = _source(_loader(config)).order
    ranges = [{order.window(n) for n in range(1000) if n % 4 == p} for p in range(4)]
    assert not any(a & b for i, a in enumerate(ranges) for b in ranges[:i])


def test_continuing_gives_the_same_tail(config: ConfigDict) -> None:
    whole = _take(_loader(config), 7)
    tail = _take(_loader(config, start_step=4), 3)
    for a, b in zip(whole[4:], tail, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_threads_change_nothing(config: ConfigDict) -> None:
    results = []
    for threads in (0, 1, 5):
        config.num_threads = threads
        results.append(_take(_loader(config), 5))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            for key in a:
                np.testing.assert_array_equal(a[key], b[key])


def test_state_is_small_json_and_checked(config: ConfigDict) -> None:
    state = json.loads(json.dumps(_loader(config).state(12)))
    assert state["position"] == 96
    assert len(json.dumps(state)) < 500
    _loader(config, start_step=12, state=state)
    _loader(config, start_step=12, process_index=1, process_count=4, state=state)
    with pytest.raises(UserError, match="has position = 96, this run has 0"):
        _loader(config, state=state)
    with pytest.raises(UserError, match="has seed = 5, this run has 6"):
        _loader(config, seed=6, start_step=12, state=state)
    state["datasets"] = dict.fromkeys(state["datasets"], "0" * 64)
    with pytest.raises(UserError, match="has datasets"):
        _loader(config, start_step=12, state=state)


def test_a_dataset_that_moved_is_the_same(made, config: ConfigDict, tmp_path: Path) -> None:
    """The one source of a run has its directory's name, which is not part of what it is."""
    first = _loader(config)
    state = json.loads(json.dumps(first.state(2)))
    assert list(state["datasets"]) == [made[0].name]
    config.path = str(shutil.copytree(made[0], tmp_path / "another name"))
    moved = _loader(config, start_step=2, state=state)
    for found, expected in zip(_take(moved, 2), _take(first, 4)[2:], strict=True):
        for key in expected:
            np.testing.assert_array_equal(found[key], expected[key])
    again = moved.state(3)
    assert list(again["datasets"]) == list(again["weights"][0][1]) == ["another name"]
    _loader(config, start_step=3, state=again)
    manifest = json.loads((tmp_path / "another name" / "manifest.json").read_text())
    (tmp_path / "another name" / "manifest.json").write_text(json.dumps(manifest | {"version": "9"}))
    shutil.rmtree(tmp_path / "another name" / "derived_stats")
    with pytest.raises(UserError, match="has datasets/another name = .*this run has"):
        _loader(config, start_step=3, state=again)


def test_describe_names_the_place(made, config: ConfigDict) -> None:
    trace = _loader(config).describe(3)
    assert isinstance(trace, Trace)
    assert trace.dataset == str(made[0]) and (made[0] / trace.shard).exists()


def test_held_out_windows_are_fixed_and_evenly_spread(made, config: ConfigDict) -> None:
    config.val_ratio = 0.5
    loader = _loader(config)
    _, held_out = split_episodes(len(LENGTHS), 0.5)
    chosen = loader.data.held_out(10)
    every = loader.data.held_out(10_000)
    assert set(every.episodes) <= set(held_out)
    assert len(every) == sum(max(LENGTHS[e] - 9, 0) for e in held_out)
    places = list(zip(every.episodes.tolist(), every.origins.tolist(), strict=True))
    assert len(set(places)) == len(places)
    indices = [places.index(p) for p in zip(chosen.episodes.tolist(), chosen.origins.tolist(), strict=True)]
    gaps = np.diff(indices)
    assert len(chosen) == 10 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    again = _loader(config, seed=99).data.held_out(10)
    np.testing.assert_array_equal(again.origins, chosen.origins)

    batches = list(chosen.batches(4))
    assert [len(b["row"]) for b in batches] == [4, 4, 4]
    np.testing.assert_array_equal(np.concatenate([b["row"] for b in batches]), [*range(10), 0, 1])
    one = chosen.batch(3, 4)
    for key in one:
        np.testing.assert_array_equal(one[key][0], batches[0][key][3])


def test_a_source_can_be_held_out_whole(made, config: ConfigDict) -> None:
    config.val_ratio = 0.5
    loader = _loader(config)
    (name,) = loader.data.sources
    every = loader.data.held_out(10_000, whole=[name])
    assert set(every.episodes) == {e for e, length in enumerate(LENGTHS) if length > 9}
    assert len(every) == sum(max(length - 9, 0) for length in LENGTHS) > len(loader.data.held_out(10_000, whole=["x"]))


def test_held_out_windows_know_the_action_before_and_actions_of_another_episode(made, config: ConfigDict) -> None:
    config.val_ratio = 0.5
    _, held_out = split_episodes(len(LENGTHS), 0.5)
    lengths = [LENGTHS[e] for e in held_out if LENGTHS[e] > 9]
    assert len(lengths) >= 2
    loader = _loader(config)
    windows = loader.data.held_out(40)
    batch, normalize = windows.batch(0, len(windows)), lambda x: loader.data.spec.normalizer.normalize("action", x)
    for i, (episode, origin) in enumerate(zip(windows.episodes, windows.origins, strict=True)):
        actions = _raw_actions(made[1][episode])
        np.testing.assert_allclose(batch["last_action"][i], normalize(actions[origin]), atol=1e-5)
        np.testing.assert_array_equal(batch["shuffled_action"][i], batch["action"][windows.shuffled[i]])
        assert windows.episodes[windows.shuffled[i]] != episode
    assert batch["has_last_action"].all()
    np.testing.assert_array_equal(windows.batch(3, 5)["shuffled_action"], batch["shuffled_action"][3:5])

    config.window.action = (0, 1, 2, 3, 4, 5)
    windows = _loader(config).data.held_out(10_000)
    np.testing.assert_array_equal(windows.batch(0, len(windows))["has_last_action"], windows.origins > 0)


def test_actions_are_shuffled_by_half_of_the_set_where_episodes_allow() -> None:
    np.testing.assert_array_equal(windows_of_others(np.repeat(np.arange(6), 4)), (np.arange(24) + 12) % 24)
    np.testing.assert_array_equal(windows_of_others(np.zeros(5, int)), (np.arange(5) + 2) % 5)
    for episodes in (np.array([0, 0, 0, 0, 0, 1]), np.array([0, 1, 1, 1, 2]), np.array([0, 1])):
        assert (episodes[windows_of_others(episodes)] != episodes).all()
    assert windows_of_others(np.array([3])).tolist() == [0]


def test_training_windows_and_the_mean_action_are_of_training_episodes(made, config: ConfigDict) -> None:
    config.val_ratio = 0.3
    train, _ = split_episodes(len(LENGTHS), 0.3)
    loader = _loader(config)
    assert set(loader.data.training_windows(10_000).episodes) == {e for e in train if LENGTHS[e] > 9}
    assert len(loader.data.training_windows(7)) == 7
    raw = np.concatenate([_raw_actions(made[1][e]) for e in train])
    np.testing.assert_allclose(
        loader.data.mean_action(), loader.data.spec.normalizer.normalize("action", raw).mean(axis=0), atol=1e-5
    )


def test_what_does_not_fit_is_explained(config: ConfigDict) -> None:
    config.window.next_obs = (150, 151)
    with pytest.raises(UserError, match=r"spans 152 steps, but the longest of \d training episodes of .*out has \d+"):
        _loader(config)
    config.window.next_obs = (7, 9)
    with pytest.raises(UserError, match="3 processes do not divide"):
        _loader(config, process_count=3)
    config.cameras = ("front",)
    with pytest.raises(UserError, match="no camera 'front'"):
        _loader(config)
    config.cameras = ("wrist",)
    config.action = (("action", "xyz_euler_to_rot6d"),)
    with pytest.raises(UserError, match="takes 6 numbers, but 'action' has 7"):
        _loader(config)
    config.action, config.text = (("action", "identity"),), "language_instruction"
    wanted = (
        "no step key for config.data.text, which is a vector of floats, 'language_instruction'; it has: .*embedding.*"
    )
    with pytest.raises(UserError, match=wanted + r"a precomputed embedding.* \(docs/choosing.md, Language\)"):
        _loader(config)
    config.text, config.action = "", (("actions", "identity"),)
    with pytest.raises(UserError, match="no low-dimensional key 'actions'"):
        _loader(config)
    config.action = (("action", "identity"),)
    config.val_ratio = 0.0
    with pytest.raises(
        UserError, match=r"no held-out window to evaluate on .*val_ratio=0.0(.|\n)*: 0 of 6 episodes are held"
    ):
        _loader(config).data.held_out(4)


def test_prefetch_puts_the_same_batches_on_the_device(config: ConfigDict) -> None:
    expected = _take(_loader(config), 4)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = prefetch_to_device(iter(_loader(config)), sharding, 2)
    for batch in expected:
        found = next(batches)
        assert all(isinstance(x, jax.Array) for x in found.values())
        for key in batch:
            np.testing.assert_array_equal(found[key], batch[key])
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_a_read_that_hangs_is_named_and_left_behind(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, hangs, began = _loader(config), threading.Event(), threading.Event()
    assert loader.data.waits_for() == "the threads that read"
    monkeypatch.setattr("uwm_jax.data.run_data.CLOSE_SECONDS", 0.1)
    left: list[str] = []
    monkeypatch.setattr("uwm_jax.data.run_data.leave_behind", left.append)
    view = Dataset.view

    def hanging(*args: Any) -> memoryview:
        began.set()
        hangs.wait()
        return view(*args)

    monkeypatch.setattr(Dataset, "view", hanging)
    thread = threading.Thread(target=lambda: loader.load(loader.data.spec.empty(1), 0, 0, 5), daemon=True)
    thread.start()
    try:
        assert began.wait(10)
        trace = loader.describe(5)
        named = f"{trace.dataset}/{trace.shard}, record "
        assert loader.data.waits_for().startswith(named) and f"(episode {trace.episode}, " in loader.data.waits_for()
        loader.data.close()
        assert left and left[0].startswith(named)
    finally:
        hangs.set()
        thread.join()


def test_a_damaged_record_reaches_the_caller_as_a_user_error(made, config: ConfigDict, tmp_path: Path) -> None:
    copy = shutil.copytree(made[0], tmp_path / "copy")
    for shard in copy.glob("*array_record*"):
        data = bytearray(shard.read_bytes())
        for at in range(1000, len(data), 2000):
            data[at] ^= 1
        shard.write_bytes(data)
    config.path = str(copy)
    for threads in (0, 2):
        config.num_threads = threads
        with pytest.raises(UserError, match="cannot be read"):
            _take(_loader(config), 1)


@pytest.mark.slow
def test_neither_tensorflow_nor_torch_is_imported(made, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
# An import of either now raises; etils asks find_spec, which answers "not installed".
sys.modules["tensorflow"] = sys.modules["torch"] = None
import jax
from uwm_jax.config import base
from uwm_jax.data.loader import Loader, prefetch_to_device
from uwm_jax.data.run_data import RunData
c = base().data
c.path, c.cameras, c.num_threads = {str(made[0])!r}, ("wrist", "exterior"), 2
loader = Loader(RunData(c, seed=0), batch_size=4)
batches = prefetch_to_device(iter(loader), jax.sharding.SingleDeviceSharding(jax.devices()[0]), 2)
print(next(batches)["obs/wrist"].shape)
batches.close()
assert sys.modules["tensorflow"] is None and sys.modules["torch"] is None
"""
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert "(4, 2, 16, 16, 3)" in done.stdout
