"""Names of hub repositories, told apart from paths.

`owner/name` and `owner/name@revision` name a repository of the Hugging Face hub, at a branch, a tag or a commit
(its default branch without one), where a run is read; in `config.init_from` and `config.branch_from`,
`owner/name@revision@STEP` names one of its checkpoints. The disk comes first: an existing path is never looked up on
the hub, and neither is a missing one without a revision in a folder that exists, such as `runs/mistyped` where there
is a folder `runs`.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from uwm_jax.errors import UserError
from uwm_jax.files import Place, place

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"(?P<owner>{_PART})/(?P<repo>{_PART})(?:@(?P<revision>[^@\s]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubName(NamedTuple):
    """A repository, `owner/name`, and a branch, tag or commit of it; None for its default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def is_fixed(self) -> bool:
        """Whether the revision is a commit, which names the same files for ever."""
        return _COMMIT.fullmatch(self.revision or "") is not None


def is_repository(text: str) -> bool:
    """Whether a text is `owner/name`, as the hub has them."""
    return re.fullmatch(f"{_PART}/{_PART}", text) is not None and "--" not in text and ".." not in text


def parse(value: str) -> HubName | None:
    """The repository that the value of a flag names; None where it is a path."""
    found = _NAME.fullmatch(value)
    if not found or os.path.lexists(value):
        return None
    repo = f"{found['owner']}/{found['repo']}"
    if not is_repository(repo) or ".." in value or (found["revision"] is None and os.path.isdir(found["owner"])):
        return None
    return HubName(repo, found["revision"])


def parse_origin(spec: str, field: str = "init_from") -> tuple[Place | HubName, int | None]:
    """The value of an origin's field as (absolute directory or repository, step).

    Args:
      spec: DIR, DIR@STEP, owner/name, owner/name@revision or owner/name@revision@STEP.
      field: `init_from` or `branch_from`, for messages.

    Raises:
      UserError: the step is no number, or the place is neither a path nor a name of the hub.
    """
    folder, at, step = spec.rpartition("@")
    if not (at and _is_local(folder, step)):
        revised = "@" in folder  # then a step follows
        name = parse(folder if revised else spec)
        if name and (step.isdecimal() or not revised):
            return name, int(step) if revised else None
    if not at or place(spec, f"config.{field}").is_dir():
        return place(spec, f"config.{field}").absolute(), None
    if not step.isdecimal():
        raise UserError(
            f"config.{field}={spec!r}: expected DIR or DIR@STEP with an integer, or owner/name@revision@STEP of the "
            f"hub, found {step!r}."
        )
    return place(folder, f"config.{field}").absolute(), int(step)


def _is_local(folder: str, step: str) -> bool:
    """Whether `folder` of `folder@step` is a directory, or a missing one in a directory."""
    return os.path.isdir(folder) or (step.isdecimal() and os.path.isdir(folder.partition("/")[0]) and "@" not in folder)


def may_be_one(here: Place | HubName, there: Place | HubName) -> bool:
    """Whether two places of origins can be one. A branch or tag can be the commit that a run keeps of it."""
    if isinstance(here, HubName) and isinstance(there, HubName):
        differ = here.is_fixed and there.is_fixed and here.revision != there.revision
        return here.repo == there.repo and not differ
    if isinstance(here, HubName) or isinstance(there, HubName):
        return False
    return here.resolve() == there.resolve()
