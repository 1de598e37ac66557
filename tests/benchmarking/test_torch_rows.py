"""Torch's rows compute what ours compute."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from uwm_jax.benchmarking import names
from uwm_jax.benchmarking.rows import Model
from uwm_jax.systems.uwm import official
from uwm_jax.torch_bridge import layout

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from uwm_jax.benchmarking import torch_rows  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_rows, "threads", lambda: 1)


@pytest.mark.slow
def test_parts_agree(tiny: ConfigDict) -> None:
    """Values, and the gradients that both sides leave."""
    tiny.model.codec.posterior = "mode"
    model = Model(tiny, 3, [], (20, 30), initialize=False)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.system.init, jax.random.key(0))
    params = jax.tree.map(lambda s: jnp.float32(0.2 * rng.normal(size=s.shape)), shapes)
    rows = [row for row in names.ROWS if row.startswith(("network", "encoder"))] + ["codec"]
    frozen = Model(tiny, 3, ["codec"]).frozen
    side = torch_rows.TorchRows(model.description(), rows)
    stored = layout.to_official(params, official.entry_of(tiny.model.patch))
    stored |= {f"obs_encoder.pca.{name}": np.asarray(x) for name, x in frozen.items()}
    network = side.loop.network
    network.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in stored.items()})

    def both(row):
        inputs = model.inputs(row)
        return jax.jit(model.function(row))(params, frozen, inputs), side.call(row, inputs)()

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    ours, theirs = both("network/forward")
    for m in ours:
        close(theirs[m], ours[m])
    for row in ("encoder/forward", "codec"):
        ours, theirs = both(row)
        close(theirs, ours)
    (_, ours), features = both("network/forward_backward")
    close(features, ours["global_cond"])
    wanted = layout.to_official(
        params | {"noise_pred_net": ours["noise_pred_net"]}, official.entry_of(tiny.model.patch)
    )
    for name, parameter in network.noise_pred_net.named_parameters(prefix="noise_pred_net"):
        close(parameter.grad, wanted[name], err_msg=name)
    (_, ours), _ = both("encoder/forward_backward")
    wanted = layout.to_official(params | ours, official.entry_of(tiny.model.patch))
    for name, parameter in network.obs_encoder.img_encoder.named_parameters(prefix="obs_encoder.img_encoder"):
        close(parameter.grad, wanted[name], err_msg=name)


def test_every_row_runs(tiny: ConfigDict) -> None:
    model = Model(tiny, 3, [], (20, 30), initialize=False)
    for rows in (names.ROWS, *([row] for row in ("network/forward", "encoder/forward", "preprocessing", "policy"))):
        side = torch_rows.TorchRows(model.description(), rows)
        for row in rows:
            side.call(row, model.inputs(row))()
    sample = side.call("policy", model.inputs("policy"))()
    assert {m: tuple(x.shape) for m, x in sample.items()} == {"action": (1, 4, 3)}


def test_what_a_row_does_not_need_is_small(tiny: ConfigDict) -> None:
    tiny.model.encoder.width = 32
    description = Model(tiny, 3, []).description()
    count = lambda rows: sum(p.numel() for p in torch_rows.TorchRows(description, rows).loop.trained)  # noqa: E731
    assert count(["encoder/forward"]) < count(["network/forward"]) < count(["policy"])
    assert count(["policy"]) == count(["pixels/step"])


def test_a_vae_without_diffusers_is_left_out(tiny: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model.codec.name = "vae"
    model = Model(tiny, 3, [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    side = torch_rows.TorchRows(model.description(), ["pixels/forward", "codec", "encoder/forward"])
    assert side.rows == ["encoder/forward"]
    assert side.call("codec", model.inputs("codec")) is None


def test_jax_is_not_imported() -> None:
    code = "import sys, uwm_jax.benchmarking.torch_rows; assert not {'jax', 'flax', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
