"""Records that are damaged, missing, at odds with the manifest or that hang: named, counted, and replaced by rule."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data import rlds_source
from tests.data.loader_case import config, made, open_loader, take  # noqa: F401 - fixtures
from uwm_jax.config import base, source, validate
from uwm_jax.data import faults as faults_lib
from uwm_jax.data import held_out, shards, timed
from uwm_jax.data.faults import BadRecord, Faults, UnreadRecord
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset
from uwm_jax.errors import RunError, UserError

STREAMS, BATCH, STEPS = 8, 8, 24
BAD = ((2, 3), (3, 1))  # (episode, chunk) that are damaged, of windows of two streams and more


@pytest.fixture
def copy(made, config: ConfigDict, tmp_path: Path) -> Path:  # noqa: F811
    config.path = str(shutil.copytree(made[0], tmp_path / "copy"))
    return Path(config.path)


def damage(directory: Path, chunks=BAD) -> None:
    """Flips a byte of the records of some chunks, one that no other record shares."""
    dataset = Dataset(directory)
    for episode, chunk in chunks:
        record = dataset.record(episode, chunk)
        file = directory / dataset.locate(episode, 8 * chunk).shard
        data = bytearray(file.read_bytes())
        data[unique(data, record)] ^= 1
        file.write_bytes(data)


def unique(data: bytes | bytearray, record: bytes) -> int:
    """A place of a file that holds a byte of this record alone. The order of a record's keys differs between runs, and
    what it begins with may be the same in all records of an episode."""
    pieces = (record[at : at + 100] for at in range(len(record) // 2, len(record) - 100, 50))
    return data.find(next(piece for piece in pieces if data.count(piece) == 1)) + 50


def positions_of(loader: Loader, count: int, chunks=BAD) -> set[int]:
    """Those of the first `count` positions whose windows need one of the chunks."""
    needs = (0, 1, 7, 9)  # frames of the config's window; its text embedding is that of the last current step
    found = set()
    for position in range(count):
        trace = loader.describe(position)
        if {(trace.episode, (trace.origin + i) // 8) for i in needs} & set(chunks):
            found.add(position)
    return found


def rows_of(batches: list[dict[str, np.ndarray]], per_batch: int = BATCH) -> list[dict[str, np.ndarray]]:
    return [{key: x[i] for key, x in batch.items()} for batch in batches for i in range(per_batch)]


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in a if key != "row")


def counted(loader: Loader, steps: int) -> Faults:
    """What a run of one process would have counted after so many steps."""
    faults = loader.data.faults
    for step in range(1, steps + 1):
        notes = faults.notes(step)
        faults.take(step, [notes] if notes else [])
    return faults


def test_a_bad_row_is_the_last_good_one_before_it_in_its_stream(config, copy, capsys) -> None:  # noqa: F811
    sound = open_loader(config)
    expected = rows_of(take(sound, STEPS))
    bad = positions_of(sound, STEPS * BATCH)
    first_ones = {p for p in bad if all(p - k in bad for k in range(STREAMS, p + 1, STREAMS))}
    assert len(bad) > 10 and first_ones < bad, "some have a good one before them"
    damage(copy)
    config.max_bad_records = 2
    for threads in (0, 2):
        config.num_threads = threads
        loader = open_loader(config)
        batches = take(loader, STEPS)
        for position, row in enumerate(rows_of(batches)):
            assert row["row"] == position % BATCH
            step = STREAMS if position in first_ones else -STREAMS
            other = position
            while other in bad:
                other += step
            if other < len(expected):
                assert equal(row, expected[other]), (position, other)
        faults = counted(loader, STEPS)
        assert (faults.rows, len(faults.records)) == (len(bad), len(BAD))
        assert faults.metrics() == {"data/bad_records": len(BAD), "data/bad_rows": len(bad)}
        told = capsys.readouterr().err
        assert told.count("warning: bad record") == len(BAD), "each is told once"
        assert "array_record" in told and "max_bad_records=2" in told


def test_counts_continue_and_processes_agree(config, copy) -> None:  # noqa: F811
    damage(copy)
    config.max_bad_records = 2
    one = open_loader(config)
    batches = take(one, STEPS)
    faults = counted(one, STEPS)
    # a run that stops and continues, on two processes that tell each other
    half = open_loader(config)
    take(half, STEPS // 2 + 3)  # it had read ahead
    counted(half, STEPS // 2)
    state = json.loads(json.dumps(half.state(STEPS // 2)))
    assert state["bad"]["rows"] < faults.rows
    two = [open_loader(config, start_step=STEPS // 2, process_index=i, process_count=2, state=state) for i in range(2)]
    theirs = [take(loader, STEPS - STEPS // 2) for loader in two]
    for step in range(STEPS // 2 + 1, STEPS + 1):
        notes = [n for loader in two if (n := loader.data.faults.notes(step))]
        for loader in two:
            assert loader.data.faults.end(notes) is None
            loader.data.faults.take(step, notes)
    assert [loader.state(STEPS)["bad"] for loader in two] == [one.state(STEPS)["bad"]] * 2
    for step in range(STEPS // 2, STEPS):
        for i in range(2):
            for key, values in batches[step].items():
                np.testing.assert_array_equal(theirs[i][step - STEPS // 2][key], values[i::2])


def test_one_too_many_ends_at_its_batch(config, copy) -> None:  # noqa: F811
    sound = open_loader(config)
    first = [min(positions_of(sound, STEPS * BATCH, [chunk])) // BATCH for chunk in BAD]
    damage(copy)
    for limit, last in ((0, min(first)), (1, max(first))):
        config.max_bad_records = limit
        iterator = iter(open_loader(config))
        for _ in range(last):
            next(iterator)
        with pytest.raises(BadRecord if limit == 0 else UserError, match="cannot be read") as caught:
            next(iterator)
        assert "array_record" in str(caught.value)
        if limit:
            assert "2 bad records, and config.data.max_bad_records is 1. Copy" in str(caught.value)


def test_of_several_processes_the_sum_counts() -> None:
    """Each process alone is within the limit."""
    found = [Faults(1) for _ in range(2)]
    for faults, name in zip(found, ("d/shard#1", "d/shard#2"), strict=True):
        faults.note(BadRecord(f"{name} is damaged", name), 3, 17)
        faults.check(3)
        assert faults.notes(2) is None, "it was read ahead"
    notes = json.loads(json.dumps([faults.notes(3) for faults in found]))
    assert all(faults.end(notes[:1]) is None for faults in found)
    errors = {str(end(2)) for faults in found if (end := faults.end(notes))}
    assert len(errors) == 1 and "d/shard#2 is damaged These are 2 bad records" in errors.pop()
    for faults in found:
        faults.take(3, notes)
        assert (faults.rows, faults.records) == (2, {"d/shard#1", "d/shard#2"})
        assert faults.notes(3) is None
    again = Faults(0)
    again.restore(found[0].state())
    assert again.end([{"rows": 1, "records": {"d/shard#1": "known"}}]) is None, "only a new one ends a run"


def test_sources_keep_their_shares(config, copy) -> None:  # noqa: F811
    """A bad row of a mixture is replaced by one of its own source."""
    config.sources.robot = source(weight=0.6)
    config.sources.video = source(weight=0.4, use_actions=False)
    sound = open_loader(config)
    expected = rows_of(take(sound, STEPS))
    bad = positions_of(sound, STEPS * BATCH)
    damage(copy)
    config.max_bad_records = 2
    loader = open_loader(config)
    rows = rows_of(take(loader, STEPS))
    assert [bool(row["action_mask"]) for row in rows] == [bool(row["action_mask"]) for row in expected]
    assert bad and all(equal(rows[p], expected[p]) for p in range(len(rows)) if p not in bad)
    assert counted(loader, STEPS).rows == len(bad)


def test_without_any_good_window_the_run_ends(config, copy) -> None:  # noqa: F811
    damage(copy, [(e, c) for e, n in enumerate([21, 5, 100, 32, 12, 33]) for c in range(-(-n // 8))])
    config.max_bad_records = 1000
    with pytest.raises(BadRecord, match="cannot be read"):
        open_loader(config, batch_size=8).load(open_loader(config).data.spec.empty(1), 0, 0, 5)


def test_a_row_tries_no_more_records_than_are_allowed(config, copy) -> None:  # noqa: F811
    """On a disk that is lost, each of them may take a minute."""
    damage(copy, [(e, c) for e, n in enumerate([21, 5, 100, 32, 12, 33]) for c in range(-(-n // 8))])
    config.max_bad_records = 2
    loader = open_loader(config)
    with pytest.raises(UserError, match="3 bad records, and config.data.max_bad_records is 2"):
        loader.load(loader.data.spec.empty(1), 0, 0, 5)
    notes = loader.data.faults.notes(1)
    assert notes is not None and len(notes["records"]) == 3


def test_a_bad_record_does_not_hold_its_batch(config, copy) -> None:  # noqa: F811
    sound = open_loader(config)
    position = max(positions_of(sound, STEPS * BATCH))
    damage(copy)
    config.max_bad_records = 2
    loader = open_loader(config)
    gc.collect()
    gc.disable()
    try:
        batch = loader.data.spec.empty(1)
        arrays = [weakref.ref(x) for x in batch.values()]
        loader.load(batch, 0, 0, position)
        assert loader.data.faults.notes(position // BATCH + 1)
        del batch
        assert all(x() is None for x in arrays)
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_shard_that_is_not_there_is_borne(config, copy, how, capsys) -> None:  # noqa: F811
    sound = open_loader(config)
    expected = rows_of(take(sound, 4))
    shard = sorted(copy.glob("*array_record*"))[-1]
    lost = {p for p in range(4 * BATCH) if sound.describe(p).shard == shard.name}
    if how == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(UserError, match=f"{shard.name}.*Copy it again"):
        open_loader(config)
    config.max_bad_records = 100
    rows = rows_of(take(open_loader(config), 4))
    assert f"1 of 2 shards are missing or damaged; their records are bad: {shard}" in capsys.readouterr().err
    assert lost and all(equal(rows[p], expected[p]) == (p not in lost) for p in range(len(rows)))


def test_a_shard_listed_twice_is_named(copy) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    entries = manifest["splits"]["train"]["shards"]
    (copy / "manifest.json").write_text(json.dumps(manifest | {"splits": {"train": manifest["splits"]["train"]}}))
    entries[1] = entries[0]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"lists the shard {entries[0]['file']} twice"):
        Dataset(copy)


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("chunk_record", 1000, "a chunk is record 1000 of .*00000-of-00002, which has .* records"),
        ("chunk_shard", 7, "a chunk lies in shard 7, but manifest.json lists 2"),
        ("episode_first_chunk", 1000, "an episode lies in chunks up to 1003, but there are 28"),
        ("episode_length", 1, r"expected \(episodes, steps, chunks\)"),
    ],
)
def test_an_index_that_disagrees_with_the_manifest_is_named(copy, array, value, message) -> None:
    rlds_source.write_index(copy, **{array: [value]})
    with pytest.raises(UserError, match=f"index/train.npz: {message}.*Make the dataset again"):
        Dataset(copy)


def test_the_index_is_memory_mapped_and_equals_numpys(copy) -> None:
    dataset = Dataset(copy)
    with np.load(copy / "index" / "train.npz") as stored:
        for name, array in stored.items():
            found = getattr(dataset._index, name)
            np.testing.assert_array_equal(found, array)
            assert found.dtype == array.dtype and not found.flags.writeable
            owner: Any = found
            while owner.base is not None and not isinstance(owner, np.memmap):
                owner = owner.base
            assert isinstance(owner, np.memmap), "not a copy in this process's own memory"


class Slow:
    """A reader of array_record that hangs on one record, `times` times; it never ends before `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hangs: int, times: int):
        real = shards.array_record_module.ArrayRecordReader
        self.release, self.calls, slow = threading.Event(), 0, self

        class Reader:
            def __init__(self, *arguments, **options):
                self.reader = real(*arguments, **options)
                self.ok, self.close = self.reader.ok, self.reader.close

            def read(self, records):
                if records == [hangs]:
                    slow.calls += 1
                    if slow.calls <= times:
                        slow.release.wait()
                return self.reader.read(records)

        monkeypatch.setattr(shards.array_record_module, "ArrayRecordReader", Reader)
        monkeypatch.setattr("uwm_jax.reading.time.sleep", lambda seconds: None)
        self.left: list[str] = []
        monkeypatch.setattr(timed, "leave_behind", self.left.append)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    found: list[Slow] = []

    def make(hangs: int, times: int) -> Slow:
        found.append(Slow(monkeypatch, hangs, times))
        return found[-1]

    yield make
    for one in found:
        one.release.set()


def test_a_read_that_takes_too_long_is_tried_again(copy, slow, capsys) -> None:
    expected = Dataset(copy).record(0, 1)
    reader = slow(1, 3)
    assert Dataset(copy, read_timeout=0.1).record(0, 1) == expected
    assert reader.calls == 4 and len(reader.left) == 3
    told = capsys.readouterr().err
    assert told.count("no answer in 0.1 s (config.data.read_timeout_seconds)") == 3 and "record 1" in told


def test_a_read_that_hangs_counts_as_bad(config, copy, slow) -> None:  # noqa: F811
    sound = open_loader(config)
    expected = rows_of(take(sound, 3))
    dataset = Dataset(copy)
    hangs = dataset.locate(2, 24)
    bad = {
        p for p in range(3 * BATCH)
        if any(
            dataset.locate(t.episode, t.origin + i).record == hangs.record
            for t in [sound.describe(p)] for i in (0, 1, 7, 9)
        )
    }  # fmt: skip
    reader = slow(hangs.record, 1 << 30)
    config.read_timeout_seconds, config.num_threads = 0.05, 0
    with pytest.raises(UnreadRecord, match=rf"record {hangs.record}: .*no answer in 0.05 s.*4 attempts"):
        take(open_loader(config), 3)
    config.max_bad_records, before = 2, reader.calls
    loader = open_loader(config)
    rows = rows_of(take(loader, 3))
    assert bad and {p for p in range(len(rows)) if not equal(rows[p], expected[p])} == bad
    records = counted(loader, 3).records
    assert len({name.split("/")[0] for name in records}) == 1 and all(f"#{hangs.record}" in name for name in records)
    assert reader.calls - before == 4 * len(records), "it is given up, and not waited for with every window"


def test_time_limits_that_exclude_each_other_are_refused() -> None:
    c = base()
    c.data.read_timeout_seconds, c.hang_seconds = 300.0, 900.0
    with pytest.raises(UserError, match=r"read_timeout_seconds=300: .* 4 times within 1221 s .*hang_seconds=900"):
        validate(c)
    c.hang_seconds = 0.0
    validate(c)


def test_a_bad_held_out_window_is_named_and_not_skipped(config, copy, capsys) -> None:  # noqa: F811
    config.val_ratio = 0.34
    sound = open_loader(config).data.held_out(12)
    expected = sound.batch(0, 12)
    victim = 5
    episode, origin = int(sound.episodes[victim]), int(sound.origins[victim])
    chunk = origin // 8
    damage(copy, [(episode, chunk)])
    bad = {
        n for n in range(12)
        if sound.episodes[n] == episode and chunk in {(int(sound.origins[n]) + i) // 8 for i in (0, 1, 7, 9)}
    }  # fmt: skip
    with pytest.raises(BadRecord, match=rf"window {min(bad)} for evaluation \(.*, episode {episode}, step ") as caught:
        open_loader(config).data.held_out(12).batch(0, 12)
    assert "array_record" in str(caught.value)
    config.max_bad_records = 1
    data = open_loader(config).data
    windows = data.held_out(12)
    found = windows.batch(0, 12)
    told = capsys.readouterr().err
    for n in range(12):
        other = n
        while other in bad:
            other -= 1
        for key in found:
            if key != "row":
                np.testing.assert_array_equal(found[key][n], expected[key][other])
        assert found["row"][n] == n and windows.episodes[n] == sound.episodes[other]
        assert (f"window {n} for evaluation" in told) == (n in bad)
    assert set(windows.bad) == bad
    notes = data.faults.notes(1)
    assert notes is not None and len(notes["records"]) == 1 and notes["rows"] == 0
    damage(copy, [(int(sound.episodes[0]), int(sound.origins[0]) // 8)])
    with pytest.raises(UserError, match="2 bad records, and config.data.max_bad_records is 1"):
        open_loader(config).data.held_out(12).batch(0, 12)


def test_names_of_the_module_are_those_of_its_users() -> None:
    assert held_out.BAD == faults_lib.BAD == (BadRecord, UnreadRecord)
    assert issubclass(BadRecord, UserError) and issubclass(UnreadRecord, RunError)
