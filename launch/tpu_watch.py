"""Watches a run on a TPU until it ends, and replaces the TPU where the cloud takes it away."""

from __future__ import annotations

import time
from collections.abc import Callable

from launch.tpu_resource import Resource
from uwm_jax.errors import RunError, UserError, warn

REPLACEMENTS = 5  # in a row without a new durable checkpoint
SUSPEND_SECONDS = 1800.0  # for a resource that is being taken away to be gone
UNSEEN_SECONDS = 3600.0  # in which at least one look must succeed
# Hosts whose run ended by SIGTERM, or without a word: the cloud takes them away, or starts them anew. In this time it
# becomes known which.
GRACE_SECONDS = 300.0

_STARTED_AGAIN = {"lost", "not started", "ended 143"}


class Final(RunError):
    """Why watching ends; other errors are those of one look, and there will be another."""


class Watch:
    """Looks at a resource and its workers from time to time.

    Args:
      resource: as it was created from here, which may be replaced.
      install, start: put the bundle on all workers; start the run on those that do not run it.
      newest_step: of the run's durable checkpoints; None for none.
      hours: the longest wait in the queue.
      limit_hours: after which it stops watching.
      poll_seconds: between looks.
    """

    def __init__(
        self,
        resource: Resource,
        install: Callable[[], None],
        start: Callable[[], None],
        newest_step: Callable[[], int | None],
        hours: float,
        limit_hours: float,
        poll_seconds: float,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
    ):
        self._resource, self._install, self._start = resource, install, start
        self._newest_step = newest_step
        self._hours, self._limit_hours, self._poll_seconds = hours, limit_hours, poll_seconds
        self._say, self._sleep, self._now = say, sleep, now
        self._step: int | None = None  # the newest that is known
        self._replaced = 0  # how often since it changed
        self._said, self._state = "", ""
        self._state_since = self._asked_at = now()
        self._was_ready = False  # since it was asked for
        self._owed = False  # deleted, and not yet created anew
        self._down_since: float | None = None  # a host that does not run the run

    def run(self) -> None:
        """Returns when the run is done on all workers.

        Raises:
          Final: it has ended otherwise, a limit is reached, or replacing the resource helps no more.
          UserError: the resource is not the one that was created from here.
        """
        deadline, seen = self._now() + 3600 * self._limit_hours, self._now()
        name, advice = self._resource.name, "The run may go on; rerun the same command to watch it again."
        while True:
            try:
                if self._look():
                    return
                seen = self._now()
            except Final:
                raise
            except RunError as e:
                warn(f"{name}: {e}")
                if self._now() - seen > UNSEEN_SECONDS:
                    raise Final(f"{name}: no look at it succeeded in {UNSEEN_SECONDS / 60:.0f} min. {advice}") from e
            if self._now() > deadline:
                raise Final(f"{name}: watched for {self._limit_hours:g} h. {advice}")
            self._sleep(self._poll_seconds)

    def _look(self) -> bool:
        """Whether the run is done; does what is to be done meanwhile."""
        resource = self._resource
        found = resource.describe()
        if found is None:
            if not self._owed:
                raise Final(f"{resource.name}: it is gone, deleted by somebody. Create it anew to continue.")
            self._create()
            return False
        state = str(resource.state(found))
        if state != self._state:
            self._state, self._state_since = state, self._now()
        if state == resource.api.ready:
            self._was_ready, self._owed = True, False
            return self._care_for(resource.workers())
        self._tell(state)
        if state in resource.api.removable:
            if not resource.is_ours(found):
                raise UserError(
                    f"{resource.name}: this is not the resource that was created from here, so it is not replaced."
                )
            self._replace(state)
        elif state in resource.api.lost:
            if self._now() - self._state_since > SUSPEND_SECONDS:
                raise Final(f"{resource.name}: still {state} after {SUSPEND_SECONDS / 60:.0f} min.")
        elif self._now() - self._asked_at > 3600 * self._hours and not self._was_ready:
            raise Final(f"{resource.name}: not {resource.api.ready} within {self._hours:g} h (it is {state}).")
        return False

    def _care_for(self, workers: list[str]) -> bool:
        """Whether the run is done on all workers; starts it on those that have lost it."""
        self._tell(", ".join(sorted(set(workers))))
        if workers and all(said.startswith("ended") for said in workers):
            good = {"ended 0", "ended 143"}
            if failed := sorted(set(workers) - good):
                count, status = sum(said not in good for said in workers), failed[0].removeprefix("ended ")
                raise Final(
                    f"the run has ended with status {status} on {count} of {len(workers)} workers, after what its "
                    "supervisor could do: see `launch.tpu tail`."
                )
            if set(workers) == {"ended 0"}:
                return True
        if "not installed" in workers:  # it was replaced
            self._install()
            self._start()
        elif not _STARTED_AGAIN & set(workers):
            self._down_since = None
        elif self._down_since is None:
            self._down_since = self._now()
        elif self._now() - self._down_since >= GRACE_SECONDS:
            self._say(f"{self._resource.name}: starting the run on hosts that do not run it any more")
            self._count("started")
            self._start()
            self._down_since = None
        return False

    def _replace(self, state: str) -> None:
        """Deletes what the cloud has taken away and creates the same anew; the next looks wait for it."""
        if state == "FAILED" and not self._was_ready:
            raise Final(
                f"{self._resource.name}: {state}: it was not {self._resource.api.ready} within {self._hours:g} h, or "
                "cannot be. Delete it, then create it anew."
            )
        if not self._owed:
            self._count("replaced")
        self._say(f"{self._resource.name}: {state}; deleting it and creating it anew")
        self._owed = True
        self._resource.delete(force=False)
        self._create()

    def _create(self) -> None:
        self._resource.create()
        self._owed, self._was_ready, self._asked_at, self._down_since = False, False, self._now(), None

    def _count(self, done: str) -> None:
        """Counts what is done to go on; raises Final where that has not led to a new checkpoint too often."""
        try:
            step = self._newest_step()
        except RunError as e:
            warn(str(e))
            step = self._step
        self._replaced = self._replaced + 1 if step == self._step else 1
        self._step = step
        if self._replaced > REPLACEMENTS:
            raise Final(
                f"{self._resource.name}: replaced or started anew {REPLACEMENTS} times without a new checkpoint (the "
                f"newest: {'none' if step is None else f'step {step}'}), and not {done} once more."
            )

    def _tell(self, text: str) -> None:
        if text != self._said:
            self._say(f"{self._resource.name}: {text}")
            self._said = text
