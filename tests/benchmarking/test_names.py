"""Names of the benchmark's rows."""

from __future__ import annotations

import pytest

from uwm_jax.benchmarking import names
from uwm_jax.errors import UserError


def test_parts_select_rows() -> None:
    assert names.select(["latents", "policy"]) == [
        "latents/forward", "latents/forward_backward", "latents/step", "policy",
    ]  # fmt: skip
    assert names.select(["pixels/step"]) == ["pixels/step"]
    assert names.select(["policy", "network"]) == ["network/forward", "network/forward_backward", "policy"]
    assert names.select(names.PARTS) == list(names.ROWS)
    for bad in (["latent"], []):
        with pytest.raises(UserError, match="--part: expected .*latents, pixels, "):
            names.select(bad)


def test_what_rows_need() -> None:
    assert names.needs("network/forward") == {"network"}
    assert names.needs("codec") == {"codec"}
    assert names.needs("preprocessing") == set()
    assert names.needs("policy") == names.needs("latents/step") == {"network", "encoder"}
    assert names.needs("pixels/step") == {"network", "encoder", "codec"}
    assert [row for row in names.ROWS if names.trains(row)] == ["latents/step", "pixels/step"]
