"""Labels of video files, from the lists of video corpora."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from uwm_jax.errors import UserError

_EXPECTED = (
    "Expected a CSV file with the columns file,text; Kinetics' CSV, with label,youtube_id,time_start,time_end; or "
    'Something-Something\'s JSON, a list of {"id": ..., "label": ...}.'
)


class Labels:
    """Texts by file.

    A file is found by its path relative to the input, by its name, and by either without the suffix.

    Attributes:
        used: keys that were found.
    """

    def __init__(self, texts: Mapping[str, str]):
        self._texts = texts
        self.used: set[str] = set()

    def __len__(self) -> int:
        return len(self._texts)

    def of(self, names: Iterable[str]) -> str | None:
        """The text of the first of some files or episodes that has one; None if there is none."""
        for name in names:
            path = PurePosixPath(name)
            for key in (name, str(path.parent / path.stem), path.name, path.stem):
                if key in self._texts:
                    self.used.add(key)
                    return self._texts[key]
        return None

    def examples(self) -> str:
        """Some of the keys, for messages."""
        return ", ".join(sorted(self._texts)[:3])


def read_labels(file: Path) -> Labels:
    """Reads a list of labels.

    - CSV `file,text`: paths relative to the input, or names, with or without suffix.
    - Kinetics CSV: the file `<youtube_id>_<start>_<end>`, both of six digits, or `<youtube_id>` where only one row has
      it; the text is the label.
    - Something-Something JSON: the file `<id>`; the text is the label.

    A row with an empty text is no label. A text with a comma must stand in quotes; in quotes it may have several lines.

    Raises:
        UserError: the file cannot be read or is none of these, or gives one file two texts.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--labels={file}: cannot be read: {getattr(e, 'strerror', None) or e}.") from e
    try:
        pairs = _from_json(file, text) if file.suffix.lower() == ".json" else _from_csv(file, text)
    except csv.Error as e:
        raise UserError(f"--labels={file} is not CSV ({e}). {_EXPECTED}") from e
    texts: dict[str, str] = {}
    for name, label in pairs:
        if not label.strip():
            continue
        name = str(PurePosixPath(name))  # `./a.mp4` is what `find` prints
        if texts.setdefault(name, label) != label:
            raise UserError(f"--labels={file}: {name!r} has two texts, {texts[name]!r} and {label!r}. Keep one.")
    if not texts:
        raise UserError(f"--labels={file} holds no label. {_EXPECTED}")
    return Labels(texts)


def _from_json(file: Path, text: str) -> Iterator[tuple[str, str]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"--labels={file} is not JSON ({e}). {_EXPECTED}") from e
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "id" in e for e in entries):
        raise UserError(f"--labels={file}: unknown content. {_EXPECTED}")
    labels = [(str(entry["id"]), entry.get("label") or "") for entry in entries]
    for name, label in labels:
        if not isinstance(label, str) or any("\ud800" <= c <= "\udfff" for c in label):
            raise UserError(f"--labels={file}: the label of {name!r} is {str(label)[:60]!r}; expected a string.")
    return iter(labels)


def _from_csv(file: Path, text: str) -> Iterator[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    columns = [column.strip() for column in rows.fieldnames or ()]
    rows.fieldnames = columns
    wanted: tuple[str, ...]
    if {"file", "text"} <= set(columns):
        wanted = ("file", "text")
    elif {"label", "youtube_id", "time_start", "time_end"} <= set(columns):
        wanted = ("youtube_id", "time_start", "time_end", "label")
    else:
        raise UserError(f"--labels={file}: its columns are {','.join(columns) or 'missing'}. {_EXPECTED}")
    values = []
    for row in rows:
        fields = [row[column] for column in wanted]
        if any(field is None for field in fields):
            raise UserError(f"--labels={file}: line {rows.line_num} has fewer columns than the first line.")
        if any(field.strip() for field in row.get(None) or ()):  # type: ignore[call-overload]
            raise UserError(
                f"--labels={file}: line {rows.line_num} has more columns than the first line. Put a text with a comma "
                'into quotes: a.mp4,"pick, then place".'
            )
        values.append([str(field).strip() for field in fields])
    if len(wanted) == 2:
        return ((name, label) for name, label in values)
    return _kinetics(file, values)


def _kinetics(file: Path, rows: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    counts: dict[str, int] = {}
    for video, *_ in rows:
        counts[video] = counts.get(video, 0) + 1
    for video, start, end, label in rows:
        try:
            yield f"{video}_{int(float(start)):06d}_{int(float(end)):06d}", label
        except (ValueError, OverflowError):
            raise UserError(
                f"--labels={file}: {video}: expected times in seconds, found {start!r} and {end!r}."
            ) from None
        if counts[video] == 1:
            yield video, label
