"""Records that resharding skips are counted, named, and not published beyond `--max_skipped`."""

from __future__ import annotations

import errno
import io
import json
import math
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.conversion.cutting import Result
from data_prep.conversion.training_layout import _SkipLimit, reshard, summary
from tests.data import rlds_source
from uwm_jax.data.records import Dataset
from uwm_jax.errors import RunError, UserError

FORMATS = ["tfrecord", "array_record"]
MISSING = "missing, though dataset_info.json declares it"


def _tree(size: tuple[int | None, int | None] = (8, 8), width: int = 2) -> Any:
    import tensorflow_datasets as tfds

    f = tfds.features
    step = {
        "observation": f.FeaturesDict({"image": f.Image(shape=(*size, 3), encoding_format="png")}),
        "action": f.Tensor(shape=(width,), dtype=np.float32),
    }
    return f.FeaturesDict({"steps": f.Dataset(step)})


def _record(tree: Any, number: int, length: int = 3, size: tuple[int, int] = (8, 8), width: int = 2) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size[::-1], (number, 0, 0)).save(out, "PNG")
    steps = [
        {"observation": {"image": out.getvalue()}, "action": np.resize(np.float32([number, t]), width)}
        for t in range(length)
    ]
    return rlds_source.serialize(tree, {"steps": steps})


def _write(path: Path, splits: dict[str, list[list[bytes]]], tree: Any = None, file_format: str = "tfrecord") -> None:
    rlds_source.write(path, splits, tree or _tree(), file_format)


def _records(count: int) -> list[bytes]:
    tree = _tree()
    return [_record(tree, i) for i in range(count)]


def _reshard(path: Path, **options: Any) -> dict[str, Any]:
    return reshard(path / "source", path / "out", pca_channels=4, **{"workers": 1, "max_skipped": 1.0} | options)


def _change(source: Path, **changes: Any) -> None:
    file = source / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_file_that_lacks_what_is_promised_is_told(tmp_path: Path, file_format: str, left: int) -> None:
    """A TFRecord file that is cut between two records looks whole; so does an empty file."""
    records = _records(5)
    _write(tmp_path / "other", {"train": [records[:left]]}, file_format=file_format)
    _write(tmp_path / "source", {"train": [records[:3], records[3:]], "val": [records[:1]]}, file_format=file_format)
    first = sorted((tmp_path / "source").glob("toy-train*"))[0]
    first.write_bytes(next((tmp_path / "other").glob("toy-train*")).read_bytes() if left else b"")
    manifest = _reshard(tmp_path)
    info = manifest["splits"]["train"]
    assert (info["episodes"], info["skipped"]) == (left + 2, {MISSING: 3 - left})
    note = f"{first.name}: ends after {left} of the 3 episodes that dataset_info.json declares"
    assert info["skipped_notes"] == [note]
    assert f"skipped: {3 - left}" in summary(manifest) and note in summary(manifest)
    assert manifest["splits"]["val"]["skipped"] == {}


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_that_is_cut_inside_a_record_counts_all_that_it_loses(tmp_path: Path, file_format: str) -> None:
    records = _records(6)
    _write(tmp_path / "source", {"train": [records[:4], records[4:]]}, file_format=file_format)
    first = sorted((tmp_path / "source").glob("toy-train*"))[0]
    first.write_bytes(first.read_bytes()[: len(records[0]) + 16 + 40])
    info = _reshard(tmp_path)["splits"]["train"]
    kept = 1 if file_format == "tfrecord" else 0  # an ArrayRecord file without its end has no index
    assert info["skipped"] == {"file truncated": 1, MISSING: 3 - kept}
    assert info["episodes"] == 2 + kept


def test_older_counts_of_a_split_are_compared_too(tmp_path: Path) -> None:
    records = _records(5)
    _write(tmp_path / "source", {"train": [records[:3], records[3:]]})
    split = {"numShards": "2", "statistics": {"numExamples": "7"}}
    _change(tmp_path / "source", splits={"train": split})
    info = _reshard(tmp_path)["splits"]["train"]
    assert (info["episodes"], info["skipped"]) == (5, {MISSING: 2})
    assert info["skipped_notes"][0].startswith("split 'train': ends after 5 of the 7 episodes")


def test_more_than_promised_is_taken_and_told(tmp_path: Path) -> None:
    _write(tmp_path / "source", {"train": [_records(3)]})
    _change(tmp_path / "source", splits=[{"name": "train", "shardLengths": ["2"]}])
    for file in (tmp_path / "source").glob("toy-train*"):
        assert file.name.endswith("-of-00001")
    info = _reshard(tmp_path)["splits"]["train"]
    assert (info["episodes"], info["skipped"]) == (3, {})
    assert "has 3 episodes, though dataset_info.json declares 2" in info["skipped_notes"][0]


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_size_of_most_episodes_is_taken(
    tmp_path: Path, file_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = _tree((None, None))
    records = [_record(tree, i, size=(16, 8) if i in (0, 5) else (8, 24)) for i in range(10)]
    _write(tmp_path / "source", {"train": [records]}, tree, file_format)
    manifest = _reshard(tmp_path)
    assert manifest["cameras"] == {"observation/image": {"height": 8, "width": 24}}
    assert manifest["splits"]["train"]["skipped"] == {"another image size": 2}
    assert "images of several sizes (8x24 in 8, 16x8 in 2 of the first episodes)" in capsys.readouterr().out
    np.testing.assert_array_equal(Dataset(tmp_path / "out").column("action")[:][::3, 0], [1, 2, 3, 4, 6, 7, 8, 9])


def test_nothing_is_published_beyond_max_skipped(tmp_path: Path) -> None:
    records = _records(20)
    bad = [_record(_tree(), i, size=(16, 16)) for i in range(3)]
    _write(tmp_path / "source", {"train": [bad + records[3:]], "val": [records[:4]]})
    with pytest.raises(RunError) as caught:
        _reshard(tmp_path, max_skipped=0.01)
    message = str(caught.value)
    # It may end after the first of two files, or know both by then.
    assert re.match(
        r"nothing was published: (at least )?3 of 24 episodes were skipped, more than --max_skipped=", message
    )
    assert re.search(r"--max_skipped=0\.13(, or more: not all files were read)?\.$", message)
    assert "3 x another image size" in message and "record 1: another image size: observation/image" in message
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match=r"published: 3 of 20 episodes of split 'train' were .*(?s:.*)=0\.15\.$"):
        _reshard(tmp_path, max_skipped=0.13)
    assert _reshard(tmp_path, max_skipped=0.15)["splits"]["train"]["episodes"] == 17


def test_a_job_that_ends_early_says_that_it_read_only_a_part() -> None:
    limit = _SkipLimit(0.01, [20, 4])
    result = Result(lengths=[5] * 17)
    result.skipped["another image size"] = 3
    with pytest.raises(RunError) as caught:
        limit.watch(result)
    assert str(caught.value).startswith("nothing was published: at least 3 of 24 episodes were skipped")
    assert str(caught.value).endswith("--max_skipped=0.13, or more: not all files were read.")


def test_each_result_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million files would otherwise be counted half a million million times."""
    counted: list[Result] = []
    monkeypatch.setattr(Result, "episodes", property(lambda self: counted.append(self) or len(self.lengths)))
    limit = _SkipLimit(0.01, [100])
    for _ in range(10):
        limit.watch(Result(lengths=[5] * 10))
    assert len(counted) == 10


def test_one_episode_may_always_be_skipped_in_all(tmp_path: Path) -> None:
    records, bad = _records(4), _record(_tree(), 9, size=(16, 16))
    _write(tmp_path / "source", {"train": [records + [bad]], "val": [records + [bad]]})
    assert _reshard(tmp_path, splits=["val"], max_skipped=0)["splits"]["val"]["episodes"] == 4
    with pytest.raises(RunError, match="2 of 10 episodes were skipped"):
        _reshard(tmp_path, max_skipped=0, overwrite=True)
    assert list(Dataset(tmp_path / "out", "val").manifest["splits"]) == ["val"]  # the one from before


def test_a_split_that_is_lost_altogether_is_not_left_out_in_silence(tmp_path: Path) -> None:
    records, bad = _records(200), [_record(_tree(), i, size=(16, 16)) for i in range(2)]
    _write(tmp_path / "source", {"train": [records], "val": [bad]})
    with pytest.raises(RunError, match="2 of 2 episodes of split 'val' were skipped"):
        _reshard(tmp_path, max_skipped=0.01)


def test_a_hopeless_source_ends_the_job_at_its_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [_record(_tree(), i, size=(16, 16)) for i in range(4)]
    _write(tmp_path / "source", {"train": [bad, *([r] for r in _records(6))]})
    monkeypatch.setattr("data_prep.conversion.training_layout.assemble", None)
    with pytest.raises(RunError, match="4 of 10 episodes were skipped"):
        _reshard(tmp_path, max_skipped=0.2)


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_a_share_that_is_none(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match="--max_skipped=.*: expected a share"):
        _reshard(tmp_path, max_skipped=share)


@pytest.mark.slow
def test_several_processes_count_the_same(tmp_path: Path) -> None:
    records = _records(9)
    _write(tmp_path / "source", {"train": [records[:3], records[3:6], records[6:]]}, file_format="array_record")
    first = sorted((tmp_path / "source").glob("toy-train*"))[0]
    first.write_bytes(first.read_bytes()[:500])
    info = _reshard(tmp_path, workers=2)["splits"]["train"]
    assert (info["episodes"], info["skipped"]) == (6, {"file truncated": 1, MISSING: 2})
    with pytest.raises(RunError, match="3 of 9 episodes were skipped"):
        _reshard(tmp_path, workers=2, max_skipped=0.1, overwrite=True)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    ("room", "width", "shard_mb"),
    [(140_000, 256, 0), (40_000, 2, 256)],
)
def test_a_full_disk_is_told_by_the_name_of_the_file(
    tmp_path: Path, file_format: str, room: int, width: int, shard_mb: int
) -> None:
    """Here a file may only grow to `room` bytes, which the system tells as it tells a full disk."""
    tree = _tree(width=width)
    records = [_record(tree, i, length=100, width=width) for i in range(3)]
    _write(tmp_path / "source", {"train": [records]}, tree, file_format)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            _reshard(tmp_path, shard_mb=shard_mb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert Path(caught.value.filename) == tmp_path / "out" / "parts" / "train.00000"
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
