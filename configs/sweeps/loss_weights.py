"""Weights of the action and video losses on DROID: 8 members that share the data and the frozen VAE.

Command:
    python -m launch.sweep --config=configs/sweeps/loss_weights.py --workdir=runs/loss_weights
    python -m launch.sweep --config=configs/sweeps/loss_weights.py:official --workdir=runs/loss_weights_official

Data, model and optimizer are those of `configs/droid.py`, whose argument it takes. AdamW divides by the size of the
gradients, so without clipping little but the ratio of the two weights matters: the grid of 4 action and 2 video weights
has the ratios 1/4, 1/2, 1, ... 32, each once. `action=1,next_obs=1` is the paper's. Other members need a file like this
one, or `--grid=loss.weights.action=1,5` with `--config=configs/droid.py`.

Hardware: 16 chips of TPU v5e or more, on which two chips share a member. So that parameters, moments and activations of
all members have room there, a batch is computed in 8 parts and blocks are rematerialised (`accumulation_steps=8`,
`model.remat="dots"`), which changes losses by rounding alone; in one part without rematerialisation they do not fit.
Predicted, never run, by

    python -m uwm_jax.plan --config=configs/sweeps/loss_weights.py --topology=v5e-16

a chip needs 11.19 of its 16.91 GB in a step and 16.58 GB while held-out windows are evaluated; a step of all 8 takes
247 ms at best and 680 ms by the estimate, which are 32.4 and 11.8 member-steps/s.

Expect: one program, in which the VAE encodes a batch once for all members, and `sweep.html` with what each weighting
costs the policy and the forward mode. Held-out windows are evaluated at the last step; seeds are not varied, so that a
small difference may be one of seeds.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import droid
from uwm_jax.sweeps.members import grid

ACTION, NEXT_OBS = (0.25, 0.5, 1.0, 2.0), (1.0, 0.0625)

data_sizes = droid.data_sizes


def get_config(episodes: str = "successes") -> ConfigDict:
    c = droid.get_config(episodes)
    c.accumulation_steps, c.model.remat = 8, "dots"
    c.eval.every = c.total_steps
    return c


def get_members(episodes: str = "successes") -> list[dict[str, Any]]:
    return grid({"loss.weights.action": ACTION, "loss.weights.next_obs": NEXT_OBS})
