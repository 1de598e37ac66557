"""Starts of sweeps without a program: members whose checkpoints differ or are damaged, and groups one after another."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tests.training import small_run
from uwm_jax.config import base
from uwm_jax.errors import Preempted, UserError
from uwm_jax.parallel import signals
from uwm_jax.sweeps import record, run
from uwm_jax.sweeps.members import Member, grid, groups, make_members
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.checkpoints.retention import Retention
from uwm_jax.training.telemetry import trackers
from uwm_jax.training.telemetry.tracker import RunFacts, Tracker
from uwm_jax.training.workdir import write_config


def save(workdir, steps, config):
    checkpoints = Checkpoints(workdir, Retention())
    for step in steps:
        assets = small_run.assets_of() | {"config": config.to_dict()}
        checkpoints.save(small_run.state_at(step), {"position": step}, small_run.CODEC, assets)
    checkpoints.close()
    write_config(workdir, config)


@pytest.fixture
def start(tmp_path):
    """A function that opens members: ({name: steps of its checkpoints}, config, name of one that has diverged)."""
    opened = []

    def make(held, config=None, diverged=""):
        while opened:
            opened.pop().checkpoints.close()
        for name, steps in held.items():
            if not (tmp_path / name).exists():
                save(tmp_path / name, steps, config or base())
            place = run.Place(Member(name, {}, config or base()), tmp_path / name, name == diverged)
            place.checkpoints = Checkpoints(place.workdir, deletes=False)
            opened.append(place)
        return list(opened)

    yield make
    for place in opened:
        place.checkpoints.close()


class Told(Tracker):
    """Keeps what it is told of its run."""

    runs: list[RunFacts] = []

    def start(self, run):
        self.runs.append(run)

    def log(self, step, scalars, pictures):
        pass

    def close(self, failed):
        pass


def test_trackers_show_the_members_as_one_group(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find", lambda names: {name: Told for name in names})
    places = [run.Place(Member(name, {}, base()), tmp_path / "lr" / "members" / name, False) for name in ("a", "b")]
    for place in places:
        place.workdir.mkdir(parents=True)
        run.open_log(place, 20, writes=True).close()
        run.open_log(place, 20, writes=False).close()
    assert [(told.group, told.name, told.step) for told in Told.runs] == [("lr", "a", 20), ("lr", "b", 20)]


class Program:
    """Stands for `SweepProgram` of the small states: holds what is put into it."""

    def __init__(self, count):
        self.members, self.alive = [jax.tree.map(jnp.zeros_like, small_run.state_at(0))] * count, [True] * count
        self.mesh = jax.make_mesh((1,), ("data",))
        system = SimpleNamespace(held=lambda state: state)
        self.program = SimpleNamespace(shapes=small_run.like(), system=system)

    def empty(self):
        return self

    def take(self, state, i):
        return self.members[i]

    def put(self, state, i, one, alive):
        self.members[i], self.alive[i] = one, alive
        return self


def files(workdir):
    return {str(p): p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file() and p.name != ".lock"}


def steps(places):
    return [place.checkpoints.steps() for place in places]


@pytest.mark.parametrize("damaged", ["assets", "data_iter"])
def test_all_fall_back_to_the_newest_step_that_is_intact_in_every_member(start, damaged, capfd):
    places = start({"a": (4, 6), "b": (2, 4, 6)})
    small_run.flip(small_run.largest_file(places[1].workdir / "checkpoints" / "6" / damaged))
    assert run.find_common_step(places) == 4
    assert steps(places) == [[4], [2, 4]] and [place.stored.step for place in places] == [4, 4]
    assert (places[1].workdir / "corrupt" / "6").is_dir() and (places[0].workdir / "set_aside" / "6").is_dir()
    said = capfd.readouterr()
    assert "checkpoint 6 is damaged" in said.err and "a: step [6] is set aside" in said.out


def test_after_damage_of_arrays_the_same_command_continues_from_an_earlier_step(start):
    held = {"a": (4, 6), "b": (4, 6)}
    places = start(held)
    small_run.flip(small_run.largest_file(places[1].workdir / "checkpoints" / "6" / "params"))
    step = run.find_common_step(places)
    with pytest.raises(UserError, match="b: .*The same command continues from an earlier step"):
        run.gather_states(places, Program(2), None, step)
    places, program = start(held), Program(2)
    assert (step := run.find_common_step(places)) == 4
    run.gather_states(places, program, None, step)
    for found in program.members:
        small_run.assert_is_step(found.replace(hparams=small_run.state_at(4).hparams), 4)


def test_no_step_is_intact_in_every_member(start):
    places = start({"a": (4, 6), "b": (6,)})
    small_run.flip(places[1].workdir / "checkpoints" / "6" / "assets" / "metadata")
    before = files(places[1].workdir)
    with pytest.raises(UserError, match="No other checkpoint of .*b.* can be read. Nothing was deleted"):
        run.find_common_step(places)
    assert files(places[1].workdir) == before


def test_a_first_save_that_was_cut_off_is_made_again(start):
    """Only then may a member without a checkpoint mean a start anew."""
    places = start({"a": (4,), "b": ()})
    assert run.find_common_step(places) == 0
    assert steps(places) == [[], []] and (places[0].workdir / "set_aside" / "4").is_dir()


@pytest.mark.parametrize("held", [{"a": (4,), "b": ()}, {"a": (), "b": ()}])
def test_members_that_have_saved_before_never_start_anew(start, tmp_path, held):
    """As where the checkpoints of one were deleted, with `keep=1` of a sweep that is done."""
    places = start(held)
    for place in places:
        place.saved = 4
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of the same step.*b: \[\]"):
        run.find_common_step(places)
    assert files(tmp_path) == before


@pytest.mark.parametrize("held", [{"a": (8,), "b": (6,)}, {"a": (4, 6), "b": ()}, {"a": (6, 8), "b": (8,), "c": (6,)}])
def test_members_without_a_common_step_are_left_as_they_are(start, tmp_path, held):
    places = start(held)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of the same step.*a: \[\d.*b: "):
        run.find_common_step(places)
    assert files(tmp_path) == before


def test_a_member_that_has_diverged_keeps_its_checkpoints_and_holds_nobody_up(start, capfd):
    """Its newest checkpoint may be older, newer or damaged: it is not read, and its zeros are not alive."""
    places = start({"a": (4, 6), "b": (2, 8)}, diverged="b")
    small_run.flip(small_run.largest_file(places[1].workdir / "checkpoints" / "8" / "params"))
    before = files(places[1].workdir)
    program = Program(2)
    assert (step := run.find_common_step(places)) == 6
    run.gather_states(places, program, None, step)
    assert program.alive == [True, False] and places[1].stored is None
    assert not any(x.any() for x in jax.tree.leaves(program.members[1].params))
    assert files(places[1].workdir) == before and steps(places) == [[4, 6], [2, 8]]
    assert not capfd.readouterr().err


def test_more_steps_of_members_whose_rate_decays_are_refused_before_anything_is_moved(start, tmp_path):
    config = base()
    config.optimizer.schedule, config.optimizer.decay_steps = "wsd", 3
    config.total_steps = 6
    places = start({"a": (2, 6), "b": (2, 4, 6)}, config)
    before = files(tmp_path)
    assert run.find_common_step(places) == 6
    longer = config.copy_and_resolve_references()
    longer.total_steps = 20
    places = start({"a": (), "b": ()}, longer)
    with pytest.raises(UserError, match=r"total_steps is 20, was 6, .*decay of the learning rate.*branch_from=.*a@2"):
        run.find_common_step(places)
    assert files(tmp_path) == before


def no_describe(*_):
    raise AssertionError("nothing starts")


def test_members_that_have_made_all_steps_are_left_alone(start, tmp_path, capsys):
    """`sweep.json`, which may lag behind after a kill, gets their last losses from their lines."""
    config = base()
    config.total_steps, config.sweep.devices = 6, 1
    places = start({"a": (4, 6), "b": (6,)}, config)
    for place in places:
        place.checkpoints.close()
        (place.workdir / "metrics.jsonl").write_text('{"step": 6, "loss": 2.5, "loss/action": 1.5, "grad_norm": 1}\n')
    before = [files(place.workdir) for place in places]
    of_sweep = record.Record(tmp_path, [place.member for place in places], [["a", "b"]], ["sweep"])
    with contextlib.ExitStack() as closing:
        assert not run.run_group(places, of_sweep, no_describe, no_describe, None, None, closing)
    assert "nothing to do: a, b have made all 6 steps" in capsys.readouterr().out
    assert [files(place.workdir) for place in places] == before
    losses = {"loss": 2.5, "loss/action": 1.5}
    assert of_sweep.members["b"] == {"overrides": {}, "status": "done", "step": 6, "last_losses": losses}


def test_a_program_all_of_whose_members_had_diverged_is_passed_over(start, capsys):
    places = start({"a": (4, 6), "b": ()})
    for place in places:
        place.diverged = True
    with contextlib.ExitStack() as closing:
        assert not run.run_group(places, None, no_describe, no_describe, None, None, closing)
    assert "all 2 members of this program have diverged before" in capsys.readouterr().out


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function that runs a sweep of three groups of two members, each of which goes so; and what it did."""
    done = []

    def start(train):
        def run_group(places, record_of_all, describe, draw, began, supervised, closing):
            done.append(([place.name for place in places], began))
            train(len(done) // 2, places, record_of_all)

        done.clear()
        monkeypatch.setattr(run, "run_group", run_group)
        config = base()
        members = make_members(config, grid({"batch_size": (2, 4, 8), "seed": (0, 1)}))
        page = functools.partial(done.append, "page")
        return run.run_sweep(
            tmp_path, groups(members), lambda _: {"command": ["sweep"]}, lambda *_: {}, page, (1.0, 2.0)
        )

    return start, done


def finish(_, places, record_of_all):
    for place in places:
        record_of_all.set(place.name, record.DONE, step=6)


def statuses(directory):
    return [member["status"] for member in record.read(directory).values()]


def test_groups_train_one_after_another(sweep, tmp_path):
    """The start of the command counts for the first one; a group all of whose members diverge ends no other."""

    def one_diverges(number, places, record_of_all):
        finish(number, places, record_of_all)
        if number == 1:
            for place in places:
                record_of_all.set(place.name, record.DIVERGED, step=3)

    start, done = sweep
    assert start(one_diverges) == ["batch_size=4,seed=0", "batch_size=4,seed=1"]
    names = [[f"batch_size={size},seed={seed}" for seed in (0, 1)] for size in (2, 4, 8)]
    assert done == [(names[0], (1.0, 2.0)), "page", (names[1], None), "page", (names[2], None), "page"]
    assert statuses(tmp_path) == ["done", "done", "diverged", "diverged", "done", "done"]


def test_a_signal_between_two_groups_ends_the_sweep_and_it_continues(sweep, tmp_path):
    """It came after the last turn of a group, which therefore did not see it."""

    def told_in_the_first(number, places, record_of_all):
        signals.take()
        os.kill(os.getpid(), signal.SIGTERM)
        finish(number, places, record_of_all)

    start, done = sweep
    with pytest.raises(Preempted, match=r"told to end \(SIGTERM\): 1 of 3 programs are done") as told:
        start(told_in_the_first)
    assert told.value.status == 143 and len(done) == 3 and signals.received() is None
    assert statuses(tmp_path) == ["done", "done", *["waiting"] * 4]
    start(finish)
    assert statuses(tmp_path) == ["done"] * 6


def test_members_of_a_group_that_fails_are_stopped(sweep, tmp_path):
    def fail(number, places, record_of_all):
        record_of_all.set(places[0].name, record.DIVERGED, step=2)
        record_of_all.set(places[1].name, record.TRAINING, step=4)
        raise UserError("by chance")

    start, done = sweep
    with pytest.raises(UserError, match="by chance"):
        start(fail)
    assert statuses(tmp_path) == ["diverged", "stopped", *["waiting"] * 4] and done[1] == "page"
