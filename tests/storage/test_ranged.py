"""Ranges of files in a folder: those that were asked for, whatever the requests meet, or an error that says so."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from uwm_jax import files
from uwm_jax.benchmarking.fault_proxy import fault_proxy
from uwm_jax.files import as_place
from uwm_jax.storage import ranged
from uwm_jax.storage.errors import StorageError
from uwm_jax.storage.ranged import RangedFolder

DATA = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> RangedFolder:
    (tmp_path / "a").write_bytes(DATA)
    return RangedFolder(tmp_path)


def test_ranges_are_read_begun_or_not(folder: RangedFolder) -> None:
    assert folder.read("a", 10, 300) == DATA[10:300]
    for start in (0, 500, 500):
        folder.begin("a", start, start + 100)
    assert [folder.read("a", start, start + 100) for start in (500, 0, 500)] == [
        DATA[start : start + 100] for start in (500, 0, 500)
    ]
    assert not folder._begun and not folder._bytes


def test_what_is_begun_and_not_taken_is_bounded(folder: RangedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged, "MOST_BYTES", 1000)
    for start in range(0, 5000, 400):
        folder.begin("a", start, start + 400)
    assert len(folder._begun) == 2 and folder._bytes == 800
    assert folder.read("a", 0, 400) == DATA[:400], "given up, and read again"
    folder.forget()
    assert not folder._begun and not folder._bytes


def test_what_is_not_there_is_told(folder: RangedFolder) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        folder.read("b", 0, 5)
    assert missing.value.filename.endswith("/b")
    with pytest.raises(ValueError, match="ends before"):
        folder.read("a", len(DATA) - 5, len(DATA) + 5)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("UNAVAILABLE: CURL error Could not connect to server", OSError),
        ("DEADLINE_EXCEEDED: Error reading: timed out", OSError),
        ("INVALID_ARGUMENT: Error reading: HTTP response code: 400", StorageError),
        ("OUT_OF_RANGE: Requested byte range [3, 4) is not valid", ValueError),
    ],
)
def test_errors_are_passing_or_told(said: str, kind: type[Exception]) -> None:
    found = ranged._told(ValueError(said), "gs://b/a")
    assert type(found) is kind
    if isinstance(found, OSError):
        assert found.errno == errno.EIO and found.filename == "gs://b/a"
    if isinstance(found, StorageError):
        assert "gs://b/a: reading failed: INVALID_ARGUMENT" in str(found)


def test_requests_that_fail_are_sent_again(storage_emulator, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_bytes(f"{bucket}/a", DATA)
    monkeypatch.setattr(ranged, "RETRIES", {"max_retries": 4, "initial_delay": "10ms", "max_delay": "20ms"})
    monkeypatch.setattr(ranged, "_context", ranged._context.__wrapped__)
    met = iter(["503", "429", "reset", "truncate"])
    with fault_proxy(storage_emulator.url, faults=lambda method, path, number: next(met, None)) as proxy:
        for name, value in proxy.environ.items():
            monkeypatch.setenv(name, value)
        folder = RangedFolder(as_place(bucket))
        for start in (0, 1000, 2000):
            folder.begin("a", start, start + 1000)
        assert b"".join(folder.read("a", start, start + 1000) for start in (0, 1000, 2000)) == DATA[:3000]
        assert sum(count for kind, count in proxy.requests.items() if kind.startswith("fault")) == 4


def test_a_login_that_is_refused_is_refreshed_once(storage_emulator, bucket: str, monkeypatch) -> None:
    files.write_bytes(f"{bucket}/a", DATA)
    met = iter(["401"])
    with fault_proxy(storage_emulator.url, faults=lambda method, path, number: next(met, None)) as proxy:
        for name, value in proxy.environ.items():
            monkeypatch.setenv(name, value)
        folder = RangedFolder(as_place(bucket))
        assert folder.read("a", 5, 50) == DATA[5:50]
        met = iter(["401"] * 5)
        with pytest.raises(StorageError, match="a: reading failed: 401 .*gcloud auth application-default login"):
            folder.read("a", 5, 50)


def test_a_request_that_hangs_is_given_up(storage_emulator, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_bytes(f"{bucket}/a", DATA)
    hangs = iter(["hang"])
    with fault_proxy(storage_emulator.url, faults=lambda method, path, number: next(hangs, None)) as proxy:
        for name, value in proxy.environ.items():
            monkeypatch.setenv(name, value)
        folder, began = RangedFolder(as_place(bucket)), time.monotonic()
        with pytest.raises(TimeoutError) as error:
            folder.read("a", 0, 10, seconds=0.5)
        assert error.value.errno == errno.ETIMEDOUT and time.monotonic() - began < 10
        assert folder.read("a", 0, 10, seconds=30) == DATA[:10]
