"""What follows a run while it trains derives from `Tracker`: TensorBoard, wandb, or a class of your own."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

from uwm_jax.files import Place

CLOSE_SECONDS = 10.0  # for a tracker to write what is left at the end of a run


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run, as its trackers see it.

    Attributes:
      workdir: its directory.
      config: as `config.json` has it.
      step: that it continues from, 0 for a fresh one; lines that an earlier start wrote after it are void.
      group: of runs that belong together, such as the members of a sweep; "" for none.
    """

    workdir: Place
    config: Mapping[str, Any]
    step: int
    group: str

    @property
    def name(self) -> str:
        return self.workdir.name


class Tracker(abc.ABC):
    """Where the lines of a run go. Made without arguments; all methods are called in one thread, not the main one.

    An exception of any of them ends the tracker, not the run.
    """

    @abc.abstractmethod
    def start(self, run: RunFacts) -> None:
        """Called first, once in each process that trains the run: after a restart, lines may repeat steps."""

    @abc.abstractmethod
    def log(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Place]) -> None:
        """Takes a line of `metrics.jsonl`.

        Args:
          step: finished steps.
          scalars: {metric: value}.
          pictures: {name: image file}.
        """

    def flush(self) -> None:  # noqa: B027 - few need it
        """Makes visible what was logged; called every half minute or so."""

    @abc.abstractmethod
    def close(self, failed: bool) -> None:
        """Called last, also after an exception.

        Args:
          failed: whether the run ends before its last step, by an error or a signal.
        """
