"""Manifests of another form, and names in them that would lead out of the dataset."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from uwm_jax.data.records import FORMAT_VERSION, read_manifest
from uwm_jax.errors import UserError

FEATURE = {"shape": [2], "dtype": "float32", "image": False, "column": True}
MANIFEST: dict[str, Any] = {
    "format": "uwm_jax/chunks",
    "name": "toy",
    "chunk_steps": 16,
    "step_features": {"action": FEATURE},
    "cameras": {"observation/image": {"height": 8, "width": 8}},
    "splits": {
        "train": {
            "episodes": 1,
            "steps": 3,
            "chunks": 1,
            "skipped": {"no steps": 1},
            "skipped_notes": ["record 1: no steps"],
            "shards": [{"file": "toy-train.array_record", "records": 1, "bytes": 9, "sha256": "00"}],
            "files": {"columns/train/action.npy": {"crc32c": 0}},
        }
    },
}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m, name: m["splits"]["train"]["shards"][0].update(file=name), "the name of a shard of split 'train'"),
        (lambda m, name: m["splits"].update({name: m["splits"]["train"]}), "the split"),
        (lambda m, name: m["step_features"].update({name: FEATURE}), "the step key"),
        (lambda m, name: m["cameras"].update({name: {"height": 8, "width": 8}}), "the step key"),
        (
            lambda m, name: m["splits"]["train"]["files"].update({name: {"crc32c": 0}}),
            "the name of a file of split 'train'",
        ),
    ],
)
@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/../../outside", "..\\outside"])
def test_a_manifest_is_not_followed_out_of_its_dataset(tmp_path: Path, change: Any, what: str, name: str) -> None:
    manifest = json.loads(json.dumps(MANIFEST)) | {"format_version": FORMAT_VERSION}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(tmp_path) == manifest
    change(manifest, name)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert f"manifest.json: {what} is {name!r}, which cannot name a file inside the dataset" in str(caught.value)


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the values of a JSON object, as keys and indices from the top."""
    if at:
        yield at
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*at, key))


@pytest.mark.parametrize("place", list(places(MANIFEST)), ids=lambda at: ".".join(map(str, at)))
def test_a_value_of_another_kind_is_named(tmp_path: Path, place: tuple[Any, ...]) -> None:
    """Nothing that reads a manifest may find a number where it expects an object, or the other way round."""
    file = tmp_path / "manifest.json"
    for value in (None, "x", -2, 1e30, 10**22, True, [{}], {}):
        manifest: Any = json.loads(json.dumps(MANIFEST)) | {"format_version": FORMAT_VERSION}
        *above, last = place
        node = functools.reduce(lambda node, key: node[key], above, manifest)
        same = type(value) is type(node[last]) and not (isinstance(value, int) and value < 0)
        node[last] = value
        file.write_text(json.dumps(manifest))
        if same:
            continue
        with pytest.raises(UserError, match=r"manifest\.json"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("place", [("cameras",), ("splits", "train", "files"), ("step_features", "action", "dtype")])
def test_a_field_that_is_missing_is_named(tmp_path: Path, place: tuple[str, ...]) -> None:
    manifest = json.loads(json.dumps(MANIFEST)) | {"format_version": FORMAT_VERSION}
    *above, last = place
    del functools.reduce(lambda node, key: node[key], above, manifest)[last]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"the fields {last} are missing" if not above else f"expected .*{last}"):
        read_manifest(tmp_path)


def test_a_dataset_without_splits(tmp_path: Path) -> None:
    manifest = MANIFEST | {"format_version": FORMAT_VERSION, "splits": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json has been damaged or edited: it lists no splits"):
        read_manifest(tmp_path)


def test_what_is_unfit_is_said(tmp_path: Path) -> None:
    manifest = json.loads(json.dumps(MANIFEST)) | {"format_version": FORMAT_VERSION}
    manifest["splits"]["train"]["files"]["columns/train/action.npy"]["crc32c"] = "17"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'manifest.json'} has been damaged or edited: splits/train/files/columns/train/"
        "action.npy/crc32c is '17', expected an integer of at least 0. Copy it again, or make the dataset again."
    )


@pytest.mark.parametrize(
    ("field", "value"), [("remarks", {"rotated": "2"}), ("remarks", ["rotated"]), ("missing_files", "toy-train")]
)
def test_what_a_split_may_have_besides_is_checked_too(tmp_path: Path, field: str, value: Any) -> None:
    manifest: Any = json.loads(json.dumps(MANIFEST)) | {"format_version": FORMAT_VERSION}
    manifest["splits"]["train"][field] = value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"damaged or edited: splits/train/{field}"):
        read_manifest(tmp_path)
