"""Names of repositories, told apart from paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from uwm_jax.errors import UserError
from uwm_jax.hub.names import HubName, may_be_one, parse, parse_origin

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `runs/trained` in it."""
    (tmp_path / "runs" / "trained").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "repo", "revision"),
    [
        ("owner/name", "owner/name", None),
        ("owner/na.me_1-x@v1.0", "owner/na.me_1-x", "v1.0"),
        ("owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
        (f"owner/name@{COMMIT}", "owner/name", COMMIT),
        ("runs/mistyped@main", "runs/mistyped", "main"),  # a revision says that no path is meant
    ],
)
def test_names_of_repositories(value: str, repo: str, revision: str | None) -> None:
    assert parse(value) == HubName(repo, revision)
    assert str(parse(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        *("runs/trained", "runs/mistyped", "runs/trained/", "./owner/name", "../owner/name", "/owner/name", "~/name"),
        *("name", "a/b/c", "a//b", "owner/name@", "owner/name@a@b", "owner/na me", "a--b/c", "owner/..", "gs://a/b"),
    ],
)
def test_paths(value: str) -> None:
    assert parse(value) is None


def test_a_folder_of_that_name_wins(here: Path) -> None:
    assert parse("owner/name") and parse("owner/name@main")
    (here / "owner" / "name").mkdir(parents=True)
    assert parse("owner/name") is None
    assert parse("owner/name@main") == HubName("owner/name", "main")
    (here / "owner" / "name@main").mkdir()
    assert parse("owner/name@main") is None


@pytest.mark.parametrize(
    ("spec", "place", "step"),
    [
        ("owner/name", HubName("owner/name"), None),
        ("owner/name@v1", HubName("owner/name", "v1"), None),
        ("owner/name@v1@300", HubName("owner/name", "v1"), 300),
        ("owner/name@300", HubName("owner/name", "300"), None),  # a revision, since a step needs one
        (f"owner/name@{COMMIT}@7", HubName("owner/name", COMMIT), 7),
        ("runs/mistyped@main@7", HubName("runs/mistyped", "main"), 7),
        ("runs/trained", "runs/trained", None),
        ("runs/trained@300", "runs/trained", 300),
        ("runs/mistyped@300", "runs/mistyped", 300),
        ("/owner/name@300", "/owner/name", 300),
    ],
)
def test_origins(here: Path, spec: str, place: HubName | str, step: int | None) -> None:
    expected = place if isinstance(place, HubName) else here / place
    assert parse_origin(spec) == (expected, step)


@pytest.mark.parametrize("spec", ["runs/trained@first", "owner/name@main@first", "/somewhere@main"])
def test_steps_are_integers(spec: str) -> None:
    with pytest.raises(UserError, match=r"config.branch_from=.*owner/name@revision@STEP of the hub, found '"):
        parse_origin(spec, "branch_from")


def test_which_origins_can_be_one(here: Path) -> None:
    kept = HubName("owner/name", COMMIT)
    for same in (kept, HubName("owner/name"), HubName("owner/name", "main")):
        assert may_be_one(same, kept) and may_be_one(kept, same)
    for other in (HubName("owner/other", COMMIT), HubName("owner/name", COMMIT[::-1]), here / "owner/name"):
        assert not may_be_one(other, kept) and not may_be_one(kept, other)
    (here / "link").symlink_to(here / "runs")
    assert may_be_one(here / "link" / "trained", here / "runs" / "trained")
