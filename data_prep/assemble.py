"""Assembles the parts that input files were cut into as one dataset in the training layout."""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.chunks import Layout, step_features, why_unusable
from data_prep.cutting import Result, first_notes
from data_prep.features import STEPS, Feature, as_images
from data_prep.inputs import Corpus
from uwm_jax.data import records
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


def assemble(building: Path, corpus: Corpus, layout: Layout, results: dict[str, list[Result]]) -> dict[str, Any]:
    """Assembles the parts: final shard names, index, columns, TFDS's two files, manifest."""
    splits, info_splits = {}, []
    for split, parts in results.items():
        if any(part.lengths for part in parts):
            splits[split] = _assemble_split(building, corpus, layout, split, parts)
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
    if not splits:
        raise UserError(f"{corpus.path}: no usable episode in {', '.join(map(repr, results))}.")
    shutil.rmtree(building / "parts")

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
    info = {**corpus.info, "name": corpus.name, "version": corpus.version, "fileFormat": "array_record"}
    info["splits"] = info_splits
    stored = _stored_features(corpus, layout)
    for name, value in (("dataset_info", info), ("features", stored), ("manifest", manifest)):
        write_text(building / f"{name}.json", json.dumps(value, indent=1))
    return manifest


def _assemble_split(building: Path, corpus: Corpus, layout: Layout, split: str, parts: list[Result]) -> dict[str, Any]:
    shards = [shard for part in parts for shard in part.shards]
    for i, shard in enumerate(shards):
        shard["file"] = f"{corpus.name}-{split}.array_record-{i:05d}-of-{len(shards):05d}"
        shard.pop("part").rename(building / shard["file"])
    lengths = np.asarray([n for part in parts for n in part.lengths], np.int64)
    chunks = -(-lengths // layout.chunk_steps)
    sizes = np.asarray([shard["records"] for shard in shards], np.int64)
    first_of_shard = np.cumsum(sizes) - sizes
    with writing(building / records.index_file(split), "wb") as out:
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
    with writing(building / records.text_file(split), "wb") as out:
        np.savez(out, allow_pickle=False, **texts)
    for i, (key, (shape, dtype)) in enumerate(layout.columns.items()):
        header = {"descr": dtype, "fortran_order": False, "shape": (int(lengths.sum()), *shape)}
        with writing(building / records.column_file(split, key), "wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for number in range(len(parts)):
                with (building / "parts" / f"{split}.{number:05d}" / f"{i}.column").open("rb") as part:
                    shutil.copyfileobj(part, out, 1 << 22)
    files = [
        records.index_file(split),
        records.text_file(split),
        *(records.column_file(split, key) for key in layout.columns),
    ]
    skipped: collections.Counter[str] = sum((part.skipped for part in parts), collections.Counter())
    remarks: collections.Counter[str] = sum((part.remarks for part in parts), collections.Counter())
    described = {
        "episodes": len(lengths),
        "steps": int(lengths.sum()),
        "chunks": int(chunks.sum()),
        "skipped": dict(skipped),
        "skipped_notes": [note for _, note in first_notes(parts)],
        "shards": shards,
        "files": {file: {"crc32c": records.checksum(building / file)} for file in files},
    }
    return described | ({"remarks": dict(remarks)} if remarks else {})


def _described(key: str, feature: Feature, layout: Layout) -> dict[str, Any]:
    """Entry of `step_features`: how a key is stored."""
    described: dict[str, Any] = {
        "shape": None if feature.shape is None else list(feature.shape),
        "dtype": feature.dtype,
        "image": feature.image or key in layout.pixels,
        "column": key in layout.columns,
    }
    if feature.encoding != "none" and key not in layout.pixels:
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
    stored = as_images(dict(corpus.tree), {STEPS + key: shape for key, shape in layout.pixels.items()})
    top = stored["featuresDict"]
    return stored | {"featuresDict": top | {"features": top["features"] | {"chunk": chunk}}}
