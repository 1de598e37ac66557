"""Files of weights under official names: safetensors, and the official code's `.pt` checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

from uwm_jax.errors import UserError
from uwm_jax.files import replacing
from uwm_jax.torch_bridge import official_pt, state_dict
from uwm_jax.torch_bridge.npz_file import Normalizers
from uwm_jax.torch_bridge.tensor_file import read_safetensors, refuse_other_kinds


def read_weights(
    path: str | Path, which: str = state_dict.MODEL
) -> tuple[dict[str, np.ndarray], Normalizers, list[str]]:
    """Tensors by official name, the normalisers that a `.pt` checkpoint stores next to them, and notes for people.

    Args:
      which: `model`, or `ema` for the averaged weights that a file may hold as well.

    Raises UserError for a file that is absent, unreadable, incomplete or of another kind.
    """
    path = Path(path)
    where = f"--input: {path}"
    if not path.is_file():
        raise UserError(f"--input: there is no file {str(path)!r}.")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise UserError(f"--input: expected a .safetensors or .pt file, found {str(path)!r}.")
    refuse_other_kinds(path, where)
    tensors, normalizers = (
        official_pt.read(path) if path.suffix != ".safetensors" else (read_safetensors(path, where), {})
    )
    chosen, notes = state_dict.choose(tensors, which, where)
    return chosen, normalizers, notes


def write_weights(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, all of it or nothing."""
    with replacing(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, temporary)
            temporary.chmod(mode)  # of any file that a command writes: safetensors makes one that its owner alone reads
        except safetensors.SafetensorError as e:
            failed = re.search(r"os error (\d+)", str(e))  # a full disk comes as text
            if failed is None:
                raise
            raise OSError(int(failed.group(1)), os.strerror(int(failed.group(1)))) from e
