"""The stand-in for gcloud refuses what the reference does not have, and its TPUs come and go."""

from __future__ import annotations

import datetime
import json
import re

import pytest

from launch.gcloud_stub import Cloud, Refused, check

QR = ["compute", "tpus", "queued-resources"]
CREATE = [*QR, "create", "q", "--zone=z", "--accelerator-type=v4-16", "--runtime-version=r", "--node-id=q"]


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path / "cloud", {"IMAGE": "yes", "PATH": "/usr/bin:/bin"})
    yield cloud
    cloud.end()


def test_the_reference_is_dated_and_has_a_source():
    import launch.gcloud_stub as stub

    reference = json.loads(stub._REFERENCE.read_text())
    assert datetime.date.fromisoformat(reference["read"]) >= datetime.date(2026, 11, 30)
    assert reference["source"].startswith("https://cloud.google.com/sdk/gcloud/reference")
    assert all(re.fullmatch(r"--[a-z-]+=?", flag) for flag in reference["wide"])
    for command in reference["commands"].values():
        assert all(re.fullmatch(r"--[a-z-]+=?", flag) for flag in command["flags"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compute", "tpus", "queued-resources", "cancel", "q"], "Invalid choice.*not in the reference of 2026"),
        (["compute", "instances", "list"], "Invalid choice"),
        ([*CREATE, "--preemptible"], "unrecognized arguments: --preemptible"),
        ([*CREATE, "--best-effort"], "unrecognized arguments"),  # of the alpha command
        ([*CREATE, "--spot=true"], "--spot: expected no value"),
        ([*CREATE, "--labels"], "--labels: expected a value"),
        ([*CREATE, "--node-count=2"], "at most one of --node-id, --node-count"),
        (CREATE[:-1], "--node-id or --node-count must be specified"),
        ([*CREATE, "another"], "expected 1 to 1 names"),
        (["compute", "tpus", "tpu-vm", "delete", "q", "--zone=z", "--force"], "unrecognized arguments: --force"),
    ],
)
def test_what_the_reference_does_not_have_is_refused(arguments, message):
    with pytest.raises(Refused, match=message):
        check(arguments)
    assert check(CREATE)[1] == ["q"]


def state(cloud, capsys, group="queued-resources"):
    assert cloud.call(["compute", "tpus", group, "describe", "q", "--zone=z", "--format=json"]) == 0
    found = json.loads(capsys.readouterr().out)["state"]
    return found["state"] if isinstance(found, dict) else found


def test_a_queued_resource_waits_becomes_active_and_is_suspended(cloud, capsys):
    cloud.call(CREATE)
    with pytest.raises(Refused, match="ALREADY_EXISTS"):
        cloud.call(CREATE)
    with pytest.raises(Refused, match="q is WAITING_FOR_RESOURCES: cannot be reached"):
        cloud.call([*QR, "ssh", "q", "--zone=z", "--command=true"])
    assert [state(cloud, capsys) for _ in range(4)] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE"]
    with pytest.raises(Refused, match="FAILED_PRECONDITION"):
        cloud.call([*QR, "delete", "q", "--zone=z"])
    cloud.preempt("q")
    assert [state(cloud, capsys) for _ in range(2)] == ["SUSPENDING", "SUSPENDED"]
    cloud.call([*QR, "delete", "q", "--zone=z"])
    with pytest.raises(Refused, match="NOT_FOUND"):
        state(cloud, capsys)


def test_a_vm_is_preempted(cloud, capsys):
    vm = ["compute", "tpus", "tpu-vm"]
    cloud.call([*vm, "create", "q", "--zone=z", "--version=v", "--accelerator-type=v5litepod-8"])
    assert len(cloud.workers("q")) == 1
    assert [state(cloud, capsys, "tpu-vm") for _ in range(2)] == ["CREATING", "READY"]
    with pytest.raises(Refused, match="NOT_FOUND"):
        state(cloud, capsys)  # no queued resource
    cloud.preempt("q")
    assert state(cloud, capsys, "tpu-vm") == "PREEMPTED"


def test_workers_are_processes_that_end_with_their_tpu(cloud, capsys, ends):
    cloud.call([*CREATE[:-1], "--node-count=2", "--node-prefix=q"])
    for _ in range(3):
        state(cloud, capsys)
    homes = cloud.workers("q")
    assert len(homes) == 4  # two slices of two hosts
    both = ["--zone=z", "--worker=all", "--node=all"]
    line = (
        'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES $IMAGE ${SECRET-none}" > said; (setsid sleep 600 & echo $! > pid)'
    )
    assert cloud.call([*QR, "ssh", "q", *both, f"--command={line}"]) == 0
    assert [(home / "said").read_text().strip() for home in homes] == [f"{i} of 4 yes none" for i in range(4)]
    assert cloud.call([*QR, "ssh", "q", *both, '--command=[ "$JAX_PROCESS_ID" != 3 ]']) == 1
    file = homes[0] / "file"
    file.write_text("x")
    cloud.call([*QR, "scp", str(file), "q:", "--zone=z", "--worker=1", "--node=1"])
    assert [(home / "file").exists() for home in homes] == [True, False, False, True]
    pids = [int((home / "pid").read_text()) for home in homes]
    cloud.preempt("q")
    assert all(ends(pid) for pid in pids) and not any(home.exists() for home in homes)
