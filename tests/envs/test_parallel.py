"""Parallel environments against the same episodes one after the other in this process."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gym_pusht")

from uwm_jax import envs  # noqa: E402
from uwm_jax.envs.parallel import ParallelEnvs, Random, controllers, cores, make_controller, play_episode  # noqa: E402
from uwm_jax.errors import RunError, UserError  # noqa: E402

ROOT = Path(__file__).parents[2]
SEEDS = [100_000, 100_001, 7]
CAMERAS = {"image": (32, 32)}


@pytest.fixture(scope="module")
def two_workers():
    with ParallelEnvs("pusht", CAMERAS, workers=2) as parallel:
        yield parallel


def test_rows_are_episodes_of_their_own(two_workers):
    actions = np.random.default_rng(0).uniform(0, 512, (5, len(SEEDS), 2))
    for _ in range(2):  # the second time from a used environment
        steps = [two_workers.reset(SEEDS)]
        for t in range(3):
            steps.append(two_workers.step(np.arange(3), actions[t]))
        steps += [two_workers.step(np.array([2, 1]), actions[t, [2, 1]]) for t in (3, 4)]  # any rows, any order
        for row, seed in enumerate(SEEDS):
            env = envs.get("pusht").make(CAMERAS)
            observation, info = env.reset(seed=seed)
            for t in range(4 if row == 0 else 6):
                at = row if t < 4 else {2: 0, 1: 1}[row]
                for key in ("image", "agent_pos"):
                    np.testing.assert_array_equal(steps[t].observation[key][at], observation[key])
                    assert steps[t].observation[key].dtype == observation[key].dtype
                assert steps[t].score[at] == info["score"]
                assert not steps[t].success[at] and not steps[t].done[at]
                if t < 5:
                    observation, *_, info = env.step(actions[t, row])


def test_played_episodes_do_not_depend_on_the_processes(two_workers):
    spec = envs.get("pusht")
    assert controllers(spec) == ("random_uniform", "random_held", "expert")
    for name in ("random_uniform", "random_held"):
        played = dict(two_workers.play(name, SEEDS))
        assert sorted(played) == [0, 1, 2]
        for place, seed in enumerate(SEEDS):
            alone = play_episode(spec.make({}), make_controller(spec, name), seed)
            found = played[place]
            assert found.seed == seed and found.success == alone.success
            np.testing.assert_array_equal(found.scores, alone.scores)
            np.testing.assert_array_equal(found.actions, alone.actions)
            assert found.max_score == max(found.scores) and len(found.scores) == len(found.actions) + 1


def test_random_actions_cover_the_board_and_are_held():
    env = envs.get("pusht").make({})
    for hold in (1, 8):
        controller = Random(hold)
        controller.reset(3)
        actions = np.array([controller.act(env) for _ in range(1600)])
        changes = np.flatnonzero((np.diff(actions, axis=0) != 0).any(axis=1)) + 1
        np.testing.assert_array_equal(changes, np.arange(hold, 1600, hold))
        each = actions[::hold]
        assert each.min() < 30 and each.max() > 482  # of [0, 512]
        np.testing.assert_allclose(each.mean(axis=0), 256, atol=4 * 148 / np.sqrt(len(each)))
        controller.reset(3)
        np.testing.assert_array_equal(controller.act(env), actions[0])
    the_starts_own_stream = np.random.default_rng(3).uniform(0, 512, 2)
    assert not np.allclose(actions[0], the_starts_own_stream)


def test_the_expert_solves_what_the_random_policies_do_not(two_workers):
    best = {name: [e.max_score for _, e in two_workers.play(name, SEEDS)] for name in ("expert", "random_held")}
    assert min(best["expert"]) > 0.95 and np.mean(best["random_held"]) < 0.7


COMMAND = """
import multiprocessing
from uwm_jax.envs.parallel import ParallelEnvs
envs = ParallelEnvs("pusht", {}, workers=2)
envs.reset([1, 2])
episodes = envs.play("random_uniform", range(10_000))
next(episodes)
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
for _ in episodes:
    pass
"""


def test_processes_end_with_a_command_that_is_killed_in_the_middle_of_episodes(ends):
    command = subprocess.Popen([sys.executable, "-c", COMMAND], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    try:
        workers = [int(pid) for pid in command.stdout.readline().split()]
        assert len(workers) == 2 and not any(ends(pid, 0.1) for pid in workers)
    finally:
        command.kill()
        command.wait(30)
    assert all(ends(pid) for pid in workers) and "Traceback" not in command.stderr.read()


def test_closing_in_the_middle_of_episodes_ends_the_processes():
    before = set(multiprocessing.active_children())
    with ParallelEnvs("pusht", {}, workers=2) as parallel:
        next(parallel.play("random_uniform", range(10_000)))
        workers = set(multiprocessing.active_children()) - before
        assert len(workers) == 2
    assert set(multiprocessing.active_children()) <= before


def test_cores_where_the_system_tells_them_and_where_not(monkeypatch):
    assert cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()


def test_errors_of_a_worker_reach_the_parent():
    with pytest.raises(UserError, match="no such environment"):
        ParallelEnvs("pushit", CAMERAS, workers=1)
    with ParallelEnvs("pusht", CAMERAS, workers=2) as parallel:
        parallel.reset([0, 1])
        with pytest.raises(RunError, match="KeyError"):
            parallel.step(np.array([0, 1, 2]), np.zeros((3, 2)))  # there is no row 2
        again, expected = parallel.reset([0, 1]), (envs.get("pusht").make({}).reset(seed=s)[0] for s in (0, 1))
        np.testing.assert_array_equal(again.observation["agent_pos"], [x["agent_pos"] for x in expected])
    with ParallelEnvs("pusht", {"image": (32, 48)}, workers=1) as parallel:
        with pytest.raises(UserError, match="square frames"):
            parallel.reset([0])
        with pytest.raises(RunError, match="KeyError"):
            parallel.step(np.array([5]), np.zeros((1, 2)))
        parallel._processes[0].kill()
        parallel._processes[0].join()
        with pytest.raises(RunError, match="died"):
            parallel.reset([0])
