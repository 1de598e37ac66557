"""Paths that are local or in a bucket: the same calls do the same to both."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
from pathlib import Path, PurePosixPath

import pytest

from uwm_jax import cli, files
from uwm_jax.errors import UserError
from uwm_jax.files import RemotePath, as_place, place
from uwm_jax.hub import names
from uwm_jax.storage import client
from uwm_jax.storage.errors import StorageError


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    """A folder that does not exist yet, on disk and in a bucket."""
    if request.param == "local":
        return tmp_path / "run"
    return place(request.getfixturevalue("bucket"), "--workdir") / "run"


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["gs://bkt/a/b.json", "gs://bkt//a/./b.json".replace("/./", "/"), "gs:/bkt/a/b.json/"]
)
def test_a_user_names_an_object(value):
    found = place(value, "--workdir")
    assert str(found) == "gs://bkt/a/b.json" == f"{found}" and as_place(str(found)) == found
    assert place(Path("gs://bkt/a/b.json"), "workdir") == found  # which has one slash


def test_other_places_are_local(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert place("~/runs", "--workdir") == Path("/home/somebody/runs")
    assert as_place("~/runs") == Path("~/runs") and not files.is_remote("a/gs://b")


@pytest.mark.parametrize("scheme", ["s3", "file", "https", "hdfs", "gcs", "GS"])
def test_another_scheme_is_refused_by_name(scheme):
    with pytest.raises(UserError, match=f"--workdir=.*{scheme}:// is not supported.*gs://bucket"):
        place(f"{scheme}://bucket/run", "--workdir")


@pytest.mark.parametrize(
    "value", ["gs://", "gs:///a", "gs://B/a", "gs://a b/c", "gs://bkt/../a", "gs://bkt/a\nb", "gs://bkt/" + "a" * 1025]
)
def test_an_unusable_name_is_refused(value):
    with pytest.raises(UserError, match="--output="):
        place(value, "--output")


def test_what_must_be_local_says_so():
    with pytest.raises(UserError, match="--output=gs://bkt/a: gs:// is not supported.*local or mounted"):
        files.local_path(RemotePath("gs://bkt/a"), "--output")


def test_names_are_taken_apart_as_local_ones_are():
    remote, local = RemotePath("gs://bkt/a/b.tar.gz"), PurePosixPath("/bkt/a/b.tar.gz")
    for name in ("name", "stem", "suffix"):
        assert getattr(remote, name) == getattr(local, name)
    assert remote.with_suffix(".x").name == local.with_suffix(".x").name
    assert remote.with_name("c") == remote.parent / "c" == RemotePath("gs://bkt/a/c")
    assert remote.relative_to(RemotePath("gs://bkt")) == PurePosixPath("a/b.tar.gz")
    assert remote.is_relative_to(RemotePath("gs://bkt/a")) and not remote.is_relative_to(RemotePath("gs://bkt/b"))
    assert not remote.is_relative_to(Path("/bkt"))
    assert (remote.bucket, remote.key, RemotePath("gs://bkt").key) == ("bkt", "a/b.tar.gz", "")
    assert remote.parents[-1] == RemotePath("gs://bkt") == RemotePath("gs://bkt").parent
    assert remote.parts == ("gs://bkt", "a", "b.tar.gz")
    assert remote.absolute() == remote.resolve() == remote.expanduser() == remote
    assert sorted([remote, RemotePath("gs://bkt/a")])[0].name == "a" and len({remote, copy.copy(remote)}) == 1
    assert pickle.loads(pickle.dumps(remote)) == remote
    with pytest.raises(ValueError, match="joined"):
        remote / "../c"


def test_a_remote_name_is_never_taken_for_a_local_one():
    remote = RemotePath("gs://bkt/a")
    for use in (open, os.stat, Path, os.fspath):
        with pytest.raises(TypeError):
            use(remote)
    with pytest.raises(ValueError, match="uwm_jax.files"):
        remote.open("w")
    with pytest.raises(AttributeError):
        remote._path = None
    assert remote != Path("gs://bkt/a")


# --- files and folders -----------------------------------------------------------------------------------------------


def test_files_are_written_and_read(folder):
    path = folder / "a" / "b.txt"
    assert not path.exists() and not folder.exists() and not folder.is_dir()
    files.write_text(path, "×10⁻⁶\n")
    assert path.exists() and path.is_file() and not path.is_dir() and folder.is_dir() and not folder.is_file()
    assert path.read_text(encoding="utf-8") == "×10⁻⁶\n" and path.read_bytes() == "×10⁻⁶\n".encode()
    assert path.stat().st_size == len("×10⁻⁶\n".encode())
    files.write_bytes(path, b"\x00new")
    with path.open("rb") as file:
        assert file.read() == b"\x00new"
    with files.writing(path) as out:
        out.write("one\ntwo\n")
    with path.open(encoding="utf-8") as file:
        assert list(file) == ["one\n", "two\n"]
    with pytest.raises(FileNotFoundError) as e:
        (folder / "none").read_text()
    assert e.value.filename is not None and str(e.value.filename) == str(folder / "none")


def test_a_block_that_fails_changes_nothing(folder):
    files.write_text(folder / "a", "old")
    with pytest.raises(RuntimeError), files.writing(folder / "a") as out:
        out.write("new")
        raise RuntimeError
    with pytest.raises(RuntimeError), files.new_folder(folder / "new") as made:
        (made / "b").write_text("x")
        raise RuntimeError
    assert [p.name for p in folder.iterdir()] == ["a"] and (folder / "a").read_text() == "old"


def test_folders_are_listed(folder):
    for name in ("b/1.json", "b/2.txt", "b.d/3.json", "a"):
        files.write_text(folder / name, name)
    names = lambda found: sorted(str(p)[len(str(folder)) + 1 :] for p in found)  # noqa: E731
    assert names(folder.iterdir()) == ["a", "b", "b.d"]
    assert names(folder.glob("*")) == ["a", "b", "b.d"] and names(folder.glob("b*/*.json")) == [
        "b.d/3.json",
        "b/1.json",
    ]
    assert names(folder.glob("*/")) == ["b", "b.d"]
    assert names(folder.glob("b/2.txt")) == ["b/2.txt"] and names(folder.glob("c/*")) == []
    assert names(folder.glob("**/*.json")) == names(folder.rglob("*.json")) == ["b.d/3.json", "b/1.json"]
    assert names(folder.rglob("*")) == ["a", "b", "b.d", "b.d/3.json", "b/1.json", "b/2.txt"]
    with pytest.raises(FileNotFoundError):
        list((folder / "none").iterdir())


def test_objects_that_are_no_paths_are_told(bucket):
    folder = place(bucket, "--dataset")
    client.write(folder.bucket, f"{folder.key}/a/", b"")  # which consoles make for an empty folder
    assert [p.name for p in folder.iterdir()] == ["a"] and list((folder / "a").iterdir()) == []
    client.write(folder.bucket, f"{folder.key}/a//b", b"1")
    for look in (lambda: list((folder / "a").iterdir()), lambda: list(folder.rglob("*"))):
        with pytest.raises(UserError, match=f"{bucket}/a//?b?.*is no path"):
            look()


def test_folders_are_made_copied_moved_and_removed(folder, tmp_path):
    with files.new_folder(folder / "made", last="done") as made:
        (made / "in").mkdir()
        (made / "in" / "x").write_text("1")
        (made / "done").write_text("2")
    with pytest.raises(OSError, match="not empty"), files.new_folder(folder / "made"):
        pass
    files.copy_tree(folder / "made", folder / "copy")
    files.copy_tree(folder / "made", tmp_path / "down")
    files.copy_tree(tmp_path / "down", folder / "up", last="done")
    files.move(folder / "up", folder / "moved")
    files.move(folder / "copy" / "done", folder / "done")
    left = ["copy/in/x", "done", "made/done", "made/in/x", "moved/done", "moved/in/x"]
    assert [str(p)[len(str(folder)) + 1 :] for p in sorted(folder.rglob("*")) if p.is_file()] == left
    local = files.local_copy(folder / "made")
    assert isinstance(local, Path) and local.name == "made" and (local / "in" / "x").read_text() == "1"
    assert files.local_copy(folder / "made") == local
    files.write_text(folder / "made" / "done", "3")
    assert (files.local_copy(folder / "made") / "done").read_text() == "3"
    assert files.local_copy(folder / "done").read_text() == "2"
    files.remove(folder / "made")
    files.remove(folder / "done")
    assert not (folder / "made").exists() and not (folder / "done").exists() and (folder / "moved").exists()
    files.remove(folder / "done", missing_ok=True)
    with pytest.raises(FileNotFoundError):
        files.remove(folder / "done")
    with pytest.raises(FileNotFoundError):
        files.copy_tree(folder / "none", tmp_path / "none")


@pytest.mark.parametrize("name", ["/outside", "../outside", "a/../../../outside", "./x", "a//x"])
def test_no_object_leads_out_of_the_folder_that_it_is_copied_to(bucket, tmp_path, name):
    """Anybody may write such names into a bucket that others read."""
    source = RemotePath(f"{bucket}/vae")
    client.write(source.bucket, f"{source.key}/whole", b"")
    client.write(source.bucket, f"{source.key}/{name.replace('/outside', f'{tmp_path}/outside', 1)}", b"")
    for copies in (files.local_copy, files.facts_below, lambda found: files.copy_tree(found, tmp_path / "down")):
        with pytest.raises(UserError, match="vae/.*(outside|x): .*is no path"):
            copies(source)
    assert not list(tmp_path.rglob("*"))


def test_an_output_is_checked(bucket):
    there = place(bucket, "--output")
    files.write_text(there / "folder" / "a", "")
    files.check_output(there / "new", "--output")
    files.check_output_file(there / "new")
    with pytest.raises(UserError, match="--json: .*folder' is a folder"):
        files.check_output_file(there / "folder", "--json")
    with pytest.raises(StorageError, match="gs://absent does not exist.*gcloud storage buckets create"):
        files.check_output(RemotePath("gs://absent/new"), "--output")


# --- preconditions ---------------------------------------------------------------------------------------------------


def test_only_one_creates_and_only_the_last_reader_replaces(folder):
    path = folder / "lock"
    assert files.read_with_generation(path) is None and files.replace_if(path, b"x", "1") is None
    first = files.create(path, b"one")
    assert first is not None and files.create(path, b"two") is None
    assert files.read_with_generation(path) == (b"one", first)
    second = files.replace_if(path, b"three", first)
    assert second not in (None, first) and files.replace_if(path, b"four", first) is None
    assert files.read_with_generation(path) == (b"three", second)
    files.remove(path)
    assert files.replace_if(path, b"five", second) is None and not path.exists()


def test_of_sixteen_that_race_one_creates(bucket):
    from concurrent.futures import ThreadPoolExecutor

    path = place(bucket, "--workdir") / "lock"
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda i: files.create(path, b"%d" % i), range(16)))
    winner = [i for i, generation in enumerate(found) if generation]
    assert len(winner) == 1 and path.read_bytes() == b"%d" % winner[0]


# --- flags -----------------------------------------------------------------------------------------------------------


def test_the_data_directory_may_be_a_bucket(monkeypatch):
    monkeypatch.setenv("UWM_DATA_DIR", "gs://bkt/sets")
    assert files.data_dir() == RemotePath("gs://bkt/sets")


def test_an_origin_may_be_a_run_in_a_bucket(bucket):
    run = place(bucket, "--workdir")
    assert names.parse_origin(f"{bucket}@7") == (run, 7)
    assert names.parse_origin(bucket) == (run, None)
    files.write_text(run.with_name("a@7") / "config.json", "{}")
    assert names.parse_origin(str(run.with_name("a@7"))) == (run.with_name("a@7"), None)
    with pytest.raises(UserError, match="expected DIR or DIR@STEP.*found 'x'"):
        names.parse_origin(f"{bucket}@x")


@pytest.mark.parametrize(
    "job",
    ["demo", "hdf5 --input=a", "lerobot --input=a", "reshard --input=a", "videos --input=a", "inspect --config=c"],
)
def test_jobs_that_write_locally_name_what_copies(job, capsys, tmp_path, monkeypatch):
    name, *given = job.split()
    module = importlib.import_module(f"data_prep.{name}")
    argv = [name, *given, "--output=gs://bkt/new"]
    assert cli.call(module.main, argv, getattr(module, "define_flags", None)) == 2
    told = capsys.readouterr().err
    assert "--output=gs://bkt/new: " in told and "python -m data_prep.copy --input=DIR --output=gs://bkt/new" in told
