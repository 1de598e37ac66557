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
        self.states, self.said, self.label, self.done, self.failing = states, workers, label, [], []

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
        if self.failing:
            raise self.failing.pop()

    def delete(self, force):
        self.done.append(f"delete {force=}")


@pytest.fixture
def watched():
    """A function that watches a scripted TPU; returns what was done, with the clock's time at the end."""

    def watch(states, workers=(["ended 0"],), steps=(3,), label="c0ffee", hours=100.0, failing=()):
        clock, steps = Clock(), list(steps)
        resource = Scripted(clock, list(states), list(workers), label)
        resource.failing = list(failing)

        def newest():
            step = steps.pop(0) if len(steps) > 1 else steps[0]
            if isinstance(step, Exception):
                raise step
            return step

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
    for other in ("ended 0", "ended 143"):
        with pytest.raises(RunError, match="ended with status 1 on 1 of 2 workers.*launch.tpu tail"):
            watched(["ACTIVE"], [[other, "running"], [other, "ended 1"]])


AGAIN = ["delete force=False", "create", "install", "start"]


def test_what_is_taken_away_is_made_anew(watched):
    states = ["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert watched(states, [["running"], ["not installed"], ["running"], ["ended 0"]]) == AGAIN


def test_a_replacement_that_fails_in_the_middle_is_finished(watched):
    """Nothing else may have deleted it: that it is gone was this launcher's doing."""
    states = ["ACTIVE", "SUSPENDED", None, "PROVISIONING", "ACTIVE"]
    workers = [["running"], ["not installed"], ["ended 0"]]
    done = watched(states, workers, failing=[RunError("status 1: gcloud create: no network")])
    assert done == [AGAIN[0], "create", "create", "install", "start"]


def test_a_creation_that_failed_but_happened_is_no_debt(watched):
    """What this launcher has asked for is there; whoever deletes it later is another."""
    states = ["ACTIVE", "SUSPENDED", "ACTIVE", None]
    with pytest.raises(RunError, match="it is gone, deleted by somebody"):
        watched(states, [["running"], ["running"]], failing=[RunError("status 124: gcloud create")])
    assert watched.done == AGAIN[:2]


def test_nothing_else_is_ever_replaced(watched):
    with pytest.raises(UserError, match="not the resource that was created from here"):
        watched(["ACTIVE", "SUSPENDED"], [["running"]], label="another")
    assert watched.done == []
    with pytest.raises(RunError, match="it is gone, deleted by somebody"):
        watched(["ACTIVE", None], [["running"]])
    assert watched.done == []


@pytest.mark.parametrize("down", ["lost", "not started", "ended 143"])
def test_a_host_that_was_started_anew_gets_its_run_back(watched, down):
    looks = [["running", down]] * 6 + [["running", "running"], ["ended 0", "ended 0"]]
    assert watched(["ACTIVE"], looks) == ["start"]
    assert watched(["ACTIVE"], looks[-3:]) == [], "within the time in which it may be taken away"


def test_a_launcher_that_was_interrupted_goes_on(watched):
    states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert watched(states, [["not installed"], ["running"], ["ended 0"]]) == ["install", "start"]


def test_a_run_that_was_told_to_end_goes_on_elsewhere(watched):
    """The cloud sends SIGTERM first, on which everything is saved, and then takes the machines away."""
    states = ["ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE"]
    done = watched(states, [["running"], ["ended 143", "ended 143"], ["not installed"], ["ended 0"]])
    assert done == AGAIN


def test_replacing_without_progress_has_an_end(watched):
    with pytest.raises(RunError, match=f"{REPLACEMENTS} times without a new checkpoint .the newest: none"):
        watched(["SUSPENDED"], steps=[None])
    assert watched.done.count("create") == REPLACEMENTS
    with pytest.raises(RunError, match="the newest: step 9"):
        watched(["SUSPENDED"], steps=[*range(10)])
    assert watched.done.count("create") == 9 + REPLACEMENTS
    with pytest.raises(RunError, match="the newest: none"):
        watched(["SUSPENDED"], steps=[RunError("the bucket cannot be reached")])
    with pytest.raises(RunError, match="not started once more"):
        watched(["ACTIVE"], [["lost"]])
    assert watched.done == ["start"] * REPLACEMENTS


def test_what_hangs_has_a_limit(watched):
    with pytest.raises(RunError, match="still SUSPENDING after 30 min"):
        watched(["SUSPENDING"])
    assert SUSPEND_SECONDS <= watched.clock.now < SUSPEND_SECONDS + 120
    with pytest.raises(RunError, match="not ACTIVE within 24 h .it is PROVISIONING"):
        watched(["ACTIVE", "SUSPENDED", "PROVISIONING"], [["running"]])
    assert 24 * 3600 <= watched.clock.now < 24 * 3600 + 300
    with pytest.raises(RunError, match="FAILED: it was not ACTIVE within 24 h, or cannot be"):
        watched(["ACTIVE", "SUSPENDED", "PROVISIONING", "FAILED"], [["running"]])
    assert watched.done == AGAIN[:2]
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


def test_workers_that_say_nothing_are_a_look_that_failed(monkeypatch):
    resource = Resource(Gcloud(), "my-tpu", "z", ORDER)
    monkeypatch.setattr(resource.gcloud, "output", lambda *_, **__: "Using ssh batch size of 1\n")
    with pytest.raises(RunError, match="my-tpu: no worker said how its run is; SSH brought 'Using ssh"):
        resource.workers()


def test_waiting_in_the_queue_has_a_limit():
    clock = Clock()
    resource = Scripted(clock, ["WAITING_FOR_RESOURCES"], [])
    with pytest.raises(RunError, match="my-tpu: not ACTIVE within 24 h .it is WAITING_FOR_RESOURCES"):
        Resource.wait(resource, 24)
    assert 24 * 3600 <= clock.now < 24 * 3600 + 120
    with pytest.raises(RunError, match="it is FAILED and was never ACTIVE"):
        Resource.wait(Scripted(clock, ["PROVISIONING", "FAILED"], []), 24)
