"""A folder becomes one commit of a repository on a hub of loopback, or nothing does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.stub import TOKEN, Stub
from uwm_jax.errors import UserError
from uwm_jax.hub import upload

REPO = "me/robot"
FILES = {"README.md": b"# robot", "model.safetensors": bytes(range(256)) * 40, "part/model.json": b"{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    return tmp_path / "folder"


def test_all_files_become_one_commit(stub: Stub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = upload.upload(folder, REPO, private=True, message="first")
    assert stub.newest(REPO) == FILES and REPO in stub.private
    assert address == f"{stub.endpoint}/{REPO}/commit/{stub.refs[REPO]['main']}"
    (folder / "README.md").write_bytes(b"# better")
    upload.upload(folder, REPO, private=True, message="second")
    assert stub.newest(REPO) == FILES | {"README.md": b"# better"}
    assert [path for method, path in stub.requests if "/commit/" in path] == [f"/api/models/{REPO}/commit/main"] * 2


@pytest.mark.parametrize("token", [None, TOKEN[::-1]])
def test_who_may_not_write_sends_no_file(
    stub: Stub, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], token: str | None
) -> None:
    stub.echo = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=f"--repo={REPO}: the hub (asks for a token|does not accept your token)") as e:
        upload.upload(folder, REPO, private=False, message="none")
    assert REPO not in stub.repos and not stub.blobs
    out, err = capfd.readouterr()
    assert (token or "none") not in f"{e.value}{out}{err}"


def test_a_hub_that_fails_on_the_way_leaves_no_commit(
    stub: Stub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    stub.refused = ("/commit/",)
    with pytest.raises(UserError, match="the hub answered 413: .* No file was committed; rerun the same command"):
        upload.upload(folder, REPO, private=False, message="none")
    assert stub.repos[REPO] == {}
    stub.refused = ()
    upload.upload(folder, REPO, private=False, message="again")
    assert stub.newest(REPO) == FILES


@pytest.mark.parametrize("text", [f"config.data.path=/home/{TOKEN}/data", "hf_" + "a1" * 20])
def test_a_file_with_a_token_is_not_sent(stub: Stub, folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (folder / "part" / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"model.json: holds a token of the hub, so that nothing is sent") as e:
        upload.upload(folder, REPO, private=False, message="none")
    assert text not in str(e.value) and stub.requests == []


@pytest.mark.parametrize("repo", ["robot", "a/b/c", "a/b@main", "../b", "a/--b", "https://huggingface.co/a/b"])
def test_names_of_repositories(repo: str) -> None:
    with pytest.raises(UserError, match="expected owner/name"):
        upload.check_repository(repo)
    upload.check_repository(REPO)
