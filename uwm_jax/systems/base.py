"""The protocol of a system: all that trainer, evaluation, closed loops and exports need of a model.

A system is a network with its losses and its ways of being used, as pure functions of (params, frozen, batch). Its
config fields, checks and tables lie in its own folder; a `SystemType` names them, and the registry
(`uwm_jax.systems`) finds it by `config.system`.

Batches are flat dictionaries as `DataSpec.batch_like` has them. Draws and noise are nested by kind and modality, so
that `{"noise": {"action": ...}}` is the key `noise/action` of a file. Parameters are nested dictionaries of float32
arrays, whose names are paths such as `noise_pred_net/pos_embed`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from uwm_jax.codecs import Codec, sample_posterior
from uwm_jax.data.images import preprocess
from uwm_jax.data.spec import AUGMENTATION, DataSpec, latents_key
from uwm_jax.data.windows import OF_FRAMES
from uwm_jax.models import layers, target

Batch = Mapping[str, jax.Array]
Params = Any
Encoded = dict[str, Any]
Draws = dict[str, dict[str, jax.Array]]
Noise = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Use:
    """A query to a system's weights.

    Attributes:
      makes: what it samples, of `action` and `next_obs`.
      given: what it is conditioned on besides the observation, of the same.
      question: the query in words, for reports.
      sees_obs: whether it is conditioned on the current observation.
    """

    makes: tuple[str, ...]
    given: tuple[str, ...] = ()
    question: str = ""
    sees_obs: bool = True


class Promised(NamedTuple):
    """Actions of a chunk that are executed whatever the sample says: those of the steps until it is there.

    Attributes:
      action: (B, Ta, Da) float32, normalised, what is really executed; any finite number in rows that are not promised.
      mask: (B, Ta) bool, True where the row is promised.
    """

    action: jax.Array
    mask: jax.Array


class Bucket(NamedTuple):
    """A part of a loss over some rows: the sum over them, and how many there are; () float32."""

    total: jax.Array
    rows: jax.Array


class StepKeys(NamedTuple):
    """Keys (B,) of the rows of one step, for what they are named by."""

    timestep: jax.Array
    image: jax.Array
    posterior: jax.Array


class Losses(NamedTuple):
    """One training evaluation.

    Attributes:
      parts: {loss part: (B,) float32}, unweighted.
      buckets: {name, such as `action/t0-24`: Bucket}, shown and not trained.
      outputs: arrays (B, ...) by name, such as `noise_pred/action` and `obs_feat`; what is not used costs nothing under
        jit.
    """

    parts: dict[str, jax.Array]
    buckets: dict[str, Bucket]
    outputs: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Parameters that a run may start from published weights.

    Attributes:
      field: the config field that names the weights; "" there reads none.
      path: of the subtree of parameters, such as `obs_encoder/img_encoder`.
      marker: one of its arrays, by which finetuning tells whether all of it starts fresh.
      load: (value of the field, the subtree) -> the subtree with the weights, in numpy.
    """

    field: str
    path: str
    marker: str
    load: Callable[[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class TreeInfo:
    """Parameters by name; a pattern is a path in which `*` stands for any characters.

    Attributes:
      gradient_groups: (part of a path, group) pairs, without `*`; the first that a path contains names the group under
        which the gradient's norm is logged, so the last is ("", group).
      mesh_rules: (pattern, one entry per axis of the array) pairs; the first match counts. An entry is None, a mesh
        axis or several, outermost first (`uwm_jax.parallel.sharding`).
      interfaces: {what meets the network, such as `action`, `next_obs` or `low_dim`: patterns of the arrays that touch
        its raw values}: when all of them start fresh, its units are free.
      codec: the interface that a codec's latents meet; "" for systems without one.
      misfits: {pattern: a sentence for people when finetuning finds such an array in another shape}.
      pretrained: see `Pretrained`.
      untrained: patterns of arrays that official checkpoints hold and nothing trains: they are in parameters and
        checkpoints, but outside of the optimizer, weight decay and the average.
    """

    gradient_groups: tuple[tuple[str, str], ...]
    mesh_rules: tuple[tuple[str, tuple[Any, ...]], ...]
    interfaces: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    codec: str = ""
    misfits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pretrained: tuple[Pretrained, ...] = ()
    untrained: tuple[str, ...] = ()

    def interface(self, key: str) -> tuple[str, ...]:
        """The arrays that touch a normalised key of the data, such as `action` or a low-dimensional one."""
        return self.interfaces.get(key, self.interfaces.get("low_dim", ()))

    @property
    def codec_interface(self) -> tuple[str, ...]:
        """The arrays that touch a codec's latents."""
        return self.interfaces.get(self.codec, ())


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of the products of one sample's forward pass.

    Attributes:
      trained: {part, such as `network` or `encoder`: operations}; a training step costs three times as much.
      frozen: of frozen encoders, which have no backward pass.
    """

    trained: Mapping[str, float]
    frozen: float = 0.0

    @property
    def training(self) -> float:
        """One sample's share of a training step, without recomputation."""
        return 3 * sum(self.trained.values()) + self.frozen


def exact(method: Callable[..., Any]) -> Callable[..., Any]:
    """Traces a method of a system with exact float32 products when `config.model.dtype` says float32 (no TF32, no
    bfloat16 passes)."""

    @functools.wraps(method)
    def wrapped(self: System, *args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest" if self.config.model.dtype == "float32" else "default"):
            return method(self, *args, **kwargs)

    return wrapped


class System(abc.ABC):
    """A model of one kind for data of one shape: pure functions of (params, frozen, batch).

    Attributes:
      config: the run's.
      spec: of the data.
      codec: between frames and latents; None for systems without one.
      uses: {name: Use} of what its weights answer.
      acting: the use that makes an action from nothing given; "" where there is none.
      tree: about its parameters.
      probes: {metric: (params, encoded, encoded with another window's actions, noise) -> (B,)}, measured on held-out
        windows besides the uses.
      can_promise: whether `sample` takes promised actions.
      action_clip: the samplers clip normalised actions to [-action_clip, action_clip]; 0: they do not.
    """

    uses: Mapping[str, Use]
    acting: str
    tree: TreeInfo
    probes: Mapping[str, Callable[..., jax.Array]] = {}
    can_promise: bool = False
    action_clip: float = 0.0

    def __init__(self, config: ConfigDict, spec: DataSpec, codec: Codec | None = None):
        self.config, self.spec, self.codec = config, spec, codec

    # --- a system implements ---------------------------------------------------------------------

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, float32, those of `tree.untrained` too."""

    @abc.abstractmethod
    def encode(self, frozen: Params, batch: Batch, key: jax.Array | None = None) -> Encoded:
        """The inputs of losses and samples from a batch: preprocessed images, latents, and the rest of the batch.

        Args:
          frozen: the codec's parameters.
          batch: as `spec.batch_like`, with or without cached latents; groups that the caller has no use for may be
            absent. `next_obs_latent` (B, V, T, h, w, C) stands in for `next_obs/<camera>`.
          key: one key a step, for augmentation and posteriors; a row's share of it follows from `batch["row"]`. None:
            centre crop, no jitter, the posterior's mode.

        Returns:
          {name: (B, ...)}, of which `action`, `action_mask` and `next_obs_latent` are called so by all systems that
          have them.
        """

    @abc.abstractmethod
    def draws(self, key: jax.Array, rows: jax.Array) -> Draws:
        """All randomness of one training evaluation (timesteps, noise, masks), {} for none.

        Args:
          key: one key a step. rows: (B,) int32, the rows' numbers in the global batch; row i of the result depends on
            the key and `rows[i]` alone.
        """

    def one_draw(self, key: jax.Array, rows: jax.Array) -> Draws:
        """`draws` with one draw a row, which `losses` takes as well, where training makes several."""
        return self.draws(key, rows)

    @abc.abstractmethod
    def shares(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Each row's share of each loss part, {part: (B,) float32}: they sum to 1 over the whole batch, or to 0 if no
        row trains that part. `key` as in `draws`."""

    @abc.abstractmethod
    def losses(self, params: Params, encoded: Encoded, draws: Draws, *, train: bool = False) -> Losses:
        """One training evaluation with given draws; `train` where the system has dropout or the like."""

    @abc.abstractmethod
    def noise(self, key: jax.Array, rows: jax.Array, use: str) -> Noise:
        """The noise that `sample` starts from, {modality: (B, ...)}, {} for none; rows as in `draws`."""

    @abc.abstractmethod
    def sample(
        self,
        params: Params,
        encoded: Encoded,
        use: str,
        noise: Noise,
        *,
        promised: Promised | None = None,
        guided: bool = False,
        trace: bool = False,
    ) -> dict[str, jax.Array]:
        """Answers a use of `uses`.

        Args:
          encoded: of `encode` without a key, with what the use is given.
          promised: actions that are known beforehand, held at every step of the sampler, and exactly in the sample
            (`uwm_jax.diffusion.sampler`). Only where `can_promise`, and of uses that make actions.
          guided: whether promised actions also guide the rest; no effect without `promised`.
          trace: whether to return the states on the way: a leading axis (S + 1), from the noise to the sample.
            Systems that do not sample in steps return the result alone, (1, B, ...).

        Returns:
          of what the use makes: `action` (B, Ta, Da) normalised; for `next_obs`, `next_obs_latent` (B, V, T, h, w, C)
          with a codec, else `next_obs_float` (B, V, T, H, W, 3) in [0, 1] units, not clipped.
        """

    @abc.abstractmethod
    def flops(self) -> Flops:
        """Of one sample."""

    # --- shared ------------------------------------------------------------------------------------

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras in the order of the views, which is sorted."""
        return tuple(sorted(self.spec.cameras))

    def held(self, tree: Any) -> Any:
        """Parameters, or a tree that holds them, in the form that the programs of this process run on fastest.

        Args:
          tree: arrays or shapes. Arrays that the result holds in another form are deleted: use the result alone.
        """
        loops = self.config.model.get("scan_blocks")
        loops = layers.scans_by_default() if loops is None else loops
        return tree if loops or target.device_count() > 1 else layers.apart(tree)

    def images(self, batch: Batch, keys: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Current and, where the batch has them, following images (B, V, T, h, w, 3) in [0, 1].

        With keys (B,) the images are augmented, with one draw for current and following frames; where the batch has
        `augmentation`, that decides the draws.
        """
        data = self.config.data
        current = {c: batch[f"obs/{c}"] for c in self.cameras}
        has_next = all(f"next_obs/{c}" in batch for c in self.cameras)
        following = {c: batch[f"next_obs/{c}"] for c in self.cameras} if has_next else None
        size = {"resize": data.resize, "crop": data.crop}
        numbers = batch.get(AUGMENTATION) if keys is not None else None
        return preprocess(current, following, **size, augment=data.augment.to_dict(), keys=keys, numbers=numbers)

    def cached_latents(self, batch: Batch, keys: jax.Array | None = None) -> dict[str, jax.Array]:
        """{`<group>_latent`: (B, V, T, h, w, C) float32} of the groups of which a batch holds latents or moments; of
        moments the mean, or with keys (B,) one sample of all groups."""
        of = {moments: [g for g in OF_FRAMES if latents_key(g, moments) in batch] for moments in (False, True)}
        found = {latents_key(g): batch[latents_key(g)].astype(jnp.float32) for g in of[False]}
        if groups := of[True]:  # sampled together, as frames are that are encoded together
            parts = [batch[latents_key(g, moments=True)] for g in groups]
            mean, logvar = jnp.split(jnp.concatenate(parts, axis=2).astype(jnp.float32), 2, axis=-1)
            latents = mean if keys is None else sample_posterior(mean, logvar, keys)
            ends = np.cumsum([part.shape[2] for part in parts])[:-1]
            found |= {latents_key(g): x for g, x in zip(groups, jnp.split(latents, ends, axis=2), strict=True)}
        return found

    def encode_frames(self, frozen: Params, frames: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Latents (B, V, T, h, w, C) of images; the posterior is sampled with keys (B,), else its mode."""
        assert self.codec is not None
        with jax.default_matmul_precision("highest" if self.config.model.dtype == "float32" else "default"):
            return jax.lax.stop_gradient(self.codec.encode(frozen, frames, keys))

    def step_keys(self, key: jax.Array, rows: jax.Array) -> StepKeys:
        """The keys of rows in one step; arguments as in `draws`."""
        keys = jax.vmap(functools.partial(jax.random.split, num=3))(row_keys(jax.random.fold_in(key, 1), rows)).T
        timestep, image, posterior = keys
        if self.config.data.augment.draw == "batch":  # one draw for all rows of the step
            image = jnp.broadcast_to(jax.random.fold_in(key, 2), image.shape)
        return StepKeys(timestep, image, posterior)

    def frames(self, frozen: Params, made: Mapping[str, jax.Array]) -> jax.Array:
        """Images (B, V, T, H, W, 3) float32 of a sample of `next_obs`, in [0, 1] units, not clipped."""
        if "next_obs_float" in made:
            return made["next_obs_float"]
        assert self.codec is not None
        with jax.default_matmul_precision("highest" if self.config.model.dtype == "float32" else "default"):
            return self.codec.decode(frozen, made["next_obs_latent"])

    def misfits(self, timestep: Mapping[str, np.ndarray]) -> list[str]:
        """Lines about given timesteps {modality: (B,)} that no draw of this system has, for people; [] for none."""
        return []

    def describe_sampling(self) -> dict[str, Any]:
        """How `sample` goes, for the files of results (JSON); {} for systems that do not sample in steps."""
        return {}


def draw_normal(key: jax.Array, rows: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """N(0, 1) noise {modality: (B, *shape)}, modalities in the order of `shapes`; row i depends on the key and
    `rows[i]` alone."""

    def one(row: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(key, row), len(shapes))
        # Drawn flat: the same numbers, but counters over many axes take XLA tens of seconds to compile on CPUs.
        flat = {m: jax.random.normal(k, (math.prod(shapes[m]),)) for m, k in zip(shapes, keys, strict=True)}
        return {m: x.reshape(shapes[m]) for m, x in flat.items()}

    return jax.vmap(one)(rows)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """(B,) keys, row i's from the key and `rows[i]` alone."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(rows)


def share_equally(counts: jax.Array) -> jax.Array:
    """Shares of rows in a mean over those that count: (B,) bool -> (B,) float32, which sum to 1, or to 0 if none
    counts."""
    return counts / jnp.maximum(counts.sum(), 1)


@dataclasses.dataclass(frozen=True)
class Fields:
    """The meaning of a system's config fields to the rest of the code; patterns of names such as `model.encoder.use_*`.

    Attributes:
      sampling: fields that change how a trained model samples, and may differ from the run's when it is used.
      shaping: fields that decide shapes of parameters.
      fixed: {field that changes what parameters mean without changing a shape: the interface of `TreeInfo` that frees
        it when it starts fresh, or None}.
      idle: {field: (flat config) -> whether it has no effect there}.
    """

    sampling: tuple[str, ...] = ()
    shaping: tuple[str, ...] = ()
    fixed: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    idle: Mapping[str, Callable[[Mapping[str, Any]], bool]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SystemType:
    """An entry of the registry.

    Attributes:
      name: the value of `config.system`.
      title: for reports.
      add_fields: adds the system's fields to a config that has the common ones: `model` (with `dtype`), `loss.weights`
        (one for each part) and what it needs besides; may change common defaults such as `data.window`.
      check: raises UserError for values of these fields, or combinations with common ones, that do not fit.
      make: (config, spec, codec) -> a System; raises UserError where config and data do not fit.
      tree: (config) -> about its parameters.
      uses, acting: as `System` has them.
      latents: the window's groups whose frames it reads only as latents of the codec, so that a cache may stand in for
        them; () for none.
      introduction: the system in a few sentences, for the page of a run.
      questions: {metric of a comparison, such as `paired/inverse_vs_policy/action_mse`: the question that it answers,
        positive is yes}, in the order in which a page asks them; others are asked in general words.
      fields: what the fields mean to the rest.
      choices: {field: values that it may take}.
      at_least_one: numbers of at least 1; others are at least 0.
      optional: {field that may be None: its type}.
      remarks: (config) -> lines about values that work but are seldom meant.
      official: names and layout of the official PyTorch checkpoints (`uwm_jax.torch_bridge.official_config.Official`),
        None for none.
    """

    name: str
    title: str
    add_fields: Callable[[ConfigDict], None]
    check: Callable[[ConfigDict], None]
    make: Callable[[ConfigDict, DataSpec, Codec | None], System]
    tree: Callable[[ConfigDict], TreeInfo]
    uses: Mapping[str, Use]
    acting: str
    latents: tuple[str, ...] = ()
    introduction: str = ""
    questions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Fields = Fields()
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    at_least_one: tuple[str, ...] = ()
    optional: Mapping[str, type] = dataclasses.field(default_factory=dict)
    remarks: Callable[[ConfigDict], list[str]] = lambda config: []
    official: Any = None
