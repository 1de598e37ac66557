"""Shows the contents of a training dataset: a contact sheet, histograms, and a summary.

    python -m data_prep.inspect --dataset=DIR [--output=DIR/inspect]     (or its name in $UWM_DATA_DIR)

Writes `contact_sheet.png` (a few episodes, every camera, frames evenly spaced in time), `actions.png`
(a histogram per action dimension) and `episode_lengths.png`.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from data_prep.contact_sheet import contact_sheet, note, printable
from data_prep.training_layout import summary
from uwm_jax import cli
from uwm_jax.data.records import Dataset, find_dataset, read_manifest
from uwm_jax.data.stats import counted_steps, is_action
from uwm_jax.errors import UserError
from uwm_jax.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLAGS = flags.FLAGS

_BINS = 60


def inspect(dataset: Dataset, output: Path, num_episodes: int = 6, num_frames: int = 8) -> list[str]:
    """Writes the pictures of a dataset into `output`.

    Returns:
        Remarks on suspicious data: black cameras, constant action dimensions.
    Raises:
        UserError: the directory cannot be created.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{output} cannot be created: {e.filename}: {e.strerror}. Choose another --output.") from e
    sheet, remarks = contact_sheet(dataset, num_episodes, num_frames)
    with replacing(output / "contact_sheet.png") as file:
        sheet.save(file)
    with replacing(output / "actions.png") as file:
        remarks += _plot_actions(dataset, file)
    with replacing(output / "episode_lengths.png") as file:
        _plot_lengths(dataset, file)
    return remarks


def _plot_actions(dataset: Dataset, file: Path) -> list[str]:
    keys = [k for k in dataset.column_keys if is_action(k)]
    if not keys:
        note("this dataset has no numeric step key that begins with `action`").save(file)
        return ["no actions"]
    panels = []
    shown = np.flatnonzero(counted_steps(dataset.episode_lengths, dataset.action_lengths()))
    shown = shown[:: max(1, len(shown) // 300_000)]
    for key in keys:
        # A few hundred thousand rows show the shape of any distribution.
        values = np.asarray(dataset.column(key)[shown], np.float64).reshape(len(shown), -1)
        panels += [(f"{key}[{i}]" if values.shape[1] > 1 else key, values[:, i]) for i in range(values.shape[1])]
    figure, remarks = _histograms(panels)
    figure.savefig(file, dpi=100)
    return remarks


def _histograms(panels: list[tuple[str, np.ndarray]]) -> tuple[Figure, list[str]]:
    """A panel per (name, values), and remarks on values that are never finite or constant."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(4 * columns, 2.4 * rows)
    remarks = []
    for i, (name, column) in enumerate(panels):
        axis = figure.add_subplot(rows, columns, i + 1)
        column = column[np.isfinite(column)]
        if not len(column):
            remarks.append(f"{name}: never finite")
            continue
        axis.hist(column, bins=_BINS)
        axis.set_yscale("log")
        title = [*textwrap.wrap(printable(name), 40), f"mean {column.mean():.3g}, std {column.std():.3g}"]
        axis.set_title("\n".join(title), fontsize=9, parse_math=False)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=5)
        if np.ptp(column) == 0:
            remarks.append(f"{name}: always {column[0]:g}")
    figure.supylabel("steps (log scale)")
    return figure, remarks


def _plot_lengths(dataset: Dataset, file: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    lengths = dataset.episode_lengths
    figure = _figure(8, 4)
    axis = figure.add_subplot()
    single = [n - 0.5 for n in range(lengths.min(), lengths.max() + 2)]  # edges of a bar for each length
    axis.hist(lengths, bins=single if len(single) <= _BINS + 1 else _BINS)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("steps in an episode")
    axis.set_ylabel("episodes")
    axis.set_title(
        f"{len(lengths)} episodes: shortest {lengths.min()}, median {np.median(lengths):g}, longest {lengths.max()}"
    )
    figure.savefig(file, dpi=100)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot there is no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def define_flags() -> None:
    flags.DEFINE_string("dataset", None, "training dataset: a directory, or its name in $UWM_DATA_DIR")
    flags.DEFINE_string("output", "", "directory for the pictures; default DATASET/inspect")
    flags.DEFINE_string("split", "", "split; default train, else the first")
    flags.DEFINE_integer("episodes", 6, "rows of the contact sheet", lower_bound=1)
    flags.DEFINE_integer("frames", 8, "columns of the contact sheet", lower_bound=1)


def main(call: cli.Call) -> None:
    directory = find_dataset(cli.required_path("dataset"))
    output = cli.optional_path("output") or directory / "inspect"
    manifest = read_manifest(directory)
    split = FLAGS.split or ("train" if "train" in manifest["splits"] else sorted(manifest["splits"])[0])
    remarks = inspect(Dataset(directory, split), output, FLAGS.episodes, FLAGS.frames)
    print(f"{directory}: {summary(manifest)}")
    for remark in remarks:
        print(f"  note: {remark}")
    print(f"wrote contact_sheet.png, actions.png and episode_lengths.png of split {split!r} to {output}")


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
