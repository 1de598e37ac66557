"""The search against a compiler whose verdicts are made up: which programs are compiled, in which order, and ranked."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from uwm_jax.errors import UserError
from uwm_jax.planning import compiling, search, sizes, topology
from uwm_jax.planning.rows import Question
from uwm_jax.planning.table import settings


@pytest.fixture(scope="module")
def tiny(make_tiny_config):
    config = make_tiny_config()
    config.model.num_heads, config.batch_size = 2, 32
    return config, Question(sizes.of_data(config, "none.py"))


@pytest.fixture
def compiler(monkeypatch):
    """A function that takes verdicts, (config) -> (seconds, fits), and gives the list of what was compiled."""

    def put(verdict):
        compiled = []

        def row(name, config, question, say):
            mesh = {axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor")}
            made = {"mesh": mesh, "batch_size": config.batch_size, "accumulation_steps": config.accumulation_steps}
            made["remat"] = config.model.remat
            compiled.append((*mesh.values(), config.accumulation_steps, config.model.remat))
            seconds, fits = verdict(config)
            return {**made, "step_seconds_estimate": seconds if fits else None, "fits": fits}

        monkeypatch.setattr(search, "row", row)
        return compiled

    return put


def test_half_are_meshes_and_half_are_remat_policies_of_the_best(tiny, compiler):
    config, question = tiny
    compiled = compiler(lambda c: (1.0 / c.mesh.data - 0.01 * (c.model.remat == "dots"), True))
    found = search.search("v5e-8", config, question, best=4, say=lambda line: None)
    meshes = {mesh for *mesh, _, remat in map(tuple, compiled[:2]) for mesh in [tuple(mesh)]}
    assert len(meshes) == 2 and {remat for *_, remat in compiled[:2]} == {"none"}
    best = max(compiled[:2])[:3]  # most data
    assert sorted(compiled[2:]) == sorted([(*best, 1, "dots"), (*best, 1, "full")])
    assert [row["step_seconds_estimate"] for row in found] == sorted(row["step_seconds_estimate"] for row in found)
    assert found[0]["remat"] == "dots" and settings(found[0]).endswith("--config.model.remat=dots")


def test_what_does_not_fit_makes_way_for_less_memory(tiny, compiler):
    config, question = tiny
    compiled = compiler(lambda c: (1.0, c.model.remat == "full" or c.accumulation_steps == 2))
    found = search.search("v5e-4", config, question, best=3, say=lambda line: None)
    first = compiled[0][:3]
    assert compiled == [(*first, 1, "none"), (*first, 1, "dots"), (*first, 1, "full")]
    assert [row["fits"] for row in found] == [True, False, False]
    compiled = compiler(lambda c: (1.0, c.accumulation_steps == 2))
    search.search("v5e-4", config, question, best=5, say=lambda line: None)
    assert (*first, 2, "none") in compiled


def test_meshes_that_cannot_hold_the_state_are_not_compiled(tiny):
    config, question = tiny
    place = topology.find("v5e-8")
    every = {(c.data, c.fsdp, c.tensor): c.held for c in search._candidates(config, question, place)}
    assert every[1, 8, 1] < every[2, 4, 1] < every[8, 1, 1]
    # What a candidate holds is what the shards of the real program hold.
    config = config.copy_and_resolve_references()
    config.mesh.fsdp = 1
    mesh = search._mesh(8, 1, 1)
    program, frozen = compiling.program_of(config, question.data.spec, question.data.arrays, mesh)
    state = sum(map(compiling.bytes_on_device, jax.tree.leaves((program.shapes, frozen))))
    batch = sum(map(compiling.bytes_on_device, jax.tree.leaves(program.batch_like)))
    assert every[8, 1, 1] == state + (1 + config.data.prefetch) * batch

    small = with_limit(place, every[2, 4, 1])
    fitting = {(c.data, c.fsdp, c.tensor) for c in search._fitting("v5e-8", config, question, small)}
    assert (1, 8, 1) in fitting and (8, 1, 1) not in fitting
    with pytest.raises(UserError, match="--search: state, codec and batches take at least .* of a chip of v5e-8"):
        search._fitting("v5e-8", config, question, with_limit(place, 1000))


def with_limit(place, limit):
    return dataclasses.replace(place, chip=dataclasses.replace(place.chip, hbm_limit=limit))


def test_slices_lie_along_data_and_heads_are_divided(tiny):
    config, question = tiny
    meshes = {(c.data, c.fsdp, c.tensor) for c in search._candidates(config, question, topology.find("2xv5e-4"))}
    assert meshes and all(data % 2 == 0 and tensor in (1, 2) for data, _, tensor in meshes)
    assert all(math.prod(mesh) == 8 for mesh in meshes)


def test_a_batch_that_does_not_divide_gets_the_nearest_that_do(tiny, compiler):
    config, question = tiny
    config = config.copy_and_resolve_references()
    config.batch_size = 20
    found = {c.batch for c in search._candidates(config, question, topology.find("v5e-8")) if c.tensor == 1}
    assert found == {16, 24}
    said: list[str] = []
    compiler(lambda c: (1.0, True))
    tried = search.search("v5e-8", config, question, best=2, say=said.append)
    assert {made["batch_size"] for made in tried} <= {16, 20, 24} and "the nearest that do are 16 and 24" in said[0]
    for made in tried:
        assert made.get("warnings", []) == ([said[0].removeprefix("v5e-8: ")] if made["batch_size"] != 20 else [])
