"""Rows of a plan: what is asked of the compiler, and its answers as one flat JSON object for each topology."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from uwm_jax import config as config_lib
from uwm_jax.errors import UserError
from uwm_jax.files import local_path
from uwm_jax.parallel import mesh as mesh_lib
from uwm_jax.planning import bounds, children, topology
from uwm_jax.planning.children import Say
from uwm_jax.planning.sizes import Data
from uwm_jax.planning.topology import HERE, Topology

Row = dict[str, Any]

STATUS = "predicted, never run"
MEASURED = "predicted, but for what was measured"  # of a step that --measure ran
MUCH = 10e6  # bytes of activations in a collective of a step, from which a warning names it

# Keys of every row, None where a row has no such number.
KEYS = (
    *("topology", "chips", "cores", "peak_hbm_bytes", "extra_hbm_bytes", "hbm_limit_bytes", "fits", "flops_per_step"),
    *("step_seconds_lower_bound", "step_seconds_estimate"),
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A plan that is asked for.

    Attributes:
      data: sizes of the data of the config.
      efficiency: share of the chips' peak for which samples a second are told as well.
      price: of a chip-hour, None for no costs.
      cache: directory of answers; None for none.
      measure: whether the step is run on the devices of this machine, where these are the topology.
      members: of a sweep that train in one program; 0 for a run.
      names: of these members.
      program, programs: the number of the program of a sweep, from 1, and how many it has, one after another.
    """

    data: Data
    efficiency: float = 0.4
    price: float | None = None
    cache: Path | None = None
    measure: bool = False
    members: int = 0
    names: tuple[str, ...] = ()
    program: int = 1
    programs: int = 1


def row(name: str, config: ConfigDict, question: Question, say: Say) -> Row:
    """The row of a topology; a failure is a row as well.

    Raises:
      UserError: there is no such topology.
    """
    place = None if name == HERE else topology.find(name)
    try:
        config = _on(place, config, question)
    except UserError as e:
        return refused(name, config, question, e)
    answer = children.ask(request(config, place, question), name=name, cache=question.cache, say=say)
    return row_of(name, config, place, question, answer)


def known_row(name: str, config: ConfigDict, question: Question) -> Row | None:
    """What `row` returns without compiling; None where it would compile."""
    place = topology.find(name)
    try:
        config = _on(place, config, question)
    except UserError as e:
        return refused(name, config, question, e)
    answer = children.recall(request(config, place, question), question.cache)
    return row_of(name, config, place, question, answer) if answer else None


def _on(place: Topology | None, config: ConfigDict, question: Question) -> ConfigDict:
    """The config of a run on a topology; raises UserError where it cannot be."""
    config = with_slices(config, place)
    if place:
        mesh_lib.find_sizes(config, place.chips, "TPU", question.members)
    return config


def row_of(name: str, config: ConfigDict, place: Topology | None, question: Question, answer: children.Answer) -> Row:
    """The row of an answer of `children`."""
    timing = {"compile_seconds": answer["seconds"], "cached": answer["cached"]}
    if "failure" in answer:
        return _failed(name, config, place, question, answer["failure"]) | timing
    return _planned(name, config, place, question, answer["facts"]) | timing


def whole_sweep(rows: list[Row]) -> list[Row]:
    """The rows of a sweep's programs on one topology, each with what holds for all of them, which train one after
    another: `sweep_fits`, and the sums `sweep_days/*` and `sweep_cost/*`; None where that of a program is not known."""
    fits = [row["fits"] for row in rows]
    of_all: Row = {"sweep_fits": False if False in fits else None if None in fits else True}
    for key in ("days", "cost"):
        for at in ("lower_bound", "estimate", "efficiency"):
            parts = [row.get(f"{key}/{at}") for row in rows]
            of_all[f"sweep_{key}/{at}"] = None if None in parts else math.fsum(part or 0.0 for part in parts)
    return [row | of_all for row in rows]


def request(config: ConfigDict, place: Topology | None, question: Question) -> dict[str, Any]:
    """What `child` is asked."""
    return {
        "config": json.loads(config_lib.to_json(config)),
        "spec": question.data.spec.to_json(),
        "arrays": question.data.arrays,
        "members": question.members,
        "measure": question.measure and place is None,
        "rules": _contents(config.mesh.rules),
        "description": place.description() if place else None,
    }


def _contents(file: str) -> str | None:
    """The text of `config.mesh.rules`, on which an answer depends too; None for none, and for one that cannot be read,
    which the child reports."""
    try:
        return local_path(file, "config.mesh.rules").read_text() if file else None
    except (OSError, UnicodeDecodeError):
        return None


def with_slices(config: ConfigDict, place: Topology | None) -> ConfigDict:
    """The config of a run on the slices of a topology.

    Raises:
      UserError: it asks for another number of slices.
    """
    slices, field = place.slices if place else 1, config.mesh.slices
    if place is None or slices == field:
        return config
    if field != 1:
        raise UserError(
            f"config.mesh.slices={field} does not fit --topology={place.name} of {slices} slice(s): set it to "
            f"{slices}, or leave it at 1."
        )
    config = config.copy_and_resolve_references()
    config.mesh.slices = slices
    return config


def refused(name: str, config: ConfigDict, question: Question, error: UserError) -> Row:
    """The row of a topology on which a config cannot be run."""
    place = None if name == HERE else topology.find(name)
    return _failed(name, config, place, question, {"kind": "config", "message": str(error)})


def _about(name: str, config: ConfigDict, place: Topology | None, question: Question) -> Row:
    mesh = {axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor")}
    return {
        **dict.fromkeys(KEYS),
        "topology": name,
        "status": STATUS,
        "chip": place.chip.name if place else None,
        "chips": place.chips if place else None,
        "cores": place.cores if place else None,
        "hbm_limit_bytes": place.chip.hbm_limit if place else None,
        "mesh": mesh,
        "batch_size": config.batch_size,
        "accumulation_steps": config.accumulation_steps,
        "remat": config.model.get("remat"),
        "latents": bool(config.data.latents),
        "members": question.members,
        "program": question.program,
        "programs": question.programs,
        "member_names": list(question.names),
        "data": question.data.origin,
        "failure": None,
        "failure_kind": None,
    }


def _failed(
    name: str, config: ConfigDict, place: Topology | None, question: Question, failure: Mapping[str, Any]
) -> Row:
    """A row without a program; one that does not fit has what its compiler says of its size."""
    found = _about(name, config, place, question)
    found |= {"failure": failure["message"], "failure_kind": failure["kind"]}
    if failure["kind"] == "memory":
        facts = failure["facts"]
        found |= {**_devices(facts, found), **_held(facts), **_operations(facts), "fits": False}
        peak, temporary = failure.get("peak_bytes"), failure.get("temporary_bytes")
        found["peak_hbm_bytes"] = temporary + sum(facts["bytes"].values()) if temporary else peak
        found["hbm_limit_bytes"] = failure.get("limit_bytes") or found["hbm_limit_bytes"]
        found["to_try"] = _to_try(config, question, facts)
        if question.members:
            here, most = _members_on_chip(facts), _members_that_fit(facts, found)
            found["members_per_chip"] = here
            found["members_per_chip_at_most"] = None if most is None else min(most, here - 1)
    return found


def _to_try(config: ConfigDict, question: Question, facts: Mapping[str, Any]) -> list[str]:
    """What makes a step that does not fit smaller, for people."""
    mesh, parts, remat = facts["mesh"], config.accumulation_steps, config.model.get("remat", "full")
    ways = []
    if remat != "full":
        ways.append(f"config.model.remat={'dots or full' if remat == 'none' else 'full'}")
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"] * parts)  # of a part, on a chip
    if rows > 1:
        factor = next(n for n in range(2, rows + 1) if rows % n == 0)
        ways.append(f"config.accumulation_steps={parts * factor}")
    if mesh["fsdp"] == 1 and mesh["data"] > 1:
        ways.append("a larger config.mesh.fsdp")
    if _members_on_chip(facts) > 1 and config.sweep.members_at_once != 1:
        ways.append("config.sweep.members_at_once=1")
    ways.append("fewer members" if question.members else "--search, which tries these")
    return [*ways, "more chips, or larger ones"]


def _planned(
    name: str, config: ConfigDict, place: Topology | None, question: Question, facts: Mapping[str, Any]
) -> Row:
    found = _about(name, config, place, question)
    chips = facts["chips"]
    found |= _devices(facts, found) | _held(facts)
    found |= _memory(facts, config, found["hbm_limit_bytes"] or facts["limit_bytes"])
    found |= _operations(facts) | _traffic(facts)
    if measured := facts.get("measured"):
        found |= {"status": MEASURED, **{f"measured/{key}": value for key, value in measured.items()}}
    if facts["evaluation_failure"]:
        kind = facts["evaluation_failure_kind"]
        found |= {"failure_kind": kind, "failure": f"evaluations in training: {facts['evaluation_failure']}"}
    if found["fits"] is False:
        found["to_try"] = _to_try(config, question, facts)
    found |= bounds.times(facts, place)
    at_efficiency = found["step_seconds_lower_bound/compute"]
    at_efficiency = at_efficiency and at_efficiency / question.efficiency
    found |= {"efficiency": question.efficiency, "price_per_chip_hour": question.price}
    for at, seconds in (
        ("lower_bound", found["step_seconds_lower_bound"]),
        ("estimate", found["step_seconds_estimate"]),
        ("efficiency", at_efficiency),
    ):
        told = bounds.outlook(
            seconds, rows=config.batch_size, steps=config.total_steps, chips=chips, price=question.price
        )
        found |= {f"{key}/{at}": value for key, value in told.items()}
        if question.members:
            found[f"member_steps_per_second/{at}"] = question.members / seconds if seconds else None
    if question.members:
        found["members_per_chip"] = _members_on_chip(facts)
        found["members_per_chip_at_most"] = _members_that_fit(facts, found)
    return found


def _members_on_chip(facts: Mapping[str, Any]) -> int:
    return facts["members"] // facts["mesh"].get("sweep", 1)


def _members_that_fit(facts: Mapping[str, Any], found: Row) -> int | None:
    """Members whose states and gradients have room on a chip next to what all of them share, by arithmetic; None where
    the limit or the peak of the step is not known."""
    if found["hbm_limit_bytes"] is None or found["peak_hbm_bytes"] is None:
        return None
    held, here = facts["bytes"], _members_on_chip(facts)
    state = sum(held[name] for name in ("parameters", "average", "optimizer", "counters"))
    each = (state + held["parameters"]) / here  # gradients are as large as the parameters
    shared = found["peak_hbm_bytes"] + (found["extra_hbm_bytes"] or 0) - each * here
    return max(int((found["hbm_limit_bytes"] - shared) / each), 0)


def _devices(facts: Mapping[str, Any], found: Row) -> Row:
    chips = facts["chips"]
    chip, cores = found["chip"] or facts["device_kind"], found["cores"] or chips
    return {"chips": chips, "cores": cores, "chip": chip, "mesh": facts["mesh"]}


def _held(facts: Mapping[str, Any]) -> Row:
    """Numbers of parameters, and bytes of arrays on one device."""
    held = facts["bytes"]
    return {
        "parameters": facts["parameters"],
        "trained_parameters": facts["trained_parameters"],
        **{f"{name[:-1] if name == 'parameters' else name}_bytes": size for name, size in held.items()},
    }


def _operations(facts: Mapping[str, Any]) -> Row:
    return {
        "flops_per_step": sum(facts["flops"].values()),
        **{f"flops_per_step/{part}": x for part, x in facts["flops"].items()},
    }


def _memory(facts: Mapping[str, Any], config: ConfigDict, limit: int | None) -> Row:
    """Bytes of one device."""
    held, memory = facts["bytes"], facts["memory"]
    extra = {
        "decoder": facts["unused_bytes"]["frozen"],
        "prefetch": max(config.data.prefetch, 1) * held["batch"] + facts["unused_bytes"]["batch"],
        "code": memory["code"],
    }
    peak = memory["peak"] if facts["platform"] == "tpu" else memory["total"]
    needed = peak + sum(extra.values())
    evaluating = _evaluation_bytes(facts, extra)
    fits = None if limit is None else max(needed, evaluating) <= limit
    if fits and facts["evaluation_failure"]:
        fits = None  # the step does, and nothing is known of the evaluations
    return {
        "activation_bytes": peak - memory["arguments"],
        "peak_hbm_bytes": peak,
        "extra_hbm_bytes": sum(extra.values()),
        **{f"extra_hbm_bytes/{name}": size for name, size in extra.items()},
        "evaluation_hbm_bytes": evaluating,
        "hbm_limit_bytes": limit,
        "fits": False if facts["evaluation_failure_kind"] == "memory" else fits,
    }


def _evaluation_bytes(facts: Mapping[str, Any], extra: Mapping[str, int]) -> int:
    """Bytes of one device during evaluations in training: the state, the codec, the batches of the loader, and what the
    largest of their programs needs; 0 without evaluations."""
    held, evaluation = facts["bytes"], facts["evaluation"]
    if not evaluation:
        return 0
    state = sum(held[name] for name in ("parameters", "average", "optimizer", "counters", "frozen"))
    if facts["members"]:  # one of them is taken out of the others at a time
        state += (state - held["frozen"]) // _members_on_chip(facts)
    return state + held["batch"] + extra["prefetch"] + extra["code"] + evaluation["peak"] + evaluation["code"]


def _traffic(facts: Mapping[str, Any]) -> Row:
    """Bytes of collectives in a step of one device, by kind and in detail.

    Where only `data` cuts anything, in one slice, what is reduced is the gradients, 4 bytes for each trained
    parameter, and a few sums for metrics; `merged` is the rest: below zero for equal gradients that the compiler
    reduces once, above for all-reduces of something else.
    """
    kinds: dict[str, int] = {}
    for c in facts["collectives"]:
        kinds[c["kind"]] = kinds.get(c["kind"], 0) + c["bytes"]
    gradients: Row = {}
    by_data = [axis for axis, size in facts["mesh"].items() if size > 1] == ["data"]
    if by_data and not facts["members"] and not any(bounds.DCN in c["axes"] for c in facts["collectives"]):
        gradients = {"parameters": 4 * facts["trained_parameters"], "metrics": facts["metrics_bytes"]}
        gradients["merged"] = kinds.get("all-reduce", 0) - sum(gradients.values())
    heavy = [c for c in facts["collectives"] if c["activations"] and c["bytes"] > MUCH]
    schedule = facts["schedule_failure"]
    uncounted = [c for c in facts["collectives"] if c["in_unknown_loop"]]
    return {
        **{f"collective_bytes/{kind}": size for kind, size in sorted(kinds.items())},
        **{f"gradient_bytes/{part}": size for part, size in gradients.items()},
        "collectives": facts["collectives"],
        "warnings": [
            f"{c['kind']} over {', '.join(c['axes'])} carries {c['bytes'] / 1e6:,.1f} MB of activations a step: "
            f"{c['source'] or 'of unknown origin'}"
            for c in heavy
        ]
        + [f"{c['kind']} in a loop of unknown length is counted once: {c['source']}" for c in uncounted]
        + [f"the compiler's cycles and the bytes of its schedule are not known: {schedule}"] * bool(schedule),
    }
