"""The flags that all commands share which make a training dataset, and the settings that they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from data_prep.codec import check_options
from uwm_jax.errors import UserError

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Options:
    """How `training_layout.build` makes a dataset.

    Attributes:
        chunk_steps: steps per record.
        shard_mb: size in MiB at which a new shard begins.
        codec_size: (height, width) at which the PCA codec is fitted; None: the cameras' own.
        pca_patch, pca_channels: side of its patches in pixels, and latent channels.
        val_ratio: share of episodes held out from the codec's fit (`config.data.val_ratio`).
        workers: processes (one per core if 0); each reads its own inputs.
        overwrite: replace an existing output.
        max_skipped: largest share of episodes that may be skipped, in each split and overall; one is always allowed.
    """

    chunk_steps: int = 16
    shard_mb: int = 256
    codec_size: tuple[int, int] | None = None
    pca_patch: int = 8
    pca_channels: int = 12
    val_ratio: float = 0.05
    workers: int = 0
    overwrite: bool = False
    max_skipped: float = 0.01

    def check(self) -> None:
        """Raises UserError that names the first option that is invalid for every dataset."""
        check_options(self.codec_size, self.pca_patch, self.pca_channels, self.val_ratio)
        if not 0 <= self.max_skipped <= 1:  # false for NaN too
            raise UserError(f"--max_skipped={self.max_skipped}: expected a share of the episodes, 0 <= share <= 1.")


def define_flags(max_skipped: float = Options.max_skipped) -> None:
    """Declares `--output` and the flags of `Options`; `max_skipped` is the command's default."""
    flags.DEFINE_string("output", None, "directory to create")
    flags.DEFINE_integer("chunk_steps", Options.chunk_steps, "steps per record", lower_bound=1)
    flags.DEFINE_integer("shard_mb", Options.shard_mb, "size of a shard in MiB", lower_bound=1)
    flags.DEFINE_list("codec_size", [], "H,W at which the PCA codec is fitted; default the cameras' size")
    flags.DEFINE_integer("pca_patch", Options.pca_patch, "side of the PCA codec's patches in pixels", lower_bound=1)
    flags.DEFINE_integer("pca_channels", Options.pca_channels, "latent channels of the PCA codec", lower_bound=1)
    flags.DEFINE_float(
        "val_ratio", Options.val_ratio, "share of episodes held out of the codec's fit, as config.data.val_ratio"
    )
    flags.DEFINE_integer("workers", Options.workers, "processes; 0 = one per core", lower_bound=0)
    flags.DEFINE_bool("overwrite", Options.overwrite, "replace an existing output")
    flags.DEFINE_float(
        "max_skipped", max_skipped, "largest share of episodes that may be skipped; one is always allowed"
    )


def from_flags() -> Options:
    """The settings of the flags of `define_flags`.

    Raises:
        UserError: a flag has no such value.
    """
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Options)}
    return Options(**values | {"codec_size": size("codec_size", FLAGS.codec_size)})


def size(flag: str, value: Sequence[str]) -> tuple[int, int] | None:
    """(height, width) of a list flag `H,W`; None if it is empty."""
    if not value:
        return None
    if len(value) != 2 or not all(n.isdigit() and int(n) > 0 for n in value):
        raise UserError(f"--{flag}: expected H,W in pixels, found {','.join(value)!r}.")
    return int(value[0]), int(value[1])
