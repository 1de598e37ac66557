"""The wheel: what it holds, and that its console scripts run where nothing of the clone is at hand."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from uwm_jax import config as config_lib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("uwm_jax", "data_prep")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    clone = folder / "clone"
    for package in (*PACKAGES, "configs", "launch", "tests"):
        shutil.copytree(ROOT / package, clone / package, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    build = ["pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", *build, str(clone)], check=True, timeout=120)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """The folder of console scripts of an environment that has the wheel, and finds its dependencies in this one's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = ["pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", *install], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    # A plain path line: that folder's own .pth files, of an editable installation perhaps, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(scripts: Path, folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = (str(scripts / command[0]), *command[1:])
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_no_name_of_others(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, f"uwm_jax-{PROJECT['version']}.dist-info"}
    modules = {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    assert modules | {f"{package}/py.typed" for package in PACKAGES} <= set(names)


@pytest.mark.slow
def test_every_script_runs_from_the_wheel_alone(scripts, tmp_path):
    places = "import uwm_jax, data_prep; print(uwm_jax.__file__, data_prep.__file__, sep='\\n')"
    found = run(scripts, tmp_path, "python", "-c", places).stdout.split()
    assert found and all(Path(file).is_relative_to(scripts.parent) for file in found), found
    for script in PROJECT["scripts"]:
        helped = run(scripts, tmp_path, script, "--help")
        assert helped.returncode == 0 and "Flags:" in helped.stdout, f"{script}: {helped.stderr}"
    refused = run(scripts, tmp_path, "uwm-train", "--config=none.py", "--workdir=run")
    assert refused.returncode == 2 and "no Python file 'none.py'" in refused.stderr
    assert "Shipped" not in refused.stderr, "there is no configs/ here"


@pytest.mark.slow
def test_a_run_needs_nothing_of_the_clone(scripts, tiny_config, tmp_path):
    lines = ["import json", "from uwm_jax.config import from_dict", "def get_config():"]
    lines += [f"    return from_dict(json.loads({config_lib.to_json(tiny_config)!r}), '')", ""]
    (tmp_path / "tiny.py").write_text("\n".join(lines))
    flags = ("--config=tiny.py", "--workdir=run", "--config.total_steps=2", "--config.mesh.rules=")
    trained = run(scripts, tmp_path, "uwm-train", *flags, JAX_PLATFORMS="cpu")
    assert trained.returncode == 0 and "done: 2 steps in run" in trained.stdout, trained.stderr
    reported = run(scripts, tmp_path, "uwm-report", "--workdir=run")
    assert reported.returncode == 0 and (tmp_path / "run" / "report.html").exists(), reported.stderr


def test_the_core_imports_its_requirements_and_none_of_the_extras():
    """Packages that only demonstration data or tests need are no requirements of the core."""
    owners = importlib.metadata.packages_distributions()
    files = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    imported = {
        module for p in files if p.name not in ("demo.py", "pusht_rlds.py", "on_beam.py") for module in _imported(p)
    }
    provided = {_name(owner) for module in imported for owner in owners.get(module, ())}
    assert {_name(requirement) for requirement in PROJECT["dependencies"]} <= provided
    assert not imported & {"tensorflow", "tensorflow_datasets", "rlds", "apache_beam"}


def test_what_is_imported_with_a_module_is_declared():
    """Modules that need what an extra gives, such as torch, are imported by others inside of functions alone; those of
    the room `serving` belong to an extra together."""
    owners = importlib.metadata.packages_distributions()
    declared = {_name(requirement) for requirement in PROJECT["dependencies"]}
    extras = {_name(requirement) for extra in PROJECT["optional-dependencies"].values() for requirement in extra}
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "uwm_jax").rglob("*.py")}
    imports = {module: _at_module_level(ast.parse(file.read_text()).body) for module, file in files.items()}
    undeclared, need_extras = [], {module for module in imports if module.startswith("uwm_jax.serving.")}
    for module, found in imports.items():
        for name in {name.partition(".")[0] for name in found} - sys.stdlib_module_names - {*PACKAGES}:
            names = {_name(owner) for owner in owners.get(name, [name])}
            if not names & declared:
                need_extras.add(module) if names & extras else undeclared.append((module, name))
    eager = [
        (module, name)
        for module in imports.keys() - need_extras
        for name in imports[module]
        if any(f"{name}.".startswith(f"{needs}.") for needs in need_extras)
    ]
    assert not undeclared and not eager


def test_the_citation_has_the_version_of_the_project():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]


def _at_module_level(body: list[ast.stmt]) -> set[str]:
    """Imports of a file at module level, as `package.module.name`: not that of functions or for the type checker."""
    found = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            found |= _at_module_level(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                found |= _at_module_level(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                found |= _at_module_level(handler.body)
    return found


def _imported(file: Path) -> set[str]:
    """The top-level modules that a source file imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def _name(requirement: str) -> str:
    """The normalised name of a requirement such as `etils[epath]>=1.12`."""
    return re.split(r"[^\w-]", requirement)[0].lower().replace("_", "-")
