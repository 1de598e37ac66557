"""Trains a Unified World Model; continues by itself where the workdir's last checkpoint stopped.

    python -m uwm_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

This file is one run from top to bottom: config, mesh, data, model, shapes, state, step, loop.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from uwm_jax import cli
from uwm_jax import config as config_lib
from uwm_jax.data.fitted import read_pca
from uwm_jax.data.loader import Loader, prefetch_to_device
from uwm_jax.errors import UserError
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.system import DataFacts, System
from uwm_jax.training import checkpoint as checkpoint_lib
from uwm_jax.training import frozen as frozen_lib
from uwm_jax.training import state as state_lib
from uwm_jax.training.log import Clock, MetricsLog, Window, progress_line
from uwm_jax.training.step import make_eval_step, make_train_step

FLAGS = flags.FLAGS

# What a continued run may change; every other field decides what the numbers mean.
MAY_CHANGE = (
    *("total_steps", "log_every", "eval.", "checkpoint.", "mesh.", "data.num_threads", "data.prefetch"),
    *("model.scan_blocks", "model.remat", "model.codec.microbatch"),  # compilation: the results are the same
)


def define_flags() -> None:
    flags.DEFINE_string("config", None, "FILE.py[:argument]; fields change with --config.any.field=value")
    flags.DEFINE_string("workdir", None, "directory of the run: checkpoints, metrics, config")
    cli.accept_config_overrides()


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(f"unexpected argument {argv[0]!r}: flags are written --flag=value.")
    config = config_lib.load(cli.required("config"), cli.config_overrides())
    train(config, Path(cli.required("workdir")))


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs `config` in `workdir` up to `config.total_steps`."""
    # --- Config: what an earlier start of this run fixed must still hold. ------------------------
    last_step = checkpoint_lib.latest_step(workdir)
    if last_step is not None:
        refuse_changed_config(config, config_lib.read(workdir))
        if last_step >= config.total_steps:
            print(f"nothing to do: {workdir} is at step {last_step} of {config.total_steps} already")
            return

    # --- Mesh: rows of a batch over devices. -------------------------------------------------------
    mesh = mesh_lib.make_mesh(config)
    batch_sharding, replicated = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)

    # --- Data: the order of samples is a function of the position, so a step number restores it. ---
    start_step = last_step or 0
    loader = Loader(config.data, batch_size=config.batch_size, seed=config.seed, start_step=start_step)
    facts = DataFacts(**loader.facts())

    # --- Workdir: nothing is written before config, mesh and data are known to be good. ------------
    checkpoint_lib.write_config(workdir, config)
    checkpoints = checkpoint_lib.Checkpoints(workdir, keep=config.checkpoint.keep)

    # --- Model. The codec is frozen: it is kept once in the workdir or inside the checkpoints. -----
    codec, frozen = open_codec(config, checkpoints, last_step, loader, workdir, mesh.size)
    frozen = jax.device_put(frozen, replicated)
    system = System(config, facts, codec)
    optimizer = state_lib.make_optimizer(config)

    # --- Shapes first: nothing is made before it is known where it lives. --------------------------
    def init_state(rng: jax.Array) -> state_lib.TrainState:
        return state_lib.create(config, system.init(rng), optimizer)

    rng = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)  # no step has this number
    shapes = jax.eval_shape(init_state, rng)
    shardings = mesh_lib.state_sharding(mesh, shapes)
    print_summary(config, loader, shapes.params, frozen, mesh)

    # --- State: fresh, or the last checkpoint's. ---------------------------------------------------
    if last_step is None:
        state = jax.jit(init_state, out_shardings=shardings)(rng)
        state = load_pretrained_encoder(config, state, shardings)
    else:
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        state, data_iter = checkpoints.restore_state(last_step, like)
        loader.check_state(data_iter)
        print(f"continuing from step {last_step}", flush=True)

    # --- Steps, compiled; the state's buffers are reused in place. ---------------------------------
    train_step = jax.jit(
        make_train_step(config, system, optimizer),
        in_shardings=(shardings, replicated, batch_sharding),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    eval_step = jax.jit(make_eval_step(config, system))
    held_out = held_out_batches(config, loader, batch_sharding)

    # --- Loop. The order is fixed: a checkpoint holds the state after `step` steps and the data -----
    # position before the next batch is drawn, so that both continue together.
    assets = checkpoint_lib.make_assets(config, facts, dataset=loader.manifest())
    log = MetricsLog(workdir, start_step)
    clock = Clock(start_step, config.total_steps, config.batch_size)
    window = Window()
    batches = prefetch_to_device(iter(loader), batch_sharding, config.data.prefetch)
    try:
        for step in range(start_step + 1, config.total_steps + 1):
            batch = next(batches)
            state, metrics = train_step(state, frozen, batch)
            window.add(step, metrics)

            last = step == config.total_steps
            save = step % config.checkpoint.every == 0 or last
            evaluate = config.eval.every > 0 and (step % config.eval.every == 0 or last)
            if not (step % config.log_every == 0 or step == 1 or save or evaluate):
                continue
            means = window.means()  # raises on NaN, so that none is ever saved
            rates = clock.tick(step, batches.wait_seconds)
            print(progress_line(step, config.total_steps, {**means, **rates}), flush=True)
            del rates["eta_seconds"]

            paused = time.perf_counter()
            losses = mean_over_batches(eval_step, state, frozen, held_out) if evaluate else {}
            if evaluate:
                print("  held out: " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items()), flush=True)
            log.write(step, {**means, **rates, **losses})
            if save:
                arrays = frozen_lib.checkpointed_arrays(config, frozen)
                checkpoints.save(state, loader.state(step), arrays, assets)
            clock.pause(time.perf_counter() - paused)
        checkpoints.wait()
    finally:
        log.close()
        batches.close()
        loader.close()
        checkpoints.close()
    print(f"done: {config.total_steps} steps in {workdir}", flush=True)


def refuse_changed_config(config: ConfigDict, stored: ConfigDict) -> None:
    """Raises UserError for a field that differs from the run's stored config and must not."""
    now, before = config_lib.flatten(config), config_lib.flatten(stored)
    for name in now:
        if now[name] != before[name] and not name.startswith(MAY_CHANGE):
            raise UserError(
                f"config.{name} is {now[name]!r}, but this workdir was started with {before[name]!r}. Only "
                f"{', '.join(f.rstrip('.') for f in MAY_CHANGE)} may change when a run continues: use a new --workdir."
            )


def open_codec(
    config: ConfigDict,
    checkpoints: checkpoint_lib.Checkpoints,
    last_step: int | None,
    loader: Loader,
    workdir: Path,
    devices: int,
) -> tuple[Any, Any]:
    """The codec of a run that starts, or the one that its checkpoints carry."""
    if last_step is None:
        is_pca = config.model.codec.name == "pca"
        data = config.data
        fitted = read_pca(loader.directory, loader.camera_keys, data.crop, data.val_ratio) if is_pca else None
        return frozen_lib.for_new_run(config, workdir, fitted, devices)
    carried = "codec" in checkpoints.items(last_step)
    arrays = checkpoints.restore_arrays(last_step, "codec") if carried else None
    return frozen_lib.from_workdir(config, workdir, arrays, devices)


def load_pretrained_encoder(
    config: ConfigDict, state: state_lib.TrainState, shardings: state_lib.TrainState
) -> state_lib.TrainState:
    """Puts ImageNet weights into the image encoder of a fresh state, where the config asks for them."""
    source = config.model.encoder.imagenet_weights
    if not source:
        return state
    from uwm_jax.torch_bridge.torchvision_resnet import load_imagenet_resnet

    params = dict(state.params)
    params["obs_encoder"] = dict(params["obs_encoder"])
    params["obs_encoder"]["img_encoder"] = load_imagenet_resnet(source, params["obs_encoder"]["img_encoder"])
    params = jax.device_put(params, shardings.params)
    ema = jax.tree.map(lambda x: x.copy(), params) if state.ema_params is not None else None
    return state.replace(params=params, ema_params=ema)


def held_out_batches(config: ConfigDict, loader: Loader, sharding: Any) -> list[Any]:
    """Fixed batches of validation windows on the device; empty when nothing is evaluated."""
    if not config.eval.every:
        return []
    batches = loader.held_out(config.eval.num_windows).batches(config.batch_size)
    return [jax.device_put(batch, sharding) for batch in batches]


def mean_over_batches(eval_step: Any, state: Any, frozen: Any, batches: list[Any]) -> dict[str, float]:
    """Mean of held-out losses over batches (of one size: the last is filled up with the first windows)."""
    results = [jax.device_get(eval_step(state, frozen, batch)) for batch in batches]
    return {name: float(sum(r[name] for r in results) / len(results)) for name in results[0]}


def print_summary(config: ConfigDict, loader: Loader, params: Any, frozen: Any, mesh: Any) -> None:
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    sizes = ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in count.items())
    codec = sum(x.size for x in jax.tree.leaves(frozen)) / 1e6
    print(
        f"{loader.summary()}\nparameters: {sizes}; frozen codec {config.model.codec.name} {codec:.2f} M\n"
        f"devices: {mesh.size} {jax.default_backend()}; batch {config.batch_size}, {config.total_steps} steps\n"
        "compiling the first step...",
        flush=True,
    )


if __name__ == "__main__":
    cli.run(main, define_flags)
