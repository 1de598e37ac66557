"""A run whose workdir lies in a bucket: the same numbers as in a folder, and every command reads and writes it."""

from __future__ import annotations

import io
import json

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from tests.training.telemetry.test_event_file import records
from uwm_jax import cli, convert, evaluate, files, report, sample, sample_inputs
from uwm_jax import config as config_lib
from uwm_jax.evaluation import closed_loop
from uwm_jax.reporting import sweep_page
from uwm_jax.reporting.drawing import save_gif
from uwm_jax.runs.opening import use_compilation_cache
from uwm_jax.sweeps import record_file
from uwm_jax.sweeps.members import groups, make_members
from uwm_jax.sweeps.run import run_sweep
from uwm_jax.train import train
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.provenance import describe_use, read_starts
from uwm_jax.training.telemetry.log import read_metrics

pytestmark = pytest.mark.slow

CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
OWN = ("eval/", "samples_per_second", "data_wait_fraction", "goodput", "mfu", "time/")  # of one start alone


@pytest.fixture(scope="module")
def make_config(make_tiny_config):
    def make():
        config = make_tiny_config()
        config.total_steps, config.log_every = 4, 1
        config.eval.num_windows = 4
        return config

    return make


@pytest.fixture(scope="module")
def local(make_config, tmp_path_factory):
    """The run in a folder."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    train(make_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def remote(make_config, storage_emulator):
    """The same run in a bucket, as are its data, which is evaluated at its end and traced on its way."""
    workdir = files.as_place("gs://bkt/test_bucket_runs/run")
    config = make_config()
    files.copy_tree(config.data.path, workdir.with_name("data"))
    config.data.path = str(workdir.with_name("data"))
    config.eval.every = 4
    train(config, workdir, profile="2:2")
    return workdir


def lines_of(workdir) -> list[dict]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(OWN)} for line in lines]


def arrays_of(workdir, step) -> list[bytes]:
    checkpoints = Checkpoints(workdir, read_only=True)
    items = sorted(checkpoints.items(step) & {"params", "ema_params", "train_state"})
    assert len(items) == 3
    return [np.asarray(x).tobytes() for item in items for x in jax.tree.leaves(checkpoints.restore_arrays(step, item))]


def call(command, *arguments) -> None:
    assert cli.call(command.main, [command.__name__, *map(str, arguments)], command.define_flags) == 0


def test_it_is_the_run_in_a_folder(local, remote):
    assert lines_of(remote) == lines_of(local) and [line["step"] for line in lines_of(remote)] == [1, 2, 3, 4]
    assert Checkpoints(remote, read_only=True).steps() == Checkpoints(local, read_only=True).steps() == [2, 4]
    for step in (2, 4):
        assert arrays_of(remote, step) == arrays_of(local, step)
    configs = [config_lib.flatten(config_lib.read(workdir)) for workdir in (local, remote)]
    assert {name for name in configs[0] if configs[0][name] != configs[1][name]} == {"eval.every", "data.path"}
    assert len(read_starts(remote)) == 1
    assert [place.name for place in (remote / "profile").rglob("*.xplane.pb")], "the trace was uploaded"


def test_pictures_and_curves_reach_tensorboard(remote):
    from tensorboardX.proto.event_pb2 import Event

    pieces = sorted((remote / "tensorboard").iterdir())
    events = [Event.FromString(record) for piece in pieces for record in records(piece.read_bytes())]
    values = [(event.step, value) for event in events for value in event.summary.value]
    drawn = {value.tag for step, value in values if value.HasField("image") and step == 4}
    assert drawn == {"eval/idea", "eval/modes", "eval/actions"}
    losses = [value.simple_value for _, value in values if value.tag == "loss"]
    assert losses == [np.float32(line["loss"]) for line in lines_of(remote)]


def test_it_is_evaluated_and_reported_in_the_bucket(remote, tmp_path):
    metrics = remote / "eval" / "4" / "metrics.json"
    in_training = json.loads(metrics.read_text())
    metrics.unlink()
    call(evaluate, f"--workdir={remote}")
    found = json.loads(metrics.read_text())
    assert {name: value["mean"] for name, value in found.items() if name in in_training} == pytest.approx(
        {name: value["mean"] for name, value in in_training.items()}, rel=1e-3, abs=1e-5
    )
    page = (remote / "report.html").read_text()
    assert page.count("data:image/png") > 3
    call(report, remote, f"--output={tmp_path / 'report.html'}")
    assert (tmp_path / "report.html").read_text() == page


def test_it_is_sampled_from_and_exported(local, remote, bucket):
    place = files.as_place(bucket)
    call(sample_inputs, f"--workdir={remote}", "--windows=0:2", f"--output={place / 'in.npz'}")
    made = {}
    for workdir in (local, remote):
        output = place / f"{workdir.parent.name}.npz"
        call(sample, f"--workdir={workdir}", "--mode=policy", f"--inputs={place / 'in.npz'}", f"--output={output}")
        with np.load(output.open("rb")) as file:
            made[workdir] = file["action"]
    np.testing.assert_array_equal(made[remote], made[local])

    call(convert, "to-torch", f"--workdir={remote}", f"--output={place / 'model.safetensors'}")
    description = f"--official-config={place / 'model.json'}"
    call(convert, "from-torch", f"--input={place / 'model.safetensors'}", description, f"--workdir={place / 'back'}")
    call(sample, f"--workdir={place / 'back'}", "--mode=policy", f"--inputs={place / 'in.npz'}", f"--output={output}")
    with np.load(output.open("rb")) as file:
        np.testing.assert_array_equal(file["action"], made[remote])


def test_other_runs_start_and_branch_from_it(make_config, remote, local, bucket, tmp_path):
    config = make_config()
    config.branch_from, config.total_steps = f"{remote}@2", 3
    train(config, f"{bucket}/branch")
    branch = files.as_place(f"{bucket}/branch")
    assert lines_of(branch) == lines_of(local)[2:3]
    assert config_lib.read(branch).branch_from == f"{remote}@2"
    config = make_config()
    config.init_from, config.total_steps, config.optimizer.learning_rate = str(remote), 1, 0.0
    train(config, tmp_path / "finetuned")
    assert config_lib.read(tmp_path / "finetuned").init_from == f"{remote}@4"
    before, after = (
        Checkpoints(workdir, read_only=True).restore_arrays(step, item)
        for workdir, step, item in ((remote, 4, "ema_params"), (tmp_path / "finetuned", 1, "params"))
    )
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_closed_loop_and_its_film_are_written(bucket):
    folder = files.as_place(bucket) / "rollout" / "4"
    how = {"env": "pusht", "episodes": {"policy": []}}
    closed_loop.write_episodes(folder, {}, how)
    save_gif([Image.new("RGB", (8, 8), color) for color in ("red", "blue")], folder / "episodes.gif", [100, 100])
    with Image.open(io.BytesIO((folder / "episodes.gif").read_bytes())) as film:
        assert film.n_frames == 2
    closed_loop.write_episodes(folder, {}, how)
    assert sorted(file.name for file in folder.iterdir()) == ["episodes.json", "metrics.json"], "the film was of others"
    assert json.loads((folder / "episodes.json").read_text()) == how


def test_compiled_programs_are_kept_in_the_bucket(make_config, bucket):
    before = {name: getattr(jax.config, name) for name in CACHE}
    config = make_config()
    config.compilation_cache_dir = f"{bucket}/cache"
    try:
        use_compilation_cache(config)
        jax.jit(lambda x: 3 * x + bool(bucket))(jax.numpy.ones(7)).block_until_ready()
        assert [place.name for place in files.as_place(f"{bucket}/cache").iterdir()]
    finally:
        compilation_cache.reset_cache()
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_sweep_trains_in_the_bucket(make_config, local, bucket):
    def sweep(total_steps):
        config = make_config()
        config.total_steps = total_steps
        members = make_members(config, [{"seed": 0}, {"seed": 1}])
        return run_sweep(
            directory,
            groups(members),
            lambda m: describe_use(["sweep"], m.config, list(m.overrides)),
            lambda *_: {},
        )

    directory = files.as_place(f"{bucket}/sweep")
    for total_steps in (2, 4):
        assert sweep(total_steps) == []
        told = record_file.read(directory)
        assert {name: (one["status"], one["step"], one["saved"]) for name, one in told.items()} == dict.fromkeys(
            ("seed=0", "seed=1"), ("done", total_steps, total_steps)
        )
    assert "seed=1" in sweep_page.write(directory).read_text() and (directory / "sweep.html").is_file()
    found = lines_of(directory / "members" / "seed=0")
    for line, expected in zip(found, lines_of(local), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
