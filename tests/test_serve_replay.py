"""The command that records what it served, and replays it; its page, and flags that do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_serve import observation, run, workdir
from uwm_jax import cli
from uwm_jax.benchmarking.serving_load import ServeProcess
from uwm_jax.data.records import Dataset
from uwm_jax.serving.uwm_client import Client

__all__ = ["workdir"]  # the fixture of a small policy with random weights

LENGTHS = (12, 7)


@pytest.fixture(scope="module")
def recorded(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A recording by the command, whose second episode SIGTERM ends; and the actions that clients were told."""
    place, told = tmp_path_factory.mktemp("recorded") / "robot", []
    flags = [f"--workdir={workdir}", "--stepwise", "--execute=2", "--batch_size=1", f"--record={place}"]
    with ServeProcess(flags) as started:
        for episode, length in enumerate(LENGTHS):
            with Client(started.address, wait=20) as client:
                replies = [client.infer(observation(100 * episode + step)) for step in range(length)]
                told.append(np.stack([reply["actions"][0] for reply in replies]))
                if episode == len(LENGTHS) - 1:
                    status, printed = started.end()
    assert status == 0 and f"{place}: 2 episodes" in printed
    return place, told


@pytest.mark.slow
def test_a_server_records_the_episodes_of_its_clients(recorded: tuple[Path, list[np.ndarray]]) -> None:
    place, told = recorded
    dataset = Dataset(place, "train")
    assert dataset.episode_lengths.tolist() == list(LENGTHS)
    np.testing.assert_array_equal(np.asarray(dataset.column("action")[:]), np.concatenate(told))
    assert dataset.cameras.keys() == {"observation/image"} and dataset.episode_texts("served")[0].startswith(
        "dp, step "
    )


def replayed(workdir: Path, place: Path, page: Path, *more: str) -> int:
    flags = ["--port=0", "--execute=2", "--batch_size=1", f"--replay={place}:0", f"--replay_page={page}"]
    return run(f"--workdir={workdir}", *flags, *more)


@pytest.mark.slow
def test_a_replay_as_it_was_recorded_looks_right(
    workdir: Path, recorded: tuple[Path, list[np.ndarray]], tmp_path: Path, capsys: Any
) -> None:
    """The policy is random, so that noise decides its actions; a stepwise server draws the same again."""
    page = tmp_path / "replay.html"
    assert replayed(workdir, recorded[0], page, "--stepwise") == 0
    out = capsys.readouterr().out
    assert re.search(r"replay of robot, split train, episode 0: 6 decisions, 11 actions", out)
    assert "nothing looks wrong" in out and f"wrote {page}" in out and "Nothing looks wrong" in page.read_text()


@pytest.mark.slow
def test_a_replay_that_looks_wrong_ends_with_status_1(
    workdir: Path, recorded: tuple[Path, list[np.ndarray]], tmp_path: Path, capsys: Any
) -> None:
    """Requests have noise of their own, by which a random policy repeats no recording."""
    page = tmp_path / "replay.html"
    assert replayed(workdir, recorded[0], page) == 1
    out, errors = capsys.readouterr()
    assert "LOOKS WRONG: the answers are no nearer to the recording than the mean action" in out
    assert "Do not let a robot move before this is mended" in errors and f"wrote {page}" in out
    assert "LOOKS WRONG:</span> the answers are no nearer" in page.read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--record=DIR"], "--record requires --stepwise"),
        (["--show_frames"], "--show_frames: frames are shown behind a token alone"),
        (["--text_encoder=recorded"], "--text_encoder: this model reads no text"),
        (["--text_table=DIR"], "--text_table: this model reads no text"),
        (["--text_encoder=a", "--text_table=DIR"], "--text_encoder and --text_table: expected one of them"),
        (["--replay=pusht"], "--replay=pusht: expected DATASET:EPISODE"),
        (["--replay=/nowhere:0"], "/nowhere"),
    ],
)
def test_flags_that_do_not_fit(workdir: Path, tmp_path: Path, capsys: Any, flags: list[str], words: str) -> None:
    given = [flag.replace("DIR", str(tmp_path)) for flag in flags]
    assert run(f"--workdir={workdir}", "--port=0", *given) == cli.USAGE_STATUS
    assert words in capsys.readouterr().err
