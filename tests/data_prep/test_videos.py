"""A folder with a file of every kind becomes a dataset; TFDS reads it, and the manifest names what is left out."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_prep import videos
from data_prep.sources.videos import clips
from tests.data_prep.clips import number_of, write_clip, write_sound
from uwm_jax import cli
from uwm_jax.config import source
from uwm_jax.data.loader import Loader
from uwm_jax.data.records import Dataset
from uwm_jax.data.run_data import RunData

SIZE = (48, 64)
FLAGS = ["--resize=48,64", "--workers=1", "--pca_channels=4", "--min_steps=5", "--chunk_steps=8"]


def run(*arguments: str) -> int:
    return cli.call(videos.main, ["videos", *FLAGS, *arguments], videos.define_flags)


def read_or_fail(request: clips.Request, mark: Callable[[int], None]) -> clips.Clip | clips.Unusable:
    """`read_clip` in a decoder with two bugs."""
    name = request.files[0].name
    mark(0)
    if name == "hangs.mp4":
        time.sleep(600)
    if name == "crashes.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    return clips.read_clip(request, mark)


def write_all_kinds(folder: Path) -> dict[str, str]:
    """Writes usable and unusable files; returns {unusable file: reason}."""
    write_clip(folder / "deep" / "one.webm", range(20), codec="libvpx-vp9")
    write_clip(folder / "two.avi", range(22), codec="mpeg4")
    write_clip(folder / "variable.mkv", range(20), [i / 10 + 0.06 * (i % 3 == 1) for i in range(20)])
    write_clip(folder / "turned.mp4", range(20), turn={"degrees": 90})
    write_clip(folder / "ten_bits.mp4", range(20), codec="libx265", pixels="yuv420p10le")
    write_clip(folder / "odd.mp4", range(20), pixels="yuv444p", size=(47, 61))
    for name in ("hangs.mp4", "crashes.mp4"):
        write_clip(folder / name, range(20))
    (folder / "notes.txt").write_text("no video")
    (folder / ".hidden.mp4").write_text("no video")

    write_clip(folder / "slow.mp4", range(20), fps=4)
    write_clip(folder / "short.mp4", range(8))
    write_clip(folder / "unstamped.mp4", range(20), format="h264")
    write_clip(folder / "skewed.mp4", range(20), turn={"degrees": 45})
    write_clip(folder / "huge.avi", range(24), codec="mpeg4", size=(240, 320))
    with (folder / "huge.avi").open("r+b") as f:
        f.truncate(3 << 20)  # bytes after the end of the data
    write_clip(folder / "cut.webm", range(24), codec="libvpx-vp9")
    data = bytearray((folder / "cut.webm").read_bytes())
    (folder / "cut.webm").write_bytes(data[: len(data) // 2])
    write_clip(folder / "broken.mp4", range(24), key_every=6)
    data = bytearray((folder / "broken.mp4").read_bytes())
    middle = (data.index(b"mdat") + data.index(b"moov")) // 2
    data[middle : middle + 200] = b"\xff" * 200
    (folder / "broken.mp4").write_bytes(data)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video" * 100)
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    write_sound(folder / "sound.mp4")
    return {
        "broken.mp4": "video cannot be decoded",
        "crashes.mp4": "decoder crashed",
        "cut.webm": "ends early",
        "empty.mp4": "empty file",
        "gone.mp4": "unreadable file",
        "hangs.mp4": "decoder exceeded the time limit",
        "huge.avi": "oversized file",
        "short.mp4": "too short",
        "skewed.mp4": "odd rotation",
        "slow.mp4": "too slow",
        "sound.mp4": "no video stream",
        "text.mp4": "video cannot be opened",
        "unstamped.mp4": "no time stamps",
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("videos")
    unusable = write_all_kinds(root / "clips")
    (root / "labels.csv").write_text(
        'file,text\ndeep/one.webm,open the drawer\nodd,"lift, then turn"\nelsewhere.mp4,no\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.sources.videos.corpus.read_clip", read_or_fail)
        arguments = [f"--input={root}/clips", f"--output={root}/out", f"--labels={root}/labels.csv"]
        assert run(*arguments, "--fps=5", "--seconds=5", "--max_mb=1") == 0
    return root / "out", unusable


KEPT = ["deep/one.webm", "odd.mp4", "ten_bits.mp4", "turned.mp4", "two.avi", "variable.mkv"]


def test_the_manifest_counts_and_names_what_is_left_out(made: tuple[Path, dict[str, str]]) -> None:
    out, unusable = made
    manifest = json.loads((out / "manifest.json").read_text())
    split = manifest["splits"]["train"]
    assert split["skipped"] == dict.fromkeys(unusable.values(), 1)
    for (file, reason), note in zip(sorted(unusable.items()), split["skipped_notes"], strict=True):
        assert note.startswith(f"{file}: {reason}"), (file, note)
    assert split["remarks"] == {
        "more than 8 bits a channel": 1,
        "odd size": 1,
        "rotated or mirrored by metadata": 1,
        "variable rate": 1,
        "without a label": 4,
    }
    assert manifest["source"]["files"] == len(KEPT) + len(unusable)
    assert manifest["source"]["ignored"] == {".txt": 1, ".mp4": 1}
    assert manifest["fps"] == 5 and "action" not in manifest["step_features"]
    assert manifest["cameras"] == {"observation/image": {"height": 48, "width": 64}}


def test_tfds_reads_the_frames_that_were_chosen(made: tuple[Path, dict[str, str]]) -> None:
    import tensorflow_datasets as tfds

    out, _ = made
    episodes: dict[str, list[dict]] = {}
    for chunk in tfds.builder_from_directory(out).as_data_source("train"):
        metadata = chunk["episode_metadata"]
        assert metadata["fps"] == 5
        episodes.setdefault(metadata["file_path"].decode(), []).extend(chunk["steps"])
    assert list(episodes) == KEPT
    texts = {"deep/one.webm": "open the drawer", "odd.mp4": "lift, then turn"}
    for name, steps in episodes.items():
        found = [number_of(step["observation"]["image"]) for step in steps]
        times = [step["timestamp"] for step in steps]
        if name == "variable.mkv":
            stamps = np.asarray([i / 10 + 0.06 * (i % 3 == 1) for i in range(20)])
            expected = [int(np.abs(stamps - k / 5).argmin()) for k in range(11)]  # the last lies at 1.96 s
            np.testing.assert_allclose(times, stamps[expected], atol=1e-3)
        else:
            expected = list(range(0, 22 if name == "two.avi" else 20, 2))
            np.testing.assert_allclose(times, np.arange(len(expected)) / 5, atol=1e-3)
        assert found == expected, name
        assert {step["language_instruction"].decode() for step in steps} == {texts.get(name, "")}
        assert [step["is_first"] for step in steps] == [True] + [False] * (len(steps) - 1)
        assert [step["is_last"] for step in steps] == [False] * (len(steps) - 1) + [True]
        assert not any(step["is_terminal"] for step in steps)


def test_a_turned_clip_is_upright(made: tuple[Path, dict[str, str]]) -> None:
    dataset = Dataset(made[0])
    image = np.empty((1, 48, 64, 3), np.uint8)
    dataset.frames(KEPT.index("turned.mp4"), {"observation/image": [0]}, {"observation/image": image})
    # A quarter turn counterclockwise moves the bright quarter, upper left in the file, to the lower left. Of its 85
    # rows (64 columns that are resized to cover 64 columns), the middle 48 are kept.
    red = image[0, ..., 0].astype(int)
    assert red[40, 10] > red[40, 50] + 20 and abs(red[5, 10] - red[5, 50]) < 12


def test_the_first_hundred_of_each_reason_are_named(tmp_path: Path) -> None:
    write_clip(tmp_path / "in" / "good.mp4", range(12))
    for i in range(104):
        (tmp_path / "in" / f"empty{i:03d}.mp4").touch()
    for i in range(3):
        (tmp_path / "in" / f"text{i}.mp4").write_text("no video")
    assert run(f"--input={tmp_path}/in", f"--output={tmp_path}/out", "--every=2") == 0
    split = Dataset(tmp_path / "out").manifest["splits"]["train"]
    assert split["skipped"] == {"empty file": 104, "video cannot be opened": 3}
    named = [note.partition(":")[0] for note in split["skipped_notes"]]
    assert named == [f"empty{i:03d}.mp4" for i in range(100)] + [f"text{i}.mp4" for i in range(3)]


def test_what_is_skipped_is_fatal_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clip(tmp_path / "clips" / "a.mp4", range(10))
    for name in ("b.mp4", "c.mp4"):
        (tmp_path / "clips" / name).write_text("no video")
    arguments = [f"--input={tmp_path}/clips", f"--output={tmp_path}/out", "--every=2"]
    assert run(*arguments, "--max_skipped=0.5") == 1
    assert "2 of 3 episodes" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "clips" / "a.mp4").unlink()
    assert run(*arguments, "--overwrite") == 2
    assert (
        "no usable episode in split 'train':\n  2 x video cannot be opened\n  b.mp4: video" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--fps=5", "--every=2"], "one of --fps"),
        ([], "one of --fps"),
        (["--fps=5", "--resize=48"], "--resize: expected H,W"),
        (["--fps=5", "--resize="], "--resize=H,W is required"),
        (["--fps=0"], "--fps=0: expected a positive number"),
        (["--fps=5", "--resize=²,3"], "--resize: expected H,W"),
        (["--fps=5", "--resize=70000,70000"], "at most 8192 each"),
        (["--fps=5", "--seconds=nan"], "--seconds=nan: expected a time limit"),
        (["--fps=5", "--seconds=inf"], "--seconds=inf: expected a time limit"),
        (["--fps=5", "--cameras=a,b"], "several cameras require --layout"),
        (["--fps=5", "--layout={episode}.mp4"], "expected {camera} once"),
        (["--fps=5", "--layout=x/{camera}.mp4"], "none of 1 files has it"),
        (["--fps=5", "--labels={folder}/labels.csv"], "its columns are a,b"),
    ],
)
def test_flags_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "labels.csv").write_text("a,b\n1,2\n")
    arguments = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    assert run(f"--input={tmp_path}", f"--output={tmp_path}_out", *arguments) == 2
    assert message in capsys.readouterr().err


def test_joined_cameras(tmp_path: Path) -> None:
    for name, start in (("ep1", 0), ("ep2", 6)):
        write_clip(tmp_path / "in" / name / "wrist.mp4", range(start, start + 12))
        write_clip(tmp_path / "in" / name / "side.mp4", range(start, start + 10))
    write_clip(tmp_path / "in" / "ep3" / "wrist.mp4", range(12))
    write_clip(tmp_path / "in" / "stray.mp4", range(12))
    arguments = [f"--input={tmp_path}/in", f"--output={tmp_path}/out", "--fps=10", "--layout={episode}/{camera}.mp4"]
    assert run(*arguments) == 0
    dataset = Dataset(tmp_path / "out")
    assert list(dataset.cameras) == ["observation/side", "observation/wrist"]
    assert dataset.episode_lengths.tolist() == [10, 10]
    assert dataset.episode_texts("episode_metadata/file_path") == ["ep1", "ep2"]
    for episode, start in ((0, 0), (1, 6)):
        into = {camera: np.empty((10, 48, 64, 3), np.uint8) for camera in dataset.cameras}
        dataset.frames(episode, dict.fromkeys(into, list(range(10))), into)
        for images in into.values():
            assert [number_of(image) for image in images] == list(range(start, start + 10))
    split = dataset.manifest["splits"]["train"]
    assert split["skipped"] == {"camera missing": 1, "not in the layout": 1}
    assert split["skipped_notes"][0] == "ep3: camera missing: no file of side"


def test_an_input_gives_the_same_episodes_again(tmp_path: Path) -> None:
    from data_prep.sources.videos.corpus import corpus

    for i in range(3):
        write_clip(tmp_path / f"{i}.mp4", range(10 + i))
    sampling = clips.Sampling(SIZE, Fraction(5), min_steps=6)
    (part,) = corpus(tmp_path, sampling).splits["train"]
    first, second = list(part.episodes()), list(part.episodes())
    assert first == second and [found.reason for found in first] == ["too short", "", ""]
    assert corpus(tmp_path, sampling).options == corpus(tmp_path, sampling).options


@pytest.fixture
def mixture(made: tuple[Path, dict[str, str]], tiny_config: ConfigDict) -> ConfigDict:
    """Robot data, and one of the clips as video."""
    tiny_config.data.sources.robot = source(weight=0.5)
    tiny_config.data.sources.video = source(
        path=str(made[0]), weight=0.5, use_actions=False, cameras=("image",), include=("two.avi", "deep/")
    )
    return tiny_config


def test_it_is_a_source_without_actions(mixture: ConfigDict) -> None:
    loader = Loader(RunData(mixture.data, seed=3), batch_size=16)
    batch = next(iter(loader))
    rows = np.flatnonzero(~batch["action_mask"])
    assert 4 <= len(rows) <= 12 and (batch["action"][rows] == 0).all() and (batch["action"] != 0).any()
    for row in rows:
        shown = [*batch["obs/wrist"][row], *batch["next_obs/wrist"][row]]  # steps 0, 1, 5 and 6 of 5 a second
        np.testing.assert_array_equal(np.diff([number_of(image) for image in shown]), [2, 8, 2])
