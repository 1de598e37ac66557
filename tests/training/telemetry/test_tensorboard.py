"""TensorBoard's event files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from tests.training.telemetry.full_disk import files_of_at_most
from uwm_jax.training.telemetry.tensorboard import TensorBoard
from uwm_jax.training.telemetry.tracker import RunFacts
from uwm_jax.training.telemetry.trackers import Trackers


def following(workdir, step=0):
    return Trackers({"tensorboard": TensorBoard}, RunFacts(workdir=workdir, config={}, step=step, group=""))


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
    board = following(tmp_path)
    board.log(10, {"loss": 1.0}, {"eval/modes": tmp_path / "modes.png"})
    board.close()
    values = [(e.step, v) for e in events(tmp_path) for v in e.summary.value if v.HasField("image")]
    assert [(step, value.tag) for step, value in values] == [(10, "eval/modes")]
    shown = np.asarray(Image.open(io.BytesIO(values[0][1].image.encoded_image_string)))
    np.testing.assert_array_equal(shown, pixels)


def test_scalars_and_their_steps_reach_tensorboard(tmp_path):
    written = {1: {"loss": 0.1, "loss/action/t0-24": -3e8}, 300: {"a tag: of no kind": 1e-42}, 2**40: {"loss": np.nan}}
    board = following(tmp_path)
    for step, scalars in written.items():
        board.log(step, scalars)
    board.close()
    first, *found = events(tmp_path)
    assert first.file_version == "brain.Event:2" and 1.7e9 < first.wall_time < 1e11
    values = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    tags = ["loss", "loss/action/t0-24", "a_tag__of_no_kind", "loss"]
    numbers = np.array([x for scalars in written.values() for x in scalars.values()], np.float32)
    assert [(step, tag) for step, tag, _ in values] == list(zip([1, 1, 300, 2**40], tags, strict=True))
    np.testing.assert_array_equal(np.array([x for *_, x in values], np.float32), numbers)


def test_curves_of_a_run_that_came_to_no_checkpoint_are_purged(tmp_path):
    board = following(tmp_path)
    board.log(10, {"loss": 1.0})
    board.close()
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [1], "from where on TensorBoard drops what came before"


def test_a_file_that_cannot_be_written_ends_the_curves_and_nothing_else(tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")  # of 12 kB
    with files_of_at_most(8192):
        board = following(tmp_path)
        board.log(1, {"loss": 1.0}, {"noise": tmp_path / "noise.png"})
        board.log(2, {"loss": 1.0}, {"noise": tmp_path / "noise.png"})
        board.close()
    told, lost = capfd.readouterr().err.splitlines()
    assert "tensorboard ends here" in told and "File too large" in told and "lines of this start" in lost


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("a file")
    board = following(tmp_path)
    for step in range(1, 30):
        board.log(step, {"loss": 1.0})
    board.close()
    assert capfd.readouterr().err.count("tensorboard ends here ([Errno 17] File exists") == 1


def test_a_picture_that_cannot_be_read_is_told_once(tmp_path, capfd):
    board = following(tmp_path)
    board.log(1, {"loss": 1.0}, {"eval/modes": tmp_path / "absent.png"})
    board.close()
    assert "absent.png" in capfd.readouterr().err
