"""A TPU in the cloud: a queued resource of one or more slices, or a single TPU VM; how it is made, reached and deleted.

What a launcher creates it remembers in `~/.local/state/uwm_jax/tpu/<zone>/<name>.json`, with an identity that the
resource carries as a label: a resource without that label is another's, though it has the same name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.gcloud import Gcloud
from uwm_jax.errors import RunError, UserError
from uwm_jax.files import write_text
from uwm_jax.planning import topology as topology_lib
from uwm_jax.reading import read_json

LABEL = "uwm-jax-launch"
STATE_VARIABLE = "XDG_STATE_HOME"

DELETE_SECONDS = 1800.0  # for a resource to be deleted
STATUS_SECONDS = 300.0  # for all workers to say how they are
REACH_SECONDS = 300.0  # for SSH to reach all workers of a resource that has just become ready

# cloud.google.com/tpu/docs/runtimes, read November 2026.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?")
_SAYS = re.compile(r"uwm_jax worker: (running|lost|not installed|not started|ended \d+)\s*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Api:
    """One of the two ways to a TPU.

    Attributes:
      group: of gcloud's commands.
      ready, lost: states in which it can be reached, and in which it will not be any more; in others it is waited for.
      removable: those of `lost` in which it can be deleted at once.
      all_workers, first_worker: flags of `ssh` and `scp`.
    """

    group: tuple[str, ...]
    ready: str
    lost: tuple[str, ...]
    removable: tuple[str, ...]
    all_workers: tuple[str, ...]
    first_worker: tuple[str, ...]


_TPUS = ("compute", "tpus")
QUEUED = Api(
    (*_TPUS, "queued-resources"),
    "ACTIVE",
    ("SUSPENDING", "SUSPENDED", "FAILED"),
    ("SUSPENDED", "FAILED"),
    ("--worker=all", "--node=all"),
    ("--worker=0", "--node=0"),
)
VM = Api(
    (*_TPUS, "tpu-vm"),
    "READY",
    ("PREEMPTED", "TERMINATED"),
    ("PREEMPTED", "TERMINATED"),
    ("--worker=all",),
    ("--worker=0",),
)


@dataclasses.dataclass(frozen=True)
class Order:
    """What is asked of the cloud.

    Attributes:
      topology: of one slice, as `uwm_jax.plan` names it.
      slices: how many of them; more than one in a queued resource only.
      vm: whether it is a TPU VM, which is there at once or not at all, instead of a queued resource.
      runtime: version of the machines' software.
      hours: that it may wait in the queue.
      flags: further ones of gcloud's `create`.
      identity: the value of its label.
    """

    topology: str
    slices: int
    vm: bool
    runtime: str
    hours: float
    flags: tuple[str, ...] = ()
    identity: str = dataclasses.field(default_factory=lambda: secrets.token_hex(6))

    @property
    def api(self) -> Api:
        return VM if self.vm else QUEUED

    @property
    def planned(self) -> str:
        """The name of all slices for `uwm_jax.plan`."""
        return f"{self.slices}x{self.topology}" if self.slices > 1 else self.topology


def order(topology: str, slices: int, vm: bool, runtime: str, hours: float, flags: Sequence[str]) -> Order:
    """An order whose parts fit; raises UserError else."""
    place = topology_lib.find(topology)
    if place.slices > 1 and slices not in (1, place.slices):
        raise UserError(f"--topology={topology} has {place.slices} slices, but --slices={slices}.")
    slices = max(slices, place.slices)
    if vm and slices > 1:
        raise UserError(f"--slices={slices} requires a queued resource: leave --vm out.")
    one = topology.rpartition("x")[2] if place.slices > 1 else topology
    extra = tuple(flag if flag.startswith("--") else f"--{flag}" for flag in flags)
    return Order(one, slices, vm, runtime or RUNTIMES[place.chip.name], hours, extra)


class Resource:
    """A TPU by its name.

    Args:
      order: as it was created from here; None for one that was not.
      api: of one without an order.
    """

    def __init__(
        self,
        gcloud: Gcloud,
        name: str,
        zone: str,
        order: Order | None,
        api: Api = QUEUED,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.monotonic,
        poll_seconds: float = 60.0,
    ):
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{name!r}: expected a name of lower-case letters, digits and hyphens that begins with a letter."
            )
        self.gcloud, self.name, self.zone, self.order = gcloud, name, zone, order
        self.api = order.api if order else api
        self._sleep, self._now, self._poll_seconds = sleep, now, poll_seconds

    def create(self) -> None:
        """Asks for it; `wait` waits until it is there."""
        asked = self.order
        assert asked is not None
        kind = asked.topology.replace("v5e-", "v5litepod-")
        flags = [f"--accelerator-type={kind}"]
        if asked.vm:
            flags += [f"--version={asked.runtime}"]
        else:
            nodes = [f"--node-count={asked.slices}", f"--node-prefix={self.name}"]
            flags += [
                f"--runtime-version={asked.runtime}",
                *(nodes if asked.slices > 1 else [f"--node-id={self.name}"]),
            ]
            flags += [f"--valid-until-duration={asked.hours:g}h"]
        flags += [f"--labels={LABEL}={asked.identity}", "--async", *asked.flags]
        if not self.gcloud.dry_run:
            write_text(_record(self.name, self.zone), json.dumps(dataclasses.asdict(asked), indent=2) + "\n")
        self.gcloud.run(*self.api.group, "create", self.name, f"--zone={self.zone}", *flags)

    def describe(self) -> dict[str, Any] | None:
        """The cloud's description; None if there is none of this name."""
        return self.gcloud.read(*self.api.group, "describe", self.name, f"--zone={self.zone}")

    def state(self, found: dict[str, Any] | None = None) -> str | None:
        """Such as `ACTIVE`; None if there is none of this name."""
        found = found or self.describe()
        state = found and found.get("state")
        return state.get("state") if isinstance(state, dict) else state

    def wait(self, hours: float) -> None:
        """Waits until it can be reached.

        Raises:
          RunError: it is not within `hours`, or never will be.
        """
        self.gcloud.remark(f"until {self.name} is {self.api.ready}, at most {hours:g} h:")
        deadline, before = self._now() + 3600 * hours, None
        while True:
            state = self.state()
            if self.gcloud.dry_run or state == self.api.ready:
                return
            if state != before:
                self.gcloud.remark(f"{self.name}: {state or 'not known yet'}")
                before = state
            if state in self.api.lost:
                raise RunError(
                    f"{self.name}: it is {state} and was never {self.api.ready}; delete it, then create it anew."
                )
            if self._now() > deadline:
                raise RunError(f"{self.name}: not {self.api.ready} within {hours:g} h (it is {state}).")
            self._sleep(self._poll_seconds)

    def is_ours(self, found: dict[str, Any]) -> bool:
        """Whether a description is that of what was created from here."""
        nodes = [spec.get("node", {}) for spec in found.get("tpu", {}).get("nodeSpec", [])] or [found]
        return self.order is not None and all(
            node.get("labels", {}).get(LABEL) == self.order.identity for node in nodes
        )

    def delete(self, force: bool) -> None:
        """Deletes it and waits until it is gone.

        Args:
          force: also while its machines run; else only what the cloud has taken away already can be deleted.
        """
        flags = ["--force"] if force and self.api is QUEUED else []
        self.gcloud.run(*self.api.group, "delete", self.name, f"--zone={self.zone}", *flags, seconds=DELETE_SECONDS)
        deadline = self._now() + DELETE_SECONDS
        while not self.gcloud.dry_run and self.describe() is not None:
            if self._now() > deadline:
                raise RunError(f"{self.name}: not deleted within {DELETE_SECONDS / 60:.0f} min.")
            self._sleep(self._poll_seconds)

    def forget(self) -> None:
        """Forgets that it was created from here."""
        if not self.gcloud.dry_run:
            _record(self.name, self.zone).unlink(missing_ok=True)

    def ssh(self, command: str, seconds: float, retry_seconds: float = 0.0) -> None:
        """Runs a command line on all workers of all slices."""
        self.gcloud.run(*self._ssh(self.api.all_workers, command), seconds=seconds, retry_seconds=retry_seconds)

    def first(self, command: str, seconds: float) -> None:
        """Runs a command line on the first worker."""
        self.gcloud.run(*self._ssh(self.api.first_worker, command), seconds=seconds)

    def copy(self, sources: Sequence[str], folder: str, seconds: float) -> None:
        """Copies files into a folder of the home directory of all workers."""
        arguments = (*self.api.group, "scp", *sources, f"{self.name}:{folder}/", f"--zone={self.zone}")
        self.gcloud.run(*arguments, *self.api.all_workers, seconds=seconds)

    def workers(self) -> list[str]:
        """What each worker's run is: `running`, `ended STATUS`, `lost`, `not started`, or `not installed`.

        Raises:
          RunError: none says so.
        """
        script = "uwm_jax/current/launch/worker.sh"
        command = f"if [ -e {script} ]; then bash {script} status; else echo uwm_jax worker: not installed; fi"
        text = self.gcloud.output(*self._ssh(self.api.all_workers, command), seconds=STATUS_SECONDS)
        found = [match[1] for match in _SAYS.finditer(text)]
        if not found and not self.gcloud.dry_run:
            raise RunError(f"{self.name}: no worker said how its run is; SSH brought {text[-200:]!r}.")
        return found

    def _ssh(self, workers: Sequence[str], command: str) -> list[str]:
        return [*self.api.group, "ssh", self.name, f"--zone={self.zone}", *workers, f"--command={command}"]


def _record(name: str, zone: str) -> Path:
    base = os.environ.get(STATE_VARIABLE) or Path.home() / ".local" / "state"
    return Path(base) / "uwm_jax" / "tpu" / zone / f"{name}.json"


def remembered(name: str, zone: str) -> Order | None:
    """The order of a resource that was created from here; None for another's.

    Raises:
      UserError: its file cannot be read.
    """
    file = _record(name, zone)
    if not file.exists():
        return None
    try:
        found = read_json(file)
        return Order(**found | {"flags": tuple(found["flags"])})
    except (TypeError, KeyError) as e:
        raise UserError(f"{file}: not written by this version ({e}). Delete the resource, then this file.") from e
