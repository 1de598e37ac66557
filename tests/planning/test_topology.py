"""Names of products against the grids that Google's pages list, and the links of a chip counted one by one."""

from __future__ import annotations

import itertools

import pytest

from uwm_jax.errors import UserError
from uwm_jax.planning import topology
from uwm_jax.training.flops import peak_flops


@pytest.mark.parametrize(
    ("name", "grid", "chips", "cores"),
    [
        ("v5e-16", "v5e:4x4", 16, 16),
        ("v5e-256", "v5e:16x16", 256, 256),
        ("v6e-8", "v6e:2x4", 8, 8),
        ("v4-8", "v4:2x2x1", 4, 8),
        ("v5p-128", "v5p:4x4x4", 64, 128),
        ("2xv5e-16", "v5e:4x4", 32, 32),
        ("4xv5p-128", "v5p:4x4x4", 256, 512),
    ],
)
def test_names_are_those_of_products(name, grid, chips, cores):
    found = topology.find(name)
    assert found.description()["topology_name"] == grid
    assert (found.chips, found.cores) == (chips, cores)
    assert found.description().get("num_slices", 1) == found.slices
    assert ("chip_config_name" in found.description()) == (cores > chips)  # a device is a chip


@pytest.mark.parametrize("name", ["v5e-17", "v5e:4x4", "v4-4", "0xv5e-16", "v5p-64x", "tpu7x-8", "", "xv5e-16"])
def test_other_names_are_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=f"--topology={name}: expected names such as v4-8, .*v5e-16.*2xv5e-16"):
        topology.find(name)


def test_a_name_that_is_nearly_right_gets_a_suggestion():
    with pytest.raises(UserError, match="Did you mean v5e-256"):
        topology.find("v5e-255")


@pytest.mark.parametrize("name", topology.known())
def test_chips_send_over_the_links_that_the_grid_has(name):
    """Links are counted by walking over the grid; v5e and v6e close a side of 16, v4 and v5p cubes of 4 x 4 x 4."""
    found = topology.find(name)
    flat = len(found.shape) == 2
    links = 0
    for place in itertools.islice(itertools.product(*map(range, found.shape)), 4096):
        for axis, side in enumerate(found.shape):
            closed = side == 16 if flat else all(n % 4 == 0 for n in found.shape)
            for step in (-1, 1):
                inside = 0 <= place[axis] + step < side
                links += inside or (closed and side > 1)
    assert found.ici == pytest.approx(links / found.chips * found.chip.link)


@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-4"])
def test_every_kind_of_chip_has_a_peak(name):
    assert peak_flops(topology.find(name).chip.kind, "bfloat16")
