"""A plan as text, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uwm_jax import cli
from uwm_jax.planning.rows import STATUS, Row

_KINDS = {"memory": "does not fit", "config": "refused", "process": "failed"}
_HELD = {
    "parameter": "parameters",
    "average": "their average",
    "optimizer": "optimizer",
    "frozen": "frozen codec, as far as the step reads it",
    "batch": "batch",
    "activation": "activations, gradients and other temporaries",
}
_SHOWN = 12  # collectives, those that send most
_SOURCE = 100  # characters of the operation that a collective comes from


def table(rows: Sequence[Row]) -> str:
    """All rows: an overview, then each in detail."""
    return "\n\n".join([overview(rows), *_sweeps(rows), *map(_details, rows)])


def overview(rows: Sequence[Row]) -> str:
    """A line for each row."""
    header = (
        *("topology", "chips", "mesh", "batch", "parts", "remat", "GB of limit", "fits", "ms at best", "ms estimate"),
        *("samples/s at best", "estimate", "days at best", "estimate"),
    )
    lines = [header]
    for row in rows:
        lines.append(
            (
                row["topology"] + _program(row),
                _int(row["chips"]),
                "x".join(str(size) for size in row["mesh"].values()),
                str(row["batch_size"]),
                str(row["accumulation_steps"]),
                row["remat"] or "-",
                f"{_gb(needed(row))} of {_gb(row['hbm_limit_bytes'])}",
                {None: "?", True: "yes", False: "NO"}[row["fits"]],
                _ms(row["step_seconds_lower_bound"]),
                _ms(row["step_seconds_estimate"]),
                *(
                    _number(row.get(f"{key}/{at}"))
                    for key in ("samples_per_second", "days")
                    for at in ("lower_bound", "estimate")
                ),
            )
        )
    status = "; ".join(dict.fromkeys(row["status"] for row in rows)) or STATUS
    return f"Plan ({status}; GB are 1e9 bytes of one chip, mesh is [sweep x] data x fsdp x tensor):\n{cli.table(lines)}"


def _program(row: Row) -> str:
    return f" ({row['program']} of {row['programs']})" if row["programs"] > 1 else ""


def _sweeps(rows: Sequence[Row]) -> list[str]:
    """A line for each sweep of several programs, which train one after another."""
    lines = []
    for row in rows:
        if "sweep_fits" in row and row["program"] == row["programs"]:
            fits = {None: "not known", True: "yes", False: "NO"}[row["sweep_fits"]]
            days, estimate = (_number(row[f"sweep_days/{at}"]) for at in ("lower_bound", "estimate"))
            cost, by_estimate = (row[f"sweep_cost/{at}"] for at in ("lower_bound", "estimate"))
            told = "" if cost is None else f", cost {_number(cost)} at best, {_number(by_estimate)} by the estimate"
            lines.append(
                f"  all {row['programs']} programs of the sweep on {row['topology']}, one after another: fit: {fits}, "
                f"days {days} at best, {estimate} by the estimate{told} ({STATUS})"
            )
    return ["\n".join(lines)] * bool(lines)


def needed(row: Row) -> int | None:
    """Bytes of one chip's memory: the step's and what lies next to it, or those of an evaluation where that is more."""
    if row["peak_hbm_bytes"] is None:
        return None
    step = row["peak_hbm_bytes"] + (row["extra_hbm_bytes"] or 0)
    return max(step, row.get("evaluation_hbm_bytes") or 0)


def settings(row: Row) -> str:
    """The flags of `uwm_jax.train` that make a run what a row of the search is, for people."""
    fields = {
        **{f"mesh.{axis}": size for axis, size in row["mesh"].items()},
        "batch_size": row["batch_size"],
        "accumulation_steps": row["accumulation_steps"],
    }
    if row["remat"] is not None:
        fields["model.remat"] = row["remat"]
    return " ".join(f"--config.{name}={value}" for name, value in fields.items())


def _details(row: Row) -> str:
    title = f"{row['topology']}{_program(row)} ({row['status']}; sizes from {row['data']})"
    if "collectives" not in row:
        return "\n".join([title, *_failure(row), *_sweep(row)])
    took = "from the cache" if row["cached"] else f"compiled in {row['compile_seconds']:.0f} s"
    parts = (_memory, _time, _sweep, _measured, _collectives, _gradients, _remarks)
    return "\n".join([f"{title}, {took}", *(line for part in parts for line in part(row))])


def _memory(row: Row) -> list[str]:
    lines = [("  memory of a chip, GB", "")]
    read = {"frozen": row["frozen_bytes"] - row["extra_hbm_bytes/decoder"]}
    lines += [(f"    {what}", _gb(read.get(name, row[f"{name}_bytes"]))) for name, what in _HELD.items()]
    lines += [("    peak of the step, as compiled", _gb(row["peak_hbm_bytes"]))]
    extra = {"decoder": "frozen arrays that the step does not read", "prefetch": "batches ahead", "code": "code"}
    lines += [(f"    {what}", _gb(row[f"extra_hbm_bytes/{name}"])) for name, what in extra.items()]
    if row["evaluation_hbm_bytes"]:
        lines += [("    during evaluations in training", _gb(row["evaluation_hbm_bytes"]))]
    lines += [("    usable", _gb(row["hbm_limit_bytes"]))]
    return cli.table(lines).splitlines()


def _time(row: Row) -> list[str]:
    bound, estimate = "step_seconds_lower_bound", "step_seconds_estimate"

    def parts(key: str) -> str:
        known = {k.removeprefix(f"{key}/"): v for k, v in row.items() if k.startswith(f"{key}/") and v is not None}
        return ", ".join(f"{name} {_ms(seconds)}" for name, seconds in known.items())

    lines = [f"  {row['flops_per_step'] / 1e12:,.3g} TFLOP a step"]
    if row[bound] is not None:
        lines += [f"  lower bounds of a step, ms: {parts(bound)}; the largest counts"]
    if row[estimate] is not None:
        lines += [f"  estimate, ms: {_ms(row[estimate])} = the sum of {parts(estimate)}"]
    for at, name in (
        ("lower_bound", "at the lower bound"),
        ("estimate", "at the estimate"),
        ("efficiency", f"at {row['efficiency']:.0%} of the peak (--efficiency)"),
    ):
        speed, days, cost = (row[f"{key}/{at}"] for key in ("samples_per_second", "days", "cost"))
        if speed is not None:
            told = f"{_number(speed)} samples/s, {_number(days)} days for all steps"
            told += f", cost {_number(cost)} at {row['price_per_chip_hour']:g} a chip-hour" if cost is not None else ""
            lines.append(f"  {name}: {told}")
    return lines


def _sweep(row: Row) -> list[str]:
    if not row["members"]:
        return []
    lines = [f"  {row['members']} members in one program: {'  '.join(row['member_names'])}"]
    if "members_per_chip" not in row:
        return lines
    most = row["members_per_chip_at_most"]
    lines.append(
        f"  {row['members_per_chip']} on a chip"
        + (", how many fit is not known" if most is None else f", where {most} fit by arithmetic")
    )
    for at, name in (("lower_bound", "at the lower bound"), ("estimate", "at the estimate")):
        if (speed := row.get(f"member_steps_per_second/{at}")) is not None:
            lines.append(f"  {name}: {_number(speed)} member-steps/s")
    return lines


def _measured(row: Row) -> list[str]:
    if "measured/step_seconds" not in row:
        return []
    planned, measured, seconds = (row[f"measured/{k}"] for k in ("planned_bytes", "measured_bytes", "step_seconds"))
    whose = "this process grew by" if row["chip"] == "cpu" else "a device held at most"
    return [
        f"  measured on this machine ({row['chip']}): {_ms(seconds)} ms a step; {whose} {_gb(measured)} GB where "
        f"{_gb(planned)} GB were planned"
    ]


def _collectives(row: Row) -> list[str]:
    if not row["collectives"]:
        return ["  no collectives"]
    lines = [("  collectives of a step", "over", "MB", "sent MB", "times", "waits", "of")]
    shown, others = row["collectives"][:_SHOWN], row["collectives"][_SHOWN:]
    for c in shown:
        source = c["source"] if len(c["source"]) <= _SOURCE else "..." + c["source"][-_SOURCE:]
        lines.append(
            (
                f"    {c['kind']}",
                "+".join(c["axes"]) or "?",
                f"{c['bytes'] / 1e6:,.2f}",
                f"{c['sent_bytes'] / 1e6:,.2f}",
                str(c["times"]),
                "no" if c["asynchronous"] else "yes",
                ", ".join(filter(None, ("activations" if c["activations"] else "parameters", source))),
            )
        )
    sent = sum(c["sent_bytes"] for c in others) / 1e6
    rest = f"    and {len(others)} others, which send {sent:,.2f} MB (--json has all)"
    return cli.table(lines).splitlines() + [rest] * bool(others)


def _gradients(row: Row) -> list[str]:
    if "gradient_bytes/parameters" not in row:
        return []
    parameters, metrics, merged = (row[f"gradient_bytes/{part}"] for part in ("parameters", "metrics", "merged"))
    rest = f"+ {merged:,} of others" if merged > 0 else f"- {-merged:,} of equal gradients that are reduced once"
    return [
        f"  all-reduce: {parameters + metrics + merged:,} bytes = 4 x {row['trained_parameters']:,} parameters + "
        f"{metrics:,} of metrics{f' {rest}' if merged else ''}"
    ]


def _remarks(row: Row) -> list[str]:
    flags = [f"  as a run: {settings(row)}"] if "by_arithmetic" in row else []
    return _failure(row) + flags


def _failure(row: Row) -> list[str]:
    lines = [f"  {_KINDS[row['failure_kind']]}: {row['failure']}"] if row["failure"] else []
    lines += [f"  warning: {text}" for text in row.get("warnings", [])]
    return lines + ([f"  to try: {', '.join(row['to_try'])}"] if "to_try" in row else [])


def _int(value: int | None) -> str:
    return "?" if value is None else str(value)


def _gb(size: float | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f}" if size >= 1e9 else f"{size / 1e9:.2g}"


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{1000 * seconds:,.2f}"


def _number(value: Any) -> str:
    return "?" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
