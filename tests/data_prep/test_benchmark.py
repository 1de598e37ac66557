"""The benchmark of the loader in a small form: what it reads is the data, and what it reports is what it read."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import time
import types

import numpy as np
import pytest
import simplejpeg

from data_prep import benchmark
from data_prep.rates import buckets, loader, loader_data, loader_memory
from data_prep.sources import rlds
from uwm_jax.data import example, records
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData

EPISODES, STEPS = 3, 40


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> loader_data.Made:
    pytest.importorskip("zarr")
    return loader_data.make(tmp_path_factory.mktemp("loader_data"), EPISODES, STEPS)


def test_the_three_layouts_hold_the_same(made):
    import zarr

    root, dataset = zarr.open(str(made.zarr), mode="r"), Dataset(made.dataset)
    assert rlds.corpus(made.rlds).name == "loader" and dataset.num_episodes == EPISODES
    assert dataset.episode_lengths.tolist() == [STEPS] * EPISODES
    for episode in range(EPISODES):
        path, offset, size = made.records[episode]
        record = path.read_bytes()[offset : offset + size]
        fields = example.scan(record)
        actions = example.floats(record, fields[b"steps/action"]).reshape(STEPS, 7)
        rows = slice(episode * STEPS, (episode + 1) * STEPS)
        np.testing.assert_array_equal(actions, dataset.column("action")[rows])
        np.testing.assert_array_equal(actions, root["action"][rows])
        camera = loader_data.CAMERAS[episode]
        spans = example.bytes_spans(record, fields[f"steps/observation/{camera}".encode()])
        for step in (0, 17, STEPS - 1):
            frame = np.empty((1, 180, 320, 3), np.uint8)
            dataset.frames(episode, {f"observation/{camera}": [step]}, {f"observation/{camera}": frame})
            np.testing.assert_array_equal(frame[0], simplejpeg.decode_jpeg(record[slice(*spans[step])], "RGB"))
            np.testing.assert_array_equal(frame[0], root[camera][episode * STEPS + step])


def test_pictures_cost_what_those_of_droid_do(made):
    sizes = made.bytes()
    images = EPISODES * STEPS * len(loader_data.CAMERAS)
    assert 18e3 < sizes["rlds"] / images < 26e3, "bytes of a JPEG file"
    stored = sum(loader_data.size_of(made.zarr / camera) for camera in loader_data.CAMERAS)
    assert 0.75 < stored / images / (180 * 320 * 3) < 0.95


def test_the_official_layout_is_as_the_official_code_writes_it(made):
    import zarr

    root = zarr.open(str(made.zarr), mode="r")
    image, action = root[loader_data.CAMERAS[0]], root["action"]
    assert image.chunks == (1, 180, 320, 3)
    settings = {"id": "blosc", "cname": "lz4", "shuffle": 0, "blocksize": 0}
    assert image.compressor.get_config() == settings | {"clevel": 5}
    assert action.compressor.get_config() == settings | {"clevel": 0}
    assert 1.9e6 < np.prod(action.chunks) * 4 <= 2e6
    files = [p for p in (made.zarr / loader_data.CAMERAS[0]).iterdir() if p.name[0] != "."]
    assert len(files) == EPISODES * STEPS
    assert 1.9e6 < (made.zarr / "action" / "0.0").stat().st_size < 2.1e6


def test_every_row_reads_windows(made):
    loader.make_latents(made)
    for row in loader.ROWS:
        assert loader.take(loader.Turn(row, made, 0.02)) > 0
    loader._readers.clear()
    some = {"a": [1.0, 8.0, 3.0], "b": [2.0, 2.0, 2.0]}
    assert loader.ratio(some, "a", "b") == 1.5
    batch = next(iter(Loader(RunData(loader.config_of(made.dataset).data, seed=0), batch_size=4)))
    frames = {key: x.shape for key, x in batch.items() if x.dtype == np.uint8}
    assert frames == {f"{g}/{c}": (4, 2, 180, 320, 3) for g in ("obs", "next_obs") for c in loader_data.CAMERAS}


def test_rows_read_and_decode_all_that_they_say(made, monkeypatch):
    import zarr

    loader.make_latents(made)
    decoded, chunks = [], []

    def counted(data, out):
        decoded.append(out.shape)
        return decode(data, out)

    decode, get = records.decode_image, zarr.DirectoryStore.__getitem__

    def got(store, key):
        chunks.append(key)
        return get(store, key)

    for module in (records, loader):
        monkeypatch.setattr(module, "decode_image", counted)
    monkeypatch.setattr(zarr.DirectoryStore, "__getitem__", got)
    expected = {"pixels": 12, "decode_only": 12, "whole_episode": 12, "latents": 6, "decode_only_latents": 6}
    for row, frames in expected.items():
        decoded.clear()
        windows = next(loader.reader(row, made))
        assert len(decoded) == windows * frames and {*decoded} == {(180, 320, 3)}, row
    for row, frames in (("official_zarr", 19 * 3), ("zarr_needed", 4 * 3)):
        reader = loader.reader(row, made)
        windows = next(reader)
        chunks.clear()
        windows = next(reader)
        images = [key for key in chunks if key.endswith(".0.0.0")]
        assert len({*images}) == len(images) == windows * frames, row


def test_a_large_dataset_is_the_small_one_over_and_over(made, tmp_path):
    large = loader_data.repeated(made.dataset, tmp_path / "large", 500, loader.SPAN)
    small, dataset = Dataset(made.dataset), Dataset(large)
    copies = dataset.num_episodes // EPISODES
    assert copies * EPISODES * (STEPS - 18) >= 500 > (copies - 1) * EPISODES * (STEPS - 18)
    last = dataset.num_episodes - 1
    assert dataset.record(last, 1) == small.record(EPISODES - 1, 1)
    np.testing.assert_array_equal(dataset.column("action")[-STEPS:], small.column("action")[-STEPS:])
    assert dataset.episode_texts("file_path") == small.episode_texts("file_path") * copies
    found = loader_memory.first_batch(large)
    assert found["windows"] >= 400 and 0 < found["open_seconds"] < found["first_batch_seconds"]


def test_the_memory_of_the_index_is_found_and_growth_is_seen(made, monkeypatch):
    file = made.dataset / "index" / "train.npz"
    index = Dataset(made.dataset)._index
    assert index.chunk_crc32c.sum() > 0
    found = loader_memory.share(file)
    assert 0 < found["index"] <= 4096 * (file.stat().st_size // 4096 + 2) and found["process"] > 1e7
    grows = iter(range(100, 100_000, 100))
    monkeypatch.setattr(loader_memory, "_rss", lambda: next(grows))
    clock = itertools.count(0.0, 0.3)
    monkeypatch.setattr(loader_memory, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    looks = []
    soaked = loader_memory.soak(made.dataset, 0.02, lambda *told: looks.append(told))
    assert soaked["batches"] == 3 and len(looks) == 3 and soaked["rss_at_end"] == soaked["rss_largest"]
    assert soaked["rss_at_end"] > soaked["rss_after_warm_up"]


class Here(contextlib.AbstractContextManager):
    """A child that is this process."""

    def __init__(self, function):
        self.function = function

    def __exit__(self, *_):
        loader._readers.clear()

    def call(self, argument, seconds):
        return self.function(argument, lambda number: None)


@pytest.mark.slow
def test_a_row_reads_in_a_process_of_its_own(made, monkeypatch):
    monkeypatch.setattr(loader, "ROWS", ("decode_only",))
    before = time.process_time()
    (rates,) = loader.measure(made, 2, 1.0).values()
    assert len(rates) == 2 and min(rates) > 0 and not loader._readers
    assert time.process_time() - before < 1, "the time that counts is the child's"


@pytest.mark.slow
def test_the_table_has_what_the_file_has(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_memory, "PROCESSES", 2)
    monkeypatch.setattr(loader, "Child", Here)
    pytest.importorskip("zarr")
    (tmp_path / "data").mkdir()
    settings = benchmark.Settings(episodes=2, steps=38, rounds=2, seconds=0.02, windows=200, pss=True)
    found = json.loads(json.dumps(benchmark.benchmark(tmp_path / "data", settings)))
    for row in loader.ROWS:
        assert found[f"windows_per_s_per_core/{row}"] == statistics.median(found[f"rounds/{row}"])
    assert found["bytes/training_layout"] / found["bytes/rlds"] == found["bytes/training_layout_of_rlds"]
    assert found["pss/index_of_all_of_one"] == found["pss/index_of_all"] / found["pss/index_of_one"]
    assert found["pss/processes"] == 2 and found["pss/index_of_all"] < 2 * found["pss/index_of_one"]
    text = benchmark.table(found)
    told = [line.split()[0] for line in text.splitlines() if line]
    assert {*benchmark.BARS} - {"soak/rss_at_end_of_warm"} <= {*told}
    assert f"{found['windows_per_s_per_core/pixels']:.1f}" in text


@pytest.mark.slow
def test_a_bucket_is_measured_beside_the_disk(tmp_path, monkeypatch):
    pytest.importorskip("zarr")
    monkeypatch.setattr(buckets, "Child", Here)
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    before, environ = os.sched_getaffinity(0), dict(os.environ)
    sizes = {"episodes": 2, "steps": 38, "rounds": 2, "seconds": 0.02}
    found = json.loads(json.dumps(buckets.benchmark(tmp_path, delay=0.001, **sizes)))
    buckets._readers.clear()
    assert (os.sched_getaffinity(0), dict(os.environ)) == (before, environ)
    for kind in ("wall", "cpu"):
        rounds = {row: found[f"rounds/{kind}/{row}"] for row in ("local_8", "local_4", "bucket_8", "bucket_4")}
        assert all(len(rates) == 2 and min(rates) > 0 for rates in rounds.values())
        best = max(("local_8", "local_4"), key=lambda row: statistics.median(rounds[row]))
        assert found[f"{kind}/of_local"] == loader.ratio(rounds, "bucket_4", best)
    assert 0 < found["requests/8"] < found["requests/4"] * 2 and found["copy/mb_per_s"] > 0
    for share, verdict in ((0.79, "MISSED"), (0.8, "met")):
        assert verdict in buckets.table(found | {"wall/of_local": share}).split()


@pytest.mark.parametrize(
    ("value", "words", "met"),
    [(1.0, "at least", True), (1.0, "more than", False), (1.0, "at most", True), (1.0, "less than", False)],
)
def test_bars(value, words, met):
    assert benchmark.is_met(value, words, 1.0) is met
    assert {words for words, _ in benchmark.BARS.values()} == {"at least", "more than", "at most", "less than"}
