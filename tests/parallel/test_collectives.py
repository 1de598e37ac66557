"""The reader of compiled text against small programs in the notations that XLA prints."""

# ruff: noqa: E501 (lines of a compiler)

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

from uwm_jax.parallel import collectives

HLO = """
HloModule jit_step, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %p = (s32[], f32[4,16]{1,0}) parameter(0)
  %x.1 = f32[4,16]{1,0} get-tuple-element(%p), index=1
  %all-reduce.1 = f32[4,16]{1,0} all-reduce(%x.1), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add, metadata={op_name="jit(step)/dot"}
  ROOT %t = (s32[], f32[4,16]{1,0}) tuple(%i, %all-reduce.1)
}

%condition (p: (s32[], f32[4,16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer_body (p: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  ROOT %w.1 = (s32[], f32[4,16]{1,0}) while(%p), condition=%condition, body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}
}

%async_computation (q: f32[8,16]) -> f32[2,16] {
  %q = f32[8,16]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[2,16]{1,0} reduce-scatter(%q), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}

%all-reduce-scatter.3 (r: bf16[64]) -> bf16[8] {
  %r = bf16[64]{0:T(256)(128)} parameter(0)
  %all-reduce.2 = bf16[64]{0:T(256)(128)} all-reduce(%r), replica_groups={}, to_apply=%add
  ROOT %slice = bf16[8]{0} dynamic-slice(%all-reduce.2, %o), dynamic_slice_sizes={8}
}

%unused (u: f32[100]) -> f32[100] {
  %u = f32[100]{0} parameter(0)
  ROOT %all-reduce.9 = f32[100]{0} all-reduce(%u), replica_groups={}, to_apply=%add
}

ENTRY %main (x: f32[8,16], y: bf16[64]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %y = bf16[64]{0:T(256)(128)} parameter(1)
  %w = (s32[], f32[4,16]{1,0}) while(%init), condition=%condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %all-gather-start.1 = (f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(f32[8,16]{1,0:T(8,128)} %x), channel_id=2, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %all-gather-done.1 = f32[32,16]{1,0} all-gather-done(%all-gather-start.1)
  %rs = ((f32[8,16]{1,0}), f32[2,16]{1,0}) async-start(%x), calls=%async_computation
  %rsd = f32[2,16]{1,0} async-done(%rs), calls=%async_computation
  %permute = f32[8,16]{1,0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}
  %fused = bf16[8]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %both = (f32[8,16]{1,0}, /*index=1*/pred[3]{0}) all-reduce(%x, %mask), replica_groups=mesh['data'=2,'fsdp'=4], to_apply=%add
  %mask = pred[3]{0} constant({1,0,1})
}
"""


def test_every_notation_is_read_once():
    found = {c.name: c for c in collectives.read(HLO)}
    as_rows = {name: (c.kind, c.bytes, c.group, c.times) for name, c in found.items()}
    assert as_rows == {
        "all-reduce.1": ("all-reduce", 4 * 16 * 4, 2, 15),  # a loop of 5 in a loop of 3
        "reduce-scatter.1": ("reduce-scatter", 8 * 16 * 4, 4, 1),
        "all-reduce.2": ("reduce-scatter", 64 * 2, None, 1),
        "all-gather-done.1": ("all-gather", 32 * 16 * 4, 4, 1),
        "permute": ("collective-permute", 8 * 16 * 4, None, 1),
        "both": ("all-reduce", 8 * 16 * 4 + 3, 8, 1),
    }
    assert found["all-reduce.1"].source == "jit(step)/dot"
    totals = collectives.bytes_by_kind(found.values())
    assert totals == {
        "all-reduce": 15 * 256 + 515,
        "reduce-scatter": 512 + 128,
        "all-gather": 2048,
        "collective-permute": 512,
    }


def test_a_loop_of_unknown_length_is_not_guessed():
    (loop,) = [c for c in collectives.read(HLO.replace('{"n":"5"}', "{}")) if c.name == "all-reduce.1"]
    assert loop.times is None
    with pytest.raises(ValueError, match="all-reduce.1 .* trip count"):
        collectives.bytes_by_kind([loop])


# --- programs for TPUs, from `tpu_programs` ---------------------------------------------------------------

MIB = 2**20
KERNEL = 2 * MIB  # 1024 x 1024 bfloat16


KEPT = Path(__file__).with_name("tpu_hlo")


def on_tpu(program: str, *sizes: int, folder: Path = KEPT) -> list[collectives.Collective]:
    text = (folder / f"{program}.txt").read_text()
    return collectives.read(text, AbstractMesh(sizes, ("data", "fsdp", "tensor")))


def test_loops_of_tpus_count_their_turns_and_groups_tell_the_axis():
    found = [(c.kind, c.axes, c.group, c.bytes, c.times, c.sent) for c in on_tpu("scan", 2, 2, 1)]
    assert found == [
        ("all-gather", ("fsdp",), 2, KERNEL, 6, KERNEL / 2),  # forward
        ("reduce-scatter", ("fsdp",), 2, KERNEL, 6, KERNEL / 2),
        ("all-gather", ("fsdp",), 2, KERNEL, 6, KERNEL / 2),  # and once more, recomputed
        ("all-reduce", ("data",), 2, KERNEL / 2, 6, KERNEL / 2),  # of the cut gradient
    ]


def test_a_gather_in_pieces_counts_once():
    text = (KEPT / "chain.txt").read_text()
    assert text.count('chain_id="0"') == text.count('chain_id="1"') == 3
    gathers = [c for c in on_tpu("chain", 1, 4, 1) if c.kind == "all-gather"]
    assert [(c.bytes, c.times, c.sent) for c in gathers] == [(KERNEL, 1, KERNEL * 3 / 4)] * 3
    # the first layer's kernel has nothing to be gathered behind
    assert sorted(c.asynchronous for c in gathers) == [False, True, True]
    (gradients,) = (c for c in on_tpu("chain", 1, 4, 1) if c.kind != "all-gather")
    assert (gradients.kind, gradients.bytes, gradients.sent) == ("reduce-scatter", 3 * KERNEL, 3 * KERNEL * 3 / 4)


def test_a_kernel_that_goes_round_in_pieces():
    found = on_tpu("windowed", 1, 16, 1)
    piece = 4096 * 512 * 2 // 16
    assert {(c.kind, c.axes, c.bytes, c.sent) for c in found} == {("collective-permute", ("fsdp",), piece, piece)}
    # a turn multiplies four pieces and passes four on; before the loop, one goes the other way round
    assert [c.times for c in found] == [16 / 4] * 4 + [1]
    assert all(c.asynchronous for c in found)


def test_activations_are_told_from_parameters():
    (hidden,) = on_tpu("tensor", 2, 1, 2)
    assert (hidden.axes, hidden.bytes, hidden.activations) == (("tensor",), 512 * 512 * 2, True)
    for program, sizes in {"scan": (2, 2, 1), "chain": (1, 4, 1), "windowed": (1, 16, 1), "slices": (2, 2, 2)}.items():
        assert not any(c.activations for c in on_tpu(program, *sizes)), program


def test_a_layer_of_a_member_of_a_sweep_is_a_parameter():
    text = """
HloModule jit_step, num_partitions=4

ENTRY %main (p: f32[2,12,768,3072]) -> f32[768,3072] {
  %p = f32[2,12,768,768]{3,2,1,0} parameter(0), sharding={devices=[1,1,1,4]<=[4]}, metadata={op_name="args[0].params['kernel']"}
  %layer = f32[768,768]{1,0} bitcast(%slice)
  %tokens = f32[768,769]{1,0} parameter(1)
  %rows = f32[768,3076]{1,0} all-gather(%tokens), replica_groups={{0,1,2,3}}, dimensions={1}
  ROOT %kernel = f32[768,3072]{1,0} all-gather(%layer), replica_groups={{0,1},{2,3}}, dimensions={1}
}
"""
    # in each of two slices, whose devices have numbers of their own: two members on two devices each
    mesh = AbstractMesh((2, 2, 2, 1), ("sweep", "data", "fsdp", "tensor"))
    found = {c.name: (c.axes, c.activations) for c in collectives.read(text, mesh)}
    assert found == {"rows": (("sweep", "fsdp"), True), "kernel": (("fsdp",), False)}


def test_a_gradient_that_is_padded_to_whole_tiles_is_no_activation():
    """Of 1,152 rows over 16 devices each holds 72, and the compiler scatters sums of 16 times 80."""
    text = """
HloModule jit_step, num_partitions=16

ENTRY %main (p: f32[28,72,4608]) -> bf16[80,4608] {
  %p = f32[28,72,4608]{2,1,0} parameter(0), sharding={devices=[1,16,1]<=[16]}, metadata={op_name="args[0].params['kernel']"}
  %sum = bf16[1280,4608]{1,0} bitcast(%x)
  ROOT %kernel = bf16[80,4608]{1,0} reduce-scatter(%sum), replica_groups={}, dimensions={0}, to_apply=%add
}
"""
    (found,) = collectives.read(text)
    assert (found.bytes, found.activations) == (1280 * 4608 * 2, False)


def test_slices_exchange_their_sums_over_the_network_between_them():
    scatter, between, gather = on_tpu("slices", 2, 2, 2)
    assert (scatter.kind, scatter.axes, scatter.bytes) == ("reduce-scatter", ("fsdp",), KERNEL)
    # each chip's half of the sum, to the other slice and back: 2 (n - 1) / n = 1 times its bytes
    assert (between.kind, between.axes, between.group) == ("all-reduce", ("dcn",), 2)
    assert between.bytes == between.sent == KERNEL / 2
    assert (gather.kind, gather.axes, gather.bytes) == ("all-gather", ("fsdp",), KERNEL)


@pytest.mark.slow
def test_the_installed_compiler_writes_what_is_read(tmp_path):
    """Two slices of v5e, whose mesh `make_mesh` lays out, compiled without a TPU."""
    command = [sys.executable, "-m", "tests.parallel.tpu_programs", str(tmp_path), "slices"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    found, kept = (on_tpu("slices", 2, 2, 2, folder=folder) for folder in (tmp_path, KEPT))
    assert [dataclasses.replace(c, name="") for c in found] == [dataclasses.replace(c, name="") for c in kept]


# --- the step of configs/droid.py ------------------------------------------------------------------------

# Of `data 8`: measured when all programs held the layers stacked and multiplied kernels of any axes, since what CPUs
# alone do for speed must not reach the programs of meshes. Of `fsdp 8`: measured with AdaLN's kernels kept cut and
# convolutions whole; before, 3,178,688 bytes were gathered and 1,766,656 reduced.
STEP = {
    "data 8": {"bytes": {"all-reduce": 1766452}, "count": {"all-reduce": 1}},
    "fsdp 8": {
        "bytes": {"all-gather": 900864, "all-reduce": 945648, "all-to-all": 69120},
        "count": {"all-gather": 39, "all-reduce": 6, "all-to-all": 8},
    },
}


@pytest.mark.slow
def test_the_step_of_droid_sends_what_it_always_did(tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.parallel.droid_collectives", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    assert {mesh: {key: of[key] for key in ("bytes", "count")} for mesh, of in found.items()} == STEP
    gradients = 4 * found["data 8"]["parameters"]  # float32; equal ones are sent once, and a few metrics come with them
    assert abs(STEP["data 8"]["bytes"]["all-reduce"] - gradients) < 100
