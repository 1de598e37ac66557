"""Text files are replaced whole, and a failed write leaves what was there."""

from __future__ import annotations

import errno
import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from uwm_jax import files
from uwm_jax.errors import UserError
from uwm_jax.files import data_dir, local_path, new_folder, write_bytes, write_text

_ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # else Python takes UTF-8 there too


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", lambda *args, **kwargs: Full())
    with pytest.raises(OSError, match="No space.*a.json"):
        write_text(path, "newer")
    monkeypatch.undo()
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    code = f"from uwm_jax.files import write_text; write_text({str(tmp_path / 'a.html')!r}, '\\u00d710\\u207b\\u2076')"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | _ASCII)
    assert (tmp_path / "a.html").read_bytes() == "×10⁻⁶".encode()


# --- paths -------------------------------------------------------------------------------------------------------


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_path("~/runs/a", "--output") == Path("/home/somebody/runs/a")
    assert local_path("runs/~", "--output") == Path("runs/~")


@pytest.mark.parametrize("scheme", ["gs", "s3", "file", "https", "hdfs"])
def test_a_scheme_is_refused_by_name(scheme):
    with pytest.raises(UserError, match=f"--workdir=.*{scheme}:// is not supported"):
        local_path(f"{scheme}://bucket/run", "--workdir")
    with pytest.raises(UserError, match=f"workdir=.*{scheme}:// is not supported"):
        local_path(Path(f"{scheme}://bucket/run"), "workdir")  # which has one slash


@pytest.mark.parametrize("bad", ["a" * 5000, "a/" * 2500, "a\0b", "~nobody_of_this_name/x"])
def test_an_unusable_path_is_one_short_message(bad):
    with pytest.raises(UserError, match="--output") as e:
        local_path(bad, "--output")
    assert len(str(e.value)) < 300


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="--output"):
        local_path(tmp_path / "a" / "c", "--output")


def test_the_data_directory_is_expanded_and_may_not_be_a_url(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("UWM_DATA_DIR", "~/sets")
    assert data_dir() == Path("/home/somebody/sets")
    monkeypatch.setenv("UWM_DATA_DIR", "s3://bucket")
    with pytest.raises(UserError, match="UWM_DATA_DIR=s3://bucket"):
        data_dir()


# --- what is not a regular file -----------------------------------------------------------------------------------


def test_a_fifo_is_written_to_and_stays(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE) as reader:
        write_text(fifo, "through")
        assert reader.communicate(timeout=10)[0] == b"through"
    assert stat.S_ISFIFO(fifo.stat().st_mode) and os.listdir(tmp_path) == ["fifo"]


def test_a_fifo_that_nobody_reads_does_not_block(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "READER_SECONDS", 0.2)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="has no reader"):
        write_text(tmp_path / "fifo", "lost")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_device_is_written_to_and_stays(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes device nodes")
    try:
        write_bytes(device, b"gone")
    except PermissionError:
        pytest.skip("this file system allows no devices")
    assert stat.S_ISCHR(device.stat().st_mode) and os.listdir(tmp_path) == ["null"]


def test_a_link_stays_and_what_it_points_at_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "far" / "a.json")
    (tmp_path / "dangling.json").symlink_to(tmp_path / "far" / "b.json")
    write_text(tmp_path / "link.json", "new")
    write_text(tmp_path / "dangling.json", "made")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "dangling.json").is_symlink()
    assert (tmp_path / "far" / "a.json").read_text() == "new"
    assert (tmp_path / "far" / "b.json").read_text() == "made"
    assert sorted(os.listdir(tmp_path / "far")) == ["a.json", "b.json"]


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        write_text(tmp_path, "text")
    assert not os.listdir(tmp_path)


def test_a_new_file_has_the_usual_permissions(tmp_path):
    write_text(tmp_path / "made" / "a.json", "text")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "made" / "a.json").stat().st_mode) == 0o666 & ~umask


def test_a_new_folder_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a") as staging:
        (staging / "x").touch()
        assert not (tmp_path / "a").exists()
        raise RuntimeError
    assert not os.listdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as staging:
        (staging / "x").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").exists()


def test_a_new_folder_does_not_replace_what_came_meanwhile(tmp_path):
    target = tmp_path / "run"
    with pytest.raises(OSError, match=str(target)) as e, new_folder(target) as staging:
        (staging / "ours").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert e.value.errno == errno.ENOTEMPTY
    assert os.listdir(tmp_path) == ["run"] and os.listdir(target) == ["theirs"]


def test_what_a_rename_leads_to_is_on_disk_before(tmp_path, monkeypatch):
    """A machine that crashes after the rename finds the new file, not an empty one."""
    order, sync, replace = [], files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: (order.append(path.name), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_text(tmp_path / "a.json", "x")
    assert order[0].endswith(".tmp.json") and order[1:] == ["rename", tmp_path.name]
    order.clear()
    with new_folder(tmp_path / "folder") as folder:
        (folder / "weights").write_bytes(b"x")
    assert order == ["weights", "rename"]
