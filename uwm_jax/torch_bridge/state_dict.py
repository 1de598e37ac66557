"""The one set of weights that a file is asked for, under official names.

A file of weights may hold the trained ones and their average, each under a key of its own, and training wrappers
(DistributedDataParallel, torch.compile, Lightning) put prefixes before the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from uwm_jax.errors import UserError

MODEL, EMA = "model", "ema"
EMA_KEYS = ("ema", "ema_model", "model_ema")
_CONTAINERS = ("model", "state_dict", "module", "_orig_mod")  # before all names, in any nesting
_WRAPPERS = ("module", "_orig_mod")  # may stand inside a name too, where a part was wrapped
_BOOKKEEPING = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel

_Tensor = TypeVar("_Tensor")


def containers(stored: Mapping[str, object]) -> Mapping[str, object]:
    """The entries of a checkpoint that hold weights; all of it where it is a bare state dict."""
    known = {k: v for k, v in stored.items() if k in (*_CONTAINERS, *EMA_KEYS) and isinstance(v, Mapping)}
    return known or {k: v for k, v in stored.items() if not isinstance(v, Mapping)}


def flatten(stored: Mapping[str, object], kind: type[_Tensor], prefix: str = "") -> dict[str, _Tensor]:
    """`{"model.a.b": tensor}` of nested dictionaries; what is neither a dictionary nor a tensor is left out."""
    flat: dict[str, _Tensor] = {}
    for key, value in stored.items():
        if isinstance(value, kind):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            flat |= flatten(value, kind, f"{prefix}{key}.")
    return flat


def choose(tensors: Mapping[str, _Tensor], which: str, where: str) -> tuple[dict[str, _Tensor], list[str]]:
    """The tensors of one set of weights, without the prefixes of wrappers.

    Args:
      tensors: all tensors of a file; those of an average have one of `EMA_KEYS` before their name, which containers'
        prefixes may precede.
      which: `MODEL` or `EMA`.
      where: names the file in messages.

    Returns:
      The tensors, and one line for people about each thing that was done to the names or left out.

    Raises:
      UserError: there is no average, or two tensors have one name without the prefixes.
    """
    averaged = {name: key for name in tensors if (key := _average_key(name.split(".")))}
    if which == EMA and not averaged:
        heads = ", ".join(sorted({name.partition(".")[0] for name in tensors})[:8])
        raise UserError(
            f"{where}: --weights=ema: it holds no tensors under {', '.join(EMA_KEYS)}; its names begin with {heads}. "
            "Leave the flag out to take the weights that it has."
        )
    if averaged and len(averaged) == len(tensors):
        which = EMA  # nothing else is there
    notes = []
    if which == EMA:
        chosen = [(name.replace(f"{key}.", "", 1), tensors[name]) for name, key in averaged.items()]
        notes.append(f"took the averaged weights, which the file holds under {next(iter(averaged.values()))!r}")
    else:
        chosen = [(name, tensor) for name, tensor in tensors.items() if name not in averaged]
        if averaged:
            notes.append("the file also holds averaged weights; --weights=ema takes them")
    found: dict[str, _Tensor] = {}
    removed: dict[str, int] = {}
    for name, tensor in chosen:
        parts, gone = _unwrap(name.split("."))
        bare = ".".join(parts)
        if bare in found:
            raise UserError(f"{where}: two of its tensors are called {bare} once the wrappers' prefixes are taken off.")
        if bare not in _BOOKKEEPING:
            found[bare] = tensor
        for part in gone:
            removed[part] = removed.get(part, 0) + 1
    if removed:
        taken = ", ".join(f"{part + '.'!r} from {count}" for part, count in removed.items())
        notes.append(f"took prefixes of wrappers off the tensors' names: {taken}")
    return found, notes


def _average_key(parts: list[str]) -> str:
    """The one of `EMA_KEYS` that a name has, first or after containers' prefixes; "" for none."""
    bare = next((i for i, part in enumerate(parts) if part not in _CONTAINERS), 0)
    return parts[bare] if parts[bare] in EMA_KEYS and bare + 1 < len(parts) else ""


def _unwrap(parts: list[str]) -> tuple[list[str], Iterable[str]]:
    gone: dict[str, None] = {}
    while len(parts) > 1 and parts[0] in _CONTAINERS:
        gone[parts[0]] = None
        parts = parts[1:]
    gone |= dict.fromkeys(part for part in parts if part in _WRAPPERS)
    return [part for part in parts if part not in _WRAPPERS], gone
