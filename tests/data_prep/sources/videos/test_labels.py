"""Labels in the formats of video corpora."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.sources.videos.labels import Labels, read_labels
from uwm_jax.errors import UserError


def written(tmp_path: Path, name: str, text: str) -> Labels:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    return read_labels(tmp_path / name)


def test_csv_by_path_and_by_name(tmp_path: Path) -> None:
    labels = written(tmp_path, "labels.csv", 'file, text\na/b.mp4,"pick, then place"\nc,Öffnen\nd.webm,push\n')
    assert labels.of(["a/b.mp4"]) == "pick, then place"
    assert labels.of(["x/y/c.mp4"]) == "Öffnen" and labels.of(["deep/d.webm"]) == "push"
    assert labels.of(["b.mp4"]) is None and labels.of(["d.mp4"]) is None
    assert labels.of(["/", ".", ".."]) is None
    assert labels.of(["none", "c.avi"]) == "Öffnen"  # an episode's name, then its files
    assert labels.used == {"a/b.mp4", "c", "d.webm"}


def test_csv_in_quotes(tmp_path: Path) -> None:
    labels = written(tmp_path, "labels.csv", 'file,text\n./a.mp4, "open,\nthen close"\r\nb.mp4,lift\u2028turn\n')
    assert labels.of(["a.mp4"]) == "open,\nthen close" and labels.of(["b.mp4"]) == "lift\u2028turn"


def test_kinetics(tmp_path: Path) -> None:
    labels = written(
        tmp_path,
        "train.csv",
        "label,youtube_id,time_start,time_end,split,is_cc\nabseiling,-3B32lodo2M,59,69,train,0\n"
        "air drumming,3caPS4FHFF8,36,46,train,0\nbowling,3caPS4FHFF8,136,146,train,0\n",
    )
    assert labels.of(["abseiling/-3B32lodo2M_000059_000069.mp4"]) == "abseiling"
    assert labels.of(["-3B32lodo2M.mp4"]) == "abseiling"
    assert labels.of(["3caPS4FHFF8_000136_000146.mp4"]) == "bowling"
    assert labels.of(["3caPS4FHFF8.mp4"]) is None  # of two clips


def test_something_something(tmp_path: Path) -> None:
    entries = [
        {"id": "78687", "label": "holding potato next to box", "template": "Holding [something] next to [something]"},
        {"id": "9"},  # of the test split
    ]
    labels = written(tmp_path, "train.json", json.dumps(entries))
    assert labels.of(["20bn/78687.webm"]) == "holding potato next to box" and labels.of(["9.webm"]) is None


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "", "its columns are missing"),
        ("a.csv", "file,label\na,b\n", "its columns are file,label. Expected a CSV file with the columns file,text"),
        ("a.csv", "file,text\n", "holds no label"),
        ("a.csv", "file,text\na.mp4\n", "line 2 has fewer columns"),
        ("a.csv", "file,text\na.mp4,put, then lift\n", "line 2 has more columns than the first line. Put a text with"),
        ("a.csv", 'file,text\na.mp4,"put\nb.mp4,lift\n', "is not CSV .unexpected end of data"),
        ("a.csv", "file,text\na,x\na,y\n", "'a' has two texts, 'x' and 'y'"),
        ("a.csv", "label,youtube_id,time_start,time_end\nrun,abc,one,2\n", "abc: expected times in seconds"),
        ("a.json", "[", "is not JSON"),
        ("a.json", '{"a": 1}', "unknown content"),
        ("a.json", '["a"]', "unknown content"),
        ("a.csv", "file,text\na,\n", "holds no label"),
        ("a.csv", f"file,text\na,{'x' * 200_000}\n", "is not CSV"),
        ("a.csv", "label,youtube_id,time_start,time_end\nrun,abc,inf,2\n", "abc: expected times in seconds"),
        ("a.json", '[{"id": 1, "label": {}}, {"id": 2, "label": {"a": 1}}]', "label of '2' is .* expected a string"),
        ("a.json", '[{"id": 1, "label": "\\ud800"}]', "label of '1' is .* expected a string"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        written(tmp_path, name, text)


def test_a_missing_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_labels(tmp_path / "none.csv")
