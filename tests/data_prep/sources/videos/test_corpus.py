"""Finding the files of a corpus, and joining them to episodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.sources.videos import corpus as video_corpus
from data_prep.sources.videos.clips import Sampling
from data_prep.sources.videos.corpus import Episode, corpus, find_files, joined
from data_prep.sources.videos.labels import Labels
from uwm_jax.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_a_folder_is_searched_and_links_are_followed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "in/b.mp4", "in/a/c.WEBM", "in/a/d.mkv", "in/a/x.json", "in/.e.mp4", "elsewhere/f.avi", "in/README")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "linked_again").symlink_to(tmp_path / "elsewhere")
    root, names, ignored = find_files(tmp_path / "in")
    assert (root, names) == (tmp_path / "in", ["a/c.WEBM", "a/d.mkv", "b.mp4", "linked/f.avi"])
    assert ignored == {".json": 1, ".mp4": 1, "(no suffix)": 1, "(folder linked twice)": 2}
    assert "ignored: 2 (folder linked twice), 1 (no suffix), 1 .json, 1 .mp4." in capsys.readouterr().out


def test_patterns_lists_and_single_files(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.mp4", "in/b.mp4", "in/c/d.webm", "in/c/e.txt")
    assert find_files(tmp_path / "in" / "*.mp4")[:2] == (tmp_path / "in", ["a.mp4", "b.mp4"])
    assert find_files(tmp_path / "in" / "**" / "*.webm")[:2] == (tmp_path / "in", ["c/d.webm"])
    assert find_files(tmp_path / "in" / "b.mp4")[:2] == (tmp_path / "in", ["b.mp4"])
    (tmp_path / "in" / "list.txt").write_text("c/d.webm\n\nmissing.mp4\na.mp4\n./a.mp4\n/abs/z.mp4\n")
    root, names, ignored = find_files(tmp_path / "in" / "list.txt")
    assert (root, names) == (tmp_path / "in", ["/abs/z.mp4", "a.mp4", "c/d.webm", "missing.mp4"])
    assert ignored == {"(listed twice)": 1}


def test_no_files(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.json")
    for source, message in (
        (tmp_path / "in", "no video files .*It has other files: 1 .json"),
        (tmp_path / "in" / "*.mp4", "no video files"),
        (tmp_path / "none", "does not exist: expected a folder, a pattern"),
    ):
        with pytest.raises(UserError, match=message):
            find_files(source)
    for data in (b"\xff\xfe\x00", b"a.mp4\0b.mp4"):
        (tmp_path / "list.txt").write_bytes(data)
        with pytest.raises(UserError, match="not a text file"):
            find_files(tmp_path / "list.txt")


def test_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "lab/e1/side.mp4",
        "lab/e1/wrist.mp4",
        "lab/e2/wrist.mp4",
        "lab/readme.mp4x",
        "e3/side.mp4",
        "e3/wrist.mp4",
    ]
    cameras, episodes = joined(names, "{episode}/{camera}.mp4")
    assert cameras == ("side", "wrist")
    assert episodes == [
        Episode("e3", ("e3/side.mp4", "e3/wrist.mp4")),
        Episode("lab/e1", ("lab/e1/side.mp4", "lab/e1/wrist.mp4")),
        Episode("lab/e2", (), None, "camera missing", "no file of side"),
        Episode("lab/readme.mp4x", (), None, "not in the layout", "--layout={episode}/{camera}.mp4"),
    ]
    assert not capsys.readouterr().out
    cameras, episodes = joined(names, "{episode}/{camera}.mp4", ("wrist", "wrist"))
    assert "--cameras leaves out 2 files of side." in capsys.readouterr().out
    assert cameras == ("wrist",) and [e.files for e in episodes[:3]] == [(names[5],), (names[1],), (names[2],)]
    assert joined(["a+b/x.mp4"], "a+b/{camera}.mp4") == (("x",), [Episode("all", ("a+b/x.mp4",))])
    assert joined(["x_1_top.mp4"], "{episode}_{camera}.mp4")[1] == [Episode("x_1", ("x_1_top.mp4",))]
    many = [f"{i}.mp4" for i in range(17)]
    with pytest.raises(UserError, match="finds 17 cameras"):
        joined(many, "{camera}.mp4")


def test_groups_are_stable_and_what_they_hold_is_part_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_corpus, "GROUP", 2)
    touch(tmp_path, "c.mp4", "a.mp4", "b.mp4", "d.mp4", "e.mp4")
    sampling = Sampling((8, 8), every=2)
    made = corpus(tmp_path, sampling)
    assert [[e.name for e in part.group] for part in made.splits["train"]] == [
        ["a.mp4", "b.mp4"],
        ["c.mp4", "d.mp4"],
        ["e.mp4"],
    ]
    assert [part.promised for part in made.splits["train"]] == [2, 2, 1]
    assert len({part.name for part in made.splits["train"]}) == 3
    options = dict(made.options)
    files = options.pop("input: files")
    assert files.startswith("5 of sha256 ") and (options["every"], options["labels"]) == (2, None)
    touch(tmp_path, "f.mp4")
    more = corpus(tmp_path, sampling, labels=Labels({"a": "push"})).options
    assert more["input: files"].startswith("6 of sha256 ") and more["labels"].startswith("1 of sha256 ")
    assert more.keys() == made.options.keys()
    moved, other = (corpus(tmp_path, sampling, labels=Labels(x)).options for x in ({"b": "push"}, {"a": "lift"}))
    assert more["input: files"] == moved["input: files"]
    assert len({more["labels"], moved["labels"], other["labels"]}) == 3


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    try:
        (tmp_path / "a\udcff.mp4").touch()
    except (OSError, UnicodeError):
        pytest.skip("this file system has UTF-8 names only")
    (part,) = corpus(tmp_path, Sampling((8, 8), every=1)).splits["train"]
    (found,) = part.episodes()
    assert (found.name, found.reason) == ("a\\udcff.mp4", "empty file")
