"""Metrics to `metrics.jsonl`, TensorBoard and one progress line; and the guard against NaN."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from uwm_jax.errors import RunError
from uwm_jax.files import write_text
from uwm_jax.training.goodput import duration


class NotFinite(RunError):
    """A metric became NaN or infinite; the message names the step and the metric."""


class Window:
    """Device metrics of the steps since the last log line.

    A metric of shape () is averaged over the steps; one of shape (2,) is [sum, count] and becomes the ratio of the
    two sums over the steps. Everything is added in float64 in the order of the steps, so a window that was
    interrupted and restored ends with the same bits as one that was not.

    At most `ahead` steps are in flight: `add` fetches the one before, while the device works on the later ones.
    """

    def __init__(self, ahead: int = 2):
        self._ahead = ahead
        self._pending: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()
        self._empty()

    def _empty(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}  # {metric: (sum, steps or count)}
        self._last: dict[str, float] = {}

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step, replicated arrays of shape () or (2,), of which `learning_rate` is one.

        Raises NotFinite for the step that it fetches.
        """
        self._pending.append((step, metrics))
        self._fetch(self._ahead)

    def check(self) -> None:
        """Waits for all steps and raises NotFinite for the first one with a metric that is not finite."""
        self._fetch(0)

    def _fetch(self, leave: int) -> None:
        while len(self._pending) > leave:
            step, metrics = self._pending.popleft()
            for name, value in jax.device_get(dict(metrics)).items():
                total, count = (float(x) for x in (value if np.ndim(value) else (value, 1.0)))
                if not math.isfinite(total) or not math.isfinite(count):
                    raise NotFinite(
                        f"step {step}: {name} is {total}. Nothing of it was saved; a lower "
                        "config.optimizer.learning_rate or config.optimizer.clip_norm=1.0 often helps."
                    )
                before = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (before[0] + total, before[1] + count)
                if name == "learning_rate":
                    self._last[name] = total

    def means(self) -> dict[str, float]:
        """Every metric over the window, which is emptied.

        `learning_rate` is the last step's; a ratio whose count is 0 is left out. Raises NotFinite as `check`.
        """
        self.check()
        means = {name: total / count for name, (total, count) in self._sums.items() if count} | self._last
        self._empty()
        return means

    def state(self) -> dict[str, Any]:
        """The window as JSON for a checkpoint between two log lines. Raises NotFinite as `check`."""
        self.check()
        return {"sums": {name: list(pair) for name, pair in self._sums.items()}, "last": dict(self._last)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues a window from what `state` returned."""
        self._sums = {name: (float(total), float(count)) for name, (total, count) in state["sums"].items()}
        self._last = {name: float(value) for name, value in state["last"].items()}


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard.

    Args:
      workdir: the run's directory.
      step: the step that the run continues from; later lines of an earlier run are cut off.
      writes: False on all processes but one: nothing is read or written.

    Attributes:
      cut: the last of the lines that were cut off, None where there was none.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int, writes: bool = True):
        self.cut: dict[str, Any] | None = None
        self._file, self._board = None, None
        if not writes:
            return
        path = Path(workdir) / "metrics.jsonl"
        if path.is_file():
            lines = read_metrics(path)
            kept = [json.dumps(x) for x in lines if x["step"] <= step]
            self.cut = next((x for x in reversed(lines) if x["step"] > step), None)
            write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, Path] | None = None) -> None:
        """A line of the metrics of a step, and scalars and pictures {name: file} to TensorBoard."""
        if self._file is None or self._board is None:
            return
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as e:  # a full disk does not say which file it was
            raise OSError(e.errno, e.strerror, self._file.name) from e
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        for name, picture in (pictures or {}).items():
            self._board.add_image(name, np.asarray(Image.open(picture).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files. Where the disk is full, an exception that is on its way already is not hidden by that."""
        another = sys.exc_info()[1] is not None
        with contextlib.suppress(OSError) if another else contextlib.nullcontext():
            for target in (self._file, self._board):
                if target is not None:
                    target.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`, without what a crash left half-written; [] where there is no file."""
    lines = Path(path).read_text(errors="replace").splitlines() if Path(path).is_file() else []
    complete = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            read = json.loads(line)
            if isinstance(read, dict):
                complete.append(read)
    return complete


def progress_line(step: int, total_steps: int, metrics: Mapping[str, Any]) -> str:
    """`step 200/1000  loss 0.812 (action 0.402, next_obs 0.410)  285 samples/s  data wait 1 %  ETA 3:20`.

    With `mfu` among the metrics, it stands behind the samples.
    """
    parts = ", ".join(f"{m} {metrics[f'loss/{m}']:.4f}" for m in ("action", "next_obs"))
    mfu = f"  MFU {100 * metrics['mfu']:.1f} %" if "mfu" in metrics else ""
    return (
        f"step {step}/{total_steps}  loss {metrics['loss']:.4f} ({parts})  "
        f"{metrics['samples_per_second']:.1f} samples/s{mfu}  "
        f"data wait {100 * metrics['data_wait_fraction']:.0f} %  ETA {duration(metrics['eta_seconds'])}"
    )
