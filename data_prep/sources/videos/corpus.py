"""Folders of video files as a corpus of episodes (`data_prep.sources.inputs`)."""

from __future__ import annotations

import collections
import dataclasses
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from tqdm import tqdm

from data_prep.jobs.child import Child, ChildError
from data_prep.sources.decoding import decoder_failure
from data_prep.sources.inputs import Corpus, Found, Input, modified
from data_prep.sources.videos.clips import Clip, Request, Sampling, Unusable, read_clip
from data_prep.sources.videos.labels import Labels
from uwm_jax.data.episodes import feature_tree, serialize_episode
from uwm_jax.data.features import STEPS, Feature
from uwm_jax.data.names import check_name
from uwm_jax.errors import UserError

SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v")
GROUP = 128  # episodes that one task reads, and that are read again if the job is killed meanwhile
_IMAGES = "steps/observation/"
_WITHOUT_LABEL = "without a label"


class Episode(NamedTuple):
    """Video files to be read as one episode.

    Attributes:
        name: path relative to the input, of the only file or of the layout's `{episode}`.
        files: paths relative to the input, one per camera.
        text: its label; None if it has none.
        reason, detail: why it is skipped without being read, or "".
    """

    name: str
    files: tuple[str, ...]
    text: str | None = None
    reason: str = ""
    detail: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How files are read.

    Attributes:
        cameras: names of the cameras, in the order of an episode's files.
        labelled: whether a label is expected of every episode.
        seconds: time limit for decoding one file.
        max_bytes: size of the largest file that is read.
    """

    root: Path
    cameras: tuple[str, ...]
    sampling: Sampling
    labelled: bool
    seconds: float
    max_bytes: int

    def features(self) -> dict[str, Feature]:
        """The features of a record."""
        images = {_IMAGES + key: Feature((*self.sampling.size, 3), "uint8", image=True) for key in self.cameras}
        flags = {f"{STEPS}{key}": Feature((), "bool") for key in ("is_first", "is_last", "is_terminal")}
        return {
            **images,
            STEPS + "timestamp": Feature((), "float32"),
            STEPS + "language_instruction": Feature((), "string"),
            **flags,
            "episode_metadata/file_path": Feature((), "string"),
            "episode_metadata/fps": Feature((), "float32"),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clips(Input):
    """Some consecutive episodes of a video corpus."""

    group: tuple[Episode, ...]
    reading: Reading

    def episodes(self) -> Iterator[Found]:
        features = self.reading.features()
        with Child(read_clip) as child:
            for episode in self.group:
                if episode.reason:
                    yield Found(None, episode.reason, episode.detail, name=_shown(episode.name))
                    continue
                size = sum(_size(self.reading.root / file) for file in episode.files)
                clip = self._read(child, episode)
                if isinstance(clip, Unusable):
                    yield Found(None, clip.reason, clip.detail, size, _shown(episode.files[clip.file]))
                    continue
                values = self._values(episode, clip)
                remarks = clip.remarks
                if self.reading.labelled and episode.text is None:
                    remarks += (_WITHOUT_LABEL,)
                yield Found(serialize_episode(features, values), size=size, name=_shown(episode.name), remarks=remarks)

    def _read(self, child: Child[Request, Clip | Unusable], episode: Episode) -> Clip | Unusable:
        reading = self.reading
        files = tuple(reading.root / file for file in episode.files)
        for i, file in enumerate(files):
            if (size := _size(file)) > reading.max_bytes:
                limit = f"--max_mb={reading.max_bytes >> 20}"
                return Unusable("oversized file", f"{size / (1 << 20):.1f} MiB; {limit}", i)
        try:
            return child.call(Request(files, reading.sampling), reading.seconds * len(files))
        except ChildError as e:
            failure = decoder_failure(e)
            return Unusable(failure.reason, str(failure), e.mark)

    def _values(self, episode: Episode, clip: Clip) -> dict[str, Any]:
        """The values of a record."""
        steps = len(clip.times)
        fps = self.reading.sampling.fps
        duration = clip.times[-1]
        return {
            **{_IMAGES + key: images for key, images in zip(self.reading.cameras, clip.frames, strict=True)},
            "steps/timestamp": clip.times,
            "steps/language_instruction": [episode.text or ""] * steps,
            "steps/is_first": [step == 0 for step in range(steps)],
            "steps/is_last": [step == steps - 1 for step in range(steps)],
            "steps/is_terminal": [False] * steps,
            "episode_metadata/file_path": _shown(episode.name),
            "episode_metadata/fps": float(fps) if fps else (steps - 1) / duration if duration else 0.0,
        }


def corpus(
    source: Path,
    sampling: Sampling,
    *,
    layout: str = "",
    cameras: Sequence[str] = (),
    labels: Labels | None = None,
    seconds: float = 300.0,
    max_mb: int = 1024,
) -> Corpus:
    """The video files of a folder, a glob or a list.

    Args:
        source: a folder, searched for files with one of `SUFFIXES`; a pattern with `*`, `?` or `[`; a text file with
            one path per line, relative to its own folder; or a video file.
        layout: a path relative to the input with `{camera}`, and `{episode}` unless all files are one episode: files
            that differ in `{camera}` alone are read as one episode. "" = every file is an episode.
        cameras: names of the cameras; by default `image`, or those that the layout finds.
        labels: texts of the episodes.
        seconds: time limit for decoding one file.
        max_mb: MiB of the largest file that is read.
    Raises:
        UserError: no such files, an unusable layout, or labels of other files.
    """
    root, names, ignored = find_files(source)
    if layout:
        cameras, episodes = joined(names, layout, cameras)
    elif len(cameras) > 1:
        raise UserError(f"--cameras={','.join(cameras)}: several cameras require --layout.")
    else:
        cameras, episodes = tuple(cameras) or ("image",), [Episode(name, (name,)) for name in names]
    for camera in cameras:
        check_name(camera, "the name of a camera", source)
    if labels is not None:
        episodes = _labelled(episodes, labels, source)
    reading = Reading(
        root=root,
        cameras=tuple(cameras),
        sampling=sampling,
        labelled=labels is not None,
        seconds=seconds,
        max_bytes=max_mb << 20,
    )
    groups = [episodes[first : first + GROUP] for first in range(0, len(episodes), GROUP)]
    bar = tqdm(groups, desc="sizes of files", unit=" groups", delay=5)  # where each file is asked for over a network
    inputs = [_group(number, group, reading) for number, group in enumerate(bar)]
    how = {"fps": float(sampling.fps)} if sampling.fps is not None else {"every": sampling.every}
    stored = {"min_steps": sampling.min_steps, "resize": list(sampling.size), "quality": sampling.quality}
    options = {
        **(how | stored),
        "layout": layout,
        "cameras": list(cameras),
        "labels": None if labels is None else _identity([(e.name, e.text) for e in episodes if e.text is not None]),
        "seconds": seconds,
        "max_mb": max_mb,
        "input: files": _identity(names),
    }
    return Corpus(
        name="videos",
        version="1.0.0",
        path=source,
        tree=feature_tree(reading.features()),
        splits={"train": inputs},
        info={"description": "Video files as episodes without actions."},
        source={"files": len(names), "ignored": dict(sorted(ignored.items())), "layout": layout},
        facts={**({"fps": float(sampling.fps)} if sampling.fps is not None else {}), "sampling": how | stored},
        options=options,
    )


def _identity(values: Sequence[Any]) -> str:
    """The number of some values, and a hash of them, by which a change shows."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode("utf-8", "surrogateescape"))
    return f"{len(values)} of sha256 {digest.hexdigest()[:16]}"


def find_files(source: Path) -> tuple[Path, list[str], collections.Counter[str]]:
    """Video files by their paths relative to a root folder, sorted and each once, and what else there is by suffix.

    Raises:
        UserError: there are none, or the folder or list cannot be read.
    """
    ignored: collections.Counter[str] = collections.Counter()
    if source.is_dir():
        root, names = source, _walk(source, ignored)
    elif source.is_file() and source.suffix.lower() in SUFFIXES:
        root, names = source.parent, [source.name]
    elif source.is_file():
        root, names = source.parent, _listed(source)
    elif glob.has_magic(str(source)):
        parts = source.parts
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
        names = glob.glob(str(source.relative_to(root)), root_dir=root, recursive=True)
        names = [name for name in names if not (root / name).is_dir()]
    else:
        raise UserError(f"--input={source} does not exist: expected a folder, a pattern, or a text file of paths.")
    unique = sorted({str(PurePath(name)) for name in names})  # `./a.mp4` is what `find` prints
    if len(unique) < len(names):
        ignored["(listed twice)"] += len(names) - len(unique)
    if not unique:
        other = f" It has other files: {_counts(ignored)}." if ignored else ""
        raise UserError(f"--input={source}: no video files ({', '.join(SUFFIXES)}).{other}")
    if ignored:
        print(f"{source}: {len(unique)} video files; ignored: {_counts(ignored)}.")
    return root, unique, ignored


def _walk(folder: Path, ignored: collections.Counter[str]) -> list[str]:
    names: list[str] = []
    seen: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}. The folder cannot be searched for videos.")

    for directory, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above, or to one that was searched
            ignored["(folder linked twice)"] += 1
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        inside = os.path.relpath(directory, folder)
        for file in files:
            suffix = os.path.splitext(file)[1].lower()
            if suffix in SUFFIXES and not file.startswith("."):
                names.append(file if inside == "." else f"{inside}/{file}")
            else:
                ignored[suffix or "(no suffix)"] += 1
    return names


def _listed(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--input={file} is not a text file with one path per line: {e}.") from e
    if any("\0" in line for line in lines):
        raise UserError(f"--input={file} is not a text file with one path per line: it holds a NUL.")
    return [line.strip() for line in lines if line.strip()]


def joined(names: Sequence[str], layout: str, cameras: Sequence[str] = ()) -> tuple[tuple[str, ...], list[Episode]]:
    """Cameras, and episodes of the files that a layout joins, sorted by name.

    A file that does not have the layout, and an episode that lacks a camera, become episodes with a reason to be
    skipped.

    Raises:
        UserError: the layout is unusable, or no file has it.
    """
    fields = re.findall(r"\{(.*?)\}", layout)
    if fields.count("camera") != 1 or fields.count("episode") > 1 or set(fields) - {"camera", "episode"}:
        raise UserError(
            f"--layout={layout}: expected {{camera}} once and {{episode}} at most once, as in "
            "{episode}/{camera}.mp4."
        )
    pattern = re.escape(layout).replace(r"\{camera\}", "(?P<camera>[^/]+)").replace(r"\{episode\}", "(?P<episode>.+)")
    found: dict[str, dict[str, str]] = {}
    others = []
    for name in names:
        match = re.fullmatch(pattern, name)
        if match is None:
            others.append(Episode(name, (), None, "not in the layout", f"--layout={layout}"))
        else:
            found.setdefault(match.groupdict().get("episode", "all"), {})[match["camera"]] = name
    if not found:
        raise UserError(f"--layout={layout}: none of {len(names)} files has it; the first is {names[0]}.")
    present = collections.Counter(camera for files in found.values() for camera in files)
    cameras = tuple(dict.fromkeys(cameras)) or tuple(sorted(present))
    if passed := {camera: count for camera, count in sorted(present.items()) if camera not in cameras}:
        print(f"--cameras leaves out {sum(passed.values())} files of {', '.join(passed)}.")
    if len(cameras) > 16:
        raise UserError(
            f"--layout={layout} finds {len(cameras)} cameras: {', '.join(cameras[:5])}, ... Correct it, or choose "
            "--cameras."
        )
    episodes = []
    for name, files in found.items():
        missing = [camera for camera in cameras if camera not in files]
        if missing:
            detail = f"no file of {', '.join(missing)}"
            episodes.append(Episode(name, (), None, "camera missing", detail))
        else:
            episodes.append(Episode(name, tuple(files[camera] for camera in cameras)))
    return cameras, sorted([*episodes, *others], key=lambda episode: (episode.name, episode.files))


def _labelled(episodes: Sequence[Episode], labels: Labels, source: Path) -> list[Episode]:
    result = [episode._replace(text=labels.of((episode.name, *episode.files))) for episode in episodes]
    if not labels.used:
        raise UserError(
            f"--labels: none of its {len(labels)} entries is of a file in {source}. Its keys are like "
            f"{labels.examples()}; the files like {', '.join(episode.name for episode in episodes[:3])}."
        )
    without = sum(episode.text is None for episode in result)
    print(f"labels: {len(episodes) - without} episodes have one, {without} have none; {len(labels)} entries are read.")
    return result


def _group(number: int, group: Sequence[Episode], reading: Reading) -> Clips:
    files = [reading.root / file for episode in group for file in episode.files]
    name = f"group {number:06d}, from {_shown(group[0].name)}"
    return Clips(
        name=name,
        size=sum(map(_size, files)),
        modified=modified(files),
        promised=len(group),
        group=tuple(group),
        reading=reading,
    )


def _size(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return 0  # the decoder says why


def _shown(name: str) -> str:
    """A file name that may not be UTF-8 as text."""
    return name.encode("utf-8", "backslashreplace").decode()


def _counts(counter: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counter.items()))
