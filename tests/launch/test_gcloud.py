"""Calls of gcloud: shown, ended in time, tried again; and buckets in other regions."""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path

import pytest

import launch.program
from launch import regions
from launch.gcloud import Gcloud
from uwm_jax.errors import RunError, UserError


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A function that makes a gcloud of a line of bash."""

    def make(line: str) -> None:
        file = tmp_path / "gcloud"
        file.write_text(f"#!/usr/bin/env bash\n{line}\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return make


def test_a_dry_run_prints_what_a_shell_would_run(program, capsys):
    program("echo ran >&2; exit 1")
    gcloud = Gcloud(dry_run=True, project="p")
    gcloud.remark("first\nsecond")
    gcloud.run("a", "--command=cd x && y 'z'")
    assert gcloud.read("b") is None
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines()[:2] == ["# first", "# second"]
    words = [shlex.split(line, comments=True) for line in out.splitlines()[2:]]
    assert words[0] == ["gcloud", "a", "--command=cd x && y 'z'", "--project=p", "--quiet"]
    assert words[1] == ["gcloud", "b", "--format=json", "--project=p", "--quiet"]


def test_a_call_that_fails_is_tried_again_for_a_time(program, tmp_path):
    program(f'echo x >> {tmp_path}/calls; [ "$(wc -l < {tmp_path}/calls)" -ge 3 ]')
    slept = []
    Gcloud(say=lambda line: None, sleep=slept.append).run("ssh", retry_seconds=60)
    assert len(slept) == 2
    (tmp_path / "calls").unlink()
    with pytest.raises(RunError, match="status 1: gcloud ssh --quiet"):
        Gcloud(say=lambda line: None, sleep=slept.append).run("ssh")


def test_a_call_that_hangs_is_ended_with_what_it_started(program, ends):
    program('sleep 600 & echo "$!" > "$(dirname "$0")/pid"; wait')
    began = time.monotonic()
    with pytest.raises(RunError, match="status 124.*did not end within 1 s"):
        Gcloud().output("describe", seconds=1)
    assert time.monotonic() - began < 30
    assert ends(int((Path(os.environ["PATH"].split(os.pathsep)[0]) / "pid").read_text()))


def test_a_call_that_ignores_being_ended_is_killed(program, monkeypatch):
    monkeypatch.setattr(launch.program, "_END_SECONDS", 0.5)
    program('trap "" TERM; while :; do sleep 0.1; done')
    began = time.monotonic()
    with pytest.raises(RunError, match="status 124"):
        Gcloud(say=lambda line: None).run("ssh", seconds=1)
    assert time.monotonic() - began < 30


def test_what_is_not_there_is_none_and_other_failures_are_told(program):
    program('echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1')
    assert Gcloud().read("describe") is None
    program(
        r"""printf "ERROR: (gcloud) NOT_FOUND: no\\n- '@type': type.googleapis.com/x\\n  reason: y\\n" >&2; exit 1"""
    )
    assert Gcloud().read("describe") is None, "details follow the line that tells why"
    program('echo "ERROR: PERMISSION_DENIED" >&2; exit 1')
    with pytest.raises(RunError, match="status 1: gcloud describe .*PERMISSION_DENIED"):
        Gcloud().read("describe")
    program("echo no json")
    with pytest.raises(RunError, match="expected JSON, found 'no json"):
        Gcloud().read("describe")


def test_without_gcloud_the_message_says_where_it_is_from(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="gcloud: not installed.*cloud.google.com/sdk/docs/install"):
        Gcloud().run("a")


class Buckets(Gcloud):
    """Knows some buckets."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def read(self, *arguments):
        found = self.known[arguments[3].removeprefix("gs://")]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.mark.parametrize(
    ("bucket", "said"),
    [
        ({"location": "US-WEST4", "locationType": "region"}, None),
        ({"location": "NAM4", "locationType": "dual-region"}, "lies in us-central1 and us-east1, the zone in us-west4"),
        ({"location": "US-EAST1", "locationType": "region"}, "lies in us-east1, the zone in us-west4.*is charged"),
        ({"location": "US", "locationType": "multi-region"}, "US is a multi-region"),
        (
            {
                "location": "US",
                "locationType": "dual-region",
                "customPlacementConfig": {"dataLocations": ["US-WEST4", "US-WEST1"]},
            },
            None,
        ),
        (None, "there is no such bucket"),
        (RunError("PERMISSION_DENIED"), "its region is not known: PERMISSION_DENIED"),
    ],
)
def test_buckets_in_other_regions_are_warned_about(bucket, said, capsys):
    regions.check(Buckets({"b": bucket}), ["b"], "us-west4-a")
    err = capsys.readouterr().err
    if said is None:
        assert err == ""
    else:
        assert re.search(f"warning: gs://b: .*{said}", err)


def test_the_buckets_of_a_command_and_its_environment():
    command = ["python", "--workdir=gs://bkt/runs/x", "--config.init_from=gs://other.b/runs/y", "--x=gs://bkt/z"]
    assert regions.buckets(command, {"UWM_DATA_DIR": "gs://data/d"}) == ["bkt", "other.b", "data"]


def test_the_time_limit_is_that_of_the_call(program):
    program("sleep 600")
    with pytest.raises(RunError, match="status 124"):
        Gcloud(say=lambda line: None).run("ssh", seconds=0.5)
