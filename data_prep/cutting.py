"""Cuts the inputs of a corpus into shards of chunks, each input by one process."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
from array_record.python import array_record_module
from tqdm import tqdm

from data_prep.chunks import EpisodeError, Layout, cut_episode
from data_prep.inputs import Input
from data_prep.output import naming
from data_prep.workers import pool

# Riegeli's hashes detect damage; compressing encoded images would only slow down reading.
_WRITER_OPTIONS = "group_size:1,uncompressed"
MAX_NOTES = 100  # skipped episodes of each reason that are described individually


@dataclasses.dataclass(frozen=True)
class Job:
    split: str
    number: int
    input: Input
    layout: Layout
    shard_bytes: int
    building: Path

    @property
    def parts(self) -> Path:
        return self.building / "parts" / f"{self.split}.{self.number:05d}"


@dataclasses.dataclass
class Result:
    """The result of one input: shards in order (temporary name, records, bytes, sha256), the crc32c of each record,
    lengths and strings of its episodes, and skipped episodes and remarks on others by reason.

    `notes` describe skipped episodes: (reason, text)."""

    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    checksums: list[int] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    texts: dict[str, list[bytes]] = dataclasses.field(default_factory=dict)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    remarks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def episodes(self) -> int:
        """Number of episodes, kept and skipped."""
        return len(self.lengths) + self.skipped.total()

    def count_missing(self, where: str, found: int, promised: int | None, declared_by: str) -> None:
        """Counts as skipped the episodes that the source declares and the data lack."""
        if promised is None or found == promised:
            return
        if found < promised:
            missing = f"missing, though {declared_by} declares it"
            self.skipped[missing] += promised - found
            note = f"{where}: ends after {found} of the {promised} episodes that {declared_by} declares"
        else:
            missing, note = "", f"{where}: has {found} episodes, though {declared_by} declares {promised}"
        self.notes.insert(0, (missing, note))


def first_notes(results: Iterable[Result], most: int = MAX_NOTES) -> list[tuple[str, str]]:
    """The first `most` notes of each reason, (reason, text)."""
    seen: collections.Counter[str] = collections.Counter()
    kept = []
    for reason, note in (note for result in results for note in result.notes):
        seen[reason] += 1
        if seen[reason] <= most:
            kept.append((reason, note))
    return kept


_done_bytes: Any = None  # shared counters of progress, set in every worker
_done_episodes: Any = None


def _init_worker(done_bytes: Any, done_episodes: Any) -> None:
    global _done_bytes, _done_episodes
    _done_bytes, _done_episodes = done_bytes, done_episodes


def _run_job(job: Job) -> Result:
    result = Result()
    job.parts.mkdir(parents=True)
    columns = {key: (job.parts / f"{i}.column").open("wb") for i, key in enumerate(job.layout.columns)}
    writer = _ShardWriter(job)
    bytes_left = job.input.size
    number = -1
    for number, found in enumerate(job.input.episodes()):
        try:
            if found.record is None:
                raise EpisodeError(found.reason, found.detail or found.reason)
            episode = cut_episode(found.record, job.layout)
        except EpisodeError as e:
            kept = 0
            result.skipped[e.reason] += 1
            detail = "" if str(e) == e.reason else f": {e}"
            name = found.name or f"{job.input.name}: record {number}"
            result.notes.append((e.reason, f"{name}: {e.reason}{detail}"))
        else:
            kept = 1
            result.remarks.update(found.remarks)
            for chunk in episode.chunks:
                writer.write(chunk)
                result.checksums.append(google_crc32c.value(chunk))
            for key, values in episode.columns.items():
                with naming(Path(columns[key].name)):
                    columns[key].write(values.astype(job.layout.columns[key][1]).tobytes())
            result.lengths.append(episode.length)
            for name, text in episode.texts.items():
                result.texts.setdefault(name, []).append(text)
        size = min(found.size, bytes_left)
        bytes_left -= size
        with _done_bytes.get_lock():
            _done_bytes.value += size
            _done_episodes.value += kept
    for column in columns.values():
        with naming(Path(column.name)):
            column.close()
    result.shards = writer.close()
    result.count_missing(job.input.name, number + 1, job.input.promised, job.input.declared_by)
    with _done_bytes.get_lock():
        _done_bytes.value += bytes_left  # data after a broken frame are not read
    result.notes = first_notes([result])
    return result


class _ShardWriter:
    """Writes records to consecutive ArrayRecord files of about `shard_bytes`."""

    def __init__(self, job: Job):
        self._job = job
        self._shards: list[dict[str, Any]] = []
        self._writer: Any = None
        self._size = self._records = 0

    def write(self, record: bytes) -> None:
        with self._disk_errors():
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

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns the library's only error type, which has the system's message in its text, into OSError."""
        try:
            yield
        except RuntimeError as e:
            number = next((n for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if os.strerror(n) in str(e)), errno.EIO)
            raise OSError(number, os.strerror(number), str(self._file)) from e

    def _finish(self) -> None:
        if self._writer is None:
            return
        with self._disk_errors():
            self._writer.close()
        with self._file.open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        self._shards.append(
            {"part": self._file, "records": self._records, "bytes": self._file.stat().st_size, "sha256": sha256}
        )
        self._writer, self._size, self._records = None, 0, 0


def run_jobs(jobs: list[Job], workers: int, watch: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Runs the jobs in `workers` processes (in this one if 1).

    Args:
        watch: called with each result; an exception that it raises ends all jobs.
    """
    context = multiprocessing.get_context("spawn")
    done_bytes, done_episodes = context.Value("q", 0), context.Value("q", 0)
    counters = (done_bytes, done_episodes)
    executor: concurrent.futures.Executor
    if (processes := min(workers, len(jobs))) > 1:
        executor = pool(processes, _init_worker, counters)
    else:
        executor = concurrent.futures.ThreadPoolExecutor(1, initializer=_init_worker, initargs=counters)
    total = sum(job.input.size for job in jobs)
    with tqdm(total=total, desc="episodes", unit="B", unit_scale=True) as bar, executor:
        futures = [executor.submit(_run_job, job) for job in jobs]
        pending: set[concurrent.futures.Future[Result]] = set(futures)
        try:
            while pending:
                done, pending = concurrent.futures.wait(pending, timeout=0.5)
                for future in done:
                    watch(future.result())  # a failure ends all jobs immediately
                bar.set_postfix(episodes=done_episodes.value, refresh=False)
                bar.update(done_bytes.value - bar.n)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
