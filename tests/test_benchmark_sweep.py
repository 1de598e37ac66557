from __future__ import annotations

import pytest

from tests.systems.small import small_config
from uwm_jax.benchmark_sweep import benchmark, small_model
from uwm_jax.synthetic import synthetic_spec
from uwm_jax.systems import make

DROID = 1250.5 / 158.7  # GFLOP of the VAE over those of what is trained, three times its forward pass


def test_the_default_model_has_the_share_of_the_vae_that_droid_has():
    config, codec = small_model()
    flops = make(config, synthetic_spec(config, action_dim=2), codec).flops()
    assert flops.frozen / (flops.training - flops.frozen) == pytest.approx(DROID, rel=0.2)


@pytest.mark.slow
def test_both_sides_are_timed():
    config = small_config("uwm")
    config.data.cameras, config.data.low_dim = ("image",), ("agent_pos",)
    row = benchmark(config, count=2, at_once=0, blocks=2)
    assert row["members"] == 2 and row["ratio"] == row["seconds/single"] / row["seconds/sweep"]
    assert row["ratio/min"] <= row["ratio/max"] and min(row.values()) >= 0
    assert row["member_steps_per_s/sweep"] == pytest.approx(2 / row["seconds/sweep"])
