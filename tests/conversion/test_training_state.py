"""The optimizer of an official run comes along: our steps after it are torch's, and the trainer continues it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from tests.conversion.official_run import OfficialRun, gradients
from tests.golden import reference
from uwm_jax import cli, convert, systems
from uwm_jax import config as config_lib
from uwm_jax.systems.base import System
from uwm_jax.torch_bridge import layout
from uwm_jax.train import train
from uwm_jax.training import inference
from uwm_jax.training import state as state_lib
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.state import TrainState
from uwm_jax.training.step import divide, finish

pytestmark = pytest.mark.torch

LIBERO, FLOW = "uwm_libero_small", "dp_flow_small"


def command(*arguments: str) -> int:
    """Runs the command in this process; returns its exit status."""
    return cli.call(convert.main, ["convert", *arguments], convert.define_flags)


def line(pt: Path, workdir: Path, *more: str, optimizer: bool = True, official: Path | None = None) -> list[str]:
    official = official or reference.official_yaml(LIBERO)
    given = f"--input={pt}", f"--official-config={official}", f"--workdir={workdir}", "--no_normalizer"
    return ["from-torch", *(["--optimizer"] if optimizer else []), *given, *more]


def restored(workdir: Path, step: int) -> tuple[System, TrainState]:
    """The system of a workdir, and the training state of a checkpoint as the trainer restores it."""
    system = inference.load_for_inference(workdir, step)[0]
    shapes = jax.eval_shape(lambda: fresh(system, system.init(jax.random.key(0))))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return system, Checkpoints(workdir, read_only=True).restore_state(step, like)[0]


def fresh(system: System, params: Any) -> TrainState:
    return state_lib.create(system.config, params, state_lib.make_optimizer(system.config), system.tree.untrained)


def five_steps(system: System, state: TrainState, run: OfficialRun) -> None:
    """Updates with equal gradients on both sides, up to the fifth; the weights agree after each."""
    entry_of = systems.official(system.config.system).entry_of(system.config)
    trained, _ = divide(system.config, system, state.params)
    optimizer = state_lib.make_optimizer(system.config)

    @jax.jit
    def updated(state: TrainState, grads: Any) -> TrainState:
        return finish(system.config, system, optimizer, state, jnp.zeros(()), ({}, {}), grads, {})[0]

    for step in range(run.finished, 5):
        official = gradients(run.trained, run.shapes, step)
        grads = jax.tree.map(jnp.asarray, layout.from_official(official, trained, entry_of, "gradients"))
        state = updated(state, grads)
        run.steps(1)
        found, wanted = layout.to_official(state.params, entry_of), run.weights()
        assert found.keys() == set(run.trained)
        for name, value in found.items():
            np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-6, err_msg=f"{name}, step {step}")


@pytest.mark.slow
def test_five_steps_of_torch_and_of_ours(tmp_path: Path) -> None:
    """Three of torch's, then two of each from a converted checkpoint; and five of each from the same weights."""
    run = OfficialRun(LIBERO)
    run.steps(3)
    assert command(*line(run.save(tmp_path / "models.pt"), tmp_path / "run")) == 0
    system, state = restored(tmp_path / "run", 3)
    assert (int(state.step), int(state.opt_state[0].count)) == (3, 3)
    o = system.config.optimizer
    assert (o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay) == (1e-3, 0.9, 0.99, 1e-8, 0.1)
    five_steps(system, state, run)

    run.restart()
    entry_of = systems.official(system.config.system).entry_of(system.config)
    weights = {name: value.copy() for name, value in run.weights().items() if name in run.trained}
    params = jax.tree.map(jnp.asarray, layout.from_official(weights, state.params, entry_of, "weights"))
    five_steps(system, fresh(system, params), run)


def read(workdir: Path, step: int, item: str) -> Any:
    return Checkpoints(workdir, read_only=True).restore_arrays(step, item)


@pytest.mark.slow
def test_the_trainer_continues_it(tmp_path: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Schedule and clipping are the official configuration's; data and batch are those of flags."""
    run = OfficialRun(FLOW)
    run.steps(3)
    pt, official, workdir = run.save(tmp_path / "models.pt"), tmp_path / "config.yaml", tmp_path / "run"
    text = reference.official_yaml(FLOW).read_text()
    for ours, theirs in (("exterior", "agentview_rgb"), ("wrist", "eye_in_hand_rgb")):
        text = text.replace(theirs, ours)
    more = {"num_steps": 5, "clip_grad_norm": 10.0, "scheduler": {"name": "cosine", "num_warmup_steps": 2}}
    official.write_text(text + yaml.safe_dump(more))
    fields = {"data.path": tiny_dataset, "batch_size": 2, "data.num_streams": 8, "data.num_threads": 1}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    assert command(*line(pt, workdir, *overrides, official=official)) == 0
    said = capsys.readouterr().err
    assert "goes on after 3 steps, with the moments of AdamW after 3 updates" in said
    # torch's rate was constant; half a cosine from step 2 to 5 is at 3/4 after a third of the way
    assert "the learning rate goes from 0.001 (the official run's next step) to 0.00075" in said
    before = read(workdir, 3, "train_state")

    config = config_lib.read(workdir)
    o = config.optimizer
    assert (config.total_steps, o.schedule, o.warmup_steps, o.clip_norm) == (5, "cosine", 2, 10.0)
    train(config, workdir)
    assert "continuing from step 3" in capsys.readouterr().out
    checkpoints = Checkpoints(workdir, read_only=True)
    assert checkpoints.steps() == [3, 5]
    after = read(workdir, 5, "train_state")
    assert int(after["opt_state"][1]["count"]) == int(after["step"]) == 5
    for old, new in zip(*(jax.tree.leaves(x["opt_state"][1]["nu"]) for x in (before, after)), strict=True):
        assert (new >= 0.99**2 * old * (1 - 1e-5)).all()  # squares only add to what decays
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 5 and last["learning_rate"] == pytest.approx(0.00025)
    assets = checkpoints.assets(5)
    assert assets["learned_from"] is None and "may be among those it learned from" in assets["leak"]
    assert assets["converted_from"]["weights"] == "models.pt"


ENCODER = "obs_encoder."


@pytest.fixture(scope="module")
def frozen_encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[OfficialRun, Path]:
    """Two steps that did not train the image encoder."""
    run = OfficialRun(FLOW, without_gradient=(ENCODER,))
    run.steps(2)
    return run, run.save(tmp_path_factory.mktemp("frozen") / "models.pt")


def refused(pt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The message of a conversion that makes nothing."""
    assert command(*line(pt, tmp_path / "run", *more, official=reference.official_yaml(FLOW))) == 2
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_what_the_official_run_did_not_train_is_named(
    frozen_encoder: tuple[OfficialRun, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, pt = frozen_encoder
    missing = [name for name in run.parameters if name.startswith(ENCODER)]
    said = refused(pt, tmp_path, capsys)
    assert f"moments unlike the parameters that are trained ({2 * len(missing)})" in said
    assert all(f"{part}: missing tensor {name} (" in said for name in missing for part in ("exp_avg", "exp_avg_sq"))
    assert "--config.optimizer.freeze" in said

    said = refused(pt, tmp_path, capsys, "--config.optimizer.freeze=*/nothing/*")
    assert "config.optimizer.freeze: '*/nothing/*' matches none" in said
    said = refused(pt, tmp_path, capsys, "--config.optimizer.freeze=obs_encoder/*,noise_pred_net/pos_embed")
    assert "exp_avg: extra tensor noise_pred_net.pos_embed" in said and "missing" not in said

    more = "--config.optimizer.freeze=obs_encoder/*", "--config.total_steps=9"
    assert command(*line(pt, tmp_path / "run", *more, official=reference.official_yaml(FLOW))) == 0
    state = read(tmp_path / "run", 2, "train_state")
    entry_of = systems.official("dp").entry_of(config_lib.read(tmp_path / "run"))
    found = layout.to_official(state["opt_state"][0]["mu"], entry_of)
    assert found.keys() == set(run.trained)
    index = list(run.parameters).index(run.trained[-1])
    expected = run.optimizer.state_dict()["state"][index]["exp_avg"].numpy()
    assert found[run.trained[-1]].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--config.model.depth=3", "--config.model.depth: the official checkpoint decides this field (2)"),
        ("--config.optimizer.learning_rate=1", "--config.optimizer.learning_rate: the official checkpoint decides"),
        ("--config.data.crop=(40, 40)", "--config.data.crop: the official checkpoint decides"),
        ("--config.total_steps=2", "config.total_steps=2: the official run has made 2 steps, so that none is left"),
        ("--weights=ema", "its moments belong to the trained weights: leave out --weights=ema"),
    ],
)
def test_flags_that_do_not_fit(
    frozen_encoder: tuple[OfficialRun, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: str,
    message: str,
) -> None:
    assert message in refused(frozen_encoder[1], tmp_path, capsys, more)


def test_files_without_an_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = OfficialRun(FLOW)
    for changed, message in (
        ({"optimizer": None}, "found none"),
        ({}, "holds no moments: no step was made with it"),
        ({"optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}, "param_groups[0]['params'] should be 0 to"),
    ):
        assert message in refused(run.save(tmp_path / "models.pt", **changed), tmp_path, capsys)
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "weights.safetensors")
    assert "holds tensors alone" in refused(tmp_path / "weights.safetensors", tmp_path, capsys)


def test_a_schedule_that_ours_does_not_have(
    frozen_encoder: tuple[OfficialRun, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = reference.official_yaml(FLOW).read_text()
    for more, message in (
        ({"scheduler": {"name": "polynomial"}}, "scheduler.name is 'polynomial'; only constant, constant_with_warmup"),
        ({"num_steps": 9, "scheduler": {"name": "cosine", "num_training_steps": 8}}, "is 8, but num_steps is 9"),
        ({"clip_grad_norm": "much"}, "clip_grad_norm should be a finite number"),
    ):
        (tmp_path / "config.yaml").write_text(text + yaml.safe_dump(more))
        assert command(*line(frozen_encoder[1], tmp_path / "run", official=tmp_path / "config.yaml")) == 2
        assert message in capsys.readouterr().err
