"""How fast RLDS episodes are cut whose images are copied, for `data_prep.benchmark`."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from data_prep.conversion.cutting import Job, run_task
from data_prep.conversion.layout_options import Options
from data_prep.sources.rlds import corpus
from uwm_jax.data.chunks import camera_features, plan_layout


def mb_per_s_per_core(source: Path, parts: Path, rounds: int = 3) -> float:
    """Megabytes (10^6 bytes) of RLDS per second of one core's time: the median over `rounds` of all files.

    The time is that of this process, in all its threads: reading, cutting, checksums, and writing shards and columns.

    Args:
        source: an RLDS dataset whose `features.json` specifies the cameras' sizes.
        parts: an empty folder for what is cut.
    """
    opened = corpus(source)
    sizes = {key: feature.shape[:2] for key, feature in camera_features(opened.features).items() if feature.shape}
    layout = plan_layout(opened.features, Options.chunk_steps, {key: (size[0], size[1]) for key, size in sizes.items()})
    inputs = [part for split in opened.splits.values() for part in split]
    speeds = []
    for number in range(rounds):
        jobs = [Job(f"{number}", i, part, layout, Options.shard_mb << 20, parts) for i, part in enumerate(inputs)]
        start = time.process_time()
        for job in jobs:
            run_task(job)
        speeds.append(sum(part.size for part in inputs) / 1e6 / (time.process_time() - start))
    return statistics.median(speeds)
