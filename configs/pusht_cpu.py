"""PushT on two CPU cores in about an hour: that of `configs/quickstart.py`, with more of everything.
In PushT a blue disc has to push a grey T onto the green one, and an action is the position that the disc is sent to.

Command:
    python -m data_prep.demo --episodes=1000 --output=${UWM_DATA_DIR:-data}/pusht_1000
    python -m uwm_jax.train --config=configs/pusht_cpu.py --workdir=runs/pusht_cpu
    python -m uwm_jax.evaluate --workdir=runs/pusht_cpu
    python -m uwm_jax.rollout --workdir=runs/pusht_cpu --env=pusht --episodes=50

`configs/pusht_cpu.py:short` trains for 1,000 steps, for comparing seeds and settings.

Hardware: two CPU cores.

Expect: not measured yet.
"""

from ml_collections import ConfigDict

from configs import quickstart

STEPS = {"full": 10_000, "short": 1_000}


def get_config(length: str = "full") -> ConfigDict:
    if length not in STEPS:
        raise ValueError(f"unknown length {length!r}, expected one of {', '.join(STEPS)}")
    c = quickstart.get_config()
    c.total_steps = STEPS[length]
    c.log_every = 100
    c.checkpoint.every = 1_000
    c.model.depth = 4
    c.data.path = "pusht_1000"
    c.optimizer.warmup_steps = 200
    c.optimizer.ema_decay = 0.999
    return c
