"""Trains the system that a config describes; continues where the last checkpoint of the workdir stopped.

    python -m uwm_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

A run that continues needs no `--config`: its workdir has one. Fields change with `--config.any.field=value`.
This file is one run from top to bottom: config, mesh, data, model, shapes, state, step, loop. Every process of a
run executes all of it; docs/training.md says how to start several.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from uwm_jax import cli, config_help
from uwm_jax import config as config_lib
from uwm_jax.data.loader import prefetch_to_device
from uwm_jax.evaluation import in_training
from uwm_jax.evaluation.in_training import InTraining
from uwm_jax.files import AnyPath, Place, place
from uwm_jax.hub.runs import spelled
from uwm_jax.parallel import distributed, signals
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.distributed import say
from uwm_jax.reporting import pictures
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
from uwm_jax.training import state as state_lib
from uwm_jax.training import workdir as workdir_lib
from uwm_jax.training.build import build
from uwm_jax.training.checkpoints import checkpoint as checkpoint_lib
from uwm_jax.training.checkpoints.retention import Retention
from uwm_jax.training.flops import Mfu
from uwm_jax.training.goodput import Goodput
from uwm_jax.training.profile import Profile
from uwm_jax.training.startup import Startup
from uwm_jax.training.supervised import Supervised
from uwm_jax.training.telemetry import trackers
from uwm_jax.training.telemetry.log import MetricsLog

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument]; by default the workdir's own, where a run is there")
    flags.DEFINE_string("workdir", None, "directory of the run: checkpoints, metrics, config")
    flags.DEFINE_string("profile", None, "START:STEPS writes a trace of these steps to <workdir>/profile")
    distributed.define_flags()
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    workdir = cli.required_path("workdir")
    if FLAGS.config or not (workdir / "config.json").is_file():
        config = config_lib.load(cli.required("config"), call.overrides)
        start = provenance.describe(call.line, FLAGS.config, config, call.changed)
    else:
        config = config_lib.read(workdir, call.overrides)
        start = provenance.describe_again(call.line, workdir, config, call.changed)
    with distributed.session():
        train(config, workdir, FLAGS.profile, start, call.began)


def train(
    config: ConfigDict,
    workdir: AnyPath,
    profile: str | None = None,
    start: dict[str, Any] | None = None,
    began: tuple[float, float] | None = None,
) -> None:
    """Runs `config` in `workdir` up to `config.total_steps`.

    Args:
      profile: as the flag.
      start: what `run.json` gets of this start, of `provenance.describe`; None: what is known of a call from Python.
      began: as `Startup` takes it.

    Raises:
      UserError: a config, data or a workdir that cannot be used.
      Preempted: told to end by a signal, and saved.
    """
    config_lib.validate(config)
    where = place(workdir, "workdir")
    start = start or provenance.describe_use(["python", *sys.orig_argv[1:]], config, ())
    with contextlib.ExitStack() as closing:  # what is open is closed in reverse, all of it, whatever happens
        run(config, where, profile, start, began, closing)


def run(
    config: ConfigDict,
    workdir: Place,
    profile: str | None,
    start: dict[str, Any],
    began: tuple[float, float] | None,
    closing: contextlib.ExitStack,
) -> None:
    startup, goodput = Startup(began), Goodput(config.total_steps, config.batch_size)
    closing.callback(signals.restore)
    use_compilation_cache(config)

    # --- Config: the same in all processes, and as an earlier start of this run fixed it. ----------
    distributed.require_same("config", config_lib.flatten(config))
    in_training.check_config(config)
    if distributed.is_main():
        trackers.find(config.trackers)
    config_lib.refuse_sweep(workdir)
    last_step = distributed.agree(checkpoint_lib.latest_step(workdir))
    first_start = last_step is None
    if last_step is not None:
        before = fixed_fields.started_with(workdir, last_step)
        config_lib.refuse_changed(config, before)
        branching.refuse_longer(workdir, config, before, last_step)
        config = config_lib.with_origins(config, init_from=before.init_from, branch_from=before.branch_from)
        if last_step >= config.total_steps:
            say(f"nothing to do: {workdir} is at step {last_step} of {config.total_steps} already")
            return

    # --- Mesh: rows of a batch and parameters over devices. ----------------------------------------
    mesh = mesh_lib.make_mesh(config)
    batch_sharding, replicated = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)

    # --- Where from: the newest checkpoint that is whole; else all of another run's, or its parameters. -
    checkpoints: Any = None
    stored, origin = None, None
    if not first_start:
        checkpoints = checkpoint_lib.Checkpoints(workdir, Retention.of(config))
        closing.callback(checkpoints.close)
        stored = checkpoints.newest_readable()
        config_lib.refuse_changed(config, fixed_fields.stored_config(stored))
    elif config.branch_from:
        stored = branching.open_trunk(config)
        before = fixed_fields.stored_config(stored)
        trunk = f"{spelled(stored.workdir)}@{stored.step}"
        config = config_lib.with_origins(config, init_from=before.init_from, branch_from=trunk)
    elif config.init_from:
        origin = finetune.open_origin(config.init_from, config.init_from_parameters)
        config = config_lib.with_origins(config, init_from=origin.place)

    # --- Data: the order of samples is a function of the position, so a step number restores it. ---
    startup.reached("data")
    data = open_data(config, stored, origin, closing)
    loader = make_loader(config, data, mesh, stored)
    trace = Profile.parse(profile, workdir, stored.step if stored else 0, config.total_steps)

    # --- Model. The codec is frozen: it is kept once in the workdir or inside the checkpoints. -----
    startup.reached("model")
    codec_place = find_codec(config, data, stored, origin)
    codec, frozen = codec_store.open_codec(config, codec_place)
    cached_latents.check(config, data, codec, frozen)
    if stored:
        past = lineage.kept(stored.assets, branch=config.branch_from if first_start else "")
    else:
        past = lineage.begin(data, origin.learned_from if origin else None, bool(origin))
        past |= latents.look(config, codec, frozen, data, origin)
    frozen = mesh_lib.place(frozen, replicated)

    # --- Shapes first: nothing is made before it is known where it lives. --------------------------
    program = build(config, data.training_spec, codec, mesh)
    system = program.system
    print_summary(program, data, codec_store.describe(codec, frozen))

    # --- State: the checkpoint's, or fresh. --------------------------------------------------------
    startup.reached("state")
    if stored and first_start:
        state = branching.restore(stored, program.shapes)
        rate = state_lib.change_of_rate(config, before, stored.step)
        say(f"branching from step {stored.step} of {stored.workdir}{rate}")
    elif stored:
        newest = stored.step
        state, stored = checkpoints.restore_latest(program.shapes)
        if stored.step != newest:  # whose arrays are damaged
            loader = make_loader(config, data, mesh, stored)
        say(f"continuing from step {stored.step}{state_lib.change_of_rate(config, before, stored.step)}")
    else:
        init = program.compile_init()
        distributed.barrier("all have compiled the state", distributed.LATE_SECONDS)
        state = with_first_parameters(program, init(), origin)
        if origin:
            skipped = origin.skipped(program.shapes.params, config)
            say(origin.describe_skipped(program.shapes.params, skipped, config.optimizer.freeze))
    state = system.held(state)

    # --- Workdir: locked first; nothing is written before all of the above is known to be good. ----
    if first_start:
        checkpoints = checkpoint_lib.Checkpoints(workdir, Retention.of(config), first_start=True)
        closing.callback(checkpoints.close)
    if distributed.is_main():
        workdir_lib.warn_of_room(workdir, program.like, Retention.of(config).at_most(config.total_steps))
        workdir_lib.write_config(workdir, config)
        provenance.add_start(workdir, start)
    workdir_lib.require_shared(workdir, config)
    if first_start:
        codec_store.keep(config, codec_place, workdir)

    # --- Programs, compiled before the loop; the state's buffers are reused in place. --------------
    startup.reached("compile")
    say("compiling the step...")
    with goodput.spend("compile"):
        train_step = program.compile_step(frozen)
        if first_start:
            checkpoints.warm_up(state, codec_store.checkpointed(codec, frozen))  # SIGTERM leaves little time
        evaluations = InTraining(program, data, frozen, command=start["command"], draw=pictures.draw)
        Retention.of(config).check(evaluations.metrics)

    # --- Loop (`runs.loop`), and what it writes (`runs.records`). ----------------------------------
    start_step = stored.step if stored else 0
    assets = checkpoint_lib.make_assets(config, data.spec, dataset=data.manifest(), used=data.used(), **past)
    mfu = Mfu(system, list(mesh.devices.flat))
    main = distributed.is_main()
    log = MetricsLog(workdir, start_step, trackers.start(config, workdir, start_step, writes=main), writes=main)
    batches = prefetch_to_device(iter(loader), batch_sharding, config.data.prefetch, data.waits_for)
    progress = stored.assets.get("progress", {}) if stored else {}
    goodput.begin(start_step, progress.get("goodput"), log.cut, Supervised.from_environment(os.environ))
    if mfu.note:
        say(mfu.note)

    for resource in (batches, log):
        closing.callback(resource.close)
    watch = Watch.begin(config, goodput, startup, trace, data.faults, closing)
    records = RunRecords(
        workdir,
        config.total_steps,
        checkpoints,
        log,
        evaluations,
        frozen,
        codec_arrays=codec_store.checkpointed(codec, frozen),
        position=loader.state,
        assets=assets,
        mfu=mfu,
        watch=watch,
    )
    if progress:
        records.accumulator.restore(progress["metrics"])
    loop(config, train_step, state, frozen, batches, records, start_step, watch)
    say(f"done: {config.total_steps} steps in {workdir}")


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
