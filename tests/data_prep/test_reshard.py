"""Resharding against TFDS's own reader and protobuf messages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.conversion.layout_options import Options
from data_prep.conversion.training_layout import build, main_split, reshard, summary
from data_prep.sources import rlds
from tests.data import rlds_source
from uwm_jax.codecs import fit_pca
from uwm_jax.data.records import Dataset
from uwm_jax.data.windows import split_episodes
from uwm_jax.errors import UserError

LENGTHS = [37, 5, 16, 33, 1, 20]
OPTIONS: dict[str, Any] = {"pca_channels": 4, "workers": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("reshard")
    episodes = rlds_source.make(root / "source", LENGTHS)
    reshard(root / "source", root / "out", codec_size=(16, 24), **OPTIONS)
    return root / "source", root / "out", episodes


def test_tfds_reads_every_step_and_episode_field(made) -> None:
    import tensorflow_datasets as tfds

    _, out, episodes = made
    chunks = list(tfds.builder_from_directory(out).as_data_source("train"))
    at = 0
    for episode in episodes:
        steps = []
        for start in range(0, len(episode["steps"]), 8):
            chunk = chunks[at]
            at += 1
            assert chunk["chunk"] == {"first_step": start, "episode_steps": len(episode["steps"])}
            assert chunk["episode_metadata"]["file_path"].decode() == episode["episode_metadata"]["file_path"]
            assert chunk["episode_metadata"]["seed"] == episode["episode_metadata"]["seed"]
            steps += list(chunk["steps"])
        assert len(steps) == len(episode["steps"])
        for found, expected in zip(steps, episode["steps"], strict=True):
            assert found["language_instruction"].decode() == expected["language_instruction"]
            assert list(found["tokens"]) == expected["tokens"]
            assert found["counter"] == expected["counter"]
            assert found["is_first"] == expected["is_first"]
            np.testing.assert_array_equal(found["embedding"], expected["embedding"])
            np.testing.assert_array_equal(found["observation"]["state"], expected["observation"]["state"])
            # TFDS stores float64 as float32.
            velocity = expected["action_dict"]["cartesian_velocity"].astype(np.float32)
            np.testing.assert_array_equal(found["action_dict"]["cartesian_velocity"].astype(np.float32), velocity)
            np.testing.assert_array_equal(found["action"].astype(np.float32), expected["action"].astype(np.float32))
    assert at == len(chunks)


def test_image_bytes_are_untouched(made) -> None:
    from tensorflow_datasets.proto import tf_example_pb2

    _, out, episodes = made
    dataset = Dataset(out)
    for number, episode in enumerate(episodes):
        for start in range(0, len(episode["steps"]), 8):
            example = tf_example_pb2.Example.FromString(dataset.record(number, start // 8))
            for camera in rlds_source.CAMERAS:
                found = list(example.features.feature[f"steps/observation/{camera}"].bytes_list.value)
                assert found == [s["observation"][camera] for s in episode["steps"][start : start + 8]]


def test_columns_index_and_manifest(made) -> None:
    _, out, episodes = made
    dataset = Dataset(out)
    np.testing.assert_array_equal(dataset.episode_lengths, LENGTHS)
    np.testing.assert_array_equal(dataset.episode_starts, np.cumsum([0, *LENGTHS[:-1]]))
    steps = [s for e in episodes for s in e["steps"]]
    expected = {
        "action": np.stack([s["action"] for s in steps]).astype(np.float32),
        "action_dict/gripper_position": np.stack([s["action_dict"]["gripper_position"] for s in steps]).astype("f4"),
        "observation/state": np.stack([s["observation"]["state"] for s in steps]),
        "counter": np.array([s["counter"] for s in steps]),
        "is_first": np.array([s["is_first"] for s in steps], np.int64),
    }
    for key, values in expected.items():
        np.testing.assert_array_equal(dataset.column(key), values)
        assert dataset.column(key).dtype == values.dtype
    assert "embedding" not in dataset.column_keys  # too wide: stays in the records
    assert dataset.cameras == {"observation/exterior": (24, 32), "observation/wrist": (16, 16)}
    info = dataset.manifest["splits"]["train"]
    assert (info["episodes"], info["steps"], info["chunks"]) == (6, sum(LENGTHS), 5 + 1 + 2 + 5 + 1 + 3)
    assert info["skipped"] == {}
    for shard in info["shards"]:
        assert hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_codec_is_fitted_on_training_frames_only(made) -> None:
    from PIL import Image

    _, out, episodes = made
    train, held_out = split_episodes(len(LENGTHS), 0.05)
    assert len(held_out) == 1
    dataset = Dataset(out)
    frames = np.zeros((sum(LENGTHS[i] for i in train), 2, 16, 24, 3), np.uint8)
    at = 0
    for i in train:
        raw = {c: np.empty((LENGTHS[i], *size, 3), np.uint8) for c, size in dataset.cameras.items()}
        dataset.frames(int(i), dict.fromkeys(raw, range(LENGTHS[i])), raw)
        for t in range(LENGTHS[i]):
            for v, camera in enumerate(sorted(raw)):
                image = Image.fromarray(raw[camera][t]).resize((24, 16), Image.Resampling.BILINEAR)
                frames[at, v] = np.asarray(image)
            at += 1
    expected = fit_pca(frames, 8, 4)
    with np.load(out / "codec" / "pca.npz", allow_pickle=False) as stored:
        assert (int(stored["patch"]), int(stored["channels"]), stored["image_size"].tolist()) == (8, 4, [16, 24])
        for v, name in enumerate(("exterior", "wrist")):
            np.testing.assert_array_equal(stored[f"{name}/mean"], expected["mean"][v])
            np.testing.assert_array_equal(stored[f"{name}/components"], expected["components"][v])
        assert stored["scale"] == expected["scale"]


def test_array_record_input_gives_the_same_dataset(made, tmp_path: Path) -> None:
    _, out, _ = made
    rlds_source.make(tmp_path / "source", LENGTHS, file_format="array_record")
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(16, 24), **OPTIONS)
    assert Dataset(tmp_path / "out").fingerprint == Dataset(out).fingerprint


def test_damaged_records_are_skipped_counted_and_named(tmp_path: Path) -> None:
    tree, episodes = rlds_source.features(), rlds_source.make_episodes([6, 7, 8, 9, 4])
    episodes[3]["steps"][5]["observation"]["wrist"] = episodes[3]["steps"][5]["observation"]["exterior"]
    episodes[4]["steps"][2]["observation"]["wrist"] = b"no image"
    records = [rlds_source.serialize(tree, e) for e in episodes]
    rlds_source.write(tmp_path / "source", {"train": [records, records[:2]]}, tree)
    first, second = sorted((tmp_path / "source").glob("toy-train*"))
    data = bytearray(first.read_bytes())
    data[16 + len(records[0]) + 12 + 100] ^= 4  # inside the second record
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-7])

    manifest = reshard(tmp_path / "source", tmp_path / "out", max_skipped=1, **OPTIONS)
    info = manifest["splits"]["train"]
    assert info["skipped"] == {
        "data checksum mismatch": 1,
        "another image size": 1,
        "unreadable image": 1,
        "file truncated": 1,
    }
    assert "toy-train.tfrecord-00000-of-00002: record 1: data checksum mismatch" in info["skipped_notes"][0]
    assert "observation/wrist at step 5" in info["skipped_notes"][1]
    np.testing.assert_array_equal(Dataset(tmp_path / "out").episode_lengths, [6, 8, 6])


def test_a_broken_length_ends_the_file(tmp_path: Path) -> None:
    rlds_source.make(tmp_path / "source", [3, 4, 5, 6])
    first = sorted((tmp_path / "source").glob("toy-train*"))[0]
    data = bytearray(first.read_bytes())
    data[0] ^= 1
    first.write_bytes(data)
    info = reshard(tmp_path / "source", tmp_path / "out", max_skipped=0.5, **OPTIONS)["splits"]["train"]
    assert info["skipped"] == {
        "length checksum mismatch (rest of the file lost)": 1,
        "missing, though dataset_info.json declares it": 1,
    }
    assert info["episodes"] == 2


def test_nothing_is_left_behind_and_nothing_overwritten_by_default(made, tmp_path: Path) -> None:
    source, _, _ = made
    (tmp_path / "out").mkdir()
    reshard(source, tmp_path / "out", **OPTIONS)  # an empty directory is as good as none
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*"))
    with pytest.raises(UserError, match="--overwrite"):
        reshard(source, tmp_path / "out", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*")) == before
    reshard(source, tmp_path / "out", overwrite=True, **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert Dataset(tmp_path / "out").num_episodes == len(LENGTHS)


def test_overwrite_replaces_training_datasets_only(made, tmp_path: Path) -> None:
    source, out, _ = made
    copy = shutil.copytree(source, tmp_path / "rlds" / "1.0.0")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    for output in (copy, copy / "chunks", copy.parent, tmp_path):
        with pytest.raises(UserError, match="inside the other"):
            reshard(copy, output, overwrite=True, **OPTIONS)
    foreign = tmp_path / "rlds"  # holds another RLDS dataset, and no manifest.json
    with pytest.raises(UserError, match="is not a training dataset, so --overwrite does not replace it"):
        reshard(source, foreign, overwrite=True, **OPTIONS)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    (foreign / "manifest.json").write_text(json.dumps({"name": "a web app"}))
    with pytest.raises(UserError, match="is not a training dataset"):
        reshard(source, foreign, overwrite=True, **OPTIONS)
    assert (copy / "features.json").exists()


def test_an_interrupted_overwrite_keeps_the_old_dataset(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, _ = made
    shutil.copytree(out, tmp_path / "out")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.conversion.training_layout.fit_codec", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reshard(source, tmp_path / "out", chunk_steps=4, codec_size=(16, 16), overwrite=True, **OPTIONS)
    assert Dataset(tmp_path / "out").fingerprint == Dataset(out).fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.building", "out"]  # to be continued


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pca_channels": 999}, r"--pca_channels=999: expected 1 to 192"),
        ({"pca_channels": 0}, r"--pca_channels=0"),
        ({"pca_patch": 0}, r"--pca_patch=0"),
        ({"codec_size": (16, 20)}, r"--codec_size=16,20: expected positive multiples of --pca_patch=8"),
        ({"codec_size": (0, 16)}, r"--codec_size=0,16"),
        ({"val_ratio": 1.0}, r"--val_ratio=1.0"),
        ({"val_ratio": -0.1}, r"--val_ratio=-0.1"),
        ({"val_ratio": float("nan")}, r"--val_ratio=nan"),
    ],
)
def test_bad_options_are_found_before_any_work(
    made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("data_prep.conversion.training_layout.run_jobs", None)
    with pytest.raises(UserError, match=message):
        reshard(made[0], tmp_path / "out", **OPTIONS | options)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_made_is_one_message(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.conversion.training_layout.run_jobs", None)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=r"file.out cannot be created: .*Choose another --output"):
        reshard(made[0], tmp_path / "file" / "out", **OPTIONS)
    with pytest.raises(UserError, match="file exists"):
        reshard(made[0], tmp_path / "file", **OPTIONS)
    with pytest.raises(UserError, match="file exists and is not a training dataset"):
        reshard(made[0], tmp_path / "file", overwrite=True, **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_progress_ends_at_the_size_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    rlds_source.make(tmp_path / "source", [9, 12, 4, 6], file_format=file_format)
    first, second = sorted((tmp_path / "source").glob("toy-train*"))
    data = bytearray(first.read_bytes())
    data[2000] ^= 4  # inside the first record: it is skipped
    first.write_bytes(data)
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, initial: int, **kwargs: Any):
            self.total, self.n = total, initial
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *args: Any) -> None:
            pass

        def set_postfix(self, episodes: int, refresh: bool) -> None:
            self.episodes = episodes

        def update(self, n: int) -> None:
            assert n >= 0
            self.n += n
            assert self.n <= self.total

    monkeypatch.setattr("data_prep.conversion.cutting.tqdm", Bar)
    info = reshard(tmp_path / "source", tmp_path / "out", **OPTIONS)["splits"]["train"]
    assert sum(info["skipped"].values()) >= 1
    assert bars[0].n == bars[0].total == first.stat().st_size + second.stat().st_size
    assert bars[0].episodes == info["episodes"] == 4 - sum(info["skipped"].values())


def test_shards_roll_over_and_chunks_have_the_asked_size(made, tmp_path: Path) -> None:
    source, out, _ = made
    manifest = reshard(source, tmp_path / "out", chunk_steps=1, shard_mb=0, **OPTIONS)
    info = manifest["splits"]["train"]
    assert info["chunks"] == info["steps"] == len(info["shards"])
    dataset, before = Dataset(tmp_path / "out"), Dataset(out)
    for camera, size in before.cameras.items():
        found, expected = ({camera: np.zeros((3, *size, 3), np.uint8)} for _ in range(2))
        dataset.frames(3, {camera: [0, 17, 32]}, found)
        before.frames(3, {camera: [0, 17, 32]}, expected)
        np.testing.assert_array_equal(found[camera], expected[camera])


def test_what_cannot_be_an_input_is_explained(made, tmp_path: Path) -> None:
    source, out, _ = made
    with pytest.raises(UserError, match=r"Did you mean .*source"):
        reshard(source.parent, tmp_path / "x")
    with pytest.raises(UserError, match="already in the training layout"):
        reshard(out, tmp_path / "x")
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        reshard(source, tmp_path / "x", splits=["test"])
    rlds_source.make(tmp_path / "partial", [2, 2])
    sorted((tmp_path / "partial").glob("toy-train*"))[1].unlink()
    with pytest.raises(UserError, match="1 of 2 files of split 'train' are missing"):
        reshard(tmp_path / "partial", tmp_path / "x")


def test_missing_files_are_named_in_the_manifest_where_they_are_allowed(tmp_path: Path) -> None:
    rlds_source.make(tmp_path / "source", [3, 4, 5, 6])
    first, second = sorted((tmp_path / "source").glob("toy-train*"))
    data = second.read_bytes()
    second.unlink()

    def make(allowed: int) -> dict[str, Any]:
        options = Options(**OPTIONS, max_skipped=0)
        made = build(lambda: rlds.corpus(tmp_path / "source", (), allowed), tmp_path / "out", options)
        assert made is not None
        return made

    with pytest.raises(UserError, match=r"1 of 2 files .* --max_missing_files=N names them"):
        make(0)
    manifest = make(1)
    info = manifest["splits"]["train"]
    assert (info["missing_files"], info["episodes"], info["skipped"]) == ([second.name], 2, {})
    assert f"missing files: {second.name}" in summary(manifest)
    np.testing.assert_array_equal(Dataset(tmp_path / "out").episode_lengths, [3, 4])
    second.write_bytes(data)
    first.unlink()
    shutil.rmtree(tmp_path / "out")
    assert make(1)["splits"]["train"]["missing_files"] == [first.name]
    np.testing.assert_array_equal(Dataset(tmp_path / "out").episode_lengths, [5, 6])


@pytest.mark.slow
def test_processes_change_nothing(made, tmp_path: Path) -> None:
    source, out, _ = made
    reshard(source, tmp_path / "out", codec_size=(16, 24), pca_channels=4, workers=2)
    for file in out.rglob("*"):
        if file.is_file() and file.suffix != ".npz" and "manifest" not in file.name:
            assert (tmp_path / "out" / file.relative_to(out)).read_bytes() == file.read_bytes(), file
    assert Dataset(tmp_path / "out").fingerprint == Dataset(out).fingerprint


@pytest.mark.slow
def test_command_line(made, tmp_path: Path) -> None:
    source, _, _ = made

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "data_prep.reshard", *args],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )

    done = run(f"--input={source}", f"--output={tmp_path / 'out'}", "--codec_size=16,16", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert f"train: 6 episodes, {sum(LENGTHS)} steps" in done.stdout
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["splits"]["train"]["action"]["count"] == sum(
        LENGTHS
    )
    again = run(f"--input={source}", f"--output={tmp_path / 'out'}")
    assert again.returncode == 2 and "--overwrite" in again.stderr and "Traceback" not in again.stderr


def test_the_main_split_is_train_or_the_first_as_stored() -> None:
    assert main_split({"splits": {"a": {}, "train": {}}}) == "train"
    assert main_split({"splits": {"b": {}, "a": {}}}) == "b"
