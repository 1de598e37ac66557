"""Official `.pt` checkpoints: tensors and normalisers in a pickle, of which nothing is run."""

from __future__ import annotations

import functools
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uwm_jax.errors import UserError
from uwm_jax.torch_bridge import npz_file, state_dict


def read(path: Path) -> tuple[dict[str, np.ndarray], npz_file.Normalizers]:
    """Tensors by the names that the file has, and its normalisers, of
    {"model": state dict, "action_normalizer": ..., "lowdim_normalizer": ..., ...}, or a bare state dict."""
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"--input: reading {path} needs torch, which is not installed: pip install 'torch>=2.4', or save the "
            "checkpoint's `model` as .safetensors and its normalisers as an .npz for --normalizer."
        ) from e
    # Only what an official checkpoint holds in addition to tensors; anything else in the file is refused, not run.
    torch.serialization.add_safe_globals(_safe_globals())
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError) as e:
        refused = re.search(r"GLOBAL (\S+)", str(e))
        reason = f"it holds {refused[1]}" if refused else f"torch cannot read it ({type(e).__name__})"
        raise UserError(f"--input: {path} is not a checkpoint of tensors and normalisers alone: {reason}.") from e
    found = state_dict.flatten(state_dict.containers(stored), torch.Tensor) if isinstance(stored, dict) else {}
    if not found:
        raise UserError(f"--input: {path} should hold a state dict, alone or under the key 'model'.")
    tensors = {}
    for name, tensor in found.items():
        try:
            tensors[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        except (TypeError, RuntimeError) as e:  # float8 and quantised types
            raise UserError(
                f"--input: {path}: {name} is {tensor.dtype}, which is not converted. Save it as float32."
            ) from e
    pairs: npz_file.Normalizers = {}
    if isinstance(stored, dict):
        where = f"--input: {path}"
        for key, leaf in _linear_normalizers(stored.get("action_normalizer"), "action"):
            pairs[key] = npz_file.pair(where, key, leaf.scale, leaf.offset)
        for key, leaf in _linear_normalizers(stored.get("lowdim_normalizer"), ""):
            pairs[key] = npz_file.pair(where, key, leaf.scale, leaf.offset)
    return tensors, dict(sorted(pairs.items()))


def _linear_normalizers(stored: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every (bare key, object with scale and offset) in a stored normaliser, however it is nested."""
    if hasattr(stored, "scale") and hasattr(stored, "offset"):
        yield key, stored
    elif isinstance(stored, Mapping) or hasattr(stored, "__dict__"):
        inside = {**(stored if isinstance(stored, Mapping) else {}), **getattr(stored, "__dict__", {})}
        for name, value in inside.items():
            bare = str(name).removeprefix("obs.").removeprefix("obs/")
            # Attributes that merely hold the dictionary have no say in the keys.
            yield from _linear_normalizers(value, key if isinstance(value, Mapping) else bare)


@functools.cache
def _safe_globals() -> list[Any]:
    """Types that `torch.load(weights_only=True)` may make besides tensors, each found by its name in the file."""

    def named(module: str, name: str, value: Any) -> Any:
        value.__module__, value.__name__, value.__qualname__ = module, name, name
        return value

    def linear() -> type:
        return type("LinearNormalizer", (), {})

    def nested() -> type:
        # A dictionary, or an object that holds one: an OrderedDict takes both items and attributes.
        return type("NestedDictLinearNormalizer", (), {"__new__": lambda cls, *args: OrderedDict()})

    def reconstruct() -> Callable[..., np.ndarray]:
        # What numpy pickles: an empty array, which then receives shape, dtype and bytes.
        return lambda subtype, shape, typecode: np.ndarray.__new__(np.ndarray, shape, typecode)

    def scalar() -> Callable[..., Any]:
        return lambda dtype, data: np.frombuffer(data, dtype)[0]

    normalizer = "datasets.utils.normalizer"
    allowed: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "?"))]
    allowed += [named(normalizer, "LinearNormalizer", linear())]
    allowed += [named(normalizer, "NestedDictLinearNormalizer", nested())]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
        allowed += [named(module, "_reconstruct", reconstruct()), named(module, "scalar", scalar())]
    return allowed
