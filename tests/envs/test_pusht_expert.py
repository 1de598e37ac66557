"""The expert of PushT and the simulator it plans on."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from uwm_jax.envs.pusht_expert import (  # noqa: E402
    PushTExpert,
    PushTSimulator,
    agent_path,
    corners,
    goal_distance,
)
from uwm_jax.envs.pusht_simulator import GOAL_POSE, SUBSTEPS, make_env, read_state  # noqa: E402


def pushing_states(seeds=(0, 1, 2), steps=60, every=6):
    """States along the expert's way, most of them in contact."""
    env, expert = make_env(), PushTExpert(candidates=8)
    for seed in seeds:
        env.reset(seed=seed)
        expert.reset(seed)
        for t in range(steps):
            state = read_state(env)
            action = expert.act(state)
            if t % every == 0:
                yield state, action
            env.step(action)


def test_same_state_same_future_whatever_was_simulated_before():
    used = PushTSimulator()
    rng = np.random.default_rng(0)
    moved = 0
    for state, action in pushing_states():
        actions = [action] * 3 + list(rng.uniform(100, 400, (4, 2)))
        futures = []
        for simulator in (used, PushTSimulator()):
            simulator.set_state(state)
            np.testing.assert_array_equal(simulator.get_state(), state)
            for a in actions:
                simulator.step(a)
            futures.append(simulator.get_state())
        np.testing.assert_array_equal(futures[0], futures[1])
        moved += not np.array_equal(futures[0][4:7], state[4:7])
    assert moved > 15  # the block was pushed in most of the 30 trials


@pytest.mark.parametrize("seed", [0, 2, 3, 4])
def test_simulator_is_the_environment(seed):
    """From starts without contact: contacts that the environment remembers are not part of its state.

    Where both boxes of the block are touched, the order in which they are solved may move the last bit.
    """
    env, simulator = make_env(), PushTSimulator()
    env.reset(seed=seed)
    start = read_state(env)
    simulator.set_state(start)
    for t in range(25):
        target = start[4:6] + (t - 8) * 8.0
        env.step(target)
        simulator.step(target)
        np.testing.assert_allclose(simulator.get_state(), read_state(env), rtol=0, atol=1e-9)
    assert np.abs(read_state(env) - start)[4:7].max() > 5  # it was pushed


def test_agent_path_is_the_environments_controller():
    env = make_env()
    env.reset(seed=1)
    start = read_state(env)
    targets = np.random.default_rng(0).uniform(50, 450, (6, 2))
    positions, velocities = agent_path(start[:2], start[2:4], targets)
    for t, target in enumerate(targets):
        env.step(target)
        k = (t + 1) * SUBSTEPS - 1
        np.testing.assert_allclose([*positions[k], *velocities[k]], read_state(env)[:4], rtol=0, atol=1e-9)


def test_corners_are_the_environments_keypoints():
    env = make_env()
    env.reset(seed=2)
    expected = env.get_keypoints(env._block_shapes)
    ours = corners(read_state(env)[4:7])
    order = np.lexsort(np.round(ours, 6).T), np.lexsort(np.round(expected, 6).T)
    np.testing.assert_allclose(ours[order[0]], expected[order[1]], atol=1e-9)
    assert goal_distance(np.array(GOAL_POSE)) == 0
    assert goal_distance(np.array(GOAL_POSE) + [3, 4, 0]) == pytest.approx(5)
