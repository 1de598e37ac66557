"""The members of a sweep: which configs it trains, under which names, and which of them share a program."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.config_checks import matches
from uwm_jax.errors import UserError
from uwm_jax.files import local_path
from uwm_jax.reading import run_python

# Fields that enter the step as arrays: members that differ in nothing else train in one program.
SCALARS = ("loss.weights.*", "optimizer.learning_rate", "seed")

LONGEST = 255  # bytes of a folder's name, on most file systems

Overrides = Mapping[str, Any]  # {field, such as "loss.weights.action": value}


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      name: of its workdir below `members/`.
      overrides: what it changes in the sweep's config.
      config: validated.
    """

    name: str
    overrides: dict[str, Any]
    config: ConfigDict


def grid(fields: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of values, the last field varying fastest: {field: values} -> [{field: value}]."""
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def parse_grid(flags: Iterable[str]) -> list[dict[str, str]]:
    """The combinations that `--grid=FIELD=V1,V2` flags ask for, their values still as text.

    Raises UserError for another form, or a field that is given twice.
    """
    fields: dict[str, list[str]] = {}
    for flag in flags:
        name, _, values = flag.partition("=")
        name = name.removeprefix("config.")
        found = [value.strip() for value in values.split(",")]
        if not name or not all(found):
            raise UserError(f"--grid={flag}: expected FIELD=V1,V2 such as loss.weights.action=1,5 or seed=0,1,2.")
        if name in fields:
            raise UserError(f"--grid={flag}: {name} is given twice; name all its values in one flag.")
        fields[name] = found
    return grid(fields)


def read_members(spec: str) -> list[dict[str, Any]]:
    """What `get_members([argument])` of a sweep's config file returns; `spec` is `FILE.py[:argument]`.

    Raises UserError where the file has no such function, or it returns another type.
    """
    file, _, argument = spec.partition(":")
    path = local_path(file, "--config")
    expected = (
        "a file with get_members() too, which returns [{field: value}], such as "
        'uwm_jax.sweeps.members.grid({"loss.weights.action": (1.0, 5.0)}); any other file needs --grid=FIELD=V1,V2'
    )
    arguments = [argument] if argument else []
    found = run_python(path, f"--config: {path}", expected, lambda module: module.get_members(*arguments))
    if not isinstance(found, list) or not found or not all(map(_is_overrides, found)):
        raise UserError(f"--config: get_members of {path} returned {found!r:.200}, expected {expected}.")
    return [dict(x) for x in found]


def asked_for(spec: str, flags: Sequence[str] | None) -> list[dict[str, Any]]:
    """The overrides of members that `--config` and `--grid` ask for: those of `parse_grid`, or of `read_members`.

    Raises UserError as these do, and for a grid of a file that names its members itself.
    """
    if not flags:
        return read_members(spec)
    if config_lib.has_members(spec):
        raise UserError(
            f"--grid: {spec.partition(':')[0]} names its members itself, in get_members(). Leave --grid out, or vary "
            "a config without get_members(), such as the one that it is made from."
        )
    return parse_grid(flags)


def _is_overrides(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(name, str) for name in found)


def make_members(base: ConfigDict, overrides: Sequence[Overrides]) -> list[Member]:
    """The members that these overrides make of a config.

    Where `config.data.seed` is -1 it becomes the base config's `seed` in all of them, so that they see the same data; a
    member that changes it to -1 itself gets its own `seed`.

    Raises UserError for an unknown field, a value that does not fit, a list in `--grid`, or members whose names are
    equal or too long for a folder.
    """
    fields = sorted({name for changed in overrides for name in changed})
    short = _short_names(fields)
    made: list[Member] = []
    for changed in overrides:
        config = base.copy_and_resolve_references()
        config.data.seed = config_lib.data_seed(base)
        _apply(config, changed)
        config.data.seed = config_lib.data_seed(config)  # of a member that asks for -1
        config_lib.validate(config)
        flat = config_lib.flatten(config)
        values = {name: flat[name] for name in changed}
        made.append(Member(",".join(f"{short[n]}={_text(values[n])}" for n in changed) or "member", values, config))
    _check_names(made)
    return made


def groups(members: Sequence[Member]) -> list[list[Member]]:
    """Members that train in one program, in the order of their first ones."""
    found: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        flat = config_lib.flatten(member.config)
        key = tuple((name, repr(value)) for name, value in flat.items() if not matches(name, SCALARS))
        found.setdefault(key, []).append(member)
    return list(found.values())


def describe(groups: Sequence[Sequence[Member]]) -> str:
    """The grouping, for people."""
    count = sum(map(len, groups))
    lines = [f"{count} members in {len(groups)} program(s), which run one after another:"]
    for number, group in enumerate(groups, 1):
        lines.append(f"  {number}: {len(group)} together: {'  '.join(member.name for member in group)}")
    return "\n".join(lines)


def _check_names(made: Sequence[Member]) -> None:
    by_name: dict[str, list[Member]] = collections.defaultdict(list)
    for member in made:
        by_name[member.name].append(member)
    for name, members in by_name.items():
        if len(size := name.encode()) > LONGEST:
            raise UserError(
                f"a member changes {len(members[0].overrides)} fields to values that make a name of {len(size)} bytes, "
                f"{name!r:.80}...: a folder's has at most {LONGEST}. Vary fewer fields, or shorter texts."
            )
        different = [member.overrides for member in members if member.overrides != members[0].overrides]
        if different:
            raise UserError(
                f"two members would share the folder {name!r}: {members[0].overrides} and {different[0]}. Letters, "
                "digits and _ + - . alone tell names apart: use values that differ in them."
            )
        if len(members) > 1:
            raise UserError(f"the sweep has {len(members)} members {name!r}: name every combination of values once.")


def _apply(config: ConfigDict, changed: Overrides) -> None:
    for name, value in changed.items():
        if isinstance(value, str):
            config_lib.apply_overrides(config, [(name, value)])
            if isinstance(config_lib.flatten(config)[name], tuple):
                raise UserError(f"--grid={name}=...: a list cannot be varied by a flag; write a file with get_members.")
        else:
            config_lib.apply_overrides(config, [(name, str(value))])


def _short_names(fields: Sequence[str]) -> dict[str, str]:
    """{field: the end of its name that no other field has}."""
    short = {}
    for name in fields:
        parts = name.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        short[name] = next((e for e in ends if sum(f".{f}".endswith(f".{e}") for f in fields) == 1), name)
    return short


def _text(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = str(value)
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        text = short
    return re.sub(r"[^\w.+-]+", "_", text).strip("_") or "none"
