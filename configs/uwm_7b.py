"""A model of 6.74 B parameters: 32 layers of width 2048, with what `configs/uwm_b.py` says of all four sizes.

Command:
    python -m data_prep.reshard --input=DROID_TFDS_DIR --output=$UWM_DATA_DIR/droid
    python -m uwm_jax.train --config=configs/uwm_7b.py --workdir=runs/uwm_7b
    python -m uwm_jax.plan --config=configs/uwm_7b.py --topology=v5p-128

Hardware: accelerators in multiples of 16, at most 256: parameters and moments take 81.0 GB (12 bytes a parameter), of
which each device of `mesh.fsdp=16` holds a sixteenth. On a 4x4x4 torus 16
is better than 64, whose gathers TPU compilers turn into sums of twice the bytes. `remat=full` computes whole blocks
again.

Expect: 6,739.17 M parameters in the network, 5,033.56 M of them in the AdaLN layers of its blocks, 12.23 M in the
image encoder and 83.65 M in the frozen VAE, and a first loss of 2.0. Nobody has trained it yet.

Planned, predicted and never run (docs/scale.md):

    64 chips  GB of limit     ms at best  estimate  chip-hours at best  estimate
    v4-128    9.06 of 33.02   54.7        202.2     97                  360
    v5e-64    9.50 of 16.91   84.4        231.8     150                 412
    v5p-128   9.21 of 102.79  31.8        108.5     57                  193
    v6e-64    9.16 of 33.54   42.2        121.7     75                  216
"""

from ml_collections import ConfigDict

from configs import uwm_b

data_sizes = uwm_b.data_sizes


def get_config(episodes: str = "successes") -> ConfigDict:
    c = uwm_b.sized(2048, 32, episodes)
    c.mesh.fsdp = 16
    c.model.remat = "full"
    return c
