"""Windows per second of the training loader from a bucket, next to the same windows from the page cache.

The bucket is an emulator's on this machine, behind a proxy that delays every request. Emulator and proxy are kept on
one core, and the loader on another, so that what is compared is how much one core of a host reads. Each row reads in a
process of its own; in every round all rows have their turn. Wall time counts, in which waiting for the bucket shows;
rates by the CPU time of the loader's process tell what it would be if nothing else ran on its core.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.conversion.layout_options import Options
from data_prep.conversion.training_layout import reshard
from data_prep.jobs.child import Child
from data_prep.jobs.copying import Copy
from data_prep.rates import loader, loader_data
from uwm_jax import cli, files
from uwm_jax.benchmarking.emulator import emulator
from uwm_jax.benchmarking.fault_proxy import Proxy, fault_proxy
from uwm_jax.data.loader import Loader
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError
from uwm_jax.storage import environment

BUCKET = "bkt"
STREAMED = 4  # --chunk_steps of a dataset that is read from a bucket, as docs/buckets.md recommends
COPIES = 4  # of the episodes: windows that are read at the same time should seldom share a record
BAR = 0.8  # of the rate from the page cache


class Turn(NamedTuple):
    """What a row's process is asked for.

    Attributes:
        dataset: its directory or URL.
        core: that the process is kept on.
        seconds: to read for.
    """

    dataset: str
    core: int
    seconds: float


class Rate(NamedTuple):
    """Windows that were read, and windows per second of wall time and of the process's CPU time."""

    windows: int
    wall: float
    cpu: float


_readers: dict[str, Iterator[int]] = {}  # of this process


def take(turn: Turn, mark: Callable[[int], None] = lambda number: None) -> Rate:
    """Reads for a row, whose loader stays open between turns."""
    os.sched_setaffinity(0, {turn.core})
    if turn.dataset not in _readers:
        _readers[turn.dataset] = _batches(turn.dataset)
    _rate(_readers[turn.dataset], turn.seconds / 4)  # what was read ahead since the last turn does not count
    return _rate(_readers[turn.dataset], turn.seconds)


def _batches(dataset: str) -> Iterator[int]:
    config, defaults = loader.config_of(dataset), loader.config_lib.base().data
    config.data.num_threads, config.data.read_ahead = defaults.num_threads, defaults.read_ahead
    for _ in Loader(RunData(config.data, seed=0), batch_size=config.batch_size):
        yield config.batch_size


def _rate(batches: Iterator[int], seconds: float) -> Rate:
    windows, began, cpu = 0, time.perf_counter(), time.process_time()
    while (spent := time.perf_counter() - began) < seconds:
        windows += next(batches)
    return Rate(windows, windows / spent, windows / (time.process_time() - cpu))


def benchmark(
    directory: Path,
    *,
    episodes: int,
    steps: int,
    delay: float,
    rounds: int,
    seconds: float,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Makes the data in an empty directory and measures.

    Args:
        delay: seconds that each request waits. seconds: of a row in a round.

    Returns:
        `wall/<place>_<chunk_steps>` and `cpu/...`: medians of windows per second, and `rounds/...` all of them;
        `wall/of_local` and `cpu/of_local`: medians of quotients of a round, of the bucket with `STREAMED` and the
        faster of the local rows; `requests/<chunk_steps>`: of a window; `copy/mb_per_s`: from the bucket to the disk.
    Raises:
        UserError: this machine has no two cores, or no emulator.
    """
    if not hasattr(os, "sched_setaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
        raise UserError("--bucket needs two cores that processes can be kept on: one for the bucket, one to read.")
    made = loader_data.make(directory, episodes, steps)
    reshard(made.rlds, directory / "short", workers=1, pca_channels=1, chunk_steps=STREAMED)
    windows = COPIES * episodes * (steps - loader.SPAN + 1)
    local = {
        number: loader_data.repeated(small, directory / f"chunks_{number}", windows, loader.SPAN)
        for number, small in ((Options.chunk_steps, made.dataset), (STREAMED, directory / "short"))
    }
    found: dict[str, Any] = {"delay": delay}
    with contextlib.ExitStack() as closing:
        closing.enter_context(_on({cores[0]}))
        bucket = closing.enter_context(emulator(BUCKET))
        proxy = closing.enter_context(fault_proxy(bucket.url, delay))
        os.sched_setaffinity(0, {cores[1]})
        threads = str(environment.http_threads(1))  # for the one core that a loader is kept on
        closing.enter_context(_environment({**proxy.environ, "TENSORSTORE_HTTP_THREADS": threads}))
        remote = {number: files.as_place(f"gs://{BUCKET}/{number}") for number in local}
        for number, dataset in local.items():
            Copy(dataset, remote[number]).run()
        began = time.perf_counter()
        found["copy/mb_per_s"] = Copy(remote[STREAMED], directory / "copied").run().size / 1e6
        found["copy/mb_per_s"] /= time.perf_counter() - began
        rows = {f"local_{number}": str(dataset) for number, dataset in local.items()}
        rows |= {f"bucket_{number}": str(dataset) for number, dataset in remote.items()}
        rates, requests = _rounds(rows, cores[1], rounds, seconds, proxy, progress)
    for row, of_row in rates.items():
        for kind in ("wall", "cpu"):
            found[f"rounds/{kind}/{row}"] = [getattr(rate, kind) for rate in of_row]
            found[f"{kind}/{row}"] = statistics.median(found[f"rounds/{kind}/{row}"])
    for kind in ("wall", "cpu"):
        best = max((row for row in rates if row.startswith("local")), key=lambda row: found[f"{kind}/{row}"])
        all_rounds = {row: found[f"rounds/{kind}/{row}"] for row in rates}
        found[f"{kind}/of_local"] = loader.ratio(all_rounds, f"bucket_{STREAMED}", best)
    return found | {f"requests/{row.partition('_')[2]}": count for row, count in requests.items()}


def _rounds(
    rows: Mapping[str, str], core: int, rounds: int, seconds: float, proxy: Proxy, progress: Callable[[], Any]
) -> tuple[dict[str, list[Rate]], dict[str, float]]:
    """The rates of each row in each round, and the requests that a window of each row in the bucket takes."""
    rates: dict[str, list[Rate]] = {row: [] for row in rows}
    sent, names = dict.fromkeys((row for row in rows if row.startswith("bucket")), 0), list(rows)
    with contextlib.ExitStack() as closing:
        children = {row: closing.enter_context(Child(take)) for row in rows}
        for number in range(rounds):
            for row in (*names[number % len(names) :], *names[: number % len(names)]):
                before = proxy.requests["GET read"]
                rates[row].append(children[row].call(Turn(rows[row], core, seconds), loader.MOST_SECONDS))
                if row in sent:
                    sent[row] += proxy.requests["GET read"] - before
                progress()
    # A turn begins with a quarter of its time that is not counted.
    return rates, {row: count / (1.25 * sum(rate.windows for rate in rates[row])) for row, count in sent.items()}


def table(found: Mapping[str, Any]) -> str:
    """The numbers for people."""
    rows = [("row", "windows/s", "by CPU time", "requests a window")]
    for name, rate in found.items():
        kind, _, row = name.partition("/")
        if kind == "wall" and row != "of_local":
            requests = found.get(f"requests/{row.partition('_')[2]}") if row.startswith("bucket") else None
            rows.append((row, f"{rate:.1f}", f"{found[f'cpu/{row}']:.1f}", f"{requests:.2f}" if requests else ""))
    share, cpu = found["wall/of_local"], found["cpu/of_local"]
    bars = [
        ("measured", "", "bar", ""),
        ("wall/of_local", f"{share:.3f}", f"at least {BAR}", "met" if share >= BAR else "MISSED"),
        ("cpu/of_local", f"{cpu:.3f}", "", ""),
        ("copy, MB/s", f"{found['copy/mb_per_s']:.1f}", "", ""),
    ]
    return "\n\n".join(cli.table(part) for part in (rows, bars))


@contextlib.contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Keeps this process, and those that it starts, on some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, which child processes inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
