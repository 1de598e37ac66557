"""Exit statuses and messages, in a process of its own as users see them."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from uwm_jax import cli, host_tpu
from uwm_jax.errors import UserError

PROGRAM = """
import errno, os
from absl import flags
from uwm_jax import cli
from uwm_jax.errors import Preempted, UserError
flags.DEFINE_string("official_config", None, "a file")
flags.DEFINE_integer("count", 3, "a number")
flags.DEFINE_string("workdir", None, "a directory")
cli.accept_config_overrides(lambda config, overrides: [f"fields of {config!r} with {overrides}"])
cli.accept_arguments()
def main(call):
    argv = list(call.arguments)
    if "usage" in argv:
        raise UserError("FILE: expected that, found this.")
    if "workdir" in argv:
        print(cli.required_path("workdir"))
    if "path" in argv:
        open("/dev/null/x")
    if "os" in argv:
        number = getattr(errno, argv[1])
        raise OSError(number, os.strerror(number), *argv[2:])
    if "full" in argv:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    if "preempted" in argv:
        raise Preempted("stopped at step 3, which is saved.")
    if "library" in argv:
        raise RuntimeError("write() failed: No space left on device; writing /a/b; at byte 3")
    if "bug" in argv:
        raise RuntimeError("a defect of ours")
    print(argv, flags.FLAGS.official_config, flags.FLAGS.count, list(call.overrides))
cli.run(main)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_flags_with_hyphens_and_overrides():
    result = run("word", "--official-config=x-y", "--config.a.b=1", "--count", "4", "--config.c", "d=e")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['word'] x-y 4 [('a.b', '1'), ('c', 'd=e')]"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["usage"], 2, "error: FILE: expected that, found this."),
        (["path"], 2, "/dev/null/x: Not a directory"),
        (["--official_confg=x"], 2, "official_config"),
        (["--count=many"], 2, "count"),
        (["--count=" + "9" * 23], 2, "--count=99999999999999999999999: expected an integer of at most 63 bits"),
        (["--count=" + "9" * 5000], 2, "count"),
        (["--debug=maybe"], 2, "debug"),
        (["--debug=maybe", "usage"], 2, "debug"),
        (["--nodebug", "usage"], 2, "error: FILE: expected that, found this."),
        (["workdir", "--workdir=s3://bucket/run"], 2, "--workdir=s3://bucket/run: s3:// is not supported"),
        (["workdir", "--workdir=" + "a" * 5000], 2, "--workdir=aaa"),
        (["full"], 1, "error: metrics.jsonl cannot be written: No space left on device"),
        (["os", "EROFS", "run/.lock"], 2, "error: run/.lock: Read-only file system. Check the paths"),
        (["os", "ENAMETOOLONG", "aaa"], 2, "error: aaa: File name too long"),
        (["os", "ENOSPC"], 1, "error: the output cannot be written: No space left on device"),
        (["os", "EIO", "run/config.json"], 1, "error: run/config.json: Input/output error"),
        (["library"], 1, "error: write() failed: No space left on device; writing /a/b; at byte 3. Free some space"),
        (["preempted"], 143, "stopped at step 3, which is saved."),
    ],
)
def test_expected_ends_have_a_status_and_no_traceback(arguments, status, message):
    result = run(*arguments)
    assert result.returncode == status
    assert message in result.stderr and "Traceback" not in result.stderr


CONFIG = f"--config={Path(__file__).parents[1] / 'configs' / 'quickstart.py'}"


@pytest.mark.parametrize(
    ("module", "paths", "others"),
    [
        ("uwm_jax.train", ["workdir"], [CONFIG]),
        ("uwm_jax.train", ["config"], ["--workdir=run"]),
        ("launch.sweep", ["workdir"], [CONFIG, "--grid=seed=0,1"]),
        ("uwm_jax.evaluate", ["workdir", "output"], []),
        ("uwm_jax.compare_samplers", ["workdir", "output"], ["--steps=2"]),
        ("uwm_jax.rollout", ["workdir", "output"], ["--env=pusht"]),
        ("uwm_jax.sample", ["workdir", "output", "inputs"], ["--mode=policy"]),
        ("uwm_jax.sample_inputs", ["workdir", "output"], []),
        ("uwm_jax.report", ["workdir", "output"], []),
        ("uwm_jax.convert", ["input", "official_config", "workdir", "normalizer"], ["from-torch"]),
        ("uwm_jax.convert", ["workdir", "output"], ["to-torch"]),
        ("uwm_jax.benchmark_step", ["json"], [CONFIG]),
        ("uwm_jax.plan", ["json", "cache"], [CONFIG, "--topology=here"]),
        ("data_prep.reshard", ["input", "output"], []),
        ("data_prep.demo", ["output"], []),
        ("data_prep.stats", ["dataset"], []),
        ("data_prep.ranges", ["dataset"], []),
        ("data_prep.inspect", ["dataset", "output"], []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_path_is_local_and_no_scheme_becomes_a_folder(tmp_path, monkeypatch, capsys, module, paths, others):
    monkeypatch.chdir(tmp_path)
    command = import_module(module)
    for path in paths:
        for bad, message in (("s3://bucket/x", "s3:// is not supported"), ("~nobody_of_this_name/x", "is unknown")):
            flags = [f"--{p}={bad if p == path else p}" for p in paths]
            assert cli.call(command.main, [module, *others, *flags], command.define_flags) == 2
            error = capsys.readouterr().err
            assert f"--{path.replace('_', '-')}={bad}: " in error and message in error
            assert not list(tmp_path.iterdir()), error


def test_a_workdir_is_a_directory_or_none_yet(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("")
    for workdir in (file, file / "run"):
        result = run("workdir", f"--workdir={workdir}")
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert f"--workdir={workdir}: {file} is a file. Expected a directory" in result.stderr
    assert "--workdir is required" in run("workdir").stderr
    assert run("workdir", f"--workdir={tmp_path / 'new' / 'run'}").returncode == 0
    assert run("workdir", f"--workdir={tmp_path}").returncode == 0


def test_debug_shows_the_traceback_and_defects_exit_with_1():
    assert "Traceback" in run("usage", "--debug").stderr and "Traceback" in run("usage", "--debug=true").stderr
    defect = run("bug")
    assert defect.returncode == 1 and "Traceback" in defect.stderr


def test_help_succeeds():
    result = run("--help")
    assert result.returncode == 0 and "official_config" in result.stdout + result.stderr


MEMORY = """
import resource, threading
from uwm_jax import cli

def work():
    faults = []
    for _ in range(5):
        buffer = bytearray(64 << 20)
        del buffer
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    print(faults[-1] - faults[0])

def main(argv):
    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

cli.accept_arguments()
cli.run(main) if "kept" in __import__("sys").argv else main([])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.skipif(bool(entry_points(group="jax_plugins") or host_tpu.attached()), reason="there is an accelerator")
def test_memory_that_was_freed_is_not_faulted_in_again():
    faults = {}
    for name in ("given back", "kept"):
        result = subprocess.run([sys.executable, "-c", MEMORY, name], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        faults[name] = [int(line) for line in result.stdout.split()]
    assert min(faults["given back"]) > 1000 > 10 * max(faults["kept"]), faults


def test_a_missing_extra_is_told() -> None:
    cli.need_extra("serve", "json")
    with pytest.raises(UserError, match=r"^not_there: not installed. Run `pip install 'uwm-jax\[serve\]'`\.$"):
        cli.need_extra("serve", "json", "not_there")
