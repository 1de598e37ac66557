"""Evaluators of the trainer, each with a name and a cadence of its own (`config.eval.<name>.every`).

Another one is a class like those below, a line in `EVALUATORS`, and `every` in `config.eval.<name>`.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
from ml_collections import ConfigDict

from uwm_jax import envs
from uwm_jax.backend import JaxBackend
from uwm_jax.config_checks import cadence, lacks_env
from uwm_jax.data.run_data import RunData
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.evaluation import closed_loop, places
from uwm_jax.evaluation.evaluator import Each, Evaluator, Windows, rows_at_a_time, write_results
from uwm_jax.evaluation.losses import HeldOutLosses
from uwm_jax.evaluation.metrics import Metrics
from uwm_jax.files import Place
from uwm_jax.parallel import distributed, signals
from uwm_jax.parallel.turns import Left, Turns
from uwm_jax.parallel.watchdog import Watchdog
from uwm_jax.policy import check_execute
from uwm_jax.training import average
from uwm_jax.training.build import Program
from uwm_jax.training.provenance import describe_use
from uwm_jax.training.state import TrainState

Draw = Callable[[Windows, DataSpec, ConfigDict, Place], dict[str, Place]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, as its evaluators are made from it.

    Attributes:
      program: the trainer's.
      data: of the run.
      draw: draws (windows of `Evaluator.run`, specification of the data, config) into a folder; gives {name of a
        picture: file}.
    """

    program: Program
    data: RunData
    draw: Draw

    @property
    def config(self) -> ConfigDict:
        return self.program.config

    @functools.cached_property
    def held_out(self) -> Evaluator:
        """The held-out windows, shared by those that measure on them."""
        program, config = self.program, self.config
        windows = self.data.held_out(config.eval.num_windows)
        rows = rows_at_a_time(program.mesh, min(len(windows), config.batch_size))
        return Evaluator(program.system, self.data, windows, program.mesh, program.rules, rows, denoising=False)


class Measured(NamedTuple):
    """Result of an evaluator.

    Attributes:
      metrics: {name: {mean, ...}}; the main process logs the means and writes all of it.
      about: how they were measured, JSON. `settings` in it, if any, as `places.choose` takes them.
      draw: draws pictures into the folder of results; gives {name of a picture: file}.
    """

    metrics: Metrics
    about: Mapping[str, Any]
    draw: Callable[[Place], dict[str, Place]] = lambda folder: {}


class InTrainingEvaluator(abc.ABC):
    """Measures parameters of a run on its mesh; all processes make it and call it together.

    Attributes:
      name: of `config.eval.<name>`.
      folder: of the workdir, for results of each step; evaluators of one folder write them together.
      prefix: of its metrics in `metrics.jsonl`.
      opening: how their names there begin, all of them; the longest match wins.
      record: the file in the folder that holds `about`, next to `metrics.json`.
      command: measures the same of a checkpoint, without `--workdir` and `--step`.
    """

    name: ClassVar[str]
    folder: ClassVar[str] = "eval"
    prefix: ClassVar[str] = "eval/"
    opening: ClassVar[str] = "eval/"
    record: ClassVar[str] = "about.json"

    def __init__(self, run: Run):
        self.run = run
        self.every = cadence(run.config, self.name)
        self.command = "uwm_jax.evaluate"

    @classmethod  # noqa: B027 (most have nothing to check)
    def check_config(cls, config: ConfigDict) -> None:
        """Raises UserError where it cannot be used with a config, before data are opened."""

    @classmethod  # noqa: B027
    def check_data(cls, config: ConfigDict, data: RunData) -> None:
        """Raises UserError where it cannot be used with the data, before anything is compiled."""

    @property
    @abc.abstractmethod
    def metrics(self) -> frozenset[str]:
        """The names of the metrics that `measure` can give; `compile` comes first."""

    @abc.abstractmethod
    def compile(self, params: Any, frozen: Any) -> list[Any]:
        """Compiles its programs and returns them; runs none of them.

        Args:
          params, frozen: arrays, or shapes with shardings.
        """

    @abc.abstractmethod
    def measure(self, params: Any, frozen: Any, each: Each) -> Measured:
        """Measures parameters.

        Args:
          each: gives items of an iterator on, such as batches, one by one: each is a turn of all processes, which must
            take as many. What it raises ends the evaluation.
        """

    def shown(self, metric: str) -> bool:
        """Whether a metric is printed."""
        return False

    def write(self, folder: Place, metrics: Metrics, about: Mapping[str, Any]) -> None:
        """Writes the results of its folder."""
        write_results(folder, metrics, about)


class Losses(InTrainingEvaluator):
    """Losses on held-out windows."""

    name = "losses"
    opening = "eval/loss/"

    @classmethod
    def check_data(cls, config: ConfigDict, data: RunData) -> None:
        data.held_out(config.eval.num_windows)

    def compile(self, params: Any, frozen: Any) -> list[Any]:
        self._losses = HeldOutLosses(self.run.held_out)
        return self._losses.compile(params, frozen)

    @property
    def metrics(self) -> frozenset[str]:
        return self._losses.metrics

    def measure(self, params: Any, frozen: Any, each: Each) -> Measured:
        return Measured(self._losses.run(params, frozen, each=each), self.run.held_out.about() | {"own_data": True})

    def shown(self, metric: str) -> bool:
        return metric in self.metrics


class Samples(InTrainingEvaluator):
    """Samples of all uses on held-out windows."""

    name = "samples"
    check_data = Losses.check_data

    def compile(self, params: Any, frozen: Any) -> list[Any]:
        return self.run.held_out.compile(params, frozen)

    @property
    def metrics(self) -> frozenset[str]:
        return self.run.held_out.metrics

    def measure(self, params: Any, frozen: Any, each: Each) -> Measured:
        program, held_out = self.run.program, self.run.held_out
        metrics, windows = held_out.run(params, frozen, each=each)
        draw = functools.partial(self.run.draw, windows, program.system.spec, program.config)
        return Measured(metrics, held_out.about() | {"own_data": True}, draw)

    def shown(self, metric: str) -> bool:
        """One of each modality of each use."""
        kind, *rest = metric.split("/")
        return kind in self.run.program.system.uses and rest[-1] in ("action_mse", "psnr")


class ClosedLoop(InTrainingEvaluator):
    """The policy in a simulator, which runs on the main process; all processes take part in sampling.

    Episodes and files are those of `uwm_jax.rollout` with the same environment, number of episodes and `--execute`,
    without those of the random policies and the expert.
    """

    name = "closed_loop"
    folder = "rollout"
    prefix = opening = "eval/rollout/"
    record = "episodes.json"
    _FIELD = "config.eval.closed_loop"

    def __init__(self, run: Run):
        super().__init__(run)
        program, fields = run.program, run.config.eval.closed_loop
        self._fields, self._env = fields, envs.get(fields.env, f"{self._FIELD}.env")
        self._seeds = range(closed_loop.FIRST_SEED, closed_loop.FIRST_SEED + fields.episodes)
        self._sampler = closed_loop.MeshSampler(program.system, program.mesh, program.rules)
        self.command = f"uwm_jax.rollout --env={fields.env} --episodes={fields.episodes} --execute={fields.execute}"

    @classmethod
    def check_config(cls, config: ConfigDict) -> None:
        fields = config.eval.closed_loop
        envs.get(fields.env, f"{cls._FIELD}.env")
        try:
            check_execute(WindowSpec.from_config(config.data.window), fields.execute)
        except UserError as e:
            raise UserError(f"{cls._FIELD}.{e}") from e

    @classmethod
    def check_data(cls, config: ConfigDict, data: RunData) -> None:
        asked = f"{cls._FIELD}.env"
        closed_loop.check_fits(envs.get(config.eval.closed_loop.env), closed_loop.Inputs(config, data.spec), asked)

    def compile(self, params: Any, frozen: Any) -> list[Any]:
        return self._sampler.compile(params, frozen)

    @property
    def metrics(self) -> frozenset[str]:
        return closed_loop.names_of(self._env)

    def measure(self, params: Any, frozen: Any, each: Each) -> Measured:
        system, env, fields = self.run.program.system, self._env, self._fields
        if not distributed.is_main():
            closed_loop.follow(self._sampler, params, frozen, env, execute=fields.execute, each=each)
            return Measured({}, {})
        backend, rows = JaxBackend(system, params, frozen, act=self._sampler), self._sampler.rows
        episodes = closed_loop.closed_loop(
            backend, env.name, self._seeds, execute=fields.execute, rows_of_a_call=rows, each=each
        )
        results = {closed_loop.POLICY: episodes}
        about = closed_loop.describe_episodes(env, system, results, fields.execute, 0)
        settings = closed_loop.settings_of(env.name, self._seeds[0], fields.episodes, fields.execute, 0)
        return Measured(closed_loop.measure(results, env), about | {"settings": settings})

    def shown(self, metric: str) -> bool:
        return metric.startswith(f"{closed_loop.POLICY}/")

    def write(self, folder: Place, metrics: Metrics, about: Mapping[str, Any]) -> None:
        closed_loop.write_episodes(folder, metrics, about)


EVALUATORS: tuple[type[InTrainingEvaluator], ...] = (Losses, Samples, ClosedLoop)  # in the order of measurement


def _chosen(config: ConfigDict) -> list[type[InTrainingEvaluator]]:
    return [kind for kind in EVALUATORS if cadence(config, kind.name)]


def check_config(config: ConfigDict) -> None:
    """Raises UserError where an evaluator of a run cannot be used: a missing package, a chunk that is too short; and
    where no checkpoint would have the metric of `config.checkpoint.keep_best`."""
    for kind in _chosen(config):
        kind.check_config(config)
    _check_best(config)


def _check_best(config: ConfigDict) -> None:
    best, saved = config.checkpoint.keep_best, config.checkpoint.every
    if not best:
        return
    asked = f"config.checkpoint.keep_best={best!r}"
    givers = [kind for kind in EVALUATORS if best.startswith(kind.opening)]
    if not givers or len(parts := best.split("/")) < 3 or not all(parts):
        raise UserError(
            f"{asked}: expected a metric of evaluations in training, as metrics.jsonl names it, such as "
            "'eval/policy/action_mse' or 'eval/loss/action'."
        )
    giver = max(givers, key=lambda kind: len(kind.opening))
    evaluated = cadence(config, giver.name)
    field = "config.eval.every" if config.eval[giver.name].every == -1 else f"config.eval.{giver.name}.every"
    if not evaluated:
        needs = f" and config.eval.{giver.name}.env" if lacks_env(config, giver.name) else ""
        raise UserError(f"{asked} requires evaluations in training: set {field}{needs}.")
    if saved % evaluated and evaluated % saved:
        raise UserError(
            f"{asked} compares steps that are both evaluated ({field}={evaluated}) and saved "
            f"(config.checkpoint.every={saved}): expected one of them to be a multiple of the other."
        )


def check_data(config: ConfigDict, data: RunData) -> None:
    """Raises UserError where data do not fit an evaluator of a run: no held-out window, another camera."""
    for kind in _chosen(config):
        kind.check_data(config, data)


class InTraining:
    """The evaluators of a run, compiled for the trainer's mesh.

    Args:
      program, data, draw: as `Run` has them.
      frozen: arrays of the codec, or their shapes with shardings.
      command: the command line, for the provenance of results.

    Attributes:
      programs: all that were compiled.
    """

    def __init__(self, program: Program, data: RunData, frozen: Any, *, command: Sequence[str], draw: Draw):
        self._config, self._data, self._command = program.config, data, command
        run = Run(program, data, draw)
        self._evaluators = [kind(run) for kind in _chosen(program.config)]
        self.programs = [p for e in self._evaluators for p in e.compile(program.like.eval_params, frozen)]

    def for_config(self, config: ConfigDict) -> InTraining:
        """The same programs for another run, whose config differs in scalars of the training step alone."""
        other = copy.copy(self)
        other._config = config
        return other

    def due(self, step: int) -> list[InTrainingEvaluator]:
        """The evaluators that measure after a step: every so many steps, and after the last."""
        last = step == self._config.total_steps
        return [evaluator for evaluator in self._evaluators if step % evaluator.every == 0 or last]

    @property
    def metrics(self) -> frozenset[str]:
        """The names of the means that `evaluate` can return."""
        return frozenset(e.prefix + name for e in self._evaluators for name in e.metrics)

    def evaluate(
        self, workdir: Place, step: int, state: TrainState, frozen: Any, turns: Turns, watchdog: Watchdog
    ) -> tuple[dict[str, float], dict[str, Place]]:
        """Measures a state, and writes `<workdir>/<folder>/<step>/` but for GIFs, which take long to draw.

        Where the run is to end before the last batch of an evaluator, none of its results is written, and a line says
        so.

        Args:
          turns, watchdog: the trainer's; every batch is a turn of all processes, and a beat.

        Returns:
          on the main process {`eval/<metric>`: mean} and {`eval/<picture>`: file}; on others they may lack some.
        """

        def each(items: Iterator[Any]) -> Iterator[Any]:
            return watchdog.each(step, turns.each(items, self._data.waits_for))

        means: dict[str, float] = {}
        files: dict[str, Place] = {}
        folders: dict[str, list[InTrainingEvaluator]] = {}
        for evaluator in self.due(step):
            folders.setdefault(evaluator.folder, []).append(evaluator)
        ends = False
        for folder, evaluators in folders.items():
            measured = None if ends else self._measure(evaluators, state, frozen, each)
            if measured is None:
                ends, again = True, _again(evaluators[0], workdir, step)
                distributed.say(
                    f"the run is to end: the evaluation of step {step} is left out; {again} makes up for it."
                )
                continue
            for evaluator, found in zip(evaluators, measured, strict=True):
                means |= {evaluator.prefix + name: value["mean"] for name, value in found.metrics.items()}
            if distributed.is_main():
                files |= self._write(evaluators, measured, workdir, step, state)
            # Drawing takes seconds; on CPUs a collective fails when another process comes to it half a minute later.
            distributed.barrier(f"{folder} of step {step} is written", distributed.LATE_SECONDS)
        return means, files

    def _measure(
        self, evaluators: Sequence[InTrainingEvaluator], state: TrainState, frozen: Any, each: Each
    ) -> list[Measured] | None:
        """The result of each; None where the run is to end."""
        # One of several processes would leave the others alone in a batch.
        can_be_cut = signals.may_be_cut(Left()) if jax.process_count() == 1 else contextlib.nullcontext()
        try:
            with can_be_cut:
                return [evaluator.measure(state.eval_params, frozen, each) for evaluator in evaluators]
        except Left:
            return None

    def _write(
        self,
        evaluators: Sequence[InTrainingEvaluator],
        measured: Sequence[Measured],
        workdir: Place,
        step: int,
        state: TrainState,
    ) -> dict[str, Place]:
        """Writes the results of the evaluators of one folder together; gives {`eval/<picture>`: file}."""
        first, config = evaluators[0], self._config
        metrics = {name: value for found in measured for name, value in found.metrics.items()}
        about = {name: value for found in measured for name, value in found.about.items()}
        about |= describe_use(self._command, config, ())
        used = average.AVERAGE if state.ema_params is not None else average.RAW
        about |= average.describe(config, step, used)
        if used == average.AVERAGE and (
            told := average.warning(config, step, f"{first.command.partition('.')[2]} --parameters=raw")
        ):
            distributed.say(f"warning: {told}")
        folder = workdir / first.folder / str(step)
        try:
            if settings := about.get("settings"):
                folder = places.choose(folder, first.record, settings, own=True, shared=True, name=None, run={})
            first.write(folder, metrics, about)
            files = {name: file for found in measured for name, file in found.draw(folder).items()}
        except Exception as e:  # a full disk, a picture that cannot be drawn: no reason to end a run
            where = getattr(e, "filename", None) or folder
            reason = getattr(e, "strerror", None) or (str(e) if isinstance(e, RunError) else repr(e))
            warn(
                f"{where}: the evaluation of step {step} cannot be written ({reason}). "
                f"Its means are in metrics.jsonl; {_again(first, workdir, step)} makes up for the rest."
            )
            return {}
        return {first.prefix + name: file for name, file in files.items()}

    def headlines(self, means: Mapping[str, float]) -> str:
        """A line of the few means that are printed."""
        names = [
            name
            for name in means
            if any(name.startswith(e.prefix) and e.shown(name.removeprefix(e.prefix)) for e in self._evaluators)
        ]
        return "  evaluated: " + ", ".join(f"{name} {means[name]:.4f}" for name in names)


def _again(evaluator: InTrainingEvaluator, workdir: Place, step: int) -> str:
    return f"python -m {evaluator.command} --workdir={workdir} --step={step}"
