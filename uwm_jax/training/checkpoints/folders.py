"""Where the checkpoints of a workdir lie, as their writer needs it: new ones, complete ones, those that are left out.

Readers need `steps.py` alone. What changes anything here is called by the main process, under the lock of the workdir.
"""

from __future__ import annotations

import abc
import json
import shutil
from pathlib import Path

from uwm_jax import files
from uwm_jax.errors import RunError, warn
from uwm_jax.files import Place
from uwm_jax.reading import cause_of
from uwm_jax.training.checkpoints import lock, steps
from uwm_jax.training.checkpoints.steps import COMMIT, CORRUPT, SET_ASIDE

_UNFINISHED = (".orbax-checkpoint-tmp", ".deleted")


class Folders(abc.ABC):
    """The folders of checkpoints in `<workdir>/checkpoints`."""

    def __init__(self, directory: Place):
        self.directory = directory

    @abc.abstractmethod
    def new(self, step: int) -> Place:
        """Where a step is to be saved."""

    @abc.abstractmethod
    def commit(self, step: int) -> None:
        """Makes a complete save count.

        Raises:
          LostLock: this process no longer holds the lock; the save does not count.
          StorageError: it cannot be told; the save does not count.
        """

    @abc.abstractmethod
    def leave_out(self, step: int, why: str) -> Place:
        """Takes a finished checkpoint away from those that count, without deleting it; returns where it lies.

        Args:
          why: `steps.CORRUPT` or `steps.SET_ASIDE`.
        """

    @abc.abstractmethod
    def delete(self, step: int) -> None:
        """Deletes a finished checkpoint, which no longer counts from the first moment on. Raises OSError, RunError."""

    @abc.abstractmethod
    def clear(self, own: bool = False) -> bool:
        """Deletes the remains of failed saves; returns whether there were any.

        Args:
          own: those of this process alone.
        """


def folders_in(directory: Place, nonce: str) -> Folders:
    """Those of a workdir; `nonce` is that of the lease, the same on all processes, and "" locally."""
    return InBucket(directory, nonce) if files.is_remote(directory) else Local(Path(str(directory)))


class Local(Folders):
    """Folders that are renamed."""

    directory: Path

    def new(self, step: int) -> Path:
        return self.directory / str(step)

    def commit(self, step: int) -> None:
        """Does nothing: the folder was renamed when it was complete."""

    def leave_out(self, step: int, why: str) -> Path:
        place = _free_name(self.directory.parent / why.removeprefix(".") / str(step))
        place.parent.mkdir(exist_ok=True)
        self._found(step).rename(place)
        return place

    def delete(self, step: int) -> None:
        folder = self._found(step)
        gone = folder.with_name(f"{folder.name}.deleted")
        folder.rename(gone)  # first, so that a partly deleted checkpoint never looks like one
        shutil.rmtree(gone)

    def clear(self, own: bool = False) -> bool:
        found = [path for path in self.directory.iterdir() if any(suffix in path.name for suffix in _UNFINISHED)]
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        return bool(found)

    def _found(self, step: int) -> Path:
        return Path(str(steps.folder_of(self.directory, step)))


class InBucket(Folders):
    """Folders that are never renamed: an object next to each tells what it is (`steps.py`)."""

    def __init__(self, directory: Place, nonce: str):
        super().__init__(directory)
        self._nonce = nonce

    def new(self, step: int) -> Place:
        return self.directory / f"{step}-{self._nonce}"

    def commit(self, step: int) -> None:
        lease = lock.lease_of(self.directory.parent)
        assert lease is not None and lease.nonce == self._nonce
        lease.renew()
        marker = {"step": step, "nonce": self._nonce}
        files.create(self.directory / f"{self.new(step).name}{COMMIT}", json.dumps(marker).encode())
        lease.renew()  # if another process has taken the lock since, it may not have seen the marker

    def leave_out(self, step: int, why: str) -> Place:
        folder = steps.folder_of(self.directory, step)
        files.create(folder.with_name(f"{folder.name}{why}"), b"{}")
        files.remove(folder.with_name(f"{folder.name}{COMMIT}"), missing_ok=True)
        return folder

    def delete(self, step: int) -> None:
        folder = steps.folder_of(self.directory, step)
        lock.check(self.directory.parent)
        files.remove(folder.with_name(f"{folder.name}{COMMIT}"), missing_ok=True)
        files.remove(folder, missing_ok=True)

    def clear(self, own: bool = False) -> bool:
        names = steps.names_in(self.directory)
        kept = {folder.name for folder in steps.finished_in(self.directory).values()}
        kept |= {name.removesuffix(why) for name in names for why in (CORRUPT, SET_ASIDE) if name.endswith(why)}
        found = [
            folder
            for folder in steps.folders_among({name.removesuffix(COMMIT) for name in names})
            if folder.nonce  # what a user uploaded is left alone
            and (folder.nonce == self._nonce or not own)
            and folder.name not in kept
        ]
        for folder in found:
            try:
                files.remove(self.directory / f"{folder.name}{COMMIT}", missing_ok=True)
                files.remove(self.directory / folder.name, missing_ok=True)
            except (RunError, OSError) as e:
                warn(f"{self.directory / folder.name}: the remains of a save could not be deleted: {cause_of(e)}")
        return bool(found)


def _free_name(path: Path) -> Path:
    """`path`, or if it exists the first of `path.2`, `path.3` and so on that does not."""
    names = (path.with_name(f"{path.name}.{n}") if n > 1 else path for n in range(1, 10_000))
    return next(name for name in names if not name.exists())
