"""Choices among keys: a camera or a text of the model that is drawn for each sample from several keys of the data.

`config.data.choices` names them: {"exterior": ("exterior_image_1_left", "exterior_image_2_left")} makes `exterior` a
name that `config.data.cameras`, `config.data.text` and those of a source can use. What a sample shows follows from its
own 64 random bits, so it does not depend on processes or threads; current and next frames share one draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

from uwm_jax.data.order import mix

_T = TypeVar("_T")


def keys_of(name: str, *choices: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The keys that a name stands for: those of the last of `choices` that has it, else the name itself."""
    return next((tuple(c[name]) for c in reversed(choices) if name in c), (name,))


def pick(options: Sequence[_T], name: str, draw: int | None) -> _T:
    """The option that a sample shows.

    Args:
        options: at least one. What must not be drawn, such as an empty instruction while another exists, is left out
            by the caller.
        name: of the choice: several choices of a sample are independent draws.
        draw: the sample's 64 random bits; None for windows that are not drawn, such as held-out ones, which take the
            first.
    """
    if draw is None or len(options) == 1:
        return options[0]
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return options[mix(draw ^ salt) % len(options)]
