"""Six weightings of the action and video losses on PushT, three seeds each, in one program.

Command:
    python -m data_prep.demo --episodes=1000 --output=${UWM_DATA_DIR:-data}/pusht_1000
    python -m launch.sweep --config=configs/sweeps/pusht_loss_weights.py --workdir=runs/pusht_loss_weights

Hardware: two CPU cores.

Expect: 18 members of `configs/pusht_cpu.py:short`, which differ in the weights of the losses and in the seed and see
the same samples in the same order. The weight of the video loss is 1, that of the action loss 0.2 to 125, and one
weighting trains actions alone. The last step measures all uses on 256 held-out windows and acts from 50 starts, the
same for all. docs/sweeps.md shows the result.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import pusht_cpu

WEIGHTS = ((0.2, 1.0), (1.0, 1.0), (5.0, 1.0), (25.0, 1.0), (125.0, 1.0), (5.0, 0.0))  # of action, of next_obs
SEEDS = (0, 1, 2)

data_sizes = pusht_cpu.data_sizes


def get_config() -> ConfigDict:
    c = pusht_cpu.get_config("short")
    c.checkpoint.every = 250
    c.checkpoint.keep = 1
    c.eval.every = c.total_steps
    c.eval.closed_loop.env = "pusht"
    return c


def get_members() -> list[dict[str, Any]]:
    return [
        {"loss.weights.action": action, "loss.weights.next_obs": video, "seed": seed}
        for action, video in WEIGHTS
        for seed in SEEDS
    ]
