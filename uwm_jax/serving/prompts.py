"""Sentences of requests as the embeddings that a model reads.

An embedding comes from the table of the strings that the model was trained on, or from the encoder that made that
table, which embeds any sentence.
"""

from __future__ import annotations

import collections
import difflib
import heapq
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from uwm_jax.data.spec import DataSpec
from uwm_jax.data.text_table import Strings
from uwm_jax.errors import UserError, warn
from uwm_jax.files import Place
from uwm_jax.torch_bridge import clip_text

RECORDED = "recorded"  # for the encoder that a checkpoint names
_NEAREST = 3  # known sentences that are told
_COMPARED = 50  # known sentences, those with most words in common, that are compared letter by letter
_KEPT = 256  # embeddings of an encoder in memory


class Table:
    """Embeds the sentences of tables, and refuses all others.

    Args:
        tables: of datasets, of one encoder.
    """

    def __init__(self, tables: Iterable[Strings]):
        self._embeddings: dict[str, np.ndarray] = {}
        for table in tables:
            for text, embedding in zip(table.texts, table.embeddings, strict=True):
                self._embeddings.setdefault(text.strip(), embedding)
        self._words = {text: _words(text) for text in self._embeddings if text}

    def __call__(self, text: str) -> np.ndarray:
        """(E,) float32.

        Raises:
            UserError: naming the nearest sentences that are known.
        """
        found = self._embeddings.get(text.strip())
        if found is None:
            known = "; ".join(repr(each) for each in self.nearest(text)) or "none"
            raise UserError(
                f"{text[:200]!r} is none of the {len(self._words)} sentences of the text table; the nearest are "
                f"{known}. --text_encoder embeds any sentence."
            )
        return np.array(found, np.float32)

    def nearest(self, text: str) -> list[str]:
        """The known sentences most like a text, the likest first."""
        words, text = _words(text), text[:200]
        likeness = {known: _likeness(words, of_known) for known, of_known in self._words.items()}
        by_words = heapq.nlargest(_COMPARED, likeness, key=likeness.__getitem__)
        matcher = difflib.SequenceMatcher(b=text.lower(), autojunk=False)

        def unlike(known: str) -> float:
            matcher.set_seq1(known[:200].lower())
            return -(matcher.ratio() + likeness[known])

        return sorted(by_words, key=unlike)[:_NEAREST]


class Encoder:
    """Embeds any sentence with CLIP; torch is imported.

    Args:
        name: folder or hub name. sha256: that it must have; "" for any.
    Raises:
        UserError: as `clip_text.ClipText`, or it is another encoder.
    """

    def __init__(self, name: str, sha256: str = ""):
        self._lock = threading.Lock()
        self._opened = clip_text.open_encoder(name, sha256)
        self._kept: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self("")  # so that no client waits for the first call

    @property
    def width(self) -> int:
        """E."""
        return self._opened.width

    def __call__(self, text: str) -> np.ndarray:
        """(E,) float32."""
        with self._lock:
            if text not in self._kept:
                if self._opened.too_long([text]):
                    warn(
                        f"a prompt has more than {self._opened.longest} tokens: its end is cut off ({text[:80]!r}...)."
                    )
                self._kept[text] = self._opened.embed([text])[0]
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(text)
            return self._kept[text].copy()


def open_prompts(
    spec: DataSpec, *, encoder: str = "", datasets: Sequence[Place] = (), table: str = "", asked: bool = False
) -> Callable[[str], np.ndarray] | None:
    """What embeds the prompts of requests; None where the model reads no text, or there is no table.

    Args:
        encoder: `RECORDED` for the one that the checkpoint names, a folder or hub name where that lies elsewhere; ""
            for the tables.
        datasets: whose tables are read. table: their name.
        asked: whether a person named the datasets; else those that are missing are left out, with a warning.
    Raises:
        UserError: the encoder is another, or cannot be opened; a table that was asked for is missing, or of another
            encoder or width.
    """
    if not spec.text_dim:
        if encoder or asked:
            raise UserError(f"{'--text_encoder' if encoder else '--text_table'}: this model reads no text.")
        return None
    recorded = spec.text_encoder
    if encoder:
        if encoder == RECORDED and recorded is None:
            raise UserError(
                f"--text_encoder={RECORDED}: this checkpoint does not know its encoder, for its texts were vectors of "
                "the dataset. Name the encoder, or send obs/text."
            )
        name = recorded.name if recorded and encoder == RECORDED else encoder
        opened = Encoder(name, recorded.sha256 if recorded else "")
        if opened.width != spec.text_dim:
            raise UserError(f"--text_encoder={name}: expected embeddings of {spec.text_dim}, found {opened.width}.")
        return opened
    tables = []
    for dataset in datasets:
        try:
            found = Strings(dataset, table)
            spec.check_text_encoder(found.encoder, str(dataset), "this model")
            if found.embeddings.shape[1] != spec.text_dim:
                raise UserError(
                    f"{dataset}: expected embeddings of {spec.text_dim}, found {found.embeddings.shape[1]}."
                )
            tables.append(found)
        except UserError as e:
            if asked:
                raise
            warn(f"prompts: {e}")
    return Table(tables) if tables else None


def _words(text: str) -> frozenset[str]:
    return frozenset("".join(c if c.isalnum() else " " for c in text[:4096].lower()).split())


def _likeness(a: frozenset[str], b: frozenset[str]) -> float:
    """The share of words that are in both, of those in either."""
    return len(a & b) / (len(a | b) or 1)
