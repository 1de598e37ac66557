"""Checkpoints of a run, written atomically, whose items can be read separately.

`<workdir>/checkpoints/<step>/` holds separately loadable items:

  params        trainable parameters
  ema_params    their moving average, when `config.optimizer.ema_decay` is set
  train_state   optimizer state, hyper-parameters, step
  data_iter     position in the order of samples (JSON, independent of the topology); {} in a converted one
  codec         arrays of a codec fitted on data; a pretrained one lies in `<workdir>/frozen/<name>` instead
  assets        config, data spec with the normaliser, dataset manifest, code version, digests (JSON)

A checkpoint with only `params` and `assets` (a converted one) serves inference. A damaged one is detected by its
digests (`reader.py`), moved to `<workdir>/corrupt/`, and the one before it is used. In a bucket, where nothing can be
renamed, folders have other names and markers (`steps.py`), and a damaged one is marked where it lies.

Arrays are written by all processes, the other files by the main one; all processes call all methods in the same order.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from uwm_jax.data.spec import DataSpec
from uwm_jax.errors import RunError, UserError, warn
from uwm_jax.files import AnyPath, as_place, is_remote
from uwm_jax.models import layers
from uwm_jax.parallel import distributed
from uwm_jax.reading import cause_of, no_room
from uwm_jax.training import provenance
from uwm_jax.training.checkpoints import lock, reader
from uwm_jax.training.checkpoints.folders import folders_in
from uwm_jax.training.checkpoints.lease import LostLock
from uwm_jax.training.checkpoints.reader import CheckpointReader, CorruptCheckpoint, with_digests
from uwm_jax.training.checkpoints.retention import Retention
from uwm_jax.training.checkpoints.steps import CORRUPT, SET_ASIDE, folder_of, latest_step, steps_in
from uwm_jax.training.checkpoints.writer import make_writer
from uwm_jax.training.state import Hparams, TrainState

READ_TIMEOUT_SECONDS = 20 * 60  # for all processes to have read a checkpoint

REMOVE_SECONDS = 5.0  # for removing the remains of a failed save

_Value = TypeVar("_Value")

UNKNOWN_POSITION: dict[str, Any] = {}  # `data_iter` of a converted training state


def make_assets(config: ConfigDict, spec: DataSpec, **extra: Any) -> dict[str, Any]:
    """The JSON item that makes a checkpoint self-describing."""
    return {
        "config": config.to_dict(),
        "data_spec": spec.to_json(),
        "code_version": provenance.code_version(),
        **extra,
    }


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's directory.
      retention: which checkpoints stay when a new one is complete; by default all.
      read_only: changes nothing on disk, not even apparent remains of failed saves: a run may be saving.
      first_start: there must be no checkpoints.
      deletes: whether a complete save deletes those that `retention` does not keep; else `delete_surplus` does.

    Raises:
      UserError: `read_only`, and there are no checkpoints.
      RunError: not `read_only`, and another run uses this workdir, which is locked until `close`; or `first_start`, and
        another run has saved a checkpoint. Nothing is changed then.
    """

    def __init__(
        self,
        workdir: AnyPath,
        retention: Retention | None = None,
        read_only: bool = False,
        first_start: bool = False,
        deletes: bool = True,
    ):
        self.directory = as_place(workdir).absolute() / "checkpoints"
        if read_only and latest_step(workdir) is None:
            raise UserError(f"--workdir: {str(workdir)!r} holds no checkpoint yet.")
        self._retention, self._read_only = retention or Retention(), read_only
        self._passed_over: set[int] = set()
        self._deletes = deletes
        self._locked = False
        self._saving: threading.Thread | None = None
        self._failure: RunError | None = None
        self._failure_was_raised = False
        if not read_only:
            self._folders = folders_in(self.directory, self._take_lock(first_start))
            if distributed.is_main():
                self._folders.clear()
            self._writer = make_writer(f"{self.directory.parent.name}-{zlib.crc32(str(self.directory).encode()):08x}")

    def _take_lock(self, first_start: bool) -> str:
        """Takes the lock; returns its nonce, "" locally."""
        workdir, holder, found, nonce = self.directory.parent, None, None, ""
        if distributed.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
            holder = lock.hold(workdir)
            self._locked = holder is None
            if self._locked:
                lease = lock.lease_of(workdir)
                nonce = lease.nonce if lease else ""
                found = latest_step(workdir)
                self.directory.mkdir(exist_ok=True)
        holder, found, nonce = distributed.agree((holder, found, nonce))
        if holder is not None:
            raise RunError(
                f"--workdir: another run is at work in {str(self.directory.parent)!r} ({holder}). Wait for its end, "
                "end it with SIGTERM, or use another --workdir."
            )
        if first_start and found is not None:
            self._release()
            raise RunError(
                f"--workdir: another run has meanwhile saved step {found} in {str(workdir)!r}. Nothing there was "
                "changed; rerun the same command to continue from it, or use another --workdir."
            )
        return nonce

    def _remove_half_written(self) -> None:
        """Removes the remains of a failed save, whose other writes may continue for a moment."""
        nothing, deadline = 0, time.monotonic() + REMOVE_SECONDS
        while nothing < 3 and time.monotonic() < deadline:
            nothing = 0 if self._folders.clear(own=True) else nothing + 1
            time.sleep(0.05)

    def _release(self) -> None:
        if self._locked:
            self._locked = False
            lock.release(self.directory.parent)

    def steps(self) -> list[int]:
        """The steps of finished checkpoints, without damaged ones."""
        return [step for step in steps_in(self.directory) if step not in self._passed_over]

    # --- reading -------------------------------------------------------------------------------

    def newest_readable(self) -> CheckpointReader | None:
        """The newest checkpoint with intact assets, data position and codec; None if there are no checkpoints.

        A damaged one is reported on stderr and set aside as `pass_over` does.

        Raises:
          UserError: no checkpoint can be read, or the newest has no training state (a converted one).
        """
        while (step := distributed.agree(max(self.steps(), default=None))) is not None:
            stored = CheckpointReader(self.directory, step)
            try:
                _together(stored.verify_small)
                return stored
            except CorruptCheckpoint as e:
                self.pass_over(step, e)
        return None

    def restore_latest(self, like: TrainState) -> tuple[TrainState, CheckpointReader]:
        """The newest intact training state, and its checkpoint.

        Falls back as `newest_readable` does, so the step may be lower than the one that it returned before: the
        caller takes step, data position and assets from here.

        Args:
          like: the state's shapes, dtypes and shardings (`jax.ShapeDtypeStruct` leaves).

        Raises:
          UserError: no checkpoint can be read, or an intact one does not fit `like`.
        """
        while (stored := self.newest_readable()) is not None:
            try:
                return _restore_state(stored, like), stored
            except CorruptCheckpoint as e:
                self.pass_over(stored.step, e)
        raise UserError(f"{self.directory}: holds no checkpoint.")

    def restore_state(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The training state and the data position of a given step; `like` as in `restore_latest`."""
        stored = CheckpointReader(self.directory, step)
        _together(stored.require_train_state)
        return _restore_state(stored, like), _together(lambda: stored.data_iter)

    def restore_params(self, step: int, like: Any, item: str = "params") -> Any:
        """One item of parameters; `like` as in `restore_latest`. Raises CorruptCheckpoint, a UserError."""
        stored = CheckpointReader(self.directory, step)
        params = _together(lambda: stored.read(item, like))
        stored.verify(item, params)
        return params

    def restore_arrays(self, step: int, item: str) -> Any:
        """An item of arrays in the structure of the checkpoint, on the default device."""
        return CheckpointReader(self.directory, step).arrays(item)

    def assets(self, step: int) -> dict[str, Any]:
        return CheckpointReader(self.directory, step).assets

    def items(self, step: int) -> frozenset[str]:
        """The names of the items that a step holds."""
        return CheckpointReader(self.directory, step).items

    def pass_over(self, step: int, damage: CorruptCheckpoint) -> None:
        """Sets a damaged checkpoint aside, with a warning on stderr, in favour of the one before it.

        It is moved to `<workdir>/corrupt/`, in a bucket marked `.corrupt`, unless `read_only`. Raises UserError, and
        changes nothing, where no other checkpoint is left: an empty directory would make the next start begin anew.
        """
        left = [s for s in self.steps() if s != step]
        if not left:
            lie = "there" if is_remote(self.directory) else f"there and in {self.directory.parent / 'corrupt'}"
            raise UserError(
                f"{damage}. No other checkpoint of {self.directory} can be read. Nothing was deleted: damaged ones "
                f"lie {lie}. Restore one from a copy, or train in a new --workdir."
            ) from damage
        self._passed_over.add(step)
        if distributed.is_main():
            if self._read_only:
                place = folder_of(self.directory, step)
            else:
                place = self._folders.leave_out(step, CORRUPT)
            warn(f"checkpoint {step} is damaged: {damage}. It lies in {place}; step {left[-1]} is used instead.")
        distributed.barrier("the checkpoint is set aside")

    def set_aside(self, after: int) -> list[int]:
        """Moves the checkpoints of steps after a given one to `<workdir>/set_aside/`, and returns their steps.

        In a bucket they are marked `.set_aside`.
        """
        later = distributed.agree([step for step in self.steps() if step > after])
        for step in later:
            self._passed_over.add(step)
            if distributed.is_main():
                self._folders.leave_out(step, SET_ASIDE)
        distributed.barrier("later checkpoints are set aside")
        return later

    # --- writing -------------------------------------------------------------------------------

    def save(
        self, state: TrainState, data_iter: Mapping[str, Any], frozen_arrays: Any, assets: Mapping[str, Any]
    ) -> None:
        """Starts an asynchronous save of a training state, whose buffers may be reused on return.

        Raises:
          RunError: this save could not start, or an earlier one has failed.
        """
        self._start_save(int(jax.device_get(state.step)), _state_items(state), frozen_arrays, assets, dict(data_iter))

    @staticmethod
    def warm_up(state: TrainState, frozen_arrays: Any) -> None:
        """Compiles the device programs of the first `save` of such a state.

        A run that is ended by a signal has no time for that. All processes call it.
        """
        if not reader.on_cpus((state, frozen_arrays)):
            reader.array_digests({**_state_items(state), "codec": frozen_arrays})

    def save_params(self, step: int, params: Any, frozen_arrays: Any, assets: Mapping[str, Any]) -> None:
        """Saves only parameters and assets, and waits until they are durable."""
        self._start_save(step, {"params": params}, frozen_arrays, assets, None)
        self.wait()

    def check(self) -> None:
        """Raises RunError when an asynchronous save has failed, or the lock is lost. Cheap: call it every step."""
        if self._failure is not None:
            self._failure_was_raised = True
            raise self._failure
        if self._locked:
            lock.check(self.directory.parent)

    def wait(self) -> None:
        """Blocks until the last save is durable; raises RunError if it failed."""
        if self._saving is not None:
            self._saving.join()
        self.check()

    def close(self) -> None:
        """Waits for the last save. Raises RunError if it failed and this was not raised yet.

        While another exception is being handled, the failure is only printed, so that it does not hide the other.
        """
        if self._read_only:
            return
        another = sys.exc_info()[1] is not None
        if self._saving is not None:
            self._saving.join()
        try:
            self._writer.close()
        except Exception:  # the failed save again
            if self._failure is None:
                raise
        finally:
            if self._failure is not None and self._locked and not isinstance(self._failure, LostLock):
                self._remove_half_written()
            self._release()
        if self._failure is not None and not self._failure_was_raised:
            if not another:
                self.check()
            warn(str(self._failure))

    def _start_save(
        self,
        step: int,
        arrays: dict[str, Any],
        frozen_arrays: Any,
        assets: Mapping[str, Any],
        data_iter: dict[str, Any] | None,
    ) -> None:
        self.wait()
        if frozen_arrays:
            arrays = {**arrays, "codec": frozen_arrays}
        assets = with_digests(assets, arrays, data_iter)
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items["assets"] = ocp.args.JsonSave(assets)
        if data_iter is not None:
            items["data_iter"] = ocp.args.JsonSave(data_iter)
        try:
            self._writer.save(str(self._folders.new(step)), args=ocp.args.Composite(**items))
        except Exception as e:
            self._failure = self._failed(step, e)
            self.check()
        self._passed_over.discard(step)  # an intact one replaces a damaged one
        self._saving = threading.Thread(target=self._finish, args=(step,), name=f"save of step {step}", daemon=True)
        self._saving.start()

    def _finish(self, step: int) -> None:
        """In a thread of its own: waits until a checkpoint is complete, and only then deletes old ones."""
        try:
            self._writer.wait_until_finished()
            if distributed.is_main():
                self._folders.commit(step)
        except BaseException as e:
            self._failure = self._failed(step, e)
            return
        if self._deletes:
            self.delete_surplus()

    def delete_surplus(self) -> None:
        """Deletes the checkpoints that are not to be kept; the main process does, others do nothing."""
        if distributed.is_main():
            for old in self._surplus():
                try:
                    self._folders.delete(old)
                except (OSError, RunError) as e:
                    warn(f"{self.directory / str(old)}: an old checkpoint could not be deleted: {cause_of(e)}")

    def _surplus(self) -> list[int]:
        """The steps whose checkpoints are to be deleted; none, with a warning, if that cannot be decided."""
        try:
            return self._retention.surplus(self._listed(), self.directory.parent)
        except (OSError, RunError) as e:
            warn(f"no old checkpoint is deleted: {cause_of(e)}")
            return []

    def _listed(self) -> list[int]:
        """`steps`, for the thread that reports the result of a save; none, with a warning, if they cannot be read."""
        try:
            return self.steps()
        except (OSError, RunError) as e:
            warn(f"{self.directory} cannot be read: {cause_of(e)}")
            return []

    def _failed(self, step: int, error: BaseException) -> RunError:
        try:
            if self._locked and (lease := lock.lease_of(self.directory.parent)):
                lease.renew()  # a run without its lock has no other failure to tell
        except LostLock as lost:
            return lost
        except RunError:
            pass  # the bucket cannot be reached, as `error` says
        # Else the interpreter warns, as it ends, of writes that orbax has abandoned.
        warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
        whole = [s for s in self._listed() if s != step]
        continued = f"continues from step {whole[-1]}" if whole else "starts anew"
        full = no_room(error)
        place = "the bucket and the network" if is_remote(self.directory) else "the space and the permissions there"
        todo = "Free some space" if full else f"Check {place}"
        failure = RunError(
            f"{self._folders.new(step)}: this checkpoint could not be saved: {full or cause_of(error)}. The run "
            f"stops here. {todo}; the same command then {continued}."
        )
        failure.__cause__ = error
        return failure


def _state_items(state: TrainState) -> dict[str, Any]:
    state = layers.stacked(state)
    train_state = {"step": state.step, "opt_state": state.opt_state, "hparams": state.hparams}
    items = {"params": state.params, "train_state": train_state}
    return items if state.ema_params is None else {**items, "ema_params": state.ema_params}


def _restore_state(stored: CheckpointReader, like: TrainState) -> TrainState:
    wanted = _state_items(like)
    if one_seed := "seed" not in stored.assets["config"]["data"]:  # saved before `config.data.seed` was a field
        names = ("seed", "learning_rate", "weights")
        wanted["train_state"]["hparams"] = {name: getattr(like.hparams, name) for name in names}
    restored = _together(lambda: {item: stored.read(item, tree) for item, tree in wanted.items()})
    for item, tree in restored.items():
        stored.verify(item, tree)
    train_state = restored.pop("train_state")
    if one_seed:
        hparams = train_state["hparams"]
        train_state["hparams"] = Hparams(**hparams, data_seed=jnp.copy(hparams["seed"]))
    return like.replace(**train_state, **restored)


def _together(read: Callable[[], _Value]) -> _Value:
    """`read()`, unless it raises on any process: then it raises on all, so that none waits for another.

    A checkpoint counts as damaged only if no process failed for another reason.
    """
    result, error = None, None
    try:
        result = read()
    except (UserError, RunError) as e:
        error = e
    distributed.barrier("the checkpoint is read", READ_TIMEOUT_SECONDS)
    damaged = distributed.any_process(isinstance(error, CorruptCheckpoint))
    if distributed.any_process(error is not None and not isinstance(error, CorruptCheckpoint)):
        raise error if error is not None else RunError("another process could not read the checkpoint.")
    if damaged:
        raise error if error is not None else CorruptCheckpoint("another process found damage in its part of it")
    return cast(_Value, result)
