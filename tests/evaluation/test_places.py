"""Places of results: none overwrites another, and an unwritable one is refused at once."""

from __future__ import annotations

import errno
import json
import os
import tempfile

import pytest

from uwm_jax import files
from uwm_jax.config import base, source
from uwm_jax.errors import UserError
from uwm_jax.evaluation import places
from uwm_jax.storage.errors import StorageError


def choose(folder, settings, *, own=False, shared=False, name=None, run=None, file="about.json", makes=True):
    """The name of the folder below `folder` that is chosen, in which a result is then made; "" for `folder` itself."""
    place = places.choose(folder, file, settings, own=own, shared=shared, name=name, run=run or {})
    if makes:
        place.mkdir(parents=True, exist_ok=True)
        about = {"settings": settings, **(run or {})}
        (place / file).write_text(json.dumps({"about": about} if file == "few_steps.json" else about))
    return "" if place == folder else place.relative_to(folder).as_posix()


def test_only_what_is_not_the_runs_own_and_changes_a_number_is_a_difference():
    own = base()
    own.data.sources = {"robot": source()}
    now = own.copy_and_resolve_references()
    now.data.split, now.eval.num_windows, now.diffusion.clip.action = "val", 8, 2.0
    now.data.path, now.data.sources.robot.path, now.data.num_threads, now.mesh.data = "a", "b", 0, 1
    now.eval.action_plane, now.batch_size = ("x", 0.0, 1.0, 0.0, 1.0), 7
    names = ("data.path", "data.sources.robot.path", "data.num_threads", "mesh.data", "eval.action_plane", "batch_size")
    names += ("data.split", "eval.num_windows", "diffusion.clip.action", "diffusion.spacing", "nothing")
    found = places.differences(now, own, names, "average", "average")
    assert found == {"data.split": "val", "eval.num_windows": 8, "diffusion.clip.action": 2.0}
    assert places.differences(own, own, names, "raw", "average") == {"parameters": "raw"}


def test_the_steps_own_folder_is_for_the_runs_own_evaluation(tmp_path, capsys):
    step = tmp_path / "eval" / "20"
    assert choose(step, {}, own=True) == choose(step, {}, own=True) == "" == capsys.readouterr().out
    val = choose(step, {"data.split": "val"})
    assert capsys.readouterr().out == f'results go to {step}/{val}: settings {{"data.split": "val"}}\n'
    assert len(val) == 12 and val == choose(step, {"data.split": "val"})  # the same again replaces it
    others = [{"data.split": "val", "parameters": "raw"}, {"datasets": ["a"]}, {"eval.num_windows": 8}]
    assert len({"", val, *(choose(step, settings) for settings in others)}) == 5
    assert choose(step, {"data.split": "test"}, name="test") == "test"
    assert json.loads((step / "about.json").read_text())["settings"] == {}


@pytest.mark.parametrize("file", ["few_steps.json", "episodes.json"])
def test_of_several_that_are_the_runs_own_the_first_has_the_steps_folder(tmp_path, file):
    first, second = ({"env": "pusht", "seeds": [i]} for i in (0, 1))
    assert choose(tmp_path, first, own=True, shared=True, file=file) == ""
    other = choose(tmp_path, second, own=True, shared=True, file=file)
    assert other and choose(tmp_path, first, own=True, shared=True, file=file) == ""
    assert choose(tmp_path, second, own=True, shared=True, file=file) == other
    assert choose(tmp_path / "none yet", {**first, "parameters": "raw"}, shared=True, file=file)
    (tmp_path / file).write_text("{}")  # an older version's, which does not tell its settings, or half of a file
    assert choose(tmp_path, first, own=True, shared=True, file=file) != ""
    (tmp_path / file).write_text("{")
    assert choose(tmp_path, first, own=True, shared=True, file=file) != ""


def test_a_name_is_not_given_to_other_settings(tmp_path):
    choose(tmp_path, {"data.split": "val"}, name="mine")
    assert choose(tmp_path, {"data.split": "val"}, name="mine") == "mine"
    with pytest.raises(UserError, match=r"--name=mine: .*\{\"data.split\": \"val\"\}. These are \{\}. Choose another"):
        choose(tmp_path, {}, own=True, name="mine")
    for name in ("", ".", "..", "../x", "a/b", ".hidden", "x" * 65, "a b", "about.json", "a.png"):
        with pytest.raises(UserError, match="--name=.*expected up to 64 letters"):
            choose(tmp_path, {}, own=True, name=name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_what_cannot_be_written_is_said_and_nothing_is_made(tmp_path, monkeypatch):
    places.require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "eval").write_text("a file")
    with pytest.raises(
        UserError, match=rf"{tmp_path}/eval/20: results cannot be written there .*Not a dir.*--output=DIR"
    ):
        choose(tmp_path / "eval" / "20", {}, own=True, makes=False)

    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"Read-only file system\)\. --output=DIR writes them"):
        places.root(None, tmp_path)


def test_a_bucket_that_cannot_be_written_is_said_before_anything_is_computed(bucket, monkeypatch):
    place = files.as_place(bucket)
    assert places.root(place / "out", place / "run") == place / "out"
    assert not place.exists(), "nothing stays of the attempt"

    def refuse(probe, data):
        raise StorageError("writing", str(probe), "403 no permission", "Ask for the role", 403)

    monkeypatch.setattr(places, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"run: results cannot be written there \(.*403 no permission.*--output=DIR"):
        places.root(None, place / "run")


def test_the_results_of_other_runs_are_left_alone(tmp_path):
    run, other, output = tmp_path / "run", tmp_path / "other", tmp_path / "out"
    for workdir in (run, other):
        workdir.mkdir()
        (workdir / "config.json").write_text("{}")
    assert places.root(None, run) == places.root(run, run) == run and places.root(output, run) == output
    assert places.of_run(run, run) == {} and places.of_run(output, run) == {"workdir": str(run)}
    with pytest.raises(UserError, match="--output=.*other is a run's directory itself"):
        places.root(other, run)
    step = output / "eval" / "20"
    assert choose(step, {}, own=True, run=places.of_run(output, run)) == ""
    with pytest.raises(UserError, match=f"holds results of another run, {run}"):
        choose(step, {}, own=True, run=places.of_run(output, other))
