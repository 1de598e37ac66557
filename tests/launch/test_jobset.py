"""launch.jobset: kubectl gets the manifest that a dry run shows."""

from __future__ import annotations

import os
import shlex

import pytest
import yaml

from launch import jobset, plan_row
from launch.bundle import Bundle
from tests.launch import programs
from tests.launch.test_manifest import check, parts
from uwm_jax import cli
from uwm_jax.errors import UserError

CREATE = ("create", "my-run", "--image=us-docker.pkg.dev/p/r/uwm_jax", "--topology=v5e-16", "--no_plan")
TRAIN = ("--", "python", "-m", "uwm_jax.train", "--config=configs/droid.py", "--workdir=gs://bkt/runs/x")


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """The folder of the stubs, which are the only kubectl and gcloud."""
    programs.install(tmp_path, "kubectl")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    files = [tmp_path / name for name in ("a.whl", "b.tar.gz", "constraints.txt")]
    made = Bundle(*files, commit="c0ffee" * 7, version="1+gc0ffee", python="3.11")
    monkeypatch.setattr(jobset, "bundle", lambda root, build: made)
    return tmp_path


def call(*arguments: str) -> int:
    return cli.call(jobset.main, ["jobset", *arguments], jobset.define_flags)


def test_what_a_dry_run_shows_is_what_runs(stubs, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "the-value")
    flags = ("--slices=2", "--namespace=ml", "--context=gke", "--secret=WANDB_API_KEY=wandb", "--env=UWM_X=a b")
    assert call(*CREATE, *flags, "--dry_run", *TRAIN) == 0
    shown, err = capsys.readouterr()
    assert programs.calls(stubs) == [] and "the-value" not in shown + err
    assert call(*CREATE, *flags, *TRAIN) == 0
    [made] = programs.calls(stubs)
    assert made == ["kubectl", "create", "--filename=-", "--context=gke", "--namespace=ml"]
    text = (stubs / "stdin").read_text()
    remark, command = shown.split("\n", 1)
    assert remark == "# no plan: --no_plan"
    assert command == f"{shlex.join(made)} <<'END'\n{text}END\n"
    manifest = yaml.safe_load(text)
    check(manifest)
    container = parts(manifest)[2]
    assert container["image"] == "us-docker.pkg.dev/p/r/uwm_jax:c0ffeec0ffee"
    assert container["command"][-len(TRAIN) :] == [*TRAIN[1:], "--config.mesh.slices=2"]
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 2


def test_the_other_actions_name_one_jobset(stubs):
    for action in ("status", "tail", "delete"):
        assert call(action, "my-run") == 0
    status, pods, logs, delete = programs.calls(stubs)
    assert status == ["kubectl", "get", "jobset", "my-run"] and delete == ["kubectl", "delete", "jobset", "my-run"]
    assert "--selector=jobset.sigs.k8s.io/jobset-name=my-run" in pods
    assert logs[2].startswith("--selector=jobset.sigs.k8s.io/jobset-name=my-run,jobset.sigs.k8s.io/job-index=0,")


def test_a_run_that_does_not_fit_is_refused(stubs, monkeypatch, capsys):
    asked = []

    def refuse(topology, command, **_):
        asked.append((topology, command[-1]))
        raise UserError("it does not fit")

    monkeypatch.setattr(plan_row, "check", refuse)
    assert call(*CREATE[:-1], "--slices=2", *TRAIN) == 2
    assert "it does not fit" in capsys.readouterr().err
    assert asked == [("2xv5e-16", "--config.mesh.slices=2")] and programs.calls(stubs) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("apply", "my-run"), "expected one of create, status, tail, delete, found apply"),
        (("delete",), "delete: expected the name of one JobSet, found none"),
        (("delete", "*"), "expected a name of at most 40 lower-case letters"),
        (("delete", "my-run", *TRAIN), "no command after -- is expected"),
        (("create", "my-run", "--image=r.io/uwm", *TRAIN), "--topology is required"),
        (("create", "my-run", "--topology=v5e-16", *TRAIN), "--image is required"),
        (("create", "my-run", "--topology=v5e-16", "--image=r.io/uwm:latest", *TRAIN), "without a tag"),
        ((*CREATE, "--secret=WANDB_API_KEY", *TRAIN), "a manifest holds no values"),
        ((*CREATE,), "expected a command after --"),
    ],
)
def test_unusable_arguments(stubs, capsys, arguments, message):
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err and programs.calls(stubs) == []
