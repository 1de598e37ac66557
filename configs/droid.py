"""The paper's pretraining: three cameras, 2 + 2 frames, 16 actions of 10 dimensions, 12 layers of width 768.

Command:
    python -m data_prep.reshard --input=DROID_TFDS_DIR --output=$UWM_DATA_DIR/droid
    python -m uwm_jax.train --config=configs/droid.py --workdir=runs/droid

Hardware: accelerators; the global batch of 144 (36 on each of 4 devices in the paper) spreads over all that
are there. The VAE (stabilityai/sdxl-vae) and ImageNet weights come from the hub at the first start;
`--config.model.codec.vae=DIR` and `--config.model.encoder.imagenet_weights=FILE` take local ones.

Expect: 384.92 M parameters in the network, 11.57 M in the image encoder and 83.65 M in the frozen VAE, and a first
loss of 2.0 (1 for each modality, since both outputs start at zero). The paper trains for 100,000 steps. Products run
in bfloat16; `--config.model.dtype=float32 --config.model.codec.dtype=float32` is the official arithmetic. Whether it
fits a machine, and what a step costs there, is what
`python -m uwm_jax.benchmark_step --config=configs/droid.py --config.batch_size=1` tells without data or weights.
"""

from ml_collections import ConfigDict

from uwm_jax.config import base


def get_config() -> ConfigDict:
    c = base()
    c.batch_size = 144
    c.model.dtype = c.model.codec.dtype = "bfloat16"
    c.model.encoder.imagenet_weights = "timm/resnet18.tv_in1k"
    # Cartesian velocity of the end effector with its Euler angles as a 6-d rotation, and the gripper: 3 + 6 + 1.
    c.data.action = (
        ("action_dict/cartesian_velocity", "xyz_euler_to_rot6d"),
        ("action_dict/gripper_position", "identity"),
    )
    return c
