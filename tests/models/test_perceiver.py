"""The resampler against published numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from uwm_jax.models.perceiver import Resampler


def filler(count: int, k: int) -> np.ndarray:
    """The k-th deterministic sequence in [-0.5, 0.5), float64, to which the expected numbers belong."""
    x = 43758.5453 * np.sin(12.9898 * np.arange(1, count + 1, dtype=np.float64) + 78.233 * (k + 1))
    return x - np.floor(x) - 0.5


def test_published_latents():
    """Width 24, two layers, two heads of 8, three latents; weights are numbered in torch's order and shapes."""
    resampler = Resampler(num_latents=3, depth=2, heads=2, dim_head=8)
    tokens = jnp.asarray((2 * filler(2 * 5 * 24, 1004)).astype(np.float32).reshape(2, 5, 24))
    shapes = jax.eval_shape(resampler.init, jax.random.key(0), tokens)["params"]
    counter = iter(range(100))

    def value(shape: tuple[int, ...], leaf: str, inputs: int = 0) -> np.ndarray:
        drawn = (0.2 * filler(int(np.prod(shape)), next(counter))).astype(np.float32)
        if inputs:
            drawn = drawn.reshape(-1, inputs).T
        return drawn.reshape(shape) + np.float32(leaf == "scale")

    def norm(node: dict) -> dict:
        return {leaf: value(node[leaf].shape[-1:], leaf) for leaf in ("scale", "bias")}

    params = {name: value(shapes[name].shape, name) for name in ("latents", "media_pos_emb")}
    blocks, each = shapes["layers"]["blocks"], []
    for _ in range(2):
        layer = {}
        for name in ("norm_media", "norm_latents", "to_q", "to_kv", "to_out", "norm_ff", "fc1", "fc2"):
            inputs = {"to_out": 16, "fc2": 96}.get(name, 24)
            if "norm" in name:
                layer[name] = norm(blocks[name])
            else:
                layer[name] = {"kernel": value(blocks[name]["kernel"].shape[1:], "kernel", inputs)}
        each.append(layer)
    params["layers"] = {"blocks": jax.tree.map(lambda *x: np.stack(x), *each)}
    params["norm"] = norm(shapes["norm"])
    assert next(counter) == 26
    found = np.asarray(jax.jit(resampler.apply)({"params": params}, tokens))
    assert found.shape == (2, 3, 24)
    np.testing.assert_allclose([found.mean(), found.std()], [0.0136657, 0.9951181], atol=2e-6)
    np.testing.assert_allclose(found[0, 0, :5], [-0.645866, 0.7804, -0.967565, -1.30314, 1.111439], atol=3e-6)
    np.testing.assert_allclose(found[-1, -1, -3:], [0.810607, 0.938142, -0.261305], atol=3e-6)
