"""The moving average of the parameters (EMA): its rate at each step, and how much of the start is still in it.

With decay d, the average after N steps is `prod(d_t) * start + ...` over t = 0 ... N - 1, where d_t is

- `optimizer.ema_warmup="ramp"`: min(d, (1 + t) / (10 + t)), as in TensorFlow's `ExponentialMovingAverage` with
  `num_updates` and diffusers' `EMAModel`. The average forgets the start within a few steps;
- `optimizer.ema_warmup="none"`: d. With d = 0.9999, 96 % of the average of step 400 is the start.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

RAW, AVERAGE = "raw", "average"  # which parameters a command uses
ITEMS = {RAW: "params", AVERAGE: "ema_params"}  # their names in a checkpoint

MUCH = 0.01  # share of the start in an average that is worth a warning


def rate(config: ConfigDict, step: jax.Array) -> jax.Array:
    """1 - d_t, the () float32 weight of the parameters after the step that `step` (counted from 0) numbers.

    It is computed without the decay itself, whose rounding would cost a slow average three digits of this.
    """
    constant = 1.0 - config.optimizer.ema_decay
    if config.optimizer.ema_warmup == "none":
        return jnp.asarray(constant, jnp.float32)
    return jnp.maximum(constant, 9.0 / (10.0 + jnp.asarray(step, jnp.float32)))


def share_of_start(config: ConfigDict, steps: int) -> float:
    """The weight, in [0, 1], of the parameters that a run started from in its average after some steps."""
    decay = np.full(steps, config.optimizer.ema_decay)
    if config.optimizer.ema_warmup != "none":
        t = np.arange(steps)
        decay = np.minimum(decay, (1 + t) / (10 + t))
    return float(np.prod(decay))


def describe(config: ConfigDict, steps: int, parameters: str) -> dict[str, Any]:
    """JSON for the files of results: {"parameters": "raw" or "average", "share_of_start": of an average, else None}.

    Args:
      config: as the parameters were trained.
      steps: finished steps of the checkpoint.
    """
    share = share_of_start(config, steps) if parameters == AVERAGE else None
    return {"parameters": parameters, "share_of_start": share}


def warning(config: ConfigDict, steps: int, remedy: str) -> str:
    """A line for people where much of an average is still the start; "" where it is not.

    Args:
      remedy: what takes the parameters themselves, such as `--parameters=raw`.
    """
    share = share_of_start(config, steps)
    if share <= MUCH:
        return ""
    start = f"the parameters of config.init_from={config.init_from!r}" if config.init_from else "the random start"
    return (
        f"{share:.1%} of the averaged parameters of step {steps} are still {start} (config.optimizer.ema_decay="
        f"{config.optimizer.ema_decay:g}, ema_warmup={config.optimizer.ema_warmup!r}). {remedy} takes the parameters "
        "as they were trained last."
    )
