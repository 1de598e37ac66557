"""metrics.jsonl and the progress line."""

from __future__ import annotations

import contextlib
import json

import pytest

from tests.training.telemetry.full_disk import files_of_at_most
from uwm_jax.training.telemetry.log import MetricsLog, progress_line, read_metrics


def test_lines_that_are_not_ours_do_not_count(tmp_path, capsys):
    ours = {"step": 2, "loss": 0.5}
    lines = ['{"loss": 1}', '{"step": "2"}', '{"step": 1.5}', '{"step": true}', '{"step": 2, "loss": "x"}', "[1]"]
    lines += ["[" * 100_000, '{"step": ' + "1" * 9_999 + "}", json.dumps(ours), '{"step": 3, "lo']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n")
    assert read_metrics(tmp_path / "metrics.jsonl") == [ours]
    MetricsLog(tmp_path, 2).close()  # a run that continues keeps what it can read
    assert "metrics.jsonl: 9 invalid lines are removed" in capsys.readouterr().err
    MetricsLog(tmp_path, 2).close()
    assert not capsys.readouterr().err
    assert read_metrics(tmp_path / "metrics.jsonl") == [ours]


def test_lines_after_the_restored_step_are_cut(tmp_path):
    log = MetricsLog(tmp_path, 0)
    assert log.cut is None
    for step in (10, 20, 30, 40):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')  # a crash in the middle of a line
    log = MetricsLog(tmp_path, 20)
    assert log.cut == {"step": 40, "loss": 1 / 40}
    log.write(30, {"loss": 7.0})
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in lines] == [10, 20, 30] and lines[-1]["loss"] == 7.0


def test_lines_that_a_full_disk_did_not_take_are_written_later(tmp_path, capsys):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    with files_of_at_most(40):  # less than two lines
        for step in (2, 3):
            log.write(step, {"loss": 1.0})
            assert log.behind
        with pytest.raises(OSError, match="File too large") as caught:
            log.check()
        assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    said = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl cannot be written" in line]
    assert len(said) == 1 and "File too large" in said[0]
    log.write(4, {"loss": 1.0})
    assert not log.behind
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4], "none lost, none torn"


def test_a_full_disk_does_not_hide_the_error_that_came_before_it(tmp_path, capsys):
    for error in (None, KeyError("the first")):
        log = MetricsLog(tmp_path, 0)
        with files_of_at_most((tmp_path / "metrics.jsonl").stat().st_size):
            log.write(1, {"loss": 1.0})
            with pytest.raises(OSError if error is None else KeyError), contextlib.ExitStack() as closing:
                closing.callback(log.close)
                if error is not None:
                    raise error
        assert log._lines._file.closed


def test_only_one_process_writes(tmp_path):
    writer = MetricsLog(tmp_path, 0)
    writer.write(10, {"loss": 1.0})
    other = MetricsLog(tmp_path, 0, writes=False)
    other.write(10, {"loss": 2.0})
    other.close()
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 10, "loss": 1.0}]
    assert other.cut is None


def test_progress_line():
    values = {
        "loss": 1.5,
        "loss/action": 1.0,
        "loss/next_obs": 0.5,
        "samples_per_second": 16.04,
        "data_wait_fraction": 0.2,
        "eta_seconds": 45.2,
    }
    line = progress_line(11, 101, values)
    assert line == (
        "step 11/101  loss 1.5000 (action 1.0000, next_obs 0.5000)  16.0 samples/s  data wait 20 %  ETA 0:45"
    )
    values |= {"loss/next_obs/t0-24": 0.1, "loss/x": 2.0}
    assert "(action 1.0000, next_obs 0.5000, x 2.0000)" in progress_line(11, 101, values)
    assert "  MFU 41.2 %  data wait" in progress_line(11, 101, values | {"mfu": 0.4123})
