"""The chunked training layout that `uwm_jax.data` reads, made of a corpus (`data_prep.inputs`).

Episodes are cut into records; encoded images and all other values keep their bytes. `uwm_jax.data.records` describes
the layout. Finally the statistics are computed and the PCA image codec is fitted on training episodes, so that the
dataset is ready to train on.
"""

from __future__ import annotations

import collections
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep import rlds
from data_prep.assemble import assemble, check_files
from data_prep.chunks import EpisodeError, camera_features, frame_size, plan_layout
from data_prep.codec import common_size, fit_codec, why_not_fitted
from data_prep.cutting import Job, Result, first_notes, run_jobs
from data_prep.dataset_stats import write_stats
from data_prep.inputs import Corpus
from data_prep.layout_options import Options
from data_prep.output import building, check_output, warn_of_space
from uwm_jax.data import records
from uwm_jax.data.records import Dataset
from uwm_jax.errors import RunError, UserError
from uwm_jax.reading import read_json

_SIZED_EPISODES = 64  # read to find the size of a camera that features.json does not specify
_NOTES = 5  # about skipped episodes, in the error message
_PRINTED_NOTES = 20  # in the summary


def reshard(
    source: str | os.PathLike[str], output: str | os.PathLike[str], *, splits: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    """`build` for the RLDS dataset `source`.

    Args:
        splits: names of the splits to take; all if empty.
        options: the fields of `Options`.
    """
    return build(lambda: rlds.corpus(Path(source), splits), output, Options(**options), source=source)


def build(
    corpus: Corpus | Callable[[], Corpus],
    output: str | os.PathLike[str],
    options: Options,
    source: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Makes the training dataset `output` from a corpus, completely or not at all.

    Args:
        corpus: the source of its episodes, or a function that opens it, called after `options` and `output` have been
            checked; then `source` names its path.
    Returns:
        The manifest.
    Raises:
        UserError: an invalid option, an unreadable source, an output that exists or (with `overwrite`) is not a
            training dataset, or source and output inside each other.
        RunError: more than `max_skipped` was skipped; no output is left.
    """
    output = Path(output)
    options.check()
    where = Path(source) if source is not None else corpus.path if isinstance(corpus, Corpus) else None
    check_output(output, is_training_dataset, "a training dataset", overwrite=options.overwrite, source=where)
    opened = corpus if isinstance(corpus, Corpus) else corpus()
    layout = plan_layout(opened.features, options.chunk_steps, _camera_sizes(opened))
    check_files(layout, opened.splits, opened.path)
    if opened.output_bytes is not None:
        warn_of_space(output, opened.output_bytes, f"the input {opened.path}")

    with building(output) as new:
        jobs = [
            Job(split, i, part, layout, options.shard_mb << 20, new)
            for split, inputs in opened.splits.items()
            for i, part in enumerate(inputs)
        ]
        limit = _SkipLimit(options.max_skipped, [opened.promised(split) for split in opened.splits])
        results = run_jobs(jobs, options.workers or os.cpu_count() or 1, limit.watch)
        by_split = {
            split: [r for job, r in zip(jobs, results, strict=True) if job.split == split] for split in opened.splits
        }
        for split, parts in by_split.items():
            inputs = opened.splits[split]
            if any(part.promised is None for part in inputs):
                found = sum(part.episodes for part in parts)
                parts[0].count_missing(f"split {split!r}", found, opened.promised(split), inputs[0].declared_by)
        limit.check(by_split)
        manifest = assemble(new, opened, layout, by_split)
        _derive(new, manifest, options)
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
        notes = "\n".join(f"    {note}" for _, note in first_notes(results))
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


def _camera_sizes(corpus: Corpus) -> dict[str, tuple[int, int]]:
    """Sizes of the cameras; for one that features.json does not specify, the most frequent in the first episodes."""
    sizes: dict[str, tuple[int, int]] = {}
    votes: dict[str, collections.Counter[tuple[int, int]]] = {}
    for key, feature in camera_features(corpus.features).items():
        height, width = (feature.shape or (-1, -1))[:2]
        if height > 0 and width > 0:
            sizes[key] = (height, width)
        else:
            votes[key] = collections.Counter()
    if not votes:
        return sizes
    everything = (found.record for inputs in corpus.splits.values() for part in inputs for found in part.episodes())
    for record in itertools.islice((r for r in everything if r is not None), _SIZED_EPISODES):
        for key, counter in votes.items():
            try:
                counter[frame_size(record, key)] += 1
            except EpisodeError:
                pass  # reported when the episode is cut
    unread = [key for key, counter in votes.items() if not counter]
    if unread:
        raise UserError(
            f"{corpus.path}: none of the first {_SIZED_EPISODES} episodes has readable images of {', '.join(unread)}, "
            "whose size features.json does not specify."
        )
    for key, counter in votes.items():
        sizes[key] = counter.most_common(1)[0][0]
        if len(counter) > 1:
            found = ", ".join(f"{h}x{w} in {n}" for (h, w), n in counter.most_common())
            print(f"{key}: images of several sizes ({found} of the first episodes); the first size is used.")
    return sizes


def _derive(directory: Path, manifest: dict[str, Any], options: Options) -> None:
    """Computes statistics from the finished records, and fits the PCA codec on the `train` split, else the first."""
    write_stats(directory)
    dataset = Dataset(directory, "train" if "train" in manifest["splits"] else next(iter(manifest["splits"])))
    patch = options.pca_patch
    size = options.codec_size or common_size(dataset.cameras, patch)
    if not dataset.cameras or size is None:
        print(f"PCA codec: not fitted, because {why_not_fitted(dataset.cameras, patch)}.")
        return
    file = directory / "codec" / "pca.npz"
    frames = fit_codec(dataset, file, size, patch, options.pca_channels, options.val_ratio)
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
        lines += [f"    {note}" for note in s["skipped_notes"][:_PRINTED_NOTES]]
        lines += [f"    {count} x {remark} (kept)" for remark, count in s.get("remarks", {}).items()]
    cameras = [f"{k} {c['height']}x{c['width']}" for k, c in manifest["cameras"].items()]
    lines.append(f"  cameras: {', '.join(cameras) or 'none'}")
    columns = [f"{k} {v['shape']}" for k, v in manifest["step_features"].items() if v["column"]]
    lines.append(f"  columns: {', '.join(columns)}")
    unusable = manifest.get("unusable_keys", {})
    lines += ["  neither camera nor column:"] * bool(unusable) + [f"    {k}: {why}" for k, why in unusable.items()]
    return "\n".join(lines)
