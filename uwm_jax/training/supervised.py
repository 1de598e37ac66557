"""What the supervisor of this host (`uwm_jax.supervise`) tells the process that it starts: the starts before this one.

It travels in an environment variable, and `Goodput` counts from it what the process itself has not seen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import NamedTuple

VARIABLE = "UWM_JAX_SUPERVISED"

SAVED_STATUSES = (143, 130, 129)  # of a process that was told to end, and saved


class Start(NamedTuple):
    """A start that has ended: when it began and ended, Unix seconds, and with which exit status."""

    began: float
    ended: float
    status: int


@dataclasses.dataclass(frozen=True)
class Supervised:
    """This start and those before it, under one supervisor.

    Attributes:
      since: when the first start began, Unix seconds.
      began: when this one did.
      earlier: those before it, the last ones of many.
    """

    since: float
    began: float
    earlier: tuple[Start, ...] = ()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Supervised | None:
        """None where no supervisor has started this process."""
        text = environment.get(VARIABLE)
        if text is None:
            return None
        told = json.loads(text)
        return cls(told["since"], told["began"], tuple(Start(*start) for start in told["earlier"]))

    def environment(self) -> dict[str, str]:
        """The variable that `from_environment` reads."""
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}

    def after(self, began: float) -> Supervised:
        """The same of what began later than the supervisor: a program of a sweep."""
        return dataclasses.replace(self, since=max(self.since, began))

    def unseen(self, saved_at: float | None) -> dict[str, float]:
        """Seconds between the checkpoint that this start continues from, or the first start, and this start.

        `lost` is what earlier starts did after it, `downtime` is time without a process. The end of a start that was
        told to end is time of its last `checkpoint`.

        Args:
          saved_at: when the checkpoint was saved, Unix seconds; None without one.
        """
        after = self.since if saved_at is None else max(self.since, saved_at)
        seconds = {"lost": 0.0, "downtime": max(self.began - after, 0.0), "checkpoint": 0.0}
        for start in self.earlier:
            overlap = max(start.ended - max(start.began, after), 0.0)
            saves = saved_at is not None and start.began < saved_at and start.status in SAVED_STATUSES
            seconds["checkpoint" if saves else "lost"] += overlap
            seconds["downtime"] = max(seconds["downtime"] - overlap, 0.0)
        return seconds
