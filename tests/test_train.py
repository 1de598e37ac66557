"""The real training command in tiny form: what it leaves behind, how it continues, and how it fails."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from safetensors.numpy import save_file

from uwm_jax import config as config_lib
from uwm_jax.conversion.to_torch import to_torch
from uwm_jax.data.loader import Loader
from uwm_jax.errors import Preempted, UserError
from uwm_jax.evaluation.evaluator import Evaluator
from uwm_jax.parallel.watchdog import Watchdog
from uwm_jax.reporting import pictures
from uwm_jax.runs import records
from uwm_jax.synthetic import synthetic_system
from uwm_jax.train import train
from uwm_jax.training import pretrained
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step
from uwm_jax.training.goodput import CATEGORIES
from uwm_jax.training.inference import load_for_inference
from uwm_jax.training.metrics import NotFinite
from uwm_jax.training.provenance import read_starts
from uwm_jax.training.workdir import write_config


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """In place of the real ones, which take seconds to draw: tests/test_evaluate.py has those of a training run."""

    def draw(windows, spec, config, folder):
        assert {"current", "next_obs", "joint/action"} <= set(windows) and "denoise/next_obs" not in windows
        files = {name: folder / f"{name}.png" for name in ("modes", "actions")}
        for file in files.values():
            Image.new("RGB", (4, 4)).save(file)
        return files

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw", draw)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_tiny_config):
    """The workdir of a run of six steps, with its output beside it."""
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    config = make_tiny_config()
    config.eval.every = 3
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train(config, workdir)
    workdir.with_suffix(".out").write_text(output.getvalue())
    return workdir


@pytest.fixture
def finished_config(tiny_config):
    tiny_config.eval.every = 3
    return tiny_config


def evaluation_of(workdir, step):
    """A line of an evaluation has the held-out losses and the means of the evaluation's own file."""
    folder = workdir / "eval" / str(step)
    assert {"metrics.json", "modes.png", "actions.png"} <= {p.name for p in folder.iterdir()}
    means = {f"eval/{k}": v["mean"] for k, v in json.loads((folder / "metrics.json").read_text()).items()}
    assert {"eval/policy/action_mse", "eval/joint/psnr", "eval/control/shuffle_gap"} <= set(means)
    return {"eval/loss/action": None, "eval/loss/next_obs": None} | means


def test_what_a_run_leaves_behind(finished, finished_config):
    lines = metrics_of(finished)
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 6]  # the first; each second; evaluation each third
    expected = {"step", "loss", "loss/action", "loss/next_obs", "grad_norm", "learning_rate", "samples_per_second"}
    expected |= {"data_wait_fraction", "goodput"} | {f"time/{name}" for name in CATEGORIES}
    expected |= {f"grad_norm/{group}" for group in ("adaln", "attention", "mlp", "obs_encoder", "tokens")}
    for x in lines:
        evaluated = evaluation_of(finished, x["step"]) if x["step"] in (3, 6) else {}
        by_timestep = {k for k in x if re.fullmatch(r"loss/(action|next_obs)/t\d+-\d+", k)}
        assert set(x) - by_timestep == expected | set(evaluated) and by_timestep
        assert all(x[name] == value for name, value in evaluated.items() if value is not None)
        np.testing.assert_allclose(x["loss"], x["loss/action"] + x["loss/next_obs"], rtol=1e-6)
    # The outputs start at zero, so epsilon prediction starts at the variance of the noise.
    assert 1.5 < lines[0]["loss"] < 2.5
    assert config_lib.read(finished) == finished_config
    assert list((finished / "tensorboard").iterdir())
    (start,) = read_starts(finished)  # a call from Python
    assert start["command"] == ["python", *sys.orig_argv[1:]] and start["changed"] == {} and start["code_version"]
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [4, 6], "the newest two of three"
    items = {p.name for p in (finished / "checkpoints" / "6").iterdir() if p.is_dir()}
    assert items == {"params", "ema_params", "train_state", "data_iter", "assets", "codec"}
    output = finished.with_suffix(".out").read_text()
    assert "step 6/6" in output and "ETA" in output and "6 episodes" in output
    assert "noise_pred_net/blocks/adaln/kernel" in output and "MB/device" in output
    assert "wall time" in output and "checkpoint" in output


def test_the_checkpoint_describes_itself(finished):
    checkpoints = Checkpoints(finished, read_only=True)
    assets = checkpoints.assets(6)
    checkpoints.close()
    assert assets["config"]["model"]["depth"] == 2
    assert assets["data_spec"]["action_dim"] == 10 and assets["data_spec"]["cameras"] == {"wrist": [16, 16]}
    assert assets["dataset"]["format"] == "uwm_jax/chunks" and assets["code_version"]
    system, params, frozen, step = load_for_inference(finished)
    assert step == 6 and frozen["components"].shape == (1, 192, 4)
    assert system.spec.normalizer.entries["action"][0].shape == (10,)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    with pytest.raises(UserError, match=r"--step=3.*\[4, 6\]"):
        load_for_inference(finished, 3)


def assert_same_lines(lines, others):
    """Equal but for times."""
    assert [x["step"] for x in lines] == [x["step"] for x in others]
    for x, y in zip(lines, others, strict=True):
        assert set(x) == set(y)
        for name in set(x) - {"samples_per_second", "data_wait_fraction", "goodput"}:
            assert x[name] == y[name] or name.startswith("time/"), (x["step"], name)


def assert_same_run(workdir, other):
    """Equal lines but for times, and equal parameters, to the last bit."""
    assert_same_lines(metrics_of(workdir), metrics_of(other))
    params = [load_for_inference(d)[1] for d in (workdir, other)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_continuing_equals_never_having_stopped(finished, finished_config, tmp_path, capsys):
    """From the checkpoint of step 4 on, with more loader threads: the same losses to the last bit."""
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    shutil.rmtree(again / "checkpoints" / "6")
    finished_config.data.num_threads = 3
    train(finished_config, again)
    said = capsys.readouterr().out
    assert "continuing from step 4" in said and said.count("an evaluation gives no intervals and no verdict") == 1
    assert_same_run(finished, again)


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "method", "call"), [(Watchdog, "beat", 4), (Evaluator, "_shown_of", 2)])
def test_an_evaluation_is_left_when_the_run_is_told_to_end(
    finished, finished_config, tmp_path, monkeypatch, capsys, owner, method, call
):
    """SIGTERM in the evaluation of step 3, before its first batch of losses or in its first one of samples: no other
    batch is begun."""
    calls, original = [], getattr(owner, method)

    def terminate_at_last(self, *args):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, terminate_at_last)
        with pytest.raises(Preempted, match="step 3 is saved"):
            train(finished_config, workdir)
    assert len(calls) == call
    makes_up = f"the evaluation of step 3 is left out; python -m uwm_jax.evaluate --workdir={workdir} --step=3"
    assert makes_up in capsys.readouterr().out
    assert latest_step(workdir) == 3 and not (workdir / "eval").exists()
    expected = metrics_of(finished)
    expected[2] = {name: value for name, value in expected[2].items() if not name.startswith("eval/")}
    assert_same_lines(metrics_of(workdir), expected[:3])
    train(finished_config, workdir)
    assert_same_lines(metrics_of(workdir), expected)


def test_a_config_from_python_is_judged_like_a_file(tiny_config, tmp_path):
    tiny_config.data.crop = (32, 16)
    with pytest.raises(UserError, match=r"config\.data\.crop=\(32, 16\) is larger than config\.data\.resize"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_from_python_is_a_path_like_that_of_the_flag(tiny_config, tmp_path, monkeypatch):
    """A URL makes no folder called `gs:`, a home no folder called `~`; also of what reads and exports a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in ("s3://bucket/run", Path("s3://bucket/run")):
        for use in (lambda w: train(tiny_config, w), load_for_inference, lambda w: to_torch(w, "a.safetensors")):
            with pytest.raises(UserError, match=r"workdir=s3:/+bucket/run: s3:// is not supported"):
                use(place)
    with pytest.raises(UserError, match=r"--output=s3:/+bucket"):
        to_torch(tmp_path, Path("s3://bucket/a.safetensors"))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "home" / "run"))):
        load_for_inference("~/run")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_checkpoints_by_time_change_nothing_but_what_a_kill_costs(finished, finished_config, tmp_path, monkeypatch):
    """A save before every step, where the config asks for one after every second; killed before step 4 is told."""
    finished_config.checkpoint.every_minutes = 1e-9
    workdir = tmp_path / "run"

    def killed(*_):
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(records, "progress_line", lambda step, *rest: killed() if step == 4 else "")
        with pytest.raises(KeyError, match="killed"):
            train(finished_config, workdir)
    assert latest_step(workdir) == 3
    train(finished_config, workdir)
    assert_same_lines(metrics_of(workdir), metrics_of(finished))


@pytest.mark.slow
def test_a_damaged_record_costs_no_finished_step(finished, finished_config, tmp_path, monkeypatch, capsys):
    """Met in step 6, in the middle of a line's window and between two checkpoints."""
    load = Loader.load

    def damaged(self, batch, at, row, position):
        if position >= 5 * finished_config.batch_size:
            raise UserError("shard-00000: record 3 cannot be read")
        load(self, batch, at, row, position)

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "load", damaged)
        with pytest.raises(UserError, match="record 3"):
            train(finished_config, workdir)
    assert latest_step(workdir) == 5
    train(finished_config, workdir)
    assert "continuing from step 5" in capsys.readouterr().out
    assert_same_run(finished, workdir)


def test_a_finished_run_is_left_alone(finished, finished_config, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    finished_config.total_steps = 5
    train(finished_config, finished)
    assert "nothing to do" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before and config_lib.read(finished).total_steps == 6


def test_a_changed_config_is_refused_by_field(finished, finished_config):
    finished_config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match=r"config.optimizer.learning_rate is 0.5.*started with 0.001"):
        train(finished_config, finished)
    assert config_lib.read(finished).optimizer.learning_rate == 1e-3


def test_a_run_continues_as_its_checkpoint_says_and_not_as_config_json_does(
    finished, finished_config, tmp_path, capsys
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    finished_config.seed, finished_config.total_steps = 9, 8
    write_config(workdir, finished_config)  # as another start in this workdir might have
    with pytest.raises(UserError, match=r"config.seed is 9.*started with 0"):
        train(finished_config, workdir)
    finished_config.seed, finished_config.total_steps = 0, 6
    train(finished_config, workdir)
    told = capsys.readouterr()
    assert "nothing to do" in told.out and told.err.count("own fields are used: seed (9, there 0)") == 2


@pytest.mark.slow
def test_a_run_continues_where_its_dataset_has_moved(finished, finished_config, tiny_dataset, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    finished_config.data.path = str(shutil.copytree(tiny_dataset, tmp_path / "another name"))
    train(finished_config, workdir)
    assert "continuing from step 4" in capsys.readouterr().out
    assert_same_lines(metrics_of(workdir), metrics_of(finished))
    assert config_lib.read(workdir).data.path == finished_config.data.path


@pytest.mark.slow
def test_pretrained_image_weights_reach_a_fresh_state(tiny_config, tmp_path):
    from uwm_jax.torch_bridge.torchvision_resnet import load_imagenet_resnet
    from uwm_jax.training.state import create, make_optimizer, with_params

    tensors = {f"{k}.weight": v for k, v in resnet_tensors(np.random.default_rng(0)).items()}
    save_file(tensors, tmp_path / "resnet.safetensors")
    tiny_config.model.encoder.imagenet_weights = str(tmp_path / "resnet.safetensors")
    system, _ = synthetic_system(tiny_config, 10)
    state = create(tiny_config, jax.jit(system.init)(jax.random.key(0)), make_optimizer(tiny_config))
    loaded = with_params(state, pretrained.load(system, state.params))
    expected = load_imagenet_resnet(
        tiny_config.model.encoder.imagenet_weights, state.params["obs_encoder"]["img_encoder"]
    )
    for params in (loaded.params, loaded.ema_params):
        encoder = params["obs_encoder"]["img_encoder"]
        np.testing.assert_array_equal(encoder["conv1"]["kernel"], tensors["conv1.weight"].transpose(2, 3, 1, 0))
        jax.tree.map(np.testing.assert_array_equal, encoder, jax.tree.map(np.asarray, expected))
    assert not np.array_equal(
        state.params["obs_encoder"]["img_encoder"]["conv1"]["kernel"],
        loaded.params["obs_encoder"]["img_encoder"]["conv1"]["kernel"],
    )


def resnet_tensors(rng):
    """Convolutions of a ResNet of one stage and width 16, by their torchvision names."""
    shapes = {"conv1": (16, 3, 7, 7), "layer1.0.conv1": (16, 16, 3, 3), "layer1.0.conv2": (16, 16, 3, 3)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_not_finite_names_step_and_metric(tiny_config, tmp_path):
    tiny_config.optimizer.learning_rate = 1e30
    tiny_config.total_steps = 10
    tiny_config.log_every = 1
    with pytest.raises(NotFinite, match=r"step \d: (loss|grad_norm)"):
        train(tiny_config, tmp_path / "run")
    steps = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    for x in metrics_of(tmp_path / "run"):
        assert np.isfinite(x["loss"])
    assert all(s <= metrics_of(tmp_path / "run")[-1]["step"] for s in steps)


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_start(tiny_config, tmp_path):
    """All of them, those that compile in no time too; and a start has no more than this."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before, events = {name: getattr(jax.config, name) for name in names}, []
    listen = lambda name, **_: events.append(name.rsplit("/", 1)[-1])  # noqa: E731
    tiny_config.total_steps = tiny_config.log_every = 1
    tiny_config.compilation_cache_dir = str(tmp_path / "cache")
    jax.monitoring.register_event_listener(listen)
    try:
        for name in ("first", "second"):
            events.clear()
            train(tiny_config, tmp_path / name)
            programs = events.count("compile_requests_use_cache")
            assert 2 <= programs <= 4, events  # the state's, the step's, and what holds its layers apart
            assert events.count("cache_hits") == (programs if name == "second" else 0), events
    finally:
        jax.monitoring.unregister_event_listener(listen)
        compilation_cache.reset_cache()
        for field, value in before.items():
            jax.config.update(field, value)
    assert list((tmp_path / "cache").iterdir())


def test_batches_that_do_not_divide_and_missing_data(tiny_config, tmp_path):
    tiny_config.mesh.data = 3
    with pytest.raises(UserError, match=r"config.mesh.data=3.*does not fit the \d"):
        train(tiny_config, tmp_path / "run")
    tiny_config.mesh.data = -1
    tiny_config.data.path = str(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing"):
        train(tiny_config, tmp_path / "run")


def test_the_codec_must_fit_the_crop(tiny_config, tmp_path):
    tiny_config.data.crop = tiny_config.data.resize = (24, 24)
    with pytest.raises(UserError, match=r"pca.npz was fitted on 16x16 images.*\(24, 24\)"):
        train(tiny_config, tmp_path / "run")


@pytest.mark.slow
def test_the_command_needs_neither_tensorflow_nor_torch(tiny_config, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "import json\nfrom uwm_jax import config\n"
        f"def get_config():\n    return config.from_json({config_lib.to_json(tiny_config)!r}, 'test')\n"
    )
    program = (
        "import sys, runpy\n"
        "sys.modules['tensorflow'] = sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "sys.argv = ['train', *sys.argv[1:]]\n"
        "runpy.run_module('uwm_jax.train', run_name='__main__')\n"
    )
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.total_steps=2"]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    assert "done: 2 steps" in result.stdout
    assert [x["step"] for x in metrics_of(tmp_path / "run")] == [1, 2]
    (start,) = read_starts(tmp_path / "run")
    assert start["command"] == ["python", "-m", "uwm_jax.train", *arguments]
    assert start["changed"] == {"total_steps": 2}
