"""Watches a run on a TPU until it ends, and replaces the TPU where the cloud takes it away."""

from __future__ import annotations

import time
from collections.abc import Callable

from launch.tpu_resource import Resource
from uwm_jax.errors import RunError, UserError, warn

REPLACEMENTS = 5  # in a row without a new durable checkpoint
SUSPEND_SECONDS = 1800.0  # for a resource that is being taken away to be gone
UNSEEN_SECONDS = 3600.0  # in which at least one look must succeed


class Watch:
    """Looks at a resource and its workers from time to time.

    Args:
      resource: as it was created from here, which may be replaced.
      install, start: put the bundle on all workers; start the run on those that do not run it.
      newest_step: of the run's durable checkpoints; None for none.
      hours: of waiting for a replacement in the queue.
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
        self._replaced, self._step = 0, None  # replacements since the newest checkpoint changed

    def run(self) -> None:
        """Returns when the run has ended on all workers with status 0.

        Raises:
          RunError: it has ended otherwise, a limit is reached, or replacing the resource helps no more.
          UserError: the resource is not the one that was created from here.
        """
        deadline, seen, said = self._now() + 3600 * self._limit_hours, self._now(), ""
        while True:
            try:
                found = self._resource.describe()
                state = self._resource.state(found) if found else None
                workers = self._resource.workers() if state == self._resource.api.ready else []
                seen = self._now()
            except RunError as e:
                warn(f"{self._resource.name}: {e}")
                if self._now() - seen > UNSEEN_SECONDS:
                    raise RunError(
                        f"{self._resource.name}: no look at it succeeded in {UNSEEN_SECONDS / 60:.0f} min. The run may "
                        "go on; rerun the same command to watch it again."
                    ) from e
            else:
                if (now := ", ".join(sorted(set(workers))) or str(state)) != said:
                    self._say(f"{self._resource.name}: {now}")
                    said = now
                if found is None:
                    raise RunError(
                        f"{self._resource.name}: it is gone, deleted by somebody. Create it anew to continue."
                    )
                if state in self._resource.api.lost:
                    self._replace()
                    seen = self._now()
                elif workers and self._ended(workers):
                    return
                elif {"lost", "not started"} & set(workers):
                    self._say(f"{self._resource.name}: a host was started anew; starting the run on it")
                    self._start()
            if self._now() > deadline:
                raise RunError(
                    f"{self._resource.name}: watched for {self._limit_hours:g} h. The run may go on; rerun the same "
                    "command to watch it again."
                )
            self._sleep(self._poll_seconds)

    @staticmethod
    def _ended(workers: list[str]) -> bool:
        """Whether the run has ended well on all workers; raises RunError where all have ended and some have failed."""
        if not all(said.startswith("ended") for said in workers):
            return False
        if failed := sorted({said for said in workers} - {"ended 0"}):
            count = sum(said != "ended 0" for said in workers)
            raise RunError(
                f"the run has {failed[0].replace('ended', 'ended with status')} on {count} of {len(workers)} workers, "
                "after what its supervisor could do: see `launch.tpu tail`."
            )
        return True

    def _replace(self) -> None:
        """Deletes what the cloud has taken away and creates the same anew."""
        resource, step = self._resource, self._newest_step()
        self._replaced = self._replaced + 1 if step == self._step else 1
        self._step = step
        if self._replaced > REPLACEMENTS:
            raise RunError(
                f"{resource.name}: replaced {REPLACEMENTS} times without a new checkpoint (the newest: "
                f"{'none' if step is None else f'step {step}'}). It is left as it is."
            )
        deadline = self._now() + SUSPEND_SECONDS
        while True:
            found = resource.describe()
            state = resource.state(found) if found else None
            if found is not None and not resource.is_ours(found):
                raise UserError(
                    f"{resource.name}: this is not the resource that was created from here, so it is not replaced."
                )
            if found is None or state in resource.api.removable:
                break
            if state not in resource.api.lost:
                return  # it is there again
            if self._now() > deadline:
                raise RunError(f"{resource.name}: still {state} after {SUSPEND_SECONDS / 60:.0f} min.")
            self._sleep(self._poll_seconds)
        if found is not None:
            self._say(f"{resource.name}: {state}; deleting it and creating it anew")
            resource.delete(force=False)
        resource.create()
        resource.wait(self._hours)
        self._install()
        self._start()
