"""Cycles and bytes of small TPU programs against arithmetic with the sizes of their arrays."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from uwm_jax.parallel.hlo_text import Array
from uwm_jax.planning import schedule

PROGRAMS = Path(__file__).parents[1] / "parallel" / "tpu_hlo"
MIB = 2**20
COUNTERS = 64 * 2**10  # scalars take a tile each


def text(program: str) -> str:
    return (PROGRAMS / f"{program}.txt").read_text()


@pytest.mark.parametrize(
    ("dims", "dtype", "layout", "size"),
    [
        ((9, 100), "f32", "1,0:T(8,128)", 16 * 128 * 4),
        ((9, 100), "bf16", "1,0:T(8,128)(2,1)S(1)", 16 * 128 * 2),
        ((100, 9), "f32", "0,1:T(8,128)", 16 * 128 * 4),  # the first axis is the minor one
        ((3, 9, 100), "f32", "2,1,0:T(8,128)", 3 * 16 * 128 * 4),
        ((1500,), "f32", "0:T(1024)", 2048 * 4),
        ((), "s32", ":T(128)", 128 * 4),
        ((9, 100), "f32", "1,0", 9 * 100 * 4),
        ((4, 64, 3), "bf16", "1,0,2:T(4,128)(2,1)", 3 * 4 * 128 * 2),
    ],
)
def test_padding_to_tiles(dims, dtype, layout, size):
    assert schedule.padded_bytes(Array(dtype, dims, layout)) == size


@pytest.mark.parametrize(
    ("program", "mib"),
    [
        # rows and two kernels in, the result out; hidden units stay in the vector memory
        ("tensor", 0.5 + 1 + 1 + 0.5),
        # rows in; half of each of 6 kernels in twice (forward, recomputed); half of their gradients out
        ("scan", 2 + 6 + 6 + 6),
        # rows in, quarters of 3 kernels in, of their gradients out; pieces of a gather hand its array on
        ("chain", 4 + 1.5 + 1.5),
        # rows in, kernel in; its half of the sum: written, sent, received, read; the whole gradient out
        ("slices", 2 + 2 + 4 * 1 + 2),
    ],
)
def test_bytes_of_the_memory(program, mib):
    assert 0 <= schedule.hbm_bytes(text(program)) - mib * MIB <= COUNTERS


def test_cycles_count_the_turns_of_loops():
    hlo = text("scan")
    inside = {"wide.region_0": 6, "wide.region_2": 6, "main": 1}
    expected = 0
    for computation in hlo.split("\n\n"):
        found = [int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', computation)]
        turns = [times for name, times in inside.items() if re.match(rf"(ENTRY )?%{name}", computation)]
        assert len(turns) == bool(found)
        expected += sum(found) * sum(turns)
    assert schedule.cycles(hlo) == expected
    # 4 products of 1024 x 1024 matrices a layer at 197 TFLOP/s and 1.5 GHz are the least
    assert expected > 6 * 4 * 2 * 1024**3 / 197e12 * 1.5e9


def test_loops_of_unknown_length_are_named():
    hlo = text("scan").replace("direction=LT", "direction=EQ")
    for count in (schedule.cycles, schedule.hbm_bytes):
        with pytest.raises(ValueError, match="region_.* trip count"):
            count(hlo)
