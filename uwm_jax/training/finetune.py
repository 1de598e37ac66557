"""Finetuning: a run that starts from the parameters of another (`config.init_from`).

What is taken from the origin, a workdir of ours or a converted official checkpoint:

- parameters: the averaged ones where the origin keeps them, as evaluation does, unless
  `config.init_from_parameters` says otherwise. The optimizer and the step are fresh;
- the normaliser, key by key, because the parameters know values in the origin's units;
- the frozen codec (the origin's own VAE folder or PCA arrays, whatever `config.model.codec.vae` says), because they
  know its latents.

Arrays that the origin lacks, or has in another shape, are refused unless `config.init_from_skip` names them; these
start fresh. Where the layers that touch a modality start fresh, what belongs to them comes from the new run as well:
its own normaliser for `action`, its own codec for `next_obs`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.data.normalize import Normalizer
from uwm_jax.errors import UserError
from uwm_jax.system import DataFacts
from uwm_jax.training import average
from uwm_jax.training import frozen as frozen_lib
from uwm_jax.training.checkpoint import Checkpoints, latest_step
from uwm_jax.training.stored import CorruptCheckpoint

# The arrays that meet the raw values of an input or output: when all of them start fresh, its units are free.
INTERFACE = {
    "action": ("noise_pred_net/action_encoder/fc1/kernel", "noise_pred_net/action_decoder/fc2/kernel"),
    "next_obs": ("noise_pred_net/patch_encoder/kernel", "noise_pred_net/patch_decoder/kernel"),
    "low_dim": ("noise_pred_net/blocks/adaln/kernel", "noise_pred_net/head/adaln/kernel"),
}

IMAGE_WEIGHTS = "obs_encoder/img_encoder/conv1/kernel"  # fresh when the image encoder starts fresh

# Fields that change what the parameters mean without changing a shape, and the interface that frees them, if any.
_FIXED = {
    "diffusion.num_train_steps": None,
    "diffusion.beta_schedule": None,
    "diffusion.prediction.action": "action",
    "diffusion.prediction.next_obs": "next_obs",
    "model.codec.name": "next_obs",
    "model.patch": "next_obs",
}

# Fields that finetuning often changes; a person is told, since no shape may show it.
_TOLD = (
    *("data.low_dim", "data.text", "data.resize", "data.crop"),
    *("data.window.obs", "data.window.action", "data.window.next_obs"),
)

# Largest normalised value of new data that passes without a warning; the origin was trained within about 1.
_REACH = 1.5


def open_origin(spec: str, parameters: str = "auto") -> Origin:
    """The origin that `config.init_from` names: `DIR`, whose newest checkpoint counts, or `DIR@STEP`.

    Args:
      spec: `config.init_from`.
      parameters: `config.init_from_parameters`: "average", "raw", or "auto" for the average where there is one.

    Raises:
      UserError: no such workdir or step, or a checkpoint that cannot be read.
    """
    directory, step = _parse(spec)
    if not (directory / "config.json").is_file():
        raise UserError(
            f"config.init_from={spec!r}: {str(directory)!r} holds no config.json. Expected DIR or DIR@STEP, where DIR "
            "is the workdir of a run, or one made by `python -m uwm_jax.convert from-torch`."
        )
    if latest_step(directory) is None:
        raise UserError(f"config.init_from={spec!r}: {str(directory)!r} holds no checkpoint yet.")
    checkpoints = Checkpoints(directory, read_only=True)
    steps = checkpoints.steps()
    try:
        if step is not None and step not in steps:
            raise UserError(f"config.init_from={spec!r}: {str(directory)!r} has checkpoints of steps {steps}.")
        step = steps[-1] if step is None else step
        items = checkpoints.items(step)
        if parameters == "auto":
            parameters = average.AVERAGE if average.ITEMS[average.AVERAGE] in items else average.RAW
        if average.ITEMS[parameters] not in items:
            raise UserError(
                f"config.init_from_parameters={parameters!r}: step {step} of {str(directory)!r} holds no average of "
                "the parameters (config.optimizer.ema_decay was 0). Leave the field out."
            )
        return Origin(
            spec=spec,
            directory=directory,
            step=step,
            parameters=parameters,
            config=config_lib.read(directory),
            facts=DataFacts.from_json(checkpoints.assets(step)["data_facts"]),
            codec_arrays=checkpoints.restore_arrays(step, "codec") if "codec" in items else None,
        )
    except CorruptCheckpoint as e:
        raise UserError(f"config.init_from={spec!r}: {e}. Name another step of {steps}, as DIR@STEP.") from e
    finally:
        checkpoints.close()


def _parse(spec: str) -> tuple[Path, int | None]:
    directory, at, step = spec.rpartition("@")
    if not at or Path(spec).is_dir():
        return Path(spec).absolute(), None
    if not step.isdecimal():
        raise UserError(f"config.init_from={spec!r}: expected DIR or DIR@STEP with a whole number, found {step!r}.")
    return Path(directory).absolute(), int(step)


@dataclass(frozen=True)
class Origin:
    """An opened origin; its parameters are read by `params` alone.

    Attributes:
      spec: as in `config.init_from`.
      directory, step: the workdir and its checkpoint.
      parameters: which of that are read, "average" or "raw".
      config: of the origin's run.
      facts: of its data, with its normaliser.
      codec_arrays: of its PCA codec, else None.
    """

    spec: str
    directory: Path
    step: int
    parameters: str
    config: ConfigDict
    facts: DataFacts
    codec_arrays: Any

    @property
    def item(self) -> str:
        """The name of the checkpoint's item that is read: "params" or "ema_params"."""
        return average.ITEMS[self.parameters]

    @property
    def normalizer(self) -> Normalizer:
        return self.facts.normalizer

    def check(self, config: ConfigDict, facts: DataFacts, ranges: Normalizer | None = None) -> list[str]:
        """What a person should be told before the run starts, line by line.

        Args:
          config: of the new run.
          facts: of its data, with the normaliser that fits this data (`Loader(normalizer=None)`).
          ranges: what maps this data onto [-1, 1] (`Loader.ranges()`), also where the run leaves it raw; None: the
            normaliser does.

        Raises:
          UserError: a field, or a PCA codec, that gives the origin's parameters another meaning.
        """
        now, before = config_lib.flatten(config), config_lib.flatten(self.config)
        for name, interface in _FIXED.items():
            if now[name] != before[name] and not (interface and _is_fresh(interface, config.init_from_skip)):
                remedy = f", or let its layers start fresh: {_flag(INTERFACE[interface])}" if interface else ""
                raise UserError(
                    f"config.{name} is {now[name]!r}, but the parameters of config.init_from={self.spec!r} were "
                    f"trained with {before[name]!r}. Use the origin's value{remedy}."
                )
        lines = [
            f"starting from {self.item} of step {self.step} in {self.directory}; optimizer and step are fresh",
            *self._about_average(),
            *self._about_codec(config),
            *self._about_normalizer(config, facts, ranges or facts.normalizer),
        ]
        keys_now, keys_before = _keys_read(config), _keys_read(self.config)
        for kind, fields in keys_now.items():
            known = list(keys_before[kind].values())
            lines += [
                f"note: config.{field} is {keys}; the origin was trained with {' or '.join(map(str, known))}"
                for field, keys in fields.items()
                if keys not in known
            ]
        for name in _TOLD:
            in_order = sorted if name == "data.low_dim" else lambda x: x
            there, here = in_order(before[name]), in_order(now[name])
            if there != here:
                lines.append(f"note: config.{name} is {here}; the origin was trained with {there}")
        return lines

    def normalizer_for(self, config: ConfigDict, facts: DataFacts) -> Normalizer:
        """The normaliser of the new run: the origin's for each key that it knows, in the same width.

        A key that is new, has another width, or belongs to layers that start fresh (`action`: the action layers;
        low-dim keys: the AdaLN kernels), takes the entry that fits the new data. A key that the origin leaves as it is
        (official LIBERO checkpoints have no normaliser) stays as it is.

        Args:
          config, facts: as for `check`.
        """
        kept = set(self._kept_keys(config, facts))
        entries = {}
        for key in ("action", *facts.low_dim):
            source = self.normalizer if key in kept else facts.normalizer
            if key in source.entries:
                entries[key] = source.entries[key]
        return Normalizer(entries)

    def gives_codec(self, config: ConfigDict) -> bool:
        """Whether the new run takes its codec (`vae`, `codec_arrays`): not if the layers of `next_obs` are fresh."""
        return not _is_fresh("next_obs", config.init_from_skip)

    @property
    def vae(self) -> Path:
        """The folder of its VAE."""
        return frozen_lib.vae_folder(self.directory)

    def params(self, fresh: Any, skip: Sequence[str]) -> tuple[Any, list[str]]:
        """The origin's parameters, in the places of fresh ones.

        Args:
          fresh: the new run's parameters as `jax.Array`s, whose shardings the result has; shapes with shardings do
            where nothing is skipped.
          skip: `config.init_from_skip`: patterns of names such as `noise_pred_net/pos_embed`, where `*` stands for any
            characters.

        Returns:
          the parameters, and the names of all arrays that were skipped: they are the fresh ones, or the origin's that
          the new run has no use for.

        Raises:
          UserError: arrays that do not fit and are not skipped (all of them are named), or a pattern without effect.
        """
        stored = self._shapes()
        skipped = self.skipped(fresh, skip, stored)
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

    def skipped(self, fresh: Any, skip: Sequence[str], stored: Mapping[str, Any] | None = None) -> list[str]:
        """The names that `params` skips, from shapes alone; raises what it raises."""
        stored = self._shapes() if stored is None else stored
        wanted = traverse_util.flatten_dict(fresh, sep="/")
        names = sorted(stored.keys() | wanted.keys())
        for pattern in skip:
            if not fnmatch.filter(names, pattern):
                raise UserError(
                    f"config.init_from_skip: {pattern!r} matches none of the {len(names)} arrays, such as "
                    f"{', '.join([n for n in names if 'blocks' not in n][:3])}."
                )
        skipped = [name for name in names if _matches(name, skip)]
        there, here = ({n: tuple(x.shape) for n, x in tree.items()} for tree in (stored, wanted))
        misfits = [n for n in names if n not in skipped and there.get(n) != here.get(n)]
        if misfits:
            raise UserError(self._refusal(misfits, there, here, skip))
        return skipped

    def describe_skipped(self, fresh: Any, skipped: Sequence[str]) -> str:
        """One line for people about what starts fresh."""
        sizes = {n: int(np.prod(x.shape)) for n, x in traverse_util.flatten_dict(fresh, sep="/").items()}
        mine = [name for name in skipped if name in sizes]
        unused = [name for name in skipped if name not in sizes]
        text = f"skipped: {', '.join(mine) or 'nothing'}"
        text += f" start fresh ({_share(mine, sizes)})" if mine else ""
        return text + (f"; the origin's {', '.join(unused)} not used" if unused else "")

    def _kept_keys(self, config: ConfigDict, facts: DataFacts) -> list[str]:
        here = {"action": facts.action_dim, **facts.low_dim}
        there = {"action": self.facts.action_dim, **self.facts.low_dim}

        def interface(key: str) -> str:
            return "action" if key == "action" else "low_dim"

        return [
            key
            for key, width in here.items()
            if there.get(key) == width and not _is_fresh(interface(key), config.init_from_skip)
        ]

    def _about_average(self) -> list[str]:
        if self.parameters == average.RAW:
            return []
        told = average.warning(self.config, self.step, "--config.init_from_parameters=raw")
        return [f"warning: {told}"] if told else []

    def _about_codec(self, config: ConfigDict) -> list[str]:
        name = config.model.codec.name
        if not self.gives_codec(config) or name == "pixels" or (name == "pca" and not self.codec_arrays):
            return []
        if name == "vae":
            return [f"codec: the origin's VAE, {self.vae} (config.model.codec.vae is not read)"]
        fitted, wanted = tuple(self.codec_arrays["mean"].shape), (len(config.data.cameras), *config.data.crop, 3)
        if fitted != wanted:
            raise UserError(
                f"config.init_from={self.spec!r}: the origin's PCA codec was fitted on {fitted[0]} views of "
                f"{fitted[1]}x{fitted[2]}, but this run has {wanted[0]} of {wanted[1]}x{wanted[2]}. Use the origin's "
                "views and crop, or this dataset's own codec, with layers for it that start fresh: "
                f"{_flag(INTERFACE['next_obs'])}"
            )
        return ["codec: the origin's PCA arrays"]

    def _about_normalizer(self, config: ConfigDict, facts: DataFacts, ranges: Normalizer) -> list[str]:
        kept = self._kept_keys(config, facts)
        own = [key for key in ("action", *facts.low_dim) if key not in kept]
        plain = [key for key in kept if key not in self.normalizer.entries]
        parts = [f"{', '.join(kept)} as in the origin"] if kept else []
        parts += [f"{', '.join(own)} from this run's data ({config.data.normalize})"] if own else []
        lines = [f"normaliser: {'; '.join(parts)}"]
        lines[0] += f" ({', '.join(plain)}: none, raw values)" if plain else ""
        for key in kept:
            if key in ranges.entries:
                reach = self._reach(key, *ranges.entries[key])
                if reach > _REACH:
                    lines.append(
                        f"warning: {key} of this run's data reaches {reach:.3g} in the origin's units, which was "
                        "trained within about 1. Are the units and the meaning of the columns the same? For action, "
                        f"fresh layers and a fresh normaliser are {_flag(INTERFACE['action'])}"
                    )
        return lines

    def _reach(self, key: str, scale: np.ndarray, offset: np.ndarray) -> float:
        """Largest absolute value, normalised by the origin, of data whose range is offset +- scale."""
        spread = np.where(scale == 1.0, 0.0, scale)  # a constant column has scale 1
        ends = [self.normalizer.normalize(key, offset + sign * spread) for sign in (-1, 1)]
        return float(np.abs(ends).max())

    def _shapes(self) -> dict[str, Any]:
        """{name: metadata with shape and dtype} of the origin's parameters."""
        folder = epath.Path(self.directory / "checkpoints" / str(self.step) / self.item)
        try:
            tree = ocp.StandardCheckpointHandler().metadata(folder).tree
        except (ValueError, KeyError, OSError) as e:
            raise UserError(f"config.init_from={self.spec!r}: {folder} cannot be read ({e}).") from e
        return traverse_util.flatten_dict(tree, sep="/")

    def _refusal(self, misfits: list[str], there: Mapping, here: Mapping, skip: Sequence[str]) -> str:
        lines = [f"config.init_from={self.spec!r} (step {self.step}): {len(misfits)} arrays do not fit this run:"]
        lines += [f"  {n}: {there.get(n, 'absent')} in the origin, {here.get(n, 'absent')} here" for n in misfits]
        sizes = {name: int(np.prod(shape)) for name, shape in here.items()}
        lines.append(
            "Undo the change of views, action width, registers or sizes. To let these arrays start fresh instead "
            f"({_share([n for n in misfits if n in here], sizes)}):\n  {_flag([*skip, *misfits])}"
        )
        if any(name in misfits for name in INTERFACE["low_dim"]):
            lines.append(
                "The AdaLN kernels read the condition, whose width follows from views, frames, low-dim keys and text; "
                "they start at zero and are most of the network, so little of the origin is left without them."
            )
        return "\n".join(lines)


def _keys_read(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """{"cameras" and "action": {config field: keys}} of all data with actions; cameras in the order of the views."""
    data = config.data
    sources = {f"data.sources.{name}": s for name, s in data.sources.items() if s.use_actions} or {"data": data}
    found: dict[str, dict[str, Any]] = {"cameras": {}, "action": {}}
    for where, source in sources.items():
        for kind, fields in found.items():
            keys = source[kind] or data[kind]
            if kind == "cameras":
                keys = [key for _, key in sorted(zip(data.cameras, keys, strict=True))]
            fields[f"{where if source[kind] else 'data'}.{kind}"] = keys
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_fresh(interface: str, skip: Sequence[str]) -> bool:
    return all(_matches(name, skip) for name in INTERFACE[interface])


def _flag(patterns: Sequence[str]) -> str:
    return f"--config.init_from_skip='{','.join(patterns)}'"


def _share(names: Sequence[str], sizes: Mapping[str, int]) -> str:
    count, total = sum(sizes[n] for n in names), sum(sizes.values())
    return f"{count / 1e6:.3g} M of {total / 1e6:.4g} M parameters, {count / total:.1%}"


def _replicated(like: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(like, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(like.mesh, jax.sharding.PartitionSpec())
    return like
