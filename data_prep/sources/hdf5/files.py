"""Demonstrations, keys, splits, instructions and robot facts in the hdf5 files of robomimic and LIBERO.

Both have groups `data/demo_N` with `actions`, `obs/*`, `rewards`, `dones` and the simulator's `states`, and may name
subsets of the demonstrations under `mask/`. LIBERO has a file per task, whose instruction is an attribute of `data`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from uwm_jax.data.names import check_name, not_the_data
from uwm_jax.errors import UserError, suggest
from uwm_jax.reading import parse_json

LIBERO, ROBOMIMIC = "LIBERO", "robomimic"

_RENAMED = {"actions": "action", "rewards": "reward", "dones": "is_terminal"}
_SCALARS = ("rewards", "dones")  # RLDS has these without an axis
MAX_SIDE = 65_500  # pixels, of JPEG
_FIRST = ("train", "valid", "val", "test")  # of several masks that share demonstrations, these are taken


@dataclasses.dataclass(frozen=True)
class Stored:
    """A dataset of every demonstration: its name in it (`obs/agentview_rgb`), the shape of a step and numpy's dtype."""

    source: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def image(self) -> bool:
        """Whether it holds 8-bit pictures, channels first or last."""
        return self.dtype == "uint8" and len(self.shape) == 3

    @property
    def channels_first(self) -> bool:
        return self.shape[-1] not in (1, 3) and self.shape[0] in (1, 3)

    @property
    def scalar(self) -> bool:
        """Whether RLDS has one number a step, whatever the shape of a step is here."""
        return self.source in _SCALARS

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a picture."""
        return self.shape[1:3] if self.channels_first else self.shape[:2]  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class File:
    """One file.

    Attributes:
        name: its path below the input.
        demos: names of the demonstrations in numeric order.
        steps: number of steps of each.
        masks: name of a subset -> its demonstrations.
        keys: name in a demonstration -> how it is stored, by the first one.
        others: what else `data` holds.
        language: the instruction; "" if the file has none.
        env: `env_args`, with which the simulator was made; {} if the file has none.
    """

    name: str
    path: Path
    kind: str
    demos: tuple[str, ...]
    steps: tuple[int, ...]
    masks: Mapping[str, frozenset[str]]
    keys: Mapping[str, Stored]
    others: tuple[str, ...]
    language: str
    env: Mapping[str, Any]


def find_files(path: Path) -> list[File]:
    """The file `path`, or the hdf5 files below the directory.

    Raises:
        UserError: there is none, one is damaged, a placeholder or of another layout, a name is no UTF-8, or both
            kinds are mixed.
    """
    if path.is_file():
        found, root = [path], path.parent
    else:
        found, root = sorted(p for p in path.rglob("*") if p.suffix in (".hdf5", ".h5") and p.is_file()), path
        hidden = [p for p in found if p.name.startswith(".")]  # such as macOS puts next to each file of an archive
        if hidden:
            print(f"{path}: {len(hidden)} hidden files are passed over ({hidden[0].name}).")
        found = [p for p in found if not p.name.startswith(".")]
    if not found:
        raise UserError(f"--input={path}: no hdf5 file there. Expected a .hdf5 or .h5 file, or a directory of them.")
    names = [check_name(str(file.relative_to(root)), "the name of a file", root, nested=True) for file in found]
    files = [_read(file, name) for file, name in zip(found, names, strict=True)]
    kinds = {file.kind: file.name for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{path} holds files of LIBERO ({kinds[LIBERO]}) and of robomimic ({kinds[ROBOMIMIC]}), whose pictures "
            "have different orientations. Convert them one by one."
        )
    return files


def open_file(path: Path) -> Any:
    """An `h5py.File` for reading; OSError if it is damaged, UserError if h5py is not installed."""
    try:
        import h5py
    except ImportError as e:
        raise UserError(
            "h5py is not installed. Run `pip install 'uwm_jax[hdf5]'` (or `-e '.[hdf5]'` in a clone)."
        ) from e
    return h5py.File(path, "r", locking=False)  # read-only and network file systems often have no locks


def our_name(source: str) -> str:
    """The step key of a dataset of a demonstration: `observation/x` for `obs/x`, `action`, `reward`, `is_terminal`."""
    head, _, rest = source.partition("/")
    return f"observation/{rest.replace('/', '_')}" if head == "obs" else _RENAMED.get(source, source.replace("/", "_"))


def common_keys(files: Sequence[File]) -> tuple[dict[str, Stored], dict[str, str]]:
    """The keys that all files have in one shape, by our name, and the reasons for which others are left out.

    Raises:
        UserError: a file has no actions or other actions, or two keys would get one name.
    """
    kept: dict[str, Stored] = {}
    left_out: dict[str, str] = {}
    for source in dict.fromkeys(source for file in files for source in file.keys):
        variants: dict[Stored | None, str] = {}
        for file in files:
            variants.setdefault(file.keys.get(source), file.name)
        reason = _why_left_out(next(stored for stored in variants if stored is not None))
        if not reason and len(variants) > 1:
            found = [f"{v.dtype} {v.shape} in {name}" if v else f"none in {name}" for v, name in variants.items()]
            reason = f"differs between files: {', '.join(found[:3])}"
        if reason and source == "actions":
            raise UserError(f"{files[0].path}: data/*/actions: {reason}. Expected one vector of numbers per step.")
        if reason:
            left_out[source] = reason
            continue
        name = check_name(our_name(source), "the name of a dataset", files[0].path, nested=True)
        if name in kept:
            raise UserError(f"{files[0].path}: {kept[name].source} and {source} would both become {name!r}.")
        kept[name] = next(iter(variants))  # type: ignore[assignment]
    if "action" not in kept:
        raise UserError(f"{files[0].path}: data/{files[0].demos[0]} has no `actions`.")
    return kept, left_out


def split_demos(files: Sequence[File], wanted: Sequence[str]) -> tuple[dict[str, list[list[str]]], list[str]]:
    """The demonstrations of each split, for each file, and the masks that were not taken.

    Every `mask/<name>` is a split, unless it shares demonstrations with one before it (train, valid, val and test come
    first): then it is taken only by name. Without a mask `train`, it holds the demonstrations that no split has.

    Args:
        wanted: names of the splits; () for the above.
    Raises:
        UserError: an unknown split, or none with a demonstration.
    """
    names = list(dict.fromkeys(name for file in files for name in file.masks))
    names.sort(key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    members = {name: [file.masks.get(name, frozenset()) for file in files] for name in names}
    taken: list[set[str]] = [set() for _ in files]
    splits: dict[str, list[list[str]]] = {}
    passed = []
    for name in names:
        apart = not any(own & others for own, others in zip(members[name], taken, strict=True))
        if name in wanted or (not wanted and apart):
            splits[name] = [[d for d in file.demos if d in own] for file, own in zip(files, members[name], strict=True)]
        if apart:
            for own, others in zip(members[name], taken, strict=True):
                others |= own
        if name not in splits:
            passed.append(name)
    rest = [[d for d in file.demos if d not in others] for file, others in zip(files, taken, strict=True)]
    if "train" not in names and any(rest) and (not wanted or "train" in wanted):
        splits["train"] = rest
    unknown = [name for name in wanted if name not in splits]
    if unknown:
        known = [*names] + ["train"] * ("train" not in names)
        raise UserError(
            f"--split: {files[0].path} has no mask {unknown[0]!r}; it has {', '.join(known)}."
            f"{suggest(unknown[0], known)}"
        )
    splits = {name: parts for name, parts in splits.items() if any(parts)}
    if not splits:
        raise UserError(
            f"{files[0].path}: no mask of {', '.join(wanted or names)} names a demonstration that is there, such as "
            f"{files[0].demos[0]}. Correct the masks under `mask/`, or choose others with --split."
        )
    return splits, passed


def count_unused(files: Sequence[File], splits: Mapping[str, Sequence[Iterable[str]]]) -> int:
    """Number of demonstrations that are in no split."""
    used = [set(itertools.chain(*parts)) for parts in zip(*splits.values(), strict=True)]
    return sum(len(set(file.demos) - own) for file, own in zip(files, used, strict=True))


def remarks_of(files: Sequence[File]) -> list[str]:
    """Remarks on instructions and demonstrations that are missing."""
    found = []
    without = [file.name for file in files if not file.language]
    if 0 < len(without) < len(files):
        found.append(
            f"{len(without)} of {len(files)} files have no instruction ({without[0]}): an empty one is stored."
        )
    for file in files:
        if file.others:
            found.append(
                f"{file.name}: data holds {len(file.others)} items that are no demo_N, and left out ({file.others[0]})."
            )
        absent = set().union(*file.masks.values()) - set(file.demos)
        if absent:
            found.append(f"{file.name}: its masks name {len(absent)} demonstrations that it lacks ({min(absent)}).")
    return found


def _read(path: Path, name: str) -> File:
    if found := not_the_data(path):
        raise UserError(f"{path} {found}.")
    try:
        with open_file(path) as file:
            data = file.get("data")
            demos = [d for d in (data if data is not None else ()) if re.fullmatch(r"demo_\d{1,18}", d)]
            if not demos:
                raise UserError(
                    f"{path}: no groups data/demo_N, as robomimic and LIBERO have them; it holds {', '.join(file)}."
                )
            others = tuple(sorted(set(data) - set(demos)))
            demos.sort(key=lambda demo: int(demo.removeprefix("demo_")))
            steps = tuple(len(data[d]["actions"]) if "actions" in data[d] else 0 for d in demos)
            masks = {
                check_name(mask, "the name of a mask", path): frozenset(_text(d) for d in values[()])
                for mask, values in (file.get("mask") or {}).items()
            }
            attributes = {key: _text(value) for key, value in data.attrs.items()}
            kind = LIBERO if {"problem_info", "bddl_file_name"} & attributes.keys() else ROBOMIMIC
            language = _language(attributes.get("problem_info"), path)
            env = parse_json(attributes.get("env_args") or "{}", f"{path}: data.attrs['env_args']")
            return File(name, path, kind, tuple(demos), steps, masks, _keys(data[demos[0]]), others, language, env)
    except (OSError, RuntimeError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not a complete hdf5 file ({str(e)[:200]}). Copy it again.") from e


def _keys(demo: Any) -> dict[str, Stored]:
    """The datasets of a demonstration that have a row per step."""
    keys: dict[str, Stored] = {}

    def visit(name: str, item: Any) -> None:
        if hasattr(item, "shape") and item.shape:
            keys[name] = Stored(name, tuple(item.shape[1:]), item.dtype.name)

    demo.visititems(visit)
    lengths = collections.Counter(demo[name].shape[0] for name in keys)
    steps = len(demo["actions"]) if "actions" in keys else max(lengths, key=lengths.__getitem__, default=0)
    return {name: stored for name, stored in keys.items() if demo[name].shape[0] == steps}


def _why_left_out(stored: Stored) -> str:
    if stored.source.startswith("next_obs/"):
        return "the observation of the following step"
    if stored.source == "actions" and (len(stored.shape) != 1 or not re.match("float|u?int", stored.dtype)):
        return f"{stored.dtype} of shape {stored.shape} per step"
    if len(stored.shape) == 3 and ("depth" in re.split(r"[._/\-]", stored.source) or stored.dtype != "uint8"):
        return "depth, which is no camera"
    if stored.image and not {stored.shape[0], stored.shape[-1]} & {1, 3}:
        return f"pictures of shape {stored.shape}; a camera has 1 or 3 channels"
    if stored.image and not 0 < min(stored.size) <= max(stored.size) <= MAX_SIDE:
        return f"pictures of {stored.size[0]}x{stored.size[1]} pixels"
    if stored.scalar and math.prod(stored.shape) != 1:
        return f"{stored.source} of shape {stored.shape} per step"
    if not re.match("float|u?int|bool", stored.dtype):
        return f"values of {stored.dtype}"
    return ""


def _language(problem_info: str | None, path: Path) -> str:
    if problem_info is None:
        return ""
    where = f"{path}: data.attrs['problem_info']"
    text = parse_json(problem_info, where).get("language_instruction") or ""
    # A list of the text's parts in some releases.
    text = "".join(map(str, text)) if isinstance(text, list) else text
    if not isinstance(text, str):
        raise UserError(f"{where}: language_instruction is {str(text)[:60]!r}; expected a string.")
    return text.strip().strip('"').strip()


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
