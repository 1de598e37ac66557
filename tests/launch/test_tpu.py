"""launch.tpu: what it runs is what the tool's reference allows, and it touches nothing that it has not created."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex

import pytest

from launch import plan_row, tpu
from launch.bundle import Bundle
from launch.gcloud_stub import Cloud, check
from launch.tpu_resource import RUNTIMES, order, remembered
from uwm_jax import cli
from uwm_jax.errors import UserError
from uwm_jax.planning.chips import CHIPS

TRAIN = ("--", "python", "-m", "uwm_jax.train", "--config=configs/droid.py", "--workdir=gs://bkt/runs/x")


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    cloud = Cloud(tmp_path / "cloud", {"PATH": "/usr/bin:/bin"})
    (cloud.folder / "buckets.json").write_text(json.dumps({"bkt": {"location": "US-EAST1", "locationType": "region"}}))
    monkeypatch.setenv("PATH", cloud.environ["PATH"])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    files = [
        tmp_path / name for name in ("uwm_jax-1+gc0ffee-py3-none-any.whl", "uwm_jax-c0ffee.tar.gz", "constraints.txt")
    ]
    for file in files:
        file.touch()
    made = Bundle(*files, commit="c0ffee" * 7, version="1+gc0ffee", python="3.11")
    monkeypatch.setattr(tpu, "bundle", lambda root, build: made)
    yield cloud
    cloud.end()


@pytest.fixture
def call(cloud, capsys):
    """A function that runs the command; returns (status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        action, name, *rest = arguments
        argv = ["tpu", action, name, "--zone=us-west4-a", "--poll_seconds=0.1", *rest]
        status = cli.call(tpu.main, argv, tpu.define_flags)
        return status, *capsys.readouterr()

    return run


def commands(out: str) -> list[list[str]]:
    """The commands of a dry run, which the reference allows; all other lines are comments of the shell."""
    found = [words for line in out.splitlines() if (words := shlex.split(line, comments=True))]
    for program, *arguments in found:
        assert program == "gcloud"
        check(arguments)
    return found


def test_a_dry_run_of_everything_runs_nothing(call, cloud, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "the-value")
    shown = ""
    for arguments in (
        ("create", "my-tpu", "--topology=v5e-16", "--slices=2", "--spot", "--create_flag=network=mtu9k", "--no_plan"),
        ("create", "my-tpu", "--topology=v4-8", "--vm"),
        ("install", "my-tpu"),
        ("start", "my-tpu", "--no_plan", "--secret=WANDB_API_KEY", "--secret=HF_TOKEN=hf", "--env=A=b c", *TRAIN),
        ("status", "my-tpu"),
        ("status", "my-tpu", "--vm"),
        ("tail", "my-tpu"),
        ("delete", "my-tpu"),
    ):
        head, tail = arguments[:2], arguments[2:]
        status, out, err = call(*head, "--dry_run", *tail)
        assert status == 0, err
        assert commands(out)
        shown += out + err
    assert cloud.calls() == [] and "the-value" not in shown
    assert "--node-count=2 --node-prefix=my-tpu" in shown and "--accelerator-type=v5litepod-16" in shown
    assert "--valid-until-duration=24h" in shown and "--spot" in shown and "--network=mtu9k" in shown
    assert "--secret HF_TOKEN=hf:latest" in shown and "WANDB_API_KEY, which no command line shows" in shown
    assert "uwm_jax.train --config=configs/droid.py --workdir=gs://bkt/runs/x" in shown


def test_the_commands_of_the_page_run_dry(call, cloud, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # without libtpu nothing is compiled
    page = (tpu.ROOT / "docs" / "scale.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    seen = set()
    for line in blocks.splitlines():
        words = shlex.split(line, comments=True)
        if words[:3] == ["python", "-m", "launch.tpu"]:
            assert cli.call(tpu.main, ["tpu", "--dry_run", *words[3:]], tpu.define_flags) == 0
            seen.add(words[3])
    assert seen == set(tpu.ACTIONS) and cloud.calls() == []


def test_a_dry_run_prints_what_then_runs(call, cloud):
    """The commands of the dry run are the calls of the run, but for the label, which is drawn anew."""

    def plain(words):
        return [word for word in words if not word.startswith("--labels=")]

    flags = ("create", "my-tpu", "--topology=v4-16", "--no_plan", *TRAIN)
    printed = commands(call(*flags[:2], "--dry_run", *flags[2:])[1])
    assert call(*flags)[0] == 0
    ran = [["gcloud", *words] for words in cloud.calls()]
    assert [plain(words) for words in ran[: len(printed)]] == [plain(words) for words in printed]
    assert all(words[4:6] == ["describe", "my-tpu"] for words in ran[len(printed) :])  # until it is active


def test_what_was_created_is_remembered_until_it_is_deleted(call, cloud):
    assert call("create", "my-tpu", "--topology=v4-16", "--spot")[0] == 0
    found = remembered("my-tpu", "us-west4-a")
    assert (found.topology, found.slices, found.flags) == ("v4-16", 1, ("--spot",))
    [created] = [words for words in cloud.calls() if "create" in words]
    assert f"--labels=uwm-jax-launch={found.identity}" in created and remembered("my-tpu", "elsewhere") is None
    status, _, err = call("create", "my-tpu", "--topology=v4-16")
    assert status == 2 and "it exists already" in err and remembered("my-tpu", "us-west4-a") == found
    status, out, _ = call("status", "my-tpu")
    assert out == "my-tpu: ACTIVE\nworker 0: not installed\nworker 1: not installed\n"
    assert call("delete", "my-tpu")[0] == 0 and remembered("my-tpu", "us-west4-a") is None
    assert call("status", "my-tpu")[1] == "my-tpu: there is none\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resize", "my-tpu"), "expected one of create, install"),
        (("delete",), "delete: expected the name of one TPU, found none"),
        (("delete", "a", "b"), "found a b"),
        (("delete", "*"), "expected a name of lower-case letters"),
        (("create", "my-tpu"), "--topology is required"),
        (("create", "my-tpu", "--topology=v5e-17"), "--topology=v5e-17: expected names such as"),
        (("create", "my-tpu", "--topology=v4-8", "--slices=2", "--vm"), "--slices=2 requires a queued resource"),
        (("create", "my-tpu", "--topology=2xv4-8", "--slices=3"), "has 2 slices, but --slices=3"),
        (("start", "my-tpu"), "expected a command after --"),
        (
            ("start", "my-tpu", "--restart_on_preemption=other", *TRAIN),
            "expected my-tpu.*nothing else is ever replaced",
        ),
        (("start", "my-tpu", "--restart_on_preemption=my-tpu", *TRAIN), "not created from here"),
        (("start", "my-tpu", "--secret=NO_SUCH_KEY", *TRAIN), "NO_SUCH_KEY: the variable is not set here"),
        (("start", "my-tpu", "--env=HF_TOKEN=x", *TRAIN), "looks like a secret"),
        (("install", "my-tpu", *TRAIN), "no command after -- is expected"),
    ],
)
def test_unusable_arguments(cloud, capsys, arguments, message):
    argv = ["tpu", "--zone=us-west4-a", *arguments]
    assert cli.call(tpu.main, argv, tpu.define_flags) == 2
    assert re.search(message, capsys.readouterr().err)
    assert cloud.calls() == []


def test_the_bucket_of_another_region_is_warned_about(call):
    _, _, err = call("create", "my-tpu", "--topology=v4-16", "--no_plan", *TRAIN)
    assert "warning: gs://bkt: it lies in us-east1, the zone in us-west4" in err


def test_each_chip_has_its_runtime():
    assert RUNTIMES.keys() == CHIPS.keys()
    assert order("2xv5e-16", 1, False, "", 24, []).planned == "2xv5e-16"
    assert order("v5e-16", 2, False, "mine", 24, ["a=b", "--c"]).flags == ("--a=b", "--c")


def test_a_plan_that_does_not_fit_stops_before_anything_is_paid(call, cloud, monkeypatch):
    asked = []

    def refuse(topology, command, *, no_plan, dry_run, say):
        asked.append((topology, command[-1], no_plan, dry_run))
        raise UserError("does not fit")

    monkeypatch.setattr(plan_row, "check", refuse)
    status, _, err = call("create", "my-tpu", "--topology=v5e-16", "--slices=2", *TRAIN)
    assert status == 2 and "does not fit" in err and cloud.calls() == []
    assert asked == [("2xv5e-16", "--config.mesh.slices=2", False, False)]
    status, _, err = call("start", "my-tpu", "--topology=v5e-16", *TRAIN)
    assert status == 2 and cloud.calls() == [] and asked[1:] == [("v5e-16", TRAIN[-1], False, False)]


def test_secrets_are_copied_in_a_file_of_their_own_that_is_removed(call, cloud, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "the-'value'")
    assert call("create", "my-tpu", "--topology=v4-16")[0] == 0
    for home in cloud.workers("my-tpu"):
        (home / "uwm_jax").mkdir()
    status, out, err = call("start", "my-tpu", "--no_plan", "--secret=WANDB_API_KEY", *TRAIN)
    assert status == 1 and "launch/worker.sh" in err  # nothing is installed here
    files = [home / "uwm_jax" / "secrets" for home in cloud.workers("my-tpu")]
    assert [shlex.split(file.read_text()) for file in files] == [["WANDB_API_KEY=the-'value'"]] * 2
    [source] = {words[4] for words in cloud.calls() if words[3] == "scp"}
    assert not tpu.Path(source).exists()
    assert "the-" not in out + err + json.dumps(cloud.calls())


def test_a_state_of_another_version_is_told(call, cloud, tmp_path):
    file = tmp_path / "state" / "uwm_jax" / "tpu" / "us-west4-a" / "my-tpu.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"topology": "v4-8"}')
    status, _, err = call("status", "my-tpu")
    assert status == 2 and "my-tpu.json: not written by this version" in err
