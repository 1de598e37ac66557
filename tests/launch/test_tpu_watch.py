"""A watched run: its end, hosts that start anew, a TPU that is taken away, and every limit, by a clock of the test."""

from __future__ import annotations

import pytest

from launch.gcloud import Gcloud
from launch.tpu_resource import QUEUED, Order, Resource
from launch.tpu_watch import REPLACEMENTS, SUSPEND_SECONDS, UNSEEN_SECONDS, Watch
from uwm_jax.errors import RunError, UserError

ORDER = Order("v4-16", 1, vm=False, runtime="r", hours=24, identity="c0ffee")


class Clock:
    now = 0.0

    def sleep(self, seconds):
        self.now += seconds


class Scripted(Resource):
    """A TPU whose states and workers come from lists, of which the last entry stays."""

    def __init__(self, clock, states, workers, label="c0ffee"):
        super().__init__(Gcloud(), "my-tpu", "z", ORDER, QUEUED, clock.sleep, lambda: clock.now)
        self.states, self.said, self.label, self.done = states, workers, label, []

    def describe(self):
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        labels = {"labels": {"uwm-jax-launch": self.label}}
        return state and {"state": {"state": state}, "tpu": {"nodeSpec": [{"node": labels}] * 2}}

    def workers(self):
        return self.said.pop(0) if len(self.said) > 1 else self.said[0]

    def create(self):
        self.done.append("create")

    def delete(self, force):
        self.done.append(f"delete {force=}")

    def wait(self, hours):
        self.done.append(f"wait {hours}")


@pytest.fixture
def watched():
    """A function that watches a scripted TPU; returns what was done, with the clock's time at the end."""

    def watch(states, workers=(["ended 0"],), steps=(3,), label="c0ffee", hours=100.0):
        clock, steps = Clock(), list(steps)
        resource = Scripted(clock, list(states), list(workers), label)

        def newest():
            return steps.pop(0) if len(steps) > 1 else steps[0]

        done = resource.done
        arguments = (lambda: done.append("install"), lambda: done.append("start"), newest, 24.0, hours, 60.0)
        watch.clock = clock
        watch.done = done
        Watch(resource, *arguments, say=lambda line: None, sleep=clock.sleep, now=lambda: clock.now).run()
        return done

    return watch


def test_a_run_that_ends_well_is_left_alone(watched):
    running = [["running", "running"], ["running", "ended 0"], ["ended 0", "ended 0"]]
    assert watched(["ACTIVE"], running) == []
    assert watched.clock.now == 120


def test_a_run_that_fails_on_any_worker_is_told(watched):
    with pytest.raises(RunError, match="ended with status 1 on 1 of 2 workers.*launch.tpu tail"):
        watched(["ACTIVE"], [["ended 0", "running"], ["ended 0", "ended 1"]])


def test_what_is_taken_away_is_made_anew(watched):
    states = ["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "ACTIVE"]
    assert watched(states, [["running"], ["ended 0"]]) == [
        *("delete force=False", "create", "wait 24.0", "install", "start"),
    ]


def test_nothing_else_is_ever_replaced(watched):
    with pytest.raises(UserError, match="not the resource that was created from here"):
        watched(["ACTIVE", "SUSPENDED"], [["running"]], label="another")
    assert watched.done == []
    with pytest.raises(RunError, match="it is gone, deleted by somebody"):
        watched(["ACTIVE", None], [["running"]])
    assert watched.done == []


def test_a_host_that_was_started_anew_gets_its_run_back(watched):
    assert watched(["ACTIVE"], [["running", "lost"], ["running", "running"], ["ended 0", "ended 0"]]) == ["start"]


def test_replacing_without_progress_has_an_end(watched):
    with pytest.raises(RunError, match=f"replaced {REPLACEMENTS} times without a new checkpoint .the newest: none"):
        watched(["SUSPENDED"], steps=[None])
    assert watched.done.count("create") == REPLACEMENTS
    with pytest.raises(RunError, match="the newest: step 9"):
        watched(["SUSPENDED"], steps=[*range(10)])
    assert watched.done.count("create") == 9 + REPLACEMENTS


def test_what_hangs_has_a_limit(watched):
    with pytest.raises(RunError, match="still SUSPENDING after 30 min"):
        watched(["SUSPENDING"])
    assert SUSPEND_SECONDS <= watched.clock.now < SUSPEND_SECONDS + 120
    with pytest.raises(RunError, match="watched for 5 h. The run may go on"):
        watched(["ACTIVE"], [["running"]], hours=5.0)
    assert 5 * 3600 <= watched.clock.now < 5 * 3600 + 120


def test_looks_may_fail_for_a_while(watched, capsys):
    failed = RunError("status 1: no network")
    assert watched([failed] * 10 + ["ACTIVE"]) == []
    assert capsys.readouterr().err.count("warning: my-tpu: status 1: no network") == 10
    with pytest.raises(RunError, match="no look at it succeeded in 60 min. The run may go on"):
        watched([failed])
    assert UNSEEN_SECONDS <= watched.clock.now < UNSEEN_SECONDS + 120


def test_waiting_in_the_queue_has_a_limit():
    clock = Clock()
    resource = Scripted(clock, ["WAITING_FOR_RESOURCES"], [])
    with pytest.raises(RunError, match="my-tpu: not ACTIVE within 24 h .it is WAITING_FOR_RESOURCES"):
        Resource.wait(resource, 24)
    assert 24 * 3600 <= clock.now < 24 * 3600 + 120
    with pytest.raises(RunError, match="it is FAILED and was never ACTIVE"):
        Resource.wait(Scripted(clock, ["PROVISIONING", "FAILED"], []), 24)
