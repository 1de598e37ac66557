"""metrics.jsonl, TensorBoard and the progress line."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import threading

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from uwm_jax.training.telemetry.event_file import EventFile
from uwm_jax.training.telemetry.log import MetricsLog, progress_line, read_metrics
from uwm_jax.training.telemetry.tensorboard import QUEUE_LINES, Board


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
    assert list((tmp_path / "tensorboard").iterdir())


def events(workdir):
    """All events of a workdir's TensorBoard files."""
    for file in (workdir / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            size = int.from_bytes(data[:8], "little")
            for part, checksum in ((data[:8], data[8:12]), (data[12 : 12 + size], data[12 + size : 16 + size])):
                assert int.from_bytes(checksum, "little") == masked_crc32c(part)
            yield Event.FromString(data[12 : 12 + size])
            data = data[size + 16 :]


def test_pictures_reach_tensorboard_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "modes.png")
    log = MetricsLog(tmp_path, 0)
    log.write(10, {"loss": 1.0}, {"eval/modes": tmp_path / "modes.png"})
    log.close()
    values = [(e.step, v) for e in events(tmp_path) for v in e.summary.value if v.HasField("image")]
    assert [(step, value.tag) for step, value in values] == [(10, "eval/modes")]
    shown = np.asarray(Image.open(io.BytesIO(values[0][1].image.encoded_image_string)))
    np.testing.assert_array_equal(shown, pixels)


def test_scalars_and_their_steps_reach_tensorboard(tmp_path):
    written = {1: {"loss": 0.1, "loss/action/t0-24": -3e8}, 300: {"a tag: of no kind": 1e-42}, 2**40: {"loss": np.nan}}
    log = MetricsLog(tmp_path, 0)
    for step, scalars in written.items():
        log.write(step, scalars)
    log.close()
    first, *found = events(tmp_path)
    assert first.file_version == "brain.Event:2" and 1.7e9 < first.wall_time < 1e11
    values = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    tags = ["loss", "loss/action/t0-24", "a_tag__of_no_kind", "loss"]
    numbers = np.array([x for scalars in written.values() for x in scalars.values()], np.float32)
    assert [(step, tag) for step, tag, _ in values] == list(zip([1, 1, 300, 2**40], tags, strict=True))
    np.testing.assert_array_equal(np.array([x for *_, x in values], np.float32), numbers)


def test_curves_of_a_run_that_came_to_no_checkpoint_are_purged(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(10, {"loss": 1.0})
    log.close()
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [1], "from where on TensorBoard drops what came before"


@contextlib.contextmanager
def files_of_at_most(size):
    """Writes of a process beyond `size` of any file fail with EFBIG, as a full disk does with ENOSPC."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def within(seconds, function):
    """Runs a function that must not block, in a thread, so that a test that fails still ends."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"it blocks for more than {seconds} s"


def test_an_event_file_that_cannot_be_written_is_told_once_and_costs_nothing_else(tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")  # of 12 kB

    def write():
        log = MetricsLog(tmp_path, 0)
        with files_of_at_most(8192):
            log.write(1, {"loss": 1.0}, {"noise": tmp_path / "noise.png"})
            log._board._thread.join()
            for step in range(2, 300):  # more than any queue holds
                log.write(step, {"loss": 1.0}, {"noise": tmp_path / "noise.png"})
            log.close()

    within(60, write)
    assert [x["step"] for x in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 300))
    said = capfd.readouterr().err
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert said.count("\n") == 1 and f"warning: {file}: " in said and "File too large" in said


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("a file")
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 30):
        log.write(step, {"loss": 1.0})
    log.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 29
    assert capfd.readouterr().err.count("TensorBoard's curves cannot be written") == 1


def test_a_picture_that_cannot_be_read_is_told_once(tmp_path, capfd):
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 1.0}, {"eval/modes": tmp_path / "absent.png"})
    log.close()
    assert "absent.png" in capfd.readouterr().err and len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_disk_that_hangs_blocks_neither_a_line_nor_the_end(tmp_path, capfd, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(EventFile, "write", lambda *_: hangs.wait())

    def write():
        board = Board(tmp_path, 1)
        for step in range(QUEUE_LINES + 10):
            board.add(step, {"loss": 1.0})
        board.close()
        board = Board(tmp_path, 1)
        board.close(seconds=0.1)

    try:
        within(30, write)
        said = capfd.readouterr().err
        assert "the disk does not keep up" in said and "not all is written after 0.1 s" in said
    finally:
        hangs.set()


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
