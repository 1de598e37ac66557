"""The average's decay against diffusers' schedule, the share of the start against closed forms and a real average."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from uwm_jax.config import base
from uwm_jax.training import average


def config_of(decay, warmup="ramp", init_from=""):
    c = base()
    c.optimizer.ema_decay, c.optimizer.ema_warmup, c.init_from = decay, warmup, init_from
    return c


@pytest.mark.torch
@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_the_ramp_is_that_of_diffusers(decay):
    """But for its first step, where diffusers takes the parameters alone."""
    torch = pytest.importorskip("torch")
    training_utils = pytest.importorskip("diffusers.training_utils")
    model = training_utils.EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=decay, use_ema_warmup=False)
    for t in (1, 2, 7, 100, 5_000, 2_000_000):
        assert float(average.rate(config_of(decay), jnp.int32(t))) == pytest.approx(
            1 - model.get_decay(t + 1), rel=1e-6
        )


def test_a_slow_rate_is_exact():
    """1 - 0.9999 in float32 would be off by 2e-4 of it."""
    for warmup in ("ramp", "none"):
        assert float(average.rate(config_of(0.9999, warmup), jnp.int32(10**7))) == pytest.approx(1e-4, rel=1e-6)


def test_share_of_the_start():
    assert average.share_of_start(config_of(0.9999, "none"), 400) == pytest.approx(0.9999**400, rel=1e-12)
    factorials = math.factorial(9) * math.factorial(30) / math.factorial(39)  # of prod (1 + t) / (10 + t)
    assert average.share_of_start(config_of(0.9999), 30) == pytest.approx(factorials, rel=1e-12)
    # (1 + t) / (10 + t) exceeds 0.7 from t = 20 on
    ramp = math.factorial(9) * math.factorial(20) / math.factorial(29)
    assert average.share_of_start(config_of(0.7), 50) == pytest.approx(ramp * 0.7**30, rel=1e-12)
    assert average.share_of_start(config_of(0.7), 0) == 1.0


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, "none"), (0.9, "ramp"), (0.999, "none")])
def test_the_share_is_what_is_left_of_a_start_of_one(decay, warmup):
    """A start of 1 whose parameters are 0 after every step."""
    config, value = config_of(decay, warmup), jnp.float32(1)
    for t in range(12):
        value = value + average.rate(config, jnp.int32(t)) * (0.0 - value)
    np.testing.assert_allclose(value, average.share_of_start(config, 12), rtol=1e-5)


def test_the_warning_names_share_start_and_remedy():
    told = average.warning(config_of(0.9999, "none"), 400, "--parameters=raw")
    assert told.startswith("96.1% of the averaged parameters of step 400 are still the random start (")
    assert "ema_decay=0.9999" in told and "--parameters=raw takes" in told
    assert "config.init_from='runs/a'" in average.warning(config_of(0.9999, "none", "runs/a"), 400, "it")
    assert average.warning(config_of(0.9999), 400, "it") == ""
    assert average.warning(config_of(0.99, "none"), 500, "it") == ""  # 0.7 %
    assert "start" in average.warning(config_of(0.99, "none"), 400, "it")  # 1.8 %
