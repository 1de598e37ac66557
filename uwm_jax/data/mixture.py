"""The order of a weighted mixture as a pure function of (seed, history of weights, position).

Position n belongs to stream n mod S and is that stream's draw n // S. Within a stream the draws are divided among the
sources by nested apportionment: of the first d draws, floor(w * d + u) belong to the first source, where w is its share
and u, in [0, 1), the stream's phase; of the rest, floor(w' * rest + u') belong to the second, with its share of the
rest; and so on. Counts never fall, are exact at any position, and cost a few integer operations. Phases of consecutive
streams are spread evenly over [0, 1) (multiples of an irrational number: Weyl 1916), so that every batch, which is a
run of consecutive streams, is close to the weights too.

A change of weights at some position starts a new segment. Counts add over segments, so every source keeps its position:
the c-th draw of a source in stream s is its position c * S + s for any weights, and `StreamOrder` maps that to a
window. With one source this is the position itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from uwm_jax.data.order import mix

Weights = Mapping[str, float]
History = Sequence[tuple[int, Weights]]  # (first position, weight of each source), positions rising from 0

_BITS = 64
_ONE = 1 << _BITS  # shares and phases are integer multiples of 2**-64


class Draw(NamedTuple):
    """A position of the mixture: a source, and the position in that source's own order."""

    source: str
    position: int


class MixtureOrder:
    """Assigns the sources of a mixture to positions 0, 1, ...

    Args:
        history: weights by the position from which they apply, of the same sources. Only their ratios matter.
            A source with weight 0 is not drawn.
        num_streams: S.
        seed: of the phases.
    Raises:
        ValueError: no weights, a weight that is negative or not finite, all weights 0, positions that do not rise
            from 0.
    """

    def __init__(self, history: History, num_streams: int, seed: int):
        starts = [start for start, _ in history]
        if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
            raise ValueError(f"expected weights from positions that rise from 0, found {starts}")
        self.history = [(int(start), dict(weights)) for start, weights in history]
        self.names = sorted(self.history[0][1])
        if any(sorted(weights) != self.names for _, weights in self.history):
            raise ValueError("expected the same sources throughout the history of weights")
        self.num_streams = num_streams
        self._segments = [(start, self._levels(start, weights, seed)) for start, weights in self.history]

    def locate(self, position: int) -> Draw:
        """The source of a position, and the position in that source's order."""
        if len(self.names) == 1:
            return Draw(self.names[0], position)
        draw, stream = divmod(position, self.num_streams)
        before = self.counts(stream, draw)
        after = self.counts(stream, draw + 1)
        chosen = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if b > a)
        return Draw(self.names[chosen], before[chosen] * self.num_streams + stream)

    def counts(self, stream: int, draws: int) -> list[int]:
        """The number of the first `draws` draws of a stream that belong to each source, in the order of `names`."""
        total = [0] * len(self.names)
        for i, (start, levels) in enumerate(self._segments):
            stop = draws
            if i + 1 < len(self._segments):
                stop = min(draws, self._first_draw(self._segments[i + 1][0], stream))
            rest = stop - self._first_draw(start, stream)
            if rest <= 0:
                continue  # not yet begun, or a segment too short to reach this stream
            for j, (share, phase, turn) in enumerate(levels):
                count = share * rest + (phase + turn * stream) % _ONE >> _BITS
                total[j] += count
                rest -= count
        return total

    def _first_draw(self, position: int, stream: int) -> int:
        """A stream's first draw at or after `position`: some streams are one draw ahead of others."""
        return (position - stream + self.num_streams - 1) // self.num_streams

    def _levels(self, start: int, weights: Weights, seed: int) -> list[tuple[int, int, int]]:
        """(share of what earlier sources leave, phase of stream 0, phase increment per stream) of each source."""
        shares = [share for _, share in sorted(shares_of(weights).items())]
        levels, left = [], Fraction(1)
        for i, share in enumerate(shares):
            # Integer multiples of 2**-64, and exactly 1 for the last source that is drawn at all: no rest remains.
            of_rest = round(share / left * _ONE) if left else 0
            phase = mix(mix(mix(seed) ^ start) ^ i)
            levels.append((of_rest, phase, _irrational(i)))
            left -= share
        return levels


def shares_of(weights: Weights) -> dict[str, Fraction]:
    """Exact shares of the samples, which sum to 1.

    Raises:
        ValueError: as `MixtureOrder`.
    """
    for name, weight in weights.items():
        if not (0 <= weight < math.inf):
            raise ValueError(f"the weight of {name} is {weight}: expected a finite number of at least 0")
    total = sum(Fraction(w) for w in weights.values())
    if not total:
        raise ValueError("expected at least one weight above 0")
    return {name: Fraction(w) / total for name, w in weights.items()}


def continued(history: History, weights: Weights, position: int) -> list[tuple[int, Weights]]:
    """The history of a run that continues at `position` with these weights: with a new segment if they differ."""
    kept: list[tuple[int, Weights]] = [(start, dict(w)) for start, w in history if start < position]
    if kept and shares_of(kept[-1][1]) == shares_of(weights):
        return kept
    return [*kept, (position if kept else 0, dict(weights))]


def _irrational(i: int) -> int:
    """The fractional part of the square root of prime number `i` (0: of 2), as a multiple of 2**-64. Those of different
    primes are independent over the rationals, so the phases of different sources are spread independently."""
    primes: list[int] = []
    n = 2
    while len(primes) <= i:
        if all(n % p for p in primes):
            primes.append(n)
        n += 1
    return math.isqrt(primes[i] << 2 * _BITS) % _ONE
