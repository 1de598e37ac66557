"""Random access to the training layout, and what damaged or missing parts say."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.conversion.training_layout import reshard
from tests.data import rlds_source
from uwm_jax import reading
from uwm_jax.config import source
from uwm_jax.data import columns, direct, records, shards
from uwm_jax.data.places import dataset_dir, find_dataset
from uwm_jax.data.records import Dataset, short_key
from uwm_jax.data.selection import select
from uwm_jax.errors import RunError, UserError

LENGTHS = [21, 5, 40]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("records")
    episodes = rlds_source.make(root / "source", LENGTHS)
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, chunk_steps=8, workers=1)
    return root / "out", episodes


def _frames(dataset: Dataset, episode: int, camera: str, steps: list[int]) -> np.ndarray:
    out = np.zeros((len(steps), *dataset.cameras[camera], 3), np.uint8)
    dataset.frames(episode, {camera: steps}, {camera: out})
    return out


def test_frames_are_those_of_an_independent_decoder(made) -> None:
    out, episodes = made
    dataset = Dataset(out)
    for name in rlds_source.CAMERAS:
        for episode, steps in ((0, [0, 7, 8, 20, 20]), (1, [4]), (2, [39, 0, 16])):
            found = _frames(dataset, episode, f"observation/{name}", steps)
            for frame, step in zip(found, steps, strict=True):
                data = episodes[episode]["steps"][step]["observation"][name]
                expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
                # PNG is exact; two JPEG decoders may round apart.
                assert np.abs(frame.astype(int) - expected).max() <= (0 if name == "wrist" else 2)


def test_each_record_is_read_once_per_call(made, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset(made[0])
    calls = []
    view = dataset.view
    monkeypatch.setattr(dataset, "view", lambda e, c: calls.append((e, c)) or view(e, c))
    cameras = dict.fromkeys(dataset.cameras, [0, 1, 17, 18])
    dataset.frames(2, cameras, {c: np.zeros((4, *dataset.cameras[c], 3), np.uint8) for c in cameras})
    assert calls == [(2, 0), (2, 2)]


def test_values_too_wide_for_a_column_come_from_the_record(made) -> None:
    dataset = Dataset(made[0])
    assert dataset.float_key("embedding") == "embedding"
    for ask, name, found in (
        (dataset.float_key, "counter", "int64 of shape"),
        (dataset.float_key, "language_instruction", "a string: data_prep.text embeds it for config.data.text_table"),
        (dataset.camera_key, "state", r"float32 of shape \[3\]"),
        (dataset.column_key, "wrist", r"uint8 of shape \[16, 16, 3\]"),
    ):
        with pytest.raises(UserError, match=f"it has: .*{name!r} exists, but cannot be used so: .*{found}"):
            ask(name)
    np.testing.assert_array_equal(dataset.values(2, 19, "embedding"), np.full(300, 2 + 19 / 64, np.float32))


def test_keys_that_do_not_exist_are_listed(made) -> None:
    dataset = Dataset(made[0])
    assert dataset.camera_key("wrist") == dataset.camera_key("observation/wrist") == "observation/wrist"
    with pytest.raises(UserError, match=r"no camera 'wirst'; it has: observation/exterior, observation/wrist\."):
        dataset.camera_key("wirst")
    for name in ("wrist", "observation/wrist"):
        assert short_key(name) == short_key(dataset.camera_key(name)) == "wrist"
    assert short_key("action_dict/observation/x") == "action_dict/observation/x"
    with pytest.raises(UserError, match=r"no low-dimensional key 'pose'; it has: action, .*observation/state"):
        dataset.column_key("pose")
    with pytest.raises(UserError, match=r"no split 'val'; it has train"):
        Dataset(made[0], "val")


@pytest.fixture
def copy(made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def _shard(directory: Path) -> Path:
    return sorted(directory.glob("*array_record*"))[0]


def test_a_truncated_shard_is_found_when_opening(copy: Path) -> None:
    data = _shard(copy).read_bytes()
    _shard(copy).write_bytes(data[:-1000])
    with pytest.raises(UserError, match=rf"{_shard(copy).name}: expected {len(data)} bytes, found {len(data) - 1000}"):
        Dataset(copy)
    _shard(copy).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    with pytest.raises(UserError, match=rf"{_shard(copy).name} is a Git LFS pointer, not the file itself"):
        Dataset(copy)
    _shard(copy).unlink()
    with pytest.raises(UserError, match="is missing"):
        Dataset(copy)


def test_a_flipped_bit_is_found_when_reading(copy: Path) -> None:
    data = bytearray(_shard(copy).read_bytes())
    data[5000] ^= 8
    _shard(copy).write_bytes(data)
    dataset = Dataset(copy)
    with pytest.raises(UserError, match=rf"{_shard(copy).name}: record 0 cannot be read .*mismatch") as caught:
        _frames(dataset, 0, "observation/wrist", [0])
    assert "sha256" in str(caught.value)


@pytest.mark.parametrize("fails_when", ["opened", "read"])
def test_a_disk_that_fails_for_a_moment_is_read_again(copy: Path, monkeypatch: pytest.MonkeyPatch, fails_when) -> None:
    expected = _frames(Dataset(copy), 0, "observation/wrist", [0])
    waits: list[float] = []
    monkeypatch.setattr(reading.time, "sleep", waits.append)
    error = RuntimeError(f"pread() failed: Input/output error; reading {_shard(copy)}; at byte 200270")
    opened = 0

    class Reader:  # as array_record behaves where the system's read fails
        def __init__(self, *arguments, **options):
            nonlocal opened
            opened += 1
            self.fails, self.reader = opened <= times, real(*arguments, **options)

        def ok(self):
            return not (self.fails and fails_when == "opened")

        def close(self):
            if self.fails:
                raise error

        def read(self, records):
            if self.fails:
                raise error
            return self.reader.read(records)

    real = shards.array_record_module.ArrayRecordReader
    monkeypatch.setattr(shards.array_record_module, "ArrayRecordReader", Reader)
    monkeypatch.setattr(direct.os, "preadv", lambda *arguments: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    times = 3
    np.testing.assert_array_equal(_frames(Dataset(copy), 0, "observation/wrist", [0]), expected)
    assert waits == [1.0, 4.0, 16.0] and opened == 4, "a new handle for every try"
    opened, times = 0, 4
    with pytest.raises(RunError, match=rf"{_shard(copy).name}: cannot be read.*Input/output error"):
        _frames(Dataset(copy), 0, "observation/wrist", [0])


def test_damage_is_not_read_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading.time, "sleep", lambda seconds: pytest.fail("waited for a damaged file"))
    for file, at in ((_shard(copy), 5000), (copy / records.index_file("train"), 100)):
        whole = file.read_bytes()
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
        with pytest.raises(UserError):
            _frames(Dataset(copy), 0, "observation/wrist", [0])
        file.write_bytes(whole)


def test_a_flipped_bit_anywhere_is_found_or_harmless(copy: Path) -> None:
    """The hashes of the format cover every record: what is read is what was written, or nothing is."""
    shard = _shard(copy)
    data = shard.read_bytes()
    dataset = Dataset(copy)
    places = [(e, c) for e, n in enumerate(LENGTHS) for c in range(-(-n // 8)) if dataset.locate(e, 8 * c).shard]
    places = [(e, c) for e, c in places if dataset.locate(e, 8 * c).shard == shard.name]
    written = [dataset.record(*place) for place in places]
    used = data.rstrip(b"\0")  # the file is padded to whole blocks
    found = 0
    for at in {*range(0, len(used), len(used) // 120), *range(0, 200, 9), *range(len(data) - 200, len(data), 40)}:
        with shard.open("r+b") as f:
            f.seek(at)
            f.write(bytes([data[at] ^ 1 << at % 8]))
        dataset.close()
        for place, expected in zip(places, written, strict=True):
            try:
                assert dataset.record(*place) == expected
            except UserError as e:
                found += shard.name in str(e)
        with shard.open("r+b") as f:
            f.seek(at)
            f.write(data[at : at + 1])
    assert found > 100


def _crc32c(data: bytes) -> int:
    """Bit by bit, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_a_record_of_something_else_is_named(copy: Path) -> None:
    from array_record.python import array_record_module

    dataset = Dataset(copy)
    cut = dataset.record(0, 0)[:-40]
    writer = array_record_module.ArrayRecordWriter(str(_shard(copy)), "group_size:1")
    writer.write(cut)
    writer.close()
    rlds_source.write_index(copy, chunk_crc32c=[_crc32c(cut)])
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["bytes"] = _shard(copy).stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"record 0 \(episode 0, steps from 0\): observation/wrist"):
        _frames(Dataset(copy), 0, "observation/wrist", [0])
    with pytest.raises(UserError, match="record 1 cannot be read"):
        _frames(Dataset(copy), 0, "observation/wrist", [9])


def test_sound_shards_of_another_dataset_are_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records have other values, the files the same size and valid hashes of their own; reading again is no use."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("a wrong checksum is read again"))
    from array_record.python import array_record_module

    dataset = Dataset(copy)
    with np.load(copy / "index" / "train.npz") as index:
        assert [int(c) for c in index["chunk_crc32c"]] == [
            _crc32c(dataset.record(e, c)) for e, n in enumerate(LENGTHS) for c in range(-(-n // 8))
        ]
    reader = array_record_module.ArrayRecordReader(str(_shard(copy)))
    records = [bytearray(r) for r in reader.read_all()]
    size = _shard(copy).stat().st_size
    for record in records:
        record[-1] ^= 1
    writer = array_record_module.ArrayRecordWriter(str(_shard(copy)), "group_size:1,uncompressed")
    for record in records:
        writer.write(bytes(record))
    writer.close()
    assert _shard(copy).stat().st_size == size
    with pytest.raises(
        UserError, match=rf"{_shard(copy).name}: record 2 has another checksum .* another dataset or was over"
    ):
        Dataset(copy).record(0, 2)


def test_a_column_in_memory_is_out_of_reach(copy: Path) -> None:
    file = copy / "columns" / "train" / "action.npy"
    column = Dataset(copy).column("action")
    expected = column.copy()
    file.write_bytes(bytes(file.stat().st_size))
    np.testing.assert_array_equal(column, expected)
    with pytest.raises(ValueError, match="read-only"):
        column[0] = 0
    with pytest.raises(UserError, match="action.npy: its checksum is not that of manifest.json"):
        Dataset(copy).column("action")


def test_the_columns_that_are_used_share_the_memory(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (copy / "columns" / "train" / "action.npy").stat().st_size
    monkeypatch.setattr(records, "COLUMNS_IN_MEMORY", 2 * size)
    dataset = Dataset(copy)
    first, second, third = (dataset.column(key) for key in ("action", "action_dict/cartesian_velocity", "counter"))
    assert isinstance(first, np.ndarray) and isinstance(second, np.ndarray)
    assert isinstance(third, columns.DiskColumn)
    assert dataset.column("counter") is third


def test_columns_that_choose_episodes_do_not_stay_in_memory(made) -> None:
    dataset = Dataset(made[0])
    action = dataset.column("action")
    assert select(dataset, source(success="reward"), "here").kept.all() and len(dataset.action_lengths) == len(LENGTHS)
    assert dataset.column_bytes == action.nbytes and dataset.column("action", keep=False) is action


def test_manifest_index_and_columns_are_checked(copy: Path) -> None:
    rlds_source.write_column(copy, "action", np.zeros((3, 7), np.float32))
    with pytest.raises(UserError, match=r"action.npy: expected shape \(66, 7\), found \(3, 7\)"):
        Dataset(copy).column("action")
    (copy / "columns" / "train" / "action.npy").unlink()
    with pytest.raises(UserError, match="action.npy"):
        Dataset(copy).column("action")

    manifest = json.loads((copy / "manifest.json").read_text())
    steps = manifest["splits"]["train"]["steps"]
    manifest["splits"]["train"]["steps"] = 7
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"expected \(episodes, steps, chunks\) \(3, 7, 9\).*found \(3, 66, 9\)"):
        Dataset(copy)
    manifest["splits"]["train"]["steps"] = steps
    current = manifest["format_version"]
    for version in (1, 99):  # version 1 had no checksums of the records
        manifest["format_version"] = version
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=rf"expected format .*{version}\): another version.*Make it again with"):
            Dataset(copy)
    del manifest["cameras"]
    manifest["format_version"] = current
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="fields cameras are missing"):
        Dataset(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"python -m data_prep.reshard --input="):
        Dataset(copy)


def test_files_of_another_dataset_are_refused(copy: Path, made, tmp_path: Path) -> None:
    """They have the right shapes: only their checksums tell."""
    for name in ("columns/train/action.npy", "index/train.npz", "index/train.texts.npz"):
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}: its checksum is not that of manifest.json.*another dataset"):
            dataset = Dataset(copy)
            dataset.episode_texts("episode_metadata/file_path")
            dataset.column("action")
        (copy / name).unlink()
        with pytest.raises(UserError, match=rf"{name}"):
            dataset = Dataset(copy)
            dataset.episode_texts("episode_metadata/file_path")
            dataset.column("action")
        shutil.copyfile(made[0] / name, copy / name)
    Dataset(copy).column("action")


def test_texts_of_the_episodes(made) -> None:
    dataset = Dataset(made[0])
    assert dataset.episode_texts("episode_metadata/file_path") == [f"/robot/{i}/trajectory.h5" for i in range(3)]
    with pytest.raises(UserError, match="no episode text 'path'; it has: episode_metadata/file_path"):
        dataset.episode_texts("path")


def test_a_missing_dataset_says_how_to_make_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UWM_DATA_DIR", str(tmp_path / "sets"))
    with pytest.raises(UserError) as caught:
        Dataset(dataset_dir("pusht"))
    for part in (str(tmp_path / "sets" / "pusht"), "data_prep.reshard", "data_prep.demo", "$UWM_DATA_DIR, which is"):
        assert part in str(caught.value)


def test_where_datasets_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UWM_DATA_DIR", raising=False)
    assert str(dataset_dir("pusht")) == "data/pusht"
    monkeypatch.setenv("UWM_DATA_DIR", "/mnt/sets")
    assert str(dataset_dir("pusht")) == "/mnt/sets/pusht"
    assert str(dataset_dir("/elsewhere/pusht")) == "/elsewhere/pusht"


def test_a_dataset_is_found_here_and_where_configs_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UWM_DATA_DIR", str(tmp_path / "sets"))
    assert find_dataset("mine") == tmp_path / "sets" / "mine"
    for directory in ("sets/mine", "sets/both", "both", "here"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "manifest.json").write_text("{}")
    assert find_dataset("mine") == tmp_path / "sets" / "mine"
    assert find_dataset("here") == Path("here") and find_dataset("both") == Path("both")
    assert find_dataset(tmp_path / "sets" / "mine") == tmp_path / "sets" / "mine"
    with pytest.raises(UserError, match="--dataset=s3://x: s3:// is not supported"):
        find_dataset("s3://x")
