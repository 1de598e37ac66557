"""A row of a batch that training saw, made again from the run's order of samples and history of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.data.loader import Loader, Trace
from uwm_jax.data.run_data import RunData
from uwm_jax.data.spec import Batch, DataSpec
from uwm_jax.errors import UserError
from uwm_jax.files import Place
from uwm_jax.training import cached_latents, fixed_fields
from uwm_jax.training.checkpoints.checkpoint import latest_step
from uwm_jax.training.checkpoints.reader import CheckpointReader


class TracedRow(NamedTuple):
    """A row.

    Attributes:
        place: where its sample lies.
        batch: the arrays that training saw, with one row.
        known: whether the run's newest checkpoint lies behind the step; else the weights of its config are assumed.
        replaced: whether a record of the sample is bad, so that the row holds another sample
            (`config.data.max_bad_records`).
    """

    place: Trace
    batch: Batch
    known: bool
    replaced: bool = False


def open_run(
    workdir: Place, overrides: tuple[tuple[str, str], ...] = ()
) -> tuple[ConfigDict, RunData, Mapping[str, Any] | None, int]:
    """The config and data of a run; the state of its data at its newest checkpoint, and that checkpoint's step.

    Without a checkpoint with such a state, the state is None and the step 0: the run as its config begins it.

    Args:
        overrides: of the config, such as `data.path` where the dataset has moved.
    Raises:
        UserError: there is no run here, or its data cannot be opened.
    """
    step = latest_step(workdir)
    if step is None:
        config, normalizer, state, start = config_lib.read(workdir), None, None, 0
    else:
        stored = CheckpointReader(workdir.absolute() / "checkpoints", step)
        config, _ = fixed_fields.config_of_run(workdir, stored)
        normalizer = DataSpec.from_json(stored.assets["data_spec"]).normalizer
        state, start = (stored.data_iter, step) if stored.holds("train_state") else (None, 0)
    config_lib.apply_overrides(config, overrides)
    latents = cached_latents.use_of(config)
    data = RunData(config.data, seed=config_lib.data_seed(config), normalizer=normalizer, latents=latents)
    return config, data, state, start


def traced(
    data: RunData, batch_size: int, state: Mapping[str, Any] | None, start: int, step: int, row: int
) -> TracedRow:
    """Row `row` of the batch of training step `step`, counted from 1 as logs and metrics count.

    Args:
        state, start: of `open_run`.
    Raises:
        UserError: there is no such row, or the data are not those of `state`.
    """
    if step < 1 or not 0 <= row < batch_size:
        raise UserError(
            f"--trace={step}:{row}: expected STEP:ROW with a step from 1 on and a row from 0 to {batch_size - 1} "
            "(config.batch_size rows)."
        )
    loader = Loader(data, batch_size=batch_size, start_step=start, state=state)
    position = (step - 1) * batch_size + row
    batch = data.training_spec.empty(1)
    loader.load(batch, 0, row, position)
    notes = data.faults.notes(step)
    return TracedRow(loader.describe(position), batch, step <= start, bool(notes and notes["rows"]))
