"""Tables of an evaluation, of a closed loop and of a comparison of samplers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uwm_jax.reporting import names
from uwm_jax.reporting.markup import Html, fill
from uwm_jax.reporting.numbers import Format
from uwm_jax.reporting.page import cell, formats, head, number_head, table
from uwm_jax.reporting.results import Interval
from uwm_jax.systems.base import Use

_FEW_STEPS = ("/action_mse", "/changed_mse")  # metrics of uses in a comparison of samplers
COLUMNS = ("action_mse", "pixel_mse", "changed_mse", "psnr", "latent_mse")


def evaluation(metrics: Mapping[str, Interval], uses: Mapping[str, Use]) -> Html:
    """Uses, the control and the baselines of an evaluation as rows, kinds of errors as columns."""
    columns = [name for name in COLUMNS if any(key.endswith("/" + name) for key in metrics)]
    heads = [(name, name, fill("<code>{}</code> {}", names.formula(use), use.question)) for name, use in uses.items()]
    heads += [
        ("control", f"control/{name}_shuffled", fill("{}, but with the actions of a window of another episode", name))
        for name in uses
    ]
    heads += [
        (name.replace("_", " "), f"baseline/{name}", fill("{}", about)) for name, about in names.BASELINES.items()
    ]
    rows = [(label, about, [metrics.get(f"{prefix}/{name}") for name in columns]) for label, prefix, about in heads]
    return _table(columns, [row for row in rows if any(row[2])], "all uses and baselines")


def closed_loop(metrics: Mapping[str, Interval]) -> Html:
    """Actors in a simulator as rows, their best scores, successes and seams as columns."""
    columns = [*dict.fromkeys(m for name in metrics if (m := name.rpartition("/")[2]).startswith("max_")), "success"]
    columns += ["seam"] if "policy/seam" in metrics else []
    rows = [
        (actor.replace("_", " "), about, [metrics.get(f"{actor}/{name}") for name in columns])
        for actor, about in names.ACTORS.items()
    ]
    return _table(columns, [row for row in rows if any(row[2])], "closed loop")


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Any, list[Interval | None]]], about: str) -> Html:
    """Rows of (name, what it is, a value for each column) under the names of metrics."""
    form = formats([found for *_, found in rows])
    return table(
        ["", *(number_head(*names.of_metric(name)) for name in columns)],
        [[head(fill("<b>{}</b>", label), says), *map(cell, found, form)] for label, says, found in rows],
        about,
    )


_NUMBERS = ("steps", "first_timestep", "hidden_timestep")  # of a sampler; None where a system has none


def samplers(few_steps: Sequence[Mapping[str, Any]]) -> Html:
    """Samplers as rows: how many evaluations of the network, how long a sample takes, and some errors."""
    every = {name for row in few_steps for name in row["metrics"]}
    shown = sorted(name for name in every if name.endswith(_FEW_STEPS) and name.count("/") == 1)
    shown += sorted(name for name in every if name.startswith("closed_loop/"))
    found = [[row["metrics"].get(name) for name in shown] for row in few_steps]
    milliseconds = [1000 * row["seconds_per_sample"] for row in few_steps]
    time, form = Format.of(milliseconds), formats(found)
    rows = [
        [
            head(fill("<b>{}</b>", row["sampler"])),
            *(fill('<td class="number">{}</td>', "" if n is None else n) for n in map(row.get, _NUMBERS)),
            fill('<td class="number">{}</td>', time(ms)),
            *map(cell, metrics, form),
        ]
        for row, ms, metrics in zip(few_steps, milliseconds, found, strict=True)
    ]
    heads = ["sampler", *map(number_head, ("evaluations", "first timestep", "hidden at"))]
    heads += [number_head("time of a sample", "ms"), *(number_head(*names.of(name)) for name in shown)]
    return table(heads, rows, "what fewer steps cost")
