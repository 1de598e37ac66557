"""Names of parameters, patterns over them, and the arrays that a person may want to name.

A name is a path such as `noise_pred_net/pos_embed`; in a pattern, `*` stands for any characters.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from uwm_jax.errors import UserError


def names(tree: Any) -> list[str]:
    """The names of a nested dictionary of arrays, sorted."""
    return sorted(traverse_util.flatten_dict(tree, sep="/"))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def require_matches(field: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError for a pattern of a config field that matches none of the names."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"config.{field}: {pattern!r} matches none of the {len(names)} arrays, such as "
                f"{', '.join([n for n in names if 'blocks' not in n][:3])}."
            )


def split(tree: Any, patterns: Sequence[str]) -> tuple[Any, Any]:
    """(what matches no pattern, the rest) of a nested dictionary of arrays, each with the nesting of the whole."""
    if not patterns:
        return tree, {}
    flat = traverse_util.flatten_dict(tree, sep="/")
    parts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for name, x in flat.items():
        parts[matches(name, patterns)][name] = x
    return traverse_util.unflatten_dict(parts[0], sep="/"), traverse_util.unflatten_dict(parts[1], sep="/")


def join(first: Any, rest: Any) -> Any:
    """The tree that `split` took apart."""
    if not rest:
        return first
    flat = traverse_util.flatten_dict(first, sep="/") | traverse_util.flatten_dict(rest, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")


def is_fresh(interface: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether all arrays of an interface (`TreeInfo.interfaces`) match the patterns; an empty one is never fresh."""
    return bool(interface) and all(matches(name, skip) for name in interface)


def skip_flag(patterns: Sequence[str]) -> str:
    """The flag that lets these arrays start fresh."""
    return f"--config.init_from_skip='{','.join(patterns)}'"


def share(names: Sequence[str], sizes: Mapping[str, int]) -> str:
    """How many of all parameters the named arrays hold, for people; `sizes` are those of all."""
    count, total = sum(sizes[n] for n in names), sum(sizes.values())
    return f"{count / 1e6:.3g} M of {total / 1e6:.4g} M parameters, {count / total:.1%}"
