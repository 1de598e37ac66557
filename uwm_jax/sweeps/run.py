"""Trains the members of a sweep: groups that share a program one after another, a group from top to bottom.

What a group opens, builds and restores is what `uwm_jax.train` does for one run; here each member has a workdir, and
all of them start from the newest step that every one of them holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.data.loader import prefetch_to_device
from uwm_jax.errors import RunError, UserError
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
from uwm_jax.sweeps.records import AllDiverged, SweepRecords
from uwm_jax.training import checkpoint as checkpoint_lib
from uwm_jax.training import (
    codec_store,
    finetune,
    fixed_fields,
    latents,
    lineage,
    lock,
    provenance,
)
from uwm_jax.training import workdir as workdir_lib
from uwm_jax.training.build import build
from uwm_jax.training.checkpoint import Checkpoints
from uwm_jax.training.checkpoint_reader import CheckpointReader, CorruptCheckpoint
from uwm_jax.training.flops import Mfu
from uwm_jax.training.goodput import Goodput
from uwm_jax.training.log import MetricsLog
from uwm_jax.training.profile import Profile
from uwm_jax.training.retention import Retention
from uwm_jax.training.startup import Startup
from uwm_jax.training.state import Hparams, TrainState


@dataclasses.dataclass
class Place:
    """A member where it trains.

    Attributes:
      member: the member, whose config may name its origin with a step.
      workdir: `members/<name>`.
      diverged: before this start.
      checkpoints: of its workdir.
      stored: the checkpoint that it continues from; None where it starts, or has diverged before its first one.
    """

    member: Member
    workdir: Path
    diverged: bool
    checkpoints: Checkpoints | None = None
    stored: CheckpointReader | None = None

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def config(self) -> ConfigDict:
        return self.member.config


def run_sweep(
    directory: Path,
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
        if member.config.branch_from:
            raise UserError(
                "config.branch_from belongs to uwm_jax.train: a sweep starts its members, or continues them."
            )
    command = describe(members[0])["command"]
    record = Record(directory, members, [[member.name for member in group] for group in groups], command)
    with contextlib.ExitStack() as closing:
        hold_all(directory, [directory, *(directory / record_lib.MEMBERS / m.name for m in members)], closing)
        record.write()
        for number, group in enumerate(groups):
            places = [
                Place(member, directory / record_lib.MEMBERS / member.name, record.has_diverged(member.name))
                for member in group
            ]
            try:
                with contextlib.ExitStack() as closing_group:
                    run_group(places, record, describe, draw, None if number else began, closing_group)
            except AllDiverged as e:
                say(str(e))
            except BaseException:
                for place in places:
                    if record.members[place.name]["status"] == record_lib.TRAINING:
                        record.set(place.name, record_lib.STOPPED)
                record.write()
                raise
            finally:
                if distributed.is_main():
                    after_group()
    return [member.name for member in members if record.has_diverged(member.name)]


def hold_all(directory: Path, folders: Sequence[Path], closing: contextlib.ExitStack) -> None:
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
    closing: contextlib.ExitStack,
) -> None:
    """Trains members that differ in scalars alone, from where all of them stand to the last step."""
    first, live = places[0], [place for place in places if not place.diverged]
    config = first.config
    startup, goodput = Startup(began), Goodput(config.total_steps, config.batch_size)
    closing.callback(signals.restore)
    use_compilation_cache(config)
    distributed.require_same("config", [config_lib.flatten(place.config) for place in places])
    if not live:
        return

    # --- Mesh, and the step that all members hold. --------------------------------------------------
    mesh = mesh_lib.make_mesh(config, members=len(places))
    for place in places:
        place.checkpoints = Checkpoints(place.workdir, Retention.of(place.config), deletes=False)
        closing.callback(place.checkpoints.close)
    start_step = find_common_step(places)
    if start_step >= config.total_steps:
        say(f"nothing to do: {', '.join(p.name for p in live)} are at step {start_step} already")
        for place in live:
            record.set(place.name, record_lib.DONE, step=start_step)
        record.write()
        return
    stored, origin = live[0].stored, None
    if not stored and config.init_from:
        origin = finetune.open_origin(config.init_from, config.init_from_parameters)
        for place in places:
            named = config_lib.with_origins(place.config, init_from=f"{origin.directory}@{origin.step}")
            place.member = dataclasses.replace(place.member, config=named)
        config = first.config

    # --- Data and codec, once for all. ---------------------------------------------------------------
    startup.reached("data")
    data = open_data(config, stored, origin, closing)
    loader = make_loader(config, data, mesh, stored)
    startup.reached("model")
    codec_place = find_codec(config, data, stored, origin)
    codec, frozen = codec_store.open_codec(config, codec_place)
    if stored:
        past = lineage.kept(stored.assets)
    else:
        past = lineage.begin(data, origin.learned_from if origin else None, bool(origin))
        past |= latents.look(config, codec, frozen, data, origin)
    frozen = mesh_lib.place(frozen, mesh_lib.replicated(mesh))

    # --- One program, and the state of every member in it. -------------------------------------------
    program = build(config, data.spec, codec, mesh)
    print_summary(program, data, codec_store.describe(codec, frozen))
    startup.reached("state")
    sweep = SweepProgram(program, len(places))
    state = gather_states(places, sweep, origin, start_step)
    say(f"continuing from step {start_step}" if stored else "starting at step 0")

    # --- Workdirs. -----------------------------------------------------------------------------------
    for place in places:
        if distributed.is_main():
            workdir_lib.write_config(place.workdir, place.config)
            if not place.diverged:
                provenance.add_start(place.workdir, describe(place.member))
        workdir_lib.require_shared(place.workdir, place.config)
        if not stored:
            codec_store.keep(config, codec_place, place.workdir)

    # --- Programs. -----------------------------------------------------------------------------------
    startup.reached("compile")
    say(f"compiling the step of {len(places)} members...")
    with goodput.spend("compile"):
        train_step = sweep.compile_step(frozen)
        evaluations = InTraining(program, data, frozen, command=describe(first.member)["command"], draw=draw)
        Retention.of(config).check(evaluations.metrics)

    # --- Loop. ---------------------------------------------------------------------------------------
    batches = prefetch_to_device(iter(loader), mesh_lib.batch_sharding(mesh), config.data.prefetch, data.waits_for)
    closing.callback(batches.close)
    logs = [MetricsLog(place.workdir, start_step, writes=distributed.is_main()) for place in live]
    for log in logs:
        closing.callback(log.close)
    progress = stored.assets.get("progress", {}) if stored else {}
    goodput.begin(start_step, progress.get("goodput"), logs[0].cut)
    trace = Profile.parse(None, first.workdir, start_step, config.total_steps)
    watch = Watch.begin(config, goodput, startup, trace, closing)
    mfu = Mfu(program.system, list(mesh.devices.flat))
    of_live = iter(logs)

    def records_of(place: Place) -> RunRecords:
        assert place.checkpoints is not None
        log = MetricsLog(place.workdir, start_step, writes=False) if place.diverged else next(of_live)
        records = RunRecords(
            place.workdir,
            config.total_steps,
            place.checkpoints,
            log,
            evaluations.for_config(place.config),
            frozen,
            codec_arrays=codec_store.checkpointed(codec, frozen),
            position=loader.state,
            assets=checkpoint_lib.make_assets(place.config, data.spec, dataset=data.manifest(), **past),
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
        [records_of(place) for place in places],
        [not place.diverged for place in places],
        sweep,
        record,
        goodput,
        config.total_steps,
    )
    loop(config, train_step, state, frozen, batches, records, start_step, watch)
    say(f"done: {config.total_steps} steps of {len(live)} members")


def find_common_step(places: Sequence[Place]) -> int:
    """The newest step of which every live member has an intact checkpoint, 0 for none; sets `stored` of all members.

    Later checkpoints, of which some members have none, are moved to `set_aside/` in their workdirs. A member that has
    diverged gets its own newest one.

    Raises UserError where a member's config differs from the one that it was started with.
    """
    live = [place for place in places if not place.diverged]
    while True:
        common = set.intersection(*(set(_checkpoints(place).steps()) for place in live))
        step = distributed.agree(max(common, default=0))
        for place in live:
            if later := _checkpoints(place).set_aside(step):
                say(f"{place.name}: step {later} is set aside, which not all members hold; all continue from {step}")
        if not step:
            return 0
        try:
            for place in live:
                place.stored = CheckpointReader(_checkpoints(place).directory, step)
                try:
                    place.stored.verify_small()
                except CorruptCheckpoint as e:
                    _checkpoints(place).pass_over(step, e)
                    raise
                config_lib.refuse_changed(place.config, fixed_fields.stored_config(place.stored))
        except CorruptCheckpoint:
            continue
        for place in places:
            if place.diverged and (steps := _checkpoints(place).steps()):
                place.stored = CheckpointReader(_checkpoints(place).directory, steps[-1])
        return step


def gather_states(places: Sequence[Place], sweep: SweepProgram, origin: Any, start_step: int) -> SweepState:
    """The state of all members, restored or fresh. The place of a member that has diverged holds its last checkpoint,
    or a fresh state, and stays as it is."""
    program, state = sweep.program, sweep.empty()
    init: Callable[..., TrainState] | None = None
    for i, place in enumerate(places):
        if place.stored:
            one = _checkpoints(place).restore_state(place.stored.step, program.shapes)[0]
        else:
            init = init or program.compile_init()
            one = with_first_parameters(program, init(place.config.seed), origin)
            hparams = Hparams.from_config(place.config)
            one = one.replace(hparams=mesh_lib.place(hparams, mesh_lib.replicated(sweep.mesh)))
        one = one.replace(step=mesh_lib.place(jax.numpy.int32(start_step), mesh_lib.replicated(sweep.mesh)))
        state = sweep.put(state, i, program.system.held(one), not place.diverged)
    return state


def _checkpoints(place: Place) -> Checkpoints:
    assert place.checkpoints is not None
    return place.checkpoints
