"""The blocks' parameters held apart: the same numbers in another form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uwm_jax.models import layers

DEPTH = 3


def tree():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    blocks = {
        "adaln": {"kernel": draw(DEPTH, 4, 6, 2), "bias": draw(DEPTH, 6, 2)},
        "fc1": {"kernel": draw(DEPTH, 2, 8)},
    }
    return {"obs_encoder": {"fc": draw(3)}, "noise_pred_net": {"blocks": blocks, "pos_embed": draw(1, 5)}}


def state():
    """Parameters, an average that is not there, and moments in an optimizer's tuple."""
    return {"params": tree(), "ema_params": None, "opt_state": ((), ({"mu": tree()}, jnp.zeros(())))}


def test_what_is_taken_apart_is_put_together_bit_for_bit():
    whole = state()
    held = layers.apart(state())
    kernel = held["params"]["noise_pred_net"]["blocks"]["adaln"]["kernel"]
    assert [x.shape for x in kernel.arrays] == [(4, 6, 2)] * DEPTH
    for i, layer in enumerate(layers.of_each(held["params"]["noise_pred_net"]["blocks"], DEPTH)):
        assert (layer["fc1"]["kernel"] == whole["params"]["noise_pred_net"]["blocks"]["fc1"]["kernel"][i]).all()
    back = layers.stacked(held)
    assert jax.tree.structure(back) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, back, whole)
    assert not layers.are_apart(back) and layers.stacked(back)["params"] is not held["params"]
    assert layers.apart(held)["params"]["noise_pred_net"]["blocks"]["adaln"]["kernel"] is kernel
    assert not kernel.arrays[0].is_deleted()  # the step goes on with it


def test_stacked_arrays_are_given_up_and_all_others_kept():
    whole = state()
    held = layers.apart(whole)
    assert all(x.is_deleted() for x in jax.tree.leaves(whole["params"]["noise_pred_net"]["blocks"]))
    assert held["params"]["obs_encoder"]["fc"] is whole["params"]["obs_encoder"]["fc"]


def test_layers_of_a_stack_are_its_slices():
    stack = tree()["noise_pred_net"]["blocks"]
    for i, layer in enumerate(layers.of_each(stack, DEPTH)):
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x, y[i]), layer, stack)


def test_shapes_keep_their_sharding():
    mesh = jax.make_mesh((1,), ("fsdp",))
    place = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    shape = jax.ShapeDtypeStruct((DEPTH, 4, 8), jnp.float32, sharding=place)
    (held,) = jax.tree.leaves(
        layers.apart({"blocks": {"kernel": shape}}), is_leaf=lambda x: isinstance(x, layers.Layers)
    )
    assert {(x.shape, x.sharding.spec) for x in held.arrays} == {((4, 8), PartitionSpec("fsdp"))}
    assert len(held.arrays) == DEPTH


@pytest.mark.parametrize(("backend", "devices", "scans"), [("cpu", 1, False), ("cpu", 8, True), ("tpu", 1, True)])
def test_a_single_cpu_device_alone_runs_without_the_loop(monkeypatch, backend, devices, scans):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert layers.scans_by_default() is scans
