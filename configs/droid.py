"""The paper's model on DROID: three cameras, 2 + 2 frames, 16 actions of 10 dimensions, 12 layers of width 768.

Command:
    python -m data_prep.reshard --input=DROID_TFDS_DIR --output=$UWM_DATA_DIR/droid
    python -m uwm_jax.train --config=configs/droid.py --workdir=runs/droid
    python -m uwm_jax.train --config=configs/droid.py:official --workdir=runs/droid_official

Data: without an argument all successful episodes of DROID, which are those with "success" in their `file_path`; the
others failed at their task. `:official` takes what the official code converts: 2,000 episodes with "WEIRD", one of the
labs, in their `recording_folderpath`, whether they succeeded or not. Which 2,000 is
`--config.data.sources.droid.max_episodes_seed=0`; the official ones are those that come first in its copy of the data.
It also counts the last action of an episode and draws augmentations once a batch, as the official code does. The first
lines of a run say how many episodes were found. Other data with these keys need `--config.data.path=DIR` and, where
nothing tells successes, `--config.data.sources.droid.include="()"`. After `python -m data_prep.ranges --dataset=droid`,
`--config.data.ranges=idle` leaves out windows whose present frame shows an idle robot (docs/choosing.md).

Hardware: accelerators; the global batch of 144 (36 on each of 4 devices in the paper) spreads over all that
are there. The VAE (stabilityai/sdxl-vae) and ImageNet weights come from the hub at the first start;
`--config.model.codec.vae=DIR` and `--config.model.encoder.imagenet_weights=FILE` take local ones.

Expect: 384.92 M parameters in the network, 11.57 M in the image encoder and 83.65 M in the frozen VAE, and a first
loss of 2.0 (1 for each modality, since both outputs start at zero). The paper trains for 100,000 steps. Products run
in bfloat16; `--config.model.dtype=float32 --config.model.codec.dtype=float32` is the official arithmetic. Whether it
fits a machine, and what a step costs there, is what
`python -m uwm_jax.benchmark_step --config=configs/droid.py --config.batch_size=1` tells without data or weights.
"""

from typing import Any

from ml_collections import ConfigDict

from uwm_jax.config import base, preset, source

SUCCESS = ("file_path", "success")
LAB = ("recording_folderpath", "WEIRD")
EPISODES = ("successes", "official")


def get_config(episodes: str = "successes") -> ConfigDict:
    if episodes not in EPISODES:
        raise ValueError(f"unknown episodes {episodes!r}, expected one of {', '.join(EPISODES)}")
    c = base()
    c.batch_size = 144
    c.model.dtype = c.model.codec.dtype = "bfloat16"
    c.model.encoder.imagenet_weights = "timm/resnet18.tv_in1k"
    # Cartesian velocity of the end effector with its Euler angles as a 6-d rotation, and the gripper: 3 + 6 + 1.
    c.data.action = preset("droid")
    if episodes == "official":
        c.data.sources.droid = source(include=(LAB,), max_episodes=2_000)
        c.data.last_action, c.data.augment.draw = "keep", "batch"
    else:
        c.data.sources.droid = source(include=(SUCCESS,))
    return c


def data_sizes() -> dict[str, Any]:
    """As DROID's RLDS has them."""
    cameras = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    return {
        **dict.fromkeys(cameras, (180, 320)),
        "action_dict/cartesian_velocity": 6,
        "action_dict/gripper_position": 1,
        "cartesian_position": 6,
        "gripper_position": 1,
        "joint_position": 7,
        "language_embedding": 512,
    }
