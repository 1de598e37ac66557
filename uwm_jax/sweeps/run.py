"""Trains the members of a sweep: groups that share a program one after another, a group from top to bottom.

What a group opens, builds and restores is what `uwm_jax.train` does for one run; here each member has a workdir, and
all of them start from the newest step that every one of them holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax import files
from uwm_jax.data.loader import prefetch_to_device
from uwm_jax.errors import Preempted, RunError, UserError
from uwm_jax.evaluation import in_training
from uwm_jax.evaluation.in_training import Draw, InTraining
from uwm_jax.parallel import distributed, signals
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.distributed import say
from uwm_jax.runs.loop import Watch, loop
from uwm_jax.runs.opening import (
    find_codec,
    make_loader,
    open_data,
    print_summary,
    use_compilation_cache,
    with_first_parameters,
)
from uwm_jax.runs.records import RunRecords
from uwm_jax.sweeps import record as record_lib
from uwm_jax.sweeps.members import Member
from uwm_jax.sweeps.program import SweepProgram, SweepState
from uwm_jax.sweeps.record import Record
from uwm_jax.sweeps.records import SweepRecords
from uwm_jax.training import (
    branching,
    cached_latents,
    codec_store,
    finetune,
    fixed_fields,
    latents,
    lineage,
    provenance,
)
from uwm_jax.training import workdir as workdir_lib
from uwm_jax.training.build import build
from uwm_jax.training.checkpoints import checkpoint as checkpoint_lib
from uwm_jax.training.checkpoints import lock
from uwm_jax.training.checkpoints.checkpoint import Checkpoints
from uwm_jax.training.checkpoints.reader import CheckpointReader, CorruptCheckpoint
from uwm_jax.training.checkpoints.retention import Retention
from uwm_jax.training.flops import Mfu
from uwm_jax.training.goodput import Goodput
from uwm_jax.training.profile import Profile
from uwm_jax.training.startup import Startup
from uwm_jax.training.state import Hparams, TrainState
from uwm_jax.training.supervised import Supervised
from uwm_jax.training.telemetry import trackers
from uwm_jax.training.telemetry.log import MetricsLog, losses_of, read_metrics


@dataclasses.dataclass
class Place:
    """A member where it trains.

    Attributes:
      member: the member, whose config may name its origin with a step.
      workdir: `members/<name>`.
      diverged: before this start.
      saved: the newest step of which all members of its program had a checkpoint, by `sweep.json`; 0 for none.
      checkpoints: of its workdir.
      stored: the checkpoint that it continues from; None where it starts, or has diverged.
    """

    member: Member
    workdir: files.Place
    diverged: bool
    saved: int = 0
    checkpoints: Checkpoints | None = None
    stored: CheckpointReader | None = None

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def config(self) -> ConfigDict:
        return self.member.config


def run_sweep(
    directory: files.Place,
    groups: Sequence[Sequence[Member]],
    describe: Callable[[Member], dict[str, Any]],
    draw: Draw,
    after_group: Callable[[], None] = lambda: None,
    began: tuple[float, float] | None = None,
) -> list[str]:
    """Trains all groups to their last step, and returns the names of members that have diverged.

    Args:
      directory: of the sweep; members train below `members/`.
      groups: as `members.groups` made them.
      describe: what `run.json` of a member gets of this start (`provenance.describe`).
      draw: as `in_training.Run` has it.
      after_group: called on the main process after each group, however it ended.
      began: as `Startup` takes it, for the first group.

    Raises:
      UserError: configs, data or a directory that cannot be used.
      RunError: another process is at work in it.
      Preempted: told to end by a signal, and saved.
    """
    members = [member for group in groups for member in group]
    for member in members:
        in_training.check_config(member.config)
        if distributed.is_main():
            trackers.find(member.config.trackers)
        if member.config.branch_from:
            raise UserError(
                "config.branch_from belongs to uwm_jax.train: a sweep starts its members, or continues them."
            )
    for group in groups:  # what does not fit the devices is refused before the first group trains
        mesh_lib.make_mesh(group[0].config, members=len(group))
    command = describe(members[0])["command"]
    if (directory / "config.json").exists():
        raise UserError(f"--workdir: {str(directory)!r} is the directory of a run: a sweep needs one of its own.")
    with contextlib.ExitStack() as closing:
        closing.callback(signals.restore)
        hold_all(directory, [directory, *(directory / record_lib.MEMBERS / m.name for m in members)], closing)
        record = Record(directory, members, [[member.name for member in group] for group in groups], command)
        distributed.barrier("all have read the record of the sweep")
        closing.callback(record.close)
        record.write()
        supervised = Supervised.from_environment(os.environ)
        for number, group in enumerate(groups):
            places = [
                Place(
                    member,
                    directory / record_lib.MEMBERS / member.name,
                    record.has_diverged(member.name),
                    record.saved(member.name),
                )
                for member in group
            ]
            try:
                end_if_told(number, len(groups))
                with contextlib.ExitStack() as closing_group:
                    if run_group(places, record, describe, draw, None if number else began, supervised, closing_group):
                        supervised = None  # which tells of the starts before this one
            except BaseException:
                for place in places:
                    if record.members[place.name]["status"] == record_lib.TRAINING:
                        record.set(place.name, record_lib.STOPPED)
                raise
            finally:
                record.write()
                if distributed.is_main():
                    after_group()
    return [member.name for member in members if record.has_diverged(member.name)]


def end_if_told(done: int, count: int) -> None:
    """Raises Preempted, on all processes, where a signal came that no turn of a group has seen."""
    number = max(distributed.gather(signals.received() or 0))
    if number:
        told = f"told to end ({signals.NAMES[number]}): {done} of {count} programs are done"
        raise Preempted(f"{told}; the same command continues from there.", 128 + number)


def hold_all(directory: files.Place, folders: Sequence[files.Place], closing: contextlib.ExitStack) -> None:
    """Locks a sweep's folders until `closing`, so that no other run writes there.

    Raises RunError where another process is at work in one of them.
    """
    holder = None
    if distributed.is_main():
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            if (found := lock.hold(folder)) is not None:
                holder = f"{folder} ({found})"
                break
            closing.callback(lock.release, folder)
    if (holder := distributed.agree(holder)) is not None:
        raise RunError(
            f"--workdir={directory}: another run is at work in {holder}. Wait for its end, end it with SIGTERM, or use "
            "another --workdir."
        )


def run_group(
    places: Sequence[Place],
    record: Record,
    describe: Callable[[Member], dict[str, Any]],
    draw: Draw,
    began: tuple[float, float] | None,
    supervised: Supervised | None,
    closing: contextlib.ExitStack,
) -> bool:
    """Trains members that differ in scalars alone, from where all of them stand to the last step.

    Returns whether there was a step to train.
    """
    first, live = places[0], [place for place in places if not place.diverged]
    config = first.config
    startup, goodput = Startup(began), Goodput(config.total_steps, config.batch_size)
    use_compilation_cache(config)
    distributed.require_same("config", [config_lib.flatten(place.config) for place in places])
    if not live:
        say(f"all {len(places)} members of this program have diverged before")
        return False

    # --- Mesh, and the step that all members hold. --------------------------------------------------
    mesh = mesh_lib.make_mesh(config, members=len(places))
    for place in places:
        place.checkpoints = Checkpoints(place.workdir, Retention.of(place.config), deletes=False)
        closing.callback(place.checkpoints.close)
    start_step = find_common_step(places)
    if start_step >= config.total_steps:
        say(f"nothing to do: {', '.join(p.name for p in live)} have made all {config.total_steps} steps")
        for place in live:
            record.set(place.name, record_lib.DONE, step=start_step, **last_losses(place.workdir, start_step))
        return False
    opened = record.open([place.name for place in live])
    supervised = supervised and supervised.after(opened)
    stored, origin = live[0].stored, None
    if not stored and config.init_from:
        origin = finetune.open_origin(config.init_from, config.init_from_parameters)
        for place in places:
            named = config_lib.with_origins(place.config, init_from=origin.place)
            place.member = dataclasses.replace(place.member, config=named)
        config = first.config

    # --- Data and codec, once for all. ---------------------------------------------------------------
    startup.reached("data")
    data = open_data(config, stored, origin, closing)
    loader = make_loader(config, data, mesh, stored)
    startup.reached("model")
    codec_place = find_codec(config, data, stored, origin)
    codec, frozen = codec_store.open_codec(config, codec_place)
    cached_latents.check(config, data, codec, frozen)
    if stored:
        past = lineage.kept(stored.assets)
    else:
        past = lineage.begin(data, origin.learned_from if origin else None, bool(origin))
        past |= latents.look(config, codec, frozen, data, origin)
    frozen = mesh_lib.place(frozen, mesh_lib.replicated(mesh))

    # --- One program, and the state of every member in it. -------------------------------------------
    program = build(config, data.training_spec, codec, mesh)
    print_summary(program, data, codec_store.describe(codec, frozen))
    startup.reached("state")
    sweep = SweepProgram(program, len(places))
    state = gather_states(places, sweep, origin, start_step)
    say(f"continuing from step {start_step}" if stored else "starting at step 0")

    # --- Workdirs. -----------------------------------------------------------------------------------
    if distributed.is_main():
        most = Retention.of(config).at_most(config.total_steps)
        workdir_lib.warn_of_room(live[0].workdir, program.like, most, members=len(live))
    for place in places:
        if distributed.is_main():
            workdir_lib.write_config(place.workdir, place.config)
            if not place.diverged:
                provenance.add_start(place.workdir, describe(place.member))
        workdir_lib.require_shared(place.workdir, place.config)
        if not stored:
            codec_store.keep(config, codec_place, place.workdir, None if place is first else first.workdir)

    # --- Programs. -----------------------------------------------------------------------------------
    startup.reached("compile")
    say(f"compiling the step of {len(places)} members...")
    with goodput.spend("compile"):
        train_step = sweep.compile_step(frozen)
        Checkpoints.warm_up(sweep.take(state, 0), codec_store.checkpointed(codec, frozen))  # SIGTERM leaves little time
        evaluations = InTraining(program, data, frozen, command=describe(first.member)["command"], draw=draw)
        Retention.of(config).check(evaluations.metrics)

    # --- Loop. ---------------------------------------------------------------------------------------
    batches = prefetch_to_device(iter(loader), mesh_lib.batch_sharding(mesh), config.data.prefetch, data.waits_for)
    closing.callback(batches.close)
    main = distributed.is_main()
    logs = [open_log(place, start_step, writes=main and not place.diverged) for place in places]
    for log in logs:
        closing.callback(log.close)
    for log in logs:
        closing.callback(log.end_trackers)  # all at once, before the first `close` waits
    progress = stored.assets.get("progress", {}) if stored else {}
    goodput.begin(
        start_step,
        progress.get("goodput"),
        next(log.cut for place, log in zip(places, logs, strict=True) if not place.diverged),
        supervised,
    )
    trace = Profile.parse(None, first.workdir, start_step, config.total_steps)
    watch = Watch.begin(config, goodput, startup, trace, data.faults, closing)
    mfu = Mfu(program.system, list(mesh.devices.flat), len(live))
    if mfu.note:
        say(mfu.note)

    def records_of(place: Place, log: MetricsLog) -> RunRecords:
        records = RunRecords(
            place.workdir,
            config.total_steps,
            _checkpoints(place),
            log,
            evaluations.for_config(place.config),
            frozen,
            codec_arrays=codec_store.checkpointed(codec, frozen),
            position=loader.state,
            assets=checkpoint_lib.make_assets(
                place.config, data.spec, dataset=data.manifest(), used=data.used(), **past
            ),
            mfu=mfu,
            watch=watch,
        )
        if place.stored and not place.diverged and "progress" in place.stored.assets:
            records.accumulator.restore(place.stored.assets["progress"]["metrics"])
        return records

    for place in live:
        record.set(place.name, record_lib.TRAINING, step=start_step)
    record.write()
    records = SweepRecords(
        [place.name for place in places],
        [records_of(place, log) for place, log in zip(places, logs, strict=True)],
        [not place.diverged for place in places],
        sweep,
        record,
    )
    loop(config, train_step, state, frozen, batches, records, start_step, watch)
    left = [place for place in live if not record.has_diverged(place.name)]
    for place in left:
        record.set(place.name, record_lib.DONE)
    say(f"done: {config.total_steps} steps of {len(left)} members" if left else "no member of this program is left")
    return True


def open_log(place: Place, step: int, writes: bool) -> MetricsLog:
    """The log of a member, whose trackers show all members of a sweep as one group."""
    group = place.workdir.parents[1].name
    return MetricsLog(
        place.workdir, step, trackers.start(place.config, place.workdir, step, writes, group), writes=writes
    )


def find_common_step(places: Sequence[Place]) -> int:
    """The newest step of which every live member has an intact checkpoint, 0 for none; sets `stored` of live members.

    Later checkpoints, of which some members have none, are moved to `set_aside/` in their workdirs. Where every member
    has made all steps, one perhaps more of them by itself, nothing is moved.

    Raises:
      UserError: a member's config differs from the one that it was started with; or the members have saved before, and
        have no checkpoint of the same step now.
    """
    live = [place for place in places if not place.diverged]
    for place in live:
        if newest := max(distributed.agree(_checkpoints(place).steps()), default=0):
            before = fixed_fields.started_with(place.workdir, newest)
            config_lib.refuse_changed(place.config, before)
            branching.refuse_longer(place.workdir, place.config, before, newest)
            place.member = dataclasses.replace(
                place.member, config=config_lib.with_origins(place.config, init_from=before.init_from)
            )
    while True:
        held = distributed.agree({place.name: _checkpoints(place).steps() for place in live})
        if all(steps and steps[-1] >= live[0].config.total_steps for steps in held.values()):
            return min(steps[-1] for steps in held.values())
        step = max(set.intersection(*map(set, held.values())), default=0)
        found = {step for steps in held.values() for step in steps}
        # Only the first save may have been cut off before all members had it, so that all start anew.
        has_begun = any(place.saved for place in live) or len(found) > 1 or found and all(held.values())
        if not step and has_begun:
            listed = "; ".join(f"{name}: {steps}" for name, steps in held.items())
            raise UserError(
                "the members of the sweep have no checkpoint of the same step, from which all could continue "
                f"({listed}). Nothing was changed. Restore one that all had (set_aside/ and corrupt/ in their workdirs "
                "hold what was moved), or use a new --workdir."
            )
        for place in live:
            if later := _checkpoints(place).set_aside(step):
                say(f"{place.name}: step {later} is set aside, which not all members hold; all continue from {step}")
        if not step or _all_readable(live, step):
            return step


def _all_readable(live: Sequence[Place], step: int) -> bool:
    """Opens the checkpoints of a step; False where one is damaged, which is passed over."""
    for place in live:
        place.stored = None
    for place in live:
        stored = _checkpoints(place).newest_readable()
        if stored is None or stored.step != step:
            return False
        place.stored = stored
    return True


def last_losses(workdir: files.Place, step: int) -> dict[str, Any]:
    """`last_losses` of `sweep.json`, of the line of a step; {} where `metrics.jsonl` has none."""
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["step"] == step and "loss" in line]
    return {"last_losses": losses_of(lines[-1])} if lines else {}


def gather_states(places: Sequence[Place], sweep: SweepProgram, origin: Any, start_step: int) -> SweepState:
    """The state of all members, restored or fresh; that of a member which has diverged is zero, and stays so.

    Raises:
      UserError: a checkpoint's arrays are damaged; it is passed over, so that the next start continues from another.
    """
    program, state, whole = sweep.program, sweep.empty(), mesh_lib.replicated(sweep.mesh)
    init: Callable[..., TrainState] | None = None
    for i, place in enumerate(places):
        if place.diverged:
            one = sweep.take(state, i)
        elif place.stored:
            try:
                one = _checkpoints(place).restore_state(place.stored.step, program.shapes)[0]
            except CorruptCheckpoint as e:
                _checkpoints(place).pass_over(place.stored.step, e)
                raise UserError(f"{place.name}: {e}. The same command continues from an earlier step.") from e
            one = program.system.held(one)
        else:
            init = init or program.compile_init()
            one = program.system.held(with_first_parameters(program, init(place.config.seed), origin))
        one = one.replace(
            step=mesh_lib.place(jax.numpy.int32(start_step), whole),
            hparams=mesh_lib.place(Hparams.from_config(place.config), whole),
        )
        state = sweep.put(state, i, one, not place.diverged)
    return state


def _checkpoints(place: Place) -> Checkpoints:
    assert place.checkpoints is not None
    return place.checkpoints
