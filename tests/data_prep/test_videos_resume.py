"""A job about videos that is killed continues with the next group of clips, and leaves no process behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from data_prep.sources.videos.corpus import GROUP
from tests.data_prep.clips import write_clip
from tests.data_prep.killing import Commands, finished_tasks, tree


def _ends(group: int, seconds: float = 60.0) -> bool:
    """Whether all processes of a group end in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_killed_job_continues(tmp_path: Path) -> None:
    write_clip(tmp_path / "in" / "0000.mp4", range(2), size=(16, 16))
    for number in range(1, 2 * GROUP + 5):
        os.link(tmp_path / "in" / "0000.mp4", tmp_path / "in" / f"{number:04d}.mp4")
    (tmp_path / "in" / "0003.mp4").unlink()
    (tmp_path / "in" / "0003.mp4").write_text("no video")
    flags = ["--resize=6,6", "--every=1", "--min_steps=1", "--workers=1"]  # too small for a codec to be fitted
    commands = Commands("data_prep.videos")
    try:
        command = ["data_prep.videos", f"--input={tmp_path}/in", *flags]
        status, printed = commands.run([*command, f"--output={tmp_path}/expected"])
        assert status == 0, printed
        output = tmp_path / "out"
        running = commands.start([*command, f"--output={output}"])
        assert running.until(lambda: finished_tasks(output) == 1) is None, running.output
        running.kill(and_its_processes=False)
        assert _ends(running.pid)
        status, printed = commands.run([*command, f"--output={output}"])
        assert status == 0 and "1 of 3 tasks are done already; continuing" in printed, printed
        assert tree(output) == tree(tmp_path / "expected")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "in", "out"]
    finally:
        commands.close()
