"""The notations of replica groups against groups made by hand, and the mesh axes that they span."""

from __future__ import annotations

import pytest

from uwm_jax.parallel import replica_groups

PAIRS = ((0, 1), (2, 3))
STRIDED = ((0, 2), (1, 3))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", PAIRS),
        ("replica_groups=[2,2]<=[4], dimensions={0}", PAIRS),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", STRIDED),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}", PAIRS),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", STRIDED),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}, dimensions={1}", PAIRS),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", ((3, 1), (2, 0))),
        ("replica_groups=mesh[a=2,b=2] {b}", PAIRS),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=2,'b'=4], to_apply=%add", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("channel_id=4, source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("replica_groups={}, to_apply=%add", None),
    ],
)
def test_every_notation(text, groups):
    assert replica_groups.read(text) == groups


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (((0, 1, 2, 3), (4, 5, 6, 7)), ("fsdp", "tensor")),
        (((0, 4), (1, 5), (2, 6), (3, 7)), ("data",)),
        (((0, 2), (1, 3)), ("fsdp",)),
        (((1, 0), (0, 1)), ("tensor",)),  # a permutation
        (((0, 5),), ("data", "tensor")),
        (((0,), (1,)), ()),
    ],
)
def test_axes_are_those_along_which_a_group_differs(groups, axes):
    # a group of two could be any of the three: its devices tell, not its size
    assert replica_groups.axes(groups, {"data": 2, "fsdp": 2, "tensor": 2}) == axes
