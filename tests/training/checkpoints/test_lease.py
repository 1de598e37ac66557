"""The lock of a workdir in a bucket: who may take it, when it is lost, and that one of several writers has it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time

import pytest

from uwm_jax import files
from uwm_jax.storage.errors import StorageError
from uwm_jax.training.checkpoints import lease as lease_lib
from uwm_jax.training.checkpoints.lease import Lease, LostLock, Record
from uwm_jax.training.checkpoints.steps import parse_tenures

# The preconditions of `files` are the same in a folder as in a bucket, where test_bucket.py takes the lock.


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only in `sleep`; no thread renews."""
    now = [1000.0]
    monkeypatch.setattr(lease_lib, "_now", lambda: now[0])
    monkeypatch.setattr(Lease, "_keep", lambda self: None)
    return now


def record_of(workdir) -> Record:
    return Record.parse((workdir / ".lock").read_bytes())


def write(workdir, **changes) -> Record:
    """The lock of a holder on another machine."""
    record = dataclasses.replace(Record.own({}), holder="process 7 on elsewhere", machine="elsewhere", **changes)
    files.write_bytes(workdir / ".lock", record.encode())
    return record


def must_not_wait(seconds):
    raise AssertionError("it waits")


def test_a_released_lock_is_taken_at_once_and_names_its_holder(tmp_path):
    first = Lease.take(tmp_path, must_not_wait)
    first.release()
    assert record_of(tmp_path).released
    second = Lease.take(tmp_path, must_not_wait)
    found = record_of(tmp_path)
    assert found.nonce == second.nonce != first.nonce and not found.released
    assert str(found.pid) in found.holder and parse_tenures(found.encode()).nonce == second.nonce
    second.release()


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_at_once(tmp_path):
    program = (
        "import os, pathlib, sys; from uwm_jax.training.checkpoints.lease import Lease;"
        "Lease.take(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == -9
    assert not record_of(tmp_path).released
    taken = Lease.take(tmp_path, must_not_wait)
    assert isinstance(taken, Lease) and record_of(tmp_path).nonce == taken.nonce
    taken.release()


def test_another_process_under_the_number_of_a_dead_holder_is_not_the_holder(tmp_path):
    dead = dataclasses.replace(Record.own({}), started="1")  # this process did not begin then
    files.write_bytes(tmp_path / ".lock", dead.encode())
    assert isinstance(taken := Lease.take(tmp_path, must_not_wait), Lease)
    taken.release()


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_a_process_that_proc_hides_is_not_dead(tmp_path, monkeypatch, error):
    """That of another user where /proc is mounted with hidepid=1 or 2."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record = dataclasses.replace(Record.own({}), pid=other.pid, started=lease_lib._started(other.pid))
    read_text = lease_lib.Path.read_text

    def hidden(path):
        if path.name == "stat":
            raise error
        return read_text(path)

    monkeypatch.setattr(lease_lib.Path, "read_text", hidden)
    try:
        assert not record.is_dead()
    finally:
        other.kill()
        other.wait()
    assert record.is_dead() == (error is FileNotFoundError)


def test_a_holder_without_a_sign_of_life_loses_the_lock_after_its_own_lease(tmp_path, clock, capsys):
    silent = write(tmp_path, lease_seconds=90.0)

    def sleep(seconds):
        clock[0] += seconds

    taken = Lease.take(tmp_path, sleep)
    assert isinstance(taken, Lease) and 90 <= clock[0] - 1000 < 94
    assert record_of(tmp_path).nonce == taken.nonce != silent.nonce
    assert "held by process 7 on elsewhere; waiting up to 90 s for a sign of life" in capsys.readouterr().err


@pytest.mark.parametrize("released", [False, True])
def test_a_holder_that_writes_while_another_waits_is_alive_or_has_ended(tmp_path, clock, released):
    record = write(tmp_path)
    waits = []

    def sleep(seconds):
        clock[0] += seconds
        waits.append(seconds)
        if len(waits) == 3:
            changed = dataclasses.replace(record, renewals=1, released=released)
            files.write_bytes(tmp_path / ".lock", changed.encode())

    taken = Lease.take(tmp_path, sleep)
    assert len(waits) == 3
    assert isinstance(taken, Lease) if released else taken == "process 7 on elsewhere"
    assert (record_of(tmp_path).nonce == record.nonce) != released


@pytest.mark.parametrize("before", ["nothing", "released"])
def test_of_many_starts_at_once_one_takes_the_lock(tmp_path, before, clock):
    if before == "released":
        Lease.take(tmp_path, must_not_wait).release()
    together, taken = threading.Barrier(8), []

    def sleep(seconds):
        """Where a process waits for a sign of life, the one that was faster renews."""
        for lease in [t for t in taken if isinstance(t, Lease)]:
            lease.renew()

    def start():
        together.wait()
        taken.append(Lease.take(tmp_path, sleep))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [t for t in taken if isinstance(t, Lease)]
    assert len(winners) == 1 and len(taken) == 8
    assert record_of(tmp_path).nonce == winners[0].nonce
    assert all("process" in holder for holder in taken if holder is not winners[0])


def test_a_thread_renews_a_lock_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_lib, "LEASE_SECONDS", 2.0)  # a busy machine may not run the thread for a second
    taken = Lease.take(tmp_path)
    ends = time.monotonic() + 60
    while record_of(tmp_path).renewals < 3 and time.monotonic() < ends:
        time.sleep(0.05)
    assert record_of(tmp_path).renewals >= 3
    taken.check()
    assert "process" in Lease.take(tmp_path), "who waits for a lease sees it renewed"
    taken.release()
    renewals = record_of(tmp_path).renewals
    time.sleep(0.7)
    assert record_of(tmp_path).renewals == renewals, "the thread has ended"


def test_a_holder_that_was_stopped_finds_out_before_it_does_anything(tmp_path, clock, monkeypatch):
    first = Lease.take(tmp_path)
    clock[0] += 44
    monkeypatch.setattr(files, "replace_if", must_not_wait)
    first.check()  # fresh: costs nothing
    monkeypatch.undo()
    monkeypatch.setattr(lease_lib, "_now", lambda: clock[0])
    monkeypatch.setattr(Lease, "_keep", lambda self: None)
    clock[0] += 2
    first.check()  # renews
    assert record_of(tmp_path).renewals == 1
    clock[0] += 1000
    other = write(tmp_path)
    for _ in range(2):
        with pytest.raises(LostLock, match=r"lost the lock.* not renew for 1000 s: process 7 on elsewhere has it"):
            first.check()
    with pytest.raises(LostLock):
        first.renew()
    first.release()
    assert record_of(tmp_path) == other, "nothing of the other's is written"


def test_a_renewal_whose_answer_was_lost_is_no_loss_of_the_lock(tmp_path, clock, monkeypatch):
    lease = Lease.take(tmp_path, must_not_wait)
    honest = files.replace_if

    def lost(place, data, generation):
        honest(place, data, generation)
        raise StorageError("writing", str(place), "no answer in time")

    monkeypatch.setattr(files, "replace_if", lost)
    clock[0] += 15
    with pytest.raises(StorageError):
        lease.renew()
    monkeypatch.setattr(files, "replace_if", honest)
    clock[0] += 55
    lease.check()  # of a renewal that is 70 s old, as far as this process knows
    assert record_of(tmp_path).nonce == lease.nonce
    monkeypatch.setattr(files, "replace_if", lost)
    with pytest.raises(StorageError):
        lease.renew()
    monkeypatch.setattr(files, "replace_if", honest)
    lease.release()
    assert record_of(tmp_path).released
    other = write(tmp_path)  # and one that is really lost stays so
    second = Lease.take(tmp_path, lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    assert isinstance(second, Lease) and second.nonce != other.nonce
    write(tmp_path)
    with pytest.raises(LostLock, match="process 7 on elsewhere"):
        second.renew()


def test_a_bucket_that_cannot_be_reached_is_told_when_the_lease_ends(tmp_path, clock, monkeypatch, capsys):
    taken = Lease.take(tmp_path)

    def fail(*_):
        raise StorageError("writing", "gs://bkt/run/.lock", "503", status=503)

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace_if", fail)
        taken.check()
        clock[0] += 46
        with pytest.raises(StorageError, match=r"gs://bkt/run/.lock: writing failed: 503"):
            taken.check()
    taken.check()  # the bucket is back, and nobody has taken the lock
    with monkeypatch.context() as patch:
        patch.setattr(files, "replace_if", fail)
        taken.release()
    assert "The lock ends by itself in 60 s" in capsys.readouterr().err
    assert not record_of(tmp_path).released


def test_markers_of_earlier_holders_count_as_far_as_they_came(tmp_path):
    """Marked for good when the lock is taken; what comes later is not among them."""
    directory = tmp_path / "checkpoints"
    first = Lease.take(tmp_path)
    for step in (2, 4):
        (directory / f"{step}-{first.nonce}").mkdir(parents=True)
        files.create(directory / f"{step}-{first.nonce}.commit", b"")
    first.release()
    second = Lease.take(tmp_path)
    assert record_of(tmp_path).earlier == {first.nonce: 4}
    second.release()
    third = Lease.take(tmp_path)
    assert record_of(tmp_path).earlier == {first.nonce: 4}, "the second saved nothing"
    third.release()
