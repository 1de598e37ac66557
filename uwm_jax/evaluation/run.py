"""A run's checkpoint and its held-out windows, opened by a command that measures them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from uwm_jax.data.value_ranges import under
from uwm_jax.errors import warn
from uwm_jax.evaluation import places
from uwm_jax.evaluation.data import Data, open_data
from uwm_jax.evaluation.evaluator import Evaluator, rows_at_a_time
from uwm_jax.files import Place
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.systems.base import System
from uwm_jax.training import build, fixed_fields, inference, lineage, provenance
from uwm_jax.training.checkpoints.reader import CheckpointReader


@dataclasses.dataclass(frozen=True)
class EvaluatedRun:
    """A checkpoint on the devices of this process, and the data that it is measured on.

    Attributes:
      workdir, step: the run and its checkpoint.
      root: the directory for results, as `places.root` gives it.
      system, params, frozen: the model; arrays lie whole on every device of `mesh`.
      data: its held-out windows, or others.
      own: whether config, parameters and, as far as that is known, data are the run's own.
      settings: what tells the results apart from the run's own, as `places.choose` takes it.
      overrides: ("eval.num_windows", "64") pairs of fields that flags changed.
      used: which parameters these are, as `inference.parameters_used`.
    """

    workdir: Place
    step: int
    root: Place
    system: System
    params: Any
    frozen: Any
    mesh: Mesh
    data: Data
    own: bool
    settings: Mapping[str, Any]
    overrides: Sequence[tuple[str, str]]
    used: Mapping[str, Any]

    def folder(self, file: str, settings: Mapping[str, Any], *, shared: bool, name: str | None) -> Place:
        """The folder below `eval/<step>` for a result; as `places.choose`, which explains the arguments."""
        return places.choose(
            self.root / "eval" / str(self.step),
            file,
            settings,
            own=self.own,
            shared=shared or self.data.own is None,
            name=name,
            run=places.of_run(self.root, self.workdir),
        )

    def evaluator(self) -> Evaluator:
        """The evaluator of its held-out windows, in batches of at most the rows that the trainer's memory held."""
        config = self.system.config
        windows = self.data.evaluated.held_out(config.eval.num_windows, whole=self.data.whole)
        rows = rows_at_a_time(self.mesh, min(len(windows), config.batch_size))
        rules = build.rules_of(self.system)
        return Evaluator(self.system, self.data.references, windows, self.mesh, rules, rows)

    def about(self, evaluator: Evaluator, settings: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
        """Provenance of a result: data, command, config, parameters and settings."""
        changed = [name for name, _ in self.overrides]
        use = provenance.describe_use(command, self.system.config, changed)
        place = places.of_run(self.root, self.workdir)
        return evaluator.about() | self.data.about() | use | dict(self.used) | {"settings": dict(settings)} | place


def open_run(
    workdir: Place,
    output: Place | None,
    *,
    step: int | None,
    parameters: str | None,
    overrides: Sequence[tuple[str, str]],
) -> EvaluatedRun:
    """Opens a checkpoint, and the held-out data of its run or those that overrides name.

    Warns where other data than the run's leave the ranges that it was trained on.

    Args:
      output: for results in place of the workdir.
      step, parameters, overrides: as `inference.load_for_inference` takes them.

    Raises:
      UserError: as `places.root`, `inference.load_for_inference` and `open_data`.
    """
    root = places.root(output, workdir)
    system, params, frozen, step = inference.load_for_inference(
        workdir, step, overrides, parameters, fixed_fields.EVALUATION
    )
    changed = [name for name, _ in overrides]
    stored = CheckpointReader(workdir.absolute() / "checkpoints", step)
    own_config, _ = fixed_fields.config_of_run(workdir, stored)
    learned = lineage.kept(stored.assets)
    data = open_data(system, own_config, inference.datasets_of(workdir, step), learned, changed)
    if data.own is not True:
        for told in under(system.spec.normalizer, data.evaluated.ranges(), ("action", *system.spec.low_dim)):
            warn(f"{told}. Are the units and the meaning of the columns the same?")
    used = inference.parameters_used(workdir, step, parameters)
    default = inference.parameters_used(workdir, step)["parameters"]
    settings = places.differences(system.config, own_config, changed, used["parameters"], default)
    own = not settings and data.own is not False
    mesh = mesh_lib.data_mesh(jax.local_devices())  # not the run's mesh
    params, frozen = mesh_lib.place((system.held(params), frozen), mesh_lib.replicated(mesh))
    settings |= data.settings
    return EvaluatedRun(workdir, step, root, system, params, frozen, mesh, data, own, settings, tuple(overrides), used)
