"""Runs the tasks of a job on an Apache Beam pipeline: the same function as without, so the dataset is the same.

Every worker must see the input and the output under the same paths, on a file system that renames folders atomically;
the output may also be in a bucket (`bucket_output`). Only the DirectRunner is tested.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from data_prep.conversion.cutting import Job, run_task
from data_prep.conversion.results import Result
from uwm_jax.errors import RunError, UserError


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
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as e:
        raise UserError(
            "--beam: Apache Beam is not installed. Make an environment of its own for it and run "
            "`pip install 'uwm_jax[beam]'` there (`-e '.[beam]'` in a clone)."
        ) from e
    left = [job for job in jobs if not job.is_done]
    if left:
        try:
            pipeline = beam.Pipeline(options=PipelineOptions(list(arguments)))
        except (SystemExit, ValueError) as e:  # for some, Beam has printed the reason
            raise UserError(f"--beam: Beam refuses its options, {' '.join(arguments)!r}: {e}") from e
        with _progress(jobs), _errors(), pipeline:
            tasks = pipeline | "Tasks" >> beam.Create(left)
            _ = tasks | "Spread" >> beam.Reshuffle() | "Cut" >> beam.Map(run_task)
    results = [job.result() for job in jobs]
    for result in results:
        watch(result)
    return results


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
def _progress(jobs: Sequence[Job]) -> Iterator[None]:
    """A bar of the bytes of finished tasks, while the pipeline runs."""
    ended = threading.Event()

    def show() -> None:
        done = sum(job.input.size for job in jobs if job.is_done)
        with tqdm(
            total=sum(job.input.size for job in jobs), initial=done, desc="tasks", unit="B", unit_scale=True
        ) as bar:
            while not ended.wait(2.0):
                bar.update(sum(job.input.size for job in jobs if job.is_done) - bar.n)
            bar.update(sum(job.input.size for job in jobs if job.is_done) - bar.n)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
