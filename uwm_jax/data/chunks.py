"""Cuts one serialized RLDS episode into serialized chunks; encoded images are not decoded."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from uwm_jax.data import example
from uwm_jax.data.episodes import encode_jpeg, encode_png, resize_image
from uwm_jax.data.features import STEPS, Feature
from uwm_jax.data.records import COLUMN_MAX_SIZE, decode_image, image_size

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA: a camera's frames are decoded to RGB, without alpha

_ENCODINGS = ("none", "bytes", "zlib")
_FLAT, _LENGTHS = b"/ragged_flat_values", b"/ragged_row_lengths_"


class EpisodeError(Exception):
    """An unusable episode: `reason` is a short category for counting, the message has details."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Layout:
    """Contents of the episodes of a dataset, without the prefix `steps/`.

    Attributes:
        sizes: values per step of the step features whose shape is known (1 for an image or an encoded tensor).
        columns: numeric step keys to keep as columns -> (shape, numpy dtype of the column).
        cameras: image keys that can be used as cameras -> (height, width).
        texts: full names of the episode-level string features.
        decoded: keys among `columns` and `pixels` whose steps are encoded tensors -> their feature.
        pixels: keys among `cameras` whose steps are tensors, stored as PNG -> (height, width, channels).
        resized: keys among `cameras` that are resized and stored as JPEG -> (height, width) of the source.
    """

    chunk_steps: int
    sizes: dict[str, int]
    columns: dict[str, tuple[tuple[int, ...], str]]
    cameras: dict[str, tuple[int, int]]
    texts: tuple[str, ...] = ()
    decoded: dict[str, Feature] = dataclasses.field(default_factory=dict)
    pixels: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    resized: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def encoded(self) -> dict[str, tuple[Feature, str]]:
        """Cameras whose images are encoded here -> their feature as it is stored, and the encoding."""
        pixels = {key: (Feature(shape, "uint8", image=True), "png") for key, shape in self.pixels.items()}
        resized = {key: (Feature((*self.cameras[key], 3), "uint8", image=True), "jpeg") for key in self.resized}
        return pixels | resized


@dataclasses.dataclass(frozen=True)
class Episode:
    """A cut episode: length, serialized chunks of consecutive steps, columns (length, ...), and strings in UTF-8."""

    length: int
    chunks: list[bytes]
    columns: dict[str, np.ndarray]
    texts: dict[str, bytes]


def plan_layout(
    features: dict[str, Feature],
    chunk_steps: int,
    sizes: dict[str, tuple[int, int]],
    resize: tuple[int, int] | None = None,
) -> Layout:
    """The layout for features of `uwm_jax.data.features`.

    Args:
        sizes: (height, width) of cameras in the source.
        resize: (height, width) to which all others are resized.
    """
    known: dict[str, int] = {}
    columns, decoded, pixels = {}, {}, {}
    for key, feature in step_features(features).items():
        if feature.shape is None or min(feature.shape, default=1) < 1 and not feature.image:
            continue
        # Images and encoded tensors are one value; a string feature may have any shape.
        known[key] = 1 if feature.image or feature.encoding != "none" else math.prod(feature.shape)
        if is_column(feature):
            columns[key] = (feature.shape, "<f4" if _is_float(feature) else "<i8")
        elif _is_pixels(feature):
            height, width, channels = feature.shape
            pixels[key] = (height, width, channels)
        if feature.encoding != "none" and (key in columns or key in pixels):
            decoded[key] = feature
    texts = [k for k, f in features.items() if not k.startswith(STEPS) and f.dtype == "string" and f.shape == ()]
    resized = {key: size for key, size in sizes.items() if resize not in (None, size)}
    stored = {key: resize if resize and key in resized else size for key, size in sizes.items()}
    return Layout(chunk_steps, known, columns, stored, tuple(sorted(texts)), decoded, pixels, resized)


def step_features(features: dict[str, Feature]) -> dict[str, Feature]:
    """The step features by key without `steps/`."""
    return {name.removeprefix(STEPS): f for name, f in features.items() if name.startswith(STEPS)}


def camera_features(features: dict[str, Feature]) -> dict[str, Feature]:
    """The step features that can be cameras, by key without `steps/`: 8-bit grey, RGB or RGBA images, encoded or as
    tensors that are too large for a column."""
    return {key: f for key, f in step_features(features).items() if _is_frames(f) or _is_pixels(f)}


def is_column(feature: Feature) -> bool:
    """Whether a step feature is numeric and small enough for a column."""
    if feature.image or feature.shape is None or not _is_numeric(feature):
        return False
    return min(feature.shape, default=1) > 0 and math.prod(feature.shape) <= COLUMN_MAX_SIZE


def why_unusable(feature: Feature) -> str:
    """The reason why a step feature is neither a camera nor a column; "" if it is one."""
    shape, dtype = feature.shape, feature.dtype
    if is_column(feature) or _is_frames(feature) or _is_pixels(feature):
        return ""
    if feature.image and shape is None:
        return "a sequence of images in every step; a camera has one image per step"
    if feature.image and dtype != "uint8":
        return f"images of {dtype} (depth?); a camera has 8-bit images"
    if feature.image:
        return f"images of shape {shape}; a camera has 1, 3 or 4 channels, last"
    if dtype == "string":
        return (
            "a string: data_prep.text embeds it for config.data.text_table; config.data.text alone takes a precomputed "
            "embedding of it, a vector of floats in every step (docs/choosing.md, Language)"
        )
    if dtype == "unknown":
        return "an unsupported kind of feature"
    if feature.encoding not in _ENCODINGS:
        return f"a tensor encoded by {feature.encoding!r}; expected {' or '.join(_ENCODINGS)}"
    if not _is_numeric(feature):
        return f"values of {dtype}; a usable key holds floats, integers or booleans"
    if shape is None or min(shape, default=1) < 1:
        return "its number of values may differ from step to step (ragged); a usable key has one shape"
    many = f"{math.prod(shape)} values of {dtype} per step"
    if _is_float(feature) and len(shape) == 1:
        return f"{many}, more than {COLUMN_MAX_SIZE}: it can be config.data.text, not an action or low-dimensional key"
    hint = "; an image has shape (height, width, channels) with 1, 3 or 4 channels" if dtype == "uint8" else ""
    return f"{many}, more than the {COLUMN_MAX_SIZE} of an action or low-dimensional key{hint}"


def _is_numeric(feature: Feature) -> bool:
    """Whether the values of a feature that is not an image are numbers in a known encoding."""
    return feature.dtype.startswith(("float", "bfloat", "int", "uint", "bool")) and feature.encoding in _ENCODINGS


def _is_float(feature: Feature) -> bool:
    return feature.dtype.startswith(("float", "bfloat"))


def _is_frames(feature: Feature) -> bool:
    if not feature.image or feature.dtype != "uint8" or feature.shape is None or len(feature.shape) != 3:
        return False
    return feature.shape[-1] in (*_CHANNELS, -1)


def _is_pixels(feature: Feature) -> bool:
    if feature.image or feature.dtype != "uint8" or feature.shape is None or len(feature.shape) != 3:
        return False
    if feature.encoding not in _ENCODINGS or is_column(feature):
        return False
    return min(feature.shape) > 0 and feature.shape[-1] in _CHANNELS


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
        parts = [(name, _split(view, name, fields, edges, layout)) for name in fields]
        columns = {
            key: _column(view, key, steps[key], dtype, layout).reshape(length, *shape)
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
        if camera in layout.pixels:
            continue
        size = layout.resized.get(camera, size)
        for i, span in enumerate(example.bytes_spans(view, steps[camera])):
            try:
                found = image_size(view[slice(*span)])[:2]
            except ValueError as e:
                raise EpisodeError("unreadable image", f"{camera} at step {i}: {e}") from e
            if found != size:
                raise EpisodeError("another image size", f"{camera} at step {i}: expected {size}, found {found}")


def _split(
    view: memoryview, name: bytes, fields: dict[bytes, example.Field], edges: list[int], layout: Layout
) -> list[bytes]:
    """A feature's values in each chunk, serialized; `edges` are the chunks' boundaries, from 0 to the length."""
    field = fields[name]
    if not name.startswith(STEPS.encode()):
        return [example.whole_feature(view, field)] * (len(edges) - 1)
    key = name[len(STEPS) :].decode()
    if key in layout.pixels or key in layout.resized:
        frames = list(_encoded(view, key, field, edges[-1], layout))
        return [example.bytes_feature(frames[a:b]) for a, b in itertools.pairwise(edges)]
    return _split_steps(view, name, fields, edges)


def _encoded(view: memoryview, key: str, field: example.Field, length: int, layout: Layout) -> Iterator[bytes]:
    """The images of a camera that is stored in another encoding than the source's."""
    if key not in layout.resized:
        yield from map(encode_png, _frames(view, key, field, length, layout))
        return
    for image in _images(view, key, field, length, layout):
        yield encode_jpeg(resize_image(image, layout.cameras[key]))


def _images(view: memoryview, key: str, field: example.Field, length: int, layout: Layout) -> Iterator[np.ndarray]:
    """Decoded images of a camera, (height, width, 3) uint8."""
    if key in layout.pixels:
        for frame in _frames(view, key, field, length, layout):
            yield np.repeat(frame, 3, -1) if frame.shape[-1] == 1 else frame[..., :3]
        return
    image = np.empty((*layout.resized[key], 3), np.uint8)
    for i, (start, stop) in enumerate(example.bytes_spans(view, field)):
        try:
            decode_image(view[start:stop], image)
        except (ValueError, OSError) as e:
            raise EpisodeError("unreadable image", f"{key} at step {i}: {e}") from e
        yield image


def _split_steps(view: memoryview, name: bytes, fields: dict[bytes, example.Field], edges: list[int]) -> list[bytes]:
    field, length = fields[name], edges[-1]
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


def _column(view: memoryview, key: str, field: example.Field, dtype: str, layout: Layout) -> np.ndarray:
    if key in layout.decoded:
        return _decoded(view, key, field, layout)
    return example.floats(view, field) if dtype == "<f4" else example.ints(view, field)


def _decoded(view: memoryview, key: str, field: example.Field, layout: Layout) -> np.ndarray:
    """Values of an encoded tensor, (length, ...)."""
    feature = layout.decoded[key]
    shape = feature.shape or ()
    try:
        spans = example.bytes_spans(view, field)
        return np.stack([example.decode_tensor(view[a:b], feature.encoding, feature.dtype, shape) for a, b in spans])
    except ValueError as e:
        raise EpisodeError("unreadable tensor", f"{key}: {e}") from e


def _frames(view: memoryview, key: str, field: example.Field, length: int, layout: Layout) -> np.ndarray:
    """Pixels of a camera, (length, height, width, channels) uint8."""
    if key in layout.decoded:
        return _decoded(view, key, field, layout)
    try:
        return example.small_ints(view, field).reshape(length, *layout.pixels[key])
    except ValueError as e:
        raise EpisodeError("unreadable tensor", f"{key}: {e}") from e
