"""The real training command in 1, 2 and 4 processes: the same samples and losses, checkpoints that go from one
topology to another, and an end in good order whatever ends it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from launch.rehearse import Processes, one_device
from tests import quick_compile
from tests.data.test_faults import unique
from tests.systems.small import on_tiny_dataset, small_config
from uwm_jax import config as config_lib
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData
from uwm_jax.parallel.distributed import SILENCE_SECONDS

EVALUATES = ("--config.eval.every=4", "--config.eval.num_windows=6")  # all modes, at the end

pytestmark = [pytest.mark.slow, pytest.mark.multihost]

# The training command, several times over, that notes what went in: <workdir>.<process>.jsonl gets a line for every
# batch that a process has read (a hash of each row's content), and one for every training state saved and restored.
RECORDER = """
import hashlib, json, os, sys
import jax, numpy as np
from uwm_jax import cli, train
from uwm_jax.parallel.distributed import session
from uwm_jax.training.checkpoints.checkpoint import Checkpoints

def note(**fields):
    with open(f"{train.FLAGS.workdir}.{jax.process_index()}.jsonl", "a") as f:
        f.write(json.dumps(fields) + "\\n")

def sha(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()[:16]

def of_state(state):
    whole = lambda x: x if x.is_fully_addressable else x.addressable_data(0)
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.ema_params, state.opt_state))
    assert all(x.is_fully_addressable or x.is_fully_replicated for _, x in leaves)
    return {jax.tree_util.keystr(path): sha(np.asarray(whole(x))) for path, x in leaves}

def save(self, state, *rest, original=Checkpoints.save):
    note(saved=of_state(state), step=int(state.step))
    return original(self, state, *rest)

def restore_latest(self, like, original=Checkpoints.restore_latest):
    state, stored = original(self, like)
    note(restored=of_state(state), step=stored.step)
    return state, stored

def prefetch_to_device(batches, *rest, original=train.prefetch_to_device):
    def noted():
        for batch in batches:
            keys = sorted(set(batch) - {"row"})
            note(rows={int(row): sha(*(batch[k][i] for k in keys)) for i, row in enumerate(batch["row"])})
            yield batch
    return original(noted(), *rest)

Checkpoints.save, Checkpoints.restore_latest, train.prefetch_to_device = save, restore_latest, prefetch_to_device
for arguments in json.loads(sys.argv[1]):
    if arguments[0] == "copy":
        import shutil
        shutil.copytree(arguments[1], arguments[2])
        shutil.rmtree(f"{arguments[2]}/checkpoints/4")
    elif status := cli.call(train.main, ["train", *arguments, *sys.argv[2:]], train.define_flags):
        sys.exit(status)
"""


def command_of(config, folder):
    """(workdir, *more flags) -> the flags of a run of four steps of eight rows, with a checkpoint every second step."""
    config.total_steps, config.batch_size, config.log_every = 4, 8, 1
    config.checkpoint.every, config.checkpoint.keep = 2, 5
    file = folder / "config.py"
    file.write_text(
        "from uwm_jax import config\n"
        f"def get_config():\n    return config.from_json({config_lib.to_json(config)!r}, 'test')\n"
    )
    return lambda workdir, *more: [f"--config={file}", f"--workdir={workdir}", *more]


def spoil_first_row(config):
    """Flips a byte of the record with the first frame of a run's first row."""
    loader = Loader(RunData(config.data, seed=config.seed), batch_size=8)
    trace, dataset = loader.describe(0), Dataset(config.data.path)
    file, record = dataset.directory / trace.shard, dataset.record(trace.episode, trace.origin // dataset.chunk_steps)
    data = bytearray(file.read_bytes())
    data[unique(data, record)] ^= 1
    file.write_bytes(data)


def add_video(config):
    """Makes the data robot data and video."""
    config.data.sources.robot = config_lib.source(weight=0.75)
    config.data.sources.video = config_lib.source(weight=0.25, use_actions=False)


@pytest.fixture(scope="module")
def train_command(tmp_path_factory, make_tiny_config):
    """`command_of` UWM on robot data and video."""
    config = make_tiny_config()
    add_video(config)
    return command_of(config, tmp_path_factory.mktemp("config"))


def start(jobs, count):
    """Runs jobs, one after the other, in `count` processes; what each of them said."""
    command = [sys.executable, "-c", RECORDER, json.dumps(jobs)]
    with Processes(count, command, os.environ) as processes:
        assert processes.wait(400) == [0] * count, processes.lines
    return processes.lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train_command):
    """Runs by name, each a directory with a workdir's content and the recorder's notes beside it:

    one, two, four: 1, 2 and 4 processes; those of `two` are slices. data8: one process with 8 devices.
    four_on_one, four_on_two, data8_on_fsdp8, data8_on_tensor2: copies that continue from step 2.
    """
    root = tmp_path_factory.mktemp("runs")

    def continued(before, after, *more):
        return [["copy", str(root / before), str(root / after)], train_command(root / after, *more)]

    def start_with_8_devices(jobs):
        environ = one_device(os.environ) | {"XLA_FLAGS": quick_compile.with_devices(8)}
        command = [sys.executable, "-c", RECORDER, json.dumps(jobs)]
        result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=400)
        assert result.returncode == 0, result.stderr

    four_lines = start([train_command(root / "four")], 4)
    assert sum("step 4/4" in "\n".join(lines) for lines in four_lines) == 1, "one process speaks"
    shutil.copytree(root / "four", root / "four_on_two")
    shutil.rmtree(root / "four_on_two" / "checkpoints" / "4")
    start([train_command(root / "two", *EVALUATES, "--config.mesh.slices=2")], 2)
    start([train_command(root / "four_on_two")], 2)
    start([train_command(root / "one", *EVALUATES), *continued("four", "four_on_one")], 1)
    start_with_8_devices(
        [
            train_command(root / "data8", *EVALUATES),
            *continued("data8", "data8_on_fsdp8", "--config.mesh.data=1", "--config.mesh.fsdp=8"),
            *continued("data8", "data8_on_tensor2", "--config.mesh.data=4", "--config.mesh.tensor=2"),
        ]
    )
    return root


def notes(runs, name, kind):
    """The recorder's lines of a kind, of every process."""
    files = sorted(runs.glob(f"{name}.*.jsonl"))
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [[line for line in of_process if kind in line] for of_process in lines]


def samples(runs, name, steps):
    """The content of the first `steps` global batches that were read, {row: hash} each, put together from all
    processes."""
    batches = []
    for of_processes in zip(*(lines[:steps] for lines in notes(runs, name, "rows")), strict=True):
        rows = [item for line in of_processes for item in line["rows"].items()]
        batches.append(dict(rows))
        assert sorted(map(int, batches[-1])) == list(range(8)) and len(rows) == 8, "every row once"
    assert len(batches) == steps
    return batches


def metrics(runs, name):
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["two", "four", "data8"])
def test_the_same_samples_and_losses_however_many_processes(runs, name):
    assert_the_same(runs, name, "one", ("loss", "loss/action", "loss/next_obs", "grad_norm"))


def assert_the_same(runs, name, other, keys):
    assert samples(runs, name, 4) == samples(runs, other, 4)
    found, expected = metrics(runs, name), metrics(runs, other)
    assert [x["step"] for x in found] == [x["step"] for x in expected] == [1, 2, 3, 4]
    for x, y in zip(found, expected, strict=True):
        for key in keys:
            np.testing.assert_allclose(x[key], y[key], rtol=1e-6 if x["step"] == 1 else 1e-5, err_msg=key)


@pytest.mark.parametrize("variant", ["dp", "gr1"])
def test_two_processes_train_and_finetune_other_systems(variant, tiny_dataset, tmp_path):
    """One of them on data with a bad record, whose rows are replaced and counted as one process does it."""
    config = on_tiny_dataset(small_config(variant), tiny_dataset)
    if variant == "dp":
        config.data.path, config.data.max_bad_records = str(shutil.copytree(tiny_dataset, tmp_path / "data")), 1
        spoil_first_row(config)
    if variant != "dp":  # which refuses video without actions
        add_video(config)
    command = command_of(config, tmp_path)
    finetune = f"--config.init_from={tmp_path / 'two'}"
    for job in (command(tmp_path / "two"), command(tmp_path / "two_finetuned", finetune)):
        start([job], 2)  # processes join once
    start([command(tmp_path / "one"), command(tmp_path / "one_finetuned", finetune)], 1)
    keys = ("loss", *(f"loss/{part}" for part in config.loss.weights), "grad_norm")
    if variant == "dp":
        keys += ("data/bad_records", "data/bad_rows")
        assert metrics(tmp_path, "one")[0]["data/bad_rows"] > 0
    assert_the_same(tmp_path, "two", "one", keys)
    assert_the_same(tmp_path, "two_finetuned", "one_finetuned", keys)
    assert metrics(tmp_path, "two_finetuned")[0]["loss"] < metrics(tmp_path, "two")[0]["loss"]


@pytest.mark.parametrize("name", ["two", "data8"])
def test_the_same_evaluation_however_many_processes(runs, name):
    expected, found = ({k: v for k, v in metrics(runs, n)[-1].items() if k.startswith("eval/")} for n in ("one", name))
    assert found.keys() == expected.keys() >= {"eval/policy/action_mse", "eval/control/shuffle_gap", "eval/loss/action"}
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-4, err_msg=key)
    assert (runs / name / "eval" / "4" / "modes.png").exists()


def test_each_process_reads_its_own_rows(runs):
    for name, count in (("one", 1), ("two", 2), ("four", 4)):
        shares = [lines[0]["rows"] for lines in notes(runs, name, "rows")]
        assert [len(share) for share in shares] == [8 // count] * count


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("four", "four_on_one"),
        ("four", "four_on_two"),
        ("data8", "data8_on_fsdp8"),
        ("data8", "data8_on_tensor2"),
    ],
)
def test_a_checkpoint_goes_to_another_topology(runs, before, after):
    saved = [line["saved"] for lines in notes(runs, before, "saved") for line in lines if line["step"] == 2]
    restored = [line["restored"] for lines in notes(runs, after, "restored") for line in lines]
    assert len(saved[0]) > 40 and len({tuple(x.items()) for x in saved}) == 1, "the same on every process"
    assert restored and all(x == saved[0] for x in restored), "parameters, average, Adam's moments: bit for bit"
    assert samples(runs, after, 2) == samples(runs, before, 4)[2:]
    expected, found = metrics(runs, before), metrics(runs, after)
    assert [x["step"] for x in found] == [1, 2, 3, 4] and found[:2] == expected[:2]
    for x, y in zip(found[2:], expected[2:], strict=True):
        np.testing.assert_allclose(x["loss"], y["loss"], rtol=1e-6 if x["step"] == 3 else 1e-5)


def test_one_process_writes_the_text(runs):
    workdir = runs / "four"
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 4
    assert not [p for p in workdir.rglob("*tmp*")]


def test_sigterm_saves_and_sigkill_ends_all(train_command, tmp_path):
    """Two processes: SIGTERM to one, continue, SIGKILL the other.

    The one that is left learns it at once in a collective, and in a turn, where it waits for words, by silence.
    """
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "uwm_jax.train"]
    command += train_command(workdir, "--config.total_steps=100000", "--config.checkpoint.every=100000")

    def wait_for_a_step(processes):
        deadline = time.monotonic() + 300
        while not any(line.startswith("step ") for line in processes.lines[0]):
            assert time.monotonic() < deadline and not any(p.poll() for p in processes.popen), processes.lines
            time.sleep(0.05)

    with Processes(2, command, os.environ) as processes:
        wait_for_a_step(processes)
        processes.popen[1].send_signal(signal.SIGTERM)
        statuses = processes.wait(120)
    assert statuses == [143, 143], processes.lines
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    assert len(steps) == 1, "one, and nothing half-written beside it"
    assert metrics(tmp_path, "run")[-1]["step"] <= steps[0]
    assert any(f"step {steps[0]} is saved" in line for line in processes.lines[0])

    with Processes(2, command, os.environ) as processes:
        wait_for_a_step(processes)
        assert f"continuing from step {steps[0]}" in processes.lines[0]
        processes.popen[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        statuses = processes.wait(120)
    assert statuses == [1, 128 + signal.SIGKILL], processes.lines
    assert time.monotonic() - began < SILENCE_SECONDS + 30
    output = "\n".join(processes.lines[0])
    assert re.search("0 of 2 lost contact with another process|1 of 2 failed: it showed no life", output)
    assert "Traceback" not in output
    assert [int(p.name) for p in (workdir / "checkpoints").iterdir()] == steps
