"""Weights & Biases, offline: what its files hold is read here, record by record."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

wandb = pytest.importorskip("wandb")
from wandb.proto.wandb_internal_pb2 import Record  # noqa: E402

from uwm_jax import files  # noqa: E402
from uwm_jax.errors import UserError  # noqa: E402
from uwm_jax.training.telemetry.tracker import RunFacts  # noqa: E402
from uwm_jax.training.telemetry.wandb_tracker import Wandb, _id  # noqa: E402

# Trains nothing: the log of two members of a sweep, from a step on. It ends by itself, or waits to be killed.
RUN = """
import sys, time
from pathlib import Path
from uwm_jax import config as config_lib
from uwm_jax.training.telemetry import trackers
from uwm_jax.training.telemetry.log import MetricsLog

folder, start, ends = Path(sys.argv[1]), int(sys.argv[2]), len(sys.argv) > 3
config = config_lib.base()
config.trackers = ("wandb",)
logs, followed = [], []
for name in ("one", "two"):
    workdir = folder / "members" / name
    workdir.mkdir(parents=True, exist_ok=True)
    picture = Path(workdir / "modes.png")
    picture.write_bytes(bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
        "0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
    ))
    followed.append(trackers.start(config, workdir, start, True, group=folder.name))
    logs.append(MetricsLog(workdir, start, followed[-1]))
for step in range(start + 10, 60, 10):
    for log in logs:
        log.write(step, {"loss": 1 / step, "eval/mse": float("nan")}, {"eval/modes": picture} if step == 40 else {})
for each in followed if ends else []:
    each.close(seconds=120)  # on a machine that has much else to do
time.sleep(0 if ends else 600)
"""


def records(file: Path) -> list[Record]:
    """The records of a transaction log: a LevelDB log behind a header of 7 bytes, in blocks of 32 KiB."""
    data, found, whole, at = file.read_bytes(), [], b"", 7
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):  # cut off by a kill
            break
        whole += data[at + 7 : at + 7 + size]
        if kind in (1, 4):  # full, or last
            found.append(Record.FromString(whole))
            whole = b""
        at += 7 + size
    return found


def history(found: list[Record]) -> list[dict[str, object]]:
    rows = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]


def steps(workdir: Path) -> list[list[int]]:
    """Those of each start, in the order of the starts."""
    files = sorted(workdir.glob("wandb/offline-run-*/run-*.wandb"))
    return [[row["step"] for row in history(records(file))] for file in files]


def start(folder, step, *more):
    environ = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    return subprocess.Popen([sys.executable, "-c", RUN, str(folder), str(step), *more], env=environ)


def until(holds, process):
    deadline = time.monotonic() + 120
    while not holds() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holds()


def test_a_run_that_was_killed_goes_on_under_its_id_and_repeats_its_steps(tmp_path):
    """In one group with another member, which has a run of its own."""
    folder = tmp_path / "loss_weights"
    one, two = folder / "members" / "one", folder / "members" / "two"
    process = start(folder, 0)
    try:
        until(lambda: all(steps(workdir) == [[10, 20, 30, 40, 50]] for workdir in (one, two)), process)
    finally:
        process.kill()
        process.wait()
    assert start(folder, 20, "ends").wait(timeout=120) == 0
    ids = []
    for workdir in (one, two):
        assert steps(workdir) == [[10, 20, 30, 40, 50], [30, 40, 50]], "none dropped"
        files = sorted(workdir.glob("wandb/offline-run-*/run-*.wandb"))
        kept = json.loads((workdir / "wandb.json").read_text())["id"]
        ids.append(kept)
        for file in files:
            found = records(file)
            (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
            assert (run.run_id, run.run_group, run.display_name) == (kept, "loss_weights", workdir.name)
            assert run.project == "uwm_jax"
            configured = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in run.config.update}
            assert configured["optimizer"]["learning_rate"] == 1e-4 and configured["trackers"] == ["wandb"]
            metrics = [record.metric for record in found if record.WhichOneof("record_type") == "metric"]
            assert [(m.name, m.glob_name, m.step_metric) for m in metrics] == [("step", "", ""), ("", "*", "step")]
        rows = history(records(files[0]))
        assert [row["loss"] for row in rows] == [1 / step for step in range(10, 60, 10)]
        assert rows[3]["eval/modes/_type"] == "image-file" and "eval/modes/_type" not in rows[2]
    assert ids[0] != ids[1]


def test_without_a_key_it_is_told_and_asks_nobody(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    with pytest.raises(wandb.errors.UsageError, match="No API key configured. Use `wandb login`"):
        Wandb().start(RunFacts(workdir=tmp_path, config={}, step=0, group=""))


def test_the_id_is_kept_in_a_bucket_too(bucket):
    run = RunFacts(workdir=files.as_place(bucket) / "run", config={}, step=0, group="")
    first = _id(run)
    assert re.fullmatch("[0-9a-f]{8}", first) and _id(run) == first
    assert _id(dataclasses.replace(run, workdir=files.as_place(bucket) / "other")) != first
    files.write_text(run.workdir / "wandb.json", "[]")
    with pytest.raises(UserError, match="wandb.json"):
        _id(run)
