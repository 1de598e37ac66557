"""Shows the contents of a training dataset, or of the data of a run, as a page.

    python -m data_prep.inspect --dataset=DIR [--output=DIR/inspect]     (or its name in $UWM_DATA_DIR)
    python -m data_prep.inspect --workdir=DIR [--trace=STEP:ROW]         (or --config=FILE.py --output=DIR)

The first writes one page, `index.html`, that opens offline: frames of a few episodes, histograms, idle steps, columns
of two values, angles that wrap, discontinuities, lengths, language. The second shows what a run draws its samples from,
and makes a row of a batch again that training saw, from the run's own history of weights, its arrays in a file.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags
from PIL import Image, ImageDraw

from data_prep.checks.column_facts import ColumnFacts
from data_prep.checks.contact_sheet import contact_sheet, font_of, note, printable
from data_prep.checks.page import Language, dataset_page, facts_of, language_of, run_page, traced_row
from data_prep.checks.trace import TracedRow, open_run, traced
from data_prep.conversion.training_layout import main_split, summary
from data_prep.jobs.output import local_output, local_place
from uwm_jax import cli, config_help
from uwm_jax import config as config_lib
from uwm_jax.data.normalize import is_constant
from uwm_jax.data.places import find_dataset
from uwm_jax.data.records import Dataset, read_manifest
from uwm_jax.data.run_data import RunData
from uwm_jax.data.stats import counted_lengths, counted_steps, is_action
from uwm_jax.errors import UserError
from uwm_jax.files import replacing, write_text, writing
from uwm_jax.hub.runs import origin_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLAGS = flags.FLAGS

_BINS = 60
_IDLE = 0.2  # a larger share of idle steps is remarked
_MOST_TILES = 64  # a larger contact sheet would take all memory
_MOST_PANELS, _MOST_DRAWN = 32, 128  # dimensions of a column, and of all of them, that are drawn
_MOST_NAMED = 10  # dimensions in a remark
_SEEN = 128  # pixels of height up to which a small frame is enlarged, each pixel by the same whole number


PAGE = "index.html"


def inspect(dataset: Dataset, output: Path, num_episodes: int = 6, num_frames: int = 8) -> list[str]:
    """Writes the pictures and the page of a split into `output`.

    Returns:
        Remarks on suspicious data: black cameras, constant dimensions, many idle steps, discontinuities.
    Raises:
        UserError: the directory cannot be created.
    """
    _make(output)
    sheet, remarks = contact_sheet(dataset, num_episodes, num_frames)
    if sheet is None:
        (output / "contact_sheet.png").unlink(missing_ok=True)  # of a dataset that was here before
    else:
        with replacing(output / "contact_sheet.png") as file:
            sheet.save(file)
    facts = facts_of(dataset)
    language = language_of(dataset)
    actions = [key for key in facts if is_action(key)]
    states = [key for key in facts if key.startswith("observation/") and not is_action(key)]
    if not actions:
        remarks.append("no actions: no numeric step key begins with `action`")
    if not states:
        remarks.append("no states: no numeric step key lies below `observation/`")
    remarks += _plot(dataset, actions, output / "actions.png") + _plot(dataset, states, output / "states.png")
    with replacing(output / "episode_lengths.png") as file:
        _plot_lengths(dataset, file)
    remarks += _about(facts) + _about_language(language)
    about = summary(dataset.manifest)
    write_text(output / PAGE, dataset_page(dataset, about, remarks, facts, language, output))
    return remarks


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{output} cannot be created: {e.filename}: {e.strerror}. Choose another --output.") from e


def _about(facts: Mapping[str, ColumnFacts]) -> list[str]:
    """Remarks on columns that a model would learn from."""
    lines = []
    for key, found in facts.items():
        width = len(found.low)
        never = [i for i in range(width) if found.low[i] > found.high[i]]
        lines += [f"{key}: never finite in {_some([f'[{i}]' for i in never])}"] if never else []
        constant = np.flatnonzero(is_constant(found.low, found.high) & (found.low <= found.high))
        if is_action(key) and len(constant):
            lines.append(f"{key}: constant in {_some([f'[{i}] = {found.low[i]:g}' for i in constant])}")
    for key, found in facts.items():
        moves = is_action(key) or key.startswith("observation/")
        # One number, such as a gripper's or the reward, is still most of the time.
        if moves and len(found.low) > 1 and found.idle > _IDLE and (found.high > found.low).any():
            lines.append(f"{key}: {found.idle:.0%} of the steps change nothing; data_prep.ranges leaves out idle steps")
        if found.wraps:
            which = _some([f"[{i}] ({count})" for i, count in found.wraps.items()])
            lines.append(f"{key}: turns through +-pi in {which}; of Euler angles, xyz_euler_to_rot6d has none")
        if found.jumps:
            _, episode, step = max(found.jumps.values())
            which = _some([f"[{i}] ({count})" for i, (count, *_) in found.jumps.items()])
            lines.append(f"{key}: discontinuities in {which}, such as episode {episode}, step {step}")
    return lines


def _about_language(language: Language) -> list[str]:
    if not language.texts:
        return ["no instructions: no string whose key names language or instructions"]
    share = f"{language.without} of the {language.read} episodes read"
    return [f"{share} have no instruction"] if language.without else []


def _some(names: list[str]) -> str:
    more = [f"{len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return ", ".join([*names[:_MOST_NAMED], *more])


def inspect_run(
    data: RunData,
    total_samples: int,
    title: str,
    output: Path,
    found: TracedRow | None = None,
    at: tuple[int, int] = (0, 0),
) -> Path:
    """Writes the page of a run's data, with a row of a batch where one was traced; returns where.

    Args:
        total_samples: of all steps of the run.
        found: the row of the step and row `at`; its arrays are written next to the page.
    """
    _make(output)
    if found is None:
        write_text(output / PAGE, run_page(title, data, total_samples))
        return output / PAGE
    name = f"trace_{at[0]}_{at[1]}"
    with writing(output / f"{name}.npz", "wb") as file:
        np.savez(file, allow_pickle=False, **found.batch)
    with replacing(output / f"{name}.png") as picture:
        _frames(found).save(picture)
    body = traced_row(data, found, output / f"{name}.png", *at)
    write_text(output / f"{name}.html", run_page(title, data, total_samples, body))
    return output / f"{name}.html"


def _frames(found: TracedRow) -> Image.Image:
    """The frames of a row, a strip for each of its keys."""
    strips = {}
    for key, x in found.batch.items():
        if x.dtype == np.uint8:
            larger = max(1, _SEEN // x.shape[2])
            strips[key] = x[0].repeat(larger, axis=1).repeat(larger, axis=2)
    if not strips:
        return note("this window has no frames")
    height = 18 + max(x.shape[1] for x in strips.values())
    width = max(x.shape[0] * (x.shape[2] + 4) for x in strips.values())
    sheet = Image.new("RGB", (max(width, 240), height * len(strips)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (key, frames) in enumerate(strips.items()):
        draw.text((2, i * height), printable(key), "black", font_of(12))
        for j, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame), (j * (frame.shape[1] + 4), i * height + 18))
    return sheet


def _plot(dataset: Dataset, keys: list[str], file: Path) -> list[str]:
    """Writes histograms of the dimensions of some columns; without a column, there is no such file afterwards.

    Returns:
        Remarks on dimensions that are not drawn.
    """
    if not keys:
        file.unlink(missing_ok=True)
        return []
    panels: list[tuple[str, np.ndarray]] = []
    remarks = []
    for key in keys:
        width = int(np.prod(dataset.column(key).shape[1:], dtype=np.int64))
        drawn = min(width, _MOST_PANELS, _MOST_DRAWN - len(panels))
        if drawn < width:
            remarks.append(f"{key}: {width - drawn} of {width} dimensions are not drawn")
        if not drawn:
            continue
        shown = np.flatnonzero(counted_steps(dataset.episode_lengths, counted_lengths(dataset, key)))
        # A few hundred thousand rows show the shape of any distribution.
        shown = shown[:: max(1, len(shown) // 300_000)]
        values = np.asarray(dataset.column(key)[shown], np.float64).reshape(len(shown), -1)
        panels += [(f"{key}[{i}]" if width > 1 else key, values[:, i].copy()) for i in range(drawn)]
    figure = _histograms(panels)
    with replacing(file) as place:
        figure.savefig(place, dpi=100)
    return remarks


def _histograms(panels: list[tuple[str, np.ndarray]]) -> Figure:
    """A panel per (name, values); an empty one where no value is finite."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(3.1 * columns, 2.4 * rows)  # at 100 dots per inch no wider than the page
    for i, (name, column) in enumerate(panels):
        axis = figure.add_subplot(rows, columns, i + 1)
        column = column[np.isfinite(column)]
        about = "never finite"
        if len(column):
            axis.hist(column, bins=_edges(column).tolist())
            axis.set_yscale("log")
            about = f"mean {column.mean():.3g}, std {column.std():.3g}"
        title = [*textwrap.wrap(printable(name), 34), about]
        axis.set_title("\n".join(title), fontsize=9, parse_math=False)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=4)
    figure.supylabel("steps (log scale)")
    return figure


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of a histogram's bars; fewer where neighbouring floats are farther apart than `_BINS` bars."""
    low, high = float(values.min()), float(values.max())
    around = 0.0 if high > low else max(0.5, 1e-3 * abs(low))
    return np.unique(np.linspace(low - around, high + around, _BINS + 1))


def _plot_lengths(dataset: Dataset, file: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    lengths = dataset.episode_lengths
    figure = _figure(8, 4)
    axis = figure.add_subplot()
    low, high = int(lengths.min()), int(lengths.max())
    if high - low < _BINS:  # a bar for each length, and room for ticks next to it
        axis.hist(lengths, bins=[n - 0.5 for n in range(low, high + 2)])
        axis.set_xlim(low - 2, high + 2)
    else:
        axis.hist(lengths, bins=_BINS)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("steps in an episode")
    axis.set_ylabel("episodes")
    axis.set_title(
        f"{len(lengths)} episode{'s' * (len(lengths) != 1)}: shortest {low}, median {np.median(lengths):g}, "
        f"longest {high}"
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
    flags.DEFINE_string("config", None, "FILE.py[:argument]: shows the mixture that a run of it would train on")
    flags.DEFINE_string("workdir", None, "directory of a run, or owner/name[@revision] on the hub: shows its mixture")
    flags.DEFINE_string("trace", "", "STEP:ROW, a row of a batch that the run of --workdir saw; steps count from 1")
    flags.DEFINE_string("output", "", "directory for the pages; default inspect/ inside the dataset or workdir")
    flags.DEFINE_string("split", "", "split; default train, else the first")
    flags.DEFINE_integer("episodes", 6, "rows of the contact sheet", lower_bound=1, upper_bound=_MOST_TILES)
    flags.DEFINE_integer("frames", 8, "columns of the contact sheet", lower_bound=1, upper_bound=_MOST_TILES)
    cli.accept_config_overrides(config_help.describe)


def main(call: cli.Call) -> None:
    given = [name for name in ("dataset", "config", "workdir") if FLAGS[name].value]
    if len(given) != 1:
        which = ", ".join(f"--{name}" for name in given) or "none of them"
        raise UserError(f"expected one of --dataset, --config and --workdir, found {which}.")
    if FLAGS.trace and given != ["workdir"]:
        raise UserError("--trace needs --workdir: which row a step sees is decided by a run.")
    if given == ["dataset"]:
        return _inspect_dataset()
    if given == ["config"]:
        output = local_output()
        config = config_lib.load(FLAGS.config, call.overrides)
        data, state, start = RunData(config.data, seed=config_lib.data_seed(config)), None, 0
    else:
        workdir = cli.required_run()
        in_cache = origin_of(workdir)  # of the hub, which pages do not belong into
        output = local_output() if in_cache or FLAGS.output else local_place(workdir / "inspect", "--output")
        config, data, state, start = open_run(workdir, call.overrides)
    step, row = _parse(FLAGS.trace) if FLAGS.trace else (0, 0)
    found = traced(data, config.batch_size, state, start, step, row) if FLAGS.trace else None
    title = f"Data of {FLAGS.config or FLAGS.workdir}"
    page = inspect_run(data, config.total_steps * config.batch_size, title, output, found, (step, row))
    data.close()
    print(data.summary())
    if found:
        source, dataset, shard, episode, origin = found.place
        where = f"source {source}, {dataset}, {shard}, episode {episode}, window from step {origin}"
        print(f"step {step}, row {row}: {where}{', replaced: it needs a bad record' if found.replaced else ''}")
    print(f"wrote {page}")


def _parse(text: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"(\d{1,12}):(\d{1,9})", text)
    if not numbers:
        raise UserError(f"--trace={text}: expected STEP:ROW, such as 1000:3.")
    return int(numbers[1]), int(numbers[2])


def _inspect_dataset() -> None:
    directory = find_dataset(cli.required("dataset"))
    output = local_output() if FLAGS.output else local_place(directory / "inspect", "--output")
    manifest = read_manifest(directory)
    split = FLAGS.split or main_split(manifest)
    remarks = inspect(Dataset(directory, split), output, FLAGS.episodes, FLAGS.frames)
    print(f"{directory}: {summary(manifest)}")
    for remark in remarks:
        print(f"  note: {remark}")
    print(f"wrote {output / PAGE}, and its pictures next to it, of split {split!r}")


command = cli.command(main, define_flags)

if __name__ == "__main__":
    command()
