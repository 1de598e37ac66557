"""Assembles the parts that input files were cut into as one dataset in the training layout."""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cutting import Job
from data_prep.inputs import Corpus, Missing
from data_prep.results import Result, first_notes
from uwm_jax.data import records
from uwm_jax.data.chunks import Layout, step_features, why_unusable
from uwm_jax.data.episodes import JPEG_QUALITY
from uwm_jax.data.features import STEPS, Feature, as_images
from uwm_jax.errors import UserError
from uwm_jax.files import write_text, writing


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
    splits, left_out, info_splits = {}, {}, []
    for split, parts in results.items():
        if any(part.lengths for part in parts):
            splits[split] = _assemble_split(dataset, corpus, layout, split, tasks[split])
            lengths = [str(shard["records"]) for shard in splits[split]["shards"]]
            info_splits.append(
                {
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    "name": split,
                    "numBytes": str(sum(shard["bytes"] for shard in splits[split]["shards"])),
                    "shardLengths": lengths,
                }
            )
        else:
            notes = "\n  ".join(note for _, note in first_notes(parts, 5)) or "its files hold no record"
            if len(results) == 1:
                raise UserError(f"{corpus.path}: no usable episode in split {split!r}:\n  {notes}")
            print(f"split {split!r} has no usable episode and is left out:\n  {notes}")
            left_out[split] = _skipped(parts)
    if not splits:
        raise UserError(f"{corpus.path}: no usable episode in {', '.join(map(repr, results))}.")

    steps = step_features(corpus.features)
    manifest = {
        "format": records.FORMAT,
        "format_version": records.FORMAT_VERSION,
        "name": corpus.name,
        "version": corpus.version,
        "source": {"path": str(corpus.path), **corpus.source},
        "chunk_steps": layout.chunk_steps,
        "step_features": {key: _described(key, feature, layout) for key, feature in steps.items()},
        "unusable_keys": {key: reason for key, feature in steps.items() if (reason := why_unusable(feature))},
        "episode_features": {
            name: {"shape": None if f.shape is None else list(f.shape), "dtype": f.dtype}
            for name, f in corpus.features.items()
            if not name.startswith(STEPS)
        },
        "cameras": {key: {"height": h, "width": w} for key, (h, w) in layout.cameras.items()},
        "splits": splits,
    }
    if taken := manifest.keys() & corpus.facts.keys():
        raise ValueError(f"facts of a corpus that are fields of every manifest: {taken}")
    manifest |= corpus.facts
    if left_out:
        manifest["left_out_splits"] = left_out
    if layout.resized:
        manifest["resize"] = {
            "rule": "both sides, bilinear and antialiased; encoded as JPEG",
            "jpeg_quality": JPEG_QUALITY,
            "from": {key: list(size) for key, size in layout.resized.items()},
        }
    info = {**corpus.info, "name": corpus.name, "version": corpus.version, "fileFormat": "array_record"}
    info["splits"] = info_splits
    stored = _stored_features(corpus, layout)
    for name, value in (("dataset_info", info), ("features", stored), ("manifest", manifest)):
        write_text(dataset / f"{name}.json", json.dumps(value, indent=1))
    return manifest


def _clear(dataset: Path, corpus: Corpus, tasks: Mapping[str, list[tuple[Job, Result]]]) -> None:
    """Removes from the folder all but shards that were moved there."""
    dataset.mkdir(exist_ok=True)
    names = {
        name
        for split, parts in tasks.items()
        for name in _shard_names(corpus, split, sum(len(result.shards) for _, result in parts))
    }
    for file in dataset.rglob("*"):
        if file.is_file() and file.name not in names:
            if ".array_record-" in file.name:
                raise UserError(
                    f"{corpus.path}: its files have changed since {dataset.parent} was begun to be assembled. Remove "
                    "that folder and start again."
                )
            file.unlink()


def _shard_names(corpus: Corpus, split: str, count: int) -> list[str]:
    return [f"{corpus.name}-{split}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]


def _assemble_split(
    dataset: Path, corpus: Corpus, layout: Layout, split: str, tasks: list[tuple[Job, Result]]
) -> dict[str, Any]:
    parts = [result for _, result in tasks]
    made = [(job.folder / shard["part"], shard) for job, result in tasks for shard in result.shards]
    names = _shard_names(corpus, split, len(made))
    for (part, _), name in zip(made, names, strict=True):
        if not (dataset / name).exists():  # else it was moved before the job was killed
            part.rename(dataset / name)
    shards = [
        {key: shard[key] for key in ("records", "bytes", "sha256")} | {"file": name}
        for (_, shard), name in zip(made, names, strict=True)
    ]
    lengths = np.asarray([n for part in parts for n in part.lengths], np.int64)
    chunks = -(-lengths // layout.chunk_steps)
    sizes = np.asarray([shard["records"] for shard in shards], np.int64)
    first_of_shard = np.cumsum(sizes) - sizes
    with writing(dataset / records.index_file(split), "wb") as out:
        np.savez(
            out,
            allow_pickle=False,
            episode_length=lengths,
            episode_first_chunk=np.cumsum(chunks) - chunks,
            chunk_shard=np.repeat(np.arange(len(shards)), sizes),
            chunk_record=np.arange(sizes.sum()) - np.repeat(first_of_shard, sizes),
            chunk_crc32c=np.asarray([crc for part in parts for crc in part.checksums], np.uint32),
        )
    texts: dict[str, np.ndarray] = {}
    for name in layout.texts:
        values = [text for part in parts for text in part.texts.get(name, [])]
        texts[f"{name}/utf8"] = np.frombuffer(b"".join(values), np.uint8)
        texts[f"{name}/ends"] = np.cumsum([len(text) for text in values], dtype=np.int64)
    with writing(dataset / records.text_file(split), "wb") as out:
        np.savez(out, allow_pickle=False, **texts)
    for i, (key, (shape, dtype)) in enumerate(layout.columns.items()):
        header = {"descr": dtype, "fortran_order": False, "shape": (int(lengths.sum()), *shape)}
        with writing(dataset / records.column_file(split, key), "wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for job, result in tasks:
                if result.lengths:
                    with (job.folder / f"{i}.column").open("rb") as stored:
                        shutil.copyfileobj(stored, out, 1 << 22)
    files = [
        records.index_file(split),
        records.text_file(split),
        *(records.column_file(split, key) for key in layout.columns),
    ]
    remarks: collections.Counter[str] = sum((part.remarks for part in parts), collections.Counter())
    described = {
        "episodes": len(lengths),
        "steps": int(lengths.sum()),
        "chunks": int(chunks.sum()),
        **_skipped(parts),
        "shards": shards,
        "files": {file: {"crc32c": records.checksum(dataset / file)} for file in files},
    }
    missing = [job.input.name for job, result in tasks if isinstance(job.input, Missing) and not result.episodes]
    optional = {"remarks": dict(remarks), "missing_files": missing}
    return described | {name: value for name, value in optional.items() if value}


def _skipped(parts: Sequence[Result]) -> dict[str, Any]:
    """Numbers of skipped episodes by reason, and notes on the first of each."""
    skipped: collections.Counter[str] = sum((part.skipped for part in parts), collections.Counter())
    return {"skipped": dict(skipped), "skipped_notes": [note for _, note in first_notes(parts)]}


def _described(key: str, feature: Feature, layout: Layout) -> dict[str, Any]:
    """Entry of `step_features`: how a key is stored."""
    if key in layout.encoded:
        feature, _ = layout.encoded[key]
    described: dict[str, Any] = {
        "shape": None if feature.shape is None else list(feature.shape),
        "dtype": feature.dtype,
        "image": feature.image,
        "column": key in layout.columns,
    }
    if feature.encoding != "none":
        described["encoding"] = feature.encoding
    return described


def _stored_features(corpus: Corpus, layout: Layout) -> dict[str, Any]:
    """The feature tree of the records: with a chunk's position in its episode, and pixels as PNG."""
    scalar = {
        "pythonClassName": "tensorflow_datasets.core.features.scalar.Scalar",
        "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"},
    }
    chunk = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": {"first_step": scalar, "episode_steps": scalar}},
    }
    images = {STEPS + key: (feature.shape or (), encoding) for key, (feature, encoding) in layout.encoded.items()}
    stored = as_images(dict(corpus.tree), images)
    top = stored["featuresDict"]
    return stored | {"featuresDict": top | {"features": top["features"] | {"chunk": chunk}}}
