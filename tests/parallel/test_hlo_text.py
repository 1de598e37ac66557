"""Trip counts of loops in the forms that compilers print, against counting by hand, and shapes with layouts."""

from __future__ import annotations

import math

import pytest

from uwm_jax.parallel import hlo_text

LOOP = """
HloModule jit_f, is_scheduled=true, num_partitions=4

%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %p = (s32[]{{:T(128)}}, f32[8]{{0:T(256)}}, s32[]{{:T(128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %i.1 = s32[]{{:T(128)S(6)}} copy(%i)
  %one = s32[] constant({step})
  %next = s32[] add(%one, %i.1)
  %x = f32[8]{{0:T(256)}} get-tuple-element(%p), index=1
  %bound = s32[] get-tuple-element(%p), index=2
  ROOT %t = (s32[], f32[8], s32[]) tuple(%next, %x, /*index=2*/%bound)
}}

%less (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction={direction}
}}

%condition (q: (s32[], f32[8], s32[])) -> pred[] {{
  %q = (s32[], f32[8], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] get-tuple-element(%q), index=2
  %m = s32[] constant({bound})
  ROOT %fused = pred[] fusion(%j, %{against}), kind=kLoop, calls=%less
}}

ENTRY %main (x: f32[8], k: s32[]) -> f32[8] {{
  %x = f32[8] parameter(0)
  %k = s32[] parameter(1)
  %start = s32[] constant({start})
  %last = s32[] {last}
  %init = (s32[], f32[8], s32[]) tuple(%start, %x, %last)
  %w = (s32[], f32[8], s32[]) while(%init), condition=%condition, body=%body
  ROOT %y = f32[8] get-tuple-element(%w), index=1
}}
"""
PLAIN = {"step": 1, "direction": "LT", "bound": 6, "start": 0, "against": "m", "last": "constant(9)"}


@pytest.mark.parametrize(
    ("change", "turns"),
    [
        ({}, 6),
        ({"start": 2}, 4),
        ({"step": 2}, 3),
        ({"step": 4}, 2),  # 0, 4
        ({"direction": "LE"}, 7),
        ({"direction": "NE", "step": 3}, 2),
        ({"direction": "GT", "step": -1, "start": 5, "bound": 0}, 5),
        ({"direction": "GE", "step": -2, "start": 5, "bound": 0}, 3),  # 5, 3, 1
        ({"start": 7}, 0),
        ({"against": "n"}, 9),  # the bound travels through the loop unchanged
        ({"against": "n", "last": "copy(%k)"}, math.inf),  # ... and is known only when the program runs
        ({"step": 0}, math.inf),
        ({"direction": "EQ"}, math.inf),
    ],
)
def test_turns_of_a_loop_without_a_known_trip_count(change, turns):
    module = hlo_text.parse(LOOP.format(**PLAIN | change))
    assert module.times["body"] == turns
    assert module.partitions == 4


def test_arrays_of_a_shape():
    found = hlo_text.arrays("(f32[8,16]{1,0:T(8,128)S(1)}, /*index=1*/pred[], bf16[3]{0:T(256)(128)(2,1)}, token[])")
    assert [(a.dtype, a.dims, a.layout) for a in found] == [
        ("f32", (8, 16), "1,0:T(8,128)S(1)"),
        ("pred", (), ""),
        ("bf16", (3,), "0:T(256)(128)(2,1)"),
    ]
    assert [a.bytes for a in found] == [512, 1, 6]


def test_operands_are_names_alone():
    module = hlo_text.parse(
        "ENTRY %e (x: f32[2]) -> f32[2] {\n"
        "  %c = s32[] constant(3)\n"
        "  ROOT %r = f32[2]{0} fusion(f32[2]{0:T(8,128)} %a.1, /*index=1*/%b-2, (f32[], s32[]) %c_3), calls=%f\n"
        "}\n"
    )
    assert module.root("e").operands == ("a.1", "b-2", "c_3")
    assert module.root("e").called == ("f",)
