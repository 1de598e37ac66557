"""What a run, and a sweep of runs, opens and prints before its first step."""

from __future__ import annotations

import contextlib

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.data.loader import Loader
from uwm_jax.data.run_data import RunData
from uwm_jax.data.spec import DataSpec
from uwm_jax.evaluation import in_training
from uwm_jax.evaluation.metrics import FEWEST
from uwm_jax.files import place
from uwm_jax.parallel import distributed
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.parallel.distributed import say
from uwm_jax.training import cached_latents, codec_store, compatibility, pretrained
from uwm_jax.training import state as state_lib
from uwm_jax.training.build import Program
from uwm_jax.training.checkpoints.reader import CheckpointReader
from uwm_jax.training.finetune import Origin
from uwm_jax.training.state import TrainState


def use_compilation_cache(config: ConfigDict) -> None:
    """Keeps compiled programs where `config.compilation_cache_dir` says; does nothing where it is empty."""
    if config.compilation_cache_dir:
        compilation_cache.reset_cache()  # else whatever compiled before this run decides where it lies
        cache = place(config.compilation_cache_dir, "config.compilation_cache_dir")
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # quick ones too


def open_data(
    config: ConfigDict, stored: CheckpointReader | None, origin: Origin | None, closing: contextlib.ExitStack
) -> RunData:
    """The data of a run, open until `closing`, under the normaliser of its checkpoint, or of its origin.

    Raises:
      UserError: data that do not fit the config, the origin or an evaluator; or other data on another process.
    """
    trained = DataSpec.from_json(stored.assets["data_spec"]) if stored else None
    normalizer = trained.normalizer if trained else None
    seed, latents = config_lib.data_seed(config), cached_latents.use_of(config)
    data = RunData(config.data, seed=seed, normalizer=normalizer, latents=latents)
    closing.callback(data.close)
    encoder = data.spec.text_encoder
    distributed.require_same("the data", data.identities() | ({"text encoder": encoder.sha256} if encoder else {}))
    if trained:
        trained.check_text_encoder(encoder, str(data.directory), "this run's checkpoint")
    if origin:
        say("\n".join(compatibility.check(origin, config, data.spec, data.ranges())))
        data = data.with_normalizer(origin.normalizer_for(config, data.spec))
    in_training.check_data(config, data)
    return data


def make_loader(config: ConfigDict, data: RunData, mesh: Mesh, stored: CheckpointReader | None) -> Loader:
    """The batches of this process's rows, from where a checkpoint left off; after a converted one, which knows no
    data, from its step on in the order of these."""
    index, count = mesh_lib.data_group(mesh)
    return Loader(
        data,
        batch_size=config.batch_size,
        start_step=stored.step if stored else 0,
        process_index=index,
        process_count=count,
        state=(stored.data_iter or None) if stored else None,
    )


def find_codec(
    config: ConfigDict, data: RunData, stored: CheckpointReader | None, origin: Origin | None
) -> codec_store.Place:
    """The codec's place: the checkpoint's, else the origin's, else the one for this data."""
    if stored:
        return codec_store.in_workdir(config, stored.workdir, stored.codec)
    if origin and origin.gives_codec(config):
        return origin.codec
    return codec_store.in_dataset(config, data)


def with_first_parameters(program: Program, state: TrainState, origin: Origin | None) -> TrainState:
    """A fresh state with the parameters of published weights, and of the run that `init_from` names."""
    config = program.config
    skipped = origin.skipped(program.shapes.params, config) if origin else None
    params = pretrained.load(program.system, state.params, fresh=skipped)
    if origin:
        params, _ = origin.params(params, config)
    return state if params is state.params else state_lib.with_params(state, params)


def print_summary(program: Program, data: RunData, codec: str) -> None:
    config, system = program.config, program.system
    lines = [data.summary(), *data.warnings(system.action_clip, FEWEST)]
    lines += [f"warning: {told}" for told in systems.get(config.system).remarks(config)]
    about_data = "\n".join(lines)
    say(
        f"{about_data}\n{program.table()}\n{state_lib.about_frozen(config, program.shapes.params)}{codec}"
        f"devices: {program.mesh.size} {jax.default_backend()}, processes: {jax.process_count()}; "
        f"batch {config.batch_size}, {config.total_steps} steps"
    )
