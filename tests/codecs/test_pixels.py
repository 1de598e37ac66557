from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from uwm_jax.codecs import PixelsCodec


def test_pixels_round_trip_is_exact():
    codec = PixelsCodec()
    bytes_ = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 2, 1, 8, 16, 3)
    latents = codec.encode({}, jnp.asarray(bytes_, jnp.float32) / 255, None)
    assert latents.shape[1:] == codec.latent_shape(2, 1, 8, 16) == (2, 1, 8, 16, 3)
    assert float(latents.min()) == -1 and float(latents.max()) == 1
    np.testing.assert_array_equal(np.round(np.asarray(codec.decode({}, latents)) * 255), bytes_)
    grid = jnp.linspace(0, 1, 1025).reshape(1, 1, 1, 1025, 1, 1)  # float32 holds k/1024 and its double exactly
    np.testing.assert_array_equal(codec.decode({}, codec.encode({}, grid, None)), grid)
