"""Files of a hub on loopback: whole after a broken connection, from the cache where there is no hub, and clear words
where there is none; no word of a token."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.stub import TOKEN, Stub
from uwm_jax.errors import UserError
from uwm_jax.hub import download
from uwm_jax.hub.names import HubName

FILES = {"model.json": b"{}", "model.safetensors": bytes(range(256)) * 200, "train.py": b"print('not ours')"}
NAME = HubName("someone/robot")
WANTED = ("model.*",)


def test_only_what_is_wanted_is_fetched_and_once(stub: Stub) -> None:
    commit = stub.add(NAME.repo, FILES)
    folder = download.snapshot(NAME, WANTED, "--workdir")
    assert folder.name == commit and folder.is_relative_to(constants.HF_HUB_CACHE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: data for name, data in FILES.items() if name.startswith("model.")
    }
    stub.requests.clear()
    assert download.snapshot(NAME, WANTED, "--workdir") == folder
    assert not [path for method, path in stub.requests if "/resolve/" in path]


def test_a_broken_connection_goes_on_where_it_broke(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # of what is written to disk at a time
    stub.add(NAME.repo, FILES)
    stub.breaks["model.safetensors"] = 20_000
    folder = download.snapshot(NAME, WANTED, "--workdir")
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    (resumed,) = stub.ranges
    assert 0 < int(resumed.removeprefix("model.safetensors bytes=").rstrip("-")) <= 20_000


def test_what_was_whole_before_an_end_is_not_fetched_again(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends in the middle of the second file; the next one fetches that one alone."""
    stub.add(NAME.repo, FILES)
    fetched = download.snapshot(NAME, ("model.json",), "--workdir")
    stub.requests.clear()
    assert download.snapshot(NAME, WANTED, "--workdir") == fetched
    got = [path.rpartition("/")[2] for method, path in stub.requests if method == "GET" and "/resolve/" in path]
    assert got == ["model.safetensors"]


def test_a_tag_and_a_commit(stub: Stub) -> None:
    old = stub.add(NAME.repo, FILES | {"model.json": b"old"}, ref="v1")
    stub.add(NAME.repo, FILES)
    for revision in ("v1", old):
        folder = download.snapshot(HubName(NAME.repo, revision), WANTED, "--workdir")
        assert folder.name == old and (folder / "model.json").read_bytes() == b"old"


def refused(name: HubName, flag: str = "--workdir") -> str:
    with pytest.raises(UserError) as found:
        download.snapshot(name, WANTED, flag)
    said = str(found.value)
    assert said.startswith(f"{flag}={name}: ") and TOKEN not in said and "http" not in said
    assert found.value.__cause__ is None and found.value.__suppress_context__
    return said


def test_what_is_not_there_is_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.add(NAME.repo, FILES)
    assert "has no branch, tag or commit 'v9'" in refused(HubName(NAME.repo, "v9"))
    said = refused(HubName(NAME.repo, "300"), "config.init_from")
    assert "A step is written someone/robot@REVISION@STEP, such as someone/robot@main@300." in said
    said = refused(HubName("runs/mistyped"))
    assert "there is no repository runs/mistyped, or it is private" in said and "set HF_TOKEN" in said
    assert "there is no local folder of that name" in said
    stub.private.add(NAME.repo)
    assert "set HF_TOKEN or run `hf auth login`" in refused(NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert download.snapshot(NAME, WANTED, "--workdir").is_dir()
    assert "not open to your token" in refused(HubName("runs/mistyped"))


@pytest.mark.parametrize("echo", [False, True])
def test_a_token_that_the_hub_refuses_is_not_shown(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], echo: bool
) -> None:
    stub.add(NAME.repo, FILES)
    stub.echo = echo
    monkeypatch.setenv("HF_TOKEN", wrong := TOKEN[::-1])
    said = refused(NAME)
    assert "does not accept your token (401" in said and wrong not in said
    out, err = capfd.readouterr()
    assert wrong not in out + err


def test_logs_and_texts_lose_tokens(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    text = f"a {TOKEN} b, Authorization: Bearer abc.def, https://me:pass@host/x?Signature=s3cret&a=b c"
    clean = "a *** b, Authorization: Bearer ***, https://host/x c"
    assert download.scrubbed(text) == clean
    download.without_tokens_in_log()
    download.without_tokens_in_log()
    said = io.StringIO()
    for handler in logging.getLogger("huggingface_hub").handlers:
        monkeypatch.setattr(handler, "stream", said)
    logger = logging.getLogger("huggingface_hub.file_download")
    try:
        raise ValueError(TOKEN)
    except ValueError:
        logger.warning("sent %s", text, exc_info=True)
    assert said.getvalue().strip() == f"sent {clean}"


def test_without_a_hub_the_cache_is_used_and_that_is_said(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = stub.add(NAME.repo, FILES)
    folder = download.snapshot(NAME, WANTED, "--workdir")
    capsys.readouterr()
    stub.down = True
    assert download.snapshot(NAME, WANTED, "--workdir") == folder
    assert f"the copy in the cache is used, commit {commit}" in capsys.readouterr().err
    stub.down = False
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert download.snapshot(NAME, WANTED, "--workdir") == folder
    assert "the hub cannot be reached" in capsys.readouterr().err
    assert download.snapshot(HubName(NAME.repo, commit), WANTED, "--workdir") == folder
    assert "the cache holds no whole copy" in refused(HubName("someone/else"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download.snapshot(NAME, WANTED, "--workdir") == folder
    assert "HF_HUB_OFFLINE is set, and the cache holds no whole copy" in refused(HubName("someone/else"))


def test_a_full_disk_is_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.add(NAME.repo, FILES)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(Path("x")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    assert "No space left on device; free some space and rerun" in refused(NAME)
