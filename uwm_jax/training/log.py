"""Metrics to `metrics.jsonl`, TensorBoard and one progress line; and the guard against NaN."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from uwm_jax.errors import RunError
from uwm_jax.files import write_text


class NotFinite(RunError):
    """A metric became NaN or infinite; the message names the step and the metric."""


class Window:
    """Device metrics of the steps since the last log line, fetched together so that steps do not wait.

    At most `ahead` steps are in flight: `add` waits for the one before.
    """

    def __init__(self, ahead: int = 2):
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []
        self._ahead = ahead

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self._pending.append((step, metrics))
        if len(self._pending) > self._ahead:
            jax.block_until_ready(self._pending[-1 - self._ahead][1])

    def means(self) -> dict[str, float]:
        """Mean of every metric over the window, which is emptied; `learning_rate` is the last step's.

        Raises NotFinite for the first step whose loss or gradient is not finite.
        """
        pending, self._pending = self._pending, []
        fetched = [(step, jax.device_get(metrics)) for step, metrics in pending]
        for step, metrics in fetched:
            for name, value in metrics.items():
                if not np.isfinite(value):
                    raise NotFinite(
                        f"step {step}: {name} is {float(value)}. Nothing of it was saved; a lower "
                        "config.optimizer.learning_rate or config.optimizer.clip_norm=1.0 often helps."
                    )
        means = {name: float(np.mean([m[name] for _, m in fetched])) for name in fetched[-1][1]}
        means["learning_rate"] = float(fetched[-1][1]["learning_rate"])
        return means


class Clock:
    """Wall time of the loop since the last log line, the share spent waiting for data, and an ETA."""

    def __init__(self, step: int, total_steps: int, batch_size: int):
        self._total, self._batch_size = total_steps, batch_size
        self._mark = (time.perf_counter(), step)
        self._start: tuple[float, int] | None = None
        self._waited = 0.0

    def tick(self, step: int, data_wait_seconds: float) -> dict[str, float]:
        """`samples_per_second`, `data_wait_fraction` and `eta_seconds`; the time since the last call counts.

        The first interval, which holds the compilation, is left out of the ETA, which is NaN until the second.

        Args:
          data_wait_seconds: how long the run has waited for data so far.
        """
        now, (then, last) = time.perf_counter(), self._mark
        elapsed = max(now - then, 1e-9)
        rates = {
            "samples_per_second": (step - last) * self._batch_size / elapsed,
            "data_wait_fraction": min((data_wait_seconds - self._waited) / elapsed, 1.0),
        }
        rates["eta_seconds"] = math.nan
        if self._start:
            rates["eta_seconds"] = (self._total - step) * (now - self._start[0]) / max(step - self._start[1], 1)
        self._start = self._start or (now, step)
        self._mark, self._waited = (now, step), data_wait_seconds
        return rates

    def pause(self, seconds: float) -> None:
        """Takes time that was not training (evaluation, a blocking save) out of the rates."""
        self._mark = (self._mark[0] + seconds, self._mark[1])
        if self._start:
            self._start = (self._start[0] + seconds, self._start[1])


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard.

    Args:
      workdir: the run's directory.
      step: the step that the run continues from; later lines of an earlier run are cut off.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int):
        path = Path(workdir) / "metrics.jsonl"
        if path.is_file():
            kept = [json.dumps(x) for x in read_metrics(path) if x["step"] <= step]
            write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`, without what a crash left half-written; [] where there is no file."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    complete = []
    for line in lines:
        try:
            complete.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return complete


def progress_line(step: int, total_steps: int, metrics: Mapping[str, Any]) -> str:
    """`step 200/1000  loss 0.812 (action 0.402, next_obs 0.410)  285 samples/s  data wait 1 %  ETA 3:20`."""
    eta = "after the next line"
    if math.isfinite(metrics["eta_seconds"]):
        minutes, seconds = divmod(round(metrics["eta_seconds"]), 60)
        hours, minutes = divmod(minutes, 60)
        eta = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    parts = ", ".join(f"{m} {metrics[f'loss/{m}']:.4f}" for m in ("action", "next_obs"))
    return (
        f"step {step}/{total_steps}  loss {metrics['loss']:.4f} ({parts})  "
        f"{metrics['samples_per_second']:.1f} samples/s  data wait {100 * metrics['data_wait_fraction']:.0f} %  "
        f"ETA {eta}"
    )
