"""A model of 1.31 B parameters: 24 layers of width 1024, with what `configs/uwm_b.py` says of all four sizes.

Command:
    python -m data_prep.reshard --input=DROID_TFDS_DIR --output=$UWM_DATA_DIR/droid
    python -m uwm_jax.train --config=configs/uwm_l.py --workdir=runs/uwm_l
    python -m uwm_jax.plan --config=configs/uwm_l.py --topology=v5e-16

Hardware: accelerators in multiples of 16, at most 256: parameters and moments take 15.9 GB (12 bytes a parameter), of
which each device of `mesh.fsdp=16` holds a sixteenth. `--config.mesh.fsdp=N` takes another number.

Expect: 1,310.58 M parameters in the network, 981.61 M of them in the AdaLN layers of its blocks, 11.70 M in the
image encoder and 83.65 M in the frozen VAE, and a first loss of 2.0. Nobody has trained it yet.

Planned, predicted and never run (docs/scale.md):

    64 chips  GB of limit     ms at best  estimate  chip-hours at best  estimate
    v4-128    3.99 of 33.02   23.9        81.2      42                  144
    v5e-64    4.05 of 16.91   33.3        92.9      59                  165
    v5p-128   4.00 of 102.79  14.3        46.4      25                  83
    v6e-64    4.01 of 33.54   11.2        43.1      20                  77
"""

from ml_collections import ConfigDict

from configs import uwm_b

data_sizes = uwm_b.data_sizes


def get_config(episodes: str = "successes") -> ConfigDict:
    c = uwm_b.sized(1024, 24, episodes)
    c.mesh.fsdp = 16
    return c
