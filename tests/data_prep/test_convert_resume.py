"""Conversions that are killed continue, redo no finished task, and end with the same bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.data_prep import hdf5_source, lerobot_source
from tests.data_prep.clips import write_clip
from tests.data_prep.killing import Commands, finished_tasks, kill_and_resume, tree

TOP, WRIST = "observation.images.top", "observation.images.wrist"
TASKS = 6


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    started = Commands("data_prep.hdf5", "data_prep.lerobot")
    yield started
    started.close()


def make_hdf5(root: Path) -> None:
    for i in range(TASKS):
        hdf5_source.robomimic(root / f"{i}.hdf5", [12] * 4)
        with h5py.File(root / f"{i}.hdf5", "r+") as file:
            for demo in file["data"].values():  # cameras of two sizes: no codec is fitted, and JAX not started
                demo["obs/wrist_image"] = np.zeros((12, 64, 64, 3), np.uint8)


def make_lerobot(root: Path) -> None:
    features = {k: f for k, f in lerobot_source.FEATURES.items() if k in (TOP, WRIST, "action")}
    lengths = [4] * (2 * TASKS)
    lerobot_source.make(root, "v3.0", lengths, files=[2] * TASKS, videos=(TOP, WRIST), info={"features": features})
    # The file of all episodes, in another size.
    place = {"chunk_index": 0, "file_index": 0, "video_key": WRIST}
    write_clip(
        root / lerobot_source.VIDEO[3].format(**place), range(sum(lengths)), fps=lerobot_source.FPS, size=(32, 32)
    )


@pytest.mark.parametrize("job, make", [("hdf5", make_hdf5), ("lerobot", make_lerobot)])
def test_killed_and_continued(commands: Commands, tmp_path: Path, job: str, make) -> None:
    make(tmp_path / "in")

    def command(output: Path) -> list[str]:
        return [f"data_prep.{job}", f"--input={tmp_path / 'in'}", f"--output={output}", "--workers=1"]

    status, printed = commands.run(command(tmp_path / "expected"))
    assert status == 0, printed
    output = tmp_path / "out"
    moments = [lambda count=count: finished_tasks(output) >= count for count in (1, 3)]
    outputs = kill_and_resume(commands, command(output), moments, output.exists)
    assert len(outputs) == 3
    done = re.search(rf"(\d+) of {TASKS} tasks are done already; continuing", outputs[-1])
    assert done and int(done[1]) >= 3
    assert tree(output) == tree(tmp_path / "expected")
