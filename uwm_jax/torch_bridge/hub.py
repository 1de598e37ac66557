"""Finding the files of published weights: a local path, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from uwm_jax.errors import UserError
from uwm_jax.files import local_path

# owner/name, @revision, /subfolder
_HUB_NAME = re.compile(r"([^/@~\s]+/[^/@\s]+)(?:@([^/@\s]+))?(?:/([^@]*[^/@]))?")


def fetch(path_or_hub_name: str | os.PathLike[str], files: Sequence[str], what: str) -> list[Path]:
    """Local paths of `files` in a folder or in a hub repository.

    Args:
        path_or_hub_name: an existing folder, or a string "owner/name[@revision][/subfolder]" on the hub, where a
            revision is a branch, a tag or a commit.
        files: file names to find.
        what: what they are, for messages.
    Raises:
        UserError: the folder lacks a file, the name is neither a folder nor a hub name, or the hub cannot serve it.
    """
    name = os.fspath(path_or_hub_name)
    folder = local_path(name, what)
    if folder.is_dir():
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise UserError(f"{folder}: expected {' and '.join(files)} of the {what}, but {missing[0]} is missing")
        return [folder / file for file in files]
    parsed = _HUB_NAME.fullmatch(name)
    if isinstance(path_or_hub_name, os.PathLike) or name.startswith(".") or parsed is None:
        raise UserError(
            f"{name!r}: expected a folder with the {what} ({', '.join(files)}) or a hub name like 'owner/name' or "
            "'owner/name@revision', but there is no such folder"
        )
    from huggingface_hub import hf_hub_download

    repo, revision, subfolder = parsed.groups()
    try:
        return [Path(hf_hub_download(repo, file, subfolder=subfolder, revision=revision)) for file in files]
    except Exception as error:  # offline, unknown, private, malformed name, full disk: the hub has a class for each
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name!r} is not a local folder, and the {what} ({', '.join(files)}) could not be fetched from the "
            f"Hugging Face hub: {type(error).__name__}: {reason}\n"
            "Check the name, the revision and the network (and HF_TOKEN for a private repository), or download it "
            f"elsewhere and give the folder that holds {' and '.join(files)}."
        ) from error
