"""Chunks that take control steps until they are there: what is executed, promised, measured, and what is late."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait

import numpy as np
import pytest

from tests.made_up_backend import CHUNK, OFFSET, SCALE, MadeUpBackend, seen
from uwm_jax.actor import Actor
from uwm_jax.errors import RunError, UserError
from uwm_jax.policy import SWITCHES, LateAnswer, Policy

ASYNC = ("naive", "replacement", "guided")


def run(policy: Policy, steps: int, seeds=(0,)) -> np.ndarray:
    """(steps, n, Dr): the actions of episodes whose state is the step, plus 100 for each row."""
    policy.reset(seeds)
    return np.stack([policy.act(seen(*(step + 100.0 * row for row in range(len(seeds))))) for step in range(steps)])


def expected(steps: int, execute: int, delay: int) -> tuple[list[int], list[int]]:
    """By the rule, of each step: the step at which its chunk was asked for, and its row there."""
    asked = [max(s for s in range(0, t + 1, execute) if s == 0 or t >= s + delay) for t in range(steps)]
    return asked, [t - s for t, s in zip(range(steps), asked, strict=True)]


@pytest.mark.parametrize("execute,delay", [(4, 0), (4, 2), (4, 4), (3, 1), (6, 2), (1, 1)])
@pytest.mark.parametrize("switch", ASYNC)
def test_row_k_of_a_chunk_asked_for_at_step_s_is_for_step_s_plus_k(switch, execute, delay):
    taken = run(Policy(MadeUpBackend(), execute=execute, delay=delay, switch=switch), 20)[:, 0]
    asked, row = expected(20, execute, delay)
    np.testing.assert_array_equal(taken[:, 0], asked)
    np.testing.assert_array_equal(taken[:, 1], 1000 * np.array(row))


def test_a_robot_that_waits_repeats_its_last_action_until_the_chunk_is_there():
    taken = run(Policy(MadeUpBackend(), execute=3, delay=2, switch="wait"), 12)[:, 0]
    np.testing.assert_array_equal(taken[:, 1] / 1000, [0, 1, 2, 2, 2, 0, 1, 2, 2, 2, 0, 1])
    np.testing.assert_array_equal(taken[:, 0], [0] * 5 + [3] * 5 + [8] * 2)  # what it saw when it began to wait


def test_without_a_delay_every_switch_is_plain_sampling():
    found = {switch: MadeUpBackend() for switch in SWITCHES}
    taken = [run(Policy(backend, execute=3, switch=switch), 10, (4, 5)) for switch, backend in found.items()]
    for other in taken[1:]:
        np.testing.assert_array_equal(other, taken[0])
    assert all(call.promised is None and not call.guided for backend in found.values() for call in backend.calls[:1])
    assert all(call.promised is None for backend in found.values() for call in backend.calls)


@pytest.mark.parametrize("switch", ["replacement", "guided"])
def test_promised_is_what_is_executed_after_limits_in_the_models_numbers_of_the_new_present(switch):
    """Actions relative to the state; the second column is cut at 4500."""
    parts = [
        {"columns": "a[:1]", "transform": "relative:state:position", "width": 1},
        {"columns": "a[1:]", "transform": "identity", "width": 2},
    ]
    backend = MadeUpBackend({"parts": parts, "states": {"state": 1}})
    limits = (-np.inf, np.array([np.inf, 4500, np.inf]))
    policy = Policy(backend, execute=4, delay=2, switch=switch, limits=limits, batch_size=2)
    taken = run(policy, 14, (0, 9))
    assert taken[..., 1].max() == 4500
    assert [call.promised is None for call in backend.calls] == [True, False, False, False]
    for asked, call in zip((4, 8, 12), backend.calls[1:], strict=True):
        promised = call.promised
        assert call.guided == (switch == "guided")
        np.testing.assert_array_equal(promised.mask, np.broadcast_to([False, True, True] + 6 * [False], (2, 9)))
        states = np.array([asked, asked + 100.0])
        for k in range(2):
            if asked + k >= 14:
                continue
            robot = taken[asked + k].astype(np.float64)  # what was executed at the promised steps
            model = np.stack([robot[:, 0] - states, robot[:, 1], robot[:, 2]], axis=1)
            np.testing.assert_allclose(promised.action[:, 1 + k], (model - OFFSET) / SCALE, rtol=1e-5)
    assert policy.actor.cut > 0


def test_naive_promises_nothing_and_a_system_that_cannot_says_that_it_switches_naively(capsys):
    naive, cannot = MadeUpBackend(), MadeUpBackend(can_promise=False)
    first = run(Policy(naive, execute=4, delay=2, switch="naive"), 12)
    assert not capsys.readouterr().err
    policy = Policy(cannot, execute=4, delay=2, switch="replacement")
    assert "cannot hold promised actions; it switches naively" in capsys.readouterr().err
    assert policy.switch == "naive"
    np.testing.assert_array_equal(run(policy, 12), first)
    assert all(call.promised is None for call in naive.calls + cannot.calls)


@pytest.mark.parametrize(
    "how,message",
    [
        ({"execute": 6, "delay": 3}, r"execute=6 and delay=3 with switch=naive: expected at most 8 together"),
        ({"execute": 2, "delay": 3}, r"delay=3 with switch=naive: expected at most execute=2"),
        ({"execute": 4, "delay": -1}, "delay=-1: expected 0 steps or more"),
        ({"execute": 9}, "execute=9: expected 1 to 8"),
        ({"switch": "late"}, "switch=late: expected one of wait, naive, replacement, guided"),
    ],
)
def test_what_a_chunk_does_not_hold_is_refused_at_the_start(how, message):
    with pytest.raises(UserError, match=message):
        Policy(MadeUpBackend(), **{"switch": "naive", **how})


def test_limits_that_an_actor_would_not_have_are_refused():
    with pytest.raises(UserError, match="limits are those of the actor"):
        Policy(Actor(MadeUpBackend()), limits=(0, 1))


def test_a_robot_may_wait_longer_than_a_chunk():
    assert run(Policy(MadeUpBackend(), execute=8, delay=20, switch="wait"), 30).shape == (30, 1, 3)


def test_noise_may_be_given():
    backend = MadeUpBackend()
    policy = Policy(backend, execute=2, seed=3)
    policy.reset([10, 20])
    drawn = [policy.act(seen(0, 0))[:, 2] for _ in range(4)]
    np.testing.assert_allclose(drawn, [[8, 13], [8, 13], [8.01, 13.01], [8.01, 13.01]])
    policy.reset([10, 20])
    noise = {"action": np.array([1.5, 2.5], np.float32)}
    given = [policy.act(seen(0, 0), noise=noise if step < 2 else None)[:, 2] for step in range(4)]
    np.testing.assert_allclose(given, [[1.5, 2.5], [1.5, 2.5], [8.01, 13.01], [8.01, 13.01]])


def test_seams_are_the_normalised_steps_where_chunks_meet():
    policy = Policy(MadeUpBackend(), execute=4, delay=2, switch="naive")
    taken = run(policy, 16, (0, 1))
    normalised = (taken.astype(np.float64) - OFFSET) / SCALE
    steps = np.diff(normalised, axis=0)[[5, 9, 13]]  # at steps 6, 10 and 14
    np.testing.assert_allclose(policy.seams(), np.sqrt(np.square(steps).mean(axis=(0, 2))), rtol=1e-5)
    policy.reset((0,))
    policy.act(seen(0))
    assert np.isnan(policy.seams()).all()


def test_rows_at_different_steps_keep_their_own_time():
    alone = run(Policy(MadeUpBackend(), execute=3, delay=2, switch="replacement"), 12, (7,))[:, 0]
    policy, steps = Policy(MadeUpBackend(), execute=3, delay=2, switch="replacement", batch_size=2), [0, 0]
    policy.reset((7, 7))
    taken: list[list[np.ndarray]] = [[], []]
    for rows in [[0], [0], [1], [0, 1], [1], [0, 1], [0], [1], [0, 1], [0, 1], [1, 0], [0], [1], [1]]:
        for row, action in zip(rows, policy.act(seen(*(steps[row] for row in rows)), rows), strict=True):
            taken[row].append(action)
            steps[row] += 1
    for row in range(2):
        np.testing.assert_array_equal(taken[row], alone[: len(taken[row])])


# --- with a thread -------------------------------------------------------------------------------------


def held(**how) -> tuple[Policy, MadeUpBackend]:
    """A policy with a thread, whose first four steps are taken and whose next answer waits for `hold`."""
    hold = threading.Event()
    hold.set()
    backend = MadeUpBackend(hold=hold)
    policy = Policy(backend, execute=4, delay=2, switch="replacement", deadline=0, **how)
    policy.reset((0,))
    for step in range(4):
        assert policy.act(seen(step))[0, 1] == 1000 * step
    hold.clear()
    return policy, backend


def let_through(policy: Policy, backend: MadeUpBackend) -> None:
    """Lets the thread answer what it was asked."""
    backend.hold.set()
    done, _ = wait([future for _, future in policy._awaited], 60)
    assert done


def test_a_late_answer_is_used_when_it_comes_and_a_stop_has_a_name_and_is_counted():
    policy, backend = held()
    try:
        for step in range(4, 8):  # due at step 6, and on it goes in the old chunk
            start = time.monotonic()
            assert policy.act(seen(step))[0, 1] == 1000 * step
            assert time.monotonic() - start < 5
        assert (policy.late, policy.stops) == (2, 0)
        message = r"step 8 of row 0 has no action: .* asked for at step 4, to be there at step 6, has not come"
        with pytest.raises(LateAnswer, match=message) as e:
            policy.act(seen(8))
        assert np.isnan(e.value.actions).all() and e.value.actions.shape == (1, 3)
        with pytest.raises(LateAnswer, match="stop 2"):
            policy.act(seen(9))
        let_through(policy, backend)
        action = policy.act(seen(10))[0]  # asked for at step 4, so its row for step 10
        assert (action[0], action[1]) == (4, 6000) and policy.stops == 2
    finally:
        backend.hold.set()
        policy.close()


def test_after_a_chunk_that_came_too_late_for_any_row_a_new_one_begins_with_its_first():
    policy, backend = held()
    try:
        for step in range(4, 8):
            policy.act(seen(step))
        for step in range(8, 12):
            with pytest.raises(LateAnswer):
                policy.act(seen(step))
        let_through(policy, backend)
        backend.hold.clear()
        with pytest.raises(LateAnswer, match="asked for at step 12, to be there at step 12, has not come"):
            policy.act(seen(12))  # the chunk of step 4 had rows up to step 11
        let_through(policy, backend)
        assert backend.calls[-1].promised is None
        actions = [policy.act(seen(step))[0] for step in (13, 14)]
        np.testing.assert_array_equal([a[0] for a in actions], [12, 12])
        np.testing.assert_array_equal([a[1] for a in actions], [0, 1000])
    finally:
        backend.hold.set()
        policy.close()


def test_an_answer_is_used_as_soon_as_the_old_chunk_ends():
    policy, backend = held()
    try:
        for step in range(4, 11):
            if step < 8:
                policy.act(seen(step))
                continue
            with pytest.raises(LateAnswer):
                policy.act(seen(step))
        let_through(policy, backend)
        executed = policy.act(seen(11))[0]  # the last row of the chunk of step 4, and the next one is asked for
        np.testing.assert_array_equal(executed[:2], [4, 7000])
        let_through(policy, backend)
        np.testing.assert_array_equal(backend.calls[-1].promised.mask.sum(), 1)
        np.testing.assert_array_equal(policy.act(seen(12))[0, :2], [11, 1000])
        assert policy.stops == 3
    finally:
        backend.hold.set()
        policy.close()


class EndsWhileAskedAbout(Future):
    """Is there from the second question on."""

    asked = False

    def done(self) -> bool:
        before, self.asked = self.asked, True
        return before


def test_an_answer_that_comes_while_answers_are_collected_is_not_lost(monkeypatch):
    policy, backend = held()
    backend.hold.set()

    def submit(function):
        future = EndsWhileAskedAbout()
        future.set_result(function())
        return future

    monkeypatch.setattr(policy._worker, "submit", submit)
    found = [policy.act(seen(step))[0, 0] for step in range(4, 8)]
    policy.close()
    np.testing.assert_array_equal(found, [0, 0, 4, 4])


def test_an_error_of_some_rows_loses_no_answer_of_others():
    """Of two answers that are there at once, the first one is an error."""
    hold, backend = threading.Event(), MadeUpBackend()
    policy = Policy(backend, execute=4, delay=2, switch="naive", deadline=0, batch_size=2)
    policy.reset((0, 1))
    policy.act(seen(0), [0])
    for step in range(1, 4):
        policy.act(seen(step, 99 + step))
    sample, errors = backend.sample, [RunError("broken")]

    def breaks_once(*args, **how):
        assert hold.wait(60)
        if errors:
            raise errors.pop()
        return sample(*args, **how)

    backend.sample = breaks_once
    try:
        for step in (4, 5):  # each row asks at its own step 4
            policy.act(seen(step, 99 + step))
        hold.set()
        wait([future for _, future in policy._awaited], 60)
        with pytest.raises(RunError, match="broken"):
            policy.act(seen(6, 105))
        assert policy.act(seen(6, 105))[1, 1] == 5000
        np.testing.assert_array_equal(policy.act(seen(7, 106))[1, :2], [104, 2000])
    finally:
        hold.set()
        policy.close()


def test_a_thread_and_a_simulators_time_give_the_same_actions():
    stepwise = run(Policy(MadeUpBackend(), execute=4, delay=2, switch="replacement"), 20)
    policy = Policy(MadeUpBackend(), execute=4, delay=2, switch="replacement", deadline=30.0)
    try:
        np.testing.assert_array_equal(run(policy, 20), stepwise)
        assert (policy.late, policy.stops) == (0, 0)
    finally:
        policy.close()


def test_an_error_in_the_thread_is_the_callers():
    backend = MadeUpBackend()
    policy = Policy(Actor(backend), execute=4, deadline=30.0)
    try:
        policy.reset((0,))
        backend.sample = lambda *args, **how: {"action": np.full((1, CHUNK + 1, 3), np.nan, np.float32)}
        with pytest.raises(Exception, match="actions are not finite"):
            policy.act(seen(0))
    finally:
        policy.close()
