"""The order of tokens and of the values in a patch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.models.patches import patchify, unpatchify


@pytest.mark.parametrize("shape, patch", [((2, 2, 8, 8, 4), (2, 4, 4)), ((1, 4, 4, 6, 3), (2, 2, 3))])
def test_patches(shape, patch):
    latent = np.arange(2 * np.prod(shape)).reshape(2, *shape)
    tokens = np.asarray(patchify(jnp.asarray(latent), patch))
    np.testing.assert_array_equal(unpatchify(jnp.asarray(tokens), patch, shape), latent)
    views, frames, rows, columns, channels = shape
    (pt, ph, pw), token = patch, 0
    for v in range(views):
        for t in range(0, frames, pt):
            for y in range(0, rows, ph):
                for x in range(0, columns, pw):
                    wanted = latent[:, v, t : t + pt, y : y + ph, x : x + pw].reshape(2, -1)
                    np.testing.assert_array_equal(tokens[:, token], wanted)
                    token += 1
    assert token == tokens.shape[1] and tokens.shape[2] == pt * ph * pw * channels
