"""The paper's co-training: DROID episodes of one lab with actions, those of all others as video without actions.

Command:
    python -m data_prep.reshard --input=DROID_TFDS_DIR --output=$UWM_DATA_DIR/droid
    python -m uwm_jax.train --config=configs/droid_cotrain.py --workdir=runs/droid_cotrain

Hardware: as `configs/droid.py`, whose model, batch and schedule this is: accelerators, with a global batch of 144.

Data: the source `robot` is the episodes whose recording path contains "WEIRD", the source `video` those whose path does
not. Rows of `video` have `action_mask` False: their action sits at the noisiest timestep, and the loss on it follows
`config.loss.action_free` (the official code keeps it). The normaliser is that of `robot`, and so are all held-out
windows. Both sources give half of the samples. The official code draws in proportion to sizes, but from at most 2,000
episodes of each kind, which is half and half too; all of DROID, which is used here, has many more episodes without
"WEIRD" than with it. `--config.data.sources.video.weight=3` and the like may also change when a run continues.

Expect: 384.92 M parameters in the network, 11.57 M in the image encoder and 83.65 M in the frozen VAE, and a first
loss of 2.0 (1 for each modality, since both outputs start at zero). The paper trains for 100,000 steps.
"""

from ml_collections import ConfigDict

from configs import droid
from uwm_jax.config import source


def get_config() -> ConfigDict:
    c = droid.get_config()
    path = "episode_metadata/recording_folderpath"
    c.data.sources.robot = source(include=("WEIRD",), path_key=path, weight=0.5)
    c.data.sources.video = source(exclude=("WEIRD",), path_key=path, weight=0.5, use_actions=False)
    return c
