"""Joins what the input files were cut into to one dataset in the training layout."""

from __future__ import annotations

import collections
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import rlds
from data_prep.chunks import Layout
from data_prep.cutting import MAX_NOTES, Result
from data_prep.features import STEPS
from uwm_jax.data import records
from uwm_jax.errors import UserError


def assemble(building: Path, source: rlds.Source, layout: Layout, results: dict[str, list[Result]]) -> dict[str, Any]:
    """Joins the parts: final shard names, index, columns, TFDS's two files, manifest."""
    splits, info_splits = {}, []
    for split, parts in results.items():
        if any(part.lengths for part in parts):
            splits[split] = _assemble_split(building, source, layout, split, parts)
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
            notes = "\n  ".join(note for part in parts for note in part.notes) or "its files hold no records"
            if len(results) == 1:
                raise UserError(f"{source.path}: no usable episode in split {split!r}:\n  {notes}")
            print(f"split {split!r} has no usable episode and is left out:\n  {notes}")
    if not splits:
        raise UserError(f"{source.path}: no usable episode in {', '.join(map(repr, results))}.")
    shutil.rmtree(building / "parts")

    step_features = {
        name.removeprefix(STEPS): {
            "shape": None if f.shape is None else list(f.shape),
            "dtype": f.dtype,
            "image": f.image,
            "column": name.removeprefix(STEPS) in layout.columns,
        }
        for name, f in source.features.items()
        if name.startswith(STEPS)
    }
    manifest = {
        "format": records.FORMAT,
        "format_version": records.FORMAT_VERSION,
        "name": source.name,
        "version": source.version,
        "source": {"path": str(source.path), "file_format": source.file_format, "splits": sorted(source.splits)},
        "chunk_steps": layout.chunk_steps,
        "step_features": step_features,
        "episode_features": {
            name: {"shape": None if f.shape is None else list(f.shape), "dtype": f.dtype}
            for name, f in source.features.items()
            if not name.startswith(STEPS)
        },
        "cameras": {key: {"height": h, "width": w} for key, (h, w) in layout.cameras.items()},
        "splits": splits,
    }
    info = source.info | {"fileFormat": "array_record", "splits": info_splits}
    (building / "dataset_info.json").write_text(json.dumps(info, indent=1))
    (building / "features.json").write_text(json.dumps(_with_chunk_features(source.features_json), indent=1))
    (building / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def _assemble_split(
    building: Path, source: rlds.Source, layout: Layout, split: str, parts: list[Result]
) -> dict[str, Any]:
    shards = [shard for part in parts for shard in part.shards]
    for i, shard in enumerate(shards):
        shard["file"] = f"{source.name}-{split}.array_record-{i:05d}-of-{len(shards):05d}"
        shard.pop("part").rename(building / shard["file"])
    lengths = np.asarray([n for part in parts for n in part.lengths], np.int64)
    chunks = -(-lengths // layout.chunk_steps)
    sizes = np.asarray([shard["records"] for shard in shards], np.int64)
    first_of_shard = np.cumsum(sizes) - sizes
    (building / "index").mkdir(exist_ok=True)
    np.savez(
        building / records.index_file(split),
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
    np.savez(building / records.text_file(split), allow_pickle=False, **texts)
    (building / "columns" / split).mkdir(parents=True)
    for i, (key, (shape, dtype)) in enumerate(layout.columns.items()):
        header = {"descr": dtype, "fortran_order": False, "shape": (int(lengths.sum()), *shape)}
        with (building / records.column_file(split, key)).open("wb") as out:
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
    return {
        "episodes": len(lengths),
        "steps": int(lengths.sum()),
        "chunks": int(chunks.sum()),
        "skipped": dict(skipped),
        "skipped_notes": [note for part in parts for note in part.notes][:MAX_NOTES],
        "shards": shards,
        "files": {file: {"crc32c": records.checksum(building / file)} for file in files},
    }


def _with_chunk_features(features: dict[str, Any]) -> dict[str, Any]:
    """The feature tree with the place of a chunk in its episode, which every record states."""
    scalar = {
        "pythonClassName": "tensorflow_datasets.core.features.scalar.Scalar",
        "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"},
    }
    chunk = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": {"first_step": scalar, "episode_steps": scalar}},
    }
    top = features["featuresDict"]
    return features | {"featuresDict": top | {"features": top["features"] | {"chunk": chunk}}}
