"""TensorBoard's events in a bucket: numbered pieces, each a file of its own at any time."""

from __future__ import annotations

import pytest
from tensorboardX.proto.event_pb2 import Event

from uwm_jax import files
from uwm_jax.storage.errors import StorageError
from uwm_jax.training.telemetry import event_file
from uwm_jax.training.telemetry.event_file import EventFile, EventObjects, open_events


def records(data: bytes) -> list[bytes]:
    found = []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(data[12 : 12 + size])
        data = data[size + 16 :]
    return found


def test_all_events_are_in_the_pieces_in_order(bucket, monkeypatch):
    monkeypatch.setattr(event_file, "PIECE_BYTES", 300)
    folder = files.as_place(bucket) / "tensorboard"
    events = open_events(folder / "events.out.tfevents.1.host.2")
    version = Event(file_version="brain.Event:2").SerializeToString()
    sent = [bytes([i]) * 40 for i in range(40)]
    events.write(version)
    for at, record in enumerate(sent):
        events.write(record)
        if at % 3 == 0:
            events.flush()
    events.close()
    pieces = [records(file.read_bytes()) for file in sorted(folder.iterdir())]
    assert len(pieces) > 3, [file.name for file in folder.iterdir()]
    assert all(piece[0] == version for piece in pieces), "a piece is a file of its own"
    assert [record for piece in pieces for record in piece[1:]] == sent


def test_a_flush_without_news_and_a_closed_piece_cost_no_request(bucket, monkeypatch):
    puts = []
    honest = event_file.write_bytes
    monkeypatch.setattr(event_file, "write_bytes", lambda place, data: (puts.append(place.name), honest(place, data)))
    events = EventObjects(files.as_place(bucket) / "events")
    events.write(b"version")
    for _ in range(3):
        events.flush()
    events.close()
    assert puts == ["events.00000"]


def test_events_wait_for_a_bucket_that_is_away_as_long_as_there_is_room(bucket, monkeypatch, capsys):
    honest = event_file.write_bytes

    def fail(place, data):
        raise StorageError("writing", str(place), "503")

    events = EventObjects(files.as_place(bucket) / "events")
    events.write(b"version")
    monkeypatch.setattr(event_file, "write_bytes", fail)
    for record in (b"a" * 50, b"b" * 50):
        events.write(record)
        events.flush()
    assert capsys.readouterr().err.count("events wait in memory") == 1
    monkeypatch.setattr(event_file, "write_bytes", honest)
    events.flush()
    assert records((files.as_place(bucket) / "events.00000").read_bytes()) == [b"version", b"a" * 50, b"b" * 50]
    monkeypatch.setattr(event_file, "write_bytes", fail)
    monkeypatch.setattr(event_file, "KEPT_BYTES", 10)
    events.write(b"c")
    with pytest.raises(StorageError):
        events.flush()


def test_a_local_file_is_appended_to(tmp_path):
    events = open_events(tmp_path / "tensorboard" / "events")
    assert isinstance(events, EventFile)
    events.write(b"one")
    events.flush()
    events.write(b"two")
    events.close()
    assert records((tmp_path / "tensorboard" / "events").read_bytes()) == [b"one", b"two"]
