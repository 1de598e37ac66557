"""The demonstration: a tiny UWM that learns PushT on two CPU cores in minutes.
In PushT a blue disc has to push a grey T onto the green one, and an action is the position that the disc is sent to.

Command:
    python -m data_prep.demo
    python -m uwm_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m uwm_jax.evaluate --workdir=runs/quickstart

Hardware: two CPU cores.

Expect: 1.97 M parameters in the network and 0.21 M in the image encoder. Measured on two shared cores, seed 0, 256
held-out windows of 22 episodes (95 % intervals over episodes). All three commands together took 280 s, with training at
185 to 220 samples a second; on another day such cores trained at 104 to 140, and they took 464 s:

    policy   action MSE 0.052 [0.046, 0.059], normalised; the mean action has 0.107 [0.098, 0.117]
    inverse  action MSE 0.048 [0.042, 0.055]; paired, the policy's is larger by 0.0043 [0.0009, 0.0073]; a straight line
             to the chunk's end has 0.021 [0.019, 0.023]
    joint    action MSE 0.056 [0.050, 0.062], PSNR 25.4 dB [25.1, 25.8]
    forward  PSNR 25.3 dB [24.9, 25.7]; one evaluation is better with the true actions than with another window's:
             shuffle gap 0.0039 [0.0019, 0.0056]
    video    PSNR 25.4 dB [25.0, 25.8]; the current frame has 25.2 dB [24.7, 25.6], the mean image 26.1 [25.8, 26.4]

`--config.seed=1`: policy 0.059, inverse 0.044, larger by 0.0143 [0.0108, 0.0178], shuffle gap 0.0046 [0.0019, 0.0069]
(measured with `--config.optimizer.ema_warmup=none`, which in seed 0 gives the numbers above but for their last digit).
So few steps give blurred frames, in which the block stands near its goal for any observation.
"""

from typing import Any

from ml_collections import ConfigDict

from uwm_jax.config import base


def get_config() -> ConfigDict:
    c = base()
    use_demonstrations(c)
    c.total_steps = 1_150
    c.checkpoint.every = 575
    c.checkpoint.keep = 2

    # 16 actions + 16 video tokens + 4 registers of width 128; three stages of a quarter-width ResNet with its 4x4 map.
    c.model.embed_dim = 128
    c.model.depth = 3
    c.model.num_heads = 4
    c.model.num_registers = 4
    c.model.timestep_embed_dim = 128
    c.model.patch = (2, 2, 2)
    use_small_resnet(c)
    c.model.codec.name = "pca"

    # Short runs want x0 prediction: noise prediction is still worse than the mean after a few hundred steps.
    c.diffusion.prediction.action = c.diffusion.prediction.next_obs = "sample"
    c.diffusion.spacing = "trailing"  # the first timestep is the one of what is hidden in training (docs/benchmarks.md)

    c.loss.weights.action = 5.0  # the loss of frames is ten times that of actions, and the inverse mode learns late
    return c


def data_sizes() -> dict[str, Any]:
    """As `data_prep.demo` makes them."""
    return {"image": (64, 64), "agent_pos": 2, "action": 2}


def use_demonstrations(c: ConfigDict) -> None:
    """PushT's demonstrations as 64-pixel frames, and an optimizer for minutes of training, for any system."""
    c.batch_size = 32
    c.log_every = 50
    c.eval.action_plane = ("image", 0.0, 512.0, 0.0, 512.0)  # actions are positions on the table

    c.data.path = "pusht"
    c.data.cameras = ("image",)
    c.data.low_dim = ("agent_pos",)
    c.data.val_ratio = 0.1
    c.data.num_threads = 1
    c.data.resize = c.data.crop = (64, 64)
    c.data.augment.random_crop = False
    c.data.augment.brightness = c.data.augment.contrast = c.data.augment.saturation = c.data.augment.hue = 0.0

    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 100
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.99


def use_small_resnet(c: ConfigDict) -> None:
    """A ResNet of three stages that keeps its map's layout, and the robot's state."""
    c.model.encoder.stage_sizes = (1, 1, 1)  # a fourth, on a 2x2 map, takes XLA 40 ms a step on CPUs
    c.model.encoder.width = 16
    c.model.encoder.pool = "flatten"
    c.model.encoder.use_low_dim = True
