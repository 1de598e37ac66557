"""PushT on two CPU cores in under an hour: `configs/quickstart.py` with more demonstrations, steps and weight on actions.
In PushT a blue disc has to push a grey T onto the green one, and an action is the position that the disc is sent to.

Command:
    python -m data_prep.demo --episodes=1000 --output=${UWM_DATA_DIR:-data}/pusht_1000
    python -m uwm_jax.train --config=configs/pusht_cpu.py --workdir=runs/pusht_cpu
    python -m uwm_jax.evaluate --workdir=runs/pusht_cpu
    python -m uwm_jax.rollout --workdir=runs/pusht_cpu --env=pusht --episodes=50

`configs/pusht_cpu.py:short` trains for 1,000 steps, for comparing seeds and settings.

Hardware: two CPU cores.

Expect: 52 minutes of training at 70 to 130 samples a second on two shared cores, and 3 minutes for the two commands
after it; demonstrations took half a second each. One seed, 256 held-out windows of 100 episodes, 95 % intervals over
episodes:

    policy   action MSE 0.041 [0.036, 0.047], normalised; the mean action has 0.109 [0.101, 0.119]
    inverse  action MSE 0.019 [0.017, 0.022], 0.18 of the mean action's; a straight line to the chunk's end, which knows
             where that is, has as much: 0.019 [0.017, 0.021]
    joint    action MSE 0.042 [0.036, 0.047], PSNR 26.0 dB [25.8, 26.3]
    forward  PSNR 26.1 dB [25.9, 26.4]; shuffle gap 0.047 [0.037, 0.057]; as samples, another window's actions cost
             0.00016 [0.00011, 0.00021] more on all pixels and 0.0020 [0.0014, 0.0026] on those that changed
    video    PSNR 26.0 dB [25.8, 26.3]; the current frame has 25.3 dB [24.9, 25.6], the mean image 26.1 [25.9, 26.3]

    closed loop, 50 starts: mean best coverage 0.522 [0.442, 0.597], 3 solved; random targets 0.150 [0.102, 0.199], held
    for 8 steps 0.191 [0.140, 0.245]; expert 0.963 [0.960, 0.966]; doing nothing 0.133 [0.086, 0.181]
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
    c.eval.every = 2_500 if length == "full" else 0  # held-out curves; half a minute each
    c.model.depth = 4
    c.loss.weights.action = 5.0  # the loss of frames is ten times that of actions, and the inverse mode learns late
    c.data.path = "pusht_1000"
    c.optimizer.warmup_steps = 200
    c.optimizer.ema_decay = 0.999 if length == "full" else 0.99  # an average over a tenth of the run
    return c
