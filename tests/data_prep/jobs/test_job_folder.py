"""The folder of a job by itself; `test_resume` kills jobs."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from data_prep.jobs.job_folder import MISSING, JobFolder, claimed, job_folder, settle
from data_prep.jobs.output import check_output
from data_prep.sources.inputs import Missing
from uwm_jax.errors import UserError

PLAN = {"--input": "/a", "--fps": 10, "inputs": {"train": {"x": {"size": 3}, "y": {"size": MISSING}}}}


def _finish(job: JobFolder, task: str = "train.00000") -> None:
    (job.parts / task).mkdir()
    (job.parts / task / "result.json").write_text("{}")


def _begin(output: Path, plan: dict = PLAN) -> Path:
    """A job that fails after its first task."""
    with pytest.raises(KeyError), job_folder(output, plan, alone=True, overwrite=False) as job:
        _finish(job)
        raise KeyError
    return job.path


def test_a_failure_before_the_first_task_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), job_folder(tmp_path / "out", PLAN, alone=True, overwrite=False):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_finished_tasks_are_kept_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _begin(tmp_path / "out")
    assert f"{folder}: the finished tasks are kept; the same command continues" in capsys.readouterr().err
    with job_folder(tmp_path / "out", dict(reversed(PLAN.items())), alone=True, overwrite=False) as job:
        assert (job.parts / "train.00000" / "result.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--fps": 12}, "--fps was 10, now 12"),
        ({"--flip": "rows"}, "--flip was not given, now rows"),
        ({"inputs": {"train": {"x": {"size": 4}}}}, "inputs: train: x: size was 3, now 4"),
    ],
)
def test_another_plan_is_named_by_its_fields(tmp_path: Path, change: dict, said: str) -> None:
    _begin(tmp_path / "out")
    with (
        pytest.raises(UserError, match=f"{said}.*--overwrite"),
        job_folder(tmp_path / "out", PLAN | change, alone=True, overwrite=False),
    ):
        pass
    with job_folder(tmp_path / "out", PLAN | change, alone=False, overwrite=True) as job:
        assert list(job.parts.iterdir()) == []


def test_a_file_that_was_missing_may_arrive(tmp_path: Path) -> None:
    _begin(tmp_path / "out")
    arrived = PLAN | {"inputs": {"train": {"x": {"size": 3}, "y": {"size": 8}}}}
    with job_folder(tmp_path / "out", arrived, alone=True, overwrite=False) as job:
        assert (job.parts / "train.00000").exists()
    assert list(Missing(name="y").episodes()) == []


def test_shares_work_together_and_a_whole_job_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (
        job_folder(output, PLAN, alone=False, overwrite=False) as one,
        job_folder(output, PLAN, alone=False, overwrite=False) as two,
    ):
        assert one == two
        _finish(one)
        with (
            pytest.raises(UserError, match="another job is at work there"),
            job_folder(output, PLAN, alone=True, overwrite=True),
        ):
            pass
        with (
            pytest.raises(UserError, match=r"may be in use by another process.*--fps was 10, now 12"),
            job_folder(output, PLAN | {"--fps": 12}, alone=False, overwrite=True),
        ):
            pass
        assert (one.parts / "train.00000").exists()


def test_a_folder_of_another_host_is_continued_but_not_removed(tmp_path: Path) -> None:
    folder = _begin(tmp_path / "out")
    (folder / "lock").write_text("elsewhere\n")
    with job_folder(tmp_path / "out", PLAN, alone=True, overwrite=False):
        pass
    with (
        pytest.raises(UserError, match=r"another host, .*remove it by hand"),
        job_folder(tmp_path / "out", PLAN | {"--fps": 12}, alone=True, overwrite=True),
    ):
        pass
    assert (folder / "parts" / "train.00000").exists()


def test_without_locks_tasks_are_done_and_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fails)
    folder = _begin(tmp_path / "out")
    with (
        job_folder(tmp_path / "out", PLAN, alone=True, overwrite=False) as job,
        claimed(job.parts / "train.00001", wait=False) as mine,
    ):
        assert mine
    with (
        pytest.raises(UserError, match="remove it by hand"),
        job_folder(tmp_path / "out", PLAN | {"--fps": 12}, alone=True, overwrite=True),
    ):
        pass
    assert folder.exists()


def _hold(part: Path, taken, leave) -> None:
    with claimed(part, wait=False):
        (part.parent / f".{part.name}.0123.tmp").mkdir()
        taken.set()
        leave.wait()


def test_a_task_belongs_to_one_process_and_its_remains_go(tmp_path: Path) -> None:
    part = tmp_path / "train.00001"
    context = multiprocessing.get_context("fork")
    taken, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(part, taken, leave))
    process.start()
    assert taken.wait(10)
    with claimed(part, wait=False) as mine:
        assert not mine and (tmp_path / ".train.00001.0123.tmp").exists()
    process.kill()
    process.join()
    (tmp_path / ".train.00002.0123.tmp").mkdir()  # of another task
    with claimed(part, wait=True) as mine:
        assert mine
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".train.00002.0123.tmp"]


@pytest.mark.parametrize("state", ["before", "between", "after"])
def test_a_job_that_was_killed_while_it_published(tmp_path: Path, state: str) -> None:
    """Before, between and after the two renames that put the new dataset in the place of the old one."""
    output = tmp_path / "out"
    folder = _begin(output)
    for path, text in ((folder / "dataset", "new"), (output, "old")):
        path.mkdir()
        (path / "manifest.json").write_text(text)
    (folder / "assembled").touch()
    if state != "before":
        output.rename(folder / "replaced")
    if state == "after":
        (folder / "dataset").rename(output)
    check_output(output, lambda path: True, "ours", overwrite=True)
    assert (output / "manifest.json").read_text() == ("new" if state == "after" else "old")
    assert folder.exists() == (state != "after")
    if state != "after":
        with job_folder(output, PLAN, alone=True, overwrite=True) as job:
            assert job.is_assembled
            job.publish()
    assert (output / "manifest.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_names_are_not_patterns(tmp_path: Path) -> None:
    for name in (".other.building.0123.removed", ".[o]*.building.0123.removed"):
        (tmp_path / name).mkdir()
    settle(tmp_path / "[o]*", tmp_path / "[o]*")
    assert [p.name for p in tmp_path.iterdir()] == [".other.building.0123.removed"]


def test_a_live_folder_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with job_folder(output, PLAN, alone=True, overwrite=False) as job:
        (job.path / "replaced").mkdir()
        settle(output, output)
        assert (job.path / "replaced").exists() and not output.exists()


def test_a_new_task_is_claimed_without_a_look_at_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a million tasks a listing of all for each of them would take longer than the work."""
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda *path: listed.append(path) or scandir(*path))
    with claimed(tmp_path / "train.00001", wait=False):
        assert not listed
    with claimed(tmp_path / "train.00001", wait=False):
        assert listed  # somebody was at it before, and may have been killed
