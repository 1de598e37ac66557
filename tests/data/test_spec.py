"""Contents of a batch and an observation: keys, shapes and dtypes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError

PAIR = (np.float32([2, 4]), np.float32([1, 1 / 3]))
SPEC = DataSpec(
    window=WindowSpec({"obs": (0, 1), "action": (1, 2, 3), "next_obs": (4,)}),
    cameras={"front": (8, 6), "wrist": (4, 4)},
    low_dim={"state": 2},
    action_dim=5,
    text_dim=7,
    normalizer=Normalizer({"state": PAIR}),
)


def test_a_batch_has_these_keys_shapes_and_dtypes() -> None:
    expected = {
        "obs/front": ((3, 2, 8, 6, 3), "uint8"),
        "obs/wrist": ((3, 2, 4, 4, 3), "uint8"),
        "next_obs/front": ((3, 1, 8, 6, 3), "uint8"),
        "next_obs/wrist": ((3, 1, 4, 4, 3), "uint8"),
        "obs/state": ((3, 2, 2), "float32"),
        "obs/text": ((3, 7), "float32"),
        "action": ((3, 3, 5), "float32"),
        "action_mask": ((3,), "bool"),
        "row": ((3,), "int32"),
    }
    for made in (SPEC.batch_like(3), SPEC.empty(3), SPEC.zeros(3)):
        assert {key: (x.shape, str(x.dtype)) for key, x in made.items()} == expected
    assert not any(x.any() for x in SPEC.zeros(3).values())


def test_an_observation_is_checked_as_a_whole() -> None:
    seen = {
        "front": np.ones((2, 8, 6, 3), np.uint8),
        "wrist": np.ones((2, 4, 4, 3), np.uint8),
        "state": np.array([[1, 2], [3, 4]]),
        "text": np.ones((2, 7)),
        "other": 0,
    }
    checked = SPEC.check(seen, 2)
    assert {key: str(x.dtype) for key, x in checked.items()} == {
        "front": "uint8",
        "wrist": "uint8",
        "state": "float32",
        "text": "float32",
    }
    del seen["front"]
    seen |= {"wrist": np.ones((2, 4, 4, 3)), "state": np.ones((3, 2)), "text": np.full((2, 7), np.nan)}
    with pytest.raises(UserError) as e:
        SPEC.check(seen, 2)
    for part in (
        "missing front: expected uint8 (2, 8, 6, 3)",
        "wrist: expected uint8 (2, 4, 4, 3), found float64 (2, 4, 4, 3)",
        "state: expected float32 (2, 2), found float64 (3, 2)",
        "text: holds values that are not finite",
        "It has other, state, text, wrist.",
    ):
        assert re.search(re.escape(part), str(e.value))


def test_only_values_with_an_entry_are_normalised() -> None:
    batch = {"obs/state": np.float32([[3, 1]]), "action": np.float32([[5]]), "obs/front": np.uint8([7])}
    found = SPEC.normalized(batch)
    np.testing.assert_allclose(found["obs/state"], [[1, 1 / 6]], rtol=1e-6)
    assert found["action"] is batch["action"] and found["obs/front"] is batch["obs/front"]


def test_the_spec_survives_storage() -> None:
    again = DataSpec.from_json(json.loads(json.dumps(SPEC.to_json())))
    assert again.batch_like(2) == SPEC.batch_like(2) and again.window == SPEC.window
    for ours, theirs in zip(again.normalizer.entries["state"], PAIR, strict=True):
        np.testing.assert_array_equal(ours, theirs)
