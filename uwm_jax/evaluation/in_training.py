"""Measurements of the trainer on held-out windows every `config.eval.every` steps: losses, and all modes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from uwm_jax.data.loader import Loader
from uwm_jax.data.spec import DataSpec
from uwm_jax.errors import warn
from uwm_jax.evaluation.evaluator import Each, Evaluator, Windows, join, rows_at_a_time, write_results
from uwm_jax.parallel import distributed, signals
from uwm_jax.parallel.turns import Left, Turns
from uwm_jax.parallel.watchdog import Watchdog
from uwm_jax.systems.uwm.modes import MODES
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.training import average
from uwm_jax.training.build import Program
from uwm_jax.training.provenance import describe_use
from uwm_jax.training.state import TrainState
from uwm_jax.training.step import make_eval_step

Draw = Callable[[Windows, DataSpec, ConfigDict, Path], dict[str, Path]]


class HeldOut:
    """The programs of the losses and of `Evaluator`, compiled for the trainer's mesh, and the windows.

    Args:
      program: the trainer's.
      loader: of its data.
      frozen: arrays of the codec.
      command: the command line, for the provenance of results.
      draw: draws (windows of `Evaluator.run`, specification of the data, config) into a folder; gives {name of a
        picture: file}.
    """

    def __init__(self, program: Program, loader: Loader, frozen: Any, *, command: Sequence[str], draw: Draw):
        system, mesh, rules, state = cast(UWM, program.system), program.mesh, program.rules, program.like
        config = system.config
        self._command, self._draw = command, draw
        windows = loader.held_out(config.eval.num_windows)
        rows = rows_at_a_time(mesh, min(len(windows), config.batch_size))
        self._system, self._loader = system, loader
        self._modes = Evaluator(system, loader, windows, mesh, rules, rows, denoising=False)
        self._modes.compile(state.eval_params, frozen)
        inputs = state, frozen, self._modes.example()
        self._losses = program.compile(make_eval_step(system), *inputs)

    def evaluate(
        self, workdir: Path, step: int, state: TrainState, frozen: Any, turns: Turns, watchdog: Watchdog
    ) -> tuple[dict[str, float], dict[str, Path]]:
        """Measures a state, and writes `<workdir>/eval/<step>/` but for the GIF, which takes long to draw.

        Where the run is to end before the last batch, nothing is written, and a line says so.

        Args:
          turns, watchdog: the trainer's; every batch is a turn of all processes, and a beat.

        Returns:
          {`eval/loss/<modality>` or `eval/<metric>`: mean}, and {`eval/<picture>`: file} on the main process; {}, {}
          where the evaluation was left out.
        """

        def each(items: Iterator[Any]) -> Iterator[Any]:
            return watchdog.each(step, turns.each(items, self._loader.waits_for))

        # One of several processes would leave the others alone in a batch.
        can_be_cut = signals.may_be_cut(Left()) if jax.process_count() == 1 else contextlib.nullcontext()
        try:
            with can_be_cut:
                return self._evaluate(workdir, step, state, frozen, each)
        except Left:
            again = f"python -m uwm_jax.evaluate --workdir={workdir} --step={step}"
            distributed.say(f"the run is to end: the evaluation of step {step} is left out; {again} makes up for it.")
            return {}, {}

    def _evaluate(
        self, workdir: Path, step: int, state: TrainState, frozen: Any, each: Each
    ) -> tuple[dict[str, float], dict[str, Path]]:
        losses = []
        for batch in each(self._modes.batches()):
            losses.append(jax.device_get(self._losses(state, frozen, batch)))
        metrics, shown = self._modes.run(state.eval_params, frozen, each=each)
        by_window = join(losses, len(self._modes.held_out))
        means = {name: float(values.mean(dtype=np.float64)) for name, values in by_window.items()}
        means |= {f"eval/{name}": value["mean"] for name, value in metrics.items()}
        files = {}
        if distributed.is_main():
            config = self._system.config
            used = average.AVERAGE if state.ema_params is not None else average.RAW
            about = self._modes.about() | {"own_data": True} | describe_use(self._command, config, ())
            about |= average.describe(config, step, used)
            if used == average.AVERAGE and (told := average.warning(config, step, "evaluate --parameters=raw")):
                distributed.say(f"warning: {told}")
            try:
                folder = workdir / "eval" / str(step)
                write_results(folder, metrics, about)
                files = self._draw(shown, self._system.spec, config, folder)
            except Exception as e:  # a full disk, a picture that cannot be drawn: no reason to end a run
                again = f"python -m uwm_jax.evaluate --workdir={workdir} --step={step}"
                where = getattr(e, "filename", None) or workdir / "eval" / str(step)
                reason = getattr(e, "strerror", None) or repr(e)
                warn(
                    f"{where}: the evaluation of step {step} cannot be written ({reason}). "
                    f"Its means are in metrics.jsonl; {again} makes up for the rest."
                )
        # Drawing takes seconds, and on CPUs a collective fails when another process comes to it half a minute later.
        distributed.barrier(f"the evaluation of step {step} is written", distributed.LATE_SECONDS)
        return means, {f"eval/{name}": file for name, file in files.items()}


def headlines(means: Mapping[str, float]) -> str:
    """A line of the few means that are printed: losses, and one of each modality of each mode."""

    def shown(name: str) -> bool:
        _, kind, *rest = name.split("/")
        return kind == "loss" or (kind in MODES and rest[-1] in ("action_mse", "psnr"))

    return "  held out: " + ", ".join(f"{name} {value:.4f}" for name, value in means.items() if shown(name))
