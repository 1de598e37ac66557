from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

import data_prep.jobs.output
from data_prep.jobs.output import building, check_output, clear_leftovers, warn_of_space
from uwm_jax.errors import UserError


def _check(output: Path, **kwargs) -> None:
    check_output(output, lambda d: (d / "mark").exists(), "a marked directory", **{"overwrite": True} | kwargs)


def test_only_what_is_ours_is_replaced(tmp_path: Path) -> None:
    _check(tmp_path / "new", overwrite=False)
    _check(tmp_path / "new" / "deep")
    ours, foreign, empty, file = (tmp_path / n for n in ("ours", "foreign", "empty", "file"))
    for directory in (ours, foreign, empty):
        directory.mkdir()
    (ours / "mark").touch()
    (foreign / "thesis.tex").touch()
    file.touch()
    _check(ours)
    _check(empty)
    _check(empty, overwrite=False)
    for output in (foreign, file):
        with pytest.raises(UserError, match="is not a marked directory, so --overwrite does not replace it"):
            _check(output)
    for output in (ours, foreign, file):
        with pytest.raises(UserError, match="replace it with --overwrite"):
            _check(output, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_source_and_output_lie_apart(tmp_path: Path, overwrite: bool) -> None:
    source = tmp_path / "a" / "source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "a" / "mark").touch()
    for output in (source, source / "x", source / "x" / ".." / "y", tmp_path / "a", tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match="inside the other"):
            _check(output, source=source, overwrite=overwrite)
    _check(tmp_path / "a" / "source2", source=source, overwrite=overwrite)


def test_the_new_directory_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        with building(output) as new:
            (new / "text").write_text(text)
            assert new.parent == output.parent
        assert (output / "text").read_text() == text
        assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_what_a_link_points_at_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with building(tmp_path / "link") as new:
        (new / "text").touch()
    assert (tmp_path / "link").is_symlink() and [p.name for p in (tmp_path / "disk").iterdir()] == ["text"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_directory_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "text").write_text("old")
    with pytest.raises(error), building(output) as new:
        (new / "text").write_text("half")
        assert (output / "text").read_text() == "old"
        raise error("stop")
    assert (output / "text").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_of_the_swap_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "text").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".building":
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space"), building(output):
        pass
    assert (output / "text").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_place_where_no_directory_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file.x cannot be created: .*Choose another --output"),
        building(tmp_path / "file" / "x"),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


_BUILD = """
import sys, time
from pathlib import Path
from data_prep.jobs.output import building
with building(Path(sys.argv[1])) as new:
    (new / "data").write_bytes(bytes(3_000_000))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def killed(tmp_path: Path):
    """A process that builds `out`, and what it has made so far."""
    process = subprocess.Popen(
        [sys.executable, "-c", _BUILD, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"
    yield process, next(tmp_path.glob(".out.*.building"))
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_a_killed_job_left_is_removed_and_told(killed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process, left = killed
    clear_leftovers(tmp_path / "out")
    assert (left / "data").exists() and not capsys.readouterr().out  # it lives
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / ".other.12345678.building").mkdir()
    with building(tmp_path / "out") as new:
        (new / "text").touch()
        assert not left.exists()
    assert f"removed {left} (3.0 MB), left behind by a killed job" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.12345678.building", "out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["text"]


def test_what_may_be_anothers_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unlocked, elsewhere = tmp_path / ".out.00000001.building", tmp_path / ".out.00000002.building"
    unlocked.mkdir()
    elsewhere.mkdir()
    (elsewhere / data_prep.jobs.output._LOCK).write_text("another host")
    _check(tmp_path / "out")
    printed = capsys.readouterr().out
    for directory in (unlocked, elsewhere):
        assert directory.exists() and f"note: {directory} (0.0 MB) may be left behind by a killed job" in printed


def test_a_job_that_was_killed_while_it_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / ".out.00000001.replaced"
    old.mkdir()
    (old / "mark").touch()
    with pytest.raises(UserError, match="replace it with --overwrite"):
        _check(tmp_path / "out", overwrite=False)  # it is back
    assert (tmp_path / "out" / "mark").exists() and not old.exists()
    assert f"restored {tmp_path / 'out'} from {old}" in capsys.readouterr().out
    old.mkdir()
    (tmp_path / ".out.00000002.replaced").mkdir()
    (tmp_path / ".out.00000002.building").mkdir()
    _check(tmp_path / "out")
    assert not old.exists() and f"removed {old}" in capsys.readouterr().out
    assert (tmp_path / ".out.00000002.replaced").exists()  # its job may be at work


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    def fails(directory: Path, name: str | None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name and str(directory / name))

    for name, expected in ((None, tmp_path / "out"), ("index/train.npz", tmp_path / "out" / "index" / "train.npz")):
        with pytest.raises(OSError, match="No space left") as caught, building(tmp_path / "out") as new:
            fails(new, name)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(expected))
        assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(
        data_prep.jobs.output.shutil, "disk_usage", lambda path: asked.append(path) or usage(9e9, 8e9, 1_000_000_000)
    )
    warn_of_space(tmp_path / "a" / "b", 1_000_000_000, "the input x")
    assert not capsys.readouterr().out and asked == [tmp_path]
    warn_of_space(tmp_path / "a" / "b", 2_500_000_000, "the input x")
    assert "1.00 GB are free for" in (printed := capsys.readouterr().out) and "the input x has 2.50 GB" in printed


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(UserError, match="--output="):
        check_output(tmp_path / "out", lambda d: True, "anything", overwrite=True)
