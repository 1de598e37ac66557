"""A folder becomes a commit of a hub repository: all of it or nothing."""

from __future__ import annotations

import re
from pathlib import Path

from uwm_jax.errors import UserError
from uwm_jax.hub import download
from uwm_jax.hub.names import HubName, is_repository

_TEXTS = (".md", ".json", ".py", ".yaml", ".txt")


def check_repository(repo: str, flag: str = "--repo") -> None:
    """Raises UserError for what is no `owner/name`."""
    if not is_repository(repo):
        raise UserError(f"{flag}={repo}: expected owner/name, a repository of the Hugging Face hub.")


def require_token(repo: str) -> None:
    """Raises UserError where nobody is logged in."""
    if not download.has_token():
        raise UserError(
            f"--repo={repo}: the hub asks for a token that may write there. Set HF_TOKEN, or run `hf auth login`; "
            "--dry_run prepares everything and sends nothing."
        )


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Makes the repository where there is none, and commits the files of a folder to its default branch at once.

    Args:
      private: whether a new repository is private.
      message: of the commit.

    Returns:
      the commit's address on the hub.
    Raises:
      UserError: nobody is logged in, a file holds the token, or the hub does not take it; nothing is committed then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    require_token(repo)
    refuse_tokens(folder)
    download.without_tokens_in_log()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [CommitOperationAdd(str(path.relative_to(folder)), path) for path in paths]
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.create_commit(repo, files, commit_message=message)
    except Exception as error:  # as in `download.snapshot`
        raise UserError(
            f"--repo={repo}: {download.reason(error, HubName(repo))}. No file was committed; rerun the same command."
        ) from None
    return download.scrubbed(made.commit_url)


def refuse_tokens(folder: Path) -> None:
    """Raises UserError for a text that holds the user's token, or what looks like one of the hub."""
    for path in sorted(folder.rglob("*")):
        if path.suffix not in _TEXTS or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if (secret := download.token()) and secret in text or re.search(r"\bhf_[A-Za-z0-9]{30,}\b", text):
            raise UserError(
                f"{path.name}: holds a token of the hub, so that nothing is sent. It may stand in a path or a field of "
                "the run's config."
            )
