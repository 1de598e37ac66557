"""A small model on WidowX (Bridge) episodes in RLDS, with language and a window that fits 10-step episodes.

Command:
    python -m data_prep.reshard --input=BRIDGE_TFDS_DIR --output=$UWM_DATA_DIR/bridge
    python -m uwm_jax.train --config=configs/bridge.py --workdir=runs/bridge

Hardware: a CPU is enough for 64-pixel frames. For the full dataset (256 pixels, long episodes) reshard with
`--codec_size=64,64` and lengthen the window:
    --config.data.window.action=1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16 --config.data.window.next_obs=17,18

Expect: 14.46 M parameters in the network and 1.62 M in the image encoder. On 25 real episodes of 10 steps (24 of them
for training) and two CPU cores, 42 to 45 samples a second, and a loss that falls from 1.75 to 0.65 in 50 steps with
`--config.total_steps=50`; so few episodes are learned by heart, which tests the path and not the method.
"""

from typing import Any

from ml_collections import ConfigDict

from uwm_jax.config import base


def get_config() -> ConfigDict:
    c = base()
    c.total_steps = 5_000
    c.batch_size = 32
    c.log_every = 10
    c.checkpoint.every = 1_000

    c.model.embed_dim = 256
    c.model.depth = 6
    c.model.num_heads = 4
    c.model.num_registers = 4
    c.model.timestep_embed_dim = 128
    c.model.patch = (2, 2, 2)
    c.model.encoder.stage_sizes = (1, 1, 1, 1)
    c.model.encoder.width = 32
    c.model.encoder.pool = "flatten"
    c.model.encoder.use_low_dim = True
    c.model.encoder.use_language = True
    c.model.codec.name = "pca"

    c.diffusion.prediction.action = c.diffusion.prediction.next_obs = "sample"

    c.data.path = "bridge"
    c.data.cameras = ("image_0",)
    c.data.low_dim = ("state",)
    c.data.text = "language_embedding"
    c.data.action = (("action", "identity"),)
    c.data.normalize = "quantile"  # deltas with rare large values
    c.data.window.action = (1, 2, 3, 4)
    c.data.window.next_obs = (5, 6)
    c.data.resize = c.data.crop = (64, 64)
    c.data.augment.random_crop = False

    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 50
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.99
    return c


def data_sizes() -> dict[str, Any]:
    """As the 10-step episodes have them; Bridge's own frames are 256 x 256."""
    return {"image_0": (64, 64), "state": 7, "action": 7, "language_embedding": 512}
