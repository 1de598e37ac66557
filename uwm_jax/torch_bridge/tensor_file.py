"""A file of tensors as it came from somewhere: recognised for what it is, and read whole or refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import ml_dtypes  # noqa: F401 - gives numpy the type bfloat16
import numpy as np

from uwm_jax.errors import UserError
from uwm_jax.reading import again, is_fleeting

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def refuse_other_kinds(path: Path, where: str) -> None:
    """Raises UserError where a download left something else than the file that its name promises.

    `where` names the file in messages.
    """
    with path.open("rb") as file:
        head = file.read(512)
    start = head.lstrip()[:64].lower()
    if not head:
        found = "it is empty"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        found = "it is a web page (a login or error page that was saved in its place)"
    elif start.startswith(b"version https://git-lfs"):
        found = "it is a git-LFS pointer, not the file itself (`git lfs pull` fetches it)"
    elif head.startswith(b"\x1f\x8b"):
        found = "it is compressed with gzip; unpack it first"
    elif head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        found = "its end is missing, so the download is incomplete"
    elif start.startswith((b'{"', b"{\n")):
        found = "it holds JSON text, such as a server's error message"
    else:
        return
    raise UserError(f"{where} is not what its name says: {found}. Download it again.")


def read_safetensors(path: Path, where: str) -> dict[str, np.ndarray]:
    """All tensors of a file by name; bfloat16 as ml_dtypes has it.

    Raises:
      UserError: as `refuse_other_kinds`; the file is incomplete, or no safetensors; a tensor is of a quantised type.
      RunError: it cannot be read, nor some seconds later.
    """
    return again(lambda: _read_safetensors(path, where), path)


def _read_safetensors(path: Path, where: str) -> dict[str, np.ndarray]:
    import safetensors.numpy  # here, so that programs which read none do without

    refuse_other_kinds(path, where)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size:
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        other = {name: e["dtype"] for name, e in entries.items() if e["dtype"] not in _DTYPES}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as e:
        raise UserError(f"{where} is not a readable safetensors file ({e}).") from e
    if end > size:
        raise UserError(f"{where}: it has {size} of {end} bytes, so the download is incomplete. Download it again.")
    if other:
        name, dtype = next(iter(other.items()))
        raise UserError(
            f"{where}: {len(other)} tensors are of type {dtype}, first {name}. Quantised weights are not converted: "
            "save them as F32, F16 or BF16."
        )
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as e:
        if is_fleeting(e, path):
            raise
        raise UserError(f"{where} is not a readable safetensors file ({e}).") from e
