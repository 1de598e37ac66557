"""`run.json`: what was started, in a form that can be typed again."""

from __future__ import annotations

import functools
import subprocess

import uwm_jax
from uwm_jax import cli, train
from uwm_jax.config import base
from uwm_jax.training import provenance
from uwm_jax.training.workdir import write_config

FILE = """'''A run of seven
steps.

Command: none.
'''
from uwm_jax.config import base
def get_config():
    c = base()
    c.total_steps = 7
    return c
"""


def test_starts_are_appended_and_unreadable_files_are_none(tmp_path):
    assert provenance.read_starts(tmp_path) == []
    (file := tmp_path / "a.py").write_text("1")
    for steps in (5, 6):
        config = base()
        config.total_steps = steps
        provenance.add_start(
            tmp_path, provenance.describe(["python", "x"], f"{file}:b", config, ["total_steps", "total_steps"])
        )
    first, second = provenance.read_starts(tmp_path)
    assert (first["changed"], second["changed"]) == ({"total_steps": 5}, {"total_steps": 6})
    assert first["in_file"] == {}, "it is no config by itself"
    assert first["config_file"] == f"{file}:b" and first["about"] == "" and first["command"] == ["python", "x"]
    assert first["time"].endswith("+00:00") and first["code_version"]
    unfit = ("3", '"ab"', "[3]", '[{"changed": [1]}]', '[{"command": "python"}]', '[{"time": "now"}, {"about": null}]')
    for text in ("{", "[]", *(f'{{"starts": {starts}}}' for starts in unfit)):
        (tmp_path / "run.json").write_text(text)
        assert provenance.read_starts(tmp_path) == []


def test_a_damaged_record_of_starts_is_kept(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"starts": [{"com')
    provenance.add_start(tmp_path, {"command": ["python"]})
    assert provenance.read_starts(tmp_path) == [{"command": ["python"]}]
    assert (tmp_path / "run.json.damaged").read_text() == '{"starts": [{"com'
    assert "run.json is damaged" in capsys.readouterr().err


def test_a_config_in_the_home_directory_is_described(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.py").write_text('"""Ours."""')
    start = provenance.describe(["python", "x"], "~/a.py:b", base(), [])
    assert start["about"] == "Ours." and start["config_file"] == "~/a.py:b"


def test_the_code_version_names_the_commit_of_a_clone(tmp_path, monkeypatch):
    package = tmp_path / "uwm_jax" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(uwm_jax, "__file__", str(package))
    version = provenance.code_version.__wrapped__
    assert version() == uwm_jax.__version__  # installed, no clone

    def git(*arguments):
        who = ("-c", "user.name=n", "-c", "user.email=e")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD")
    assert version() == f"{uwm_jax.__version__}+g{commit}"
    package.write_text("changed = True")
    assert version() == f"{uwm_jax.__version__}+g{commit}.changed"


def test_a_command_that_is_started_as_a_file(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(train, "train", lambda *arguments: given.append(arguments))
    monkeypatch.setattr(train, "__spec__", None)
    monkeypatch.setattr(train.main, "__module__", "__main__")
    (tmp_path / "mine.py").write_text(FILE)
    flags = [f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}"]
    assert cli.call(train.main, ["uwm_jax/train.py", *flags], train.define_flags) == 0
    assert given[0][3]["command"] == ["python", "uwm_jax/train.py", *flags]


def test_the_train_command_describes_itself(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(train, "train", lambda *arguments: given.append(arguments))
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    flags = [f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.model.depth=3", "--config.seed", "4"]
    assert cli.call(train.main, ["/somewhere/train.py", *flags], train.define_flags) == 0
    start = given[0][3]
    assert start["command"] == ["python", "-m", "uwm_jax.train", *flags]
    assert start["about"] == "A run of seven steps."
    assert start["changed"] == {"model.depth": 3, "seed": 4} and start["in_file"] == {"model.depth": 12, "seed": 0}
    assert start["config_file"] == str(file)


def test_a_run_continues_with_the_config_of_its_workdir(tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(train, "train", lambda *arguments: given.append(arguments))
    workdir = tmp_path / "run"
    call = functools.partial(cli.call, train.main, define_flags=train.define_flags)
    assert call(["train.py", f"--workdir={workdir}"]) == 2
    assert "--config is required" in capsys.readouterr().err
    config = base()
    config.model.depth = 5
    write_config(workdir, config)
    provenance.add_start(
        workdir, provenance.describe_use(["python"], config, ()) | {"config_file": "a.py", "about": "A."}
    )
    assert call(["train.py", f"--workdir={workdir}", "--config.total_steps=9"]) == 0
    config, _, _, start, _ = given[0]
    assert (config.model.depth, config.total_steps) == (5, 9)
    assert (start["config_file"], start["about"], start["changed"]) == ("a.py", "A.", {"total_steps": 9})
