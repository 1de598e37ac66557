"""Files that a repository may lack, with a hub that lacks them, and without a network."""

from __future__ import annotations

import pytest

from tests.hub.stub import Stub
from uwm_jax.errors import UserError
from uwm_jax.torch_bridge.hub import fetch


def test_a_file_that_a_repository_may_lack(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.add("owner/name", {"text/config.json": b"{}", "text/there.json": b"{}", "text/later.json": b"{}"})

    def found(*optional: str) -> list[str]:
        return [path.name for path in fetch("owner/name/text", ["config.json"], "encoder", optional)]

    assert found("there.json", "lacking.json") == ["config.json", "there.json"]
    stub.down = (
        True  # what the cache knows is enough; whether there is a file of which it knows nothing, is not guessed
    )
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None, raising=False)
    assert found("there.json", "lacking.json") == ["config.json", "there.json"]
    with pytest.raises(UserError, match=r"encoder \(config.json, later.json\) could not be fetched"):
        found("later.json")
