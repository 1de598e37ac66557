"""The paper's finetuning on one LIBERO-10 task: 50 demonstrations, from the model of `configs/libero90.py`.

Command:
    python -m data_prep.reshard --input=LIBERO10_TFDS_DIR --output=$UWM_DATA_DIR/libero10
    python -m uwm_jax.train --config=configs/libero_finetune.py:book_caddy --workdir=runs/libero_book_caddy \\
        --config.init_from=runs/libero90

The argument is one of book_caddy, soup_cheese, bowl_drawer, moka_moka, mug_mug. Its episodes are those whose file path
names the task; a dataset that keeps the path elsewhere, or holds one task only, says so:
    --config.data.sources.task.path_key=episode_metadata/KEY    --config.data.sources.task.include="()"
`init_from` is a workdir, or DIR@STEP; an official checkpoint becomes one by `python -m uwm_jax.convert from-torch`.
Keys and frames are those of `configs/libero90.py`. The released single-task checkpoint has
`--config.model.num_registers=8`.

Hardware: accelerators; the global batch of 72 (36 on each of 2 devices in the paper) spreads over all that are there.
Nothing comes from the hub: VAE and image encoder are the origin's.

Expect: the losses to start near where pretraining ended. The paper reports success rates of .91 (book_caddy), .93, .80,
.68 and .65 after 20,000 steps, on randomised initial states.
"""

from ml_collections import ConfigDict

from configs import libero90
from uwm_jax.config import source

# Part of the path of a task's demonstrations.
TASKS = {
    "book_caddy": "STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy",
    "soup_cheese": "LIVING_ROOM_SCENE1_put_both_the_alphabet_soup_and_the_cream_cheese_box_in_the_basket",
    "bowl_drawer": "KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet_and_close_it",
    "moka_moka": "KITCHEN_SCENE8_put_both_moka_pots_on_the_stove",
    "mug_mug": "LIVING_ROOM_SCENE5_put_the_white_mug_on_the_left_plate_and_put_the_yellow_and_white_mug_on_the_right",
}


data_sizes = libero90.data_sizes


def get_config(task: str = "book_caddy") -> ConfigDict:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
    c = libero90.get_config()
    c.init_from = "runs/libero90"
    c.total_steps = 20_000
    c.batch_size = 72
    c.model.encoder.imagenet_weights = ""
    c.data.path = "libero10"
    c.data.sources.task = source(include=(TASKS[task],))
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 1_000
    c.optimizer.clip_norm = 1.0
    return c
