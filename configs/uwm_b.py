"""The paper's model for a long run on accelerators: 12 layers of width 768, the smallest of four sizes.

Command:
    python -m data_prep.reshard --input=DROID_TFDS_DIR --output=$UWM_DATA_DIR/droid
    python -m uwm_jax.train --config=configs/uwm_b.py --workdir=runs/uwm_b
    python -m uwm_jax.plan --config=configs/uwm_b.py --topology=v5e-16

Data, frames and VAE are those of `configs/droid.py`, whose argument `:official` works here too. The four sizes,
`uwm_b`, `uwm_l`, `uwm_xl` and `uwm_7b`, differ in width, depth and number of heads (64 channels each), and in what
makes them fit: `mesh.fsdp` and `model.remat`. `sized` is what they share:

- 256 rows a step at a learning rate of 1e-4, which Peebles and Xie (2023) use for every size of DiT; 256 devices at
  most share them.
- `schedule=wsd`: 1,000 steps of warm-up, then constant, and a decay over the last 20,000 of 100,000 steps, the fifth
  with which Haegele et al. (2024) match a cosine. A longer run goes on from before the decay (docs/training.md, "Long
  runs").
- Products in bfloat16; parameters, moments, norms, softmax and losses in float32; the gradient's norm is clipped at 1.
- `remat=dots` keeps the products of the dense layers and computes the rest again.

Hardware: accelerators, any number that divides 256. Parameters and moments take 4.8 GB on each (12 bytes a parameter),
so nothing but the batch is cut (`mesh.data`).

Expect: 384.92 M parameters in the network, 283.17 M of them in the AdaLN layers of its blocks, 11.57 M in the image
encoder and 83.65 M in the frozen VAE, and a first loss of 2.0. Nobody has trained it at this batch size.

Planned, predicted and never run (docs/scale.md):

    64 chips  GB of limit     ms at best  estimate  chip-hours at best  estimate
    v4-128    8.21 of 33.02   25.9        87.4      46                  155
    v5e-64    8.26 of 16.91   38.5        119.6     69                  213
    v5p-128   8.31 of 102.79  13.8        48.2      25                  86
    v6e-64    8.30 of 33.54   19.5        57.3      35                  102
"""

from ml_collections import ConfigDict

from configs import droid

data_sizes = droid.data_sizes


def get_config(episodes: str = "successes") -> ConfigDict:
    return sized(768, 12, episodes)


def sized(width: int, depth: int, episodes: str) -> ConfigDict:
    """A long run of a model of this width and depth; a larger one cuts its state as well."""
    c = droid.get_config(episodes)
    c.batch_size = 256
    c.total_steps = 100_000
    c.model.embed_dim, c.model.depth, c.model.num_heads = width, depth, width // 64
    c.model.remat = "dots"
    c.optimizer.schedule = "wsd"
    c.optimizer.warmup_steps = 1_000
    c.optimizer.decay_steps = 20_000
    c.optimizer.clip_norm = 1.0
    return c
