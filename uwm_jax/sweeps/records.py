"""What a sweep writes while it trains: the records of each member, and their common `sweep.json`."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from uwm_jax import host_memory
from uwm_jax.parallel import distributed
from uwm_jax.parallel.distributed import say
from uwm_jax.runs.loop import Records
from uwm_jax.runs.records import RunRecords
from uwm_jax.sweeps import record as record_lib
from uwm_jax.sweeps.program import ALIVE, SweepProgram, SweepState
from uwm_jax.sweeps.record import Record
from uwm_jax.training.goodput import duration
from uwm_jax.training.metrics import Metric
from uwm_jax.training.state import TrainState
from uwm_jax.training.telemetry.log import losses_of

AHEAD = 2  # steps in flight, as `MetricAccumulator` has them
SHOWN = 6  # members whose losses a line of progress has one by one


class SweepRecords(Records):
    """The records of members that train in one program.

    Args:
      names: of the members, in the order of the state.
      records: of each.
      live: which of them train; a member that is not stays as it is.
      sweep: their program.
      record: of the whole sweep.
    """

    def __init__(
        self,
        names: Sequence[str],
        records: Sequence[RunRecords],
        live: Sequence[bool],
        sweep: SweepProgram,
        record: Record,
    ):
        self._names, self._records, self._live = names, records, list(live)
        self._sweep, self._record = sweep, record
        self._pending: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
        self._saving: int | None = None  # a step that is not durable for all yet
        self._told = False

    def add(self, step: int, metrics: Any) -> None:
        self._pending.append((step, metrics))
        self._fetch(AHEAD)

    def _fetch(self, leave: int) -> None:
        while len(self._pending) > leave:
            step, metrics = self._pending.popleft()
            found: dict[str, Metric] = dict(jax.device_get(dict(metrics)))
            alive: Any = found.pop(ALIVE)
            for i in range(len(self._names)):
                if self._live[i] and not alive[i]:
                    self._end(i, step, {n: jax.tree.leaves(x)[0][i].item() for n, x in found.items()})
                elif self._live[i]:
                    self._records[i].add(step, jax.tree.map(lambda x, i=i: x[i], found))

    def _end(self, i: int, step: int, metrics: Mapping[str, float]) -> None:
        """A member has diverged; its last checkpoint stays."""
        self._live[i] = False
        name = self._names[i]
        self._record.set(name, record_lib.DIVERGED, step=step)
        self._record.write()
        say(
            f"{name} has diverged: its loss or gradient is not finite in step {step} (loss {metrics['loss']:g}, "
            f"grad_norm {metrics['grad_norm']:g}). It is frozen, and its last checkpoint stays; the others go on."
        )

    def check(self) -> None:
        for records in self._records:
            records.check()

    def is_over(self) -> bool:
        return not any(self._live)

    def evaluates(self, step: int) -> bool:
        return self._records[0].evaluates(step)

    def report(self, step: int, state: SweepState) -> None:
        self._fetch(0)
        if self.is_over():
            return
        evaluates = self.evaluates(step)
        measured = {}
        for i in self._left():
            one: Any = self._sweep.take_evaluated(state, i) if evaluates else None
            measured[i] = self._records[i].measure(step, one)
            del one  # before the next one is taken: there is room for one
        first = self._records[0]
        rates = first.watch.goodput.rates(step)
        rates |= first.mfu(rates["samples_per_second"])
        each = {self._names[i]: found.means["loss"] for i, found in measured.items()}
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in each.items())
        if len(each) > SHOWN:
            losses = f"{min(each.values()):.4f} to {max(each.values()):.4f}"
        say(
            f"step {step}/{first.total_steps}  loss {losses}  {rates['samples_per_second']:.1f} samples/s for "
            f"{len(measured)} members  data wait {100 * rates['data_wait_fraction']:.0f} %  "
            f"ETA {duration(rates['eta_seconds'])}"
        )
        for i, found in measured.items():
            if found.evaluated:
                say(f"  {self._names[i]}:{self._records[i].evaluations.headlines(found.evaluated)}")
            self._records[i].write(step, found, rates)
            self._record.set(self._names[i], record_lib.TRAINING, step=step, last_losses=losses_of(found.means))
        self._record.write(durable=False)

    def save(self, step: int, state: SweepState) -> None:
        self._fetch(0)
        self.wait()
        self._saving = step
        writing: collections.deque[int] = collections.deque()
        most = 0
        for i in self._left():
            one = self._sweep.take(state, i)
            most = most or self._copies(one)
            if len(writing) == most:
                self._records[writing.popleft()].wait()
            self._records[i].save(step, one)
            writing.append(i)
            del one

    def _copies(self, one: TrainState) -> int:
        """How many members' copies, from which they are written, half of each host's free memory holds; at least 1."""
        size, free, count = host_bytes(one), host_memory.available(), len(self._left())
        # a process all of whose parts another one writes too copies nothing
        here = count if free is None or not size else min(count, max(1, free // 2 // size))
        most = min(distributed.gather(here))
        if free is not None and most < count and not self._told:
            self._told = True
            say(
                f"checkpoints of {count} members are written {most} at a time, while training waits: each is copied to "
                f"{size / 1e9:.2f} GB of the host's memory, of which {free / 1e9:.2f} GB are free"
            )
        return most

    def wait(self) -> None:
        """Waits until the last step that was saved is durable for all, and only then deletes older ones of any: after a
        kill there is a step that all of them hold."""
        for records in self._records:
            records.wait()
        if self._saving is not None:
            self._record.set_saved([self._names[i] for i in self._left()], self._saving)
            self._record.write()
            for i in self._left():
                self._records[i].checkpoints.delete_surplus()
        self._saving = None

    def _left(self) -> list[int]:
        return [i for i, live in enumerate(self._live) if live]


def host_bytes(tree: Any) -> int:
    """Bytes of arrays that this process copies and writes: of parts that several devices hold, one."""
    parts = (part for x in jax.tree.leaves(tree) for part in x.addressable_shards if part.replica_id == 0)
    return sum(part.data.nbytes for part in parts)
