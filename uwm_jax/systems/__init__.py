"""Systems by the name that `config.system` has: world models and policies that one trainer serves.

`base.py` says what a system is. Each lies in a folder of its own, whose `__init__` holds its `SystemType` as `SYSTEM`.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from uwm_jax.codecs import Codec
from uwm_jax.data.spec import DataSpec
from uwm_jax.errors import UserError, suggest
from uwm_jax.systems import dp, gr1, pad, uwm
from uwm_jax.systems.base import System, SystemType, TreeInfo

_TYPES: dict[str, SystemType] = {kind.SYSTEM.name: kind.SYSTEM for kind in (uwm, dp, pad, gr1)}


def register(kind: SystemType) -> None:
    """Adds a system, or replaces the one of its name."""
    _TYPES[kind.name] = kind


def names() -> tuple[str, ...]:
    """The names of all systems."""
    return tuple(_TYPES)


def get(name: str) -> SystemType:
    """The system called `name`.

    Raises:
      UserError: there is none.
    """
    if name not in _TYPES:
        raise UserError(f"config.system={name!r}: expected one of {', '.join(_TYPES)}.{suggest(name, _TYPES)}")
    return _TYPES[name]


def tree(config: ConfigDict) -> TreeInfo:
    """About the parameters of the config's system."""
    return get(config.system).tree(config)


def official(name: str) -> Any:
    """The official PyTorch checkpoints of the system called `name` (`torch_bridge.official_config.Official`).

    Raises:
      UserError: it has none.
    """
    if get(name).official is None:
        having = ", ".join(other for other, kind in _TYPES.items() if kind.official)
        raise UserError(f"there are no official checkpoints of the system {name!r}; those of {having} are known.")
    return get(name).official


def make(config: ConfigDict, spec: DataSpec, codec: Codec | None = None) -> System:
    """The system that a config describes, for data of `spec`."""
    return get(config.system).make(config, spec, codec)
