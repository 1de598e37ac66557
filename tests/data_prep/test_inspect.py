from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_prep.inspect
from data_prep.conversion.training_layout import reshard
from data_prep.inspect import inspect
from tests.data import rlds_source
from uwm_jax.data.records import Dataset
from uwm_jax.errors import UserError


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspect")
    rlds_source.make(root / "source", [9, 3, 20])
    reshard(root / "source", root / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    return root / "out"


def test_pictures_and_remarks(out: Path, tmp_path: Path) -> None:
    dataset = Dataset(out)
    remarks = inspect(dataset, tmp_path / "pictures")
    assert remarks[0] == "action: constant in [6] = 0.5"
    for name in ("contact_sheet", "actions", "states", "episode_lengths"):
        with Image.open(tmp_path / "pictures" / f"{name}.png") as image:
            assert min(image.size) >= 200
            assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_an_action_that_rlds_leaves_undefined_is_not_drawn(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "copy")
    for key in ("is_last", "action"):
        column = np.array(Dataset(out).column(key))
        column[np.cumsum([9, 3, 20]) - 1] = 1 if key == "is_last" else 0
        rlds_source.write_column(tmp_path / "copy", key, column)
    # With the zeros, the gripper would not be always closed.
    assert inspect(Dataset(tmp_path / "copy"), tmp_path / "pictures")[0] == "action: constant in [6] = 0.5"


def test_a_dataset_without_numbers_or_cameras_says_so_once(tmp_path: Path) -> None:
    rlds_source.make(tmp_path / "source", [4, 4, 4])
    reshard(tmp_path / "source", tmp_path / "out", codec_size=(16, 16), pca_channels=4, workers=1)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for key, feature in manifest["step_features"].items():
        feature["column"] &= not key.startswith(("action", "observation/"))
    dataset = Dataset(tmp_path / "out")
    dataset.manifest, dataset.cameras = manifest, {}
    for name in ("actions", "contact_sheet"):  # of a dataset that was here before
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{name}.png").write_bytes(b"old")
    remarks = inspect(dataset, tmp_path / "pictures")
    assert remarks[:2] == ["no cameras", "no actions: no numeric step key begins with `action`"]
    assert remarks[2] == "no states: no numeric step key lies below `observation/`"
    assert [p.name for p in (tmp_path / "pictures").glob("*.png")] == ["episode_lengths.png"]
    page = (tmp_path / "pictures" / "index.html").read_text()
    assert not any(f'id="{anchor}"' in page for anchor in ("frames", "actions", "states"))


def test_dimensions_that_are_not_drawn_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_prep.inspect, "_MOST_PANELS", 2)
    monkeypatch.setattr(data_prep.inspect, "_MOST_DRAWN", 3)
    columns = {f"observation/{name}": np.eye(3)[:, :width] for name, width in (("a", 3), ("b", 2), ("c", 1))}
    dataset = types.SimpleNamespace(column=columns.__getitem__, episode_lengths=np.array([3]))
    remarks = data_prep.inspect._plot(dataset, list(columns), tmp_path / "states.png")  # type: ignore[arg-type]
    assert remarks == [
        "observation/a: 1 of 3 dimensions are not drawn",
        "observation/b: 1 of 2 dimensions are not drawn",
        "observation/c: 1 of 1 dimensions are not drawn",
    ]


def test_lengths_are_whole_numbers(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    dataset = types.SimpleNamespace(episode_lengths=np.array([419]))
    data_prep.inspect._plot_lengths(dataset, tmp_path / "lengths.png")  # type: ignore[arg-type]
    (axis,) = drawn[0].axes
    for ticks in (axis.get_xticks(), axis.get_yticks()):
        assert all(float(tick).is_integer() for tick in ticks)
    assert axis.get_title() == "1 episode: shortest 419, median 419, longest 419"


def test_an_output_that_cannot_be_made_is_one_message(out: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=r"cannot be created: .*Choose another --output"):
            inspect(Dataset(out), output)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.slow
def test_a_dimension_without_a_finite_value_is_remarked(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    column = np.load(copy / "columns" / "train" / "action.npy")
    column[:, 2] = np.nan
    rlds_source.write_column(copy, "action", column)
    remarks = inspect(Dataset(copy), tmp_path / "pictures")
    assert remarks[:2] == ["action: never finite in [2]", "action: constant in [6] = 0.5"]
    assert not any(remark.startswith("action: 1") for remark in remarks), "the other dimensions are not idle"


@pytest.mark.slow
def test_command_line(out: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "data_prep.inspect", *args],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )

    done = run(f"--dataset={out}")
    assert done.returncode == 0, done.stderr
    assert "3 episodes, 32 steps" in done.stdout and "skipped: 0" in done.stdout
    assert (out / "inspect" / "contact_sheet.png").exists()
    bad = run(f"--dataset={out}", "--split=test")
    assert bad.returncode == 2 and "no split 'test'" in bad.stderr and "Traceback" not in bad.stderr


def test_histograms_of_values_that_floats_hardly_tell_apart() -> None:
    columns = {"constant": np.full(4, 1.7e18), "two": np.array([1.7e18, 1.7e18 + 512]), "large": np.full(3, 3e38)}
    figure = data_prep.inspect._histograms(list(columns.items()))
    bars = [[int(bar.get_height()) for bar in axis.patches if bar.get_height()] for axis in figure.axes]
    assert bars == [[4], [1, 1], [3]]


@pytest.mark.filterwarnings("error")
def test_titles_of_histograms_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    names = [
        "action",
        "action_dict/cartesian_velocity[0]",
        "action/" + "very_long_name_" * 6 + "[11]",
        "action/$x_1$ 动作",
    ]
    figure = data_prep.inspect._histograms([(name, rng.normal(size=50) * 1e-7) for name in names * 2])
    figure.canvas.draw()
    titles = [axis.title.get_window_extent() for axis in figure.axes]
    frames = [axis.get_window_extent() for axis in figure.axes]
    assert len(titles) == 8
    for i, box in enumerate(titles):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in titles[:i] + frames), names[i % 4]
