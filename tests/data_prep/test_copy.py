"""A folder is copied between a disk and a bucket: whole, verified, from where a killed job stopped."""

from __future__ import annotations

import filecmp
import os
import shutil
import threading
from pathlib import Path

import pytest

from data_prep.jobs import copying
from data_prep.jobs.copying import Copy
from uwm_jax import cli, files
from uwm_jax.data.records import read_manifest
from uwm_jax.errors import UserError
from uwm_jax.files import as_place


def contents(folder) -> dict[str, bytes]:
    return {name: (as_place(folder) / name).read_bytes() for name in files.facts_below(folder)}


def test_there_and_back(tiny_dataset, bucket, tmp_path, capsys):
    from data_prep import copy

    there = f"{bucket}/set"
    for source, target in ((tiny_dataset, there), (there, tmp_path / "back"), (tmp_path / "back", tmp_path / "again")):
        assert cli.call(copy.main, ["copy", f"--input={source}", f"--output={target}"], copy.define_flags) == 0
        assert contents(target) == contents(tiny_dataset)
    files.copy_tree(there, f"{bucket}/other")
    assert Copy(as_place(there), as_place(f"{bucket}/third")).run().kept == 0
    assert contents(f"{bucket}/third") == contents(there)
    assert f"{len(contents(there))} files" in capsys.readouterr().out
    for target in (there, tmp_path / "back"):
        done = Copy(tiny_dataset, as_place(target)).run()
        assert done.kept == done.files


class Killed(Exception):
    pass


@pytest.mark.parametrize("up", [False, True])
def test_a_killed_copy_continues(tiny_dataset, bucket, tmp_path, monkeypatch, up):
    monkeypatch.setattr(copying, "RANGE", 4096)
    source, target = tiny_dataset, as_place(f"{bucket}/up")
    if not up:
        files.copy_tree(tiny_dataset, f"{bucket}/down")
        source, target = as_place(f"{bucket}/down"), tmp_path / "down"
    total = Copy(source, target).size
    seen: list[int] = []

    def watch(size: int) -> None:
        seen.append(size)
        if sum(seen) > total * 0.6:
            raise Killed

    with pytest.raises(Killed):
        Copy(source, target, in_flight=2).run(watch)
    there = files.facts_below(target)
    assert "manifest.json" not in there, "an incomplete copy is no dataset"
    parts = [name for name in there if name.endswith(".part")]
    assert bool(parts) is not up
    read: list[tuple[str, int]] = []
    ranges = Copy._range
    monkeypatch.setattr(
        Copy,
        "_range",
        lambda self, folder, name, start: read.append((name, start)) or ranges(self, folder, name, start),
    )
    again: list[int] = []
    done = Copy(source, target).run(again.append)
    assert sum(again) == total and done.kept >= len(there) - len(parts) > 0
    assert contents(target) == contents(tiny_dataset)
    for part in parts:  # [folder/].<name>.<crc32c>.part
        folder, _, hidden = part.rpartition("/")
        name = (f"{folder}/" if folder else "") + hidden[1:].rsplit(".", 2)[0]
        begun = there[part].size // 4096 * 4096
        assert name in contents(target) and begun > 0, "a range was read"
        assert all(start >= begun for file, start in read if file == name), "and is not read again"


def test_damage_is_found(tiny_dataset, bucket, tmp_path):
    source = shutil.copytree(tiny_dataset, tmp_path / "source")
    shard = read_manifest(source)["splits"]["train"]["shards"][0]["file"]
    data = bytearray((source / shard).read_bytes())
    data[len(data) // 2] ^= 1
    (source / shard).write_bytes(data)
    for target in (tmp_path / "target", as_place(f"{bucket}/up")):
        with pytest.raises(UserError, match=f"{shard} was copied with the CRC-32C .* the source is damaged"):
            Copy(source, target).run()
        there = files.facts_below(target)
        assert shard not in there and "manifest.json" not in there and not any(shard in name for name in there)
    (source / shard).write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{shard} has {len(data) - 1} bytes in place of {len(data)}"):
        Copy(source, tmp_path / "target")
    os.remove(source / shard)
    with pytest.raises(UserError, match=f"{shard} is missing"):
        Copy(source, tmp_path / "target")


def test_a_file_that_is_there_and_damaged_is_copied_again(tiny_dataset, tmp_path):
    target = tmp_path / "target"
    Copy(tiny_dataset, target).run()
    file = target / "index" / "train.npz"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    done = Copy(tiny_dataset, target).run()
    assert done.files - done.kept == 1 and not filecmp.dircmp(tiny_dataset, target).diff_files


def test_another_dataset_is_not_overwritten(tiny_dataset, tmp_path):
    target = tmp_path / "target"
    Copy(tiny_dataset, target).run()
    (target / "more").write_text("mine")
    with pytest.raises(UserError, match="holds 1 files that the source lacks, such as more"):
        Copy(tiny_dataset, target)
    (target / "more").unlink()
    (target / "manifest.json").write_text((target / "manifest.json").read_text() + " ")
    with pytest.raises(UserError, match="has another manifest.json than the source.*--overwrite"):
        Copy(tiny_dataset, target)
    Copy(tiny_dataset, target, overwrite=True).run()
    assert contents(target) == contents(tiny_dataset)


@pytest.mark.parametrize("up", [False, True])
def test_what_is_replaced_in_part_is_no_dataset(tiny_dataset, bucket, tmp_path, up):
    """A manifest never lists files of another dataset, also where the copy that replaces it is killed."""
    target = as_place(f"{bucket}/target") if up else tmp_path / "target"
    Copy(tiny_dataset, target).run()
    source = shutil.copytree(tiny_dataset, tmp_path / "source")
    for name in ("manifest.json", "latents/x/sidecar.json"):
        files.write_text(target / name, "{}")
        files.write_text(source / name, (source / name).read_text() if name == "manifest.json" else '{"files": {}}')

    def killed(size: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        Copy(source, target, overwrite=True).run(killed)
    assert not {"manifest.json", "latents/x/sidecar.json"} & files.facts_below(target).keys()
    Copy(source, target).run()
    assert contents(target) == contents(source)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("{tmp}/none", "{tmp}/x", "there are no files below it"),
        ("{set}", "{set}/inside", "are the same folder, or one is inside the other"),
        ("s3://bucket/x", "{tmp}/x", "--input=s3://bucket/x: s3:// is not supported"),
    ],
)
def test_what_cannot_be_copied_is_named(tiny_dataset, tmp_path, capsys, source, target, message):
    from data_prep import copy

    places = [text.format(tmp=tmp_path, set=tiny_dataset) for text in (source, target)]
    status = cli.call(copy.main, ["copy", f"--input={places[0]}", f"--output={places[1]}"], copy.define_flags)
    assert status == 2 and message in capsys.readouterr().err


def test_checksums_of_new_files_are_made_as_they_are_copied(tmp_path, bucket, monkeypatch):
    """By several threads, and not of all files before the first is copied."""
    (tmp_path / "a").write_bytes(b"unlisted")
    threads, checksum = [], copying._checksum
    monkeypatch.setattr(
        copying, "_checksum", lambda file: threads.append(threading.current_thread().name) or checksum(file)
    )
    Copy(tmp_path, as_place(f"{bucket}/up")).run()
    assert len(threads) == 1 and threads[0].startswith("copy")


def test_hidden_files_stay_behind(tmp_path: Path):
    source = tmp_path / "source"
    (source / ".git").mkdir(parents=True)
    for name in ("a", ".lock", ".git/config"):
        (source / name).write_text(name)
    done = Copy(source, tmp_path / "target").run()
    assert (done.files, done.hidden) == (1, 2) and contents(tmp_path / "target") == {"a": b"a"}
