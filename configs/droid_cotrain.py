"""The paper's co-training: DROID episodes of one lab with actions, those of all others as video without actions.

Command:
    python -m data_prep.reshard --input=DROID_TFDS_DIR --output=$UWM_DATA_DIR/droid
    python -m uwm_jax.train --config=configs/droid_cotrain.py --workdir=runs/droid_cotrain
    python -m uwm_jax.train --config=configs/droid_cotrain.py:official --workdir=runs/droid_cotrain_official

Hardware: as `configs/droid.py`, whose model, batch and schedule this is: accelerators, with a global batch of 144.

Data: the source `robot` is the successful episodes whose `recording_folderpath` contains "WEIRD", the source `video`
the successful ones whose does not. `:official` takes at most 2,000 of each kind, successful or not, and else what
`configs/droid.py:official` does. Rows of `video` have `action_mask` False: their action sits at the noisiest timestep,
and the loss on it follows `config.loss.action_free`, which keeps it with epsilon, as the official code does. The
normaliser is that of `robot`, and so are all held-out windows. Both sources give half of the samples. The official code
draws in proportion to sizes, which is half and half too for 2,000 of each; all of DROID has many more episodes without
"WEIRD" than with it.
`--config.data.sources.video.weight=3` and the like may also change when a run continues. The first lines of a run say
how many episodes were found.

Expect: 384.92 M parameters in the network, 11.57 M in the image encoder and 83.65 M in the frozen VAE, and a first
loss of 2.0 (1 for each modality, since both outputs start at zero). The paper trains for 100,000 steps.
"""

from ml_collections import ConfigDict

from configs import droid
from uwm_jax.config import source

data_sizes = droid.data_sizes


def get_config(episodes: str = "successes") -> ConfigDict:
    c = droid.get_config(episodes)
    del c.data.sources["droid"]
    official = episodes == "official"
    some = {"max_episodes": 2_000} if official else {"include": (droid.SUCCESS,)}
    c.data.sources.robot = source(weight=0.5, **some)
    c.data.sources.robot.include += (droid.LAB,)
    c.data.sources.video = source(weight=0.5, use_actions=False, exclude=(droid.LAB,), **some)
    return c
