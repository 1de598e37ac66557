"""The chunked training layout that `uwm_jax.data` reads, made of a corpus (`data_prep.sources.inputs`).

Episodes are cut into records; encoded images and all other values keep their bytes. `uwm_jax.data.records` describes
the layout. Finally the statistics are computed and the PCA image codec is fitted on training episodes, so that the
dataset is ready to train on.
"""

from __future__ import annotations

import collections
import datetime
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.conversion import bucket_output, on_beam
from data_prep.conversion.assemble import assemble, check_files
from data_prep.conversion.codec import common_size, fit_codec, why_not_fitted
from data_prep.conversion.cutting import Job, run_jobs
from data_prep.conversion.dataset_stats import write_stats
from data_prep.conversion.layout_options import Options
from data_prep.conversion.results import Result, first_notes
from data_prep.jobs.job_folder import MISSING, JobFolder, job_folder
from data_prep.jobs.output import check_output, local_place, warn_of_space
from data_prep.sources import rlds
from data_prep.sources.inputs import Corpus, Missing
from uwm_jax import __version__
from uwm_jax.data import records
from uwm_jax.data.chunks import EpisodeError, Layout, camera_features, frame_size, plan_layout
from uwm_jax.data.records import Dataset
from uwm_jax.errors import RunError, UserError
from uwm_jax.files import AnyPath, Place, RemotePath, as_place
from uwm_jax.reading import read_json

_SIZED_EPISODES = 64  # read to find the size of a camera that features.json does not specify
_NOTES = 5  # about skipped episodes, in the error message
_PRINTED_NOTES = 20  # in the summary


def reshard(
    source: str | os.PathLike[str], output: AnyPath, *, splits: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    """`build` for the whole RLDS dataset `source`; returns its manifest.

    Args:
        splits: names of the splits to take; all if empty.
        options: the fields of `Options` but `task`.
    """
    manifest = build(lambda: rlds.corpus(Path(source), splits), output, Options(**options), source=source)
    assert manifest is not None
    return manifest


def build(
    corpus: Corpus | Callable[[], Corpus],
    output: AnyPath,
    options: Options,
    source: str | os.PathLike[str] | None = None,
) -> dict[str, Any] | None:
    """Makes the training dataset `output` from a corpus, completely or not at all.

    A job that was killed, or that failed, is continued by the next one of the same corpus and options. Only tasks that
    Beam does may write into a bucket; the dataset is then assembled on the local disk, in $TMPDIR, and uploaded.

    Args:
        corpus: the source of its episodes, or a function that opens it, called after `options` and `output` have been
            checked; then `source` names its path.
    Returns:
        The manifest; None after a share of the tasks (`options.task`).
    Raises:
        UserError: an invalid option, an unreadable source, an output that exists or (with `overwrite`) is not a
            training dataset, source and output inside each other, another job at work on this output, or one that was
            begun with another corpus or other options (without `overwrite`).
        RunError: more than `max_skipped` was skipped; nothing is published.
    """
    output = as_place(output)
    options.check()
    if isinstance(output, RemotePath) and options.beam is not None:
        with bucket_output.staged(output, is_training_dataset, overwrite=options.overwrite) as local:
            return _build(corpus, local, options, source, bucket=output)
    return _build(corpus, local_place(output, "--output"), options, source)


def _build(
    corpus: Corpus | Callable[[], Corpus],
    output: Path,
    options: Options,
    source: str | os.PathLike[str] | None,
    bucket: RemotePath | None = None,
) -> dict[str, Any] | None:
    """`build` on a local disk; `bucket` is where the dataset will lie in a bucket, and its parts lie next to."""
    where = Path(source) if source is not None else corpus.path if isinstance(corpus, Corpus) else None
    check_output(output, is_training_dataset, "a training dataset", overwrite=options.overwrite, source=where)
    opened = corpus if isinstance(corpus, Corpus) else corpus()
    layout = plan_layout(opened.features, options.chunk_steps, _camera_sizes(opened), options.resize)
    check_files(layout, opened.splits, opened.path)
    plan = _plan(opened, options, layout)
    with job_folder(output, plan, alone=options.task is None, overwrite=options.overwrite) as folder:
        jobs = _jobs(opened, layout, options, bucket_output.parts_of(bucket, plan) if bucket else folder.parts)
        if options.task:
            _do_share(jobs, opened, options, folder)
            return None
        if folder.is_assembled:
            print(f"{folder.path}: all was done already; publishing it.")
        else:
            tasks = _do_all(jobs, opened, options, folder)
            tasks = bucket_output.fetched(tasks, folder.parts) if bucket else tasks
            _derive(folder.dataset, assemble(folder.dataset, opened, layout, tasks), options)
        manifest = read_json(folder.dataset / "manifest.json")
        folder.publish()
    return manifest


def run(corpus: Callable[[], Corpus], output: AnyPath, options: Options, source: str | os.PathLike[str]) -> None:
    """`build` for a command: prints what was made."""
    manifest = build(corpus, output, options, source)
    if manifest is not None:
        print(f"{output}: {summary(manifest)}")


def _plan(corpus: Corpus, options: Options, layout: Layout) -> dict[str, Any]:
    """What must be equal for a killed job to be continued; see `job_folder`."""
    tree = json.dumps(corpus.tree, sort_keys=True).encode()
    inputs = {
        split: {
            part.name: {
                "number": number,
                "size": MISSING if isinstance(part, Missing) else part.size,
                "modified": MISSING if isinstance(part, Missing) else _time(part.modified),
                "promised": part.promised,
            }
            for number, part in enumerate(inputs)
        }
        for split, inputs in corpus.splits.items()
    }
    return {
        "--input": str(corpus.path.resolve()),
        "dataset": f"{corpus.name} {corpus.version}",
        **options.content,
        **{f"--{flag}": value for flag, value in corpus.options.items()},
        "made by": f"uwm_jax {__version__}, format {records.FORMAT_VERSION}",
        "features": hashlib.sha256(tree).hexdigest(),
        "cameras": layout.cameras,
        "facts": dict(corpus.facts),
        "inputs": inputs,
    }


def _time(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(" ")


def _jobs(corpus: Corpus, layout: Layout, options: Options, parts: Place) -> list[Job]:
    return [
        Job(split, i, part, layout, options.shard_mb << 20, parts)
        for split, inputs in corpus.splits.items()
        for i, part in enumerate(inputs)
    ]


def _is_there(job: Job) -> bool:
    return not isinstance(job.input, Missing) or job.is_done


def _do(jobs: Sequence[Job], corpus: Corpus, options: Options, folder: JobFolder) -> dict[Place, Result]:
    """Does the tasks that are not done, as far as their inputs are there; returns the results of all by folder."""
    present = [job for job in jobs if _is_there(job)]
    left = [job for job in present if not job.is_done]
    if len(left) < len(present):
        print(f"{folder.path}: {len(present) - len(left)} of {len(present)} tasks are done already; continuing.")
    if corpus.output_bytes is not None and not options.resize:
        warn_of_space(folder.output, sum(job.input.size for job in left), f"the input {corpus.path}")
    limit = _SkipLimit(options.max_skipped, [corpus.promised(split) for split in corpus.splits])
    if options.beam is None:
        results = run_jobs(present, options.workers or os.cpu_count() or 1, limit.watch)
    else:
        results = on_beam.run_jobs(present, options.beam, limit.watch)
    return {job.folder: result for job, result in zip(present, results, strict=True)}


def _do_share(jobs: Sequence[Job], corpus: Corpus, options: Options, folder: JobFolder) -> None:
    share, shares = options.task or (0, 1)
    mine = jobs[share::shares]
    _do(mine, corpus, options, folder)
    left = sum(_is_there(job) and not job.is_done for job in jobs)
    rest = f"{left} of {len(jobs)} tasks are left for other shares" if left else "all tasks are done"
    print(
        f"{folder.path}: share {share} of {shares} is done ({len(mine)} tasks); {rest}. --assemble instead of --task "
        "makes the dataset of them."
    )


def _do_all(
    jobs: Sequence[Job], corpus: Corpus, options: Options, folder: JobFolder
) -> dict[str, list[tuple[Job, Result]]]:
    """All tasks with their results, by split, within `max_skipped`."""
    if options.assemble and (left := [job for job in jobs if _is_there(job) and not job.is_done]):
        names = ", ".join(job.input.name for job in left[:3]) + (", ..." if len(left) > 3 else "")
        raise UserError(
            f"{folder.path}: --assemble: {len(left)} of {len(jobs)} tasks are not done: {names}. Do them with --task, "
            "or with neither flag, which does what is left and assembles."
        )
    results = _do(jobs, corpus, options, folder)
    tasks: dict[str, list[tuple[Job, Result]]] = {split: [] for split in corpus.splits}
    for job in jobs:
        tasks[job.split].append((job, results.get(job.folder, Result())))
    for split, parts in tasks.items():
        inputs = [job.input for job, _ in parts]
        if any(part.promised is None for part in inputs):
            found = sum(result.episodes for _, result in parts)
            parts[0][1].count_missing(f"split {split!r}", found, corpus.promised(split), inputs[0].declared_by)
    limit = _SkipLimit(options.max_skipped, [])
    limit.check({split: [result for _, result in parts] for split, parts in tasks.items()})
    return tasks


class _SkipLimit:
    """Ends the job if more than a share of the episodes is skipped; one is always allowed.

    Args:
        totals: number of episodes that each split declares; None if it declares none.
    """

    def __init__(self, share: float, totals: Sequence[int | None]):
        self._share = share
        self._promised = None if any(n is None for n in totals) else sum(n or 0 for n in totals)
        self._seen: list[Result] = []
        self._episodes = self._skipped = 0  # of those seen: there may be a million of them

    def watch(self, result: Result) -> None:
        """Takes the result of a file; ends the job as soon as the share is exceeded; other files cannot change that."""
        self._seen.append(result)
        self._episodes += result.episodes
        self._skipped += result.skipped.total()
        if self._promised is not None:
            total = max(self._promised, self._episodes)
            if self._exceeds(self._skipped, total):
                self._check("", self._seen, total)

    def check(self, by_split: Mapping[str, Sequence[Result]]) -> None:
        """Checks each split, and all splits together, after all files are read."""
        for split, parts in by_split.items():
            self._check(f" of split {split!r}", parts, sum(r.episodes for r in parts))
        everything = [r for parts in by_split.values() for r in parts]
        self._check("", everything, sum(r.episodes for r in everything))

    def _exceeds(self, skipped: int, total: int) -> bool:
        return skipped > max(1, self._share * total)

    def _check(self, of: str, results: Sequence[Result], total: int) -> None:
        reasons: collections.Counter[str] = sum((r.skipped for r in results), collections.Counter())
        skipped = reasons.total()
        if not self._exceeds(skipped, total):
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


def is_training_dataset(directory: Place) -> bool:
    """Whether a directory is in the training layout, of this or another version."""
    try:
        manifest = read_json(directory / "manifest.json")
    except (OSError, UserError):
        return False
    return manifest.get("format") == records.FORMAT


def main_split(manifest: Mapping[str, Any]) -> str:
    """`train`, else the first of a dataset's splits: the one that its codec is fitted on and that is shown."""
    return "train" if "train" in manifest["splits"] else next(iter(manifest["splits"]))


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
    dataset = Dataset(directory, main_split(manifest))
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
        lines += [f"    missing files: {', '.join(s['missing_files'])}"] if s.get("missing_files") else []
        lines += [f"    {count} x {remark} (kept)" for remark, count in s.get("remarks", {}).items()]
    cameras = [f"{k} {c['height']}x{c['width']}" for k, c in sorted(manifest["cameras"].items())]
    lines.append(f"  cameras: {', '.join(cameras) or 'none'}")
    columns = [f"{k} {v['shape']}" for k, v in sorted(manifest["step_features"].items()) if v["column"]]
    lines.append(f"  columns: {', '.join(columns)}")
    unusable = manifest.get("unusable_keys", {})
    lines += ["  neither camera nor column:"] * bool(unusable) + [f"    {k}: {why}" for k, why in unusable.items()]
    return "\n".join(lines)
