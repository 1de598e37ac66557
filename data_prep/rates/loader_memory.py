"""What reading costs besides time: the first batch of a large dataset, memory that processes share, and growth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.rates.loader import BATCH, config_of
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset, index_file
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError

PROCESSES = 16
WARM_SHARE = 0.1  # of a soak, before memory is compared
LOOK_SECONDS = 5.0  # between looks at memory

_COLD = """
import json, sys
from data_prep.rates.loader_memory import first_batch
print(json.dumps(first_batch(sys.argv[1])))
"""
_HOLD = """
import sys
from data_prep.rates.loader_memory import hold
hold(sys.argv[1])
"""


def first_batch(dataset: str | os.PathLike[str]) -> dict[str, float]:
    """Seconds to open a dataset, statistics included, and to read its first batch, those of CPU time in it, and the
    number of its windows."""
    began, spent = time.perf_counter(), time.process_time()
    data = RunData(config_of(dataset).data, seed=0)
    opened = time.perf_counter()
    next(iter(Loader(data, batch_size=BATCH)))
    ended = time.perf_counter()
    windows = sum(len(source.windows) for source in data.sources.values())
    return {
        "windows": windows,
        "open_seconds": opened - began,
        "first_batch_seconds": ended - began,
        "first_batch_cpu_seconds": time.process_time() - spent,
    }


def first_batch_of_a_process(dataset: Path) -> dict[str, float]:
    """`first_batch` in a process of its own, which has nothing of the dataset yet."""
    done = subprocess.run([sys.executable, "-c", _COLD, str(dataset)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def hold(dataset: str | os.PathLike[str]) -> None:
    """Opens a dataset, reads all of its index, and prints what of this memory is this process's share (PSS), whenever
    a line comes."""
    for array in vars(Dataset(dataset)._index).values():
        array.sum()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(share(Path(dataset) / index_file("train"))), flush=True)


def share(file: Path) -> dict[str, int]:
    """PSS in bytes of this process: of its mappings of a file, and of all."""
    text = Path("/proc/self/smaps").read_text()
    found = {"index": 0, "process": 0}
    name = ""
    for line in text.splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
        elif line.startswith("Pss:"):
            size = int(line.split()[1]) * 1024
            found["process"] += size
            found["index"] += size if name == str(file.resolve()) else 0
    return found


def shared_memory(dataset: Path) -> dict[str, Any]:
    """PSS in bytes of the index in one process, and in `PROCESSES` together.

    Raises:
        UserError: the system has no /proc.
    """
    if sys.platform != "linux":
        raise UserError("--pss reads /proc/self/smaps, which only Linux has. Leave it out.")
    one, every = _held(dataset, 1), _held(dataset, PROCESSES)
    return {
        "processes": PROCESSES,
        "index_bytes": (dataset / index_file("train")).stat().st_size,
        "index_of_one": one["index"],
        "index_of_all": every["index"],
        "process_of_one": one["process"],
        "process_of_all": every["process"],
    }


def _held(dataset: Path, count: int) -> dict[str, int]:
    command = [sys.executable, "-c", _HOLD, str(dataset)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            if child.stdout.readline().strip() != "ready":
                raise UserError(f"{dataset} could not be opened by one of {count} processes: see its message above.")
        shares = []
        for child in children:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            shares.append(json.loads(child.stdout.readline()))
    finally:
        for child in children:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    stream.close()
    return {name: sum(one[name] for one in shares) for name in ("index", "process")}


def soak(dataset: Path, minutes: float, progress: Callable[[float, int, int], Any]) -> dict[str, Any]:
    """Loads batches for so long, with threads, and watches the memory that this process holds.

    Args:
        progress: is told the share of the time, batches and bytes.
    Returns:
        `minutes`, `batches`, and `rss_after_warm_up`, `rss_at_end`, `rss_largest` in bytes: warm is a tenth of it.
    """
    config = config_of(dataset).data
    config.num_threads = 2
    batches = iter(Loader(RunData(config, seed=0), batch_size=BATCH))
    began = looked = time.monotonic()
    seen: list[tuple[float, int]] = []
    count, ends = 0, began + 60 * minutes
    while (now := time.monotonic()) < ends:
        next(batches)
        count += 1
        if now - looked >= min(LOOK_SECONDS, 6 * minutes):
            looked = now
            seen.append((now - began, _rss()))
            progress((now - began) / (60 * minutes), count, seen[-1][1])
    seen.append((60 * minutes, _rss()))
    warm = [rss for at, rss in seen if at >= WARM_SHARE * 60 * minutes]
    return {
        "minutes": minutes,
        "batches": count,
        "rss_after_warm_up": warm[0],
        "rss_at_end": warm[-1],
        "rss_largest": max(warm),
    }


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
