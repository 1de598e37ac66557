"""Checkpoints in a bucket: nothing half-written counts, and nothing of a run that lost its lock does."""

from __future__ import annotations

import json
import threading

import jax
import numpy as np
import pytest

from tests.training import small_run
from uwm_jax import files
from uwm_jax.errors import RunError, UserError
from uwm_jax.files import RemotePath, as_place
from uwm_jax.training.checkpoints import lease as lease_lib
from uwm_jax.training.checkpoints import lock, steps
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step
from uwm_jax.training.checkpoints.lease import Lease, LostLock
from uwm_jax.training.checkpoints.reader import CheckpointReader


@pytest.fixture
def workdir(bucket):
    return as_place(bucket) / "run"


def save(checkpoints, step, *, of=None):
    """Saves, as this step, the state of `of`."""
    state = small_run.state_at(step if of is None else of).replace(step=np.int32(step))
    checkpoints.save(state, {"position": 8 * step}, small_run.CODEC, small_run.assets_of())


def nonces(workdir):
    return {step: folder.nonce for step, folder in steps.finished_in(workdir / "checkpoints").items()}


def objects_of(workdir):
    """{object: generation} of all checkpoints."""
    return {str(path): found.generation for path, found in (workdir / "checkpoints").objects()}


def assert_restores(workdir, step):
    checkpoints = Checkpoints(workdir, read_only=True)
    state, stored = checkpoints.restore_latest(small_run.like())
    assert stored.step == step
    small_run.assert_is_step(state, step)
    np.testing.assert_array_equal(stored.codec["components"], small_run.CODEC["components"])


def test_a_run_is_saved_keeps_its_newest_and_comes_back_bit_for_bit(workdir):
    assert latest_step(workdir) is None
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        Checkpoints(workdir, read_only=True)
    small_run.save_steps(workdir, 2, 4, 6, keep=2)
    assert steps.steps_in(workdir / "checkpoints") == [4, 6]
    nonce = json.loads((workdir / ".lock").read_bytes())["nonce"]
    names = steps.names_in(workdir / "checkpoints")
    assert names == {f"{step}-{nonce}{suffix}" for step in (4, 6) for suffix in ("", ".commit")}, "2 is gone altogether"
    marker = json.loads((workdir / "checkpoints" / f"6-{nonce}.commit").read_bytes())
    assert marker == {"step": 6, "nonce": nonce}
    assert_restores(workdir, 6)
    with pytest.raises(RunError, match="another run has meanwhile saved step 6"):
        Checkpoints(workdir, first_start=True)
    small_run.save_steps(workdir, 8, keep=2)  # the lock was given back, so it is another start
    assert nonces(workdir) == {6: nonce, 8: json.loads((workdir / ".lock").read_bytes())["nonce"]}
    assert len(set(nonces(workdir).values())) == 2


def test_what_was_saved_without_a_marker_counts_for_nothing_and_is_cleared(workdir):
    """A kill between orbax's commit and the marker, and one in the middle of a deletion, after its marker is gone."""
    small_run.save_steps(workdir, 2, 4)
    marker = next((workdir / "checkpoints").glob("4-*.commit"))
    folder = marker.with_suffix("")
    assert (folder / "commit_success.txt").is_file(), "orbax takes it for whole"
    marker.unlink()
    files.write_text(workdir / "checkpoints" / "9" / "assets" / "data", "uploaded by somebody")
    files.write_text(workdir / "checkpoints" / "7-0123456789ab.commit", "left by a holder that lost the lock")
    assert latest_step(workdir) == 2
    assert_restores(workdir, 2)
    assert folder.is_dir(), "who only reads deletes nothing"
    checkpoints = Checkpoints(workdir)
    found = {name.partition("-")[0] for name in steps.names_in(workdir / "checkpoints")}
    assert found == {"2", "9"}, "what somebody uploaded is not deleted"
    save(checkpoints, 4)
    checkpoints.close()
    assert_restores(workdir, 4)


def test_a_damaged_checkpoint_is_marked_and_the_one_before_it_is_used(workdir, capsys):
    small_run.save_steps(workdir, 2, 4)
    stored = CheckpointReader(workdir / "checkpoints", 4)
    largest = max((stored.path / "params").objects(), key=lambda found: found[1].st_size)[0]
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 16
    files.write_bytes(largest, bytes(data))
    assert_restores(workdir, 2)
    assert steps.steps_in(workdir / "checkpoints") == [2, 4], "who only reads marks nothing"
    checkpoints = Checkpoints(workdir)
    state, found = checkpoints.restore_latest(small_run.like())
    assert found.step == 2 and f"It lies in {stored.path}; step 2 is used instead" in capsys.readouterr().err
    assert steps.steps_in(workdir / "checkpoints") == [2]
    save(checkpoints, 4)
    checkpoints.wait()
    assert_restores(workdir, 4)
    assert checkpoints.set_aside(2) == [4] and checkpoints.steps() == [2]
    checkpoints.close()
    Checkpoints(workdir).close()
    left = {name.partition(".")[2] for name in steps.names_in(workdir / "checkpoints") if "." in name}
    assert left == {"commit", "corrupt", "set_aside"} and stored.path.is_dir(), "what was left out is kept"


def test_an_uploaded_workdir_counts_when_it_is_marked_and_a_downloaded_one_as_it_is(workdir, tmp_path):
    local = small_run.save_steps(tmp_path / "local", 2, 4)
    files.copy_tree(local, workdir)
    assert latest_step(workdir) is None
    assert steps.mark(workdir) == [2, 4]
    assert_restores(workdir, 4)
    small_run.save_steps(workdir, 6, keep=2)
    assert steps.steps_in(workdir / "checkpoints") == [4, 6]
    files.copy_tree(workdir, tmp_path / "back")
    assert_restores(tmp_path / "back", 6)
    small_run.save_steps(tmp_path / "back", 8, keep=2)
    assert steps.steps_in(tmp_path / "back" / "checkpoints") == [6, 8]


@pytest.fixture
def others(monkeypatch):
    """A function that makes `Checkpoints` as another process would: with a lease of its own."""
    monkeypatch.setattr(lease_lib, "LEASE_SECONDS", 1.0)

    def start(workdir, **fields):
        monkeypatch.setattr(lock, "_held", {})
        checkpoints = Checkpoints(workdir, **fields)
        return checkpoints, lock._held

    return start


# Where a holder may be stopped for longer than its lease, at the end of a save; in its middle: test_takeover.py.
MOMENTS = ["before its fresh look at the lock", "between that and its marker", "after its marker"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_that_a_holder_writes_after_its_lock_was_taken_over_counts(workdir, others, moment, monkeypatch):
    monkeypatch.setattr(Lease, "_keep", lambda self: None)  # as that of a process that is stopped
    first, held_by_first = others(workdir)
    save(first, 2)
    first.wait()
    stopped, goes_on = threading.Event(), threading.Event()
    lease = held_by_first[workdir][0]
    renew, count = lease.renew, []

    def renew_then_stop():
        count.append(1)
        if len(count) == {MOMENTS[0]: 1, MOMENTS[2]: 2}.get(moment):
            stopped.set()
            assert goes_on.wait(60)
        renew()

    monkeypatch.setattr(lease, "renew", renew_then_stop)
    create = files.create

    def stop_then_create(place, data):
        if moment == MOMENTS[1] and place.name.endswith(f"{lease.nonce}.commit"):
            stopped.set()
            assert goes_on.wait(60)
        return create(place, data)

    monkeypatch.setattr(files, "create", stop_then_create)
    save(first, 4)
    assert stopped.wait(60)
    second, held_by_second = others(workdir)
    taken = 4 if moment == MOMENTS[2] else 2  # the marker was there before the lock changed hands
    assert latest_step(workdir) == taken
    state, stored = second.restore_latest(small_run.like())
    small_run.assert_is_step(state, taken)
    save(second, taken + 2, of=100)
    second.wait()
    before = {name: g for name, g in objects_of(workdir).items() if second._folders._nonce in name}
    monkeypatch.setattr(lock, "_held", held_by_first)
    goes_on.set()
    with pytest.raises(LostLock, match="has lost the lock of .* nothing that it still writes"):
        first.wait()
    with pytest.raises(LostLock):
        first.check()
    first.close()
    monkeypatch.setattr(lock, "_held", held_by_second)
    assert latest_step(workdir) == taken + 2
    assert nonces(workdir)[taken + 2] == second._folders._nonce
    after = objects_of(workdir)
    assert {name: after.get(name) for name in before} == before, "nothing of the other's is overwritten"
    found, _ = Checkpoints(workdir, read_only=True).restore_latest(small_run.like())
    jax.tree.map(np.testing.assert_array_equal, found.params, small_run.state_at(100).params)
    second.check()
    second.close()
    third, _ = others(workdir)
    third.close()
    mine = {folder.nonce for folder in steps.folders_among(steps.names_in(workdir / "checkpoints"))}
    assert mine == set(nonces(workdir).values()), "the next start clears what does not count"


def test_two_starts_that_meet_in_one_process_share_the_lock(workdir):
    assert lock.hold(workdir) is None and lock.hold(workdir) is None
    lock.release(workdir)
    lock.check(workdir)
    assert isinstance(lock.lease_of(workdir), Lease) and isinstance(workdir, RemotePath)
    lock.release(workdir)
    assert lock.lease_of(workdir) is None
    lock.check(workdir)
    assert json.loads((workdir / ".lock").read_bytes())["released"]
