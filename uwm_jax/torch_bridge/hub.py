"""Finding the files of published weights: a local path, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from uwm_jax.errors import UserError


def fetch(path_or_hub_name: str | os.PathLike[str], files: Sequence[str], what: str) -> list[Path]:
    """Local paths of `files` in a folder or in a hub repository.

    Args:
        path_or_hub_name: an existing folder, or a string "owner/name" or "owner/name/subfolder" on the hub.
        files: file names to find.
        what: what they are, for messages.
    Raises:
        UserError: the folder lacks a file, the name is neither a folder nor a hub name, or the hub cannot serve it.
    """
    name = os.fspath(path_or_hub_name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise UserError(f"{folder}: expected {' and '.join(files)} of the {what}, but {missing[0]} is missing")
        return [folder / file for file in files]
    parts = name.split("/")
    local = isinstance(path_or_hub_name, os.PathLike) or folder.is_absolute()
    if local or name.startswith((".", "~")) or len(parts) < 2 or not all(parts):
        raise UserError(
            f"{name!r}: expected a folder with the {what} ({', '.join(files)}) or a hub name like 'owner/name', "
            "but there is no such folder"
        )
    from huggingface_hub import hf_hub_download

    repo, subfolder = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        return [Path(hf_hub_download(repo, file, subfolder=subfolder)) for file in files]
    except Exception as error:  # offline, unknown, private, malformed name, full disk: the hub has a class for each
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name!r} is not a local folder, and the {what} ({', '.join(files)}) could not be fetched from the "
            f"Hugging Face hub: {type(error).__name__}: {reason}\n"
            "Check the name and the network (and HF_TOKEN for a private repository), or download it elsewhere and "
            "give the folder."
        ) from error
