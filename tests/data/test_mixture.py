"""The order of a mixture: exact shares, every source in its own order, weights that change."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from uwm_jax.data.mixture import Draw, MixtureOrder, continued, shares_of

WEIGHTS = {"a": 0.2, "b": 0.5, "c": 0.3}


def _order(weights=WEIGHTS, num_streams: int = 8, seed: int = 3) -> MixtureOrder:
    return MixtureOrder([(0, weights)], num_streams, seed)


def test_one_source_is_its_own_order() -> None:
    for order in (_order({"a": 0.7}), _order({"a": 0.7, "b": 0.0}), _order({"b": 0, "a": 1})):
        for position in (0, 1, 7, 8, 12_345, 1 << 50):
            assert order.locate(position) == Draw("a", position)


@pytest.mark.parametrize(
    "weights", [{"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.9}, {"a": 1, "b": 2}, WEIGHTS, {"a": 0.0, "b": 0.3, "c": 0.7}]
)
def test_shares_are_exact_in_every_stream_at_any_position(weights) -> None:
    order, shares = _order(weights), shares_of(weights)
    # Each level of the apportionment is off by less than one, and divides what the level before left.
    bound = 1 if len([w for w in weights.values() if w]) <= 2 else 2
    for stream in range(8):
        for draws in [*range(100), 1 << 20, (1 << 40) + 7, (1 << 60) + 1]:
            counts = order.counts(stream, draws)
            assert sum(counts) == draws
            for name, count in zip(order.names, counts, strict=True):
                # 2**-64 of a share is lost to rounding.
                assert abs(count - shares[name] * draws) < bound + Fraction(draws, 1 << 60)
                assert weights[name] or not count


def test_every_draw_belongs_to_one_source_and_none_is_left_out() -> None:
    order, seen = _order(), {}
    for position in range(8 * 200):
        name, place = order.locate(position)
        seen.setdefault(name, []).append(place)
    assert sum(map(len, seen.values())) == 1600
    for places in seen.values():
        for stream in range(8):  # 0, 1, 2, ... draws of the stream, in this order
            assert [p // 8 for p in places if p % 8 == stream] == list(range(sum(p % 8 == stream for p in places)))


def test_every_batch_is_close_to_the_weights() -> None:
    """A batch is a run of streams: out of step, they give each source its share of every batch, not only on average."""
    order = MixtureOrder([(0, {"a": 0.25, "b": 0.75})], 1024, 0)
    counts = [sum(order.locate(n).source == "a" for n in range(b * 36, b * 36 + 36)) for b in range(200)]
    assert min(counts) >= 6 and max(counts) <= 12  # 9 is a quarter; independent draws have a deviation of 2.6
    assert np.std(counts) < 1.3


def test_streams_and_seeds_are_out_of_step() -> None:
    def sources(order: MixtureOrder, stream: int) -> list[str]:
        return [order.locate(d * 8 + stream).source for d in range(20)]

    assert len({tuple(sources(_order(), stream)) for stream in range(8)}) > 4
    assert sources(_order(seed=3), 0) != sources(_order(seed=4), 0)


@pytest.mark.parametrize("change", [1, 13, 16, 1000])
def test_a_change_of_weights_loses_no_position(change: int) -> None:
    """At 13 of 8 streams, five streams are one draw ahead of the other three."""
    before, later = {"a": 0.5, "b": 0.5}, {"a": 0.125, "b": 0.875}
    order = MixtureOrder([(0, before), (change, later)], 8, 3)
    unchanged = MixtureOrder([(0, before)], 8, 3)
    assert [order.locate(n) for n in range(change)] == [unchanged.locate(n) for n in range(change)]
    seen: dict[str, list[int]] = {"a": [], "b": []}
    for n in range(change + 8 * 64):
        name, place = order.locate(n)
        seen[name].append(place)
    for places in seen.values():
        for stream in range(8):
            assert [p // 8 for p in places if p % 8 == stream] == list(range(sum(p % 8 == stream for p in places)))
    after = [order.locate(change + n).source for n in range(8 * 64)]
    assert abs(after.count("a") - 64) <= 8  # an eighth, and each stream within one


def test_three_changes_add_up() -> None:
    history = [(0, WEIGHTS), (50, {"a": 1, "b": 1, "c": 1}), (61, {"a": 0, "b": 0, "c": 1}), (90, WEIGHTS)]
    order = MixtureOrder(history, 8, 0)
    assert {order.locate(n).source for n in range(61, 90)} == {"c"}
    drawn = [order.locate(n) for n in range(1000)]
    assert len(set(drawn)) == 1000
    assert [sum(c) for c in zip(*(order.counts(s, 125) for s in range(8)), strict=True)] == [
        sum(d.source == name for d in drawn) for name in "abc"
    ]


def test_golden_order() -> None:
    # The order is part of a checkpoint's meaning: a change here breaks every run that is to be continued.
    order = MixtureOrder([(0, WEIGHTS), (777, {"a": 3, "b": 1, "c": 1})], 64, seed=7)
    assert [order.locate(n) for n in (0, 1, 63, 64, 778, 5_000_000, 1 << 41)] == GOLDEN


GOLDEN = [("b", 0), ("b", 1), ("c", 63), ("a", 0), ("c", 266), ("a", 2999680), ("c", 439804651136)]


def test_the_history_of_a_run_that_continues() -> None:
    past = [(0, {"a": 1.0, "b": 1.0})]
    assert continued(past, {"a": 0.5, "b": 0.5}, 400) == past  # the same ratio
    changed = continued(past, {"a": 1.0, "b": 3.0}, 400)
    assert changed == [*past, (400, {"a": 1.0, "b": 3.0})]
    assert continued(changed, {"a": 1.0, "b": 2.0}, 400) == [*past, (400, {"a": 1.0, "b": 2.0})]
    assert continued(past, {"a": 1.0, "b": 3.0}, 0) == [(0, {"a": 1.0, "b": 3.0})]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "rise from 0"),
        ([(4, WEIGHTS)], "rise from 0"),
        ([(0, WEIGHTS), (8, WEIGHTS), (8, WEIGHTS)], "rise from 0"),
        ([(0, WEIGHTS), (8, {"a": 1})], "the same sources"),
        ([(0, {"a": -1, "b": 2})], "the weight of a is -1"),
        ([(0, {"a": math.nan, "b": 2})], "the weight of a is nan"),
        ([(0, {"a": math.inf, "b": 2})], "the weight of a is inf"),
        ([(0, {"a": 0, "b": 0})], "at least one weight above 0"),
    ],
)
def test_what_is_no_history(history, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureOrder(history, 8, 0)
