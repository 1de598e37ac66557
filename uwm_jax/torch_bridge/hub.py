"""Files of published weights: a path, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, is_remote, local_copy, place
from uwm_jax.hub import download
from uwm_jax.hub.names import HubName

DEFAULT_FILE = "model.safetensors"  # the name that hub repositories of classifiers use

# owner/name, @revision, /subfolder
_HUB_NAME = re.compile(r"([^/@~\s]+/[^/@\s]+)(?:@([^/@\s]+))?(?:/([^@]*[^/@]))?")


def fetch(path_or_hub_name: AnyPath, files: Sequence[str], what: str, optional: Sequence[str] = ()) -> list[Path]:
    """Local paths of `files`, and of those of `optional` that are there, in a folder or in a hub repository.

    Args:
        path_or_hub_name: an existing folder, or a string "owner/name[@revision][/subfolder]" on the hub, where a
            revision is a branch, a tag or a commit. A folder in a bucket is downloaded.
        files: file names to find.
        what: what they are, for messages.
    Raises:
        UserError: the folder lacks a file, the name is neither a folder nor a hub name, or the hub cannot serve it.
    """
    name = str(path_or_hub_name)
    folder = place(name, what)
    if folder.is_dir():
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise UserError(f"{folder}: expected {' and '.join(files)} of the {what}, but {missing[0]} is missing")
        local = local_copy(folder)
        return [local / file for file in (*files, *(file for file in optional if (folder / file).is_file()))]
    parsed = _HUB_NAME.fullmatch(name)
    if is_remote(folder) or isinstance(path_or_hub_name, os.PathLike) or name.startswith(".") or parsed is None:
        raise UserError(
            f"{name!r}: expected a folder with the {what} ({', '.join(files)}) or a hub name like 'owner/name' or "
            "'owner/name@revision', but there is no such folder"
        )
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    download.without_tokens_in_log()
    repo, revision, subfolder = parsed.groups()
    try:
        found = [Path(hf_hub_download(repo, file, subfolder=subfolder, revision=revision)) for file in files]
        for file in optional:  # the cache knows the revision that `files` were just fetched of, and what it lacks
            cached = try_to_load_from_cache(repo, f"{subfolder}/{file}" if subfolder else file, revision=revision)
            if cached is _CACHED_NO_EXIST:
                continue
            try:
                found.append(Path(cached or hf_hub_download(repo, file, subfolder=subfolder, revision=revision)))
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError):  # no network: it may be there
                    raise
        return found
    except Exception as error:  # offline, unknown, private, malformed name, full disk: the hub has a class for each
        raise UserError(
            f"{name!r} is not a local folder, and the {what} ({', '.join((*files, *optional))}) could not be fetched "
            f"from the Hugging Face hub: {download.reason(error, HubName(repo, revision))}\n"
            "Check the name, the revision and the network (and HF_TOKEN for a private repository), or download it "
            f"elsewhere and give the folder that holds {' and '.join(files)}."
        ) from None


def locate_weights(path_or_hub: AnyPath, names: str) -> Path:
    """The file of ImageNet weights that `config.model.encoder.imagenet_weights` names.

    Args:
        path_or_hub: a safetensors file, a folder with a model.safetensors, or a hub name "owner/name[@revision][/file]"
            (by default its model.safetensors).
        names: the tensors' names in words, for messages.
    Raises:
        UserError: there is no such file, or the hub cannot serve it.
    """
    name = str(path_or_hub)
    path = place(name, "config.model.encoder.imagenet_weights")
    if path.is_file():
        return local_copy(path)
    parts = name.split("/")
    is_file_name = parts[-1].endswith(".safetensors")
    is_path = path.is_absolute() or isinstance(path_or_hub, os.PathLike) or (is_file_name and len(parts) < 3)
    if is_path and not path.is_dir():
        raise UserError(
            f"{name!r}: there is no such file; expected safetensors with {names}, or a folder with {DEFAULT_FILE}"
        )
    folder, file = ("/".join(parts[:-1]), parts[-1]) if is_file_name else (name, DEFAULT_FILE)
    return fetch(folder, (file,), what="ImageNet weights")[0]
