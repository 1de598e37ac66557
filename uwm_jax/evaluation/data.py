"""The data of an evaluation: the held-out episodes of a run, or others, and what the model may know of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.run_data import RunData
from uwm_jax.data.sources import renamed
from uwm_jax.errors import UserError
from uwm_jax.files import Place
from uwm_jax.systems.base import System
from uwm_jax.training import fixed_fields, inference, lineage
from uwm_jax.training.checkpoints.reader import CheckpointReader


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of an evaluation.

    Attributes:
      evaluated: whose held-out windows are evaluated.
      references: whose training episodes baselines are taken from.
      own: whether the datasets are the run's; None where that is not known.
      whole: sources whose split is not the run's, so that all of their episodes are held out of training.
      leak: how training reached the run's held-out episodes by way of an earlier run; None where it did not.
    """

    evaluated: RunData
    references: RunData
    own: bool | None
    whole: tuple[str, ...]
    leak: str | None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that tell the data apart from the run's, without the splits, which are fields of the config."""
        identities = sorted(source.identity for source in self.evaluated.sources.values())
        return {} if self.own else {"datasets": identities}

    def about(self) -> dict[str, Any]:
        return {
            "own_data": self.own,
            "splits": {name: source.dataset.split for name, source in self.evaluated.sources.items()},
            "whole": list(self.whole),
            "leak": self.leak,
        }


def open_data(
    system: System,
    own_config: ConfigDict,
    datasets: Mapping[str, str],
    kept: Mapping[str, Any],
    changed: Collection[str],
) -> Data:
    """The held-out data of a run, or those that flags name.

    Args:
      own_config: without what flags change.
      datasets: as `refuse_other_data`.
      kept: what `lineage.kept` gives of the checkpoint's assets.
      changed: names of the fields that flags change.

    Raises:
      UserError: as `refuse_other_data`; a split that the run was trained on, under another source's name.
    """

    def opened(config: ConfigDict) -> RunData:
        return RunData(config.data, seed=config_lib.data_seed(config), normalizer=system.spec.normalizer)

    data = opened(system.config)
    leak = kept.get("leak")  # of the run's own held-out episodes
    trained, before = system.config.copy_and_resolve_references(), own_config.data
    trained.data.split = before.split
    for name, fields in trained.data.sources.items():
        fields.split = before.sources[name].split
    split_of = {name: fields.split or before.split for name, fields in before.sources.items()}
    whole = tuple(
        name for name, source in data.sources.items() if source.dataset.split != split_of.get(name, before.split)
    )
    own = refuse_other_data(system, data, datasets, changed, whole)
    if not whole:
        return Data(data, data, own, (), leak)
    if own is not True:
        return Data(data, data, own, whole, None)
    references = opened(trained)
    learned = {(source.dataset.fingerprint, source.dataset.split) for source in references.sources.values()}
    before_it = {(entry["fingerprint"], entry["split"]) for entry in kept.get("learned_from") or ()}
    told = [leak] if leak and (len(whole) < len(data.sources) or kept.get("learned_from", ()) is None) else []
    for name in whole:
        dataset = data.sources[name].dataset
        if (dataset.fingerprint, dataset.split) in before_it - learned:
            told.append(f"The run that this one started from was trained on the split {dataset.split!r} of {name!r}.")
        if (dataset.fingerprint, dataset.split) in learned:
            raise UserError(
                f"{dataset.directory}: the run was trained on the split {dataset.split!r}, by another of its sources "
                f"than {name!r}. Choose a split that it has not seen."
            )
    return Data(data, references, own, whole, " ".join(told) or None)


def open_raw(system: System, workdir: Place, step: int, changed: Collection[str] = ()) -> Data:
    """`open_data` of a workdir's checkpoint, whose batches have actions and low-dimensional keys in raw units.

    Args:
      system: as `inference.load_for_inference` made it of the checkpoint `step`.
      changed: names of the fields that flags change.
    """
    # A normaliser without entries leaves the numbers as they are.
    raw = systems.make(system.config, dataclasses.replace(system.spec, normalizer=Normalizer()), system.codec)
    stored = CheckpointReader(workdir.absolute() / "checkpoints", step)
    own_config, _ = fixed_fields.config_of_run(workdir, stored)
    return open_data(raw, own_config, inference.datasets_of(workdir, step), lineage.kept(stored.assets), changed)


def refuse_other_data(
    system: System, data: RunData, datasets: Mapping[str, str], changed: Collection[str], whole: Collection[str] = ()
) -> bool | None:
    """Checks that what is held out here was held out of training.

    Args:
      datasets: {source: identity} of the run's own data; {} where it is not known (a converted checkpoint).
      changed: names of the fields that flags change.
      whole: sources with another split than the run's, of which other episodes are chosen: their content counts alone.

    Returns:
      Whether these are the run's own datasets; None where that is not known.

    Raises:
      UserError: the dataset is not of the kind that the run was trained on; or it is another one, and no flag names it.
    """
    trained, found = system.spec.to_json(), data.spec.to_json()
    for name in ("cameras", "low_dim", "action_dim", "text_dim"):
        if trained[name] != found[name]:
            raise UserError(f"{data.directory}: {name} is {found[name]}, but the run was trained with {trained[name]}.")
    system.spec.check_text_encoder(data.spec.text_encoder, str(data.directory), "this run")
    here = {name: source.identity for name, source in data.sources.items()}
    datasets = renamed(datasets, list(here))
    for name in whole:
        here[name] = data.sources[name].dataset.fingerprint
        if name in datasets:
            datasets[name] = datasets[name].partition(" ")[0]  # without the choice of episodes
    if not datasets:
        return None
    if here == datasets:
        if "data.val_ratio" in changed:
            raise UserError(
                "--config.data.val_ratio: the run decided which episodes it did not learn from. Leave it out."
            )
        return True
    if any(name.startswith(("data.path", "data.sources")) for name in changed):
        return False
    name = min(name for name in {*here, *datasets} if here.get(name) != datasets.get(name))
    (ours, _, chosen), (theirs, _, own) = (found.get(name, "none").partition(" ") for found in (here, datasets))
    if ours == theirs:
        raise UserError(
            f"{data.directory}: source {name!r} chooses {chosen or 'all of its data'} here, but the run was trained on "
            f"{own or 'all of it'}. Use the run's ranges and conditions (config.data.ranges, config.data.sources)."
        )
    raise UserError(
        f"{data.directory}: this is not the dataset that the run was trained on (source {name!r}: fingerprint "
        f"{ours[:12]}, the run's is {theirs[:12]}), so that episodes which are held out here may be among those it "
        "learned from. Put the run's dataset there again (report.html tells which it was), or name this one with "
        "--config.data.path."
    )


def doubt(how: Mapping[str, Any]) -> str:
    """Why a model may know the episodes that an evaluation takes for held out, in a sentence or two; "" where it does
    not.

    Args:
      how: the evaluation's `about.json`: `own_data`, whether the datasets are those of the run (None: not known), and
        `leak`, how training on an earlier run's data reached them. Older files lack both.
    """
    may_be_known = "Episodes that are held out here may be among those that it learned from."
    if (own := how.get("own_data", True)) is None:
        return f"It is not known what this run was trained on. {may_be_known}"
    return (
        (how.get("leak") or "") if own else f"These are not the datasets that this run was trained on. {may_be_known}"
    )
