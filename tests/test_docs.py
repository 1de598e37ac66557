"""The commands of PAGES run, in their order, in tiny form; those of other pages name what exists.

The pages are taken as a person would: their Python blocks become the files that they name, their bash blocks are run
one after the other. What makes them tiny is put before their own flags, by a `python` that stands first on the PATH;
the values and paths that only a person's machine has are replaced, and each replacement has to happen. Blocks marked
`sh` in place of `bash` need an official checkpoint or a bucket, and are not run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from absl.flags import FLAGS

from tests import quick_compile
from tests.data import rlds_source
from uwm_jax import cli
from uwm_jax.config import MAY_CHANGE, base, flatten, load, source, validate
from uwm_jax.data.windows import WindowSpec
from uwm_jax.training.checkpoints.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("training", "evaluation", "finetuning")}
PAGE = "\n".join(PAGES.values())

TINY = (
    *("total_steps=2", "batch_size=4", "log_every=1", "checkpoint.every=2", "eval.num_windows=4"),
    *("model.embed_dim=32", "model.depth=2", "model.num_heads=2", "model.num_registers=2"),
    *("model.timestep_embed_dim=16", "model.encoder.stage_sizes=1,", "model.encoder.width=16"),
    *("model.dtype=float32", "model.codec.dtype=float32", "model.codec.name=pixels", "data.resize=16,16"),
    *("data.crop=16,16", "data.num_streams=8", "data.num_threads=1", "data.window.action=1,2,3,4"),
    "data.window.next_obs=5,6",
)

# What a person's machine has and a test does not; every pattern must be found on the page.
REPLACED = {
    r"export UWM_DATA_DIR=\S+\n": "",
    r"\bRLDS_DIR\b": "$SOURCE",
    r"\bVIDEO_RLDS_DIR\b": "$SOURCE",
    r"batch_size=64\b": "batch_size=4",
    r"total_steps=20_000\b": "total_steps=2",
    r"total_steps=200_000\b": "total_steps=3",
    r"total_steps=300_000\b": "total_steps=4",
    r"total_steps=50_000\b": "total_steps=2",
    r"total_steps=100_000\b": "total_steps=3",
    r"decay_steps=[12]0_000\b": "decay_steps=1",
    r"runs/long@40000\b": "runs/long@1",
    r"warmup_steps=1_000\b": "warmup_steps=1",
    r"profile=100:5\b": "profile=2:1",
    r"eval\.every=1_000\b": "eval.every=2",
    r"--steps=10,4,2\b": "--steps=1",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as the page assumes it: configs, launch scripts, datasets to convert, and a `python` for tiny runs."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, code in zip(re.findall(r"`(configs/mine\w*\.py)`[,:]", PAGE), blocks("python"), strict=True):
        (folder / name).write_text(code)

    rlds_source.make(folder / "source", [21, 9, 30, 19, 12, 25])

    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    flags = " ".join(f"--config.{field}" for field in TINY)
    python.write_text(
        f'#!/usr/bin/env bash\nmodule=$2\ncase "$1 $2" in\n"-m uwm_jax.train" | "-m launch.rehearse")\n  shift 2\n'
        f'  exec {sys.executable} -m "$module" {flags} "$@" ;;\n*) exec {sys.executable} "$@" ;;\nesac\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture(scope="module")
def ran(place):
    """Every bash block with its result; those after the first that failed are not run."""
    env = os.environ | {
        "PATH": f"{place / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{place}:{ROOT}",
        "SOURCE": str(place / "source"),
        "UWM_DATA_DIR": str(place / "datasets"),
    }
    results = []
    for block in blocks("bash"):
        text = block
        for pattern, replacement in REPLACED.items():
            text = re.sub(pattern, replacement, text)
        command = ["bash", "-euo", "pipefail", "-c", text]
        env["XLA_FLAGS"] = quick_compile.with_devices(4 if "mesh.fsdp=4" in text else 1)
        result = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=600)
        results.append((block, result))
        if result.returncode:
            break
    return results


@pytest.mark.slow
def test_every_command_runs(ran):
    for block, result in ran:
        assert result.returncode == 0, f"{block}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    assert len(ran) == len(blocks("bash"))


@pytest.mark.slow
def test_the_commands_do_what_the_page_says(ran, place):
    said = "\n".join(result.stdout for _, result in ran)
    for part in (
        "continuing from step 2",
        "continuing from step 3",
        "branching from step 1",
        "report.html",
        "rehearsed: 2 processes",
        "profile: steps 2 to 2",
        "starting from params of step 4",
        "skipped: noise_pred_net/action_decoder/fc1/bias",
        "normaliser: state as in the origin; action from this run's data",
    ):
        assert part in said, part
    assert [x["step"] for x in metrics(place / "runs" / "mine")] == [1, 2, 3, 4]
    cotrain = Checkpoints(place / "runs" / "cotrain", read_only=True).newest_readable()
    history = [[0, {"robot": 0.75, "video": 0.25}], [2 * 4, {"robot": 0.75, "video": 0.5}]]  # two batches of four rows
    assert (cotrain.step, cotrain.data_iter["weights"]) == (3, history)


@pytest.mark.slow
def test_every_metric_is_explained(ran, place):
    keys = {
        key for run in ("profiled", "cotrain", "finetuned") for line in metrics(place / "runs" / run) for key in line
    }
    # `eval/<metric>` stands for the keys of the table of docs/evaluation.md, in which `<a>` and `...` stand for a word.
    cells = [row.split("|")[1] for row in PAGES["evaluation"].splitlines() if row.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert "`eval/<metric>`" in PAGE
    patterns = ["eval/" + re.sub(r"<\w+>|\.\.\.", r"\\w+?", name) for name in names]
    told = "|".join([*patterns, r"loss/\w+/t\d+-\d+"])
    unexplained = {key for key in keys if f"`{key}`" not in PAGE and not re.fullmatch(told, key)}
    assert not unexplained
    assert {"eval/loss/action", "eval/policy/action_mse", "eval/control/shuffle_gap"} <= keys
    assert any(key.startswith("loss/action/t") for key in keys)


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_what_may_change_is_listed():
    for pattern in MAY_CHANGE:
        assert f"`{pattern}`" in PAGE, pattern


def test_the_messages_are_those_of_the_code():
    """The messages quoted in the table of errors are in the source; `...` stands for any text."""
    known = [
        node.value
        for package in ("uwm_jax", "data_prep")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = PAGES["training"]
    table = page[page.index("| message |") :].splitlines()[2:]
    assert len(table) > 10
    for line in table:
        for quoted in re.findall(r"`([^`]+)`", line.split("|")[1]):
            for words in quoted.split("..."):
                assert any(words.strip() in text for text in known), quoted


def test_every_replacement_has_something_to_replace():
    page = "".join(blocks("bash"))
    for pattern in REPLACED:
        assert re.search(pattern, page), pattern


def test_the_page_names_only_fields_that_exist():
    known = flatten(base())
    for field in re.findall(r"--config\.([\w.]+)=", PAGE):
        if not field.startswith("data.sources."):
            assert field in known or field == "any.field", field


# --- commands anywhere in the documentation -------------------------------------------------------------


def commands() -> list[tuple[str, str, list[str]]]:
    """(file, module, flags) of each `python -m` command of the pages, the configs and the modules' docstrings."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    sources = {file: file.read_text() for file in files}
    for folder in ("configs", "uwm_jax", "data_prep", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            sources[file] = ast.get_docstring(ast.parse(file.read_bytes())) or ""
    sources |= {file: file.read_text() for file in (ROOT / "launch").glob("*.sh")}
    found = []
    for file, text in sorted(sources.items()):
        for module, rest in re.findall(r"-m ((?:uwm_jax|data_prep|launch)\.\w+)([^`\n]*)", text.replace("\\\n", " ")):
            flags = re.findall(r"--([\w.-]+)", rest.partition(" #")[0].partition(" -- ")[0])
            found.append((str(file.relative_to(ROOT)), module, flags))
    return found


def test_commands_of_all_pages_name_flags_that_exist(monkeypatch):
    config = base()
    config.data.sources.ANY = source()
    fields = {"FIELD", *flatten(config)}  # what a page calls any field
    seen = set()
    for file, name, flags in commands():
        assert (ROOT / (name.replace(".", "/") + ".py")).exists(), f"{file}: {name}"
        module = importlib.import_module(name)
        monkeypatch.setattr(cli, "_describe_config", None)
        before = set(FLAGS)
        if hasattr(module, "define_flags"):
            module.define_flags()
        known = {flag.replace("_", "-") for flag in set(FLAGS) - before}
        for flag in set(FLAGS) - before:
            delattr(FLAGS, flag)
        for flag in flags:
            if flag.startswith("config."):
                field = re.sub(r"^data\.sources\.\w+", "data.sources.ANY", flag.removeprefix("config."))
                good = cli._describe_config is not None and field in fields
            else:
                good = flag.replace("_", "-") in known | {"help", "debug"}
            assert good, f"{file}: python -m {name} has no --{flag}"
        seen.add(name)
    assert {"uwm_jax.train", "uwm_jax.evaluate", "uwm_jax.rollout", "uwm_jax.report", "data_prep.demo"} <= seen


def test_links_lead_to_pages_and_headings():
    pages = {file: re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL) for file in ROOT.glob("docs/*.md")}
    pages |= {file: re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL) for file in ROOT.glob("*.md")}
    headings = {
        file: {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)", text)}
        for file, text in pages.items()
    }
    count = 0
    for file, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in link:
                path, _, heading = link.partition("#")
                target = (file.parent / path).resolve() if path else file
                assert target.exists(), f"{file.name}: {link}"
                assert not heading or heading in headings[target], f"{file.name}: {link}"
                count += 1
    assert count > 50


def test_the_runs_of_comparisons_have_configs_that_are_accepted(tmp_path):
    """Its shell loops run, with a `python` that tells what it was called with."""
    page = (ROOT / "docs" / "comparisons.md").read_text()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\t" "$@"; echo\n')
    python.chmod(0o755)
    called = []
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        command = ["bash", "-euo", "pipefail", "-c", block]
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True)
        called += [line.rstrip("\t").split("\t") for line in result.stdout.splitlines()]
    trained = {}
    for _, module, *flags in called:
        if module == "uwm_jax.train":
            given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
            overrides = [(name.removeprefix("config."), x) for name, x in given.items() if name.startswith("config.")]
            config = load(str(ROOT / given["config"]), overrides)
            validate(config)
            trained[given["workdir"]] = config
    for system in ("uwm", "dp", "dp_unet", "dp_flow", "pad", "gr1"):
        assert [trained[f"runs/{system}_short_{seed}"].seed for seed in range(3)] == [0, 1, 2]
    assert len(trained) == 18 + 7
    windows = [WindowSpec.from_config(config.data.window) for config in trained.values()]
    assert all(window.places == windows[0].places for window in windows)  # the same held-out windows for all
