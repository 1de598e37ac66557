"""`metrics.jsonl` in a bucket, whose objects cannot be appended to: exact at every checkpoint and after every kill."""

from __future__ import annotations

import json

import pytest

from uwm_jax import files
from uwm_jax.errors import RunError
from uwm_jax.storage.errors import StorageError
from uwm_jax.training import rewritten
from uwm_jax.training.telemetry.log import MetricsLog, read_metrics


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """No thread puts anything by itself while a test looks."""
    monkeypatch.setattr(rewritten.Rewritten.__init__, "__defaults__", (b"", 1e6))


def test_lines_are_there_before_a_checkpoint_is(bucket):
    workdir = files.as_place(bucket)
    log = MetricsLog(workdir, 0)
    for step in (10, 20):
        log.write(step, {"loss": 1.0 / step})
    assert log.behind and read_metrics(workdir / "metrics.jsonl") == []
    log.sync()
    assert not log.behind
    assert read_metrics(workdir / "metrics.jsonl") == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}]
    log.close()


def test_a_run_that_was_killed_continues_with_the_lines_up_to_its_checkpoint(bucket):
    workdir = files.as_place(bucket)
    killed = MetricsLog(workdir, 0)
    for step in (10, 20, 30):
        killed.write(step, {"loss": 1.0 / step})
    killed.sync()  # and then it neither writes nor closes anything
    log = MetricsLog(workdir, 20)
    assert log.cut == {"step": 30, "loss": 1 / 30}
    log.write(30, {"loss": 7.0})
    log.close()
    expected = [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}, {"step": 30, "loss": 7.0}]
    assert read_metrics(workdir / "metrics.jsonl") == expected
    killed.write(40, {"loss": 0.0})  # it was only stopped, and another start has taken over
    with pytest.raises(RunError, match="another process has written it"):
        killed.sync()
    assert read_metrics(workdir / "metrics.jsonl") == expected


def test_the_object_is_what_the_file_is(bucket, tmp_path):
    lines = [(1, {"loss": 0.25, "time/step": 3.0}), (2**40, {"loss": -1e-30})]
    for workdir in (tmp_path, files.as_place(bucket)):
        for start in (0, 1):
            log = MetricsLog(workdir, start)
            for step, metrics in lines[start:]:
                log.write(step, metrics)
            log.close()
    text = (files.as_place(bucket) / "metrics.jsonl").read_text()
    assert text == (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [{"step": s, **metrics} for s, metrics in lines]


def test_a_bucket_that_takes_nothing_is_told_once_and_ends_the_run_at_its_checkpoint(bucket, monkeypatch, capsys):
    def fail(place, *_):
        raise StorageError("writing", str(place), "503 out of order")

    log = MetricsLog(files.as_place(bucket), 0)
    monkeypatch.setattr(rewritten, "replace_if", fail)
    log.write(1, {"loss": 1.0})
    with pytest.raises(StorageError, match="503 out of order"):
        log.sync()
    for step in (2, 3):
        log.write(step, {"loss": 1.0})
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1
    monkeypatch.undo()
    log.close()
    assert [x["step"] for x in read_metrics(files.as_place(bucket) / "metrics.jsonl")] == [1, 2, 3]
