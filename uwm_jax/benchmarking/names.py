"""Names of the rows that `benchmark_step` measures, and what each of them needs. Imports neither JAX nor torch."""

from __future__ import annotations

from collections.abc import Sequence

from uwm_jax.errors import UserError

SOURCES = ("latents", "pixels")
STAGES = ("forward", "forward_backward", "step")
NETWORK, ENCODER, CODEC, PREPROCESSING = "network", "encoder", "codec", "preprocessing"
SAMPLES = {"policy": "policy", "forward_dynamics": "forward"}  # row: mode of the table of modes
ROWS = (
    *(f"{source}/{stage}" for source in SOURCES for stage in STAGES),
    *(f"{part}/{stage}" for part in (NETWORK, ENCODER) for stage in STAGES[:2]),
    *(CODEC, PREPROCESSING, *SAMPLES),
)
PARTS = tuple(dict.fromkeys(row.split("/")[0] for row in ROWS))  # of the rows that begin with this

_NEEDS = {
    "latents": {NETWORK, ENCODER},
    "pixels": {NETWORK, ENCODER, CODEC},
    NETWORK: {NETWORK},
    ENCODER: {ENCODER},
    CODEC: {CODEC},
    PREPROCESSING: set(),
    **dict.fromkeys(SAMPLES, {NETWORK, ENCODER}),
}


def part_of(row: str) -> str:
    """`network` of `network/forward`."""
    return row.split("/")[0]


def needs(row: str) -> set[str]:
    """The parts of the model whose arrays a row uses: some of `network`, `encoder`, `codec`."""
    return set(_NEEDS[part_of(row)])


def trains(row: str) -> bool:
    """Whether a row updates parameters, with the optimizer's state."""
    return row.endswith("/step")


def select(parts: Sequence[str], flag: str = "--part") -> list[str]:
    """The rows that a flag names: `latents`, `network` and so on for all of their rows, or single rows.

    Raises:
      UserError: a name is unknown, or there is none.
    """
    known = tuple(dict.fromkeys((*PARTS, *ROWS)))
    for part in parts:
        if part not in known:
            raise UserError(f"{flag}: expected some of {', '.join(known)}, joined by commas; found {part!r}.")
    rows = [row for row in ROWS if row in parts or part_of(row) in parts]
    if not rows:
        raise UserError(f"{flag}: expected at least one of {', '.join(known)}.")
    return rows
