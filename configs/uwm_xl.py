"""A model of 1.92 B parameters, as wide and deep as DiT-XL: 28 layers of width 1152, with what
`configs/uwm_b.py` says of all four sizes.

Command:
    python -m data_prep.reshard --input=DROID_TFDS_DIR --output=$UWM_DATA_DIR/droid
    python -m uwm_jax.train --config=configs/uwm_xl.py --workdir=runs/uwm_xl
    python -m uwm_jax.plan --config=configs/uwm_xl.py --topology=v5e-16

Hardware: accelerators in multiples of 16, at most 256: parameters and moments take 23.1 GB (12 bytes a parameter), of
which each device of `mesh.fsdp=16` holds a sixteenth. `--config.mesh.fsdp=N` takes another number.

Expect: 1,916.01 M parameters in the network, 1,437.00 M of them in the AdaLN layers of its blocks, 11.77 M in the
image encoder and 83.65 M in the frozen VAE, and a first loss of 2.0. Nobody has trained it yet.

Planned, predicted and never run (docs/scale.md):

    64 chips  GB of limit     ms at best  estimate  chip-hours at best  estimate
    v4-128    4.59 of 33.02   26.1        97.8      46                  174
    v5e-64    4.66 of 16.91   36.5        108.9     65                  194
    v5p-128   4.69 of 102.79  15.7        56.4      28                  100
    v6e-64    4.64 of 33.54   12.6        51.7      22                  92
"""

from ml_collections import ConfigDict

from configs import uwm_b

data_sizes = uwm_b.data_sizes


def get_config(episodes: str = "successes") -> ConfigDict:
    c = uwm_b.sized(1152, 28, episodes)
    c.mesh.fsdp = 16
    return c
