"""Reads hdf5 files of robomimic and LIBERO as a corpus: their demonstrations as RLDS, with encoded pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_prep.sources.hdf5.files import (
    LIBERO,
    File,
    Stored,
    common_keys,
    count_unused,
    find_files,
    open_file,
    remarks_of,
    split_demos,
)
from data_prep.sources.inputs import Corpus, Found, Input, modified, storable
from data_prep.sources.pictures import JPEG, Pictures
from uwm_jax.data.chunks import EpisodeError
from uwm_jax.data.episodes import feature_tree, serialize_episode
from uwm_jax.data.features import STEPS, Feature
from uwm_jax.data.names import check_name
from uwm_jax.reading import again

FLIPS = ("none", "rows", "180")

_GROUP = 16  # demonstrations that one process reads at a time
_TEXT = STEPS + "language_instruction"
_TERMINAL = STEPS + "is_terminal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demos(Input):
    """Some demonstrations of one file.

    Attributes:
        masks: of each demonstration, the names of the subsets that it belongs to.
        keys: our name of a key -> how it is stored.
    """

    path: Path
    file: str
    demos: tuple[str, ...]
    masks: tuple[str, ...]
    keys: Mapping[str, Stored]
    features: Mapping[str, Feature]
    language: str
    flip: str
    pictures: Pictures

    declared_by: ClassVar[str] = "its group `data`"

    def episodes(self) -> Iterator[Found]:
        size = self.size // max(1, len(self.demos))
        with again(lambda: open_file(self.path), self.path) as opened:
            for demo, masks in zip(self.demos, self.masks, strict=True):
                name = f"{self.file}: {demo}"
                try:
                    yield Found(self._record(opened["data"], demo, masks), size=size, name=name)
                except EpisodeError as e:
                    yield Found(None, e.reason, str(e), size, name)

    def _record(self, data: Any, demo: str, masks: str) -> bytes:
        values: dict[str, Any] = {
            STEPS + name: self._read(data, f"{demo}/{stored.source}", stored, self.features[STEPS + name].dtype)
            for name, stored in self.keys.items()
        }
        lengths = {self.keys[name.removeprefix(STEPS)].source: len(value) for name, value in values.items()}
        length = lengths["actions"]
        if set(lengths.values()) != {length}:
            raise EpisodeError("unequal numbers of steps", str(lengths))
        if not length:
            raise EpisodeError("no steps", "the demonstration is empty")
        at = np.arange(length)
        last = at == length - 1
        values |= {STEPS + "is_first": at == 0, STEPS + "is_last": last}
        # Without `dones`, as RLDS has demonstrations: they end in a terminal state.
        values[_TERMINAL] = values[_TERMINAL] != 0 if _TERMINAL in values else last
        if _TEXT not in values and _TEXT in self.features:
            values[_TEXT] = [self.language] * length
        values["episode_metadata/file_path"] = f"{self.file}/{demo}"
        values["episode_metadata/masks"] = masks
        return serialize_episode(self.features, values)

    def _read(self, data: Any, name: str, stored: Stored, dtype: str) -> Any:
        try:
            found = data[name]
            values = again(lambda: found[()], self.path)
        except KeyError as e:  # a broken link too
            raise EpisodeError("key missing", f"no values of {stored.source}: {str(e)[:200]}") from e
        except (OSError, RuntimeError) as e:
            raise EpisodeError("unreadable data", f"{stored.source}: {str(e)[:200]}") from e
        except (TypeError, AttributeError) as e:  # a group
            raise EpisodeError("another shape", f"{stored.source}: expected a dataset") from e
        if np.ndim(values) == 0 or values.shape[1:] != stored.shape:
            raise EpisodeError(
                "another shape", f"{stored.source}: expected {stored.shape}, found {np.shape(values)[1:]}"
            )
        if values.dtype != stored.dtype and (stored.image or not np.can_cast(values.dtype, stored.dtype, "same_kind")):
            raise EpisodeError("another type", f"{stored.source}: expected {stored.dtype}, found {values.dtype}")
        if stored.image:
            return [self._encoded(image, stored) for image in values]
        values = storable(values, dtype, stored.source)
        return values.reshape(len(values)) if stored.scalar else values

    def _encoded(self, image: np.ndarray, stored: Stored) -> bytes:
        if stored.channels_first:
            image = image.transpose(1, 2, 0)
        image = flipped(image, self.flip)
        if image.shape[-1] == 1:
            image = np.repeat(image, 3, -1)
        return self.pictures.encode(np.ascontiguousarray(image))


def flipped(image: np.ndarray, flip: str) -> np.ndarray:
    """A picture (H, W, C) with its rows in reverse order (`rows`), turned by 180 degrees (`180`), or as is (`none`)."""
    return image if flip == "none" else image[::-1] if flip == "rows" else image[::-1, ::-1]


def corpus(
    path: Path,
    *,
    splits: Sequence[str] = (),
    flip: str | None = None,
    pictures: Pictures = JPEG,
) -> Corpus:
    """The corpus of a file, or of the files below a directory.

    Args:
        splits: those to take; () for all that share no demonstration (`files.split_demos`).
        flip: one of `FLIPS`; None: `rows` for LIBERO, whose pictures are upside down, `none` for robomimic.
        pictures: how they are stored.
    Raises:
        UserError: as `files.find_files` and `common_keys`, or an unknown split.
    """
    files = find_files(path)
    kind = files[0].kind
    chosen = flip or ("rows" if kind == LIBERO else "none")
    keys, left_out = common_keys(files)
    for source, reason in left_out.items():
        print(f"{source} is left out: {reason}.")
    features = {STEPS + name: _feature(stored, pictures.resize) for name, stored in keys.items()}
    features |= {STEPS + name: Feature((), "bool") for name in ("is_first", "is_last", "is_terminal")}
    if _TEXT not in features and any(file.language for file in files):
        features[_TEXT] = Feature((), "string")
    for remark in remarks_of(files):
        print(remark)
    features |= {f"episode_metadata/{name}": Feature((), "string") for name in ("file_path", "masks")}
    demos, passed = split_demos(files, splits)
    if passed and not splits:
        print(f"masks that share demonstrations with another split are left out: {', '.join(passed)} (see --split).")
    if unused := count_unused(files, demos):
        print(f"{unused} demonstrations are in none of the splits {', '.join(demos)}.")
    common = {"keys": keys, "features": features, "flip": chosen, "pictures": pictures}
    return Corpus(
        name=check_name(path.resolve().stem if path.is_file() else path.resolve().name, "the name of the input", path),
        version="1.0.0",
        path=path,
        tree=feature_tree(features, {name: pictures.encoding for name in features}),
        splits={
            split: [part for file, names in zip(files, parts, strict=True) for part in _inputs(file, names, common)]
            for split, parts in demos.items()
        },
        info={"description": f"Converted from hdf5 files of {kind}."},
        source={"format": f"hdf5 of {kind}"},
        facts={"robot": _facts(files, keys, left_out, chosen, pictures)},
        options={"flip": chosen, **pictures.options},
    )


def _feature(stored: Stored, resize: tuple[int, int] | None) -> Feature:
    if stored.image:
        return Feature((*(resize or stored.size), 3), "uint8", image=True)
    kind = "float32" if stored.dtype.startswith("float") else "bool" if stored.dtype == "bool" else "int64"
    return Feature(() if stored.scalar else stored.shape, kind)


def _inputs(file: File, demos: Sequence[str], common: Mapping[str, Any]) -> Iterator[Demos]:
    steps = dict(zip(file.demos, file.steps, strict=True))
    per_step = file.path.stat().st_size / max(1, sum(file.steps))
    for group in (tuple(demos[i : i + _GROUP]) for i in range(0, len(demos), _GROUP)):
        yield Demos(
            name=f"{file.name}: {group[0]} to {group[-1]}",
            size=round(per_step * sum(steps[demo] for demo in group)),
            modified=modified([file.path]),
            promised=len(group),
            path=file.path,
            file=file.name,
            demos=group,
            masks=tuple(" ".join(sorted(m for m, own in file.masks.items() if demo in own)) for demo in group),
            language=file.language,
            **common,
        )


def _facts(
    files: Sequence[File],
    keys: Mapping[str, Stored],
    left_out: Mapping[str, str],
    flip: str,
    pictures: Pictures,
) -> dict[str, Any]:
    """Robot facts of the files, for the manifest."""
    env = files[0].env
    settings = env.get("env_kwargs") if isinstance(env.get("env_kwargs"), dict) else None
    settings = settings or {}
    rate = settings.get("control_freq")
    return {
        "format": files[0].kind,
        "type": settings.get("robots"),
        "fps": float(rate) if isinstance(rate, int | float) else None,
        "flip": flip,
        "keys": {name: {"source": s.source, "dtype": s.dtype, "shape": list(s.shape)} for name, s in keys.items()},
        "left_out": dict(left_out),
        "frames": pictures.facts,
        "environments": sorted({str(file.env.get("env_name", "")) for file in files} - {""}),
        # Of the first file: controller with the units of its actions, camera sizes.
        "env_args": dict(env),
    }
