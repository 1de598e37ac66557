"""Finetuning: a run that starts from the parameters of another (`config.init_from`).

What is taken from the origin, a workdir of ours or a converted official checkpoint:

- parameters: the averaged ones where the origin keeps them, as evaluation does, unless
  `config.init_from_parameters` says otherwise. The optimizer and the step are fresh;
- the normaliser, key by key, because the parameters know values in the origin's units, unless
  `config.init_from_normalizer` is "fresh";
- the frozen codec (the origin's own files or arrays; `config.model.codec.vae` does not matter), because they
  know its latents.

Arrays that the origin lacks, or has in another shape, are refused unless `config.init_from_skip` names them; these
start fresh. Where the layers that touch a modality start fresh, what belongs to them comes from the new run as well:
its own normaliser for `action`, its own codec for `next_obs`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax import systems
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.spec import DataSpec
from uwm_jax.errors import UserError
from uwm_jax.files import Place
from uwm_jax.hub import runs as hub_runs
from uwm_jax.hub.names import HubName, parse_origin
from uwm_jax.parallel.distributed import say
from uwm_jax.training import average, codec_store, fixed_fields, lineage
from uwm_jax.training.checkpoints.checkpoint import Checkpoints, latest_step
from uwm_jax.training.checkpoints.reader import CheckpointReader, CorruptCheckpoint
from uwm_jax.training.checkpoints.steps import folder_of
from uwm_jax.training.patterns import is_fresh, matches, require_matches, share, skip_flag


def open_origin(spec: str, parameters: str = "auto") -> Origin:
    """The origin that `config.init_from` names: `DIR`, whose newest checkpoint counts, `DIR@STEP`, or one on the hub.

    Args:
      spec: `config.init_from`.
      parameters: `config.init_from_parameters`: "average", "raw", or "auto" for the average where there is one.

    Raises:
      UserError: no such workdir or step, or a checkpoint that cannot be read.
    """
    stored, steps = locate(spec, "init_from")
    directory, step = stored.workdir, stored.step
    try:
        averaged = stored.holds(average.ITEMS[average.AVERAGE])
        if parameters == average.AVERAGE and not averaged:
            raise UserError(
                f"config.init_from_parameters={parameters!r}: step {step} of {str(directory)!r} holds no average of "
                "the parameters (config.optimizer.ema_decay was 0). Leave the field out."
            )
        if parameters == "auto":
            parameters = average.AVERAGE if averaged else average.RAW
        config, told = fixed_fields.config_of_run(directory, stored)
        if told:
            say(f"warning: {told}")
        data_iter = stored.data_iter if "data_iter" in stored.items else {}
        return Origin(
            spec=spec,
            directory=directory,
            step=step,
            parameters=parameters,
            config=config,
            data_spec=DataSpec.from_json(stored.assets["data_spec"]),
            codec_arrays=stored.codec,
            learned_from=lineage.of_checkpoint(stored.assets, data_iter, config),
            latent_sizes=stored.assets.get("latent_sizes"),
        )
    except CorruptCheckpoint as e:
        raise UserError(f"config.init_from={spec!r}: {e}. Name another step of {steps}, as DIR@STEP.") from e


def locate(spec: str, field: str) -> tuple[CheckpointReader, list[int]]:
    """The checkpoint that an origin's field names, not yet read, and the steps of all in its workdir.

    Args:
      spec: DIR, whose newest checkpoint counts, DIR@STEP, or a repository of the hub in place of DIR.
      field: `init_from` or `branch_from`, for messages.

    Raises:
      UserError: no such workdir or step.
    """
    place, step = parse_origin(spec, field)
    directory = hub_runs.of_repository(place, f"config.{field}") if isinstance(place, HubName) else place
    if not (directory / "config.json").is_file():
        raise UserError(
            f"config.{field}={spec!r}: {str(directory)!r} holds no config.json. Expected DIR or DIR@STEP, where DIR "
            "is the workdir of a run, or one made by `python -m uwm_jax.convert from-torch`; or a repository of the "
            "hub, owner/name or owner/name@revision@STEP."
        )
    if latest_step(directory) is None:
        raise UserError(f"config.{field}={spec!r}: {str(directory)!r} holds no checkpoint yet.")
    checkpoints = Checkpoints(directory, read_only=True)
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise UserError(f"config.{field}={spec!r}: {str(directory)!r} has checkpoints of steps {steps}.")
    return CheckpointReader(checkpoints.directory, steps[-1] if step is None else step), steps


@dataclass(frozen=True)
class Origin:
    """An opened origin; its parameters are read by `params` alone.

    Attributes:
      spec: as in `config.init_from`.
      directory, step: the workdir and its checkpoint.
      parameters: which of that are read, "average" or "raw".
      config: of the origin's run.
      data_spec: of its data, with its normaliser.
      codec_arrays: of its codec, if that was fitted to data, else None.
      learned_from: all data that its parameters learned from; None where that is not known.
      latent_sizes: of its latents by source, as `latents.sizes`, where they were measured.
    """

    spec: str
    directory: Place
    step: int
    parameters: str
    config: ConfigDict
    data_spec: DataSpec
    codec_arrays: Any
    learned_from: lineage.Learned | None
    latent_sizes: Mapping[str, float] | None

    @property
    def place(self) -> str:
        """The checkpoint as a run keeps it: DIR@STEP, or owner/name@commit@STEP."""
        return f"{hub_runs.spelled(self.directory)}@{self.step}"

    @property
    def item(self) -> str:
        """The name of the checkpoint's item that is read: "params" or "ema_params"."""
        return average.ITEMS[self.parameters]

    @property
    def normalizer(self) -> Normalizer:
        return self.data_spec.normalizer

    def normalizer_for(self, config: ConfigDict, spec: DataSpec) -> Normalizer:
        """The normaliser of the new run: the origin's for each key that it knows, in the same width.

        A key that is new, has another width, or belongs to layers that start fresh (`action`: the action layers;
        low-dim keys: the AdaLN kernels), takes the entry that fits the new data. A key that the origin leaves as it is
        (official LIBERO checkpoints have no normaliser) stays as it is.

        Args:
          config: of the new run.
          spec: of its data, with the normaliser that fits this data (`RunData(normalizer=None)`).
        """
        kept = set(self.kept_keys(config, spec))
        entries = {}
        for key in spec.widths:
            source = self.normalizer if key in kept else spec.normalizer
            if key in source.entries:
                entries[key] = source.entries[key]
        return Normalizer(entries)

    def gives_codec(self, config: ConfigDict) -> bool:
        """Whether the new run takes its codec: not if the layers that meet its latents are fresh."""
        return not is_fresh(systems.tree(config).codec_interface, config.init_from_skip)

    @property
    def codec(self) -> codec_store.Place:
        """The location of its codec."""
        return codec_store.in_workdir(self.config, self.directory, self.codec_arrays)

    def params(self, fresh: Any, config: ConfigDict) -> tuple[Any, list[str]]:
        """The origin's parameters, in the places of fresh ones.

        Args:
          fresh: the new run's parameters as `jax.Array`s, whose shardings the result has; shapes with shardings do
            where nothing is skipped.
          config: of the new run; `init_from_skip` are patterns of names such as `noise_pred_net/pos_embed`, where `*`
            stands for any characters.

        Returns:
          the parameters, and the names of all arrays that were skipped: they are the fresh ones, or the origin's that
          the new run has no use for.

        Raises:
          UserError: arrays that do not fit and are not skipped (all of them are named), or a pattern without effect.
        """
        stored = self._shapes()
        skipped = self.skipped(fresh, config, stored)
        wanted = traverse_util.flatten_dict(fresh, sep="/")
        elsewhere = _replicated(next(iter(wanted.values())).sharding)
        # A checkpoint is read whole; what is skipped is let go of at once.
        like = {
            name: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=elsewhere if name in skipped else wanted[name].sharding
            )
            for name, shape in stored.items()
        }
        checkpoints = Checkpoints(self.directory, read_only=True)
        try:
            found = checkpoints.restore_params(self.step, traverse_util.unflatten_dict(like, sep="/"), self.item)
        except CorruptCheckpoint as e:
            raise UserError(
                f"config.init_from={self.spec!r}: {e}. Name another step of {checkpoints.steps()}, as DIR@STEP."
            ) from e
        finally:
            checkpoints.close()
        found = traverse_util.flatten_dict(found, sep="/")
        result = {name: x if name in skipped else found[name] for name, x in wanted.items()}
        return traverse_util.unflatten_dict(result, sep="/"), skipped

    def skipped(self, fresh: Any, config: ConfigDict, stored: Mapping[str, Any] | None = None) -> list[str]:
        """The names that `params` skips, from shapes alone; raises what it raises."""
        stored = self._shapes() if stored is None else stored
        wanted = traverse_util.flatten_dict(fresh, sep="/")
        names = sorted(stored.keys() | wanted.keys())
        skip = config.init_from_skip
        require_matches("init_from_skip", skip, names)
        skipped = [name for name in names if matches(name, skip)]
        there, here = ({n: tuple(x.shape) for n, x in tree.items()} for tree in (stored, wanted))
        misfits = [n for n in names if n not in skipped and there.get(n) != here.get(n)]
        if misfits:
            raise UserError(self._refusal(misfits, there, here, config))
        return skipped

    def describe_skipped(self, fresh: Any, skipped: Sequence[str], freeze: Sequence[str] = ()) -> str:
        """One line for people about what starts fresh; a second one where some of it is frozen, too."""
        sizes = {n: int(np.prod(x.shape)) for n, x in traverse_util.flatten_dict(fresh, sep="/").items()}
        mine = [name for name in skipped if name in sizes]
        unused = [name for name in skipped if name not in sizes]
        text = f"skipped: {', '.join(mine) or 'nothing'}"
        text += f" start fresh ({share(mine, sizes)})" if mine else ""
        text += f"; the origin's {', '.join(unused)} not used" if unused else ""
        stuck = [name for name in mine if matches(name, freeze)]
        if stuck:
            text += f"\nwarning: {', '.join(stuck)} start fresh, and config.optimizer.freeze leaves them random"
        return text

    def kept_keys(self, config: ConfigDict, spec: DataSpec) -> list[str]:
        """The keys, `action` and low-dim, whose normaliser is the origin's; arguments as for `normalizer_for`."""
        if config.init_from_normalizer == "fresh":
            return []
        tree, there = systems.tree(config), self.data_spec.widths
        return [
            key
            for key, width in spec.widths.items()
            if there.get(key) == width and not is_fresh(tree.interface(key), config.init_from_skip)
        ]

    def _shapes(self) -> dict[str, Any]:
        """{name: metadata with shape and dtype} of the origin's parameters."""
        folder = epath.Path(str(folder_of(self.directory / "checkpoints", self.step) / self.item))
        try:
            tree = ocp.StandardCheckpointHandler().metadata(folder).tree
        except (ValueError, KeyError, OSError) as e:
            raise UserError(f"config.init_from={self.spec!r}: {folder} cannot be read ({e}).") from e
        return traverse_util.flatten_dict(tree, sep="/")

    def _refusal(self, misfits: list[str], there: Mapping, here: Mapping, config: ConfigDict) -> str:
        lines = [f"config.init_from={self.spec!r} (step {self.step}): {len(misfits)} arrays do not fit this run:"]
        lines += [f"  {n}: {there.get(n, 'absent')} in the origin, {here.get(n, 'absent')} here" for n in misfits]
        sizes = {name: int(np.prod(shape)) for name, shape in here.items()}
        now, before = config_lib.flatten(config), config_lib.flatten(self.config)
        shaping = systems.get(config.system).fields.shaping
        changed = [n for n in sorted(now) if matches(n, shaping) and now[n] != before.get(n)]
        for name in changed:
            lines.append(f"  config.{name} is {now[name]}, the origin's is {before.get(name, 'absent')}")
        lines.append(
            f"{'Undo what changed the shapes' if changed else 'The widths of the data differ'}. To let these arrays "
            f"start fresh instead ({share([n for n in misfits if n in here], sizes)}):\n"
            f"  {skip_flag([*config.init_from_skip, *misfits])}"
        )
        told = systems.tree(config).misfits
        return "\n".join(lines + [told[pattern] for pattern in told if fnmatch.filter(misfits, pattern)])


def _replicated(like: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(like, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(like.mesh, jax.sharding.PartitionSpec())
    return like
