"""LeRobot datasets of each version, against what was written into them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.conversion.layout_options import Options
from data_prep.conversion.training_layout import build
from data_prep.sources.inputs import Found
from data_prep.sources.lerobot.episodes import corpus
from data_prep.sources.lerobot.keys import our_names
from data_prep.sources.lerobot.metadata import read_tasks
from data_prep.sources.pictures import Pictures
from tests.data_prep import lerobot_source
from tests.data_prep.clips import SIZE, number_of, picture, write_clip
from uwm_jax.data import example
from uwm_jax.data.records import decode_image
from uwm_jax.errors import UserError

LENGTHS = [9, 5, 8]
TOP, WRIST = "observation.images.top", "observation.images.wrist"
NO_IMAGES = {"features": {k: f for k, f in lerobot_source.FEATURES.items() if f["dtype"] not in ("image", "video")}}


def found(root: Path, split: str = "train", **flags: Any) -> list[Found]:
    return [episode for part in corpus(root, **flags).splits[split] for episode in part.episodes()]


def images(record: bytes, key: str) -> list[bytes]:
    field = example.scan(record)[f"steps/observation/{key}".encode()]
    return [bytes(record[slice(*span)]) for span in example.bytes_spans(record, field)]


def shown(record: bytes, key: str) -> list[int]:
    """The numbers of a camera's pictures."""
    numbers = []
    for data in images(record, key):
        image = np.empty((*SIZE, 3), np.uint8)
        decode_image(data, image)
        numbers.append(number_of(image))
    return numbers


def texts(record: bytes, key: str) -> list[str]:
    field = example.scan(record)[key.encode()]
    return [bytes(record[slice(*span)]).decode() for span in example.bytes_spans(record, field)]


def clip(root: Path, episode: int, key: str = TOP) -> Path:
    place = {"episode_chunk": episode // 2, "episode_index": episode, "video_key": key}
    return root / lerobot_source.VIDEO[2].format(**place)


def data(root: Path, episode: int) -> Path:
    return root / lerobot_source.DATA[2].format(episode_chunk=episode // 2, episode_index=episode)


def edit(root: Path, **fields: Any) -> None:
    file = root / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.slow
def test_every_value_as_tfds_reads_it(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    written = lerobot_source.make(tmp_path / "arm", "v3.0", LENGTHS, files=(2, 1))
    options = Options(chunk_steps=4, workers=1, pca_channels=4)
    manifest = build(corpus(tmp_path / "arm"), tmp_path / "out", options)
    assert manifest["splits"]["train"]["episodes"] == 3 and not manifest["splits"]["train"]["skipped"]
    assert set(manifest["cameras"]) == {"observation/top", "observation/wrist", "observation/image"}
    robot = manifest["robot"]
    assert (robot["fps"], robot["type"], robot["flip"]) == (10, "arm", "none")
    assert robot["keys"]["observation/state"]["names"] == {"motors": ["shoulder", "elbow", "gripper"]}
    assert robot["keys"]["action"] == {"source": "action", "dtype": "float32", "shape": [2], "names": ["dx", "dy"]}
    assert robot["left_out"] == {"observation.images.wrist_depth": "depth, which is no camera"}

    episodes: list[list[dict[str, Any]]] = []
    for chunk in tfds.builder_from_directory(tmp_path / "out").as_data_source("train"):
        if chunk["chunk"]["first_step"] == 0:
            episodes.append([])
        episodes[-1] += list(chunk["steps"])
        assert chunk["episode_metadata"]["episode_index"] == len(episodes) - 1
    for number, (steps, expected) in enumerate(zip(episodes, written, strict=True)):
        assert len(steps) == LENGTHS[number]
        for i, step in enumerate(steps):
            seen = step["observation"]
            for camera in ("top", "wrist", "image"):
                assert seen[camera].shape == (*SIZE, 3)
                assert number_of(seen[camera]) == expected["numbers"][i]
            np.testing.assert_array_equal(seen["state"], expected["observation.state"][i])
            np.testing.assert_array_equal(seen["pose"], expected["observation.state.pose"][i].astype(np.float32))
            np.testing.assert_array_equal(step["action"], expected["action"][i])
            assert step["action_dict"]["raw"] == expected["action.raw"][i]
            assert step["reward"] == expected["next.reward"][i]
            assert step["timestamp"] == expected["timestamp"][i]
            assert step["is_first"] == (i == 0) and step["is_last"] == (i == LENGTHS[number] - 1)
            assert step["is_terminal"] == expected["next.done"][i]
            assert step["note"].decode() == expected["note"][i]
            assert step["language_instruction"].decode() == lerobot_source.TASKS[expected["task_index"][i]]


@pytest.mark.parametrize("version, files", [("v2.0", ()), ("v2.1", ()), ("v3.0", (1, 2)), ("v3.4", (3,))])
def test_versions_and_layouts_of_files(tmp_path: Path, version: str, files: tuple[int, ...]) -> None:
    root = tmp_path / "arm"
    written = lerobot_source.make(root, version, LENGTHS, files=files)
    episodes = found(root)
    assert [episode.reason for episode in episodes] == [""] * 3
    for episode, expected in zip(episodes, written, strict=True):
        record = episode.record or b""
        for camera in ("top", "wrist"):
            assert shown(record, camera) == expected["numbers"]
        assert images(record, "image") == [lerobot_source.png(n) for n in expected["numbers"]]
        action = example.floats(record, example.scan(record)[b"steps/action"])
        np.testing.assert_array_equal(action, expected["action"].reshape(-1))
        instructions = texts(record, "steps/language_instruction")
        assert instructions == [lerobot_source.TASKS[i] for i in expected["task_index"]]


def test_frames_are_those_of_an_independent_decoder(tmp_path: Path) -> None:
    lerobot_source.make(tmp_path / "arm", "v2.1", [6], videos=[TOP])
    record = found(tmp_path / "arm", pictures=Pictures("png"))[0].record or b""
    with av.open(str(clip(tmp_path / "arm", 0))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    image = np.empty((*SIZE, 3), np.uint8)
    for stored, frame in zip(images(record, "top"), frames, strict=True):
        decode_image(stored, image)
        np.testing.assert_array_equal(image, frame)


@pytest.mark.parametrize(
    "numbers, times, reason",
    [
        (range(9), [i / 10 + 0.04 for i in range(9)], ""),
        (range(9), [i / 10 + 0.06 for i in range(9)], "no frame at its time"),
        (range(18), [i / 20 for i in range(18)], ""),
        (range(5), [i / 5 for i in range(5)], "no frame at its time"),
        (range(8), None, "no frame at its time"),
        (range(12), None, ""),
        (range(9), [0, 0.1, 0.2, 0.26, 0.4, 0.5, 0.6, 0.7, 0.8], ""),
        (range(8), [0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8], "a frame twice"),
    ],
)
def test_a_frame_within_half_a_step_for_every_row(
    tmp_path: Path, numbers: range, times: Sequence[float] | None, reason: str
) -> None:
    root = tmp_path / "arm"
    lerobot_source.make(root, "v2.1", [9, 2], videos=[TOP], info=NO_IMAGES | {"features": _with(TOP)})
    write_clip(clip(root, 0), numbers, times)
    first, second = found(root)
    assert first.reason == reason and second.reason == ""
    if not reason:
        stamps = [Fraction(i, 10) for i in range(len(numbers))] if times is None else times
        rows = [min(range(len(stamps)), key=lambda j, row=row: abs(stamps[j] - row / 10)) for row in range(9)]
        assert shown(first.record or b"", "top") == rows


def _with(*keys: str) -> dict[str, Any]:
    return NO_IMAGES["features"] | {key: lerobot_source.FEATURES[key] for key in keys}


def test_frame_index_and_from_timestamp_give_the_time(tmp_path: Path) -> None:
    root = tmp_path / "arm"
    lerobot_source.make(root, "v2.1", [4], videos=[TOP], info={"features": _with(TOP)})
    table = lerobot_source.rows([lerobot_source.episode(0, 4) | {"frame_index": np.array([0, 2, 3, 5])}], 0)
    lerobot_source.write_parquet(data(root, 0), table)
    write_clip(clip(root, 0), range(6))
    assert shown(found(root)[0].record or b"", "top") == [0, 2, 3, 5]

    root = tmp_path / "joined"
    lerobot_source.make(root, "v3.0", [4, 4], videos=[TOP], info={"features": _with(TOP)})
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(file).to_pylist()
    table[0][f"videos/{TOP}/from_timestamp"] = 0.2
    lerobot_source.write_parquet(file, pa.Table.from_pylist(table))
    first, second = found(root)
    # Steps 2 to 5 of the file, the last of which is beyond to_timestamp 0.4.
    assert first.reason == "no frame at its time" and "to_timestamp is 0.400 s" in first.detail
    assert shown(second.record or b"", "top") == [3, 4, 5, 6]


def test_images_as_bytes_or_files(tmp_path: Path) -> None:
    root = tmp_path / "arm"
    lerobot_source.make(root, "v2.1", [3] * 4, videos=[], info={"features": _with("observation.image")})
    (root / "images").mkdir()
    (root / "images" / "0.png").write_bytes(lerobot_source.png(7))
    (tmp_path / "secret.png").write_bytes(lerobot_source.png(8))
    for episode, path in ((0, "images/0.png"), (1, "../secret.png"), (2, "images/1.png"), (3, "a\0b")):
        table = lerobot_source.rows([lerobot_source.episode(episode, 3)], 0)
        column = table.column_names.index("observation.image")
        given = pa.array([{"bytes": None, "path": path}] * 3, table.schema.field(column).type)
        lerobot_source.write_parquet(data(root, episode), table.set_column(column, "observation.image", given))
    first, second, third, fourth = found(root)
    assert images(first.record or b"", "image") == [lerobot_source.png(7)] * 3
    assert (second.reason, third.reason, fourth.reason) == ("image missing",) * 3
    assert "no file of the dataset" in second.detail


def test_names() -> None:
    assert our_names(
        ["observation.images.top", "observation.image", "observation.state", "observation.state.pose", "action"]
        + ["observation.environment_state", "action.cartesian.velocity", "next.reward", "next.done", "next.success"]
    ) == {
        "observation.images.top": "observation/top",
        "observation.image": "observation/image",
        "observation.state": "observation/state",
        "observation.state.pose": "observation/pose",
        "action": "action",
        "observation.environment_state": "observation/environment_state",
        "action.cartesian.velocity": "action_dict/cartesian_velocity",
        "next.reward": "reward",
        "next.done": "is_terminal",
        "next.success": "next_success",
    }
    # A longer name gives way to a feature that has the short one, whatever their order.
    names = our_names(["observation.images.wrist", "observation.wrist"])
    assert names == {"observation.images.wrist": "observation/images_wrist", "observation.wrist": "observation/wrist"}
    assert our_names(["observation.images/top", "a/b"]) == {
        "observation.images/top": "observation/images_top",
        "a/b": "a_b",
    }
    with pytest.raises(UserError, match=r"'a_b' and 'a\.b' would both become 'a_b'"):
        our_names(["a_b", "a.b"])
    with pytest.raises(
        UserError, match="'observation' and 'observation.x' would become 'observation' and 'observation/x'"
    ):
        our_names(["observation.x", "observation"])


@pytest.mark.parametrize(
    "entry",
    [
        {"info": {"video.is_depth_map": True}},
        {"video_info": {"video.is_depth_map": True}},
        {"info": {"is_depth_map": True}},
    ],
)
def test_depth_is_no_camera(tmp_path: Path, capsys: pytest.CaptureFixture[str], entry: dict[str, Any]) -> None:
    features = _with(TOP) | {WRIST: lerobot_source.FEATURES[WRIST] | entry, "observation.images.front-depth": {}}
    features["observation.images.front-depth"] = lerobot_source.FEATURES[TOP]
    lerobot_source.make(tmp_path / "arm", "v3.0", [3], videos=[TOP], info={"features": features})
    made = corpus(tmp_path / "arm")
    assert "steps/observation/wrist" not in made.features and made.features["steps/observation/top"].image
    assert set(made.facts["robot"]["left_out"]) == {WRIST, "observation.images.front-depth"}
    assert f"{WRIST} is left out: depth" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["v1.6", "v2.2", "v4.0", "new", None, 2.1])
def test_other_versions_are_refused_by_name(tmp_path: Path, version: Any) -> None:
    root = tmp_path / "arm"
    lerobot_source.make(root, "v2.1", [2], videos=[], info={"features": _with()})
    edit(root, codebase_version=version)
    if version == 2.1:
        assert len(found(root)) == 1
    else:
        with pytest.raises(UserError, match=f"codebase_version is {version!r}; this command reads v2.0, v2.1 and v3.x"):
            corpus(root)


def test_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "arm"
    lerobot_source.make(root, "v2.1", [2] * 5, videos=[], info={"features": _with()})
    edit(root, splits={"train": "0:3", "test": "3:4"})
    splits = corpus(root).splits
    numbers = {split: [e.number for part in parts for e in part.parts] for split, parts in splits.items()}
    assert numbers == {"train": [0, 1, 2, 4], "test": [3]}
    assert list(corpus(root, splits=["test"]).splits) == ["test"]
    with pytest.raises(UserError, match="no split 'val'; it has train, test"):
        corpus(root, splits=["val"])
    assert "several splits" not in capsys.readouterr().out
    edit(root, splits={"train": "0:5", "test": "3:5"})
    assert [len(parts) for parts in corpus(root).splits.values()] == [1, 1]
    assert "2 episodes in several splits (the first is 3)" in capsys.readouterr().out
    edit(root, splits={"train": "most"})
    with pytest.raises(UserError, match="expected ranges such as '0:50'"):
        corpus(root)


def test_a_group_is_a_part_of_one_file(tmp_path: Path) -> None:
    lerobot_source.make(tmp_path / "arm", "v3.0", [1] * 20, files=(3, 17), videos=[], info={"features": _with()})
    parts = corpus(tmp_path / "arm").splits["train"]
    assert [part.name for part in parts] == ["episodes 0 to 2", "episodes 3 to 18", "episode 19"]
    assert [part.promised for part in parts] == [3, 16, 1]


def test_damaged_and_mismatched_episodes_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "arm"
    lerobot_source.make(root, "v2.1", [3] * 12, videos=[TOP], info={"features": _with(TOP, "note")})
    data(root, 1).write_bytes(data(root, 1).read_bytes()[:-20])
    lerobot_source.write_parquet(data(root, 2), lerobot_source.rows([lerobot_source.episode(1, 3)], 0))
    lerobot_source.write_parquet(data(root, 3), lerobot_source.rows([lerobot_source.episode(3, 4)], 0))
    clip(root, 4).write_bytes(b"no video")
    write_clip(clip(root, 5), range(15, 18), size=(SIZE[0], SIZE[1] + 16))
    for number, column in (
        (6, {"action.raw": np.full(3, 0.5)}),
        (7, {"action": np.zeros((3, 3))}),
        (8, {"task_index": [7] * 3}),
        (9, {"frame_index": [0.0, float("nan"), 2.0]}),
        (10, {"note": pa.array([b"a", b"\xe3", b""]).cast(pa.string(), safe=False)}),
        (11, {"observation.state.pose": np.full((3, 2, 2), 1e39)}),
    ):
        table = lerobot_source.rows([lerobot_source.episode(number, 3) | column], 0)
        lerobot_source.write_parquet(data(root, number), table)
    reasons = [episode.reason for episode in found(root)]
    assert reasons == [
        "",
        "unreadable parquet file",
        "rows of another episode",
        "another length",
        "video cannot be opened",
        "another image size",
        "another type",
        "another shape",
        "unknown task",
        "another type",
        "unreadable parquet file",
        "number too large",
    ]


def test_missing_files_and_placeholders(tmp_path: Path) -> None:
    root = tmp_path / "arm"
    lerobot_source.make(root, "v2.1", [3, 3], info={"features": _with(TOP, WRIST)})
    clip(root, 1, WRIST).rename(tmp_path / "kept.mp4")
    with pytest.raises(UserError, match=f"1 of 2 videos of camera {WRIST} are missing.*--cameras={TOP}"):
        corpus(root)
    made = corpus(root, cameras=["top"])
    assert made.facts["robot"]["left_out"][WRIST] == "not in --cameras"
    with pytest.raises(UserError, match=f"no camera 'side'; it has {TOP}, {WRIST}"):
        corpus(root, cameras=["side"])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    clip(root, 1, WRIST).write_text(pointer)
    with pytest.raises(UserError, match=r"episode_000001.mp4 is a Git LFS pointer.*git lfs pull"):
        corpus(root)
    (tmp_path / "kept.mp4").rename(clip(root, 1, WRIST))
    data(root, 0).write_text(pointer)
    with pytest.raises(UserError, match=r"episode_000000.parquet is a Git LFS pointer"):
        corpus(root)
    data(root, 0).unlink()
    with pytest.raises(UserError, match="1 of 2 data files are missing: data/chunk-000/episode_000000.parquet"):
        corpus(root)
    for number in (0, 1):
        clip(root, number).write_bytes(b"")
    lerobot_source.write_parquet(data(root, 0), lerobot_source.rows([lerobot_source.episode(0, 3)], 0))
    with pytest.raises(UserError, match=f"no image of camera {TOP} can be read"):
        corpus(root)


def test_damaged_metadata(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"info.json does not exist: --input must be the directory"):
        corpus(tmp_path)
    root = tmp_path / "arm"
    lerobot_source.make(root, "v3.0", [3], videos=[TOP], info={"features": _with(TOP)})
    with pytest.raises(UserError, match=r"Did you mean .*arm\?"):
        corpus(tmp_path)
    for field, value, message in [
        ("fps", 0, "fps is 0; expected a positive number"),
        ("features", [], "expected `features`"),
        ("data_path", "data/{file.__class__}", "not_a_match"),
        ("data_path", "data/{nothing}.parquet", "names in braces"),
        ("data_path", "data/{chunk_index:9999999d}.parquet", "not_a_match"),
        ("data_path", "../{chunk_index}.parquet", r"cannot name a file inside the dataset"),
        ("video_path", None, "video_path. is None"),
    ]:
        before = json.loads((root / "meta/info.json").read_text())
        edit(root, **{field: value})
        # What is no plain name with a plain width stays as it is.
        with pytest.raises(UserError, match=message if message != "not_a_match" else f"missing: {value}"):
            corpus(root)
        edit(root, **before)
    file = root / "meta/episodes/chunk-000/file-000.parquet"
    entry = pq.read_table(file).to_pylist()[0]
    for name, value in (
        ("dataset_to_index", None),
        (f"videos/{TOP}/from_timestamp", float("nan")),
        ("data/file_index", -1),
    ):
        lerobot_source.write_parquet(file, pa.Table.from_pylist([entry | {name: value}]))
        with pytest.raises(UserError, match=f"file-000.parquet: episode 0: {name} is {value}; expected"):
            corpus(root)
    lerobot_source.write_parquet(file, pa.Table.from_pylist([entry]).drop_columns([f"videos/{TOP}/chunk_index"]))
    with pytest.raises(UserError, match=f"no column 'videos/{TOP}/chunk_index'"):
        corpus(root)
    lerobot_source.write_parquet(file, pa.Table.from_pylist([entry]))
    lerobot_source.write_parquet(file, pa.Table.from_pylist([entry, entry]))
    with pytest.raises(UserError, match="list episode 0 twice"):
        corpus(root)
    lerobot_source.write_parquet(file, pa.Table.from_pylist([entry]))
    for index in (None, "x"):
        tasks = pa.Table.from_pylist([{"task_index": index, "task": "lift"}])
        lerobot_source.write_parquet(root / "meta/tasks.parquet", tasks)
        read_tasks.cache_clear()
        with pytest.raises(UserError, match=f"tasks.parquet: task_index is {index!r}; expected an integer"):
            corpus(root)
    whole = pa.table({"task_index": [0], "task": ["lift"]})
    for damaged in (
        pa.table({"task_index": [0], "task": pa.array([b"\xe3"]).cast(pa.string(), safe=False)}),
        *(whole.replace_schema_metadata({"pandas": text}) for text in ("{", "[1]", b"\xe3")),
    ):
        lerobot_source.write_parquet(root / "meta/tasks.parquet", damaged)
        read_tasks.cache_clear()
        with pytest.raises(UserError, match=r"tasks.parquet is damaged"):
            corpus(root)
    read_tasks.cache_clear()
    (root / "meta/tasks.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"tasks.parquet is not a complete parquet file"):
        corpus(root)


def test_the_command_counts_what_is_skipped(tmp_path: Path) -> None:
    root = tmp_path / "arm"
    lerobot_source.make(root, "v2.1", [5] * 4, videos=[TOP], info={"features": _with(TOP)})
    for episode in (1, 2):
        write_clip(clip(root, episode), range(3))
    command = [sys.executable, "-m", "data_prep.lerobot", f"--input={root}", f"--output={tmp_path / 'out'}"]
    command += ["--workers=1", "--pca_channels=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "2 of 4 episodes" in done.stderr and "2 x no frame at its time" in done.stderr
    assert "--max_skipped=0.01" in done.stderr and "episode 1" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_split_without_a_usable_episode_is_in_the_manifest(tmp_path: Path) -> None:
    root = tmp_path / "arm"
    lerobot_source.make(root, "v2.1", [3, 3], videos=[], info=NO_IMAGES | {"splits": {"train": "0:1", "val": "1:2"}})
    data(root, 1).write_bytes(b"PAR1")
    manifest = build(corpus(root), tmp_path / "out", Options(workers=1))
    assert manifest is not None and list(manifest["splits"]) == ["train"]
    left_out = manifest["left_out_splits"]["val"]
    assert left_out["skipped"] == {"unreadable parquet file": 1}
    assert left_out["skipped_notes"][0].startswith("episode 1: unreadable parquet file: ")


def test_frames_of_videos_are_resized_before_they_are_encoded(tmp_path: Path) -> None:
    lerobot_source.make(tmp_path / "arm", "v2.1", [3], videos=[TOP], info={"features": _with(TOP)})
    made = corpus(tmp_path / "arm", pictures=Pictures("png", resize=(24, 32)))
    assert made.features["steps/observation/top"].shape == (24, 32, 3)
    assert made.facts["robot"]["frames"] == {"encoding": "png", "stored_size": {"observation/top": list(SIZE)}}
    record = next(made.splits["train"][0].episodes()).record or b""
    image = np.empty((24, 32, 3), np.uint8)
    decode_image(images(record, "top")[2], image)
    assert np.abs(image - picture(2).reshape(24, 2, 32, 2, 3).mean((1, 3))).mean() < 3


def test_a_camera_that_the_files_lack(tmp_path: Path) -> None:
    root = tmp_path / "arm"
    features = _with("observation.image")
    features["observation.images.side"] = {"dtype": "image", "shape": [3, *SIZE], "names": None}
    lerobot_source.make(root, "v2.1", [2], videos=[], info={"features": features})
    with pytest.raises(UserError, match=r"(?s)no image of camera observation.images.side .*no such column"):
        corpus(root)


def test_images_of_16_bits_are_no_camera(tmp_path: Path) -> None:
    root = tmp_path / "arm"
    lerobot_source.make(root, "v2.1", [2], videos=[], info={"features": _with("observation.image")})
    out = io.BytesIO()
    Image.fromarray(np.full(SIZE, 40_000, np.uint16)).save(out, "PNG")
    table = lerobot_source.rows([lerobot_source.episode(0, 2)], 0)
    column = table.column_names.index("observation.image")
    stored = pa.array([{"bytes": out.getvalue(), "path": "0.png"}] * 2, table.schema.field(column).type)
    lerobot_source.write_parquet(data(root, 0), table.set_column(column, "observation.image", stored))
    made = corpus(root)
    assert "steps/observation/image" not in made.features
    assert made.facts["robot"]["left_out"]["observation.image"].startswith("images of mode I;16 (depth?)")
    assert [episode.reason for part in made.splits["train"] for episode in part.episodes()] == [""]
