"""Computes the statistics of a training dataset's low-dimensional columns: `stats.json`.

    python -m data_prep.stats --dataset=DIR     (or its name in $UWM_DATA_DIR)

Reads only columns, no records or images, so it takes seconds. `data_prep.reshard` has already computed them; this
command computes them again, prints them, and warns of constant dimensions and of values that are not finite.

The statistics are over all episodes of a split, without the actions of last steps that `is_last` marks, which RLDS
leaves undefined. The normaliser of a run does not use them: it is fitted on the run's own training episodes
(`uwm_jax.data.stats.key_stats`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from absl import flags

from data_prep.conversion.dataset_stats import EPISODES, STATS_FILE, write_stats
from uwm_jax import cli
from uwm_jax.data.normalize import is_constant
from uwm_jax.data.places import find_dataset
from uwm_jax.data.selection import some_episodes
from uwm_jax.data.stats import Stats

FLAGS = flags.FLAGS


def table(stats: dict[str, Stats]) -> str:
    """Statistics of one split as text, one line per dimension."""
    lines = [f"{'key':<40}{'min':>11}{'q01':>11}{'mean':>11}{'q99':>11}{'max':>11}{'std':>11}"]
    for key, s in stats.items():
        for i in range(len(s.get("min", []))):
            name = f"{key}[{i}]" if len(s["min"]) > 1 else key
            numbers: list[Any] = [s[field][i] for field in ("min", "q01", "mean", "q99", "max", "std")]
            lines.append(f"{name:<40}" + "".join(f"{n:>11.4g}" for n in numbers))
    return "\n".join(lines)


def warnings(stats: dict[str, Stats]) -> list[str]:
    """Warnings about one split, one line per key: constant dimensions (as the normaliser defines them) and values that
    are not finite."""
    lines = []
    for key, s in stats.items():
        found = []
        low, high = np.asarray(s.get("min", [])), np.asarray(s.get("max", []))
        constant = np.flatnonzero(is_constant(low, high))
        if len(constant):
            what = "constant" if len(low) == 1 else f"{len(constant)} of {len(low)} dimensions are constant"
            found.append(f"{what} ({', '.join(f'[{i}] = {low[i]:g}' for i in constant)})")
        if s["nonfinite"]:
            where = some_episodes(s["nonfinite_episodes"])
            found.append(f"{s['nonfinite']} of {s['count']} steps are NaN or infinite, in {where}")
        if found:
            lines.append(f"warning: {key}: {'; '.join(found)}")
    return lines


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "training dataset: a directory, or its name in $UWM_DATA_DIR")


def main(call: cli.Call) -> None:
    directory = find_dataset(cli.required("dataset"))
    for split, stats in write_stats(directory).items():
        steps = max((s["count"] for s in stats.values()), default=0)
        print("\n".join([f"{split}: {steps} steps of {EPISODES}", table(stats), *warnings(stats)]))
    print(f"wrote {directory / STATS_FILE}")


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
