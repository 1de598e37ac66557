"""Names of folders and hub repositories; the hub itself is a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from uwm_jax.errors import UserError
from uwm_jax.torch_bridge import hub
from uwm_jax.torch_bridge.hub import fetch


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Requests to the hub: (repository, file, subfolder, revision)."""
    calls: list[tuple[Any, ...]] = []

    def download(repo: str, file: str, *, subfolder: str | None = None, revision: str | None = None) -> str:
        calls.append((repo, file, subfolder, revision))
        return f"/cache/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name/vae", ("owner/name", "vae", None)),
        ("owner/name/a/b", ("owner/name", "a/b", None)),
        ("owner/name@main", ("owner/name", None, "main")),
        ("owner/na.me-1@0123abc/vae", ("owner/na.me-1", "vae", "0123abc")),
    ],
)
def test_hub_names(asked: list[tuple[Any, ...]], name: str, expected: tuple[str | None, ...]) -> None:
    repo, subfolder, revision = expected
    assert fetch(name, ("f",), "VAE") == [Path("/cache/f")]
    assert asked == [(repo, "f", subfolder, revision)]


@pytest.mark.parametrize("name", ["name", "./a/b", "../a", "/a/b", "~/a/b", "a//b", "a/b@", "a/b@x@y", "a@x/b", "a/b/"])
def test_names_that_are_none(asked: list[tuple[Any, ...]], name: str) -> None:
    with pytest.raises(UserError, match="expected a folder with the VAE"):
        fetch(name, ("f",), "VAE")
    assert not asked


def test_the_folder_that_the_message_sends_to_is_taken(
    tmp_path: Path, asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise OSError("offline")

    (tmp_path / "resnet").mkdir()
    file = tmp_path / "resnet" / hub.DEFAULT_FILE
    file.write_bytes(b"")
    for name in (str(tmp_path / "resnet"), tmp_path / "resnet", str(file), file):
        assert hub.locate_weights(name, "tensors") == file
    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(UserError, match=f"give the folder that holds {hub.DEFAULT_FILE}"):
        hub.locate_weights("owner/name@main", "tensors")


def test_a_file_of_a_repository_at_a_revision(asked: list[tuple[Any, ...]]) -> None:
    assert hub.locate_weights("owner/name@v2/weights/resnet.safetensors", "tensors") == Path(
        "/cache/resnet.safetensors"
    )
    assert hub.locate_weights("owner/name@v2", "tensors") == Path("/cache/model.safetensors")
    assert asked == [
        ("owner/name", "resnet.safetensors", "weights", "v2"),
        ("owner/name", "model.safetensors", None, "v2"),
    ]
