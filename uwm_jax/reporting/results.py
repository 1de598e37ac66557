"""A run's workdir, read for reports: metrics with their intervals, curves, and provenance."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.errors import UserError, warn
from uwm_jax.evaluation import places
from uwm_jax.evaluation.metrics import FEWEST
from uwm_jax.files import Place
from uwm_jax.reading import read_json
from uwm_jax.reporting.curves import Curve
from uwm_jax.systems.base import SystemType
from uwm_jax.training import fixed_fields, provenance
from uwm_jax.training.checkpoints.checkpoint import latest_step
from uwm_jax.training.checkpoints.reader import CheckpointReader, CorruptCheckpoint
from uwm_jax.training.telemetry.log import read_metrics

_FILES = {  # of each kind: its folder, the file of its numbers, and the file that tells how they were made
    "eval": ("eval", "metrics.json", "about.json"),
    "rollout": ("rollout", "metrics.json", "episodes.json"),
    "few_steps": ("eval", "few_steps.json", None),
}

# Types of what is read of the records of how results were made, besides the fields of every command's use.
_HOW: dict[str, type | tuple[type, ...]] = {
    "settings": dict,
    "datasets": (dict, NoneType),
    "leak": (str, NoneType),
    "own_data": (bool, NoneType),
    "workdir": str,
}


class Interval(NamedTuple):
    """A mean over `n` windows of so many `episodes`, or over `n` = `episodes` of them, with its 95 % interval.

    `lo` and `hi` are the mean itself where there are fewer than `FEWEST` episodes; `is_conclusive` is False then.
    """

    mean: float
    lo: float
    hi: float
    n: int
    episodes: int

    @classmethod
    def of(cls, stored: Mapping[str, Any] | None, episodes: int | None = None) -> Interval | None:
        """From `{"mean", "lo", "hi", "n", "episodes"}`; None for None and for what has no finite mean.

        Older files lack the last, and there are at most `episodes` then; they always have `lo` and `hi`.
        """
        if stored is None or stored["mean"] is None or not math.isfinite(stored["mean"]):
            return None
        mean, n = float(stored["mean"]), int(stored["n"])
        count = int(stored.get("episodes", min(n, episodes or n)))
        lo, hi = (float(stored[end]) for end in ("lo", "hi")) if count >= FEWEST else (mean, mean)
        return cls(mean, lo, hi, n, count)

    @property
    def is_conclusive(self) -> bool:
        """Whether there are enough episodes for an interval."""
        return self.episodes >= FEWEST


def verdict(difference: Interval) -> str:
    """The verdict of a difference's interval, positive = better: "yes", "no, it is worse", "undecided" or "too few
    episodes"."""
    if not difference.is_conclusive:
        return "too few episodes"
    if difference.lo > 0:
        return "yes"
    return "no, it is worse" if difference.hi < 0 else "undecided"


@dataclasses.dataclass(frozen=True)
class Result:
    """An evaluation, a closed loop or a comparison of samplers, as it lies in a folder.

    Attributes:
      kind: "eval", "rollout" or "few_steps".
      name: of its folder below that of the step; "" where it lies in the step's.
      metrics: of an evaluation or closed loop; rows: of a comparison of samplers.
      how: how it was made; `settings` of it tell it apart from the run's own.
    """

    kind: str
    step: int
    name: str
    folder: Place
    metrics: dict[str, Interval]
    rows: list[dict[str, Any]]
    how: dict[str, Any]


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
      folders: {"eval", "rollout", "few_steps": where the newest of the kind lies}.
      others: results with a name of their own: of other data, another config or other parameters than the run's, or of
        other seeds, simulators or samplers than the step's first.
      code_version, manifests: of the newest checkpoint, {source or "": manifest}; "" and {} where there is none.
      used: {source or "": what of it was trained on, with counts}, of the newest checkpoint; older ones do not tell.
      branched_from: checkpoints of other runs, DIR@STEP, that it went on from, the oldest first.
    """

    workdir: Place
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
    folders: dict[str, Place]
    others: list[Result]
    code_version: str
    manifests: dict[str, dict[str, Any]]
    used: dict[str, str]
    branched_from: list[str]

    @classmethod
    def read(cls, workdir: Place, results: Place | None = None) -> Run:
        """Reads a workdir.

        Args:
          results: where more of its results lie, `--output` of the commands that make them. Of two results of one
            step and name, the one there is taken.

        Raises:
          UserError: `workdir` is no run's directory, or a file of it is damaged.
        """
        config = config_lib.read(workdir)
        assets: dict[str, Any] = {}
        if (step := latest_step(workdir)) is not None:
            with contextlib.suppress(CorruptCheckpoint):  # a page without the data's manifest is better than none
                stored = CheckpointReader(workdir.absolute() / "checkpoints", step)
                assets = stored.assets
                config, _ = fixed_fields.config_of_run(workdir, stored)
        manifest = assets.get("dataset") or {}
        if not (starts := provenance.read_starts(workdir)) and (workdir / provenance.FILE).exists():
            warn(f"{workdir / provenance.FILE} is damaged, so how the run was started is not shown.")
        found = {kind: _results(kind, workdir, results) for kind in _FILES}
        own = {kind: {r.step: r for r in of_kind if not r.name} for kind, of_kind in found.items()}
        newest = {kind: of_kind[max(of_kind)] for kind, of_kind in own.items() if of_kind}
        how = {kind: result.how for kind, result in newest.items()}
        return cls(
            workdir=workdir,
            name=(workdir if workdir.name not in ("", "..") else workdir.resolve()).name,
            config=config,
            lines=read_metrics(workdir / "metrics.jsonl"),
            starts=starts,
            evaluations={step: result.metrics for step, result in own["eval"].items()},
            rollouts={step: result.metrics for step, result in own["rollout"].items()},
            eval_how={"leak": assets.get("leak")} | how["eval"]
            if "eval" in how
            else {},  # the trainer does not know it
            rollout_how=how.get("rollout", {}),
            few_steps=newest["few_steps"].rows if "few_steps" in newest else [],
            few_steps_how=how.get("few_steps", {}),
            few_steps_step=max(own["few_steps"], default=None),
            folders={kind: result.folder for kind, result in newest.items()},
            others=[r for of_kind in found.values() for r in of_kind if r.name],
            code_version=assets.get("code_version", ""),
            manifests={"": manifest} if "splits" in manifest else manifest,
            used=assets.get("used", {}),
            branched_from=assets.get("branched_from", []),
        )

    @property
    def kind(self) -> SystemType:
        """The system that was trained."""
        return systems.get(self.config.system)

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
    def measured(self) -> dict[str, Interval]:
        """Of the newest evaluation and, below `rollout/`, of the newest closed loop."""
        return self.metrics | {f"rollout/{name}": m for name, m in self.rollout.items()}

    @property
    def score(self) -> str:
        """The closed loop's metric, such as "max_coverage"; "" where there was none."""
        return next((name.removeprefix("policy/") for name in self.rollout if name.startswith("policy/max_")), "")

    def picture(self, name: str) -> Place:
        """A picture of the newest evaluation, which need not be there."""
        return self.folders.get("eval", self.workdir) / name

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


def _results(kind: str, workdir: Place, elsewhere: Place | None) -> list[Result]:
    """All results of a kind, by step and name."""
    top, file, about = _FILES[kind]
    found = {}
    for root in dict.fromkeys([workdir, elsewhere or workdir]):
        for path in sorted([*(root / top).glob(f"*/{file}"), *(root / top).glob(f"*/*/{file}")]):
            step, *below = path.parent.relative_to(root / top).parts
            if not step.isdecimal():
                continue
            told = path.with_name(about) if about else path
            how = _read(told) if told != path and told.exists() else {}
            stored, rows = _read(path), []
            if told == path:
                rows, stored, how = _few_steps(path, stored), {}, stored.get("about", {})
            _check_how(told, how, kind)
            if root != workdir and how.get("workdir") != places.of_run(root, workdir)["workdir"]:  # of another run
                continue
            windows = how.get("episodes") if kind == "eval" else None
            name = "/".join(below)
            metrics = _intervals(path, stored, windows)
            found[int(step), name] = Result(kind, int(step), name, path.parent, metrics, rows, how)
    return [found[place] for place in sorted(found)]


def _read(file: Place) -> dict[str, Any]:
    """A JSON object."""
    try:
        read = read_json(file, also=list)
    except UserError as e:
        raise damaged(file, str(e).removeprefix(f"{file}: ")) from e
    if isinstance(read, list) and file.name == _FILES["few_steps"][1]:  # an older version's
        read = {"rows": read}
    if not isinstance(read, dict):
        raise damaged(file, "not a JSON object")
    return read


def _check_how(file: Place, how: Any, kind: str) -> None:
    """Raises UserError where a record of how a result was made has a field of another type than commands write."""
    if not isinstance(how, dict):
        raise damaged(file, "its `about` is not a JSON object")
    if told := provenance.misfit(how) or provenance.misfit(
        how, _HOW | {"episodes": dict if kind == "rollout" else int}
    ):
        raise damaged(file, told)
    if not all(isinstance(identity, str) for identity in (how.get("datasets") or {}).values()):
        raise damaged(file, "not all of its datasets are {source: identity}")
    try:
        seeds_of(how)
    except (KeyError, TypeError) as e:
        raise damaged(file, "not all of its episodes have a seed") from e


def seeds_of(how: Mapping[str, Any]) -> list[int]:
    """Seeds of a closed loop's episodes by its `episodes.json`; [] of anything else."""
    episodes = how.get("episodes")
    return [operator.index(e["seed"]) for e in episodes.get("policy", [])] if isinstance(episodes, dict) else []


def _intervals(file: Place, metrics: Mapping[str, Any], episodes: int | None = None) -> dict[str, Interval]:
    try:
        found = {name: Interval.of(stored, episodes) for name, stored in metrics.items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as e:
        raise damaged(file, "not all of it is {metric: {mean, lo, hi, n, episodes}}") from e
    return {name: m for name, m in found.items() if m is not None}


def _few_steps(file: Place, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows, with intervals as metrics."""
    try:
        rows = [{name: row[name] for name in ("sampler", "steps")} | row for row in found["rows"]]
        times = [float(row["seconds_per_sample"]) for row in rows]
        return [
            row | {"metrics": _intervals(file, row["metrics"]), "seconds_per_sample": time}
            for row, time in zip(rows, times, strict=True)
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise damaged(file, "not all of its rows are complete") from e


def damaged(file: Place, what: str) -> UserError:
    """The error of a file of results that no command can have written so."""
    return UserError(f"{file}: {what}. Delete it, and make it again.")
