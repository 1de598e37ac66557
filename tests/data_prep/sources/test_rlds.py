"""Not in `test_reshard`: the meaning of features.json, file names, and refused inputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from data_prep.sources.rlds import open_source
from data_prep.sources.source_files import read_records
from tests.data import rlds_source
from uwm_jax.data.features import Feature
from uwm_jax.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rlds_source.make(tmp_path / "source", [3, 4, 2])
    return tmp_path / "source"


def _change(path: Path, **changes: Any) -> None:
    file = path / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_features(source: Path) -> None:
    features = open_source(source).features
    assert features["steps/observation/exterior"] == Feature((24, 32, 3), "uint8", image=True)
    assert features["steps/observation/state"] == Feature((3,), "float32")
    assert features["steps/action_dict/cartesian_velocity"] == Feature((6,), "float64")
    assert features["steps/counter"] == Feature((), "int64")
    assert features["steps/language_instruction"] == Feature((), "string")
    assert features["steps/tokens"].shape is None  # ragged: a number of its own per step
    assert features["episode_metadata/seed"] == Feature((), "int64")


def test_shard_names_follow_the_template(source: Path) -> None:
    found = open_source(source)
    assert [f.name for f in found.splits["train"]] == [
        "toy-train.tfrecord-00000-of-00002",
        "toy-train.tfrecord-00001-of-00002",
    ]
    split = {"name": "train", "shardLengths": ["2", "1"], "filepathTemplate": "{SPLIT}_{SHARD_INDEX}.{FILEFORMAT}"}
    for i, file in enumerate(found.splits["train"]):
        file.rename(source / f"train_0000{i}.tfrecord")
    _change(source, splits=[split])
    assert [f.name for f in open_source(source).splits["train"]] == ["train_00000.tfrecord", "train_00001.tfrecord"]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_sizes_of_records_add_up_to_the_file(tmp_path: Path, file_format: str) -> None:
    episodes = rlds_source.make(tmp_path / "source", [3, 4, 2, 5, 1], file_format=file_format)
    tree, at = rlds_source.features(), 0
    for file in open_source(tmp_path / "source").splits["train"]:
        total = 0
        for record, reason, size in read_records(file, file_format):
            assert record == rlds_source.serialize(tree, episodes[at]) and not reason and size > 0
            at, total = at + 1, total + size
        assert total == file.stat().st_size
    assert at == len(episodes)


def test_what_is_no_rlds_dataset(source: Path) -> None:
    _change(source, fileFormat="parquet")
    with pytest.raises(UserError, match="fileFormat is 'parquet'; expected tfrecord or array_record"):
        open_source(source)
    _change(source, fileFormat="tfrecord", splits=[])
    with pytest.raises(UserError, match="lists no splits"):
        open_source(source)
    (source / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset_info.json: not JSON"):
        open_source(source)


def test_a_dataset_without_steps(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    tree = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.Text()})
    rlds_source.write(tmp_path / "source", {"train": []}, tree)
    with pytest.raises(UserError, match=r"has no `steps`: not an RLDS dataset. Its keys: image, label"):
        open_source(tmp_path / "source")


BAD_NAMES = ["../../outside", "/outside", "a/b", "..", "", "a\\b", "a\ud800"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_out_of_the_dataset_are_refused(source: Path, name: str) -> None:
    """Names of a dataset that cannot name a file of the output; nothing is written for any of them."""
    kept = (source / "dataset_info.json").read_text()
    _change(source, name=name)
    with pytest.raises(UserError, match=r"dataset_info.json: the dataset's name is .*cannot name a file"):
        open_source(source)
    (source / "dataset_info.json").write_text(kept)
    _change(source, splits=[{"name": name, "shardLengths": ["2", "1"]}])
    with pytest.raises(UserError, match=r"dataset_info.json: the name of a split is .*cannot name a file"):
        open_source(source)
    if name:
        template = name + "/{SPLIT}"
        _change(source, splits=[{"name": "train", "shardLengths": ["2", "1"], "filepathTemplate": template}])
        with pytest.raises(UserError, match=r"dataset_info.json: the name of a file of split 'train' is .*cannot name"):
            open_source(source)


@pytest.mark.parametrize("name", ["..", "../../outside", "/outside", "a\\b", "a\ud800", "", "."])
@pytest.mark.parametrize("at", ["step", "episode", "observation"])
def test_features_that_lead_out_of_the_dataset_are_refused(source: Path, name: str, at: str) -> None:
    file = source / "features.json"
    tree = json.loads(file.read_text())
    features = tree["featuresDict"]["features"]
    steps = features["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    place = {"step": steps, "episode": features, "observation": steps["observation"]["featuresDict"]["features"]}[at]
    place[name] = steps["reward"]
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"features.json: the name of a feature is .*cannot name a file"):
        open_source(source)


def test_older_dataset_infos(source: Path) -> None:
    expected = open_source(source)
    assert expected.lengths == {"train": [2, 1]} and expected.totals == {"train": 3}
    for splits, lengths, total in (
        ({"train": {"shardLengths": ["2", "1"]}}, [2, 1], 3),
        ({"train": {"name": "train", "shard_lengths": [2, 1], "num_bytes": 5}}, [2, 1], 3),
        ([{"name": "train", "numShards": "2", "statistics": {"numExamples": "3"}}], [None, None], 3),
        ({"train": {"numShards": 2}}, [None, None], None),
    ):
        _change(source, splits=splits)
        found = open_source(source)
        assert found.splits == expected.splits
        assert (found.lengths["train"], found.totals["train"]) == (lengths, total)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ("train", "`splits` is not a list of objects"),
        (["train"], "`splits` is not a list of objects"),
        ({"train": 3}, "`splits` is not a list of objects"),
        ([{"shardLengths": ["3"]}], "the name of a split is None; expected a string"),
        (
            [{"name": "train", "shardLengths": ["x"]}],
            "split 'train': expected integers in shardLengths, numShards and numExamples",
        ),
        ([{"name": "train", "shardLengths": 3}], "shardLengths is '3', not a list"),
        (
            [{"name": "train", "numShards": "two"}],
            "split 'train': expected integers in shardLengths, numShards and numExamples",
        ),
        ([{"name": "train", "numShards": "9" * 23}], "numShards has 9{23}; expected 0 to 1000000"),
        ([{"name": "train", "numShards": 30_000_000}], "numShards has 30000000; expected 0 to 1000000"),
        ([{"name": "train", "numShards": -1}], "numShards has -1; expected 0"),
        ([{"name": "train", "numShards": 2, "statistics": {"numExamples": "-3"}}], "numExamples has -3; expected 0"),
        ([{"name": "train", "shardLengths": ["-2", "5"]}], "shardLengths has -2; expected 0"),
        ([{"name": "train", "shardLengths": ["9" * 23, "1"]}], "shardLengths has 9{23}; expected 0"),
        ([{"name": "train", "shardLengths": [math.inf]}], "expected integers in"),
        ([{"name": "train", "shardLengths": [1.5, 1.5]}], "shardLengths has 1.5; expected 0"),
        ([{"name": "train", "shardLengths": "21"}], "shardLengths is '21', not a list"),
        ([{"name": "train", "shardLengths": ["2", "1"]}] * 2, "two entries of `splits` have the name 'train'"),
        (
            [{"name": "train", "shardLengths": ["2", "1"], "filepathTemplate": "{SPLIT}.{FILEFORMAT}"}],
            r"the 2 files of split 'train' have the same name, 'train.tfrecord'",
        ),
    ],
)
def test_splits_of_no_known_form(source: Path, splits: Any, message: str) -> None:
    _change(source, splits=splits)
    with pytest.raises(UserError, match=message):
        open_source(source)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "expected a JSON object"),
        (b"\xff\xfe{", "not JSON: the text is not UTF-8"),
        (b"[" * 100_000, "not valid JSON: nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "is a Git LFS pointer"),
        (b"\x1f\x8b\x08\0", "is compressed by gzip"),
    ],
)
def test_json_that_is_none(source: Path, name: str, content: bytes, message: str) -> None:
    (source / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}:? {message}"):
        open_source(source)


def _tensor(**fields: Any) -> dict[str, Any]:
    return {"featuresDict": {"features": {"a": {"tensor": fields}}}}


@pytest.mark.parametrize(
    "tree",
    [
        {"featuresDict": 3},
        {"featuresDict": {"features": {"a": 1}}},
        {"sequence": {}},
        _tensor(dtype=True),
        _tensor(shape={"dimensions": ["9" * 24]}),
        _tensor(shape={"dimensions": ["two"]}),
    ],
)
def test_feature_trees_of_no_known_form(source: Path, tree: Any) -> None:
    (source / "features.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"features.json is not in the schema of TFDS"):
        open_source(source)


def test_the_newest_version_is_meant(source: Path, tmp_path: Path) -> None:
    for version in ("1.9.0", "1.10.0", "1.2.30", "old", "incomplete.ABC_2.0.0"):
        (tmp_path / "set" / version).mkdir(parents=True)
        (tmp_path / "set" / version / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"Did you mean .*set/1\.10\.0\?"):
        open_source(tmp_path / "set")


def test_shards_of_another_count_are_named(source: Path) -> None:
    _change(source, splits=[{"name": "train", "shardLengths": ["1", "1", "1"]}])
    with pytest.raises(UserError, match=r"'train' has 3 files by its shardLengths .*files here are named -of-00002"):
        open_source(source)
    template = {"filepathTemplate": "{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
    _change(source, splits=[{"name": "train", "shardLengths": ["1", "1", "1"]} | template])
    (source / "train.tfrecord-00003-of-00005").touch()
    with pytest.raises(UserError, match=r"files here are named -of-00005"):
        open_source(source)
    _change(source, splits=[{"name": "train"}])
    with pytest.raises(UserError, match=r"'train' has 0 files by its shardLengths .*files here are named -of-00002"):
        open_source(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "is a Git LFS pointer"),
        (b"\x1f\x8b\x08\0", "is compressed by gzip"),
    ],
)
def test_shards_that_are_not_the_data(source: Path, content: bytes, message: str) -> None:
    first, second = open_source(source).splits["train"]
    second.write_bytes(content)
    with pytest.raises(UserError, match=f"{second.name} {message}[^(]*$"):
        open_source(source)
    first.write_bytes(content)
    with pytest.raises(UserError, match=rf"{first.name} {message}.* \(2 of the 2 files of split 'train' are\)"):
        open_source(source)
    assert open_source(source, ["val"]).splits["train"] == [first, second]  # what is not asked for is not looked at


def test_a_record_whose_length_looks_like_gzip_is_no_gzip(source: Path) -> None:
    import tensorflow as tf

    first, _ = open_source(source).splits["train"]
    with tf.io.TFRecordWriter(str(first)) as writer:
        writer.write(bytes(0x088B1F))
    assert first.read_bytes()[:3] == b"\x1f\x8b\x08"
    assert first in open_source(source).splits["train"]
