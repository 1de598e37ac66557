"""A job that is killed at any moment continues, redoes no finished task, and ends with the same bytes."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.conversion.training_layout import reshard
from data_prep.jobs.job_folder import RESULT
from tests.data import rlds_source
from tests.data_prep.killing import Commands, finished_tasks, held, kill_and_resume, random_moments, tree

FILES = 8
TASKS = [*(f"train.{i:05d}" for i in range(FILES - 1)), "val.00000"]
FLAGS = ("--workers=1", "--pca_channels=4")  # the cameras have two sizes: no codec is fitted, and JAX not started


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    started = Commands("data_prep.reshard")
    yield started
    started.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "source"
    features, episodes = rlds_source.features(), rlds_source.make_episodes([5 + i for i in range(2 * FILES)])
    records = [rlds_source.serialize(features, episode) for episode in episodes]
    shards = [records[2 * i : 2 * i + 2] for i in range(FILES)]
    rlds_source.write(path, {"train": shards[:-1], "val": shards[-1:]}, features)
    return path


@pytest.fixture(scope="module")
def expected(commands: Commands, source: Path) -> dict[str, bytes]:
    output = source.parent / "expected"
    status, printed = commands.run(_command(source, output))
    assert status == 0, printed
    assert sorted(p.name for p in source.parent.iterdir()) == ["expected", "source"]
    return tree(output)


def _command(source: Path, output: Path, *flags: str) -> list[str]:
    return ["data_prep.reshard", f"--input={source}", f"--output={output}", *FLAGS, *flags]


def _folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.building")


def _kill_after(commands: Commands, command: list[str], output: Path, tasks: int) -> None:
    """Kills a job of all tasks when it has done the first few."""
    with held(output, TASKS[tasks:]):
        running = commands.start(command)
        assert running.until(lambda: finished_tasks(output) == tasks) is None, running.output
        running.kill()


def test_finished_tasks_are_not_done_again(commands, source, expected, tmp_path: Path) -> None:
    output = tmp_path / "out"
    _kill_after(commands, _command(source, output), output, 3)
    finished = {file: file.stat().st_mtime_ns for file in _folder(output).glob(f"parts/[!.]*/{RESULT}")}
    with held(output, TASKS[-1:]):
        running = commands.start(_command(source, output))
        assert running.until(lambda: finished_tasks(output) == FILES - 1) is None, running.output
        assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert running.wait() == 0, running.output
    assert f"3 of {FILES} tasks are done already; continuing" in running.output
    assert tree(output) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_killed_while_it_assembles_and_derives(commands, source, tmp_path: Path) -> None:
    output = tmp_path / "out"
    reshard(source, tmp_path / "expected", workers=1, pca_channels=4, codec_size=(16, 16))
    dataset = _folder(output) / "dataset"
    moments = [
        lambda: any(dataset.glob("*.array_record-*")),
        (dataset / "manifest.json").exists,
        lambda: any(dataset.glob("codec/*")),
    ]
    outputs = kill_and_resume(commands, _command(source, output, "--codec_size=16,16"), moments, output.exists)
    assert f"{FILES} of {FILES} tasks are done already" in outputs[-1] or "publishing it" in outputs[-1]
    assert tree(output) == tree(tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(commands, source, expected, tmp_path: Path, seed: int) -> None:
    output = tmp_path / "out"
    command, moments = _command(source, output, "--workers=2", "--overwrite"), random_moments(seed, 6, longest=1.0)
    if seed == 2:  # it replaces an older dataset
        output.mkdir()
        (output / "manifest.json").write_text(json.dumps({"format": "uwm_jax/chunks"}))

    def is_published() -> bool:
        return (output / "index").exists()

    kill_and_resume(commands, command, moments, is_published, and_its_processes=seed != 1)
    assert tree(output) == expected
    commands.run(_command(source, output))  # clears what a job that was killed after publishing left
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_shares_make_the_same_dataset(commands, source, expected, tmp_path: Path) -> None:
    output = tmp_path / "out"
    status, printed = commands.run(_command(source, output, "--assemble"))
    assert status == 2 and f"{FILES} of {FILES} tasks are not done: toy-train" in printed
    shares = [commands.start(_command(source, output, f"--task={i}/3")) for i in range(2)]
    assert [share.wait() for share in shares] == [0, 0]
    status, printed = commands.run(_command(source, output, "--assemble"))
    assert status == 2 and f"2 of {FILES} tasks are not done: toy-train.tfrecord-00002-of-00007" in printed
    assert not output.exists() and finished_tasks(output) == FILES - 2
    last = _command(source, output, "--task=2/3")
    with held(output, TASKS[5:6]):
        running = commands.start(last)
        assert running.until(lambda: finished_tasks(output) == FILES - 1) is None, running.output
        running.kill()
    status, printed = commands.run(last)
    assert status == 0 and "1 of 2 tasks are done already" in printed and "all tasks are done" in printed
    status, printed = commands.run(_command(source, output, "--assemble"))
    assert status == 0, printed
    assert tree(output) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_job_of_other_flags_is_named_and_only_removed_on_request(commands, source, tmp_path: Path) -> None:
    output = tmp_path / "out"
    _kill_after(commands, _command(source, output), output, 2)
    before = tree(_folder(output))
    other = _command(source, output, "--chunk_steps=4")
    status, printed = commands.run(other)
    assert status == 2 and "--chunk_steps was 8, now 4. Continue it with those" in printed
    assert tree(_folder(output)) == before
    status, printed = commands.run([*other, "--overwrite"])
    assert status == 0 and re.search(rf"removed {_folder(output)} \(.* MB\), of a job begun with", printed)
    assert json.loads((output / "manifest.json").read_text())["chunk_steps"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_live_job_is_never_touched(commands, source, expected, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with held(output, TASKS[1:2]):
        running = commands.start(_command(source, output))
        assert running.until(lambda: finished_tasks(output) == FILES - 1) is None, running.output
        for flags in ((), ("--overwrite", "--chunk_steps=4"), ("--assemble",)):
            status, printed = commands.run(_command(source, output, *flags))
            assert status == 2 and "another job is at work there" in printed, printed
    assert running.wait() == 0, running.output
    assert tree(output) == expected


def test_a_changed_input_is_another_job(commands, source, tmp_path: Path) -> None:
    copy, output = shutil.copytree(source, tmp_path / "source"), tmp_path / "out"
    _kill_after(commands, _command(copy, output), output, 2)
    last = next(copy.glob("*val*"))
    data, seconds = last.read_bytes(), last.stat().st_mtime
    last.write_bytes(data[:-1] + b"\0")
    os.utime(last, (seconds + 60, seconds + 60))
    status, printed = commands.run(_command(copy, output))
    was, now = (str(datetime.datetime.fromtimestamp(int(seconds) + more, datetime.UTC)) for more in (0, 60))
    assert status == 2 and f"inputs: val: {last.name}: modified was {was}, now {now}." in printed
    last.write_bytes(data[:-1])
    os.utime(last, (seconds, seconds))
    status, printed = commands.run(_command(copy, output))
    assert status == 2 and re.search(rf"inputs: val: {last.name}: size was \d+, now \d+\.", printed)
    last.write_bytes(data)
    os.utime(last, (seconds, seconds))
    status, printed = commands.run(_command(copy, output))
    assert status == 0 and f"2 of {FILES} tasks are done already; continuing" in printed
