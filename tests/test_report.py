"""The command: one run, several, and what it refuses."""

from __future__ import annotations

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


def test_the_command(make_run, tmp_path, capsys):
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b")

    def call(*arguments: object) -> tuple[int, str]:
        status = cli.call(report.main, ["report", *map(str, arguments)], report.define_flags)
        return status, capsys.readouterr().err

    assert call(run) == (0, "") and (run / "report.html").is_file()
    assert call(run, f"--output={tmp_path / 'one.html'}") == (0, "") and (tmp_path / "one.html").is_file()
    assert call(run, other, f"--output={tmp_path / 'two.html'}") == (0, "") and (tmp_path / "two.html").is_file()
    for arguments, message in (
        ((), "expected the directory of a run"),
        ((tmp_path,), "not a run's directory"),
        ((run, tmp_path / "nowhere"), "not a run's directory"),
        ((run, run), "expected different runs"),
        ((run, f"--output={tmp_path / 'one.html' / 'x.html'}"), "Not a directory"),
        ((run, "--output=gs://bucket/x.html"), "--output=gs://bucket/x.html: gs:// is not supported"),
        (("gs://bucket/run",), "gs:// is not supported"),
    ):
        status, error = call(*arguments)
        assert status == 2 and message in error, (status, error)
