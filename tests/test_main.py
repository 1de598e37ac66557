"""The overview of commands, and that each command is a script of the package."""

from __future__ import annotations

import importlib
import io
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from absl.flags import FLAGS

from uwm_jax import __main__ as overview
from uwm_jax import cli

ROOT = Path(__file__).parents[1]


def test_every_command_has_a_script_and_no_script_is_left_over() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    runnable = {
        f"{file.parent.name}.{file.stem}"
        for package in ("uwm_jax", "data_prep")
        for file in (ROOT / package).glob("*.py")
        if "cli.command(" in file.read_text() and file.stem not in ("cli", "__main__")
    }
    assert {module for module, _ in overview.commands()} == runnable
    assert scripts == {overview.script_of(module): f"{module}:command" for module in runnable}
    assert list(scripts) == sorted(scripts)


def test_the_overview_is_quick_and_tells_a_line_about_each() -> None:
    program = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('uwm_jax', run_name='__main__')\nexcept SystemExit as e:\n    assert not e.code\n"
        "loaded = {'jax', 'numpy', 'absl', 'tensorflow', 'torch', 'data_prep'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for module, line in overview.commands():
        assert len(line) > 20 and f"  {module} " in result.stdout and f"  {line}\n" in result.stdout, module
    assert "uwm_jax.train " in result.stdout and "data_prep.reshard " in result.stdout


@pytest.mark.parametrize(
    ("argument", "message"), [("evalaute", "mean python -m uwm_jax.evaluate?"), ("x", "lists the")]
)
def test_arguments_are_refused(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert overview.main([argument]) == 2
    assert message in capsys.readouterr().err


def test_an_overview_that_cannot_be_written_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert overview.main([]) == 1
    assert capfd.readouterr().err == "error: the output cannot be written: No space left on device.\n"


@pytest.mark.parametrize("name", [module for module, _ in overview.commands()])
def test_help_shows_all_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those too that several commands share, which another module declares."""
    module = importlib.import_module(name)
    before = set(FLAGS)
    try:
        module.define_flags()
        own = set(FLAGS) - before
    finally:
        for flag in set(FLAGS) - before:
            delattr(FLAGS, flag)
    assert cli.call(module.main, [name, "--help"], module.define_flags) == 0
    shown = capsys.readouterr().out
    assert set(re.findall(r"^  --(?:\[no\])?(\w+):", shown, re.MULTILINE)) == own


def test_a_script_runs_its_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As the script that pip makes does."""
    monkeypatch.setattr("uwm_jax.host_memory.keep_freed", lambda: None)
    for name, flag in (("data_prep.stats", "--dataset"), ("data_prep.inspect", "--frames")):
        module = importlib.import_module(name)
        for arguments, status, text in ((["--help"], 0, flag), (["word"], 2, "unexpected argument 'word'")):
            monkeypatch.setattr(sys, "argv", ["/usr/bin/script", *arguments])
            with pytest.raises(SystemExit) as ended:
                module.command()
            printed = capsys.readouterr()
            assert ended.value.code == status and text in printed.out + printed.err
            assert (module.__doc__.strip() in printed.out) == (status == 0)
