"""The order of samples as a pure function of (seed, position).

The sample at global position n belongs to virtual stream n mod S and is that stream's draw n // S. Each
stream runs over its own contiguous range of windows, of nearly equal size, and visits every window
of the range once per epoch in an order reshuffled every epoch. Every reader (any number of processes or threads, from
any step) computes the same samples, and the only state is a position.

Of P processes, where P divides S, process p owns the positions n with n mod P = p, which are whole streams and
hence ranges of windows (shards) of its own. (A source with too few streams for P to divide is read by all.)

A small source has fewer streams, because ranges differ by one window, and a window of a shorter range is drawn more
often: among ranges of one window, the windows of a range of two would be visited half as often.
"""

from __future__ import annotations

MIN_RANGE = 16  # windows per stream: the rates at which windows are drawn differ by at most 1/16

_MASK = (1 << 64) - 1
_ROUNDS = 8


class StreamOrder:
    """Virtual streams over the windows 0 .. num_windows - 1 of one source.

    `num_streams` is halved (rounded down) until every stream has at least `MIN_RANGE` windows, or one stream is left.
    A stream's draws depend on (seed, stream, draw) alone, so that a mixture of sources can advance each by its own
    counts.
    """

    def __init__(self, num_windows: int, num_streams: int, seed: int):
        if num_windows < 1 or num_streams < 1:
            raise ValueError(f"expected at least one window and stream, found {num_windows} and {num_streams}")
        self.num_windows = num_windows
        while num_streams > 1 and num_windows // num_streams < MIN_RANGE:
            num_streams //= 2
        self.num_streams = num_streams
        self.seed = seed

    def stream_range(self, stream: int) -> tuple[int, int]:
        """Windows [start, stop) of a stream."""
        return (
            stream * self.num_windows // self.num_streams,
            (stream + 1) * self.num_windows // self.num_streams,
        )

    def draw(self, stream: int, draw: int) -> int:
        """The window of draw number `draw` (0, 1, ...) of a stream."""
        start, stop = self.stream_range(stream)
        epoch, i = divmod(draw, stop - start)
        return start + permute(i, stop - start, mix(mix(mix(self.seed) ^ stream) ^ epoch))

    def window(self, position: int) -> int:
        """The window at a global position (0, 1, ...)."""
        draw, stream = divmod(position, self.num_streams)
        return self.draw(stream, draw)


def permute(i: int, n: int, key: int) -> int:
    """Image of `i` under a pseudo-random permutation of 0 .. n - 1, computed without a table.

    A Feistel network over the smallest even number of bits that holds n, applied until the result is
    below n (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max((n - 1).bit_length() + 1 >> 1, 1)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for r in range(_ROUNDS):
            left, right = right, left ^ (mix(key + r * 0xD1342543DE82EF95 ^ right) & low)
        i = left << half | right
        if i < n:
            return i


def mix(x: int) -> int:
    """The splitmix64 finaliser: 64 bits to 64 well-mixed bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
