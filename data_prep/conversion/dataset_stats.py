"""`stats.json` of a training dataset: the statistics of its low-dimensional columns over all episodes of a split."""

from __future__ import annotations

import json

from uwm_jax.data.records import Dataset, read_manifest
from uwm_jax.data.stats import Stats, dataset_stats
from uwm_jax.files import AnyPath, as_place, write_text

STATS_FILE = "stats.json"
EPISODES = "all episodes of each split, held-out ones included; actions without those where is_last is true"


def write_stats(directory: AnyPath) -> dict[str, dict[str, Stats]]:
    """Writes `stats.json`: {"fingerprint": of the manifest, "episodes": a description, "splits": {split: {step key:
    statistics}}}.

    Statistics are those of `uwm_jax.data.stats.dataset_stats`.

    Returns:
        The "splits" entry.
    Raises:
        UserError: the directory is not a training dataset.
    """
    datasets = [Dataset(directory, split) for split in read_manifest(directory)["splits"]]
    splits = {dataset.split: dataset_stats(dataset) for dataset in datasets}
    described = {"fingerprint": datasets[0].fingerprint, "episodes": EPISODES, "splits": splits}
    write_text(as_place(directory) / STATS_FILE, json.dumps(described, indent=1))
    return splits
