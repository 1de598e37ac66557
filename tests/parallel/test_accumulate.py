from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.models.target import tracing_for
from uwm_jax.parallel import collectives
from uwm_jax.parallel.accumulate import each_value_and_grad, value_and_grad

ROOT = Path(__file__).parents[2]
SPANS = ("t0-24", "t25-49", "t50-74", "t75-99")
MESHES = ("data 8", "data 8, accumulated", "fsdp 8", "2x2x2, accumulated", "data 2, tensor 4")


def loss(params, rows):
    """A sum over rows, each with its own random numbers, and sums beside it."""
    noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(jax.random.key(0), row), (3,)))(rows["row"])
    hidden = jnp.tanh((rows["x"] + noise) @ params["w"]) + params["b"]
    return (hidden**2).sum(), {"count": jnp.ones_like(rows["row"]).sum(), "columns": hidden.sum(axis=0)}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=4).astype(np.float32)}
    batch = {"x": rng.normal(size=(12, 3)).astype(np.float32), "row": np.arange(100, 112)}
    return jax.tree.map(jnp.asarray, (params, batch))


@pytest.mark.parametrize("steps", [2, 3, 12])
def test_parts_add_up_to_the_whole(problem, steps):
    params, batch = problem
    expected = jax.value_and_grad(loss, has_aux=True)(params, batch)
    found = jax.jit(lambda p, b: value_and_grad(loss, p, b, mesh=None, steps=steps))(params, batch)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_one_part_is_the_plain_gradient(problem):
    plain = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(*problem)
    ours = jax.make_jaxpr(lambda p, b: value_and_grad(loss, p, b, mesh=None, steps=1))(*problem)
    assert str(ours) == str(plain)


def test_activations_of_one_part_live_at_a_time(problem):
    params, batch = problem
    seen = []

    def spy(params, rows):
        seen.append(rows["x"].shape)
        return loss(params, rows)

    jax.jit(lambda p, b: value_and_grad(spy, p, b, mesh=None, steps=4))(params, batch)
    assert set(seen) == {(3, 3)}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("at_once", [1, 2, 0])
def test_members_are_as_alone_in_the_forms_of_all_platforms(problem, platform, at_once):
    """CPUs get one body after another, accelerators a loop, which a CPU runs too. Two of five leave one over."""
    params, batch = problem
    scales = jnp.arange(1.0, 6.0)
    members = jax.tree.map(lambda x: x * scales.reshape(-1, *[1] * x.ndim), params)

    def of_member(params, scale, rows):
        value, sums = loss(params, rows)
        return value * scale, sums

    with tracing_for(platform, 1):
        each = jax.jit(lambda p, s, b: each_value_and_grad(of_member, p, s, b, mesh=None, steps=3, at_once=at_once))
        found = each(members, scales, batch)
    for i in range(5):
        alone = jax.value_and_grad(lambda p, i=i: of_member(p, scales[i], batch), has_aux=True)
        expected = alone(jax.tree.map(lambda x, i=i: x[i], members))
        one = jax.tree.map(lambda x, i=i: x[i], found)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), one, expected)


# --- the real step on eight simulated devices ------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of `eight_devices.py`, by variant."""
    output = tmp_path_factory.mktemp("meshes") / "runs.json"
    command = [sys.executable, "-m", "tests.parallel.eight_devices", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_meshes_agree_with_one_device(runs, name):
    one, many = (by_name(runs[n]["metrics"]) for n in ("one", name))
    assert many.keys() == one.keys() >= {"grad_norm", "grad_norm/adaln", "loss/action", "loss/action/t0-24"}
    for what in one:
        np.testing.assert_allclose(many[what][0], one[what][0], rtol=1e-6, err_msg=what)
        np.testing.assert_allclose(many[what], one[what], rtol=1e-5, err_msg=what)
    assert len(set(one["loss"])) == len(one["loss"]) == 10, "the parameters must move for this to mean something"
    counts = [sum(one[f"loss/{m}/{span}"][:, 1].sum() for span in SPANS) for m in ("action", "next_obs")]
    assert counts == [10 * 13, 10 * 16], "three rows have no actions"


def by_name(steps):
    """{metric: values of all steps, (10,), or (10, 2) of a ratio}."""
    return {name: np.asarray([metrics[name] for metrics in steps]).squeeze() for name in steps[0]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data 8", "2x2x2, accumulated"])
def test_held_out_losses_are_those_of_one_device(runs, name):
    one, many = runs["one"]["evaluated"], runs[name]["evaluated"]
    assert one.keys() == many.keys() == {"loss/action", "loss/next_obs"}
    for what, value in one.items():
        assert len(value) == 16 and np.std(value) > 0
        np.testing.assert_allclose(many[what], value, rtol=1e-5, err_msg=what)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data 8", "2x2x2, accumulated"])
def test_modes_are_evaluated_alike_on_any_mesh(runs, name):
    one, many = runs["one"]["modes"], runs[name]["modes"]
    for what, rtol in (("scores", 1e-4), ("windows", 1e-3)):
        assert one[what].keys() == many[what].keys()
        for key, value in one[what].items():
            np.testing.assert_allclose(many[what][key], value, rtol=rtol, atol=1e-4, err_msg=key)
    assert np.std(one["scores"]["forward/latent_mse"]) > 0 and np.abs(one["scores"]["control/shuffle_gap"]).min() > 0
    assert one["moved_bytes"] == 0
    if name == "data 8":
        assert many["moved_bytes"] < 3 * many["output_bytes"], "frames stay where they are, but for those to be shown"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data 8", "fsdp 8"])
def test_the_new_state_takes_the_place_of_the_old_one(runs, name):
    assert runs[name]["reused_bytes"] >= runs[name]["state_bytes"] >= runs[name]["bytes"]["params"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name, parts", [("fsdp 8", 8), ("2x2x2, accumulated", 4), ("data 2, tensor 4", 4)])
def test_state_is_cut_as_the_parameters_are(runs, name, parts):
    one, many = runs["one"], runs[name]
    assert many["same_layout"], "moments and average must lie as their parameters do"
    for tree in ("params", "ema", "mu", "nu"):
        assert many["adaln_bytes"][tree] * parts == one["adaln_bytes"][tree]
    assert runs["data 8"]["bytes"] == one["bytes"]
    # convolutions stay whole; biases, positions and norms too, and they weigh something in a model this narrow
    whole = one["convolution_bytes"]
    cut = {tree: (many["bytes"][tree] - whole) / (one["bytes"][tree] - whole) for tree in one["bytes"]}
    assert len(set(cut.values())) == 1 and cut["mu"] < 1 / parts + (0.15 if "tensor" in name else 0.05), cut


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data 8", "data 8, accumulated"])
def test_only_gradients_cross_devices(runs, name):
    """Images, latents and tokens stay where they are, in passes of the VAE and in accumulated parts too."""
    found = runs[name]["collectives"]
    assert {kind for kind, *_ in found} == {"all-reduce"}, found
    assert all(times == 1 for _, _, _, times, _ in found), "nothing is reduced inside a loop"
    total = sum(size for _, size, *_ in found)
    assert runs[name]["gradient_bytes"] <= total <= 1.1 * runs[name]["gradient_bytes"], found
    assert not runs["one"]["collectives"]


@pytest.mark.slow
def test_fsdp_moves_parameters_and_gradients_only(runs):
    run = runs["fsdp 8"]
    totals = collectives.bytes_by_kind(collectives.Collective(*c[:4], "", c[4]) for c in run["collectives"])
    # Modulations alone are computed for the rows of others, 6 x 2 + 2 of width 32 a row; and gradients of them.
    modulations = 2 * 16 * (6 * 2 + 2) * 32 * 4 // 8
    assert totals.pop("all-to-all") <= modulations
    assert set(totals) <= {"all-gather", "all-reduce", "reduce-scatter"}, "rows must not change devices"
    rest = run["gradient_bytes"] - run["adaln_bytes"]["params"] * 8  # AdaLN's kernels and their gradients stay cut
    assert totals["all-gather"] <= 2 * rest, "once for the forward and once for the backward pass"
    assert totals["all-reduce"] + totals.get("reduce-scatter", 0) <= 1.1 * rest


@pytest.mark.slow
def test_tensor_sums_tokens_twice_a_block_in_each_direction(runs):
    run = runs["data 2, tensor 4"]
    tokens = [c for c in run["collectives"] if c[1] >= run["token_bytes"] and c[2] == 4]
    assert [(kind, times) for kind, _, _, times, _ in tokens] == [("all-reduce", 2)] * 4, "in a loop over two blocks"
    rest = sum(size * times for kind, size, _, times, _ in run["collectives"] if kind != "all-reduce")
    latents = 2 * 8 * (2 * 2 * 8 * 8 * 4) * 4  # mean and variance, 8 rows
    assert rest - latents < run["token_bytes"], "beside them, only modulations and the latents are gathered"


@pytest.mark.slow
def test_frozen_frames_are_encoded_once(runs):
    """Sixteen rows of two views and two frames, over all eight devices, those along `tensor` too."""
    assert len(runs["data 2, tensor 4"]["encoded_frames"]) > 5
    assert set(runs["data 2, tensor 4"]["encoded_frames"]) == {16 * 2 * 2 // 8}
    uneven = runs["six frames"]
    assert set(uneven["encoded_frames"]) == {1}, "two of the eight devices have a frame of padding"
    np.testing.assert_allclose(uneven["spread"], uneven["whole"], rtol=1e-5, atol=1e-8)
    of_members = runs["two rows"]
    assert set(of_members["encoded_frames"]) == {1}, "four frames of each row, over the devices of its four members"
    for spread, whole in zip(of_members["spread"], of_members["whole"], strict=True):
        np.testing.assert_allclose(spread, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_loop_over_members_inside_a_mesh_is_as_one_after_another(runs):
    """As accelerators compute members, with a kernel that the partitioner cuts over fsdp inside of the loop."""
    looped, straight = runs["members in turn"]["tpu"], runs["members in turn"]["cpu"]
    assert looped["loops"] > straight["loops"] == 0
    np.testing.assert_allclose(looped["values"], straight["values"], rtol=1e-5, atol=1e-6)
    assert np.std(straight["values"]) > 0.1
