"""Metrics to `metrics.jsonl`, to the trackers of a run and to one progress line."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from uwm_jax.errors import RunError, warn
from uwm_jax.files import AnyPath, Place, as_place
from uwm_jax.reading import again
from uwm_jax.training.goodput import duration
from uwm_jax.training.telemetry.lines import Lines, continue_lines
from uwm_jax.training.telemetry.trackers import Trackers


class MetricsLog:
    """Appends to `metrics.jsonl` and hands on to trackers; a temporarily full disk does not end the run.

    Lines of `metrics.jsonl` that cannot be written are kept in memory and written before the next one (`lines.py`);
    stderr has one warning.

    Args:
      workdir: the run's directory.
      step: the step that the run continues from; later lines of an earlier start are removed.
      trackers: get every line too; closed with the log.
      writes: False on all processes but one: nothing is read or written.

    Attributes:
      cut: the last of the removed lines, None if there are none.
    """

    def __init__(self, workdir: AnyPath, step: int, trackers: Trackers | None = None, writes: bool = True):
        self.cut: dict[str, Any] | None = None
        self._path = as_place(workdir) / "metrics.jsonl"
        self._lines: Lines | None = None
        self._trackers = trackers
        self._was_told = False
        if not writes:
            return
        texts = _lines(self._path)
        lines = _metrics_of(texts)
        if (unusable := len(texts) - len(lines)) > 1:  # one may be what a crash left half-written
            warn(f"{self._path}: {unusable} invalid lines are removed.")
        kept = [json.dumps(x) + "\n" for x in lines if x["step"] <= step]
        self.cut = next((x for x in reversed(lines) if x["step"] > step), None)
        self._lines = continue_lines(self._path, "".join(kept).encode())

    def write(self, step: int, metrics: Mapping[str, float], pictures: Mapping[str, Place] | None = None) -> None:
        """Writes a line with the metrics of a step; trackers get pictures {name: file} too."""
        if self._lines is None:
            return
        reason = self._lines.append((json.dumps({"step": step, **metrics}) + "\n").encode())
        if reason and not self._was_told:
            self._was_told = True
            warn(
                f"{self._path} cannot be written ({reason}). The run continues to its next checkpoint; lines are kept "
                "in memory until they can be written."
            )
        if self._trackers is not None:
            self._trackers.log(step, metrics, pictures)

    def sync(self) -> None:
        """Called before a checkpoint, as `Lines.sync`."""
        if self._lines is not None:
            self._lines.sync()

    @property
    def behind(self) -> bool:
        """Whether lines are unwritten, which a run that continues from a checkpoint after them would lack forever."""
        return self._lines is not None and self._lines.behind

    def check(self) -> None:
        """Raises OSError, with the file's name, or RunError, if lines still cannot be written."""
        if self._lines is not None:
            self._lines.check()

    def end_trackers(self) -> None:
        """Called before `close` where there are several logs, so that their trackers end side by side."""
        if self._trackers is not None:
            self._trackers.end(failed=sys.exc_info()[1] is not None)

    def close(self) -> None:
        """Closes the files. Raises as `check`, unless another exception is being handled."""
        another = sys.exc_info()[1] is not None
        if self._trackers is not None:
            self._trackers.close(failed=another)
        if self._lines is not None:
            with contextlib.suppress(OSError, RunError) if another else contextlib.nullcontext():
                self._lines.close()


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`; [] if there is no file.

    Lines without an integer `step`, or with values that are not numbers, are left out, such as one cut by a crash.
    """
    return _metrics_of(_lines(as_place(path)))


def _metrics_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    complete = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(line)
            numbers = isinstance(read, dict) and all(_is_number(value) for value in read.values())
            if numbers and type(read.get("step")) is int and abs(read["step"]) < 2**63:
                complete.append(read)
    return complete


def _is_number(value: Any) -> bool:
    """Whether a value is a number in the range of a float; JSON has integers of any size."""
    return isinstance(value, int | float) and not (isinstance(value, int) and abs(value) > sys.float_info.max)


def _lines(path: Place) -> list[str]:
    return again(path.read_bytes, path).decode(errors="replace").splitlines() if path.is_file() else []


def loss_parts(metrics: Mapping[str, Any]) -> list[str]:
    """The names `loss/<part>` among a line's metrics, without those of buckets, sorted."""
    return sorted(name for name in metrics if name.startswith("loss/") and name.count("/") == 1)


def losses_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The total loss and its parts among a line's metrics, by name."""
    return {name: metrics[name] for name in ("loss", *loss_parts(metrics))}


def progress_line(step: int, total_steps: int, metrics: Mapping[str, Any]) -> str:
    """`step 200/1000  loss 0.812 (action 0.402, next_obs 0.410)  285 samples/s  data wait 1 %  ETA 3:20`.

    In brackets are the parts of the loss, `loss/<part>`, that the metrics have. With `mfu` among them, it stands behind
    the samples.
    """
    parts = ", ".join(f"{name.removeprefix('loss/')} {metrics[name]:.4f}" for name in loss_parts(metrics))
    mfu = f"  MFU {100 * metrics['mfu']:.1f} %" if "mfu" in metrics else ""
    return (
        f"step {step}/{total_steps}  loss {metrics['loss']:.4f} ({parts})  "
        f"{metrics['samples_per_second']:.1f} samples/s{mfu}  "
        f"data wait {100 * metrics['data_wait_fraction']:.0f} %  ETA {duration(metrics['eta_seconds'])}"
    )
