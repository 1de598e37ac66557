"""launch.slurm: the batch script runs here, by stubs of sbatch and srun that know the options of the real ones."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.bundle import Bundle
from launch.variables import Secret
from tests.launch import programs
from uwm_jax import cli

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c0ffeec0ffee"

# Runs a batch script as `sbatch` does, with the variables of --export alone, and returns its job's status.
SBATCH = """#!{python}
import json, os, re, subprocess, sys
text = sys.stdin.read()
options = dict((line[10:].split("=", 1) + [""])[:2] for line in text.splitlines() if line.startswith("#SBATCH --"))
json.dump(options, open({folder!r} + "/options", "w"))
environ = {{name: os.environ[name] for name in options["export"].split(",") if name in os.environ}}
environ |= {{"SLURM_NNODES": options["nodes"], "SLURM_JOB_ID": "7", "PATH": {folder!r} + ":" + os.environ["PATH"]}}
script = {folder!r} + "/script"
open(script, "w").write(text)
with open(options["output"].strip("'"), "a") as log:
    sys.exit(subprocess.run(["bash", script], env=environ, stdout=log, stderr=log).returncode)
"""
SRUN = """#!{python}
import json, os, subprocess, sys
at = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("-"))
json.dump(sys.argv[1:at], open({folder!r} + "/srun", "w"))
count = int(os.environ["SLURM_NNODES"])
tasks = [
    subprocess.Popen(sys.argv[at:], env=os.environ | {{"SLURM_PROCID": str(i), "SLURM_NTASKS": str(count)}})
    for i in range(count)
]
sys.exit(max(task.wait() for task in tasks))
"""
# Tells who it is; with a workdir, the first task fails the first time.
PROBE = """
import os, sys
from pathlib import Path
names = ("SLURM_PROCID", "SLURM_NTASKS", "WANDB_API_KEY", "HF_TOKEN", "A", "LEAK")
told = {name: os.environ.get(name) for name in names}
print("probe", told, sys.argv[1:], flush=True)
(workdir,) = [word.partition("=")[2] for word in sys.argv if word.startswith("--workdir=")] or [None]
if workdir and told["SLURM_PROCID"] == "0" and not Path(workdir, "failed").exists():
    Path(workdir, "failed").touch()
    sys.exit(3)
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder of the stubs; the commit is installed, with the probe as a module."""
    stubs, shared = tmp_path / "stubs", tmp_path / "shared folder"
    programs.install(stubs, "squeue", "scancel")
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (stubs / name).write_text(text.format(python=sys.executable, folder=str(stubs)))
        (stubs / name).chmod(0o755)
    (stubs / "gcloud").write_text(
        '#!/bin/sh\n[ "$*" = "secrets versions access 3 --secret=hf --quiet" ] && echo of-the-cloud\n'
    )
    (stubs / "gcloud").chmod(0o755)
    installed = shared / COMMIT
    (installed / "env" / "bin").mkdir(parents=True)
    (installed / "env" / "installed").touch()
    (installed / "env" / "bin" / "python").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    (installed / "env" / "bin" / "python").chmod(0o755)
    (installed / "probe.py").write_text(PROBE)
    monkeypatch.setenv("PATH", f"{stubs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LEAK", "of the login node")
    files = [tmp_path / name for name in ("a.whl", "b.tar.gz", "constraints.txt")]
    made = Bundle(*files, commit=COMMIT + "0" * 28, version="1+gc0ffee", python="3.11")
    monkeypatch.setattr(slurm, "bundle", lambda root, build: made)
    return stubs


def call(cluster: Path, *arguments: str) -> int:
    folder = f"--folder={cluster.parent / 'shared folder'}"
    return cli.call(slurm.main, ["slurm", arguments[0], folder, *arguments[1:]], slurm.define_flags)


CREATE = ("create", "my-run", "--nodes=2", "--gpus_per_node=4")


def test_each_node_has_a_supervised_process_of_the_commit(cluster, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "the-value")
    workdir = tmp_path / "work dir"
    workdir.mkdir()
    flags = [
        "--secret=WANDB_API_KEY",
        "--secret=HF_TOKEN=hf:3",
        "--env=A=b c",
        "--sbatch_flag=partition=gpu",
        "--hours=2",
    ]
    command = ["--", "python", "-m", "probe", f"--workdir={workdir}"]
    assert call(cluster, *CREATE, *flags, "--dry_run", *command) == 0
    shown = capsys.readouterr().out
    assert "the-value" not in shown and "of-the-cloud" not in shown
    assert call(cluster, *CREATE, *flags, *command) == 0
    assert f"sbatch <<'END'\n{(cluster / 'script').read_text()}END\n" in shown
    log = (tmp_path / "shared folder" / "my-run.log").read_text()
    told = re.findall(r"^probe (\{.*\}) (\[.*\])$", log, re.MULTILINE)
    told = [(ast.literal_eval(found), ast.literal_eval(arguments)) for found, arguments in told]
    tasks = sorted((seen["SLURM_PROCID"], seen["SLURM_NTASKS"]) for seen, _ in told)
    assert tasks == [("0", "2"), ("0", "2"), ("1", "2")], "the one that failed was started again by its supervisor"
    for seen, arguments in told:
        assert (seen["WANDB_API_KEY"], seen["HF_TOKEN"], seen["A"]) == ("the-value", "of-the-cloud", "b c")
        assert seen["LEAK"] is None and arguments == [f"--workdir={workdir}"]
    options = json.loads((cluster / "options").read_text())
    assert options.keys() <= set(programs.FLAGS["sbatch"])
    assert {name: options[name] for name in ("nodes", "ntasks-per-node", "gpus-per-node", "time", "partition")} == {
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "4",
        "time": "120",
        "partition": "gpu",
    }
    assert options["signal"] == "TERM@120"
    programs.check(["srun", *json.loads((cluster / "srun").read_text())])


def test_the_mesh_must_fit_the_gpus(cluster, capsys):
    """Arithmetic alone: the devices are not there."""
    train = ("--", "python", "-m", "uwm_jax.train", f"--config={ROOT}/configs/droid.py", "--workdir=/shared/x")
    assert call(cluster, *CREATE, "--dry_run", *train) == 0
    assert "mesh: data 8 x fsdp 1 x tensor 1 = 8 GPUs" in capsys.readouterr().out
    assert call(cluster, *CREATE, *train, "--config.mesh.tensor=3") == 2
    assert "config.mesh" in capsys.readouterr().err
    assert call(cluster, "create", "my-run", "--nodes=5", "--gpus_per_node=4", *train) == 2
    assert "config.batch_size=144 does not divide" in capsys.readouterr().err
    sweep = ("--", "python", "-m", "launch.sweep", f"--config={ROOT}/configs/droid.py", "--grid=seed=0,1")
    assert call(cluster, *CREATE, "--dry_run", *sweep) == 0
    assert "mesh: sweep 2 x data 4 x fsdp 1 x tensor 1 = 8 GPUs" in capsys.readouterr().out
    assert not (cluster / "script").exists()


def test_install_unpacks_the_bundle_and_calls_the_worker(cluster, tmp_path, capsys):
    tree = tmp_path / "tree"
    (tree / "launch").mkdir(parents=True)
    (tree / "launch" / "worker.sh").write_text('echo "worker $*"; ls\n')
    (tmp_path / "a.whl").touch()
    (tmp_path / "constraints.txt").touch()
    subprocess.run(["tar", "-czf", tmp_path / "b.tar.gz", "-C", tree, "launch"], check=True)
    shutil.rmtree(tmp_path / "shared folder")
    assert call(cluster, "install", "--extras=cuda,wandb", "--dry_run") == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "shared folder").exists()
    done = subprocess.run(["bash", "-euc", shown], capture_output=True, text=True)
    assert done.stdout == "worker install a.whl 3.11 cuda,wandb\na.whl\nb.tar.gz\nconstraints.txt\nlaunch\n", (
        done.stderr
    )


def test_status_tail_and_delete_are_of_one_name(cluster, capsys):
    assert call(cluster, "status", "my-run") == 0 and call(cluster, "delete", "my-run") == 0
    user = slurm.getpass.getuser()
    assert programs.calls(cluster) == [
        ["squeue", f"--user={user}", "--name=my-run"],
        ["scancel", f"--user={user}", "--name=my-run"],
    ]
    capsys.readouterr()
    assert call(cluster, "tail", "my-run", "--dry_run") == 0
    log = cluster.parent / "shared folder" / "my-run.log"
    assert shlex.split(capsys.readouterr().out) == ["tail", "-n", "100", "-F", str(log)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resize", "x"), "expected one of install, create"),
        (("install", "x"), "install: expected no name, found x"),
        (("delete", "*"), "expected a name of letters"),
        (("create", "x", "--", "python", "-m", "probe"), "--gpus_per_node is required"),
        ((*CREATE,), "expected a command after --"),
        ((*CREATE, "--sbatch_flag=; rm", "--", "python", "-m", "probe"), "expected an option of sbatch"),
        ((*CREATE, "--secret=NO_SUCH_KEY", "--", "python", "-m", "probe"), "NO_SUCH_KEY: the variable is not set here"),
    ],
)
def test_unusable_arguments(cluster, capsys, arguments, message):
    assert call(cluster, *arguments) == 2
    assert message in capsys.readouterr().err and not (cluster / "script").exists()


def test_a_commit_that_is_not_installed(cluster, capsys):
    (cluster.parent / "shared folder" / COMMIT / "env" / "installed").unlink()
    assert call(cluster, *CREATE, "--", "python", "-m", "probe") == 2
    assert "run `python -m launch.slurm install`" in capsys.readouterr().err


def test_secrets_of_the_cloud_are_read_when_the_job_starts():
    text = slurm.script(
        "x",
        ["python", "-m", "probe"],
        folder=Path("/s"),
        log=Path("/s/100 %.log"),
        nodes=1,
        gpus=1,
        minutes=1,
        env={},
        secrets=[Secret("HF_TOKEN", "hf")],
    )
    assert 'HF_TOKEN="$(gcloud secrets versions access latest --secret=hf --quiet)"\nexport HF_TOKEN\n' in text
    assert "#SBATCH --output='/s/100 %%.log'\n" in text and "supervise" not in text
