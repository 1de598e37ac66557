"""Makes a dataset without actions in the training layout of video files.

    python -m data_prep.videos --input=DIR_OR_GLOB --output=DIR --resize=H,W --fps=N

Every file is an episode, or with `--layout` all files that show one episode from different cameras. Frames are chosen
by their exact times, resized to cover H x W, cropped in the centre, and stored as JPEG. What cannot be used is counted
by reason in `manifest.json`, and the first hundred files of each reason are named there. A source of
`config.data.sources` with `use_actions=False` trains on it.
"""

from __future__ import annotations

from fractions import Fraction

from absl import flags

from data_prep.conversion import layout_options
from data_prep.conversion.training_layout import run
from data_prep.sources.decoding import import_av, time_limit
from data_prep.sources.videos.clips import Sampling
from data_prep.sources.videos.corpus import corpus
from data_prep.sources.videos.labels import read_labels
from uwm_jax import cli
from uwm_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string(
        "input", None, "folder of videos, a pattern such as 'clips/*.webm', or a text file with one path per line"
    )
    flags.DEFINE_float(
        "fps",
        None,
        "steps per second: the frames nearest in time, none of them twice (slower clips are skipped)",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "every", None, "instead of --fps: every so many frames are a step; 2 is the official rule", lower_bound=1
    )
    flags.DEFINE_integer("min_steps", Sampling.min_steps, "steps of the shortest episode", lower_bound=1)
    flags.DEFINE_integer("quality", Sampling.quality, "of the JPEGs", lower_bound=1, upper_bound=100)
    flags.DEFINE_string(
        "labels", None, "instructions: CSV with the columns file,text, Kinetics' CSV or Something-Something's JSON"
    )
    flags.DEFINE_string(
        "layout", "", "joins files by time that differ in {camera} alone, such as {episode}/{camera}.mp4"
    )
    flags.DEFINE_list("cameras", [], "names of the cameras; default image, or those that --layout finds")
    flags.DEFINE_float("seconds", 300.0, "time limit for decoding one file", lower_bound=0)
    flags.DEFINE_integer("max_mb", 1024, "MiB of the largest file that is read", lower_bound=1)
    layout_options.define_flags(
        max_skipped=1.0, resize="H,W in pixels of the stored images: the size of the robot's; required"
    )


def main(call: cli.Call) -> None:
    source, output = cli.required_local_path("input"), layout_options.output()
    size = layout_options.size("resize", FLAGS.resize)
    if size is None:
        raise UserError("--resize=H,W is required: the size of the robot's images in pixels.")
    if (FLAGS.fps is None) == (FLAGS.every is None):
        raise UserError("Expected one of --fps=N (steps per second) and --every=N (one step for every N frames).")
    if FLAGS.fps is not None and not 0 < FLAGS.fps < 1e6:
        raise UserError(f"--fps={FLAGS.fps:g}: expected a positive number of steps per second.")
    seconds = time_limit(FLAGS.seconds)
    import_av()
    fps = None if FLAGS.fps is None else Fraction(str(FLAGS.fps))
    sampling = Sampling(size, fps, FLAGS.every or 1, FLAGS.min_steps, FLAGS.quality)
    labels = cli.optional_local_path("labels")
    run(
        lambda: corpus(
            source,
            sampling,
            layout=FLAGS.layout,
            cameras=FLAGS.cameras,
            labels=read_labels(labels) if labels else None,
            seconds=seconds,
            max_mb=FLAGS.max_mb,
        ),
        output,
        layout_options.from_flags(call),
        source,
    )


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
