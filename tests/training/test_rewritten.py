"""An object that a run keeps extending: whole at any time, and never over what another process has written."""

from __future__ import annotations

import time

import pytest

from uwm_jax import files
from uwm_jax.errors import RunError
from uwm_jax.storage.errors import StorageError
from uwm_jax.training import rewritten
from uwm_jax.training.rewritten import Rewritten

LONG = 1e6  # seconds: the thread puts nothing by itself


@pytest.fixture(params=["local", "bucket"])
def place(request, tmp_path):
    """A file of a folder, and an object of a bucket: both have generations."""
    folder = tmp_path if request.param == "local" else request.getfixturevalue("bucket")
    return files.as_place(folder) / "metrics.jsonl"


def test_a_thread_puts_what_is_appended(place):
    kept = Rewritten(place, b"1\n", seconds=0.02)
    assert place.read_bytes() == b"1\n" and not kept.behind
    kept.append(b"2\n")
    kept.append(b"3\n")
    deadline = time.monotonic() + 20
    while kept.behind and time.monotonic() < deadline:
        time.sleep(0.01)
    assert place.read_bytes() == b"1\n2\n3\n"
    kept.replace(b"other")
    kept.close()
    assert place.read_bytes() == b"other" and not kept.behind


def test_flush_returns_when_the_bucket_has_everything(place):
    kept = Rewritten(place, seconds=LONG)
    kept.append(b"1\n")
    assert kept.behind and place.read_bytes() == b""
    kept.flush()
    assert not kept.behind and place.read_bytes() == b"1\n"
    kept.close()


def test_who_has_lost_the_object_to_another_overwrites_nothing(place):
    first = Rewritten(place, b"first", seconds=LONG)
    second = Rewritten(place, b"second", seconds=LONG)
    first.append(b" goes on")
    for _ in range(2):
        with pytest.raises(RunError, match=r"metrics\.jsonl: another process has written it"):
            first.flush()
    assert first.failure and place.read_bytes() == b"second"
    second.append(b" goes on")
    second.flush()
    assert place.read_bytes() == b"second goes on"
    with pytest.raises(RunError, match="another process"):
        first.close()
    second.close()
    assert place.read_bytes() == b"second goes on"


@pytest.mark.parametrize("carried_out", [False, True])
def test_after_puts_whose_answers_were_lost_the_next_one_counts(place, monkeypatch, carried_out):
    kept = Rewritten(place, b"1\n", seconds=LONG)
    honest = rewritten.replace_if

    def lost(place, data, generation):
        if carried_out and data == b"1\n2\n":  # of the two that fail, the first one arrives
            honest(place, data, generation)
        raise StorageError("writing", str(place), "no answer in time")

    monkeypatch.setattr(rewritten, "replace_if", lost)
    for line in (b"2\n", b"3\n"):
        kept.append(line)
        with pytest.raises(StorageError):
            kept.flush()
        assert kept.behind and "no answer in time" in kept.failure
    monkeypatch.setattr(rewritten, "replace_if", honest)
    kept.append(b"4\n")
    kept.flush()
    assert place.read_bytes() == b"1\n2\n3\n4\n" and not kept.failure
    kept.close()


def test_an_object_that_somebody_has_deleted_is_written_again(place):
    kept = Rewritten(place, b"1\n", seconds=LONG)
    place.unlink()
    kept.append(b"2\n")
    kept.flush()
    assert place.read_bytes() == b"1\n2\n"
    kept.close()


def test_a_put_that_fails_in_the_thread_is_told_by_the_next_flush_alone(place, monkeypatch):
    kept = Rewritten(place, seconds=0.02)

    def fail(*_):
        raise StorageError("writing", str(place), "503")

    monkeypatch.setattr(rewritten, "replace_if", fail)
    kept.append(b"1\n")
    deadline = time.monotonic() + 20
    while not kept.failure and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "503" in kept.failure and kept.behind
    monkeypatch.undo()
    kept.close()
    assert place.read_bytes() == b"1\n"
