"""Computes the statistics of a training dataset's low-dimensional columns: `stats.json`.

    python -m data_prep.stats --dataset=DIR

Reads the columns only, no record and no image, so it takes seconds. `data_prep.reshard` has already done
it; this computes them again and shows them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from absl import flags

from uwm_jax import cli
from uwm_jax.data.records import Dataset, read_manifest
from uwm_jax.data.stats import STATS_FILE, Stats, dataset_stats, write_json
from uwm_jax.errors import UserError

FLAGS = flags.FLAGS


def write_stats(directory: str | os.PathLike[str]) -> dict[str, dict[str, Stats]]:
    """Writes `stats.json`: {"fingerprint": of the manifest, "splits": {split: {step key: statistics}}}.

    Statistics are those of `uwm_jax.data.stats.column_stats`, over all steps of the split.

    Returns:
        The "splits" entry.
    Raises:
        UserError: the directory is not a training dataset.
    """
    datasets = [Dataset(directory, split) for split in read_manifest(directory)["splits"]]
    splits = {dataset.split: dataset_stats(dataset) for dataset in datasets}
    write_json(Path(directory) / STATS_FILE, {"fingerprint": datasets[0].fingerprint, "splits": splits})
    return splits


def table(stats: dict[str, Stats]) -> str:
    """Statistics of one split as text, one line per dimension."""
    lines = [f"{'key':<40}{'min':>11}{'q01':>11}{'mean':>11}{'q99':>11}{'max':>11}{'std':>11}"]
    for key, s in stats.items():
        for i in range(len(s.get("min", []))):
            name = f"{key}[{i}]" if len(s["min"]) > 1 else key
            numbers: list[Any] = [s[field][i] for field in ("min", "q01", "mean", "q99", "max", "std")]
            lines.append(f"{name:<40}" + "".join(f"{n:>11.4g}" for n in numbers))
        if s["nonfinite"]:
            lines.append(f"{key}: {s['nonfinite']} of {s['count']} steps are NaN or infinite")
    return "\n".join(lines)


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "directory of a training dataset, as data_prep.reshard makes it")


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(f"unexpected argument {argv[0]!r}: flags are written --flag=value.")
    directory = cli.required("dataset")
    for split, stats in write_stats(directory).items():
        print(f"{split}: {max((s['count'] for s in stats.values()), default=0)} steps\n{table(stats)}")
    print(f"wrote {Path(directory) / STATS_FILE}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
