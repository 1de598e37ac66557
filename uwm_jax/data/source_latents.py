"""The cached latents of a source: which caches it reads, whether they fit, and the latents of its windows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from uwm_jax.data.images import BLENDS, is_augmented
from uwm_jax.data.latents import LatentCache
from uwm_jax.data.order import mix
from uwm_jax.data.records import Dataset
from uwm_jax.data.spec import AUGMENTATION, Batch, CachedLatents, latents_key
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LatentUse:
    """The latents of its codec that a run reads.

    Attributes:
        codec: its name.
        groups: the window's groups whose frames are read as latents.
        moments: whether it samples posteriors, which takes their means and variances.
    """

    codec: str
    groups: tuple[str, ...]
    moments: bool


def augmentation(config: Any) -> dict[str, Any] | None:
    """The fields of `config.data` (given as `config`) that decide a draw, as a cache records them; None without."""
    if not is_augmented(config.resize, config.crop, config.augment):
        return None
    fields = {name: float(config.augment[name]) for name in (*BLENDS, "hue")}
    return {"random_crop": bool(config.augment.random_crop), **fields}


def expected_fields(config: Any, codec: str, split: str, camera: str, size: tuple[int, int]) -> dict[str, Any]:
    """{field: value} of a cache that training takes for the frames of `config.data` (given as `config`).

    Args:
        camera: the step key. size: (height, width) that its frames are resized to before `config.resize`.
    """
    return {
        "codec": codec,
        "split": split,
        "camera": camera,
        "frame_size": list(size),
        "resize": list(config.resize),
        "crop": list(config.crop),
        "augment": augmentation(config),
    }


class SourceLatents:
    """The caches of a source's cameras, and the latents of its windows.

    Args:
        dataset: of the source. where: what to call the source in messages.
        use: what the run reads.
        config: `config.data`.
        cameras: {step key: (height, width)} that its frames are resized to before `config.resize`.
        kept: (E,) bool, the episodes that the source uses.
    Raises:
        UserError: a camera has no cache, or one that does not fit, or lacks an episode.

    Attributes:
        caches: {step key: its cache}.
    """

    def __init__(
        self,
        dataset: Dataset,
        where: str,
        use: LatentUse,
        config: Any,
        cameras: Mapping[str, tuple[int, int]],
        kept: np.ndarray,
    ):
        self._use, self._window = use, WindowSpec.from_config(config.window)
        self._lengths = dataset.episode_lengths
        self.caches: dict[str, LatentCache] = {}
        for key, size in cameras.items():
            expected = expected_fields(config, use.codec, dataset.split, key, size)
            try:
                cache = self.caches[key] = LatentCache(dataset, use.codec, key, expected, config.read_timeout_seconds)
            except UserError as e:
                raise UserError(f"config.data.latents={use.codec!r}: {where}: {e}") from e
            self._check(cache, where, kept)

    def _check(self, cache: LatentCache, where: str, kept: np.ndarray) -> None:
        at = f"config.data.latents={self._use.codec!r}: {where}: {cache.sidecar.directory}"
        if self._use.moments and not cache.sidecar.fields["moments"]:
            raise UserError(
                f"{at} stores the posterior's mode, but config.model.codec.posterior is 'sample': set it to 'mode', or "
                "make the cache with --moments, which stores mean and variance."
            )
        if len(lacking := np.flatnonzero(kept & ~cache.layout.has)):
            raise UserError(
                f"{at} lacks {len(lacking)} of the {int(kept.sum())} episodes that are used, the first is episode "
                f"{lacking[0]}. Make it for this choice of episodes, or for all: python -m data_prep.latents "
                "--episodes=all --overwrite."
            )

    def cached(self) -> CachedLatents:
        """The part of these latents that batches hold."""
        cache = next(iter(self.caches.values()))
        height, width, channels = cache.sidecar.fields["latent"]
        return CachedLatents(
            groups=self._use.groups,
            shape=(height, width, channels),
            dtype=cache.sidecar.fields["dtype"],
            moments=self._use.moments,
            augmented=cache.augmented,
        )

    def are_in(self, keys: Container[str]) -> bool:
        """Whether a batch with these keys has latents."""
        return latents_key(self._use.groups[0], self._use.moments) in keys

    @property
    def identity(self) -> str:
        """Identifies the content of all caches."""
        return hashlib.sha256("".join(c.sidecar.digest for c in self.caches.values()).encode()).hexdigest()

    def begin(self, views: Sequence[str], shown: Mapping[str, tuple[Any, str]], draw: int) -> None:
        """Starts to read what `load` with the same arguments takes, where that saves time: from a bucket."""
        for number, view in enumerate(views):
            if view in shown:
                clip, key = shown[view]
                for group in self._use.groups:
                    cache = self.caches[key]
                    cache.begin(clip.episode, self._steps(group, clip), _variant(draw, number, cache))

    def _steps(self, group: str, clip: Any) -> list[int]:
        return self._window.steps(self._window.groups[group], clip.origin, int(self._lengths[clip.episode]))

    def load(
        self,
        batch: Batch,
        at: int,
        views: Sequence[str],
        shown: Mapping[str, tuple[Any, str]],
        draw: int,
    ) -> None:
        """Writes the latents of a sample into place `at` of a batch, and the draws that they were made with.

        Args:
            views: all views of the model, sorted.
            shown: {view: (clip, step key)} of those that show a camera; the others are black.
            draw: a number of 64 random bits that belongs to the sample, of which each view's variant is a function.
        """
        arrays = {group: batch[latents_key(group, self._use.moments)] for group in self._use.groups}
        for number, view in enumerate(views):
            if view not in shown:
                for latents in arrays.values():
                    next(iter(self.caches.values())).read_black(latents[at, number])
                if AUGMENTATION in batch:
                    batch[AUGMENTATION][at, number] = 0.0
                continue
            clip, key = shown[view]
            cache = self.caches[key]
            variant = _variant(draw, number, cache)
            for group, latents in arrays.items():
                cache.read(clip.episode, self._steps(group, clip), variant, latents[at, number])
            if AUGMENTATION in batch:
                batch[AUGMENTATION][at, number] = cache.numbers(clip.episode, variant)

    def close(self) -> None:
        """Closes the files."""
        for cache in self.caches.values():
            cache.close()


def _variant(draw: int, number: int, cache: LatentCache) -> int:
    """The variant of a view's number that a sample shows."""
    return mix(mix(draw ^ 0x76617269616E7473) ^ number) % cache.variants


def cached_of(sources: Mapping[str, SourceLatents]) -> CachedLatents:
    """The latents that batches of all sources hold, {name: its latents}.

    Raises:
        UserError: two caches differ in the shape or the dtype of their latents.
    """
    found = {name: source.cached() for name, source in sources.items()}
    first, expected = next(iter(found.items()))
    for name, cached in found.items():
        for field in ("shape", "dtype"):
            if (ours := getattr(cached, field)) != (theirs := getattr(expected, field)):
                raise UserError(
                    f"config.data.latents: source {name!r} has latents of {field} {ours}, source {first!r} of "
                    f"{theirs}: one batch needs the same in all. Make one of them again: python -m data_prep.latents "
                    "--overwrite."
                )
    return expected
