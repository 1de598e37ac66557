"""The paper's pretraining for LIBERO: 90 tasks of 50 demonstrations, two cameras, raw 7-d actions.

Command:
    python -m data_prep.reshard --input=LIBERO90_TFDS_DIR --output=$UWM_DATA_DIR/libero90
    python -m uwm_jax.train --config=configs/libero90.py --workdir=runs/libero90

The keys are those of the RLDS that is commonly built of LIBERO: `image` (the scene), `wrist_image`, and `action`, which
is the controller's command as recorded, within [-1, 1]; nothing is normalised. For a dataset with the original names,
such as `data_prep.hdf5` makes of LIBERO's own files:
    --config.data.cameras=agentview_rgb,eye_in_hand_rgb
Frames of any size will do, 128x128 as rendered by LIBERO or 256x256 as in the common RLDS. But look at them with
`data_prep.inspect`: LIBERO stores frames upside down, the common RLDS turned by 180 degrees; `data_prep.hdf5` makes
them upright, and the official code trains on upright ones. A simulator, or a checkpoint to finetune, has to see the
same.

Hardware: accelerators; the global batch of 144 (36 on each of 4 devices in the paper) spreads over all that are there.
The VAE (stabilityai/sdxl-vae) and ImageNet weights come from the hub at the first start.

Expect: 297.59 M parameters in the network, 11.57 M in the image encoder and 83.65 M in the frozen VAE; a first loss of
2.0. The paper trains for 100,000 steps, then finetunes on each task (`configs/libero_finetune.py`).
"""

from typing import Any

from ml_collections import ConfigDict

from uwm_jax.config import base


def get_config() -> ConfigDict:
    c = base()
    c.total_steps = 100_000
    c.batch_size = 144
    c.model.dtype = c.model.codec.dtype = "bfloat16"
    c.model.num_registers = 24
    c.model.encoder.imagenet_weights = "timm/resnet18.tv_in1k"
    c.data.path = "libero90"
    c.data.cameras = ("image", "wrist_image")
    c.data.action = (("action", "identity"),)
    c.data.normalize = "none"
    c.data.resize = (240, 240)
    return c


def data_sizes() -> dict[str, Any]:
    """As LIBERO renders frames; the common RLDS has 256 x 256."""
    frame = (128, 128)
    cameras = dict.fromkeys(("image", "wrist_image", "agentview_rgb", "eye_in_hand_rgb"), frame)
    return {**cameras, "state": 8, "action": 7}
