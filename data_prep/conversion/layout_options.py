"""The flags that all commands share which make a training dataset, and the settings that they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from data_prep.conversion.codec import check_options
from data_prep.jobs import shares
from data_prep.jobs.output import local_output
from data_prep.sources.pictures import ENCODINGS, Pictures
from uwm_jax import cli
from uwm_jax.errors import UserError
from uwm_jax.files import Place

FLAGS = flags.FLAGS

_MOST_PIXELS = 8192  # of a side: larger frames would take all memory


@dataclasses.dataclass(frozen=True)
class Options:
    """How `training_layout.build` makes a dataset.

    Attributes:
        chunk_steps: steps per record. A window needs few of the frames of a record, of which all bytes are read and
            verified, so 8 are read faster than 16 (docs/benchmarks.md).
        shard_mb: size in MiB at which a new shard begins.
        codec_size: (height, width) at which the PCA codec is fitted; None: the cameras' own.
        pca_patch, pca_channels: side of its patches in pixels, and latent channels.
        val_ratio: share of episodes held out from the codec's fit (`config.data.val_ratio`).
        workers: processes (one per core if 0); each reads its own inputs.
        overwrite: replace an existing output.
        max_skipped: largest share of episodes that may be skipped, in each split and overall; one is always allowed.
        resize: (height, width) of all cameras, whose images are then encoded again, as JPEG; None: bytes untouched.
        task: (i, n) to do only every n-th task from the i-th on, of 0 to n - 1; None: all, and make the dataset.
        assemble: make the dataset of tasks that are all done.
        beam: options of the Beam pipeline that does the tasks; None: processes of this one.
    """

    chunk_steps: int = 8
    shard_mb: int = 256
    codec_size: tuple[int, int] | None = None
    pca_patch: int = 8
    pca_channels: int = 12
    val_ratio: float = 0.05
    workers: int = 0
    overwrite: bool = False
    max_skipped: float = 0.01
    resize: tuple[int, int] | None = None
    task: shares.Share | None = None
    assemble: bool = False
    beam: tuple[str, ...] | None = None

    def check(self) -> None:
        """Raises UserError that names the first option that is invalid for every dataset."""
        check_options(self.codec_size, self.pca_patch, self.pca_channels, self.val_ratio)
        if not 0 <= self.max_skipped <= 1:  # false for NaN too
            raise UserError(f"--max_skipped={self.max_skipped}: expected a share of the episodes, 0 <= share <= 1.")
        shares.check(self.task, self.assemble)
        if self.beam is not None and (self.task is not None or self.assemble):
            raise UserError("--beam does all tasks and makes the dataset: give neither --task nor --assemble with it.")

    @property
    def content(self) -> dict[str, Any]:
        """The flags that change the dataset, as JSON values: a killed job continues only with the same."""
        how = ("workers", "overwrite", "max_skipped", "task", "assemble", "beam")
        return {f"--{name}": value for name, value in dataclasses.asdict(self).items() if name not in how}


def define_flags(
    max_skipped: float = Options.max_skipped,
    resize: str = "H,W of all cameras: images are resized to it and encoded again as JPEG; default: bytes untouched",
) -> None:
    """Declares `--output` and the flags of `Options`.

    Args:
        max_skipped: the command's default.
        resize: the help of `--resize`, where the command resizes by a rule of its own.
    """
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
    flags.DEFINE_list("resize", [], resize)
    flags.DEFINE_bool("beam", False, "do the tasks on an Apache Beam pipeline; options after ` -- ` are the pipeline's")
    cli.pass_on()
    shares.define_flags("dataset")


def define_flags_of_pictures(which: str) -> None:
    """As `define_flags`, with the flags of `Pictures`; `which` are encoded, for the help."""
    flags.DEFINE_enum("encoding", Pictures.encoding, ENCODINGS, f"encoding of {which}")
    flags.DEFINE_integer("quality", Pictures.quality, "JPEG quality of these", lower_bound=1, upper_bound=100)
    define_flags(resize="H,W of all cameras: resized to it before they are encoded; default: their own")


def pictures() -> Pictures:
    """What the flags of `define_flags_of_pictures` say."""
    return Pictures(FLAGS.encoding, FLAGS.quality, size("resize", FLAGS.resize))


def from_flags(call: cli.Call) -> Options:
    """The settings of the flags of `define_flags`.

    Raises:
        UserError: a flag has no such value.
    """
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Options)}
    values |= {name: size(name, values[name]) for name in ("codec_size", "resize")}
    if call.passed_on and not FLAGS.beam:
        raise UserError(f"{' '.join(call.passed_on)}: what follows ` -- ` is for Beam. Give --beam, or leave it out.")
    return Options(**values | {"task": shares.from_flags(), "beam": call.passed_on if FLAGS.beam else None})


def output() -> Place:
    """The path of `--output`, which may be in a bucket with `--beam`; raises UserError as `output.local_output`."""
    return cli.required_path("output") if FLAGS.beam else local_output()


def size(flag: str, value: Sequence[str]) -> tuple[int, int] | None:
    """(height, width) of a list flag `H,W`; None if it is empty."""
    if not value:
        return None
    if len(value) != 2 or not all(n.isdecimal() and len(n) < 10 and 0 < int(n) <= _MOST_PIXELS for n in value):
        raise UserError(
            f"--{flag}: expected H,W in pixels, at most {_MOST_PIXELS} each, found {','.join(value)[:60]!r}."
        )
    return int(value[0]), int(value[1])
