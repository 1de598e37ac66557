"""What `test_reshard` leaves open: the meaning of features.json, file names, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.features import Feature
from data_prep.rlds import open_source
from data_prep.source_files import read_records
from uwm_jax.errors import UserError

_SPEC = importlib.util.spec_from_file_location("rlds_source", Path(__file__).parents[1] / "data" / "rlds_source.py")
rlds_source = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(rlds_source)


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
    with pytest.raises(UserError, match="names no splits"):
        open_source(source)
    (source / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset_info.json is not valid JSON"):
        open_source(source)


def test_a_dataset_without_steps(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    tree = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.Text()})
    rlds_source.write(tmp_path / "source", {"train": []}, tree)
    with pytest.raises(UserError, match=r"has no `steps`: not an RLDS dataset. Its keys: image, label"):
        open_source(tmp_path / "source")
