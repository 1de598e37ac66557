"""The noise-prediction network against published numbers, and its options against each other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.models import layers
from uwm_jax.systems.uwm.dit import DiT

FEATURES, STEPS = 20, 16  # width of the observation features and of the timestep embedding
WIDTH, HEADS, DEPTH, ACTION_DIM, PATCH_VALUES = 24, 3, 2, 3, 2 * 4 * 4 * 4


def u(n: int, k: int) -> np.ndarray:
    """The k-th deterministic sequence in [-0.5, 0.5), float64, to which the expected numbers belong."""
    x = 43758.5453 * np.sin(12.9898 * np.arange(1, n + 1, dtype=np.float64) + 78.233 * (k + 1))
    return x - np.floor(x) - 0.5


def filled(shape: tuple[int, ...], k: int, scale: float) -> np.ndarray:
    return (scale * u(int(np.prod(shape)), k)).astype(np.float32).reshape(shape)


def tiny(**fields) -> DiT:
    defaults = {
        "action_dim": ACTION_DIM,
        "action_len": 4,
        "latent_shape": (2, 2, 8, 8, 4),
        "patch": (2, 4, 4),
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_registers": 2,
        "timestep_embed_dim": STEPS,
    }
    return DiT(**{**defaults, **fields})


@functools.cache
def compiled(net: DiT, method: str = "__call__"):
    return jax.jit(functools.partial(net.apply, method=method))


def reference_params() -> dict:
    """Formula weights in torch's layout and registration order, laid out as ours."""
    counter = iter(range(10_000))

    def take(*shape: int) -> np.ndarray:
        return filled(shape, next(counter), 0.2)

    def linear(outputs: int, inputs: int) -> dict:
        return {"kernel": take(outputs, inputs).T, "bias": take(outputs)}

    def mlp(inputs: int, hidden: int, outputs: int) -> dict:
        return {"fc1": linear(hidden, inputs), "fc2": linear(outputs, hidden)}

    def split(dense: dict, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict:
        return {
            "kernel": dense["kernel"].reshape(*inputs, *outputs),
            "bias": dense["bias"].reshape(outputs),
        }

    d, hidden, cond, head = WIDTH, 4 * WIDTH, FEATURES + STEPS, WIDTH // HEADS
    params = {"registers": take(1, 2, d), "pos_embed": take(1, 14, d)}
    weight = take(d, 4, 2, 4, 4)  # (out, channel, frame, row, column)
    params["patch_encoder"] = {"kernel": weight.transpose(2, 3, 4, 1, 0).reshape(-1, d), "bias": take(d)}
    weight = take(PATCH_VALUES, d).reshape(4, 2, 4, 4, d)  # (channel, frame, row, column, in)
    bias = take(PATCH_VALUES).reshape(4, 2, 4, 4)
    params["patch_decoder"] = {
        "kernel": weight.transpose(4, 1, 2, 3, 0).reshape(d, -1),
        "bias": bias.transpose(1, 2, 3, 0).reshape(-1),
    }
    params["action_encoder"] = mlp(ACTION_DIM, hidden, d)
    params["action_decoder"] = mlp(d, hidden, ACTION_DIM)
    params["timestep_embedding"] = mlp(2 * STEPS, 4 * STEPS, STEPS)
    blocks = []
    for _ in range(DEPTH):
        qkv = split(linear(3 * d, d), (d,), (3, HEADS, head))
        proj = split(linear(d, d), (HEADS, head), (d,))
        fc1, fc2 = linear(hidden, d), linear(d, hidden)
        adaln = split(linear(6 * d, cond), (cond,), (6, d))
        blocks.append({"qkv": qkv, "proj": proj, "fc1": fc1, "fc2": fc2, "adaln": adaln})
    params["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    params["head"] = {
        "linear": linear(d, d),
        "adaln": split(linear(2 * d, cond), (cond,), (2, d)),
    }
    assert next(counter) == 42
    return params


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.tree.map(jnp.asarray, reference_params())


@pytest.fixture(scope="module")
def inputs() -> tuple:
    latent = filled((2, 2, 4, 2, 8, 8), 1002, 2.0).transpose(0, 1, 3, 4, 5, 2)  # channels last
    noisy = {"action": jnp.asarray(filled((2, 4, 3), 1001, 2.0)), "next_obs": jnp.asarray(latent)}
    timestep = {"action": jnp.array([7, 90]), "next_obs": jnp.array([0, 41])}
    return jnp.asarray(filled((2, FEATURES), 1000, 2.0)), noisy, timestep


@pytest.fixture(scope="module")
def expected(params, inputs) -> dict:
    pred, _ = compiled(tiny())({"params": params}, *inputs)
    return pred


def relative(actual, wanted) -> float:
    """Largest difference of any leaf, relative to that leaf's largest value."""
    errors = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), actual, wanted)
    return max(jax.tree.leaves(errors))


def test_formula():
    np.testing.assert_allclose(u(5, 0), [0.24008482, 0.06439513, -0.04525074, -0.22759926, 0.32344871], atol=1e-8)
    np.testing.assert_allclose(u(3, 7), [0.47321649, -0.29698814, -0.26779176], atol=1e-8)


def test_published_predictions(expected):
    assert all(p.dtype == jnp.float32 for p in expected.values())
    action = np.asarray(expected["action"])
    assert action.shape == (2, 4, 3)
    np.testing.assert_allclose([action.mean(), action.std()], [0.0440302, 0.0374948], atol=2e-6)
    np.testing.assert_allclose(action.ravel()[:5], [-0.025695, 0.040555, 0.056299, 0.000508, 0.055101], atol=2e-6)
    np.testing.assert_allclose(action.ravel()[-3:], [0.02781, 0.111135, 0.068326], atol=2e-6)
    assert expected["next_obs"].shape == (2, 2, 2, 8, 8, 4)
    video = np.asarray(expected["next_obs"]).transpose(0, 1, 5, 2, 3, 4)  # the published axis order
    np.testing.assert_allclose([video.mean(), video.std()], [0.0053571, 0.1018134], atol=2e-6)
    np.testing.assert_allclose(np.abs(video).sum(dtype=np.float64), 166.03311, rtol=1e-5)
    np.testing.assert_allclose(video.ravel()[:5], [0.023993, -0.157659, -0.115261, 0.111975, -0.022373], atol=2e-6)
    np.testing.assert_allclose(video.ravel()[-3:], [-0.111461, -0.066371, -0.017681], atol=2e-6)


def loss_and_grads(net, params, inputs):
    """((loss, predictions), gradients by parameters, features and noisy inputs)."""

    def loss(params, cond, noisy):
        pred, _ = net.apply({"params": params}, cond, noisy, inputs[2])
        return sum(jnp.mean((p - 0.3) ** 2) for p in pred.values()), pred

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(params, inputs[0], inputs[1])


@pytest.fixture(scope="module")
def plain(params, inputs):
    return loss_and_grads(tiny(), params, inputs)


@pytest.mark.parametrize(
    "form, remat",
    [
        *(("stacked", remat) for remat in ("none", "dots", "full")),
        *(("apart", remat) for remat in ("none", "dots", "full")),
        *(("scanned", remat) for remat in ("dots", "full")),
    ],
)
@pytest.mark.slow
def test_the_form_of_the_layers_and_remat_change_nothing(params, inputs, plain, form, remat):
    held = held_apart(params) if form == "apart" else params
    value, (grads, *rest) = loss_and_grads(tiny(scan_blocks=form == "scanned", remat=remat), held, inputs)
    assert layers.are_apart(grads) == (form == "apart")
    assert relative((value, (layers.stacked(grads), *rest)), plain) < 1e-6


def held_apart(params):
    return layers.apart(jax.tree.map(jnp.array, params))


@pytest.mark.parametrize("form", ["stacked", "apart"])
def test_unrolled_prediction_without_gradient(params, inputs, expected, form):
    params = held_apart(params) if form == "apart" else params
    pred, seen = compiled(tiny(scan_blocks=False))({"params": params}, *inputs)
    assert relative(pred, expected) < 1e-6
    _, scanned = compiled(tiny())({"params": layers.stacked(params)}, *inputs)
    assert relative(seen, scanned) < 1e-6
    assert seen["tokens"].shape == seen["final"].shape == (2, 14, WIDTH)
    assert seen["hidden"].shape == (DEPTH, 2, 14, WIDTH)


def test_remat_saves_less():
    net = tiny(depth=4)
    saved = {}
    for remat in ("none", "dots", "full"):
        policy = net.clone(remat=remat)
        noisy = {"action": jnp.ones((1, 4, 3)), "next_obs": jnp.ones((1, 2, 2, 8, 8, 4))}
        steps = {"action": jnp.zeros(1, int), "next_obs": jnp.zeros(1, int)}
        cond = jnp.ones((1, FEATURES))
        params = jax.eval_shape(policy.init, jax.random.key(0), cond, noisy, steps)["params"]

        def backward(params, policy=policy, cond=cond, noisy=noisy, steps=steps):
            run = lambda p: policy.apply({"params": p}, cond, noisy, steps)[0]["next_obs"]  # noqa: E731
            return jax.vjp(run, params)[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, params))
        saved[remat] = sum(r.size for r in residuals)
    assert saved["full"] < saved["dots"] < saved["none"]


@pytest.mark.parametrize("form", ["scanned", "stacked", "apart"])
def test_precomputed_modulation(params, inputs, form):
    """A sampler's steps: the same timestep for the whole batch, all modulations made before."""
    cond, noisy, _ = inputs
    net = tiny(scan_blocks=form == "scanned")
    steps = {"action": jnp.array([90, 0, 30]), "next_obs": jnp.array([90, 41, 0])}
    held = held_apart(params) if form == "apart" else params
    modulation = compiled(net, "modulation")({"params": held}, cond, steps)
    assert modulation["blocks"].shape == (3, DEPTH, 2, 6, WIDTH) and modulation["head"].shape == (3, 2, 2, WIDTH)
    for s in range(3):
        rows = jax.tree.map(lambda t, s=s: jnp.full(2, t[s]), steps)
        wanted = compiled(tiny())({"params": params}, cond, noisy, rows)
        now = jax.tree.map(lambda m, s=s: m[s], modulation)
        assert relative(compiled(net, "predict")({"params": held}, noisy, now), wanted) < 2e-6


def test_timesteps_and_condition_matter_per_row(params, inputs, expected):
    cond, noisy, timestep = inputs
    for key in ("action", "next_obs"):
        changed = {**timestep, key: timestep[key].at[1].add(5)}
        pred, _ = compiled(tiny())({"params": params}, cond, noisy, changed)
        for name, value in pred.items():
            np.testing.assert_allclose(value[0], expected[name][0], atol=1e-6)
            assert float(jnp.abs(value[1] - expected[name][1]).max()) > 1e-4


def test_bfloat16_stays_close_and_ends_in_float32(params, inputs, plain):
    (_, pred), grads = loss_and_grads(tiny(dtype=jnp.bfloat16, remat="dots"), params, inputs)
    (_, wanted), wanted_grads = plain
    assert {leaf.dtype for leaf in jax.tree.leaves((pred, grads))} == {jnp.dtype("float32")}
    assert relative(pred, wanted) < 2e-2
    flat, flat_wanted = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(t)]) for t in (grads, wanted_grads))
    assert 0 < np.linalg.norm(flat - flat_wanted) < 2e-2 * np.linalg.norm(flat_wanted)


def test_bfloat16_precomputed_modulation(params, inputs, expected):
    net, steps = tiny(dtype=jnp.bfloat16), {"action": jnp.array([7]), "next_obs": jnp.array([0])}
    modulation = compiled(net, "modulation")({"params": params}, inputs[0], steps)
    now = jax.tree.map(lambda m: m[0], modulation)
    pred, seen = compiled(net, "predict")({"params": params}, inputs[1], now)
    kept = {m.dtype for m in jax.tree.leaves((modulation, pred, seen["hidden"]))}
    assert kept == {jnp.dtype("float32")}
    for name, value in pred.items():  # the first row's timesteps are 7 and 0
        assert relative(value[0], expected[name][0]) < 2e-2


def test_initialisation(inputs):
    net = tiny(embed_dim=48, depth=3)
    variables = jax.jit(net.init)(jax.random.key(0), *inputs)
    pred, _ = compiled(net)(variables, *inputs)
    assert all((np.asarray(p) == 0).all() for p in pred.values())
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables["params"])[0]:
        name, leaf = "/".join(key.key for key in path), np.asarray(leaf)
        assert leaf.dtype == np.float32
        if name.endswith("bias") or "adaln" in name or name.startswith("head/linear"):
            assert (leaf == 0).all(), name
        else:
            margin = 5 / np.sqrt(leaf.size)  # five standard errors
            assert abs(leaf.mean()) < margin * 0.02 and abs(leaf.std() / 0.02 - 1) < margin, name
    kernels = np.asarray(variables["params"]["blocks"]["fc1"]["kernel"])
    assert kernels.shape == (3, 48, 192) and abs(np.corrcoef(kernels.reshape(3, -1))[0, 1]) < 0.05


def test_tree_is_independent_of_scan(inputs):
    first, second = (jax.eval_shape(tiny(scan_blocks=scan).init, jax.random.key(1), *inputs) for scan in (True, False))
    assert first == second


def test_without_registers_and_qkv_bias(inputs):
    net = tiny(num_registers=0, qkv_bias=False)
    variables = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    assert "registers" not in variables["params"] and "bias" not in variables["params"]["blocks"]["qkv"]
    pred, seen = jax.eval_shape(net.apply, variables, *inputs)
    assert seen["tokens"].shape == (2, 12, WIDTH) and pred["next_obs"].shape == (2, 2, 2, 8, 8, 4)


@pytest.mark.parametrize("adaln, millions", [("official", 384.92), ("shared", 125.39), ("low_rank", 109.27)])
def test_full_width_size(adaln, millions):
    """The paper's DROID network has 384.92 M parameters."""
    net = DiT(action_dim=10, action_len=16, latent_shape=(3, 2, 28, 28, 4), adaln=adaln, adaln_rank=64)
    noisy = {"action": jnp.zeros((1, 16, 10)), "next_obs": jnp.zeros((1, 3, 2, 28, 28, 4))}
    steps = {"action": jnp.zeros(1, int), "next_obs": jnp.zeros(1, int)}
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4608), jnp.float32), noisy, steps)
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6, 2) == millions
    assert net.num_tokens == 171


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"patch": (2, 3, 4)}, "patch"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"timestep_embed_dim": 7}, "timestep_embed_dim"),
        ({"remat": "some"}, "none, dots, full"),
        ({"action_len": 5}, "noisy action"),
    ],
)
def test_unusable_fields_are_named(inputs, fields, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(tiny(**fields).init, jax.random.key(0), *inputs)
