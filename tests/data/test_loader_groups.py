"""Batches of windows that lack groups, of data without cameras or actions, and windows that reserve steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data import loader_case as case
from uwm_jax.config import source
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset

made, config, open_loader, take = case.made, case.config, case.open_loader, case.take

ACTED = {"last_action", "has_last_action", "shuffled_action"}  # further keys of a held-out batch with actions


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, list[int]]]:
    """The decoded frames: {camera key: steps} of each call."""
    calls: list[dict[str, list[int]]] = []
    plain = Dataset.frames

    def frames(self: Dataset, episode: int, steps: Any, into: Any) -> None:
        calls.append({key: list(indices) for key, indices in steps.items()})
        plain(self, episode, steps, into)

    monkeypatch.setattr(Dataset, "frames", frames)
    return calls


def without(config: ConfigDict, prefixes: tuple[str, ...], **changes: Any) -> Loader:
    """A loader of the changed config that has the whole one's windows; its batches are compared with the whole one's,
    but for keys with one of the prefixes, which must be absent."""
    config.window.reserve = (0, 9)
    whole = open_loader(config)
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.update({k: v for k, v in changes.items() if k != "window"})
        changed.window.update(changes.get("window", {}))
    loader = open_loader(changed)
    pairs = list(zip(take(whole, 3), take(loader, 3), strict=True))
    pairs.append((whole.data.held_out(5).batch(0, 5), loader.data.held_out(5).batch(0, 5)))
    for before, after in pairs:
        kept = {key for key in before if not key.startswith(prefixes)}
        assert set(after) == kept and {"action_mask", "row"} <= kept
        for key in kept:
            np.testing.assert_array_equal(after[key], before[key])
    return loader


def test_without_later_frames_none_is_decoded(config: ConfigDict, decoded: list[dict[str, list[int]]]) -> None:
    loader = without(config, ("next_obs",), window={"next_obs": ()})
    decoded.clear()
    windows = loader.data.training_windows(4)
    windows.batch(0, 4)
    for origin, call in zip(windows.origins, decoded, strict=True):
        assert set(call) == {"observation/wrist", "observation/exterior"}
        assert all(steps == [origin, origin + 1] for steps in call.values())


def test_without_current_frames_only_later_ones_are_decoded(config: ConfigDict, decoded: list[Any]) -> None:
    config.text = ""
    loader = without(config, ("obs/",), window={"obs": ()})
    decoded.clear()
    windows = loader.data.training_windows(2)
    windows.batch(0, 2)
    assert [call["observation/wrist"] for call in decoded] == [[o + 7, o + 9] for o in windows.origins.tolist()]


def test_without_cameras_no_frame_is_read(config: ConfigDict, decoded: list[dict[str, list[int]]]) -> None:
    loader = without(config, ("obs/wrist", "obs/exterior", "next_obs"), cameras=())
    decoded.clear()
    take(loader, 2)
    assert not decoded and loader.data.spec.cameras == loader.data.camera_keys == {}
    assert "cameras none; text embedding; action 17-d" in loader.data.summary()


@pytest.mark.parametrize("columns", [(), (("action", "identity"),)])
def test_actions_that_no_group_reads_are_absent(config: ConfigDict, columns: tuple[tuple[str, str], ...]) -> None:
    config.window.reserve = (0, 9)
    whole = open_loader(config)
    config.action, config.window.action = columns, ()
    loader = open_loader(config)
    assert loader.data.spec.action_dim == 0 and set(loader.data.spec.normalizer.entries) == {"state", "gripper"}
    assert set(loader.data.ranges()[loader.data.directory.name]) == {"state", "gripper"}
    assert "no action" in loader.data.summary() and not loader.data.warnings(1.0, 1)
    for before, after in (
        (take(whole, 1)[0], take(loader, 1)[0]),
        (whole.data.held_out(5).batch(0, 5), loader.data.held_out(5).batch(0, 5)),
    ):
        assert set(before) - set(after) - ACTED == {"action"} and not set(after) & ACTED
        assert after["action_mask"].all()
        for key, value in after.items():
            np.testing.assert_array_equal(value, before[key])


def test_a_mixture_without_actions_still_tells_its_rows_apart(config: ConfigDict) -> None:
    config.window.action, config.cameras, config.text = (), (), ""
    config.sources = ConfigDict({"robot": source(), "video": source(use_actions=False)})
    batch = take(open_loader(config, batch_size=32), 1)[0]
    assert set(batch) == {"obs/state", "obs/gripper", "action_mask", "row"}
    assert 4 < batch["action_mask"].sum() < 28
    assert not batch["obs/state"][~batch["action_mask"]].any() and batch["obs/state"][batch["action_mask"]].any()


def test_a_reserve_gives_shorter_windows_the_places_of_the_longest(config: ConfigDict) -> None:
    """The paper's window spans 19 steps; a policy of the same chunk without video reads 17."""

    def places(loader: Loader) -> list[list[tuple[int, int]]]:
        found = [loader.data.held_out(64, whole=(loader.data.directory.name,)), loader.data.training_windows(1000)]
        order = [loader.describe(position) for position in range(200)]
        return [list(zip(w.episodes, w.origins, strict=True)) for w in found] + [[(t.episode, t.origin) for t in order]]

    config.window.action, config.window.next_obs = tuple(range(1, 17)), (17, 18)
    uwm = places(open_loader(config))
    config.window.next_obs = ()
    assert places(open_loader(config)) != uwm
    config.window.reserve = (0, 18)
    loader = open_loader(config)
    assert places(loader) == uwm and loader.data.spec.window.span == 19
    assert "next_obs/wrist" not in loader.data.held_out(4).batch(0, 4)
