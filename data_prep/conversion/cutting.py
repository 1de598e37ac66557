"""Cuts the inputs of a corpus into shards of chunks, each input by one process: the tasks of a job."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
from tqdm import tqdm

from data_prep.conversion.results import Result, first_notes
from data_prep.jobs.job_folder import RESULT, claimed
from data_prep.jobs.output import naming
from data_prep.jobs.workers import pool
from data_prep.sources.inputs import Input
from uwm_jax.data.chunks import EpisodeError, Layout, cut_episode
from uwm_jax.data.writing import ShardWriter
from uwm_jax.files import Place, copy_tree, new_folder

_AHEAD = 4  # tasks for each process that are handed out: to wait for one of many takes as long as there are many


@dataclasses.dataclass(frozen=True)
class Job:
    """One task: an input, and the folder `parts` of the job's parts, in which its own is `folder`."""

    split: str
    number: int
    input: Input
    layout: Layout
    shard_bytes: int
    parts: Place

    @property
    def folder(self) -> Place:
        return self.parts / f"{self.split}.{self.number:05d}"

    @property
    def local_folder(self) -> Path:
        """`folder`, of a task whose parts are on this machine."""
        assert isinstance(self.folder, Path)
        return self.folder

    @property
    def is_done(self) -> bool:
        return (self.folder / RESULT).exists()

    def result(self) -> Result:
        """The result of a task that is done."""
        return Result.load(self.folder / RESULT)


_done_bytes: Any = None  # shared counters of progress, set in every worker
_done_episodes: Any = None


def _init_worker(done_bytes: Any, done_episodes: Any) -> None:
    global _done_bytes, _done_episodes
    _done_bytes, _done_episodes = done_bytes, done_episodes


def _count(size: int, episodes: int) -> None:
    if _done_bytes is not None:
        with _done_bytes.get_lock():
            _done_bytes.value += size
            _done_episodes.value += episodes


def run_task(job: Job, wait: bool = True) -> bool:
    """Runs one task, unless it is done; its folder appears when it is complete and on disk.

    Args:
        wait: for another process that is at work on it; else returns False then.
    Returns:
        Whether the task is done.
    """
    with claimed(job.folder, wait=wait) as mine:
        if not mine:
            return False
        if job.is_done:  # by a process that has just left it
            _count(job.input.size, len(job.result().lengths))
            return True
        try:
            with _new_part(job.folder) as folder:
                _cut(job, folder).save(folder / RESULT)
        except OSError:
            if not job.is_done:  # another process finished it first, where files cannot be locked
                raise
        except Exception as e:
            e.add_note(f"in the task {job.folder.name}: {job.input.name}")
            raise
    return True


@contextlib.contextmanager
def _new_part(part: Place) -> Iterator[Path]:
    """As `new_folder`; in a bucket, over the same bytes that another process, or one that was killed, has written."""
    if isinstance(part, Path):
        with new_folder(part) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        copy_tree(Path(name), part, last=RESULT)


def _cut(job: Job, folder: Path) -> Result:
    """Cuts the episodes of an input into shards and columns in `folder`."""
    result = Result()
    columns = {key: (folder / f"{i}.column").open("wb") for i, key in enumerate(job.layout.columns)}
    writer = ShardWriter(folder, job.shard_bytes)
    bytes_left = job.input.size
    number = -1
    for number, found in enumerate(job.input.episodes()):
        kept = 0
        try:
            if found.record is None:
                raise EpisodeError(found.reason, found.detail or found.reason)
            episode = cut_episode(found.record, job.layout)
        except EpisodeError as e:
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
        _count(size, kept)
    for column in columns.values():
        with naming(Path(column.name)):
            column.close()
    result.shards = writer.close()
    result.count_missing(job.input.name, number + 1, job.input.promised, job.input.declared_by)
    result.notes = first_notes([result])
    _count(bytes_left, 0)  # data after a broken frame are not read
    return result


def run_jobs(jobs: Sequence[Job], workers: int, watch: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Runs the tasks that are not done in `workers` processes (in this one if 1); returns the results of all.

    Tasks on which another process is at work come last.

    Args:
        watch: called with each result; an exception that it raises ends all tasks.
    """
    results = {job.folder: job.result() for job in jobs if job.is_done}
    for result in results.values():
        watch(result)
    left = [job for job in jobs if job.folder not in results]
    counters: list[Any] = [multiprocessing.get_context("spawn").Value("q", 0) for _ in range(2)]
    done = sum(job.input.size for job in jobs if job.folder in results)
    total = sum(job.input.size for job in jobs)
    with tqdm(total=total, initial=done, desc="episodes", unit="B", unit_scale=True) as bar:

        def show() -> None:
            bar.set_postfix(episodes=counters[1].value, refresh=False)
            bar.update(done + counters[0].value - bar.n)

        executor: concurrent.futures.Executor
        if (processes := max(1, min(workers, len(left)))) > 1:
            executor = pool(processes, _init_worker, tuple(counters))
        else:
            executor = concurrent.futures.ThreadPoolExecutor(1, initializer=_init_worker, initargs=tuple(counters))
        with executor:
            todo = collections.deque((job, False) for job in left)
            waiting: dict[concurrent.futures.Future[bool], Job] = {}
            try:
                while todo or waiting:
                    while todo and len(waiting) < _AHEAD * processes:
                        job, wait = todo.popleft()
                        waiting[executor.submit(run_task, job, wait)] = job
                    finished, _ = concurrent.futures.wait(waiting, timeout=0.5, return_when="FIRST_COMPLETED")
                    for future in finished:
                        job = waiting.pop(future)
                        if not future.result():  # a failure ends all tasks immediately
                            todo.append((job, True))
                            continue
                        results[job.folder] = job.result()
                        watch(results[job.folder])
                    show()
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise
    return [results[job.folder] for job in jobs]
