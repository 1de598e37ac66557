"""Files of hub repositories in huggingface_hub's cache, and its errors in words for users, without any token."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from uwm_jax.errors import UserError, warn
from uwm_jax.hub.names import HubName
from uwm_jax.reading import no_room

SECONDS = 10.0  # for the hub to say what a revision is; a cached copy is used after that

_CREDENTIALS = re.compile(r"(?<=//)[^/@\s]+@")  # of a URL
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")  # signed links carry a signature there
_BEARER = re.compile(r"(?i)(bearer\s+)[^\s,;]+")


def snapshot(name: HubName, patterns: Sequence[str], flag: str) -> Path:
    """The folder of a repository's files at a commit, `.../snapshots/<commit>`, downloaded as far as it is not cached.

    What was fetched whole stays when a download is broken off; the same call again fetches the rest.

    Args:
      patterns: of the files that are wanted, as `fnmatch` takes them.
      flag: the flag or config field that names the repository, for messages.

    Raises:
      UserError: there is no such repository or revision, it is not open to this user, or it is neither reachable nor
        in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    without_tokens_in_log()
    unreachable: Exception | None = None
    if not name.is_fixed:
        try:
            HfApi().repo_info(name.repo, revision=name.revision, timeout=SECONDS)
        except Exception as error:
            if isinstance(error, HfHubHTTPError) and _status(error) in range(400, 500):
                raise UserError(f"{flag}={name}: {reason(error, name)}{_hint(name, flag)}") from None
            unreachable = error
    try:
        folder = snapshot_download(
            name.repo, revision=name.revision, allow_patterns=list(patterns), local_files_only=unreachable is not None
        )
    except Exception as error:  # huggingface_hub has a class for each cause, and the client below it others
        why = reason(unreachable or error, name)
        there = ", and the cache holds no whole copy of it" if unreachable else ""
        raise UserError(f"{flag}={name}: {why}{there}{_hint(name, flag)}") from None
    if unreachable:
        warn(f"{flag}={name}: {reason(unreachable, name)}; the copy in the cache is used, commit {Path(folder).name}.")
    return Path(folder)


def _hint(name: HubName, flag: str) -> str:
    step = (
        f" A step is written {name.repo}@REVISION@STEP, such as {name.repo}@main@{name.revision}."
        if flag.startswith("config.") and (name.revision or "").isdecimal()
        else ""
    )
    return (
        f". {str(name)!r} was looked up on the Hugging Face hub, for there is no local folder of that name. Expected a "
        f"folder, or owner/name or owner/name@revision on the hub.{step}"
    )


def reason(error: BaseException, name: HubName) -> str:
    """What kept a repository from being read or written, in one sentence without full stop."""
    from huggingface_hub import errors

    if full := no_room(error):
        return f"the cache cannot be written: {full}; free some space and rerun the same command (HF_HOME moves it)"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository {name.repo} is gated: ask for access on its page, then set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository {name.repo} has no branch, tag or commit {name.revision!r}"
    status = _status(error)
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {name.repo}, or it is private and not open to "
            f"{'your token' if has_token() else 'anybody without a token; set HF_TOKEN or run `hf auth login`'}"
        )
    if status in (401, 403):
        refused = "does not accept your token" if has_token() else "asks for a token: set HF_TOKEN"
        return f"the hub {refused} ({status} for {name.repo})"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    text = scrubbed(str(error).strip().splitlines()[0] if str(error).strip() else "")
    if status:
        return f"the hub answered {status}: {text}"
    return f"the hub cannot be reached ({type(error).__name__}{': ' if text else ''}{text})"


def _status(error: BaseException) -> int:
    """The HTTP status behind an error; 0 for none."""
    return getattr(getattr(error, "response", None), "status_code", 0) or 0


def token() -> str:
    """The user's token, of HF_TOKEN or of the hub's own login; "" for none."""
    from huggingface_hub import get_token

    return get_token() or ""


def has_token() -> bool:
    return bool(token())


def scrubbed(text: str) -> str:
    """A text without the token, credentials and signatures of URLs."""
    secret = token()
    text = text.replace(secret, "***") if secret else text
    return _BEARER.sub(r"\1***", _QUERY.sub(r"\1", _CREDENTIALS.sub("", text)))


class _WithoutTokens(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = scrubbed(record.getMessage()), ()
        record.exc_info = record.exc_text = None  # a traceback shows what a server sent
        return True


def without_tokens_in_log() -> None:
    """What huggingface_hub logs, such as a server's warnings, loses tokens too."""
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.get_logger()
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(there, _WithoutTokens) for there in handler.filters):
            handler.addFilter(_WithoutTokens())
