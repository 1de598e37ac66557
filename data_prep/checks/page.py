"""The page of `data_prep.inspect`: one HTML file that opens offline."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.checks.column_facts import ColumnFacts, column_facts
from data_prep.checks.contact_sheet import instruction, instructions, spread
from data_prep.checks.trace import TracedRow
from uwm_jax.data.faults import BAD
from uwm_jax.data.mixture import shares_of
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData
from uwm_jax.data.stats import counted_lengths
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.page import NOTHING, Section, figure, head, number_head, page, table, two_lines

MOST_READ = 512  # episodes whose instructions are read: each costs a record
_MOST_SHOWN = 10  # instructions in a table, dimensions in a cell


def facts_of(dataset: Dataset) -> dict[str, ColumnFacts]:
    """Facts about all columns but RLDS's marks, by step key; actions without those that `is_last` marks."""
    marks = ("is_first", "is_last", "is_terminal")
    keys = [key for key in dataset.column_keys if key.rpartition("/")[2] not in marks]
    return {key: column_facts(dataset, key, counted_lengths(dataset, key)) for key in keys}


class Language(NamedTuple):
    """The instructions of some episodes.

    Attributes:
        texts: {key: {instruction: number of episodes}}; "" is an episode without.
        read: number of episodes that were read, evenly spaced.
        without: of these, the episodes that have no instruction under any key.
    """

    texts: Mapping[str, collections.Counter[str]]
    read: int
    without: int


def language_of(dataset: Dataset) -> Language:
    """The instructions of at most `MOST_READ` episodes."""
    episodes = spread(dataset.num_episodes, MOST_READ)
    texts: dict[str, collections.Counter[str]] = {}
    without = 0
    for episode in episodes:
        found = instructions(dataset, episode)
        without += not any(found.values())
        for key, text in found.items():
            texts.setdefault(key, collections.Counter())[text] += 1
    return Language(texts, len(episodes), without)


def dataset_page(
    dataset: Dataset,
    about: str,
    remarks: Sequence[str],
    facts: Mapping[str, ColumnFacts],
    language: Language,
    at: Path,
) -> str:
    """The page of a split; of pictures that are not there, it has no section.

    Args:
        about: the summary of the dataset, lines of text.
        at: the folder with the pictures.
    """
    notes = fill("<ul>{}</ul>", [fill("<li>{}</li>", remark) for remark in remarks]) if remarks else NOTHING
    sections = [
        Section("remarks", "What stands out", notes),
        Section(
            "frames", "Frames", _picture(at, "contact_sheet.png", "Evenly spaced episodes, every camera over time.")
        ),
        Section("columns", "Columns", _columns(facts)),
        Section(
            "actions",
            "Actions",
            _picture(
                at,
                "actions.png",
                "Number of steps with each value (log scale); above, the dimension, its mean and standard deviation.",
            ),
        ),
        Section(
            "states",
            "States",
            _picture(
                at,
                "states.png",
                "Number of steps with each value (log scale); above, the dimension, its mean and standard deviation.",
            ),
        ),
        Section("lengths", "Lengths", _picture(at, "episode_lengths.png", "Steps in an episode.")),
        Section("language", "Language", _language(dataset, language)),
    ]
    top = fill("<h1>{}: {}</h1><pre>{}</pre>", dataset.directory.name, dataset.split, about)
    return page(f"{dataset.directory.name}: {dataset.split}", top, sections)


def _picture(folder: Path, name: str, caption: str) -> Html:
    return figure(folder / name, caption, caption)


def _columns(facts: Mapping[str, ColumnFacts]) -> Html:
    heads = ["key", number_head("dimensions"), "range", number_head("idle", "share of steps that change nothing")]
    jumps = fill('<th scope="col">{}</th>', two_lines("discontinuities", "number, and place of the largest"))
    heads += ["two values", "turns through ±π", jumps]
    rows = []
    for key, found in facts.items():
        ranges = zip(found.low, found.high, strict=True)
        ends = [
            f"[{i}]:\u00a0{low:.4g}\u00a0to\u00a0{high:.4g}" if low <= high else f"[{i}]:\u00a0never finite"
            for i, (low, high) in enumerate(ranges)
        ]
        rows.append(
            [
                head(fill("<code>{}</code>", key)),
                fill('<td class="number">{}</td>', len(found.low)),
                _listed(ends),
                fill('<td class="number">{}</td>', f"{found.idle:.1%}"),
                _listed([f"[{i}]:\u00a0{low:g}\u00a0or\u00a0{high:g}" for i, (low, high) in found.two_valued.items()]),
                _listed([f"[{i}]: {count}" for i, count in found.wraps.items()]),
                _listed(
                    [
                        f"[{i}]: {count}, episode {episode}, step {step}".replace(" ", "\u00a0")
                        for i, (count, episode, step) in found.jumps.items()
                    ]
                ),
            ]
        )
    return table(heads, rows, "columns")


def _listed(lines: Sequence[str]) -> Html:
    more = [f"and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    return fill("<td>{}</td>", [fill("{}<br>", line) for line in [*lines[:_MOST_SHOWN], *more]])


def _language(dataset: Dataset, language: Language) -> Html:
    """How many episodes have an instruction, and the commonest ones."""
    if not language.texts:
        return fill("<p>No string whose key names language or instructions.</p>")
    rows = []
    for key, counts in language.texts.items():
        texts = counts.copy()
        del texts[""]
        common = [f"{count} × {text}" for text, count in texts.most_common(_MOST_SHOWN)]
        share = fill('<td class="number">{}</td>', f"{texts.total() / counts.total():.1%}")
        distinct = fill('<td class="number">{}</td>', len(texts))
        rows.append([head(fill("<code>{}</code>", key)), share, distinct, _listed(common)])
    read = f"{language.read} of {dataset.num_episodes} episodes, evenly spaced, were read."
    heads = ["key", number_head("with text"), number_head("distinct"), "commonest"]
    return fill("<p>{}</p>{}", read, table(heads, rows, "language"))


# --- a run's data ------------------------------------------------------------------------------------------------


def mixture(data: RunData, total_samples: int) -> list[dict[str, Any]]:
    """A row for each source: episodes, windows, its share of the samples, and how often a run of `total_samples`
    samples shows each of its windows."""
    shares = shares_of({name: source.weight for name, source in data.sources.items()})
    rows = []
    for name, source in data.sources.items():
        windows, share = len(source.windows), float(shares[name])
        rows.append(
            {
                "source": name,
                "dataset": f"{source.dataset.directory} ({source.dataset.split})",
                "use": "actions and frames" if source.use_actions else "frames alone",
                "episodes": len(source.episodes),
                "of": source.dataset.num_episodes,
                "held_out": len(source.held_out),
                "windows": windows,
                "share": share,
                "passes": share * total_samples / windows,
            }
        )
    return rows


def run_page(title: str, data: RunData, total_samples: int, trace: Html = NOTHING) -> str:
    """The page of a run's data: what each source gives, and a row of a batch."""
    heads = ["source", "dataset", "used for", number_head("training episodes", "of all"), number_head("held out")]
    heads += [number_head("windows"), number_head("share of samples"), number_head("passes", "in all steps")]
    rows = []
    for row in mixture(data, total_samples):
        numbers = [f"{row['episodes']} of {row['of']}", row["held_out"], f"{row['windows']:,}"]
        numbers += [f"{row['share']:.1%}", f"{row['passes']:.3g}"]
        rows.append(
            [head(row["source"]), row["dataset"], row["use"]]
            + [fill('<td class="number">{}</td>', number) for number in numbers]
        )
    body = fill("{}<pre>{}</pre>", table(heads, rows, "mixture"), data.summary())
    sections = [Section("mixture", "Sources", body), Section("trace", "A row of a batch", trace)]
    return page(title, fill("<h1>{}</h1>", title), sections)


def traced_row(data: RunData, found: TracedRow, picture: Path, step: int, row: int) -> Html:
    """Contents of a row of a batch: its place, its frames, its numbers.

    Args:
        picture: its frames.
    """
    place = found.place
    facts = {
        "step, row": f"{step}, {row}",
        "source": place.source,
        "dataset": place.dataset,
        "shard": place.shard,
        "episode": place.episode,
        "first step of the window": place.origin,
        "instruction": _instruction(data.sources[place.source].dataset, place.episode),
        "weights of the mixture": "as recorded"
        if found.known
        else "of the config: no checkpoint lies behind this step",
    }
    if found.replaced:
        facts["shown"] = "another sample, in place of this one, which needs a bad record"
    listed = [fill("<dt>{}</dt><dd>{}</dd>", name, value) for name, value in facts.items()]
    rows = []
    for key, values in found.batch.items():
        value = values[0]
        if value.dtype == np.uint8 and value.ndim == 4:
            continue
        name = "action" if key == "action" else key.removeprefix("obs/")
        raw = np.asarray(data.spec.normalizer.unnormalize(name, value)) if name in data.spec.widths else None
        rows.append([head(fill("<code>{}</code>", key)), _numbers(value), "" if raw is None else _numbers(raw)])
    frames = figure(picture, "frames of the row", "The frames as they were loaded, before resizing and augmentation.")
    numbers = table(["key", "as loaded (normalised)", "raw"], rows, "numbers")
    return fill('<dl class="facts">{}</dl>{}{}', listed, frames, numbers)


def _instruction(dataset: Dataset, episode: int) -> str:
    try:
        return instruction(dataset, episode) or "none"
    except BAD as e:  # whichever record the row needs itself
        return f"cannot be read: {e}"


def _numbers(value: Any) -> Html:
    value = np.asarray(value)
    if value.ndim > 2:  # latents
        shape = " x ".join(map(str, value.shape))
        return fill("<td>{} {}, {} to {}</td>", value.dtype, shape, f"{value.min():.4g}", f"{value.max():.4g}")
    # A row of the array is a line, however long: the table scrolls.
    text = np.array2string(value, precision=4, suppress_small=True, threshold=400, max_line_width=10_000)
    return fill("<td><pre>{}</pre></td>", text)
