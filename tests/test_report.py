"""The command: one run, several, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from uwm_jax import cli, report
from uwm_jax.config import base, to_json


@pytest.fixture
def make_run():
    def make(workdir: Path) -> Path:
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(to_json(base()))
        return workdir

    return make


@pytest.fixture
def call(capsys):
    """A function that runs the command; returns (status, stderr)."""

    def run(*arguments: object) -> tuple[int, str]:
        status = cli.call(report.main, ["report", *map(str, arguments)], report.define_flags)
        return status, capsys.readouterr().err

    return run


def test_the_command(make_run, call, tmp_path):
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    assert call(run) == (0, "") and (run / "report.html").is_file()
    assert call(f"--workdir={other}") == (0, "") and (other / "report.html").is_file()
    assert call(run, f"--output={tmp_path / 'one.html'}") == (0, "") and (tmp_path / "one.html").is_file()
    assert call(run, other, f"--output={tmp_path / 'two.html'}") == (0, "") and (tmp_path / "two.html").is_file()
    assert call(run, f"--output={tmp_path / 'out'}") == (0, "") and (tmp_path / "out" / "report.html").is_file()
    assert call(run, other, f"--output={tmp_path / 'out'}") == (0, "") and (tmp_path / "out/comparison.html").is_file()
    for arguments, message in (
        ((), "--workdir is required, or the directories of several runs"),
        ((tmp_path,), "not a run's directory"),
        ((f"--workdir={tmp_path}",), "not a run's directory"),
        ((f"--workdir={run}", other), "give all without the flag"),
        ((run, tmp_path / "nowhere"), "not a run's directory"),
        ((run, run), "expected different runs"),
        ((run, f"--output={tmp_path / 'one.html' / 'x.html'}"), "Not a directory"),
        ((run, "--output=s3://bucket/x.html"), "--output=s3://bucket/x.html: s3:// is not supported"),
        (("s3://bucket/run",), "s3:// is not supported"),
        ((run, "--x=policy/action_mse"), "--x=policy/action_mse requires one directory of a sweep"),
    ):
        status, error = call(*arguments)
        assert status == 2 and message in error and error.count("\n") == 1, (status, error)


def test_the_directory_of_a_sweep(make_run, call, tmp_path):
    sweep = tmp_path / "sweep"
    member = make_run(sweep / "members" / "seed=1")
    told = {"overrides": {"seed": 1}, "status": "done", "last_losses": {}}
    (sweep / "sweep.json").write_text(json.dumps({"members": {"seed=1": told}}))
    assert call(f"--workdir={sweep}") == (0, "") and "seed=1" in (sweep / "sweep.html").read_text()
    assert call(sweep, f"--output={tmp_path}") == (0, "") and (tmp_path / "sweep.html").is_file()
    assert call(member) == (0, "") and (member / "report.html").is_file()
    for arguments, message in (
        ((sweep, "--y=a/b"), "--y=a/b: no member has this metric. Of them, none was evaluated."),
        ((sweep, member), "holds a sweep, not a run"),
    ):
        status, error = call(*arguments)
        assert status == 2 and message in error and error.count("\n") == 1, (status, error)


def test_a_run_that_can_only_be_read_needs_a_page_elsewhere(make_run, call, tmp_path, monkeypatch):
    run, real = make_run(tmp_path / "a"), os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & os.O_CREAT and str(path).startswith(str(run)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    status, error = call(f"--workdir={run}")
    assert status == 2
    assert error == (
        f"error: {run / 'report.html'} cannot be written: Read-only file system. --output=FILE writes the page "
        "elsewhere.\n"
    )
    assert call(f"--workdir={run}", f"--output={tmp_path / 'page.html'}") == (0, "")
    assert (tmp_path / "page.html").is_file() and sorted(p.name for p in run.iterdir()) == ["config.json"]
