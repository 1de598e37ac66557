"""A dataset in a bucket is read as the same one on a disk is: batches, held-out windows, and what lies beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from data_prep.jobs.copying import Copy
from tests.data.test_fitted import read_pca
from tests.data.test_source_latents import USE, data_config, write
from uwm_jax import files
from uwm_jax.data import index, places
from uwm_jax.data.faults import BadRecord
from uwm_jax.data.latents import LatentCache
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData
from uwm_jax.data.sidecar import find_sidecars, writing_sidecar
from uwm_jax.errors import UserError
from uwm_jax.files import as_place
from uwm_jax.storage.ranged import RangedFolder


@pytest.fixture(scope="module")
def dataset(tiny_dataset, tmp_path_factory) -> Path:
    copy = shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("buckets") / "set")
    write(copy, data_config(copy))
    return copy


@pytest.fixture(scope="module")
def there(dataset, storage_emulator) -> str:
    place = "gs://bkt/test_buckets/set"
    Copy(dataset, as_place(place)).run()
    return place


def batches(place, count=3, **fields) -> list[dict[str, np.ndarray]]:
    config = data_config(place)
    config.update(fields)
    data = RunData(config, seed=3, latents=USE if config.latents else None)
    iterator = iter(Loader(data, batch_size=4))
    return [next(iterator) for _ in range(count)]


def assert_equal(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("fields", [{}, {"latents": "vae"}, {"read_ahead": 0, "num_threads": 0}])
def test_batches_are_those_of_the_disk(dataset, there, fields):
    assert_equal(batches(there, **fields), batches(dataset, **fields))


def test_records_are_begun_ahead_and_all_taken(there, monkeypatch):
    begun, taken = [], []
    begin, read = RangedFolder.begin, RangedFolder.read
    monkeypatch.setattr(RangedFolder, "begin", lambda self, *wanted: begun.append(wanted) or begin(self, *wanted))
    monkeypatch.setattr(RangedFolder, "read", lambda self, *w: taken.append((len(begun), w[:3])) or read(self, *w))
    batches(there, count=1, num_threads=0, read_ahead=7)
    assert taken[0][0] >= 8, "the first window's reads and those of the seven that follow"
    assert all(wanted in begun for _, wanted in taken)
    assert len(taken) < len(begun) <= taken[-1][0]


def test_an_index_of_an_older_version_does_with_the_tables_of_the_files(dataset, there, monkeypatch):
    chunk = index.Index.chunk
    monkeypatch.setattr(index.Index, "chunk", lambda self, row: chunk(self, row)._replace(place=None))
    assert_equal(batches(there, count=2), batches(dataset, count=2))


def test_held_out_windows_and_statistics(dataset, there):
    ours, theirs = (RunData(data_config(place), seed=0) for place in (there, dataset))
    assert ours.identities() == theirs.identities()
    assert ours.spec.normalizer.entries.keys() == theirs.spec.normalizer.entries.keys()
    assert_equal([ours.held_out(6).batch(0, 6)], [theirs.held_out(6).batch(0, 6)])
    opened = Dataset(there)
    assert opened.column("action").tolist() == Dataset(dataset).column("action").tolist()
    assert (as_place(there) / "derived_stats").is_dir(), "kept beside the dataset, as on a disk"


def test_what_lies_beside_a_dataset(dataset, there):
    for ours, theirs in zip(find_sidecars(there), find_sidecars(dataset), strict=True):
        assert ours.digest == theirs.digest and str(ours.directory).startswith(there)
        ours.verify()
    assert_equal([read_pca(there, ("wrist",), (16, 16), 0.3)], [read_pca(dataset, ("wrist",), (16, 16), 0.3)])
    with pytest.raises(UserError, match="lies in a bucket.*data_prep.copy --input=LOCAL_DIR --output=gs://bkt"):
        with writing_sidecar(there, "ranges/mine", "ranges", {}, "again"):
            pass


def test_a_dataset_is_named_in_full_or_below_the_data_directory(there, monkeypatch):
    monkeypatch.setenv("UWM_DATA_DIR", there.removesuffix("/set"))
    assert str(places.dataset_dir("set")) == there == str(places.find_dataset(there))
    assert places.dataset_dir("/set") == places.find_dataset("/set") == Path("/set")
    with pytest.raises(UserError, match="config.data.path='gs://bkt/.*not a usable name"):
        places.dataset_dir("../set")
    with pytest.raises(
        UserError, match="no training dataset here.*--output=DIR.*data_prep.copy --input=DIR --output=gs"
    ):
        Dataset("gs://bkt/nothing")


def test_damage_is_told(dataset, there, bucket):
    files.copy_tree(there, f"{bucket}/set")
    place = as_place(bucket) / "set"
    shard = Dataset(place).manifest["splits"]["train"]["shards"][0]["file"]
    opened = Dataset(place)
    data = bytearray((place / shard).read_bytes())
    row = opened._index.chunk(0)
    data[row.place.begin + row.place.head + row.place.size // 2] ^= 1
    files.write_bytes(place / shard, bytes(data))
    with pytest.raises(BadRecord, match="record 0 has another checksum than the index"):
        Dataset(place).record(0, 0)
    files.write_bytes(place / shard, bytes(data[:-70_000]))
    with pytest.raises(UserError, match=rf"{shard}: expected \d+ bytes, found \d+"):
        Dataset(place)
    files.remove(place / shard)
    with pytest.raises(UserError, match=f"{shard} is missing, though manifest.json lists it"):
        Dataset(place)
    with pytest.raises(BadRecord, match=f"{shard} is missing"):
        opened.record(0, 0)


def test_a_cache_of_latents_in_a_bucket_is_verified(dataset, there):
    ours, theirs = (LatentCache(Dataset(place), "vae", "observation/wrist") for place in (there, dataset))
    found = [np.zeros((3, *theirs.layout.shape), np.float16) for _ in range(2)]
    for cache, into in zip((ours, theirs), found, strict=True):
        cache.read(1, [0, 1, 2], 1, into)
        cache.read_black(into[2:])
    assert_equal([{"latents": found[0]}], [{"latents": found[1]}])
    ours._salt = google_crc32c.value(b"of another cache")
    with pytest.raises(BadRecord, match="another checksum than its content"):
        ours.read(1, [0, 1, 2], 1, found[0])
