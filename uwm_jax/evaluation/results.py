"""What lies in a run's workdir, read for reports: metrics with their intervals, curves, and where it all comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.evaluation.metrics import FEWEST, TOO_FEW
from uwm_jax.reading import read_json
from uwm_jax.reporting.curves import Curve
from uwm_jax.training.checkpoint import Checkpoints, latest_step
from uwm_jax.training.log import read_metrics
from uwm_jax.training.record import read_starts
from uwm_jax.training.stored import CorruptCheckpoint

FEW_STEPS = "few_steps.json"


class Interval(NamedTuple):
    """A mean over `n` windows of so many `episodes`, or over `n` = `episodes` of them, with its 95 % interval.

    `lo` and `hi` are the mean itself where there are fewer than `FEWEST` episodes; `tells` is False then.
    """

    mean: float
    lo: float
    hi: float
    n: int
    episodes: int

    @classmethod
    def of(cls, stored: Mapping[str, Any] | None, episodes: int | None = None) -> Interval | None:
        """From `{"mean", "lo", "hi", "n", "episodes"}`; None for None and for what has no finite mean.

        Older files lack the last, and there are at most `episodes` then; they have `lo` and `hi` whatever the number.
        """
        if stored is None or stored["mean"] is None or not math.isfinite(stored["mean"]):
            return None
        mean, n = float(stored["mean"]), int(stored["n"])
        count = int(stored.get("episodes", min(n, episodes or n)))
        lo, hi = (float(stored[end]) for end in ("lo", "hi")) if count >= FEWEST else (mean, mean)
        return cls(mean, lo, hi, n, count)

    @property
    def tells(self) -> bool:
        """Whether there are enough episodes for it to say something about others."""
        return self.episodes >= FEWEST


def verdict(difference: Interval) -> str:
    """What the interval of a difference, positive = better, says: "yes", "no, it is worse", "undecided" or "too few
    episodes"."""
    if not difference.tells:
        return "too few episodes"
    if difference.lo > 0:
        return "yes"
    return "no, it is worse" if difference.hi < 0 else "undecided"


def number(x: float) -> str:
    """Three significant digits, without an exponent where a reader can do without."""
    if x == 0:
        return "0"
    return f"{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}" if 1e-6 <= abs(x) < 1e5 else f"{x:.2e}"


def words(m: Interval) -> str:
    """`0.0541 [0.0492, 0.0591]`, or `5.41 [4.92, 5.91] ×10⁻⁶` where all of it is small, or `0.0541 [too few]`."""
    largest = max(abs(m.lo), abs(m.hi))
    power = 3 * math.ceil(-math.log10(largest) / 3) if 0 < largest < 1e-3 else 0
    mean, lo, hi = (number(x * 10**power) for x in m[:3])
    unit = " ×10⁻" + str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) if power else ""
    return f"{mean} [{f'{lo}, {hi}' if m.tells else TOO_FEW}]{unit}"


@dataclasses.dataclass
class Run:
    """A run's directory.

    Attributes:
      name: for headings.
      lines: of `metrics.jsonl`.
      starts: of `run.json`.
      evaluations, rollouts: {step: {metric: Interval}}, by step.
      eval_how: what the newest evaluation is of and how it was run, by its `about.json`; {} where there is none.
      rollout_how: how the newest closed loop was run, by its `episodes.json`; {} where there is none.
      few_steps, few_steps_how, few_steps_step: rows of the newest `few_steps.json`, how they were made, and their
        step; [], {} and None where there is none.
      code_version, manifests: of the newest checkpoint, {source or "": manifest}; "" and {} where there is none.
    """

    workdir: Path
    name: str
    config: ConfigDict
    lines: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    evaluations: dict[int, dict[str, Interval]]
    rollouts: dict[int, dict[str, Interval]]
    eval_how: dict[str, Any]
    rollout_how: dict[str, Any]
    few_steps: list[dict[str, Any]]
    few_steps_how: dict[str, Any]
    few_steps_step: int | None
    code_version: str
    manifests: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, workdir: Path) -> Run:
        """Raises UserError where `workdir` is no run's directory, or a file of it is damaged."""
        config = config_lib.read(workdir)
        assets: dict[str, Any] = {}
        if (step := latest_step(workdir)) is not None:
            with contextlib.suppress(CorruptCheckpoint):  # a page without the data's manifest is better than none
                assets = Checkpoints(workdir, read_only=True).assets(step)
        manifest = assets.get("dataset") or {}
        few_steps = _by_step(workdir / "eval", FEW_STEPS)
        newest_few = few_steps[max(few_steps)] if few_steps else {}
        evaluations, about = (_by_step(workdir / "eval", f"{name}.json") for name in ("metrics", "about"))
        rollouts, how = (_by_step(workdir / "rollout", f"{name}.json") for name in ("metrics", "episodes"))
        return cls(
            workdir=workdir,
            name=Path(os.path.abspath(workdir)).name,  # of "." and ".." too
            config=config,
            lines=read_metrics(workdir / "metrics.jsonl"),
            starts=read_starts(workdir),
            evaluations={
                step: _intervals(workdir / f"eval/{step}/metrics.json", found, about.get(step, {}).get("episodes"))
                for step, found in evaluations.items()
            },
            rollouts={s: _intervals(workdir / f"rollout/{s}/metrics.json", found) for s, found in rollouts.items()},
            eval_how=about.get(max(evaluations, default=-1), {}),
            rollout_how=how.get(max(rollouts, default=-1), {}),
            few_steps=_few_steps(workdir / "eval" / str(max(few_steps)) / FEW_STEPS, newest_few) if few_steps else [],
            few_steps_how=newest_few.get("about", {}),
            few_steps_step=max(few_steps, default=None),
            code_version=assets.get("code_version", ""),
            manifests={"": manifest} if "splits" in manifest else manifest,
        )

    @property
    def eval_step(self) -> int | None:
        return max(self.evaluations, default=None)

    @property
    def rollout_step(self) -> int | None:
        return max(self.rollouts, default=None)

    @property
    def metrics(self) -> dict[str, Interval]:
        """Of the newest evaluation."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}

    @property
    def rollout(self) -> dict[str, Interval]:
        """Of the newest closed loop."""
        return self.rollouts[max(self.rollouts)] if self.rollouts else {}

    @property
    def score(self) -> str:
        """The closed loop's metric, such as "max_coverage"; "" where there was none."""
        return next((name.removeprefix("policy/") for name in self.rollout if name.startswith("policy/max_")), "")

    def picture(self, name: str) -> Path:
        """A picture of the newest evaluation, which need not be there."""
        return self.workdir / "eval" / str(self.eval_step) / name

    def logged(self, name: str, label: str, color: str, style: str = "-") -> Curve:
        """A metric of `metrics.jsonl` over steps."""
        points = [(line["step"], line[name]) for line in self.lines if name in line]
        return Curve(label, [s for s, _ in points], [v for _, v in points], color=color, style=style)

    def evaluated(self, name: str, label: str, color: str, style: str = "-") -> Curve:
        """A metric of all evaluations over their steps, with intervals."""
        return _curve(self.evaluations, name, label, color, style)

    def rolled_out(self, name: str, label: str, color: str, style: str = "-") -> Curve:
        """A metric of all closed loops over their steps, with intervals."""
        return _curve(self.rollouts, name, label, color, style)


def differing_fields(runs: Sequence[Run]) -> list[str]:
    """Names of the config fields that are not the same in all runs."""
    flat = [config_lib.flatten(run.config) for run in runs]
    return [name for name in sorted(set().union(*flat)) if any(f.get(name) != flat[0].get(name) for f in flat[1:])]


def _curve(found: Mapping[int, Mapping[str, Interval]], name: str, label: str, color: str, style: str) -> Curve:
    points = [(step, metrics[name]) for step, metrics in found.items() if name in metrics]
    values = [m for _, m in points]
    low, high = [m.lo for m in values], [m.hi for m in values]
    return Curve(label, [s for s, _ in points], [m.mean for m in values], low, high, color, style)


def _by_step(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    """{step: JSON object} of `<folder>/<step>/<name>`, by step."""
    files = {int(p.parent.name): p for p in folder.glob(f"*/{name}") if p.parent.name.isdecimal()}
    found = {}
    for step, file in sorted(files.items()):
        try:
            read = read_json(file, also=list)
        except UserError as e:
            raise _damaged(file, str(e).removeprefix(f"{file}: ")) from e
        if isinstance(read, list) and name == FEW_STEPS:  # an older version's
            read = {"rows": read}
        if not isinstance(read, dict):
            raise _damaged(file, "not a JSON object")
        found[step] = read
    return found


def _intervals(file: Path, metrics: Mapping[str, Any], episodes: int | None = None) -> dict[str, Interval]:
    try:
        found = {name: Interval.of(stored, episodes) for name, stored in metrics.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise _damaged(file, "not all of it is {metric: {mean, lo, hi, n, episodes}}") from e
    return {name: m for name, m in found.items() if m is not None}


def _few_steps(file: Path, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows, with intervals as metrics."""
    try:
        rows = [{name: row[name] for name in ("sampler", "steps", "seconds_per_sample")} | row for row in found["rows"]]
        return [row | {"metrics": _intervals(file, row["metrics"])} for row in rows]
    except (KeyError, TypeError, ValueError) as e:
        raise _damaged(file, "not all of its rows are whole") from e


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"{file}: {what}. Delete it, and make it again.")
