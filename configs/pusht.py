"""PushT at 96 pixels for one accelerator, with the paper's parameterisation: noise prediction, and latents of the VAE.
In PushT a blue disc has to push a grey T onto the green one, and an action is the position that the disc is sent to.

Command:
    python -m data_prep.demo --episodes=1000 --image_size=96 --output=${UWM_DATA_DIR:-data}/pusht_96
    python -m uwm_jax.train --config=configs/pusht.py --workdir=runs/pusht
    python -m uwm_jax.evaluate --workdir=runs/pusht
    python -m uwm_jax.rollout --workdir=runs/pusht --env=pusht --episodes=50

The VAE (stabilityai/sdxl-vae) comes from the hub at the first start; `--config.model.codec.vae=DIR` takes a local one.
`configs/pusht.py:pixels` diffuses the frames themselves and needs no weights.

Hardware: one accelerator. `python -m uwm_jax.benchmark_step --config=configs/pusht.py` tells what a step costs on a
machine, without data or weights.

Expect: a first loss of 2.0 (1 for each modality, since both outputs start at zero). Not trained to the end yet, so
there are no numbers to compare with.
"""

from typing import Any

from ml_collections import ConfigDict

from uwm_jax.config import base

CODECS = {"latents": "vae", "pixels": "pixels"}


def get_config(codec: str = "latents") -> ConfigDict:
    if codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}, expected one of {', '.join(CODECS)}")
    c = base()
    c.total_steps = 100_000
    c.batch_size = 128
    c.checkpoint.every = 5_000
    c.eval.every = 5_000
    c.eval.action_plane = ("image", 0.0, 512.0, 0.0, 512.0)  # actions are positions on the table

    # A third of the paper's network. 12 x 12 latents in patches of 2 x 2, or 96 x 96 pixels in patches of 12 x 12:
    # 36 or 64 video tokens.
    c.model.embed_dim = 384
    c.model.depth = 8
    c.model.num_heads = 6
    c.model.timestep_embed_dim = 256
    c.model.patch = (2, 2, 2) if codec == "latents" else (2, 12, 12)
    c.model.encoder.use_low_dim = True
    c.model.encoder.pool = "flatten"
    c.model.codec.name = CODECS[codec]
    c.model.dtype = c.model.codec.dtype = "bfloat16"

    c.diffusion.hide_at = "train"  # decides how well configs/pusht_cpu.py acts (docs/benchmarks.md)

    c.data.path = "pusht_96"
    c.data.cameras = ("image",)
    c.data.low_dim = ("agent_pos",)
    c.data.resize = c.data.crop = (96, 96)
    c.data.augment.random_crop = False  # actions are positions in the frame
    c.data.augment.brightness = c.data.augment.contrast = c.data.augment.saturation = c.data.augment.hue = 0.0

    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 500
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.999
    return c


def data_sizes() -> dict[str, Any]:
    """As the command above makes them."""
    return {"image": (96, 96), "agent_pos": 2, "action": 2}
