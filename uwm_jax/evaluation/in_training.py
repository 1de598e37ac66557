"""Measurements of the trainer, each with a name and a cadence of its own (`config.eval.<name>.every`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from uwm_jax.config_checks import cadence
from uwm_jax.data.run_data import RunData
from uwm_jax.data.spec import DataSpec
from uwm_jax.errors import warn
from uwm_jax.evaluation.evaluator import Each, Evaluator, Windows, rows_at_a_time, write_results
from uwm_jax.evaluation.losses import HeldOutLosses
from uwm_jax.evaluation.metrics import Metrics
from uwm_jax.parallel import distributed, signals
from uwm_jax.parallel.turns import Left, Turns
from uwm_jax.parallel.watchdog import Watchdog
from uwm_jax.training import average
from uwm_jax.training.build import Program
from uwm_jax.training.provenance import describe_use
from uwm_jax.training.state import TrainState

Draw = Callable[[Windows, DataSpec, ConfigDict, Path], dict[str, Path]]
LOSSES, SAMPLES = "losses", "samples"  # what is measured on held-out windows


def measures(config: ConfigDict) -> bool:
    """Whether a run measures anything on held-out windows."""
    return any(cadence(config, name) for name in (LOSSES, SAMPLES))


class InTraining:
    """The evaluators of a run, compiled for the trainer's mesh.

    Args:
      program: the trainer's.
      data: of the run.
      frozen: arrays of the codec.
      command: the command line, for the provenance of results.
      draw: draws (windows of `Evaluator.run`, specification of the data, config) into a folder; gives {name of a
        picture: file}.
    """

    def __init__(self, program: Program, data: RunData, frozen: Any, *, command: Sequence[str], draw: Draw):
        config = program.config
        self._config, self._spec, self._data = config, program.system.spec, data
        self._command, self._draw = command, draw
        self._every = {name: every for name in (LOSSES, SAMPLES) if (every := cadence(config, name))}
        if not self._every:
            return
        windows = data.held_out(config.eval.num_windows)
        rows = rows_at_a_time(program.mesh, min(len(windows), config.batch_size))
        like = program.like.eval_params
        self._samples = Evaluator(program.system, data, windows, program.mesh, program.rules, rows, denoising=False)
        self._losses = HeldOutLosses(self._samples)
        if SAMPLES in self._every:
            self._samples.compile(like, frozen)
        if LOSSES in self._every:
            self._losses.compile(like, frozen)

    def due(self, step: int) -> list[str]:
        """The evaluators that measure after a step: every so many steps, and after the last."""
        last = step == self._config.total_steps
        return [name for name, every in self._every.items() if step % every == 0 or last]

    @property
    def metrics(self) -> frozenset[str]:
        """The names of the means that `evaluate` can return."""
        found = self._losses.metrics if LOSSES in self._every else frozenset()
        found |= self._samples.metrics if SAMPLES in self._every else frozenset()
        return frozenset(f"eval/{name}" for name in found)

    def evaluate(
        self, workdir: Path, step: int, state: TrainState, frozen: Any, turns: Turns, watchdog: Watchdog
    ) -> tuple[dict[str, float], dict[str, Path]]:
        """Measures a state, and writes `<workdir>/eval/<step>/` but for the GIF, which takes long to draw.

        Where the run is to end before the last batch, nothing is written, and a line says so.

        Args:
          turns, watchdog: the trainer's; every batch is a turn of all processes, and a beat.

        Returns:
          {`eval/<metric>`: mean}, and {`eval/<picture>`: file} on the main process; {}, {} where nothing was due or
          the evaluation was left out.
        """

        def each(items: Iterator[Any]) -> Iterator[Any]:
            return watchdog.each(step, turns.each(items, self._data.waits_for))

        if not (due := self.due(step)):
            return {}, {}
        # One of several processes would leave the others alone in a batch.
        can_be_cut = signals.may_be_cut(Left()) if jax.process_count() == 1 else contextlib.nullcontext()
        try:
            with can_be_cut:
                return self._evaluate(due, workdir, step, state, frozen, each)
        except Left:
            again = _again(workdir, step)
            distributed.say(f"the run is to end: the evaluation of step {step} is left out; {again} makes up for it.")
            return {}, {}

    def _evaluate(
        self, due: Sequence[str], workdir: Path, step: int, state: TrainState, frozen: Any, each: Each
    ) -> tuple[dict[str, float], dict[str, Path]]:
        metrics: Metrics = {}
        shown: Windows = {}
        if LOSSES in due:
            metrics |= self._losses.run(state.eval_params, frozen, each=each)
        if SAMPLES in due:
            found, shown = self._samples.run(state.eval_params, frozen, each=each)
            metrics |= found
        files = {}
        if distributed.is_main():
            used = average.AVERAGE if state.ema_params is not None else average.RAW
            about = self._samples.about() | {"own_data": True} | describe_use(self._command, self._config, ())
            about |= average.describe(self._config, step, used)
            if used == average.AVERAGE and (told := average.warning(self._config, step, "evaluate --parameters=raw")):
                distributed.say(f"warning: {told}")
            folder = workdir / "eval" / str(step)
            try:
                write_results(folder, metrics, about)
                files = self._draw(shown, self._spec, self._config, folder) if shown else {}
            except Exception as e:  # a full disk, a picture that cannot be drawn: no reason to end a run
                where = getattr(e, "filename", None) or folder
                reason = getattr(e, "strerror", None) or repr(e)
                warn(
                    f"{where}: the evaluation of step {step} cannot be written ({reason}). "
                    f"Its means are in metrics.jsonl; {_again(workdir, step)} makes up for the rest."
                )
        # Drawing takes seconds, and on CPUs a collective fails when another process comes to it half a minute later.
        distributed.barrier(f"the evaluation of step {step} is written", distributed.LATE_SECONDS)
        means = {f"eval/{name}": value["mean"] for name, value in metrics.items()}
        return means, {f"eval/{name}": file for name, file in files.items()}

    def headlines(self, means: Mapping[str, float]) -> str:
        """A line of the few means that are printed: losses, and one of each modality of each use."""
        return "  held out: " + ", ".join(f"{name} {value:.4f}" for name, value in means.items() if self._shown(name))

    def _shown(self, name: str) -> bool:
        _, kind, *rest = name.split("/")
        return kind == "loss" or (kind in self._samples.system.uses and rest[-1] in ("action_mse", "psnr"))


def _again(workdir: Path, step: int) -> str:
    return f"python -m uwm_jax.evaluate --workdir={workdir} --step={step}"
