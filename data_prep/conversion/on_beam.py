"""Runs the tasks of a job on an Apache Beam pipeline: the same function as without, so the dataset is the same.

Every worker must see the input and the output under the same paths, on a file system that renames folders atomically;
the output may also be in a bucket (`bucket_output`). Tested are the DirectRunner, and the PortableRunner with Beam's
local job service, whose workers are processes of their own.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from data_prep.conversion.cutting import Job, run_task
from data_prep.conversion.results import Result
from uwm_jax.errors import RunError, UserError

_PATIENCE = 20.0  # seconds to reach a job service


def run_jobs(
    jobs: Sequence[Job], arguments: Sequence[str], watch: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """Like `cutting.run_jobs`, on a pipeline.

    Args:
        arguments: options of the pipeline, such as `--runner=FlinkRunner`; the DirectRunner without.
        watch: called with each result; an exception that it raises ends the job.
    Raises:
        UserError: Beam is not installed, or refuses the arguments.
        RunError: a task failed on its worker.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions, StandardOptions
    except ImportError as e:
        raise UserError(
            "--beam: Apache Beam is not installed. Make an environment of its own for it and run "
            "`pip install 'uwm_jax[beam]'` there (`-e '.[beam]'` in a clone)."
        ) from e
    left = [job for job in jobs if not job.is_done]
    if left:
        try:
            options = PipelineOptions(list(arguments))
            if "Direct" in (options.view_as(StandardOptions).runner or "DirectRunner"):
                _check_known(options, arguments)
            _check_reachable(options.view_as(PortableOptions).job_endpoint or "")
            pipeline = beam.Pipeline(options=options)
        except (SystemExit, ValueError) as e:  # for some, Beam has printed the reason
            raise UserError(f"--beam: Beam refuses its options, {' '.join(arguments)!r}: {e}") from e
        with _progress(jobs, left), _errors(), pipeline:
            tasks = pipeline | "Tasks" >> beam.Create(left)
            _ = tasks | "Spread" >> beam.Reshuffle() | "Cut" >> beam.Map(run_task)
    results = [job.result() for job in jobs]
    for result in results:
        watch(result)
    return results


def _check_known(options: Any, arguments: Sequence[str]) -> None:
    """Raises ValueError that names options which Beam would ignore; a runner elsewhere may know more than Beam does."""
    unknown = set(options.get_all_options(retain_unknown_options=True)) - set(options.get_all_options())
    pairs = zip(arguments, ("", *arguments), strict=False)  # each with the one before it
    stray = [a for a, b in pairs if a[:1] != "-" and (b[:2] != "--" or "=" in b)]
    if unknown or stray:
        raise ValueError(f"the DirectRunner does not know {', '.join([*map('--{}'.format, sorted(unknown)), *stray])}")


def _check_reachable(endpoint: str) -> None:
    """Waits for a job service that is starting at `host:port`; raises ValueError if none answers, for which Beam would
    wait for minutes. Endpoints of other forms are left to Beam."""
    host, colon, port = endpoint.rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:  # such as dns:///host:port
        return
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
            return
        except (OSError, OverflowError) as e:
            if time.monotonic() > deadline:
                raise ValueError(f"no job service answers at {endpoint} ({e})") from e
        time.sleep(0.2)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as e:
        reason = str(e).strip().splitlines()
        raise RunError(f"a task failed on the Beam pipeline: {reason[0] if reason else type(e).__name__}") from e


@contextlib.contextmanager
def _progress(jobs: Sequence[Job], left: Sequence[Job]) -> Iterator[None]:
    """A bar of the bytes of finished tasks, while the pipeline does those that are left."""
    ended = threading.Event()
    total = sum(job.input.size for job in jobs)

    def show() -> None:
        waiting, seconds = list(left), 0.0
        with tqdm(
            total=total, initial=total - sum(job.input.size for job in left), desc="tasks", unit="B", unit_scale=True
        ) as bar:
            while waiting and not ended.wait(max(2.0, 10 * seconds)):  # in a bucket, to look at many takes long
                start = time.monotonic()
                waiting = [job for job in waiting if not job.is_done]
                seconds = time.monotonic() - start
                bar.update(total - sum(job.input.size for job in waiting) - bar.n)
            bar.update(total - sum(job.input.size for job in waiting if not job.is_done) - bar.n)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
