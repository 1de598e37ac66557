"""The command that records what it served, and replays it; its page, and flags that do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_serve import observation, process, run, workdir
from uwm_jax import cli
from uwm_jax.data.records import Dataset
from uwm_jax.serving.uwm_client import Client

__all__ = ["workdir"]  # the fixture of a small policy with random weights

LENGTHS = (12, 7)


@pytest.fixture(scope="module")
def recorded(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A recording by the command, whose second episode SIGTERM ends; and the actions that clients were told."""
    place, told = tmp_path_factory.mktemp("recorded") / "robot", []
    flags = ("--stepwise", "--execute=2", "--batch_size=1", f"--record={place}")
    with process(f"--workdir={workdir}", *flags) as started:
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


@pytest.mark.slow
@pytest.mark.parametrize("stepwise", [False, True])
def test_a_replay_writes_its_page_and_ends_with_status_1_where_it_looks_wrong(
    workdir: Path, recorded: tuple[Path, list[np.ndarray]], tmp_path: Path, capsys: Any, stepwise: bool
) -> None:
    """The policy is random: its noise decides its actions, which repeat no recording."""
    page = tmp_path / "replay.html"
    flags = [f"--workdir={workdir}", "--port=0", "--execute=2", "--batch_size=1", f"--replay={recorded[0]}:0"]
    status = run(*flags, f"--replay_page={page}", f"--stepwise={stepwise}")
    out, errors = capsys.readouterr()
    assert status == 1, errors
    assert re.search(r"replay of robot, split train, episode 0: \d+ decisions", out) and f"wrote {page}" in out
    assert "LOOKS WRONG: the answers are no nearer to the recording than the mean action" in out
    assert "Do not let a robot move before this is mended" in errors
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
