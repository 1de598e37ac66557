"""Bad records: damaged, at odds with the manifest, or unreadable; and how many of them a run bears.

With `config.data.max_bad_records` above 0, a row whose window needs a bad record repeats an earlier one
(`Loader.load`). Every process notes what it met for each step; before a step, all processes exchange their notes
(`parallel.turns`), so that all of them hold the same counts and end together. Counts go into `metrics.jsonl` and into
the data's state of a checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from uwm_jax.errors import RunError, UserError, warn


class BadRecord(UserError):
    """A record is damaged, or is not what the manifest says.

    Attributes:
        record: its name, which is the same wherever the dataset lies.
    """

    def __init__(self, message: str, record: str):
        super().__init__(message)
        self.record = record


class UnreadRecord(RunError):
    """A record could not be read, also when it was tried again.

    Attributes:
        record: as `BadRecord`.
    """

    def __init__(self, message: str, record: str):
        super().__init__(message)
        self.record = record


BAD = (BadRecord, UnreadRecord)

Notes = Mapping[str, Any]  # JSON: `rows`, a number of rows that were replaced, and `records`, {name: message}


class Faults:
    """The bad records of a run, counted once each; safe to use from many threads.

    Args:
        limit: `config.data.max_bad_records`.

    Attributes:
        limit: as given.
        rows: of all processes and all finished steps, the rows that were replaced.
        records: names of the bad records of all processes and all finished steps, held-out windows included.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.rows = 0
        self.records: set[str] = set()
        self._lock = threading.Lock()
        self._positions: dict[int, set[int]] = {}  # step -> positions of this process's rows that were replaced
        self._found: dict[int, dict[str, str]] = {}  # step (0: held-out windows) -> {record: message}, not yet taken
        self._told: set[str] = set()

    def note(self, error: BadRecord | UnreadRecord, step: int, position: int) -> None:
        """The row at a position, of the batch of step 1, 2, ..., needs a bad record."""
        with self._lock:
            self._positions.setdefault(step, set()).add(position)
            self._found.setdefault(step, {})[error.record] = str(error)
        self._tell(
            str(error),  # the same of all records of a missing shard
            f"bad record, of which config.data.max_bad_records={self.limit} are allowed; rows that need it repeat "
            f"earlier ones of their streams: {error}",
        )

    def note_held_out(self, error: BadRecord | UnreadRecord, window: str, instead: str) -> None:
        """A held-out window needs a bad record; another one takes its place.

        Raises:
            UserError: there are more bad records than the limit.
        """
        with self._lock:
            self._found.setdefault(0, {})[error.record] = str(error)
            notes = [{"rows": 0, "records": dict(self._found[0])}]
        self._tell(window, f"{window} cannot be read, and {instead} takes its place: {error}")
        if end := self.end(notes):
            raise end(0) from error

    def notes(self, step: int) -> Notes | None:
        """What this process has to tell before a step whose batch is complete; None for nothing."""
        with self._lock:
            records = {**self._found.get(0, {}), **self._found.get(step, {})}
            rows = len(self._positions.get(step, ()))
        return {"rows": rows, "records": records} if records or rows else None

    def end(self, notes: Sequence[Notes]) -> Callable[[int], Exception] | None:
        """Makes the error that ends a run whose processes have these notes; None where it goes on."""
        records = {name: message for one in notes for name, message in one["records"].items()}
        new = sorted(records.keys() - self.records)
        count = len(self.records) + len(new)
        if not new or count <= self.limit:
            return None
        text = (
            f"{records[new[-1]]} These are {count} bad records, and config.data.max_bad_records is {self.limit}. Copy "
            "the files that are named again, or continue with a larger number."
        )
        return lambda step: UserError(text)

    def take(self, step: int, notes: Sequence[Notes]) -> None:
        """A step is made of the batches that all processes have these notes of."""
        with self._lock:
            for one in notes:
                self.rows += one["rows"]
                self.records |= one["records"].keys()
            self._found.pop(step, None)
            self._positions.pop(step, None)
            if 0 in self._found:
                self._found[0] = {name: text for name, text in self._found[0].items() if name not in self.records}

    def check(self, step: int) -> None:
        """Checks the limit for what this process alone has met up to a step.

        Raises:
            UserError: it is exceeded.
        """
        with self._lock:
            found = [{"rows": 0, "records": records} for at, records in self._found.items() if at <= step]
        if end := self.end(found):
            raise end(step)

    def metrics(self) -> dict[str, int]:
        """The counts for `metrics.jsonl`; {} where none is allowed and none was met."""
        if not (self.limit or self.records or self.rows):
            return {}
        return {"data/bad_records": len(self.records), "data/bad_rows": self.rows}

    def state(self) -> dict[str, Any]:
        """The counts after the steps so far, JSON."""
        return {"rows": self.rows, "records": sorted(self.records)}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continues from what `state` returned; None for no bad records."""
        with self._lock:
            self.rows = int(state["rows"]) if state else 0
            self.records = set(state["records"]) if state else set()
            self._positions.clear()
            held_out = self._found.get(0)
            self._found = {0: held_out} if held_out else {}

    def _tell(self, what: str, message: str) -> None:
        with self._lock:
            is_new = what not in self._told
            self._told.add(what)
        if is_new:
            warn(message)
