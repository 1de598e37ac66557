"""Recorded episodes, read by what reads training data: the loader, `data_prep.validate` and TFDS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.checks import validation
from tests.serving.small_model import FRAME, make_contract, make_server, observation
from uwm_jax.config import base
from uwm_jax.data.columns import Column
from uwm_jax.data.loader import Loader
from uwm_jax.data.normalize import Normalizer
from uwm_jax.data.records import Dataset
from uwm_jax.data.robot import Part, RobotActions
from uwm_jax.data.run_data import RunData
from uwm_jax.data.spec import DataSpec
from uwm_jax.data.transforms import Columns, get_transform
from uwm_jax.data.windows import WindowSpec
from uwm_jax.errors import UserError
from uwm_jax.serving import recording
from uwm_jax.serving.connections import in_thread
from uwm_jax.serving.contract import Request
from uwm_jax.serving.recording import Recording, action_keys
from uwm_jax.serving.uwm_client import Client

LENGTHS = (21, 1, 20)


def spec_of(text_dim: int = 0, **more: Any) -> DataSpec:
    window = WindowSpec.from_config(base().data.window)
    return DataSpec(window, {"front": FRAME}, {"state": 2}, 3, text_dim, Normalizer(), **more)


def request(step: int, pixel: int = 100, **more: Any) -> Request:
    inputs = {"obs/front": np.full((*FRAME, 3), pixel, np.uint8), "obs/state": np.full(2, step, np.float32)}
    return Request("policy", inputs | more.pop("inputs", {}), **more)


def record(place: Path, lengths: Any = LENGTHS, first: int = 0, **options: Any) -> Recording:
    kept = Recording(place, options.pop("spec", spec_of()), options.pop("robot", None), width=3, served="run@7")
    for number, length in enumerate(lengths, first):
        for step in range(length):
            action = np.array([number, step, -step], np.float32)
            kept.step(number, request(100 * number + step, 10 * number + step), action)
        kept.end(number)
    return kept


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recorded") / "robot"
    record(place).close()
    return place


def column(dataset: Dataset, key: str) -> np.ndarray:
    found: Column = dataset.column(key)
    return np.asarray(found[:])


def test_every_step_is_kept_as_it_was_shown_and_answered(recorded: Path) -> None:
    dataset = Dataset(recorded, "train")
    assert dataset.episode_lengths.tolist() == list(LENGTHS) and dataset.cameras == {"observation/front": FRAME}
    steps = [(number, step) for number, length in enumerate(LENGTHS) for step in range(length)]
    np.testing.assert_array_equal(column(dataset, "observation/state")[:, 0], [100 * n + s for n, s in steps])
    np.testing.assert_array_equal(column(dataset, "action"), [[n, s, -s] for n, s in steps])
    ends = np.cumsum(LENGTHS) - 1
    np.testing.assert_array_equal(np.flatnonzero(column(dataset, "is_last")), ends)
    np.testing.assert_array_equal(np.flatnonzero(column(dataset, "is_first")), [0, *(ends[:-1] + 1)])
    frames = np.empty((3, *FRAME, 3), np.uint8)
    dataset.frames(2, {"observation/front": [0, 9, 19]}, {"observation/front": frames})
    assert np.abs(frames.astype(int) - np.array([20, 29, 39])[:, None, None, None]).max() <= 3  # JPEG
    assert dataset.episode_texts("served") == ["run@7"] * 3
    assert all(text.endswith("+00:00") for text in dataset.episode_texts("recorded"))


def test_the_validator_finds_nothing(recorded: Path) -> None:
    findings = validation.validate(recorded, validation.Limits(min_steps=1), workers=1)
    assert not [str(found) for found in findings if found.level == validation.ERROR]


def test_the_loader_trains_on_it(recorded: Path) -> None:
    c = base()
    c.data.path, c.data.cameras, c.data.low_dim = str(recorded), ("front",), ("state",)
    c.data.window.action, c.data.window.next_obs = (1, 2), (3,)
    c.data.num_streams, c.data.num_threads, c.data.val_ratio = 4, 0, 0.0
    data = RunData(c.data, seed=0)
    loader = Loader(data, batch_size=4)
    batch = next(iter(loader))
    assert batch["obs/front"].shape == (4, 2, *FRAME, 3) and batch["action"].shape == (4, 2, 3)
    raw = data.spec.normalizer.unnormalize("action", batch["action"])
    state = data.spec.normalizer.unnormalize("state", batch["obs/state"])
    np.testing.assert_allclose(raw[:, 0, 1] + 100 * raw[:, 0, 0], state[:, 1, 0], atol=1e-3)  # the action of its step


@pytest.mark.slow
def test_tfds_reads_it(recorded: Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(recorded)
    assert builder.info.splits["train"].num_examples == Dataset(recorded, "train").manifest["splits"]["train"]["chunks"]
    records = list(builder.as_data_source("train"))
    first = list(records[0]["steps"])
    assert len(first) == 8 and first[0]["observation"]["front"].shape == (*FRAME, 3)
    assert [int(step["action"][1]) for step in first] == list(range(8))
    assert records[0]["chunk"]["episode_steps"] == LENGTHS[0]


def test_it_is_continued_and_readable_after_every_episode(tmp_path: Path) -> None:
    place = tmp_path / "robot"
    kept = record(place, (5,))
    before = Dataset(place, "train").fingerprint
    first = kept.episodes
    kept.close()
    kept = record(place, (4, 3), first=1)
    assert (first, kept.episodes) == (1, 3)
    dataset = Dataset(place, "train")
    assert dataset.episode_lengths.tolist() == [5, 4, 3]
    np.testing.assert_array_equal(column(dataset, "action")[:, 0], [0] * 5 + [1] * 4 + [2] * 3)
    assert dataset.fingerprint != before
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".recorded")] == []
    assert not [f for f in validation.validate(place, validation.Limits(1), workers=1) if f.level == validation.ERROR]
    kept.close()


def test_a_reset_begins_an_episode_and_closing_ends_all(tmp_path: Path) -> None:
    kept = Recording(tmp_path / "robot", spec_of(), None, width=3)
    for connection in (1, 2):
        for step in range(3):
            kept.step(connection, request(step, reset=step == 2 and connection == 1), np.zeros(3, np.float32))
    kept.end(3)  # one that sent nothing
    assert kept.episodes == 1
    kept.close()
    assert Dataset(tmp_path / "robot", "train").episode_lengths.tolist() == [2, 1, 3]


def test_an_endless_episode_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recording, "MOST_STEPS", 4)
    record(tmp_path / "robot", (10,)).close()
    assert Dataset(tmp_path / "robot", "train").episode_lengths.tolist() == [4, 4, 2]
    assert "an episode of more than 4 steps is cut" in capsys.readouterr().err


def test_prompts_and_embeddings_are_kept(tmp_path: Path) -> None:
    kept = Recording(tmp_path / "robot", spec_of(4), None, width=3)
    for step, prompt in enumerate(("push", "push", None)):
        text = {"obs/text": np.full(4, step, np.float32)}
        kept.step(0, request(step, prompt=prompt, inputs=text), np.zeros(3, np.float32))
    kept.close()
    dataset = Dataset(tmp_path / "robot", "train")
    assert [dataset.values(0, s, "language_embedding")[0] for s in range(3)] == [0, 1, 2]
    assert dataset.manifest["step_features"]["language_instruction"]["dtype"] == "string"


def robot_of(*parts: tuple[str, int]) -> RobotActions:
    identity = get_transform("identity")
    return RobotActions(tuple(Part(Columns.parse(text), identity, width) for text, width in parts), {})


@pytest.mark.parametrize(
    ("robot", "keys"),
    [
        (None, {"action": [0, 1, 2]}),
        (robot_of(("action", 3)), {"action": [0, 1, 2]}),
        (robot_of(("action[1:]", 2), ("action[:1]", 1)), {"action": [2, 0, 1]}),
        (
            robot_of(("action_dict/pose", 2), ("action_dict/gripper", 1)),
            {"action_dict/pose": [0, 1], "action_dict/gripper": [2]},
        ),
        (robot_of(("action[:2]", 2), ("action[4:]", 1)), {"action": [0, 1, 2]}),  # columns that no part has
    ],
)
def test_actions_are_under_the_keys_that_training_reads(robot: RobotActions | None, keys: dict[str, list[int]]) -> None:
    assert action_keys(robot, 3) == keys


def test_the_flip_of_the_training_data_is_kept(tmp_path: Path) -> None:
    record(tmp_path / "robot", (2,), spec=spec_of(flip={"front": "rows"})).close()
    assert Dataset(tmp_path / "robot", "train").flip == "rows"


def test_what_is_no_recording_of_this_model_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "robot"
    record(place, (2,)).close()
    with pytest.raises(UserError, match="other keys or shapes than this model's: language_embedding, language_instr"):
        Recording(place, spec_of(4), None, width=3)
    (place / "text").mkdir()
    with pytest.raises(UserError, match="text: not of a recording, or made from it"):
        Recording(place, spec_of(), None, width=3)
    (place / "text").rmdir()
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {"source": {"format": "LeRobot"}}))
    with pytest.raises(UserError, match="this dataset is no recording"):
        Recording(place, spec_of(), None, width=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="--record=.*other: this folder holds something else"):
        Recording(tmp_path / "other", spec_of(), None, width=3)


def test_one_process_records_at_a_time(tmp_path: Path) -> None:
    kept = record(tmp_path / "robot", (2,))
    with pytest.raises(UserError, match="another server records there"):
        Recording(tmp_path / "robot", spec_of(), None, width=3)
    kept.close()
    record(tmp_path / "robot", (2,)).close()


KILLED = """
import os, sys
from pathlib import Path
from tests.serving.test_recording import record
from uwm_jax.serving import recording

left = 0
def killing(whole):
    def stop(*args, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return whole(*args, **options)
    return stop

for name in ("write_split", "write_descriptions", "sync", "exchange"):
    setattr(recording, name, killing(getattr(recording, name)))
for at in map(int, sys.argv[2:]):
    if not (child := os.fork()):
        left = 1000
        record(Path(sys.argv[1]) / str(at) / "robot", (5,)).close()
        left = at
        record(Path(sys.argv[1]) / str(at) / "robot", (4,), first=1).close()
        os._exit(0)
    print(at, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_killed_server_leaves_a_whole_dataset(tmp_path: Path) -> None:
    # Before the index, before and after the manifest, before the folder takes its place; not at all.
    ends = {0: 9, 1: 9, 2: 9, 5: 9, 1000: 0}
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), *map(str, ends)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [tuple(map(int, line.split())) for line in done.stdout.splitlines()] == list(ends.items()), done.stderr
    for at in ends:
        place = tmp_path / str(at) / "robot"
        there = [5, 4] if at == 1000 else [5]
        assert Dataset(place, "train").episode_lengths.tolist() == there
        found = validation.validate(place, validation.Limits(1), workers=1)
        assert not [str(f) for f in found if f.level == validation.ERROR]
        record(place, (3,)).close()
        assert Dataset(place, "train").episode_lengths.tolist() == [*there, 3]
        assert sorted(path.name for path in place.parent.iterdir()) == [".robot.recording", "robot"]


def test_a_stepwise_server_records_what_its_clients_sent(tmp_path: Path) -> None:
    contract = make_contract(stepwise=True)
    backend = contract.actor.backend
    kept = Recording(tmp_path / "robot", backend.spec, None, width=3, served="stub@7")
    rows = []
    with in_thread(make_server(contract, recorder=kept)) as address:
        for length in (9, 4):
            with Client(address, wait=10) as client:
                rows += [client.infer(observation(10 + step))["actions"][0] for step in range(length)]
    kept.close()
    dataset = Dataset(tmp_path / "robot", "train")
    assert sorted(dataset.episode_lengths.tolist()) == [4, 9]
    order = [9, 4] if dataset.episode_lengths[0] == 9 else [4, 9]
    expected = rows if order == [9, 4] else rows[9:] + rows[:9]
    np.testing.assert_array_equal(column(dataset, "action"), expected)
    np.testing.assert_array_equal(
        column(dataset, "observation/state")[:, 0], [10 + s for length in order for s in range(length)]
    )


def test_without_links_shards_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    record(tmp_path / "robot", (5, 4)).close()
    assert Dataset(tmp_path / "robot", "train").num_episodes == 2
