"""A run on the hub as a workdir and as an export folder: made once, only read, and nothing of it run."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from tests.hub import small_run
from tests.hub.stub import Stub
from uwm_jax import cli, compare_samplers, evaluate, rollout, sample
from uwm_jax.conversion.to_torch import to_torch
from uwm_jax.errors import UserError
from uwm_jax.hub import runs
from uwm_jax.hub.names import HubName
from uwm_jax.torch_bridge import description
from uwm_jax.training import finetune, inference

FILES = ("WEIGHTS", "DESCRIPTION", "PROBE", "PROGRAM")
REPO, STEP = "someone/robot", small_run.STEP


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir of a small policy that nobody trained."""
    return small_run.make(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Its export folder, with programs that must never run."""
    folder = tmp_path_factory.mktemp("exported")
    with contextlib.redirect_stdout(io.StringIO()):
        to_torch(run, folder / runs.WEIGHTS)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(files) == {runs.WEIGHTS, runs.DESCRIPTION}
    return files | {name: b"raise SystemExit('theirs')" for name in (runs.PROGRAM, "sitecustomize.py")}


def test_files_are_called_as_the_export_calls_them() -> None:
    ours, theirs = ([getattr(module, name) for name in FILES] for module in (runs, description))
    assert ours == theirs


def files_in_cache() -> set[str]:
    home = Path(constants.HF_HUB_CACHE).parent
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.slow
def test_an_export_becomes_a_workdir_once(
    stub: Stub, run: Path, exported: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands that read a run take it; those that write results ask where to; the cache stays as it is."""
    commit = stub.add(REPO, exported)
    found = runs.workdir(REPO, "--workdir")
    assert found == Path(constants.HF_ASSETS_CACHE) / "uwm_jax" / "someone--robot" / commit / "workdir"
    assert runs.spelled(found) == f"{REPO}@{commit}" and runs.spelled(run) == str(run)
    before = files_in_cache()
    assert not [name for name in before if name.endswith(".py")]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("subprocess.run", never)
    assert runs.workdir(f"{REPO}@main", "--workdir") == found
    _, params, _, step = inference.load_for_inference(found)
    _, expected, _, _ = inference.load_for_inference(run)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert step == STEP

    inputs = {"obs/front": np.zeros((1, 2, 16, 16, 3), np.uint8), "obs/state": np.zeros((1, 2, 3), np.float32)}
    np.savez(tmp_path / "in.npz", **inputs)  # type: ignore[arg-type]
    line = ["sample", f"--workdir={REPO}", "--mode=policy", f"--inputs={tmp_path / 'in.npz'}"]
    assert cli.call(sample.main, [*line, f"--output={tmp_path / 'out.npz'}"], sample.define_flags) == 0
    with np.load(tmp_path / "out.npz") as out:
        assert out["action"].shape == (1, 4, 2)

    for command, flags in ((evaluate, []), (rollout, ["--env=pusht"]), (compare_samplers, ["--steps=2"])):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = cli.call(command.main, ["x", f"--workdir={REPO}", *flags], command.define_flags)
        assert status == 2 and f"--output=DIR is required: results of {REPO}@{commit}" in said.getvalue()

    assert finetune.open_origin(f"{REPO}@main@{STEP}").place == f"{REPO}@{commit}@{STEP}"
    assert finetune.open_origin(REPO).place == f"{REPO}@{commit}@{STEP}"
    with pytest.raises(UserError, match=rf"config.init_from='{REPO}@main@7'.* has checkpoints of steps \[{STEP}\]"):
        finetune.open_origin(f"{REPO}@main@7")
    assert files_in_cache() == before


@pytest.mark.slow
def test_an_export_that_is_damaged_leaves_nothing(stub: Stub, exported: dict[str, bytes]) -> None:
    stub.add(REPO, exported | {runs.WEIGHTS: exported[runs.WEIGHTS][:-100]})
    with pytest.raises(UserError, match=rf"--workdir={REPO}@[0-9a-f]{{40}}: its export folder cannot be read: "):
        runs.workdir(REPO, "--workdir")
    assert not [name for name in files_in_cache() if name.startswith("assets")]


def test_an_export_for_pytorch_has_our_program(stub: Stub, exported: dict[str, bytes]) -> None:
    commit = stub.add(REPO, exported | {runs.PROBE: b"probe"}, ref="v1")
    folder = runs.export(f"{REPO}@v1", "--export")
    assert runs.origin_of(folder) == HubName(REPO, commit)
    ours = Path(runs.__file__).parents[1] / "torch_bridge" / runs.PROGRAM
    assert (folder / runs.PROGRAM).read_bytes() == ours.read_bytes()
    for name in (runs.WEIGHTS, runs.DESCRIPTION):
        assert (folder / name).read_bytes() == exported[name]
    assert {path.name for path in folder.iterdir()} == {runs.WEIGHTS, runs.DESCRIPTION, runs.PROBE, runs.PROGRAM}
    assert runs.export(f"{REPO}@{commit}", "--export") == folder


def test_a_workdir_is_read_where_it_lies(stub: Stub, run: Path) -> None:
    """Also a checkpoint of it as an origin, in which a branch finds no training state here."""
    files = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    commit = stub.add(REPO, files | {"notes.txt": b"theirs"})
    found = runs.workdir(REPO, "--workdir")
    assert found.parts[-2:] == ("snapshots", commit) and runs.spelled(found) == f"{REPO}@{commit}"
    assert not (found / "notes.txt").exists()
    _, params, _, _ = inference.load_for_inference(found)
    _, expected, _, _ = inference.load_for_inference(run)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert finetune.open_origin(f"{REPO}@main@{STEP}").place == f"{REPO}@{commit}@{STEP}"


def test_other_repositories_are_refused(stub: Stub) -> None:
    stub.add(REPO, {"weights.bin": b"", "config.json": b"{}"})
    with pytest.raises(UserError, match=rf"--workdir={REPO}: the repository at commit .* holds config.json. Expected"):
        runs.workdir(REPO, "--workdir")
    stub.add("someone/else", {"weights.bin": b""})
    with pytest.raises(
        UserError, match="--export=someone/else: the repository at commit .* none of the files of a run"
    ):
        runs.export("someone/else", "--export")


def test_paths_stay_paths_and_need_no_hub(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "here" / "someone" / "robot").mkdir(parents=True)
    for value in (REPO, "runs", str(tmp_path), "~"):
        assert runs.workdir(value, "--workdir") == runs.export(value, "--export") == Path(value).expanduser()
        assert runs.origin_of(Path(value)) is None
    assert stub.requests == []
