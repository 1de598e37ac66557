"""The stateless half of a policy: calls of fixed sizes, limits, and what is promised."""

from __future__ import annotations

import numpy as np
import pytest

from tests.made_up_backend import CHUNK, OFFSET, SCALE, MadeUpBackend
from uwm_jax.actor import Actor
from uwm_jax.errors import UserError

PARTS = [
    {"columns": "a[:1]", "transform": "relative:pose:position", "width": 1},
    {"columns": "a[1:]", "transform": "gripper_inverted", "width": 2},
]
RELATIVE = {"parts": PARTS, "states": {"pose": 1}}


def inputs(rows: int, **more: np.ndarray) -> dict[str, np.ndarray]:
    state = np.stack([np.zeros(rows), np.arange(rows)], axis=1)[..., None].astype(np.float32)
    return {"obs/front": np.zeros((rows, 2, 2, 2, 3), np.uint8), "obs/state": state, **more}


def noise(rows: int) -> dict[str, np.ndarray]:
    return {"action": 0.5 * np.arange(rows, dtype=np.float32)}


def test_a_chunk_begins_now_and_is_the_robots():
    backend = MadeUpBackend(RELATIVE)
    actor = Actor(backend)
    pose = np.array([[[1.0], [5.0]], [[1.0], [7.0]]], np.float32)  # the newest frame counts
    assert (actor.horizon, actor.width, actor.states) == (CHUNK, 3, {"pose": 1})
    like = {key: (x.shape, x.dtype) for key, x in actor.inputs_like(2).items()}
    assert like == {
        "obs/front": ((2, 2, 2, 2, 3), np.uint8),
        "obs/state": ((2, 2, 1), np.float32),
        "obs/pose": ((2, 2, 1), np.float32),
    }
    chunk = actor.chunks(inputs(2, **{"obs/pose": pose}), noise(2))
    assert chunk.shape == (2, CHUNK, 3) and chunk.dtype == np.float32
    np.testing.assert_allclose(chunk[..., 0], np.array([[0 + 5], [1 + 7]]) + np.zeros(CHUNK))
    np.testing.assert_allclose(chunk[0, :, 1], 1 - 1000 * np.arange(CHUNK))
    model = actor.normalized(chunk, {"pose": pose[:, -1]})
    np.testing.assert_allclose(model[1, :, 1] * SCALE[1] + OFFSET[1], 1000 * np.arange(CHUNK))


@pytest.mark.parametrize(
    "rows,sizes,calls", [(5, (1, 2, 4), [4, 1]), (3, (1, 2, 4), [4]), (9, (4,), [4, 4, 4]), (3, (), [3])]
)
def test_calls_have_the_sizes_that_are_compiled(rows, sizes, calls):
    backend = MadeUpBackend()
    chunk = Actor(backend, sizes=sizes).chunks(inputs(rows), noise(rows))
    assert [len(call.inputs["obs/state"]) for call in backend.calls] == calls
    np.testing.assert_array_equal(chunk[:, 0, 0], np.arange(rows))
    np.testing.assert_array_equal(chunk[:, 0, 2], 0.5 * np.arange(rows))
    drawn = Actor(backend, sizes=sizes).noise(1, np.arange(rows), np.zeros(rows))
    np.testing.assert_allclose(drawn["action"], 1 + 0.5 * np.arange(rows))


def test_what_is_beyond_the_limits_is_cut_counted_and_said_once(capsys):
    backend = MadeUpBackend()
    backend.limits = np.array([-10, 0, -10], np.float32), np.array([10, 6500, 10], np.float32)
    actor = Actor(backend, limits=(-100.0, np.array([100, 5000, 0.25])), sizes=(4,))
    chunk = actor.chunks(inputs(2), noise(2))
    # Places 6 and 7 of both rows in column 1, and all places of the second row, whose noise is 0.5, in column 2; rows
    # that fill a call up do not count.
    assert actor.cut == 2 * 2 + CHUNK
    np.testing.assert_array_equal(chunk[:, :, 1], np.minimum(1000 * np.arange(CHUNK), 5000)[None].repeat(2, 0))
    assert chunk[..., 2].max() == 0.25
    said = capsys.readouterr().err
    assert "column 1 of a chunk reached 6000, allowed is 0 to 5000" in said and said.count("\n") == 1
    actor.chunks(inputs(1), noise(1))
    assert actor.cut == 2 * 2 + CHUNK + 2 and not capsys.readouterr().err


def test_promised_actions_are_the_models_numbers_at_their_places():
    backend = MadeUpBackend(RELATIVE)
    pose = np.array([[[0.0], [5.0]], [[0.0], [7.0]]], np.float32)
    actions = np.full((2, CHUNK, 3), np.nan, np.float32)
    actions[0, :3], actions[1, :1] = [[10, 1, 2], [11, 3, 4], [12, 5, 6]], [[20, 7, 8]]
    chunk = Actor(backend, sizes=(4,)).chunks(inputs(2, **{"obs/pose": pose}), noise(2), (actions, np.array([3, 1])))
    (call,) = backend.calls
    expected = np.zeros((4, CHUNK + 1), bool)
    expected[[0, 2], 1:4] = expected[[1, 3], 1] = True  # the first action of the window lies before the present
    np.testing.assert_array_equal(call.promised.mask, expected)
    assert np.isfinite(call.promised.action).all()
    raw = call.promised.action * SCALE + OFFSET
    np.testing.assert_allclose(raw[0, 1:4], [[5, 0, -1], [6, -2, -3], [7, -4, -5]], atol=1e-4)
    np.testing.assert_allclose(raw[1, 1], [13, -6, -7], atol=1e-4)
    np.testing.assert_array_equal(chunk[0, :3], actions[0, :3])
    np.testing.assert_array_equal(chunk[1, :1], actions[1, :1])
    assert np.isfinite(chunk).all()


@pytest.mark.parametrize("limits", [(np.zeros(2), 1.0), (0.0, "high"), (1.0, 0.0), (np.nan, 1.0)])
def test_limits_that_do_not_fit(limits):
    with pytest.raises(UserError, match="limits"):
        Actor(MadeUpBackend(), limits=limits)


def test_a_model_that_does_not_act_is_refused():
    backend = MadeUpBackend()
    backend.acting = ""
    with pytest.raises(UserError, match="makes no action from an observation alone"):
        Actor(backend)


def test_promised_actions_need_a_backend_that_holds_them():
    actions = np.zeros((1, CHUNK, 3), np.float32)
    with pytest.raises(UserError, match="made-up.* does not sample in steps"):
        Actor(MadeUpBackend(can_promise=False)).chunks(inputs(1), noise(1), (actions, np.array([1])))
    backend = MadeUpBackend()
    Actor(backend).chunks(inputs(1), noise(1), (actions, np.array([0])), guided=True)
    assert backend.calls[0].promised is None and not backend.calls[0].guided  # plain sampling
