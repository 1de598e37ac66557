"""The paper's model with one camera and two rows, in float32: the yardstick of the speed next to PyTorch.

Command:
    python -m uwm_jax.benchmark_step --config=configs/benchmark_one_camera.py --frame_size=180,320 --steps=7 \
        --part=latents,pixels,network,encoder,codec,preprocessing,policy,forward_dynamics \
        --memory=network/forward_backward,policy,pixels/step

Frames are as DROID stores them, 180 x 320, resized to 240 x 320 and cropped to 224 x 224. Everything else is the
default: 12 layers of width 768, 2 + 2 frames, 16 actions, SDXL's VAE.

Hardware: two CPU cores and 16 GB of memory.

Expect: docs/benchmarks.md has the table.
"""

from typing import Any

from ml_collections import ConfigDict

from uwm_jax.config import base


def get_config() -> ConfigDict:
    c = base()
    c.batch_size = 2
    c.data.cameras = ("exterior_image_1_left",)
    return c


def data_sizes() -> dict[str, Any]:
    """Frames as DROID stores them."""
    return {"exterior_image_1_left": (180, 320), "action": 10}
