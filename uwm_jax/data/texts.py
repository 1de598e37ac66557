"""The text of a sample: a vector of floats of its last observed step.

It comes from a step key of precomputed embeddings, or with `config.data.text_table` from the table of embeddings of the
dataset's strings (`uwm_jax.data.text_table`). Where `config.data.text` is a choice among several keys
(`uwm_jax.data.choices`), a sample draws one of them; of a table none whose string is empty while another is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from uwm_jax.data.choices import keys_of, pick
from uwm_jax.data.records import Dataset
from uwm_jax.data.text_table import EMPTY, TextTable, folder
from uwm_jax.errors import UserError

_CHOICE = "text"  # name of the draw


class StepTexts:
    """Precomputed embeddings in the records.

    Attributes:
        keys: step keys, in full.
        width: E.
        encoder: None, for it is not known.
    """

    def __init__(self, dataset: Dataset, keys: tuple[str, ...], field: str, where: str):
        self._dataset, self.keys, self.encoder = dataset, keys, None
        widths = [int(np.prod(dataset.step_shape(key), dtype=np.int64)) for key in keys]
        self.width = widths[0]
        for key, width in zip(keys, widths, strict=True):
            if width != self.width:
                raise UserError(
                    f"{field}: {key} has {width} numbers in {where}, but {keys[0]} has {self.width}: a model reads one "
                    "width. Choose among keys of one encoder."
                )

    def begin(self, episode: int, step: int) -> None:
        """Starts to read what `embedding` takes."""
        self._dataset.begin(episode, [step])

    def embedding(self, episode: int, step: int, draw: int | None) -> np.ndarray:
        """(E,) float32 at a step; `draw` as `pick` takes it."""
        return self._dataset.values(episode, step, pick(self.keys, _CHOICE, draw))

    def about(self) -> str:
        """A few words for people."""
        return f"text {' or '.join(self.keys)}"


class TableTexts:
    """Embeddings of strings, from a table.

    Attributes:
        keys: of strings, in full.
        width: E.
        encoder: of the table.
    """

    def __init__(self, table: TextTable, keys: tuple[str, ...]):
        self._table, self.keys = table, tuple(map(table.key, keys))
        self.width, self.encoder = table.width, table.encoder

    def begin(self, episode: int, step: int) -> None:
        """Does nothing: the table is in memory."""

    def embedding(self, episode: int, step: int, draw: int | None) -> np.ndarray:
        """(E,) float32 at a step; `draw` as `pick` takes it."""
        rows = [self._table.row(key, episode, step) for key in self.keys]
        return self._table.embedding(pick([row for row in rows if row != EMPTY] or rows, _CHOICE, draw))

    def about(self) -> str:
        """A few words for people, with the number of steps without a string."""
        empty = [f"{self._table.empty_steps(key)} steps of {key} are empty" for key in self.keys]
        return f"text {' or '.join(self.keys)} by {self.encoder}: {', '.join(empty)}"


def open_texts(dataset: Dataset, config: Any, source: Any, where: str) -> StepTexts | TableTexts | None:
    """The texts of a source; None without `config.data.text`, and for a source used as video that has none.

    Args:
        config: `config.data`.
        source: the fields of `uwm_jax.config.source`.
        where: what to call the source in messages.
    Raises:
        UserError: a key is missing or is of another kind, keys differ in width, or the table is missing, unfinished
            or of another dataset.
    """
    if not config.text:
        return None
    keys = keys_of(config.text, config.choices, source.choices)
    if config.text_table:
        if not source.use_actions and not (dataset.directory / folder(config.text_table)).exists():
            return None
        table = TextTable(dataset, config.text_table)
        if not source.use_actions:
            keys = tuple(filter(table.has, keys))
        return TableTexts(table, keys) if keys else None
    if not source.use_actions:
        keys = tuple(filter(dataset.has_float_key, keys))
    field = f"config.data.choices.{config.text}"
    return StepTexts(dataset, tuple(map(dataset.float_key, keys)), field, where) if keys else None
