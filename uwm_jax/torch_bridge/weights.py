"""Files of weights under official names: safetensors, and the official code's `.pt` checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import safetensors
from safetensors.numpy import save_file

from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, as_place, local_copy, replacing
from uwm_jax.torch_bridge import adamw_state, official_codecs, official_pt, state_dict
from uwm_jax.torch_bridge.adamw_state import AdamWState
from uwm_jax.torch_bridge.npz_file import Normalizers
from uwm_jax.torch_bridge.tensor_file import read_safetensors, refuse_other_kinds


@dataclass(frozen=True)
class Weights:
    """One set of weights of a file.

    Attributes:
      tensors: by official name.
      normalizers: that a `.pt` checkpoint stores next to them.
      optimizer: of the run that trained them, where it was asked for.
      notes: for people, about what was done to the names or left out.
    """

    tensors: dict[str, np.ndarray]
    normalizers: Normalizers
    optimizer: AdamWState | None
    notes: list[str]


def read_weights(path: AnyPath, which: str = state_dict.MODEL, *, optimizer: bool = False) -> Weights:
    """Reads a file of weights.

    Args:
      which: `model`, or `ema` for the averaged weights that a file may hold as well.
      optimizer: whether the state of the optimizer is taken as well, which only a `.pt` of the official code has.

    Raises UserError for a file that is absent, unreadable, incomplete or of another kind.
    """
    path = as_place(path)
    where = f"--input: {path}"
    if path.is_dir():
        raise UserError(f"--input: {str(path)!r} is a folder; name the file in it, such as model.safetensors.")
    if not path.is_file():
        raise UserError(f"--input: there is no file {str(path)!r}.")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise UserError(f"--input: expected a .safetensors or .pt file, found {str(path)!r}.")
    if optimizer and path.suffix == ".safetensors":
        raise UserError(f"{adamw_state.FLAG}: {path} holds tensors alone. Give the .pt that the official run saved.")
    if optimizer and which != state_dict.MODEL:
        raise UserError(f"{adamw_state.FLAG}: its moments belong to the trained weights: leave out --weights={which}.")
    path = local_copy(path)
    refuse_other_kinds(path, where)
    if path.suffix == ".safetensors":
        tensors, notes = state_dict.choose(read_safetensors(path, where), which, where)
        return Weights(tensors, {}, None, notes)
    stored = official_pt.read(path, optimizer=optimizer)
    tensors, notes = state_dict.choose(stored.tensors, which, where)
    if not optimizer:
        return Weights(tensors, stored.normalizers, None, notes)
    names = [name for name in tensors if name not in official_codecs.BUFFERS]
    state = adamw_state.read(stored.optimizer, stored.step, names, str(path))
    return Weights(tensors, stored.normalizers, state, notes)


def write_weights(path: AnyPath, tensors: Mapping[str, np.ndarray]) -> None:
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
