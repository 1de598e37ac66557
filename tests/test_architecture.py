"""The rooms of the package: which may import which, and which know no system, mode or modality by name.

Read from the sources, nothing is imported. An exception is a violation that still exists: it stands in a list here, and
a list that names one that is gone fails too, so that the lists only get shorter.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("uwm_jax", "data_prep", "configs", "launch", "tests")

BASE = ("ending", "errors", "files", "reading", "storage", "host_memory", "host_tpu")
FLOORS = (*BASE, "models", "diffusion", "codecs", "parallel", "data")
LIBRARY = (*FLOORS, "hub", "config", "config_checks", "systems", "torch_bridge", "training", "synthetic")

# Room: the rooms that it may import, besides itself. A room is a folder or a module right below `uwm_jax`; `systems` is
# the registry with its base, `systems.*` is the folder of one system. Commands see everything but other commands.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "": (),
    "ending": (),
    "errors": ("ending",),
    "storage": ("errors",),
    "files": ("errors", "storage"),
    "reading": ("errors", "files", "storage"),
    "host_memory": ("host_tpu",),
    "host_tpu": (),
    "hub": BASE,
    "models": ("errors",),
    "diffusion": ("errors",),
    "codecs": ("errors", "models"),
    "parallel": (*BASE, "models"),
    "data": (*BASE, "storage", "parallel"),
    "envs": BASE,
    "torch_bridge": (*FLOORS, "hub", "config", "backend", "systems"),
    "systems": (*FLOORS, "systems.*"),
    "systems.*": (*FLOORS, "systems", "torch_bridge"),
    "config": (*BASE, "hub", "config_checks", "codecs", "data", "systems"),
    "config_checks": ("errors", "reading", "codecs", "data", "systems"),
    "config_help": ("config",),
    "synthetic": (*FLOORS, "config", "systems"),
    "training": (*FLOORS, "", "hub", "config", "config_checks", "systems", "torch_bridge"),
    "backend": (*BASE, "data", "systems"),
    "actor": (*BASE, "backend", "data", "systems"),
    "policy": (*BASE, "actor", "backend", "data"),
    "evaluation": (*LIBRARY, "envs", "backend", "policy"),
    "reporting": (*LIBRARY, "envs", "evaluation", "sweeps"),
    "runs": (*LIBRARY, "evaluation"),
    "sweeps": (*LIBRARY, "evaluation", "runs"),
    "conversion": (*LIBRARY, "backend", "evaluation", "reporting"),
    "serving": (*LIBRARY, "actor", "backend", "cli", "reporting"),
    "cli": (*BASE, "hub"),
    "supervision": (*BASE, "sweeps", "training"),
    "benchmarking": (*LIBRARY, "backend", "cli", "conversion"),
    "planning": (*LIBRARY, "", "cli", "evaluation", "sweeps"),
    "__main__": ("", "ending", "errors"),
}

# (importing module, imported module) that the table forbids, and that still are: the PyTorch benchmark is UWM's.
IMPORTS_STILL: set[tuple[str, str]] = {
    ("benchmarking.rows", "systems.uwm.modes"),
    ("benchmarking.rows", "systems.uwm.system"),
}

# Imports of ours in functions, where torch, or what the extra `serve` brings, must stay out until it is asked for;
# `torch_bridge` may have more.
TORCH_STAYS_OUT = {
    ("serve", "serving.running"),
    ("benchmark_serving", "benchmarking.serving_load"),
    ("benchmarking.memory", "benchmarking.rows"),
    ("benchmarking.memory", "benchmarking.torch_rows"),
    ("benchmarking.torch_inference", "benchmarking.torch_answers"),
    ("benchmarking.torch_inference", "benchmarking.torch_rows"),
    ("benchmarking.torch_process", "benchmarking.torch_rows"),
}
# The others that still are.
HIDDEN_STILL: set[tuple[str, str]] = set()


class Import(NamedTuple):
    """One imported module of ours, without `uwm_jax.`, and whether the statement stands in a function."""

    target: str
    hidden: bool
    line: int


@functools.cache
def sources() -> dict[str, ast.Module]:
    """The parsed modules of the package by name, without `uwm_jax.`; "" is the package itself."""
    trees = {}
    for file in sorted((ROOT / "uwm_jax").rglob("*.py")):
        parts = file.relative_to(ROOT / "uwm_jax").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(file.read_text(), str(file))
    return trees


def imports_of(tree: ast.Module) -> Iterator[Import]:
    hidden = {
        inner
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("uwm_jax.") in sources() else node.module for name in names]
        for name in dict.fromkeys(names):
            if name.split(".")[0] in OURS:
                assert isinstance(node, (ast.Import, ast.ImportFrom))
                yield Import(name.removeprefix("uwm_jax").removeprefix("."), node in hidden, node.lineno)


@functools.cache
def imports() -> dict[str, list[Import]]:
    """The imports of ours of every module."""
    return {name: list(imports_of(tree)) for name, tree in sources().items()}


@functools.cache
def commands() -> frozenset[str]:
    """Modules with a `command`, which `pyproject.toml` makes a console script of."""
    return frozenset(
        name
        for name, tree in sources().items()
        for node in tree.body
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["command"]
    )


@functools.cache
def room_of(module: str) -> str:
    parts = module.split(".")
    is_folder = any(name.startswith(".".join(parts[:2]) + ".") for name in sources())
    if parts[0] == "systems" and len(parts) > 1 and (len(parts) > 2 or is_folder):
        return f"systems.{parts[1]}"
    return parts[0]


def may_import(importer: str, imported: str) -> bool:
    here, there = room_of(importer), room_of(imported)
    if imported.split(".")[0] in OURS or imported in commands():
        return False
    if importer in commands() or here == there:
        return True
    key, target = ("systems.*" if room.startswith("systems.") else room for room in (here, there))
    return target in MAY_IMPORT[key]


def test_every_room_has_a_row() -> None:
    rooms = {room_of(name) for name in sources() if name not in commands()}
    rows = {"systems.*" if room.startswith("systems.") else room for room in rooms}
    assert rows == MAY_IMPORT.keys(), (
        "say in MAY_IMPORT what a new room may import, and drop the row of one that is gone"
    )
    assert {"train", "evaluate", "rollout", "sample", "report", "convert"} <= commands()


def test_rooms_import_only_what_lies_below_them() -> None:
    found = {
        (name, target): line
        for name, found_in in imports().items()
        for target, _, line in found_in
        if not may_import(name, target)
    }
    new = [
        f"uwm_jax/{a.replace('.', '/')}.py:{found[a, b]} imports {b}" for a, b in sorted(found.keys() - IMPORTS_STILL)
    ]
    assert not new, "MAY_IMPORT forbids:\n" + "\n".join(new)
    assert not (gone := sorted(IMPORTS_STILL - found.keys())), f"these are mended: take them off the list: {gone}"


def test_no_import_of_ours_hides_in_a_function() -> None:
    found = {
        (name, target)
        for name, found_in in imports().items()
        for target, hidden, _ in found_in
        if hidden and room_of(name) != "torch_bridge"
    }
    known = TORCH_STAYS_OUT | HIDDEN_STILL
    assert not (new := sorted(found - known)), f"imports inside of functions: {new}"
    assert not (gone := sorted(known - found)), f"these are mended: take them off the list: {gone}"


# The rooms of `data_prep`, each of which imports itself and those before it that it names. Commands, the modules right
# below `data_prep`, import all of them, and nothing imports a command.
PREPARES: dict[str, tuple[str, ...]] = {
    "jobs": (),
    "sources": ("jobs",),
    "conversion": ("jobs", "sources"),
    "caches": ("jobs",),
    "checks": ("jobs", "sources"),
    "rates": ("jobs", "sources", "conversion", "caches"),
}


@functools.cache
def preparing() -> dict[str, set[str]]:
    """The modules of `data_prep` by name, and all of ours that each imports."""
    trees = {file.relative_to(ROOT): ast.parse(file.read_text()) for file in sorted((ROOT / "data_prep").rglob("*.py"))}
    names = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): tree for file, tree in trees.items()}
    found: dict[str, set[str]] = {}
    for name, tree in names.items():
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                both = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {full if full in names else str(node.module) for full in both} | both & {
                    f"uwm_jax.{command}" for command in commands()
                }
    return found


def test_modules_of_data_prep_import_no_command() -> None:
    starts = {f"uwm_jax.{name}" for name in commands()} | {
        f"data_prep.{file.stem}"
        for file in (ROOT / "data_prep").glob("*.py")
        if "command = cli.command" in ast.unparse(ast.parse(file.read_text()))
    }
    assert {"data_prep.demo", "data_prep.reshard", "data_prep.stats", "data_prep.inspect", "uwm_jax.train"} <= starts
    assert {name for name in preparing() if name.count(".") == 1} - starts == {f"data_prep.{room}" for room in PREPARES}
    found = {(name, target) for name, targets in preparing().items() for target in targets & starts}
    assert not found, f"commands that are imported: {sorted(found)}"


def test_rooms_of_data_prep_import_only_what_lies_below_them() -> None:
    used = set()
    for name, targets in preparing().items():
        for target in targets:
            if name.count(".") > 1 and target.startswith("data_prep."):
                here, there = name.split(".")[1], target.split(".")[1]
                assert there in (here, *PREPARES[here]), f"{name} imports {target}"
                used.add((here, there))
    allowed = {(room, below) for room, rooms in PREPARES.items() for below in rooms}
    assert not (gone := allowed - used), f"no module does so: take them out of PREPARES: {gone}"
    circle = in_circles(preparing())
    assert not circle, f"import circles among {sorted(circle)}"


def in_circles(below: dict[str, set[str]]) -> set[str]:
    """Those that import each other, and those between two circles; `below` are the modules that each imports."""
    left = {name: targets - {name} for name, targets in below.items()}
    while leaves := [name for name, targets in left.items() if not targets & left.keys()]:
        left = {name: targets for name, targets in left.items() if name not in leaves}
    while tops := left.keys() - set().union(*left.values()):
        left = {name: targets for name, targets in left.items() if name not in tops}
    return set(left)


def test_no_modules_import_each_other_in_a_circle() -> None:
    circle = in_circles({name: {target for target, *_ in found_in} for name, found_in in imports().items()})
    assert not circle, f"import circles among {sorted(circle)}"
    assert in_circles({"top": {"a"}, "a": {"b"}, "b": {"c", "leaf"}, "c": {"a"}, "leaf": set()}) == {"a", "b", "c"}


# --- Vocabulary: what trains, cuts, stores and shows every system names none, and none of what they model. -------

VOCABULARY = {
    # Also in sentences and in names. `dp` and `pad` are other words too, so these count as strings of their own only.
    "system": ("uwm", "gr1", "uva", "dp", "pad"),
    # As strings: a call may be `forward`, and a policy is what acts.
    "mode": ("policy", "video", "forward", "inverse", "joint"),
    # As strings and in names: a batch's keys belong to its spec, a loss's parts to its system.
    "modality": ("action", "next_obs"),
}
SPEAKS_OF_NONE = (
    "training/**/*.py",
    "parallel/*.py",
    "models/*.py",
    "data/loader.py",
    "reporting/page.py",
    "reporting/run_page.py",
)

# (file, word) that is still there: a config field has the word in its name.
WORDS_STILL: set[tuple[str, str]] = {
    ("training/fixed_fields.py", "action"),
}


def modalities(name: str) -> set[str]:
    """Those that stand in a name such as `use_actions` or `NEXT_OBS_LATENT`."""
    return {word for word in VOCABULARY["modality"] if re.search(rf"(?:^|_){word}s?(?:$|_)", name.lower())}


def words_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(word of the vocabulary, line) of string literals but docstrings, and of names that the code binds or reads."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    every = [word for words in VOCABULARY.values() for word in words]
    for node in ast.walk(tree):
        found: set[str] = set()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            if " " not in node.value:  # a key or a path
                found |= set(re.split(r"[/.,:*]", node.value)) & set(every) | modalities(re.sub(r"\W", "_", node.value))
            found |= {word for word in ("uwm", "gr1", "uva") if re.search(rf"(?i)\b{word}\b(?!-)", node.value)}
        for field in ("id", "attr", "arg", "name"):
            name = getattr(node, field, None)
            if isinstance(name, str) and not name.startswith("uwm_jax"):
                found |= modalities(name) | {"uwm", "gr1", "uva"} & set(name.lower().split("_"))
        for word in found:
            yield word, getattr(node, "lineno", 0)


def test_what_serves_every_system_names_none() -> None:
    found: dict[tuple[str, str], list[int]] = {}
    for file in sorted(file for pattern in SPEAKS_OF_NONE for file in (ROOT / "uwm_jax").glob(pattern)):
        for word, line in words_of(ast.parse(file.read_text())):
            found.setdefault((file.relative_to(ROOT / "uwm_jax").as_posix(), word), []).append(line)
    new = [f"{file}:{min(found[file, word])}: {word}" for file, word in sorted(found.keys() - WORDS_STILL)]
    assert not new, "these know a system, a mode or a modality by name:\n" + "\n".join(new)
    assert not (gone := sorted(WORDS_STILL - found.keys())), f"these are mended: take them off the list: {gone}"


# Where a system has a name outside of its folder: the default of `config.base` and its help, configurations of the
# official code that name no algorithm, and the modules that are one system's in PyTorch and on its clock.
NAMES_A_SYSTEM = {"config", "config_help", "conversion.from_torch"}
OF_ONE_SYSTEM = ("systems", "torch_bridge", "benchmarking")


def test_no_branch_outside_of_the_systems_names_one() -> None:
    found = {
        name
        for name, tree in sources().items()
        if name.split(".")[0] not in OF_ONE_SYSTEM
        and {"uwm", "gr1", "uva", "dp"} & {word for word, _ in words_of(tree)}
    }
    assert found == NAMES_A_SYSTEM


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('x = batch["action"]', {"action"}),
        ('y = losses["loss/next_obs"]', {"next_obs"}),
        ('z = f"{use}/action_mse"', {"action"}),
        ("z = spec.action_dim", {"action"}),
        ("def use_actions(next_obs_latent): pass", {"action", "next_obs"}),
        ("def load_gr1_names(): pass", {"gr1"}),
        ('f"expected a run of UWM, found {name}"', {"uwm"}),
        ("'pip install uwm-jax[torch]'", set()),
        ('if mode in ("policy", "joint"): pass', {"policy", "joint"}),
        ('"""Docstrings may say action."""\nforward = policy.transaction  # and comments policy', set()),
        ('say("the policy has no action")\nwindow.pad(x)\nfrom uwm_jax import policy', set()),
        ('if kind == "dp" or kind == "pad": pass', {"dp", "pad"}),
    ],
)
def test_the_reader_finds_words(source: str, words: set[str]) -> None:
    assert {word for word, _ in words_of(ast.parse(source))} == words


@pytest.mark.parametrize(
    ("importer", "imported", "may"),
    [
        ("models.layers", "errors", True),
        ("models.layers", "diffusion.schedule", False),
        ("training.step", "systems.base", True),
        ("training.step", "systems", True),
        ("training.step", "systems.uwm.modes", False),
        ("systems", "systems.uwm", True),
        ("systems.uwm.network", "models.resnet", True),
        ("systems.uwm.network", "systems.pad.network", False),
        ("evaluation.metrics", "reporting.page", False),
        ("train", "evaluation.metrics", True),
        ("train", "rollout", False),
        ("envs.pusht", "data_prep.demo", False),
    ],
)
def test_the_table_is_read_as_it_is_meant(importer: str, imported: str, may: bool) -> None:
    assert may_import(importer, imported) is may
