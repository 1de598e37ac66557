"""GroupNorm for CPUs against Flax's, which runs elsewhere."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np

from uwm_jax.models.normalization import GroupNorm


def test_equals_flax_and_is_flax_elsewhere(monkeypatch):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 5, 7, 12)) * 3 + 1).astype(np.float32)
    weights = (rng.normal(size=x.shape)).astype(np.float32)
    options = {"num_groups": 4, "epsilon": 1e-6, "dtype": np.float32, "use_fast_variance": False}
    ours, plain = GroupNorm(**options), nn.GroupNorm(**options)
    params = {"params": {name: rng.normal(size=12).astype(np.float32) for name in ("scale", "bias")}}
    assert jax.tree.map(np.shape, ours.init(jax.random.key(0), x)) == jax.tree.map(np.shape, params)

    def run(module):
        return jax.jit(jax.value_and_grad(lambda p, x: (module.apply(p, x) * weights).sum(), argnums=(0, 1)))

    found, expected = run(ours)(params, x), run(plain)(params, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    text = run(ours).lower(params, x).as_text()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elsewhere = run(ours).lower(params, x).as_text()
    assert elsewhere == run(plain).lower(params, x).as_text() != text
