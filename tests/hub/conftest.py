"""The hub on loopback, and huggingface_hub told to use it and a cache of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.stub import Stub, hub


@pytest.fixture(scope="session")
def loopback() -> Iterator[Stub]:
    with hub() as stub:
        yield stub


@pytest.fixture
def stub(loopback: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """An empty hub, an empty cache, nobody logged in, in an empty folder."""
    loopback.__init__(endpoint=loopback.endpoint)  # type: ignore[misc]
    home = tmp_path / "hf"
    monkeypatch.setattr(constants, "ENDPOINT", loopback.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", loopback.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as all other tests are
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return loopback


def environment(stub: Stub, home: Path, **more: str) -> dict[str, str]:
    """What a process needs to use this hub, with a cache in `home`."""
    return {
        "HF_ENDPOINT": stub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        **more,
    }
