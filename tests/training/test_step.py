"""The step against torch's AdamW, schedules against their formulas, EMA and clipping against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uwm_jax.config import base
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.systems.base import Bucket, Losses, TreeInfo, share_equally
from uwm_jax.systems.uwm.tree import TREE
from uwm_jax.training import state as state_lib
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, make_assets
from uwm_jax.training.step import gradient_norms, make_eval_step, make_train_step


class Quadratic:
    """A system whose loss is a distance of the parameters to the batch's target, row by row."""

    tree = TreeInfo(gradient_groups=(("w", "weights"), ("", "rest")), mesh_rules=())

    def encode(self, frozen, batch, key=None):
        return batch

    def draws(self, key, rows):
        return {}

    def shares(self, batch, key):
        return {
            "action": share_equally(batch["action_mask"]),
            "next_obs": share_equally(jnp.ones_like(batch["action_mask"])),
        }

    def losses(self, params, encoded, draws, *, train=False):
        errors = {  # twice, since a batch of two rows is averaged
            "action": 2 * jnp.sum((params["w"][encoded["row"]] - encoded["w"]) ** 2, axis=1),
            "next_obs": jnp.broadcast_to(jnp.sum(jnp.cos(params["b"])), encoded["row"].shape),
        }
        late = (encoded["t"] > 50).astype(jnp.float32)
        return Losses(errors, {"action/late": Bucket((late * errors["action"]).sum(), late.sum())}, {})


START = {"w": np.array([[1.0, -2.0], [0.5, 3.0]], np.float32), "b": np.array([0.3, -0.7], np.float32)}
BATCH = {
    "w": jnp.asarray([[0.0, 1.0], [2.0, -1.0]]),
    "t": jnp.asarray([3, 90], jnp.int32),
    "action_mask": jnp.asarray([True, True]),
    "row": jnp.arange(2),
}


def make(accumulation_steps=1, **optimizer):
    config = base()
    config.accumulation_steps = accumulation_steps
    config.total_steps = 20
    config.loss.weights.next_obs = 0.5
    for name, value in optimizer.items():
        config.optimizer[name] = value
    transform = state_lib.make_optimizer(config)
    state = state_lib.create(config, jax.tree.map(jnp.asarray, START), transform)
    return jax.jit(make_train_step(config, Quadratic(), transform)), state


@pytest.mark.torch
def test_matches_torch_adamw_with_warmup_and_cosine():
    torch = pytest.importorskip("torch")
    settings = {"learning_rate": 0.05, "weight_decay": 0.1, "warmup_steps": 5, "schedule": "cosine", "clip_norm": 1.0}
    step, state = make(**settings)
    params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in START.items()}
    reference = torch.optim.AdamW(params.values(), lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    target = torch.tensor(np.asarray(BATCH["w"]))
    for i in range(20):
        state, metrics = step(state, None, BATCH)
        factor = i / 5 if i < 5 else 0.5 * (1 + np.cos(np.pi * (i - 5) / 15))
        reference.param_groups[0]["lr"] = 0.05 * factor
        reference.zero_grad()
        loss = ((params["w"] - target) ** 2).sum() + 0.5 * torch.cos(params["b"]).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        reference.step()
        np.testing.assert_allclose(metrics["loss"].value, loss.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"].value, norm.item(), rtol=1e-5)
        np.testing.assert_allclose(metrics["learning_rate"].value, 0.05 * factor, rtol=1e-5, atol=1e-9)
        for k in params:
            np.testing.assert_allclose(state.params[k], params[k].detach().numpy(), rtol=1e-5)
    assert int(state.step) == 20


@pytest.mark.torch
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_frozen_parameters_are_to_torch_as_if_they_needed_no_gradient(accumulation_steps):
    """The norm that is clipped, decay, moments and the average: of what is trained alone."""
    torch = pytest.importorskip("torch")
    settings = {"learning_rate": 0.05, "weight_decay": 0.1, "clip_norm": 1.0, "ema_decay": 0.9, "freeze": ("b",)}
    step, state = make(accumulation_steps, **settings)
    assert sorted(x.shape for x in jax.tree.leaves(state.opt_state)) == [(), (2, 2), (2, 2)], "no moments of b"
    w = torch.nn.Parameter(torch.tensor(START["w"]))
    reference = torch.optim.AdamW([w], lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for _ in range(10):
        state, metrics = step(state, None, BATCH)
        reference.zero_grad()
        ((w - torch.tensor(np.asarray(BATCH["w"]))) ** 2).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_([w], 1.0)
        reference.step()
        np.testing.assert_allclose(metrics["grad_norm"].value, norm.item(), rtol=1e-5)
        np.testing.assert_allclose(state.params["w"], w.detach().numpy(), rtol=1e-5)
    for tree in (state.params, state.ema_params):
        np.testing.assert_array_equal(tree["b"], START["b"])
    assert not np.array_equal(state.ema_params["w"], START["w"])


def test_a_run_with_frozen_parameters_continues_exactly(tmp_path):
    step, state = make(learning_rate=0.05, ema_decay=0.9, freeze=("b",))
    state, _ = step(state, None, BATCH)
    checkpoints = Checkpoints(tmp_path)
    window = WindowSpec.from_config(base().data.window)
    spec = DataSpec(window, {"wrist": (16, 16)}, {}, 4, 0, Normalizer({}))
    checkpoints.save(state, {}, None, make_assets(base(), spec))
    checkpoints.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    again, stored = checkpoints.restore_latest(like)
    checkpoints.close()
    assert stored.step == 1
    for _ in range(3):
        (state, expected), (again, found) = step(state, None, BATCH), step(again, None, BATCH)
        jax.tree.map(np.testing.assert_array_equal, (again, found), (state, expected))


def test_freezing_nothing_or_everything_is_refused():
    with pytest.raises(UserError, match=r"optimizer.freeze: 'obs/\*' matches none of the 2 arrays, such as b, w"):
        make(freeze=("obs/*",))
    with pytest.raises(UserError, match="matches all parameters: there is nothing to train"):
        make(freeze=("*",))
    config = base()
    assert state_lib.about_frozen(config, START) == ""
    config.optimizer.freeze = ("b",)
    told = state_lib.about_frozen(config, START)
    assert "1 arrays (2e-06 M of 6e-06 M parameters, 33.3%); trained: 4e-06 M parameters" in told


def test_schedules():
    config = base()
    config.total_steps = 100
    factor = lambda step: float(state_lib.schedule_factor(config, step))  # noqa: E731
    assert factor(0) == factor(99) == 1.0
    config.optimizer.warmup_steps = 10
    assert factor(0) == 0 and factor(5) == 0.5 and factor(10) == factor(99) == 1.0
    config.optimizer.schedule = "cosine"
    np.testing.assert_allclose([factor(10), factor(55), factor(100)], [1.0, 0.5, 0.0], atol=1e-7)
    config.optimizer.warmup_steps = 1000  # capped by total_steps
    np.testing.assert_allclose(factor(50), 0.5)


@pytest.mark.parametrize(("warmup", "decay"), [(10, 30), (0, 50), (70, 30), (90, 30), (1000, 30)])
def test_warm_up_stable_decay_is_the_schedule_that_optax_joins(warmup, decay):
    """The decay is optax's square root, run backwards; both parts are capped by 100 steps, the warm-up first."""
    config = base()
    config.total_steps, config.optimizer.schedule = 100, "wsd"
    config.optimizer.warmup_steps, config.optimizer.decay_steps = warmup, decay
    warmup = min(warmup, 100)
    start = max(100 - decay, warmup)
    root = optax.polynomial_schedule(1.0, 0.0, 0.5, max(100 - start, 1))
    joined = optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, warmup), optax.constant_schedule(1.0), lambda t: 1.0 - root(100 - start - t)],
        [warmup, start],
    )
    assert state_lib.decay_start(config) == start
    last = 100 if start < 100 else 99  # nothing is left to decay
    steps = range(last + 1)
    expected = [float(joined(step)) for step in steps]
    np.testing.assert_allclose([float(state_lib.schedule_factor(config, s)) for s in steps], expected, atol=1e-6)
    assert start == 100 or expected[100] == 0.0


def test_runs_of_other_lengths_agree_until_the_first_decays():
    """What lets a longer run go on from a shorter one's last checkpoint before its decay."""
    short = base()
    short.total_steps, short.optimizer.schedule = 60, "wsd"
    short.optimizer.warmup_steps, short.optimizer.decay_steps = 10, 20
    long = short.copy_and_resolve_references()
    long.total_steps = 100
    rates = [[float(state_lib.schedule_factor(c, step)) for step in range(60)] for c in (short, long)]
    start = state_lib.decay_start(short)
    assert rates[0][: start + 1] == rates[1][: start + 1] and rates[0][start + 1] < rates[1][start + 1]
    assert state_lib.decay_start(base()) is None


def test_more_steps_that_raise_a_cosines_rate_again_are_told():
    before = base()
    before.total_steps, before.optimizer.learning_rate, before.optimizer.schedule = 100, 3e-4, "cosine"
    config = before.copy_and_resolve_references()
    assert state_lib.change_of_rate(config, before, 90) == ""
    config.total_steps = 200
    last, following = (1.5e-4 * (1 + np.cos(np.pi * t)) for t in (89 / 100, 90 / 200))
    told = state_lib.change_of_rate(config, before, 90)
    assert "config.total_steps is 200, was 100" in told
    assert f"from {last:.2g} (the last step's) to {following:.2g}" in told
    assert "from 7.4e-08 (the last step's) to 0.00015" in state_lib.change_of_rate(config, before, 100)
    config.optimizer.schedule = before.optimizer.schedule = "constant"
    assert state_lib.change_of_rate(config, before, 90) == ""
    config.optimizer.warmup_steps = before.optimizer.warmup_steps = 1000  # capped by 100 steps, then by 200
    assert "from 0.0003 (the last step's) to 0.00015" in state_lib.change_of_rate(config, before, 100)


def test_another_schedule_that_changes_the_rate_is_told():
    before = base()
    before.total_steps, before.optimizer.learning_rate = 100, 1e-3
    config = before.copy_and_resolve_references()
    config.optimizer.schedule, config.optimizer.decay_steps = "wsd", 20
    assert state_lib.change_of_rate(config, before, 80) == ""
    told = state_lib.change_of_rate(config, before, 95)
    assert "config.optimizer.schedule is wsd, was constant, config.optimizer.decay_steps is 20, was 0" in told
    assert f"from 0.001 (the last step's) to {1e-3 * (1 - np.sqrt(0.75)):.2g}" in told and "total_steps" not in told
    before, config = config, config.copy_and_resolve_references()
    config.total_steps = 200
    assert state_lib.change_of_rate(config, before, 80) == ""
    told = state_lib.change_of_rate(config, before, 90)
    assert f"from {1e-3 * (1 - np.sqrt(9 / 20)):.2g} (the last step's) to 0.001" in told


def test_moving_average():
    step, state = make(learning_rate=0.1, ema_decay=0.9, ema_warmup="none")
    expected = jax.tree.map(np.asarray, state.params)
    for _ in range(5):
        state, _ = step(state, None, BATCH)
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * np.asarray(p), expected, state.params)
    for k in expected:
        np.testing.assert_allclose(state.ema_params[k], expected[k], rtol=1e-6)
        assert not np.allclose(state.ema_params[k], state.params[k])
    assert make()[1].ema_params is None


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_moving_average_with_warm_up(accumulation_steps):
    """In float64; twenty steps, of which the first seventeen lie below the decay of 0.7."""
    step, state = make(accumulation_steps, learning_rate=0.1, ema_decay=0.7, ema_warmup="ramp")
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    for t in range(20):
        state, _ = step(state, None, BATCH)
        decay = min(0.7, (1 + t) / (10 + t))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), expected, state.params)
    for k in expected:
        np.testing.assert_allclose(state.ema_params[k], expected[k], rtol=1e-6)


def test_hyper_parameters_are_arrays_of_one_compiled_step():
    step, state = make(learning_rate=0.1)
    first, _ = step(state, None, BATCH)
    hparams = state.hparams.replace(learning_rate=jnp.float32(0.2), weights={"action": 0.0, "next_obs": 1.0})
    hparams = jax.tree.map(jnp.float32, hparams).replace(seed=jnp.uint32(3), data_seed=jnp.uint32(4))
    second, metrics = step(state.replace(hparams=hparams), None, BATCH)
    assert step._cache_size() == 1, "another learning rate, weight or seed must not compile again"
    np.testing.assert_allclose(metrics["loss"].value, np.cos(START["b"]).sum(), rtol=1e-6)
    assert metrics["learning_rate"].value == np.float32(0.2)
    moved = np.abs(np.asarray(second.params["b"]) - START["b"]) / np.abs(np.asarray(first.params["b"]) - START["b"])
    np.testing.assert_allclose(moved, 2.0, rtol=1e-4)


class Drawn(Quadratic):
    """Its losses are the first numbers that the keys of data and of noise give."""

    def encode(self, frozen, batch, key=None):
        return {"row": batch["row"], "data": jax.random.normal(key)}

    def draws(self, key, rows):
        return {"noise": {"action": jnp.broadcast_to(jax.random.normal(key), rows.shape)}}

    def losses(self, params, encoded, draws, *, train=False):
        rows, zero = encoded["row"].shape, 0.0 * params["w"].sum()
        parts = {"action": draws["noise"]["action"] + zero, "next_obs": jnp.broadcast_to(encoded["data"], rows)}
        return Losses(parts, {}, {})


def test_data_and_member_draw_from_seeds_of_their_own():
    """With equal seeds both keys are the same; either seed alone changes its own draws only."""

    def drawn(seed, data_seed):
        config = base()
        config.seed, config.data.seed = seed, data_seed
        optimizer = state_lib.make_optimizer(config)
        state = state_lib.create(config, jax.tree.map(jnp.asarray, START), optimizer)
        _, metrics = jax.jit(make_train_step(config, Drawn(), optimizer))(state, None, BATCH)
        return float(metrics["loss/action"].sum), float(metrics["loss/next_obs"].sum)

    noise, data = drawn(5, -1)
    assert noise == data == pytest.approx(float(jax.random.normal(jax.random.fold_in(jax.random.key(5), 0))), rel=1e-6)
    assert drawn(5, 5) == (noise, data)
    assert drawn(6, 5)[1] == data != drawn(6, 5)[0] != noise
    assert drawn(5, 7)[0] == noise and drawn(5, 7)[1] not in (noise, data)


def test_eval_step_uses_the_average():
    _, state = make(ema_decay=0.9)
    state = state.replace(ema_params=jax.tree.map(jnp.zeros_like, state.params))
    metrics = make_eval_step(Quadratic())(state.eval_params, None, BATCH)
    np.testing.assert_allclose(metrics["loss/action"], 2 * jnp.sum(BATCH["w"] ** 2, axis=1))
    assert set(metrics) == {"loss/action", "loss/next_obs"}


def test_losses_are_ratios_and_gradient_norms_are_by_group():
    step, state = make()
    _, metrics = step(state, None, BATCH)
    distance = ((START["w"] - np.asarray(BATCH["w"])) ** 2).sum(axis=1) * 2
    np.testing.assert_allclose(jax.tree.leaves(metrics["loss/action"]), [distance.mean(), 1], rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(metrics["loss/action/late"]), [distance[1], 1], rtol=1e-6)
    assert {"grad_norm/weights", "grad_norm/rest"} < set(metrics)
    _, metrics = step(state, None, BATCH | {"action_mask": jnp.zeros(2, bool)})  # a part that no row trains
    np.testing.assert_array_equal(jax.tree.leaves(metrics["loss/action"]), [0, 0])
    grads = {
        "obs_encoder": {"conv": {"kernel": np.full(4, 1.0)}},
        "noise_pred_net": {
            "blocks": {
                k: {"kernel": np.full(1, v)} for k, v in (("adaln", 2.0), ("qkv", 3.0), ("proj", 4.0), ("fc1", 5.0))
            },
            "head": {"adaln": {"bias": np.full(1, 6.0)}, "linear": {"kernel": np.full(1, 7.0)}},
            "action_encoder": {"fc1": {"kernel": np.full(1, 8.0)}},
        },
    }
    norms = {
        k.removeprefix("grad_norm/"): float(v) ** 2 for k, v in gradient_norms(grads, TREE.gradient_groups).items()
    }
    expected = {"obs_encoder": 4, "adaln": 4 + 36, "attention": 9 + 16, "mlp": 25, "tokens": 49 + 64, "grad_norm": 207}
    assert norms == pytest.approx(expected, rel=1e-6)


def test_accumulation_changes_nothing():
    (whole, state), (parts, _) = make(learning_rate=0.1), make(accumulation_steps=2, learning_rate=0.1)
    one, expected = whole(state, None, BATCH)
    two, metrics = parts(state, None, BATCH)
    assert jax.tree.structure(metrics) == jax.tree.structure(expected)
    for name in expected:
        np.testing.assert_allclose(*map(jax.tree.leaves, (metrics[name], expected[name])), rtol=1e-6, err_msg=name)
    for k in START:
        np.testing.assert_allclose(two.params[k], one.params[k], rtol=1e-6)
