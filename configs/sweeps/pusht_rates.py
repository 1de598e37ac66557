"""Does the best learning rate move with the width? Six rates at widths 64, 128 and 256 on PushT.

Command:
    python -m data_prep.demo --episodes=1000 --output=${UWM_DATA_DIR:-data}/pusht_1000
    python -m launch.sweep --config=configs/sweeps/pusht_rates.py --workdir=runs/pusht_rates

Hardware: two CPU cores.

Expect: 18 runs of 500 steps of `configs/quickstart.py`'s model on the 1,000 demonstrations, in three programs, one for
each width; warm-up, stable and decay of the rate (`wsd`). The last step measures the losses on 256 held-out windows.
docs/sweeps.md shows the picture.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import quickstart
from uwm_jax.sweeps.members import grid

WIDTHS = (64, 128, 256)
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)

data_sizes = quickstart.data_sizes


def get_config() -> ConfigDict:
    c = quickstart.get_config()
    c.data.path = "pusht_1000"
    c.total_steps = 500
    c.log_every = 100
    c.checkpoint.every, c.checkpoint.keep = 250, 1
    c.optimizer.schedule, c.optimizer.warmup_steps, c.optimizer.decay_steps = "wsd", 50, 100
    c.eval.every, c.eval.samples.every = c.total_steps, 0
    return c


def get_members() -> list[dict[str, Any]]:
    return grid({"model.embed_dim": WIDTHS, "optimizer.learning_rate": RATES})
