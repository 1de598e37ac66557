"""The names and types that the features of a LeRobot dataset get in ours."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from data_prep.sources.decoding import VideoError, import_av
from data_prep.sources.lerobot.frames import Decoder, decoder
from data_prep.sources.lerobot.metadata import EpisodeFiles, Metadata
from data_prep.sources.lerobot.rows import Rows, image_bytes
from data_prep.sources.pictures import Pictures
from uwm_jax.data.chunks import EpisodeError
from uwm_jax.data.features import STEPS, Feature
from uwm_jax.data.names import check_name
from uwm_jax.errors import UserError

_SAMPLED = 8  # episodes that are tried for the size of a camera
# Bookkeeping of LeRobot: the number of a row follows from its place, and the task becomes the instruction.
BOOKKEEPING = ("index", "episode_index", "frame_index", "task_index")
# What an episode's place in the dataset decides, whatever the dataset says.
_PLACES = ("is_first", "is_last")


@dataclasses.dataclass(frozen=True)
class Key:
    """A feature that is kept: its name in LeRobot and in ours (with `steps/`), and what it is there: `video`, `image`,
    `string` or `number`; for a video, (height, width) of its frames, which `feature` may have in another size."""

    source: str
    path: str
    feature: Feature
    kind: str
    size: tuple[int, int] = (0, 0)


def our_names(sources: Sequence[str]) -> dict[str, str]:
    """The step key for each of LeRobot's names.

    `observation.images.x`, `observation.image.x`, `observation.state.x` and `observation.x` become `observation/x`,
    where the longer ones keep the middle part if another feature has that name; `action.x` becomes `action_dict/x`,
    `next.reward` and `next.done` become `reward` and `is_terminal`, other names stay. Further dots and slashes become
    underscores.
    """
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    # First those that lose nothing, so that they keep their names.
    for source in sorted(sources, key=lambda s: _short(s) != _long(s)):
        name = _short(source) if _short(source) not in taken else _long(source)
        if name in taken:
            raise UserError(f"the features {taken[name]!r} and {source!r} would both become {name!r}. Rename one.")
        taken[name], names[source] = source, name
    for name, source in taken.items():
        if (parent := name.rpartition("/")[0]) in taken:
            raise UserError(
                f"the features {taken[parent]!r} and {source!r} would become {parent!r} and {name!r}. Rename one."
            )
    return {source: names[source] for source in sources}


def kept_keys(
    metadata: Metadata, pictures: Pictures, seconds: float
) -> tuple[list[Key], dict[str, str], dict[str, str]]:
    """The features that are kept, the encoding of each camera ("jpeg" or "png") by path, and the reasons for which
    further ones are left out.

    Args:
        pictures: how frames of videos are stored.
        seconds: time limit for decoding the first frame of a video.
    Raises:
        UserError: a camera has no readable image, or names collide.
    """
    left_out = dict(metadata.left_out)
    sources = [k for k in metadata.features if k not in left_out and k not in (*BOOKKEEPING, *_PLACES)]
    names = our_names(sources)
    keys, encodings = [], {}
    sizes: dict[str, tuple[int, int]] = {}
    if metadata.videos:
        import_av()  # if it is not installed, that is said here and not in a decoder's process
        with decoder() as decoding:
            sizes = {key: _video_size(metadata, key, decoding, seconds) for key in metadata.videos}
    for source in sources:
        path = STEPS + check_name(names[source], "the name of a feature", metadata.root, nested=True)
        if source in metadata.videos:
            size = sizes[source]
            keys.append(Key(source, path, Feature((*(pictures.resize or size), 3), "uint8", image=True), "video", size))
            encodings[path] = pictures.encoding
        elif source in metadata.images:
            shape, found = _image_shape(metadata, source)
            if shape is None:
                left_out[source] = found
                continue
            keys.append(Key(source, path, Feature(shape, "uint8", image=True), "image"))
            encodings[path] = found
        elif metadata.features[source]["dtype"] == "string":
            keys.append(Key(source, path, Feature((), "string"), "string"))
        else:
            keys.append(Key(source, path, _number(path, metadata.features[source]), "number"))
    return keys, encodings, left_out


def _short(source: str) -> str:
    head, _, rest = source.partition(".")
    if not rest:
        return _flat(source)
    if head == "observation":
        middle, _, last = rest.partition(".")
        return f"observation/{_flat(last if last and middle in ('images', 'image', 'state') else rest)}"
    return {"next.reward": "reward", "next.done": "is_terminal"}.get(source) or _long(source)


def _long(source: str) -> str:
    head, _, rest = source.partition(".")
    parents = {"observation": "observation", "action": "action_dict"}
    return f"{parents[head]}/{_flat(rest)}" if rest and head in parents else _flat(source)


def _flat(name: str) -> str:
    return re.sub("[./]", "_", name)


def _number(path: str, entry: Mapping[str, Any]) -> Feature:
    dtype, shape = str(entry["dtype"]), tuple(entry.get("shape", ()))
    dtype = "float32" if dtype.startswith("float") else "bool" if dtype == "bool" else "int64"
    if path == STEPS + "is_terminal":
        return Feature((), "bool")
    # RLDS has these without an axis; LeRobot gives every feature one.
    scalar = math.prod(shape) == 1 and path in (STEPS + "reward", STEPS + "discount", STEPS + "timestamp")
    return Feature(() if scalar else shape, dtype)


def _sampled(metadata: Metadata) -> Iterator[EpisodeFiles]:
    episodes = [episode for part in metadata.splits.values() for episode in part]
    yield from episodes[:_SAMPLED]


def _video_size(metadata: Metadata, key: str, decoding: Decoder, seconds: float) -> tuple[int, int]:
    problems = []
    for file in dict.fromkeys(episode.clips[key].file for episode in _sampled(metadata)):
        try:
            return decoding.size(metadata.root / file, seconds)
        except VideoError as e:
            problems.append(f"{file}: {e}")
    raise _unreadable(metadata, key, problems)


def _image_shape(metadata: Metadata, key: str) -> tuple[tuple[int, int, int] | None, str]:
    """Shape and encoding of an image column; None and the reason if it is no camera."""
    problems = []
    with Rows(metadata.root) as rows:
        for episode in _sampled(metadata):
            try:
                table = rows.read(episode, [key])
                if key not in table.column_names:
                    raise EpisodeError("key missing", "no such column")
                data = image_bytes(metadata.root, key, table[key], 1)[0]
                with Image.open(io.BytesIO(data)) as image:
                    if image.mode not in ("L", "P", "RGB", "RGBA", "1"):
                        return None, f"images of mode {image.mode} (depth?); a camera has 8-bit images"
                    encoding = "jpeg" if data[:2] == b"\xff\xd8" else "png"
                    return (image.height, image.width, len(image.getbands())), encoding
            except (EpisodeError, OSError, IndexError, Image.DecompressionBombError) as e:
                problems.append(f"{episode.data}: {e}")
    raise _unreadable(metadata, key, problems)


def _unreadable(metadata: Metadata, key: str, problems: Sequence[str]) -> UserError:
    others = [name for name in (*metadata.videos, *metadata.images) if name != key]
    without = f", or leave it out with --cameras={','.join(others)}" if others else ""
    return UserError(
        f"{metadata.root}: no image of camera {key} can be read in the first episodes:\n  "
        + "\n  ".join(problems)
        + f"\nCopy these files again{without}."
    )
