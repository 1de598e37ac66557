"""The result of one task of a job: what its input became, and what was skipped."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uwm_jax.errors import UserError
from uwm_jax.files import Place

MAX_NOTES = 100  # skipped episodes of each reason that are described individually


@dataclasses.dataclass
class Result:
    """The result of one input.

    Attributes:
        shards: in order, {"part": file name} and the facts of `ShardWriter.close`.
        checksums: the crc32c of each record.
        lengths, texts: steps and strings of its episodes.
        skipped, remarks: numbers of skipped episodes, and of remarks on others, by reason.
        notes: (reason, text) about skipped episodes.
    """

    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    checksums: list[int] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    texts: dict[str, list[bytes]] = dataclasses.field(default_factory=dict)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    remarks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def episodes(self) -> int:
        """Number of episodes, kept and skipped."""
        return len(self.lengths) + self.skipped.total()

    def save(self, file: Path) -> None:
        """Writes it as JSON."""
        texts = {
            name: [text.decode(errors="surrogateescape") for text in values] for name, values in self.texts.items()
        }
        file.write_text(json.dumps(vars(self) | {"texts": texts}))

    @classmethod
    def load(cls, file: Place) -> Result:
        """Reads what `save` wrote.

        Raises:
            UserError: the file is damaged.
        """
        try:
            stored = json.loads(file.read_bytes())
            result = cls(**stored)
            result.skipped, result.remarks = (collections.Counter(stored[k]) for k in ("skipped", "remarks"))
            result.notes = [(reason, note) for reason, note in stored["notes"]]
            result.texts = {
                name: [text.encode(errors="surrogateescape") for text in values]
                for name, values in stored["texts"].items()
            }
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{file} is damaged ({e}). Remove its folder, and rerun the same command.") from e
        return result

    def count_missing(self, where: str, found: int, promised: int | None, declared_by: str) -> None:
        """Counts as skipped the episodes that the source declares and the data lack."""
        if promised is None or found == promised:
            return
        if found < promised:
            missing = f"missing, though {declared_by} declares it"
            self.skipped[missing] += promised - found
            note = f"{where}: ends after {found} of the {promised} episodes that {declared_by} declares"
        else:
            missing, note = "", f"{where}: has {found} episodes, though {declared_by} declares {promised}"
        self.notes.insert(0, (missing, note))


def first_notes(results: Iterable[Result], most: int = MAX_NOTES) -> list[tuple[str, str]]:
    """The first `most` notes of each reason, (reason, text)."""
    seen: collections.Counter[str] = collections.Counter()
    kept = []
    for reason, note in (note for result in results for note in result.notes):
        seen[reason] += 1
        if seen[reason] <= most:
            kept.append((reason, note))
    return kept
