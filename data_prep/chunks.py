"""Cuts one serialized RLDS episode into serialized chunks, without decoding what it carries."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from data_prep.features import STEPS, Feature
from uwm_jax.data import example
from uwm_jax.data.records import COLUMN_MAX_SIZE, image_size

_FLAT, _LENGTHS = b"/ragged_flat_values", b"/ragged_row_lengths_"


class EpisodeError(Exception):
    """An episode that cannot be used: `reason` is one of few words to count by, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the episodes of a dataset hold, without the prefix `steps/`.

    Attributes:
        sizes: values per step of the step features whose shape is known (1 for an image).
        columns: numeric step keys to keep as columns -> (shape, numpy dtype of the column).
        cameras: image keys that can be used as cameras -> (height, width).
        texts: full names of the features that are one text per episode.
    """

    chunk_steps: int
    sizes: dict[str, int]
    columns: dict[str, tuple[tuple[int, ...], str]]
    cameras: dict[str, tuple[int, int]]
    texts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Episode:
    """A cut episode: its length, serialized chunks of consecutive steps, columns (length, ...), and texts as UTF-8."""

    length: int
    chunks: list[bytes]
    columns: dict[str, np.ndarray]
    texts: dict[str, bytes]


def plan_layout(features: dict[str, Feature], chunk_steps: int, sizes: dict[str, tuple[int, int]]) -> Layout:
    """The layout for features of `data_prep.rlds`; `sizes` gives the sizes of cameras."""
    known: dict[str, int] = {}
    columns = {}
    for name, feature in features.items():
        if not name.startswith(STEPS) or feature.shape is None:
            continue
        key = name.removeprefix(STEPS)
        if feature.image or feature.dtype == "string":
            # Images and encoded tensors are one value; a text feature may have a shape of its own.
            known[key] = 1 if feature.image else math.prod(feature.shape)
        elif min(feature.shape, default=1) > 0:
            known[key] = math.prod(feature.shape)
            if known[key] <= COLUMN_MAX_SIZE:
                columns[key] = (feature.shape, "<f4" if feature.dtype.startswith(("float", "bfloat")) else "<i8")
    texts = [k for k, f in features.items() if not k.startswith(STEPS) and f.dtype == "string" and f.shape == ()]
    return Layout(chunk_steps, known, columns, dict(sizes), tuple(sorted(texts)))


def camera_features(features: dict[str, Feature]) -> dict[str, Feature]:
    """The step features that are 8-bit colour images, by key without `steps/`."""
    return {
        name.removeprefix(STEPS): f
        for name, f in features.items()
        if name.startswith(STEPS) and f.image and f.dtype == "uint8" and f.shape is not None and f.shape[-1:] == (3,)
    }


def frame_size(record: bytes, camera: str) -> tuple[int, int]:
    """(height, width) of an episode's first frame."""
    try:
        field = example.scan(record, {(STEPS + camera).encode()})[(STEPS + camera).encode()]
        height, width, _ = image_size(record[slice(*example.bytes_spans(record, field, 1)[0])])
    except (ValueError, KeyError, IndexError) as e:
        raise EpisodeError("unreadable image", f"{camera}: {e}") from e
    return height, width


def cut_episode(record: bytes, layout: Layout) -> Episode:
    """Cuts one episode.

    Raises:
        EpisodeError: the record is not an episode of this layout.
    """
    view = memoryview(record)
    try:
        fields = example.scan(view)
        steps = {k[len(STEPS) :].decode(): f for k, f in fields.items() if k.startswith(STEPS.encode())}
        length = _length(view, steps, layout)
        _check_frames(view, steps, layout)
        edges = [*range(0, length, layout.chunk_steps), length]
        parts = [
            (name, _split_steps(view, name, field, fields, length, edges))
            if name.startswith(STEPS.encode())
            else (name, [example.whole_feature(view, field)] * (len(edges) - 1))
            for name, field in fields.items()
        ]
        columns = {
            key: _column(view, steps[key], dtype).reshape(length, *shape)
            for key, (shape, dtype) in layout.columns.items()
        }
        texts = {name: _text(view, fields.get(name.encode())) for name in layout.texts}
    except ValueError as e:
        raise EpisodeError("not a tf.Example of this dataset", str(e)) from e
    chunks = []
    for i, (start, _) in enumerate(itertools.pairwise(edges)):
        place = [
            (b"chunk/first_step", example.int_feature([start])),
            (b"chunk/episode_steps", example.int_feature([length])),
        ]
        chunks.append(example.serialize([*((name, pieces[i]) for name, pieces in parts), *place]))
    return Episode(length, chunks, columns, texts)


def _length(view: memoryview, steps: dict[str, example.Field], layout: Layout) -> int:
    missing = sorted((set(layout.columns) | set(layout.cameras)) - set(steps))
    if missing:
        raise EpisodeError("key missing", f"no values of {', '.join(missing)}")
    lengths = {key: example.count(view, steps[key]) / size for key, size in layout.sizes.items() if key in steps}
    if not lengths or max(lengths.values()) == 0:
        raise EpisodeError("no steps", "the episode is empty")
    if len(set(lengths.values())) > 1 or not next(iter(lengths.values())).is_integer():
        raise EpisodeError("unequal numbers of steps", str({k: round(v, 2) for k, v in lengths.items()}))
    return int(next(iter(lengths.values())))


def _check_frames(view: memoryview, steps: dict[str, example.Field], layout: Layout) -> None:
    for camera, size in layout.cameras.items():
        for i, span in enumerate(example.bytes_spans(view, steps[camera])):
            try:
                found = image_size(view[slice(*span)])[:2]
            except ValueError as e:
                raise EpisodeError("unreadable image", f"{camera} at step {i}: {e}") from e
            if found != size:
                raise EpisodeError("another image size", f"{camera} at step {i}: expected {size}, found {found}")


def _split_steps(
    view: memoryview,
    name: bytes,
    field: example.Field,
    fields: dict[bytes, example.Field],
    length: int,
    edges: list[int],
) -> list[bytes]:
    base, mark, level = name.rpartition(_LENGTHS)
    ragged = base if mark else name.removesuffix(_FLAT) if name.endswith(_FLAT) else None
    if ragged is None:
        total = example.count(view, field)
        if total % length:
            raise ValueError(f"{name.decode()}: {total} values for {length} steps")
        return example.split_feature(view, field, [e * (total // length) for e in edges])
    # Row lengths of level 0 are per step; those of level n + 1, and the values, per row of level n.
    rows, depth = edges, 0
    while (lengths_name := ragged + _LENGTHS + str(depth).encode()) in fields and (not mark or depth < int(level)):
        ends = np.concatenate([[0], np.cumsum(example.ints(view, fields[lengths_name]))])
        rows, depth, inner = [int(ends[r]) for r in rows], depth + 1, int(ends[-1])
    if not mark and inner:
        width = example.count(view, field) // inner
        rows = [r * width for r in rows]
    return example.split_feature(view, field, rows)


def _text(view: memoryview, field: example.Field | None) -> bytes:
    spans = example.bytes_spans(view, field, 1) if field is not None else []
    return bytes(view[slice(*spans[0])]) if spans else b""


def _column(view: memoryview, field: example.Field, dtype: str) -> np.ndarray:
    return example.floats(view, field) if dtype == "<f4" else example.ints(view, field)
