from __future__ import annotations

import jax
import numpy as np
import pytest

from uwm_jax.models import initializers


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5)])
def test_normal_draws_the_numbers_of_a_draw_in_shape(shape: tuple[int, ...]) -> None:
    key = jax.random.key(3)
    found = initializers.normal(0.02)(key, shape)
    assert found.shape == shape and found.dtype == np.float32
    np.testing.assert_allclose(found, 0.02 * jax.random.normal(key, shape), rtol=1e-6)


def test_kaiming_fan_out_has_its_standard_deviation() -> None:
    found = np.asarray(initializers.kaiming_fan_out(jax.random.key(0), (3, 5, 64, 128)))
    std = np.sqrt(2 / (3 * 5 * 128))
    # The standard error of a standard deviation is std / sqrt(2 n); these are four of them.
    assert abs(found.std() - std) < 4 * std / np.sqrt(2 * found.size)
    assert abs(found.mean()) < 4 * std / np.sqrt(found.size)


def test_torch_linear_draws_the_numbers_of_a_draw_in_shape() -> None:
    key = jax.random.key(3)
    found = initializers.torch_linear(16)(key, (3, 4))
    np.testing.assert_array_equal(found, jax.random.uniform(key, (3, 4), minval=-0.25, maxval=0.25))
