"""The chunked training layout that `uwm_jax.data` reads, made of an RLDS dataset.

Episodes are cut into records; encoded images and all other values keep their bytes. `uwm_jax.data.records` describes
the layout. Finally the statistics are computed and the PCA image codec is fitted on training episodes, so that the
dataset is ready to train on.
"""

from __future__ import annotations

import collections
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep import rlds
from data_prep.assemble import assemble, check_files
from data_prep.chunks import EpisodeError, camera_features, frame_size, plan_layout
from data_prep.codec import check_options, common_size, fit_codec, why_not_fitted
from data_prep.cutting import Job, Result, run_jobs
from data_prep.dataset_stats import write_stats
from data_prep.output import building, check_output, warn_of_space
from data_prep.source_files import read_records
from uwm_jax.data import records
from uwm_jax.data.records import Dataset
from uwm_jax.errors import RunError, UserError
from uwm_jax.reading import read_json

MAX_SKIPPED = 0.01
_SIZED_EPISODES = 64  # read to find the size of a camera that features.json does not specify
_NOTES = 5  # about skipped episodes, in the error message


def reshard(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    splits: Sequence[str] = (),
    chunk_steps: int = 16,
    shard_mb: int = 256,
    codec_size: tuple[int, int] | None = None,
    pca_patch: int = 8,
    pca_channels: int = 12,
    val_ratio: float = 0.05,
    workers: int = 0,
    overwrite: bool = False,
    max_skipped: float = MAX_SKIPPED,
) -> dict[str, Any]:
    """Makes the training dataset `output` from the RLDS dataset `source`, completely or not at all.

    Args:
        splits: names of the splits to take; all if empty.
        chunk_steps: steps per record; shard_mb: size at which a new shard begins.
        codec_size: (height, width) at which the PCA codec is fitted; None: the cameras' own.
        pca_patch, pca_channels: side of its patches in pixels, and latent channels.
        val_ratio: share of episodes held out from the codec's fit (`config.data.val_ratio`).
        workers: processes (one per core if 0); each reads its own input files.
        overwrite: replace an existing output.
        max_skipped: largest share of episodes that may be skipped, in each split and overall; one is always allowed.
    Returns:
        The manifest.
    Raises:
        UserError: an invalid option, an unreadable source, an output that exists or (with `overwrite`) is not a
            training dataset, or source and output inside each other.
        RunError: more than `max_skipped` was skipped; no output is left.
    """
    source, output = Path(source), Path(output)
    check_options(codec_size, pca_patch, pca_channels, val_ratio)
    if not 0 <= max_skipped <= 1:  # false for NaN too
        raise UserError(f"--max_skipped={max_skipped}: expected a share of the episodes, 0 <= share <= 1.")
    check_output(output, is_training_dataset, "a training dataset", overwrite=overwrite, source=source)
    if (source / "manifest.json").exists():
        raise UserError(
            f"{source} is already in the training layout. Expected as --input the RLDS dataset it was made from."
        )
    opened = rlds.open_source(source, splits)
    unknown = set(splits) - set(opened.splits)
    if unknown:
        raise UserError(f"{source}: no split {sorted(unknown)[0]!r}; it has {', '.join(sorted(opened.splits))}.")
    chosen = {split: files for split, files in opened.splits.items() if split in splits or not splits}
    layout = plan_layout(opened.features, chunk_steps, _camera_sizes(opened, chosen))
    check_files(layout, chosen, source / "features.json")
    warn_of_space(
        output, sum(file.stat().st_size for files in chosen.values() for file in files), f"the input {source}"
    )

    with building(output) as new:
        jobs = [
            Job(split, i, file, promised, opened.file_format, layout, shard_mb << 20, new)
            for split, files in chosen.items()
            for i, (file, promised) in enumerate(zip(files, opened.lengths[split], strict=True))
        ]
        limit = _SkipLimit(max_skipped, [opened.totals[split] for split in chosen])
        results = run_jobs(jobs, workers or os.cpu_count() or 1, limit.watch)
        by_split = {split: [r for job, r in zip(jobs, results, strict=True) if job.split == split] for split in chosen}
        for split, parts in by_split.items():
            if None in opened.lengths[split]:
                found = sum(part.episodes for part in parts)
                parts[0].count_missing(f"split {split!r}", found, opened.totals[split])
        limit.check(by_split)
        manifest = assemble(new, opened, layout, by_split)
        _derive(new, manifest, codec_size, pca_patch, pca_channels, val_ratio)
    return manifest


class _SkipLimit:
    """Ends the job if more than a share of the episodes is skipped; one is always allowed.

    Args:
        totals: number of episodes that each split declares; None if it declares none.
    """

    def __init__(self, share: float, totals: Sequence[int | None]):
        self._share = share
        self._promised = None if any(n is None for n in totals) else sum(n or 0 for n in totals)
        self._seen: list[Result] = []

    def watch(self, result: Result) -> None:
        """Takes the result of a file; ends the job as soon as the share is exceeded; other files cannot change that."""
        self._seen.append(result)
        if self._promised is not None:
            self._check("", self._seen, max(self._promised, sum(r.episodes for r in self._seen)))

    def check(self, by_split: Mapping[str, Sequence[Result]]) -> None:
        """Checks each split, and all splits together, after all files are read."""
        for split, parts in by_split.items():
            self._check(f" of split {split!r}", parts, sum(r.episodes for r in parts))
        everything = [r for parts in by_split.values() for r in parts]
        self._check("", everything, sum(r.episodes for r in everything))

    def _check(self, of: str, results: Sequence[Result], total: int) -> None:
        reasons: collections.Counter[str] = sum((r.skipped for r in results), collections.Counter())
        skipped = reasons.total()
        if skipped <= max(1, self._share * total):
            return
        counts = "\n".join(f"  {count} x {reason}" for reason, count in reasons.most_common())
        notes = "\n".join(f"    {note}" for r in results for note in r.notes[:_NOTES])
        share = min(1.0, math.ceil(100 * skipped / total) / 100)
        at_least, more = "", ""
        if sum(r.episodes for r in results) < total:
            at_least, more = "at least ", ", or more: not all files were read"
        raise RunError(
            f"nothing was published: {at_least}{skipped} of {total} episodes{of} were skipped, more than "
            f"--max_skipped={self._share:g} allows:\n{counts}\n{_first_lines(notes, _NOTES)}\nRepair the source, or "
            f"accept the loss with --max_skipped={share:g}{more}."
        )


def _first_lines(text: str, count: int) -> str:
    lines = text.split("\n")
    return "\n".join(lines[:count] + (["    ..."] if len(lines) > count else []))


def is_training_dataset(directory: Path) -> bool:
    """Whether a directory is in the training layout, of this or another version."""
    try:
        manifest = read_json(directory / "manifest.json")
    except (OSError, UserError):
        return False
    return manifest.get("format") == records.FORMAT


def _camera_sizes(source: rlds.Source, splits: dict[str, list[Path]]) -> dict[str, tuple[int, int]]:
    """Sizes of the cameras; for one that features.json does not specify, the most frequent in the first episodes."""
    sizes: dict[str, tuple[int, int]] = {}
    votes: dict[str, collections.Counter[tuple[int, int]]] = {}
    for key, feature in camera_features(source.features).items():
        height, width = (feature.shape or (-1, -1))[:2]
        if height > 0 and width > 0:
            sizes[key] = (height, width)
        else:
            votes[key] = collections.Counter()
    if not votes:
        return sizes
    everything = (r for files in splits.values() for f in files for r, _, _ in read_records(f, source.file_format))
    for record in itertools.islice((r for r in everything if r is not None), _SIZED_EPISODES):
        for key, counter in votes.items():
            try:
                counter[frame_size(record, key)] += 1
            except EpisodeError:
                pass  # reported when the episode is cut
    unread = [key for key, counter in votes.items() if not counter]
    if unread:
        raise UserError(
            f"{source.path}: none of the first {_SIZED_EPISODES} episodes has readable images of {', '.join(unread)}, "
            "whose size features.json does not specify."
        )
    for key, counter in votes.items():
        sizes[key] = counter.most_common(1)[0][0]
        if len(counter) > 1:
            found = ", ".join(f"{h}x{w} in {n}" for (h, w), n in counter.most_common())
            print(f"{key}: images of several sizes ({found} of the first episodes); the first size is used.")
    return sizes


def _derive(
    directory: Path,
    manifest: dict[str, Any],
    codec_size: tuple[int, int] | None,
    patch: int,
    channels: int,
    val_ratio: float,
) -> None:
    """Computes statistics from the finished records, and fits the PCA codec on the `train` split, else the first."""
    write_stats(directory)
    dataset = Dataset(directory, "train" if "train" in manifest["splits"] else next(iter(manifest["splits"])))
    size = codec_size or common_size(dataset.cameras, patch)
    if not dataset.cameras or size is None:
        print(f"PCA codec: not fitted, because {why_not_fitted(dataset.cameras, patch)}.")
        return
    frames = fit_codec(dataset, directory / "codec" / "pca.npz", size, patch, channels, val_ratio)
    print(f"PCA codec: fitted at {size[0]}x{size[1]} on {frames} steps of training episodes.")


def summary(manifest: dict[str, Any]) -> str:
    """Text about the contents of a dataset and what was skipped when it was made."""
    lines = [f"{manifest['name']} {manifest['version']}, {manifest['chunk_steps']} steps per record"]
    for split, s in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in s["shards"]) / 1e6
        lines.append(
            f"  {split}: {s['episodes']} episodes, {s['steps']} steps, {s['chunks']} records in "
            f"{len(s['shards'])} shards, {size:.1f} MB; skipped: {sum(s['skipped'].values())}"
        )
        lines += [f"    {count} x {reason}" for reason, count in s["skipped"].items()]
        lines += [f"    {note}" for note in s["skipped_notes"]]
    cameras = [f"{k} {c['height']}x{c['width']}" for k, c in manifest["cameras"].items()]
    lines.append(f"  cameras: {', '.join(cameras) or 'none'}")
    columns = [f"{k} {v['shape']}" for k, v in manifest["step_features"].items() if v["column"]]
    lines.append(f"  columns: {', '.join(columns)}")
    unusable = manifest.get("unusable_keys", {})
    lines += ["  neither camera nor column:"] * bool(unusable) + [f"    {k}: {why}" for k, why in unusable.items()]
    return "\n".join(lines)
