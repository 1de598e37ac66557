"""Cuts an RLDS dataset into the chunked training layout that `uwm_jax.data` reads.

    python -m data_prep.reshard --input=DIR --output=DIR

The input directory holds the TFDS `dataset_info.json`. Episodes are cut into records of `--chunk_steps`
steps; encoded images and all other values keep their bytes. `uwm_jax.data.records` describes the output. At the
end the PCA image codec is fitted on training episodes and the statistics are computed, so that the dataset
is ready to train on.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from array_record.python import array_record_module
from tqdm import tqdm

from data_prep import rlds
from data_prep.chunks import EpisodeError, Layout, camera_features, cut_episode, frame_size, plan_layout
from data_prep.codec import check_options, common_size, fit_codec
from data_prep.output import building, check_output
from data_prep.stats import write_stats
from data_prep.workers import pool
from uwm_jax import cli
from uwm_jax.data import records
from uwm_jax.data.records import Dataset
from uwm_jax.errors import UserError

FLAGS = flags.FLAGS

# Riegeli's hashes detect damage; compressing encoded images would only cost reading time.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_MAX_NOTES = 20  # of skipped records that are described one by one


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
) -> dict[str, Any]:
    """Makes the training dataset `output` from the RLDS dataset `source`; all or nothing.

    Args:
        splits: which splits; all if empty.
        chunk_steps: steps per record; shard_mb: size at which a new shard begins.
        codec_size: (height, width) at which the PCA codec is fitted; None: the cameras' own.
        pca_patch, pca_channels: side of its patches in pixels, and latent channels.
        val_ratio: share of episodes that the codec is not fitted on (`config.data.val_ratio`).
        workers: processes (one per core if 0), each on input files of its own.
        overwrite: replace an existing output.
    Returns:
        The manifest.
    Raises:
        UserError: an option no dataset could be made with, a source that cannot be read, an output that exists or
            (with `overwrite`) is no training dataset, or one that lies inside the source or around it.
    """
    source, output = Path(source), Path(output)
    check_options(codec_size, pca_patch, pca_channels, val_ratio)
    check_output(output, is_training_dataset, "a training dataset", overwrite=overwrite, source=source)
    if (source / "manifest.json").exists():
        raise UserError(f"{source} is already in the training layout. Give --input the RLDS dataset it was made from.")
    opened = rlds.open_source(source)
    unknown = set(splits) - set(opened.splits)
    if unknown:
        raise UserError(f"{source}: no split {sorted(unknown)[0]!r}; it has {', '.join(sorted(opened.splits))}.")
    chosen = {split: files for split, files in opened.splits.items() if split in splits or not splits}
    layout = plan_layout(opened.features, chunk_steps, _camera_sizes(opened, chosen))

    with building(output) as new:
        jobs = [
            _Job(split, i, file, opened.file_format, layout, shard_mb << 20, new)
            for split, files in chosen.items()
            for i, file in enumerate(files)
        ]
        results = _run_jobs(jobs, workers or os.cpu_count() or 1)
        by_split = {split: [r for job, r in zip(jobs, results, strict=True) if job.split == split] for split in chosen}
        manifest = _assemble(new, opened, layout, by_split)
        _derive(new, manifest, codec_size, pca_patch, pca_channels, val_ratio)
    return manifest


def is_training_dataset(directory: Path) -> bool:
    """Whether a directory is in the training layout, of this or another version."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == records.FORMAT


@dataclasses.dataclass(frozen=True)
class _Job:
    split: str
    number: int
    file: Path
    file_format: str
    layout: Layout
    shard_bytes: int
    building: Path

    @property
    def parts(self) -> Path:
        return self.building / "parts" / f"{self.split}.{self.number:05d}"


@dataclasses.dataclass
class _Result:
    """What one input file became: shards in order (temporary name, records, bytes, sha256), lengths and texts of its
    episodes, and what was skipped."""

    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    texts: dict[str, list[bytes]] = dataclasses.field(default_factory=dict)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: list[str] = dataclasses.field(default_factory=list)


_done_bytes: Any = None  # shared counters of progress, set in every worker
_done_episodes: Any = None


def _init_worker(done_bytes: Any, done_episodes: Any) -> None:
    global _done_bytes, _done_episodes
    _done_bytes, _done_episodes = done_bytes, done_episodes


def _run_job(job: _Job) -> _Result:
    result = _Result()
    job.parts.mkdir(parents=True)
    columns = {key: (job.parts / f"{i}.column").open("wb") for i, key in enumerate(job.layout.columns)}
    writer = _ShardWriter(job)
    bytes_left = job.file.stat().st_size
    for number, (record, reason, size) in enumerate(rlds.read_records(job.file, job.file_format)):
        try:
            if record is None:
                raise EpisodeError(reason, reason)
            episode = cut_episode(record, job.layout)
        except EpisodeError as e:
            kept = 0
            result.skipped[e.reason] += 1
            result.notes.append(f"{job.file.name}: record {number}: {e.reason}: {e}")
        else:
            kept = 1
            for chunk in episode.chunks:
                writer.write(chunk)
            for key, values in episode.columns.items():
                columns[key].write(values.astype(job.layout.columns[key][1]).tobytes())
            result.lengths.append(episode.length)
            for name, text in episode.texts.items():
                result.texts.setdefault(name, []).append(text)
        bytes_left -= size
        with _done_bytes.get_lock():
            _done_bytes.value += size
            _done_episodes.value += kept
    for column in columns.values():
        column.close()
    result.shards = writer.close()
    with _done_bytes.get_lock():
        _done_bytes.value += bytes_left  # what follows a broken frame is not read
    del result.notes[_MAX_NOTES:]
    return result


class _ShardWriter:
    """Writes records to consecutive ArrayRecord files of about `shard_bytes`."""

    def __init__(self, job: _Job):
        self._job = job
        self._shards: list[dict[str, Any]] = []
        self._writer: Any = None
        self._size = self._records = 0

    def write(self, record: bytes) -> None:
        if self._writer is None:
            self._file = self._job.parts / f"{len(self._shards):05d}.array_record"
            self._writer = array_record_module.ArrayRecordWriter(str(self._file), _WRITER_OPTIONS)
        self._writer.write(record)
        self._size += len(record)
        self._records += 1
        if self._size >= self._job.shard_bytes:
            self._finish()

    def close(self) -> list[dict[str, Any]]:
        self._finish()
        return self._shards

    def _finish(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        with self._file.open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        self._shards.append(
            {"part": self._file, "records": self._records, "bytes": self._file.stat().st_size, "sha256": sha256}
        )
        self._writer, self._size, self._records = None, 0, 0


def _run_jobs(jobs: list[_Job], workers: int) -> list[_Result]:
    context = multiprocessing.get_context("spawn")
    done_bytes, done_episodes = context.Value("q", 0), context.Value("q", 0)
    counters = (done_bytes, done_episodes)
    executor: concurrent.futures.Executor
    if (processes := min(workers, len(jobs))) > 1:
        executor = pool(processes, _init_worker, counters)
    else:
        executor = concurrent.futures.ThreadPoolExecutor(1, initializer=_init_worker, initargs=counters)
    total = sum(job.file.stat().st_size for job in jobs)
    with tqdm(total=total, desc="resharding", unit="B", unit_scale=True) as bar, executor:
        futures = [executor.submit(_run_job, job) for job in jobs]
        pending: set[concurrent.futures.Future[_Result]] = set(futures)
        try:
            while pending:
                done, pending = concurrent.futures.wait(pending, timeout=0.5)
                for future in done:
                    future.result()  # a failure ends the job now, not after all the others
                bar.set_postfix(episodes=done_episodes.value, refresh=False)
                bar.update(done_bytes.value - bar.n)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _camera_sizes(source: rlds.Source, splits: dict[str, list[Path]]) -> dict[str, tuple[int, int]]:
    """Sizes of the cameras; where features.json leaves them open, those of the first readable episode."""
    sizes, unknown = {}, []
    for key, feature in camera_features(source.features).items():
        height, width, _ = feature.shape or (-1, -1, 3)
        if height > 0 and width > 0:
            sizes[key] = (height, width)
        else:
            unknown.append(key)
    if not unknown:
        return sizes
    for file in (f for files in splits.values() for f in files):
        for record, _, _ in rlds.read_records(file, source.file_format):
            try:
                if record is not None:
                    return sizes | {key: frame_size(record, key) for key in unknown}
            except EpisodeError:
                continue
    raise UserError(f"{source.path}: no episode has readable images of {', '.join(unknown)}.")


def _assemble(building: Path, source: rlds.Source, layout: Layout, results: dict[str, list[_Result]]) -> dict[str, Any]:
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
        name.removeprefix(rlds.STEPS): {
            "shape": None if f.shape is None else list(f.shape),
            "dtype": f.dtype,
            "image": f.image,
            "column": name.removeprefix(rlds.STEPS) in layout.columns,
        }
        for name, f in source.features.items()
        if name.startswith(rlds.STEPS)
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
            if not name.startswith(rlds.STEPS)
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
    building: Path, source: rlds.Source, layout: Layout, split: str, parts: list[_Result]
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
        building / "index" / f"{split}.npz",
        allow_pickle=False,
        episode_length=lengths,
        episode_first_chunk=np.cumsum(chunks) - chunks,
        chunk_shard=np.repeat(np.arange(len(shards)), sizes),
        chunk_record=np.arange(sizes.sum()) - np.repeat(first_of_shard, sizes),
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
        f"index/{split}.npz",
        records.text_file(split),
        *(records.column_file(split, key) for key in layout.columns),
    ]
    skipped: collections.Counter[str] = sum((part.skipped for part in parts), collections.Counter())
    return {
        "episodes": len(lengths),
        "steps": int(lengths.sum()),
        "chunks": int(chunks.sum()),
        "skipped": dict(skipped),
        "skipped_notes": [note for part in parts for note in part.notes][:_MAX_NOTES],
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


def _derive(
    directory: Path,
    manifest: dict[str, Any],
    codec_size: tuple[int, int] | None,
    patch: int,
    channels: int,
    val_ratio: float,
) -> None:
    """What is computed from the finished records: statistics, and the PCA codec of the (first or) `train` split."""
    write_stats(directory)
    dataset = Dataset(directory, "train" if "train" in manifest["splits"] else next(iter(manifest["splits"])))
    size = codec_size or common_size(dataset.cameras, patch)
    if not dataset.cameras or size is None:
        print("PCA codec: not fitted, as the cameras have no common size; fit it with --codec_size=H,W.")
        return
    frames = fit_codec(dataset, directory / "codec" / "pca.npz", size, patch, channels, val_ratio)
    print(f"PCA codec: fitted at {size[0]}x{size[1]} on {frames} steps of training episodes.")


def summary(manifest: dict[str, Any]) -> str:
    """What a dataset holds and what was skipped in making it, for people."""
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
    return "\n".join(lines)


def define_flags() -> None:
    flags.DEFINE_string("input", None, "directory of an RLDS dataset, with dataset_info.json and features.json")
    flags.DEFINE_string("output", None, "directory to make")
    flags.DEFINE_list("split", [], "splits to take, separated by commas; default all")
    flags.DEFINE_integer("chunk_steps", 16, "steps per record", lower_bound=1)
    flags.DEFINE_integer("shard_mb", 256, "size of a shard in MiB", lower_bound=1)
    flags.DEFINE_list("codec_size", [], "H,W at which the PCA codec is fitted; default the cameras' size")
    flags.DEFINE_integer("pca_patch", 8, "side of the PCA codec's patches in pixels", lower_bound=1)
    flags.DEFINE_integer("pca_channels", 12, "latent channels of the PCA codec", lower_bound=1)
    flags.DEFINE_float("val_ratio", 0.05, "share of episodes held out of the codec's fit, as config.data.val_ratio")
    flags.DEFINE_integer("workers", 0, "processes; 0 = one per core", lower_bound=0)
    flags.DEFINE_bool("overwrite", False, "replace an existing output")


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(f"unexpected argument {argv[0]!r}: flags are written --flag=value.")
    source, output = cli.required("input"), cli.required("output")
    size = None
    if FLAGS.codec_size:
        if len(FLAGS.codec_size) != 2 or not all(n.isdigit() and int(n) > 0 for n in FLAGS.codec_size):
            raise UserError(f"--codec_size: expected H,W in pixels, found {','.join(FLAGS.codec_size)!r}.")
        size = (int(FLAGS.codec_size[0]), int(FLAGS.codec_size[1]))
    manifest = reshard(
        source,
        output,
        splits=FLAGS.split,
        chunk_steps=FLAGS.chunk_steps,
        shard_mb=FLAGS.shard_mb,
        codec_size=size,
        pca_patch=FLAGS.pca_patch,
        pca_channels=FLAGS.pca_channels,
        val_ratio=FLAGS.val_ratio,
        workers=FLAGS.workers,
        overwrite=FLAGS.overwrite,
    )
    print(f"{output}: {summary(manifest)}")


if __name__ == "__main__":
    cli.run(main, define_flags)
