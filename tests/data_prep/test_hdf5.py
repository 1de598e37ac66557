"""hdf5 files of robomimic and LIBERO, against what was written into them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import pytest

from data_prep.conversion.layout_options import Options
from data_prep.conversion.training_layout import build
from data_prep.sources.hdf5.episodes import corpus
from data_prep.sources.inputs import Found
from data_prep.sources.pictures import Pictures
from tests.data_prep import hdf5_source
from tests.data_prep.clips import number_of, picture
from uwm_jax.codecs import PCACodec
from uwm_jax.config import base
from uwm_jax.conversion.to_torch import to_torch
from uwm_jax.data import example
from uwm_jax.data.records import Dataset, decode_image
from uwm_jax.data.run_data import RunData
from uwm_jax.errors import UserError
from uwm_jax.systems.uwm.system import UWM
from uwm_jax.training import inference
from uwm_jax.training import workdir as workdir_lib

OPTIONS = Options(chunk_steps=4, workers=1, pca_channels=4, max_skipped=0.01)


def found(path: Path, split: str = "train", **flags: Any) -> list[Found]:
    return [episode for part in corpus(path, **flags).splits[split] for episode in part.episodes()]


def pictures(record: bytes, key: str) -> list[np.ndarray]:
    field = example.scan(record)[f"steps/observation/{key}".encode()]
    images = []
    for span in example.bytes_spans(record, field):
        images.append(np.empty((*hdf5_source.SIZE, 3), np.uint8))
        decode_image(record[slice(*span)], images[-1])
    return images


def numbers(record: bytes, key: str) -> np.ndarray:
    return example.floats(record, example.scan(record)[f"steps/{key}".encode()])


def texts(record: bytes, key: str) -> list[str]:
    spans = example.bytes_spans(record, example.scan(record)[key.encode()])
    return [bytes(record[slice(*span)]).decode() for span in spans]


@pytest.mark.slow
def test_every_value_as_tfds_reads_it(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    hdf5_source.libero(tmp_path / "in" / "a_demo.hdf5", [5, 6])
    second = hdf5_source.libero(tmp_path / "in" / "b_demo.hdf5", [4], language="close it", states=11)
    manifest = build(corpus(tmp_path / "in"), tmp_path / "out", OPTIONS)
    assert manifest["splits"]["train"]["episodes"] == 3
    robot = manifest["robot"]
    assert (robot["format"], robot["flip"], robot["fps"], robot["type"]) == ("LIBERO", "rows", 20, ["Panda"])
    assert robot["environments"] == ["Libero_Kitchen"] and robot["frames"] == {"encoding": "jpeg", "quality": 95}
    assert robot["left_out"] == {
        "states": "differs between files: float64 (9,) in a_demo.hdf5, float64 (11,) in b_demo.hdf5"
    }
    assert robot["keys"]["action"] == {"source": "actions", "dtype": "float64", "shape": [7]}
    episodes: list[list[dict[str, Any]]] = []
    for chunk in tfds.builder_from_directory(tmp_path / "out").as_data_source("train"):
        if chunk["chunk"]["first_step"] == 0:
            episodes.append([])
        episodes[-1] += list(chunk["steps"])
    assert chunk["episode_metadata"] == {"file_path": b"b_demo.hdf5/demo_0", "masks": b""}
    assert list(map(len, episodes)) == [5, 6, 4]
    for i, step in enumerate(episodes[2]):
        assert step["language_instruction"] == b"close it"
        for camera in ("agentview_rgb", "eye_in_hand_rgb"):
            assert number_of(step["observation"][camera]) == i
        np.testing.assert_array_equal(step["action"], second[0]["actions"][i].astype(np.float32))
        np.testing.assert_array_equal(step["observation"]["ee_pos"], second[0]["obs/ee_pos"][i].astype(np.float32))
        assert step["observation"]["gripper"] == second[0]["obs/gripper"][i]
        assert step["reward"] == float(i == 3)
        assert (step["is_first"], step["is_last"], step["is_terminal"]) == (i == 0, i == 3, i == 3)


def test_demonstrations_in_numeric_order(tmp_path: Path) -> None:
    file = tmp_path / "lift.hdf5"
    demos = hdf5_source.robomimic(file, [3] * 12)
    records = [episode.record or b"" for episode in found(file)]
    for record, demo in zip(records, demos, strict=True):
        np.testing.assert_array_equal(numbers(record, "action"), demo["actions"].astype(np.float32).reshape(-1))
    assert [texts(record, "episode_metadata/file_path") for record in records] == [
        [f"lift.hdf5/demo_{i}"] for i in range(12)
    ]


@pytest.mark.parametrize(
    "kind, flip, expected",
    [
        ("libero", None, "rows"),
        ("robomimic", None, "none"),
        ("libero", "180", "180"),
        ("libero", "none", "none"),
        ("robomimic", "rows", "rows"),
    ],
)
def test_orientation(tmp_path: Path, kind: str, flip: str | None, expected: str) -> None:
    file = tmp_path / "a.hdf5"
    getattr(hdf5_source, kind)(file, [2])
    made = corpus(file, flip=flip, pictures=Pictures("png"))
    assert made.facts["robot"]["flip"] == made.options["flip"] == expected
    image = pictures(next(made.splits["train"][0].episodes()).record or b"", next(iter(_cameras(made))))[1]
    stored = picture(1, hdf5_source.SIZE)[::-1] if kind == "libero" else picture(1, hdf5_source.SIZE)
    steps = {"none": (1, 1), "rows": (-1, 1), "180": (-1, -1)}[expected]
    np.testing.assert_array_equal(image, stored[:: steps[0], :: steps[1]])
    if flip is None:
        np.testing.assert_array_equal(image, picture(1, hdf5_source.SIZE))


def _cameras(made: Any) -> list[str]:
    return [path.removeprefix("steps/observation/") for path, f in made.features.items() if f.image]


def test_jpeg_quality_is_stated_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.hdf5"
    demos = hdf5_source.robomimic(file, [2])
    noise = np.random.default_rng(0).integers(0, 256, demos[0]["obs/agentview_image"].shape, np.uint8)
    with h5py.File(file, "r+") as opened:
        opened["data/demo_0/obs/agentview_image"][...] = noise
    sizes = []
    for quality in (30, 95):
        made = corpus(file, pictures=Pictures(quality=quality))
        assert made.facts["robot"]["frames"] == {"encoding": "jpeg", "quality": quality}
        record = next(made.splits["train"][0].episodes()).record or b""
        sizes.append(len(record))
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize("language", ["pick up the bowl", list("pick up the bowl"), '"pick up the bowl"'])
def test_language_of_libero(tmp_path: Path, language: Any) -> None:
    hdf5_source.libero(tmp_path / "a.hdf5", [2], language=language)
    assert texts(found(tmp_path / "a.hdf5")[0].record or b"", "steps/language_instruction") == ["pick up the bowl"] * 2


def test_masks_are_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lift.hdf5"
    masks = {"valid": ["demo_1"], "train": ["demo_2", "demo_0"], "20_percent": ["demo_0"], "better": ["demo_3"]}
    hdf5_source.robomimic(file, [2] * 5, masks)

    def demos(**flags: Any) -> dict[str, list[str]]:
        return {
            split: [d for part in parts for d in part.demos] for split, parts in corpus(file, **flags).splits.items()
        }

    assert demos() == {"train": ["demo_0", "demo_2"], "valid": ["demo_1"], "better": ["demo_3"]}
    printed = capsys.readouterr().out
    assert "masks that share demonstrations with another split are left out: 20_percent" in printed
    assert "1 demonstrations are in none of the splits" in printed
    assert demos(splits=["20_percent", "train"]) == {"train": ["demo_0", "demo_2"], "20_percent": ["demo_0"]}
    first = found(file)[0].record or b""
    assert texts(first, "episode_metadata/masks") == ["20_percent train"]
    with pytest.raises(
        UserError, match=r"no mask 'trian'; it has train, valid, 20_percent, better. Did you mean train"
    ):
        demos(splits=["trian"])
    hdf5_source.robomimic(file, [2] * 3, {"valid": ["demo_1"]})
    assert demos() == {"valid": ["demo_1"], "train": ["demo_0", "demo_2"]}
    hdf5_source.robomimic(file, [2] * 3)
    assert demos() == {"train": ["demo_0", "demo_1", "demo_2"]}


def test_keys_that_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "lift.hdf5"
    hdf5_source.robomimic(file, [3])
    with h5py.File(file, "r+") as opened:
        demo = opened["data/demo_0"]
        demo["obs/chw"] = np.zeros((3, 3, *hdf5_source.SIZE), np.uint8)
        demo["obs/flow"] = np.zeros((3, *hdf5_source.SIZE, 2), np.uint8)
        demo["extra"] = np.zeros((5, 2))  # no row per step
        demo["note"] = np.array([b"a", b"b", b"c"])
        del demo["dones"]
    made = corpus(file)
    assert made.facts["robot"]["left_out"] == {
        "next_obs/ee_pos": "the observation of the following step",
        "obs/agentview_depth": "depth, which is no camera",
        "obs/flow": f"pictures of shape {(*hdf5_source.SIZE, 2)}; a camera has 1 or 3 channels",
        "note": "values of bytes8",
    }
    assert made.features["steps/observation/chw"].shape == (*hdf5_source.SIZE, 3)
    assert "steps/extra" not in made.features and "steps/language_instruction" not in made.features
    record = next(made.splits["train"][0].episodes()).record or b""
    assert example.ints(record, example.scan(record)[b"steps/is_terminal"]).tolist() == [0, 0, 1]


def test_damaged_demonstrations_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "lift.hdf5"
    hdf5_source.robomimic(file, [3] * 5)
    with h5py.File(file, "r+") as opened:
        del opened["data/demo_1/obs/ee_pos"]
        del opened["data/demo_2/rewards"]
        opened["data/demo_2/rewards"] = np.zeros(2)
        del opened["data/demo_3/actions"]
        opened["data/demo_3/actions"] = np.zeros((3, 6))
        images = opened["data/demo_4/obs"]
        values = images["agentview_image"][()]
        del images["agentview_image"]
        images.create_dataset("agentview_image", data=values, compression="gzip", chunks=(3, *hdf5_source.SIZE, 3))
        chunk = images["agentview_image"].id.get_chunk_info(0)
    with file.open("r+b") as out:
        out.seek(chunk.byte_offset)
        out.write(b"\xff" * chunk.size)
    reasons = [episode.reason for episode in found(file)]
    assert reasons == ["", "key missing", "unequal numbers of steps", "another shape", "unreadable data"]


def test_odd_demonstrations_are_counted(tmp_path: Path) -> None:
    """What differs from the first demonstration: neither a conversion by accident nor the end of the job."""
    file = tmp_path / "lift.hdf5"
    hdf5_source.robomimic(file, [3] * 9)
    odd: dict[str, Any] = {
        "demo_1/rewards": 1.0,
        "demo_2/actions": np.full((3, 7), b"a"),
        "demo_3/obs/agentview_image": np.zeros((3, *hdf5_source.SIZE, 3)),
        "demo_4/obs/ee_pos": h5py.SoftLink("/nowhere"),
        "demo_7/actions": np.full((3, 7), [1e39, *[0] * 6]),
        "demo_8/rewards": np.full(3, np.inf),
    }
    with h5py.File(file, "r+") as opened:
        for name, value in odd.items():
            del opened["data"][name]
            opened["data"][name] = value
        del opened["data/demo_5/obs/ee_pos"]
        opened.create_group("data/demo_5/obs/ee_pos")
    episodes = found(file)
    reasons = [episode.reason for episode in episodes]
    expected = ["", "another shape", "another type", "another type", "key missing", "another shape", ""]
    assert reasons == [*expected, "number too large", ""]
    assert episodes[7].detail == "actions: 1e+39 is beyond float32"
    np.testing.assert_array_equal(numbers(episodes[8].record or b"", "reward"), [np.inf] * 3)


def test_rewards_and_dones_of_one_column(tmp_path: Path) -> None:
    file = tmp_path / "lift.hdf5"
    (demo,) = hdf5_source.robomimic(file, [3])
    with h5py.File(file, "r+") as opened:
        for name in ("rewards", "dones"):
            del opened[f"data/demo_0/{name}"]
            opened[f"data/demo_0/{name}"] = demo[name][:, None]
        opened["data/demo_0/language_instruction"] = np.zeros(3, np.float32)
    made = corpus(file)
    assert made.features["steps/reward"].shape == made.features["steps/is_terminal"].shape == ()
    record = next(made.splits["train"][0].episodes()).record or b""
    np.testing.assert_array_equal(numbers(record, "reward"), demo["rewards"].astype(np.float32))
    assert example.ints(record, example.scan(record)[b"steps/is_terminal"]).tolist() == [0, 0, 1]


def test_files_without_an_instruction_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hdf5_source.libero(tmp_path / "a.hdf5", [2])
    hdf5_source.libero(tmp_path / "b.hdf5", [2], language=None)
    first, second = (texts(episode.record or b"", "steps/language_instruction") for episode in found(tmp_path))
    assert (first, second) == (["open the drawer"] * 2, ["", ""])
    assert "1 of 2 files have no instruction (b.hdf5)" in capsys.readouterr().out
    hdf5_source.libero(tmp_path / "b.hdf5", [2], language={"text": "open"})
    with pytest.raises(UserError, match="language_instruction is .*; expected a string"):
        corpus(tmp_path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no hdf5 file there"):
        corpus(tmp_path)
    file = tmp_path / "a.hdf5"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"a.hdf5 is a Git LFS pointer.*git lfs pull"):
        corpus(file)
    hdf5_source.robomimic(file, [3])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a.hdf5 is not a complete hdf5 file .*Copy it again"):
        corpus(file)
    with h5py.File(file, "w") as out:
        out["episodes"] = np.zeros(3)
    with pytest.raises(UserError, match=r"no groups data/demo_N, as robomimic and LIBERO have them; it holds episodes"):
        corpus(file)
    hdf5_source.write(file, {"demo_0": {"obs/x": np.zeros((3, 2))}}, {})
    with pytest.raises(UserError, match="demo_0 has no `actions`"):
        corpus(file)
    hdf5_source.write(file, {"demo_0": {"actions": np.zeros((3, 2))}}, {"problem_info": "{"})
    with pytest.raises(UserError, match=r"data.attrs\['problem_info'\]: not JSON"):
        corpus(file)
    hdf5_source.robomimic(file, [3])
    hdf5_source.libero(tmp_path / "b.hdf5", [3])
    with pytest.raises(UserError, match=r"files of LIBERO \(b.hdf5\) and of robomimic \(a.hdf5\)"):
        corpus(tmp_path)
    with h5py.File(file, "r+") as out:
        del out["data/demo_0"]
        out.create_group("data/demo_0")
    with pytest.raises(UserError, match="demo_0 has no `actions`"):
        corpus(file)
    file.rename(tmp_path / os.fsdecode(b"\xff.hdf5"))
    with pytest.raises(UserError, match="the name of a file .* Rename it"):
        corpus(tmp_path)


def test_masks_of_demonstrations_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lift.hdf5"
    hdf5_source.robomimic(file, [2], {"valid": ["demo_7"]})
    assert [*corpus(file).splits] == ["train"]
    assert "its masks name 1 demonstrations that it lacks (demo_7)" in capsys.readouterr().out
    with pytest.raises(UserError, match="no mask of valid names a demonstration that is there"):
        corpus(file, splits=["valid"])


def test_what_is_passed_over_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hdf5_source.robomimic(tmp_path / "in" / "a.hdf5", [3, 3], {"train": ["0", "1"]})
    (tmp_path / "in" / "._a.hdf5").write_bytes(b"\0\5\x16\7")
    with h5py.File(tmp_path / "in" / "a.hdf5", "r+") as file:
        file.copy("data/demo_0", "data/episode_2")
    with pytest.raises(UserError, match=r"no mask of train names a demonstration that is there, such as demo_0"):
        corpus(tmp_path / "in")
    with h5py.File(tmp_path / "in" / "a.hdf5", "r+") as file:
        del file["mask"]
    assert len(found(tmp_path / "in")) == 2
    printed = capsys.readouterr().out
    assert "1 hidden files are passed over (._a.hdf5)" in printed
    assert "a.hdf5: data holds 1 items that are no demo_N, and left out (episode_2)." in printed


@pytest.mark.slow
def test_the_orientation_reaches_checkpoint_and_export(tmp_path: Path) -> None:
    """From pictures that are stored upside down, by the command, to the description of the exported weights."""
    file = tmp_path / "drawer_demo.hdf5"
    hdf5_source.libero(file, [9, 9, 9])
    line = [sys.executable, "-m", "data_prep.hdf5", f"--input={file}", f"--output={tmp_path / 'data'}"]
    line += ["--workers=1", "--pca_channels=4", "--codec_size=16,16"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    dataset = Dataset(tmp_path / "data")
    image = np.empty((1, *hdf5_source.SIZE, 3), np.uint8)
    dataset.frames(0, {"observation/agentview_rgb": [4]}, {"observation/agentview_rgb": image})
    upright = picture(4, hdf5_source.SIZE).astype(int)
    assert np.abs(image[0] - upright).mean() < 2 < np.abs(image[0] - upright[::-1]).mean()

    config = base()
    config.model.embed_dim, config.model.depth, config.model.num_heads, config.model.num_registers = 16, 1, 2, 1
    config.model.timestep_embed_dim, config.model.patch = 8, (2, 2, 2)
    config.model.encoder.stage_sizes, config.model.encoder.width = (1,), 16
    config.model.codec.name = "pca"
    config.data.path, config.data.cameras = str(tmp_path / "data"), ("agentview_rgb",)
    config.data.action, config.data.resize, config.data.crop = (("action", "identity"),), (16, 16), (16, 16)
    config.data.window.update(obs=(0, 1), action=(1, 2), next_obs=(3, 4))
    data = RunData(config.data, seed=0)
    assert data.spec.flip == {"agentview_rgb": "rows"}
    with np.load(tmp_path / "data" / "codec" / "pca.npz") as stored:
        arrays = {part: stored[f"agentview_rgb/{part}"][None] for part in ("mean", "components")}
        arrays["scale"] = stored["scale"]
    system = UWM(config, data.spec, PCACodec(patch=8, channels=4))
    params = jax.jit(system.init)(jax.random.key(0))
    assets = {"dataset": data.manifest()}
    workdir_lib.save_params_only(tmp_path / "run", config, data.spec, params, arrays, step=1, extra_assets=assets)
    loaded, *_ = inference.load_for_inference(tmp_path / "run", 1)
    assert loaded.spec.flip == {"agentview_rgb": "rows"}

    to_torch(tmp_path / "run", tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "model.json").read_text())["flip"] == {"agentview_rgb": "rows"}


def test_pictures_are_resized_before_they_are_encoded(tmp_path: Path) -> None:
    file = tmp_path / "a.hdf5"
    hdf5_source.libero(file, [2])
    made = corpus(file, pictures=Pictures("png", resize=(16, 24)))
    assert made.features["steps/observation/agentview_rgb"].shape == (16, 24, 3)
    record = next(made.splits["train"][0].episodes()).record or b""
    field = example.scan(record)[b"steps/observation/agentview_rgb"]
    image = np.empty((16, 24, 3), np.uint8)
    decode_image(record[slice(*example.bytes_spans(record, field)[1])], image)
    means = picture(1, hdf5_source.SIZE).reshape(16, 2, 24, 2, 3).mean((1, 3))
    assert np.abs(image - means).mean() < 2
