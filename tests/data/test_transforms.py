from __future__ import annotations

import pytest

from uwm_jax.data.transforms import get_transform
from uwm_jax.errors import UserError


def test_registry() -> None:
    transform = get_transform("xyz_euler_to_rot6d")
    assert transform.width("velocity", 6) == 9
    assert get_transform("identity").width("anything", 7) == 7
    with pytest.raises(UserError, match="takes 6 numbers, but 'velocity' has 7"):
        transform.width("velocity", 7)
    with pytest.raises(UserError, match="no transform 'rot6'; there are identity, .*xyz_euler_to_rot6d"):
        get_transform("rot6")
