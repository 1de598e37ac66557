"""Assembles the parts that input files were cut into as one dataset in the training layout."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.conversion.cutting import Job
from data_prep.conversion.results import Result, first_notes
from data_prep.sources.inputs import Corpus, Missing
from uwm_jax.data import records
from uwm_jax.data.chunks import Layout
from uwm_jax.data.writing import SHARD_FACTS, shard_names, write_descriptions, write_split
from uwm_jax.errors import UserError


def check_files(layout: Layout, splits: Iterable[str], where: Path) -> None:
    """Checks that all files of the dataset have different names; raises UserError that names the colliding contents."""
    owners: dict[str, str] = {}
    for split in splits:
        files = [(records.index_file(split), f"split {split!r}")]
        files += [(records.text_file(split), f"the strings of split {split!r}")]
        files += [(records.column_file(split, key), f"the feature {key!r}") for key in layout.columns]
        for file, owner in files:
            if file in owners:
                raise UserError(
                    f"{where}: {owners[file]} and {owner} would both become {file}. Rename one, or choose --split."
                )
            owners[file] = owner


def assemble(
    dataset: Path, corpus: Corpus, layout: Layout, tasks: Mapping[str, list[tuple[Job, Result]]]
) -> dict[str, Any]:
    """Assembles the parts in the folder `dataset`: final shard names, index, columns, TFDS's two files, manifest.

    Shards are moved there. All else is written anew if a job was killed in this.
    """
    _clear(dataset, corpus, tasks)
    results = {split: [result for _, result in parts] for split, parts in tasks.items()}
    splits, left_out = {}, {}
    for split, parts in results.items():
        if any(part.lengths for part in parts):
            splits[split] = _assemble_split(dataset, corpus, layout, split, tasks[split])
        else:
            counts = [f"{count} x {reason}" for reason, count in _skipped(parts)["skipped"].items()]
            notes = "\n  ".join([*counts, *(note for _, note in first_notes(parts, 5))]) or "its files hold no record"
            if len(results) == 1:
                raise UserError(f"{corpus.path}: no usable episode in split {split!r}:\n  {notes}")
            print(f"split {split!r} has no usable episode and is left out:\n  {notes}")
            left_out[split] = _skipped(parts)
    if not splits:
        raise UserError(f"{corpus.path}: no usable episode in {', '.join(map(repr, results))}.")
    return write_descriptions(
        dataset,
        layout,
        name=corpus.name,
        version=corpus.version,
        tree=corpus.tree,
        splits=splits,
        source={"path": str(corpus.path), **corpus.source},
        info=corpus.info,
        facts={**corpus.facts, **({"left_out_splits": left_out} if left_out else {})},
    )


def _clear(dataset: Path, corpus: Corpus, tasks: Mapping[str, list[tuple[Job, Result]]]) -> None:
    """Removes from the folder all but shards that were moved there."""
    dataset.mkdir(exist_ok=True)
    names = {
        name
        for split, parts in tasks.items()
        for name in shard_names(corpus.name, split, sum(len(result.shards) for _, result in parts))
    }
    for file in dataset.rglob("*"):
        if file.is_file() and file.name not in names:
            if ".array_record-" in file.name:
                raise UserError(
                    f"{corpus.path}: its files have changed since {dataset.parent} was begun to be assembled. Remove "
                    "that folder and start again."
                )
            file.unlink()


def _assemble_split(
    dataset: Path, corpus: Corpus, layout: Layout, split: str, tasks: list[tuple[Job, Result]]
) -> dict[str, Any]:
    parts = [result for _, result in tasks]
    order = {key: i for i, key in enumerate(layout.columns)}
    made = [(job.local_folder / shard["part"], shard) for job, result in tasks for shard in result.shards]
    names = shard_names(corpus.name, split, len(made))
    for (part, _), name in zip(made, names, strict=True):
        if not (dataset / name).exists():  # else it was moved before the job was killed
            part.rename(dataset / name)
    shards = [
        {key: shard[key] for key in SHARD_FACTS if key in shard} | {"file": name}
        for (_, shard), name in zip(made, names, strict=True)
    ]
    entry = write_split(
        dataset,
        split,
        layout,
        shards=shards,
        lengths=[n for part in parts for n in part.lengths],
        checksums=[crc for part in parts for crc in part.checksums],
        texts={name: [text for part in parts for text in part.texts.get(name, [])] for name in layout.texts},
        columns=lambda key: [job.local_folder / f"{order[key]}.column" for job, result in tasks if result.lengths],
    )
    remarks: collections.Counter[str] = sum((part.remarks for part in parts), collections.Counter())
    missing = [job.input.name for job, result in tasks if isinstance(job.input, Missing) and not result.episodes]
    optional = {"remarks": dict(remarks), "missing_files": missing}
    return entry | _skipped(parts) | {name: value for name, value in optional.items() if value}


def _skipped(parts: Sequence[Result]) -> dict[str, Any]:
    """Numbers of skipped episodes by reason, and notes on the first of each."""
    skipped: collections.Counter[str] = sum((part.skipped for part in parts), collections.Counter())
    return {"skipped": dict(skipped), "skipped_notes": [note for _, note in first_notes(parts)]}
