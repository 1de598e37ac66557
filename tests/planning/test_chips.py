"""The table of constants in docs/scale.md is that of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from uwm_jax.planning.chips import CHIPS
from uwm_jax.training.flops import peak_flops

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()


@pytest.mark.parametrize("name", CHIPS)
def test_the_page_has_the_constants(name):
    chip, peak = CHIPS[name], peak_flops(CHIPS[name].kind, "bfloat16")
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == [
        f"{peak / 1e12:.0f}",
        f"{chip.hbm / 1e9:,.0f}",
        f"{chip.hbm_limit / 2**30:.2f}",
        f"{chip.link / 1e9:.0f}",
        f"{chip.dcn / 1e9:g}",
        f"{chip.clock / 1e9:g}" + ", a guess" * chip.clock_is_guess,
    ]
