"""Files of caches that several processes write at once."""

from __future__ import annotations

import collections
import concurrent.futures
import shutil
import threading
from pathlib import Path

import numpy as np

from data_prep.caches.latents.files import finish_caches, layout_of, parts_left, random_blocks, write_caches
from tests.data_prep.killing import tree
from uwm_jax.data.records import Dataset

CAMERAS = ("observation/exterior", "observation/wrist")
FIELDS = {"codec": "vae", "latent": (2, 2, 4), "moments": False, "dtype": "float16", "variants": 2}


def test_a_part_that_two_shares_have_is_made_once(tiny_dataset: Path, tmp_path: Path) -> None:
    dataset = Dataset(shutil.copytree(tiny_dataset, tmp_path / "data"))
    fields = {key: {**FIELDS, "camera": key, "steps_per_part": 30} for key in CAMERAS}
    episodes = np.arange(dataset.num_episodes)
    layout = layout_of(dataset, fields[CAMERAS[0]], episodes)
    parts, random, made = range(len(layout.parts)), random_blocks(CAMERAS), collections.Counter[int]()
    assert len(parts) > 2
    both_started = threading.Barrier(2, timeout=60)

    def share(order: list[int]) -> list:
        def blocks(layout, part):
            made[part] += 1
            if part in (parts[0], parts[-1]):
                both_started.wait()  # each is in a part of its own
            yield from random(layout, part)

        return write_caches(dataset, fields, episodes, blocks, command="again", share=order, say=lambda line: None)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        shares = [pool.submit(share, list(order)) for order in (parts, reversed(parts))]
        assert [one.result() for one in shares] == [[], []]
    assert made == dict.fromkeys(parts, 1)
    assert parts_left(dataset, fields, layout) == []
    found = [tree(cache.directory) for cache in finish_caches(dataset, fields, episodes, command="again")]
    write_caches(dataset, fields, episodes, random, command="again", overwrite=True, say=lambda line: None)
    assert [tree(dataset.directory / f"latents/vae/{key.split('/')[1]}/{dataset.split}") for key in CAMERAS] == found
