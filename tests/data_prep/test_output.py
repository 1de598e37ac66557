from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.output import building, check_output
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
        pytest.raises(UserError, match=r"file.x cannot be made: .*Choose another --output"),
        building(tmp_path / "file" / "x"),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
