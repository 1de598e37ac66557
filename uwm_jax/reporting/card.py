"""The model card of a run, README.md of a hub repository: what it is, how to use it, its data, training and results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from uwm_jax.hub.names import HubName, parse_origin
from uwm_jax.reporting import names
from uwm_jax.reporting.results import Interval, Run

UNKNOWN = "unknown"  # the hub's word for a licence that nobody named


def card(repo: str, described: Mapping[str, Any], licence: str, run: Run | None = None, program: bool = True) -> str:
    """The text of a card.

    Args:
      repo: owner/name, for the commands.
      described: `model.json` of the export folder.
      licence: the hub's identifier of a licence, such as `apache-2.0`.
      run: the run that was exported, for training and results; None where only its folder is at hand.
      program: whether the folder holds the program that runs it in PyTorch.
    """
    parts = [
        _header(described, licence),
        f"# {_plain(repo.partition('/')[2])}",
        _what(described),
        _use(repo, described, program),
        _inputs(described),
        _data(described, run),
        _training(described, run),
        _results(described, run),
        _licence(licence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(described: Mapping[str, Any], licence: str) -> str:
    system = described["system"]
    told: dict[str, Any] = {
        "library_name": "uwm_jax",
        "license": licence,
        "pipeline_tag": "robotics",
        "tags": ["robotics", "uwm_jax", system, *(["world-model"] if "video" in described["uses"] else [])],
    }
    if base := _origin(described["config"].get("init_from") or described["config"].get("branch_from") or ""):
        told["base_model"] = base.repo
    return f"---\n{yaml.safe_dump(told, sort_keys=False, allow_unicode=True)}---"


def _origin(spec: str) -> HubName | None:
    """The repository that a run started from; None where it is none."""
    place = parse_origin(spec)[0] if spec and not os.path.isabs(spec) else None
    return place if isinstance(place, HubName) else None


def _what(described: Mapping[str, Any]) -> str:
    system, step = described["system"], described["step"]
    uses = ", ".join(
        f"`{use}` (makes {' and '.join(told['makes'])}{_given(told['given'])})"
        for use, told in described["uses"].items()
    )
    average = "the moving average of the parameters" if described["parameters"] == "average" else "the parameters"
    size = sum(_size(tensor["shape"]) for tensor in described["tensors"].values())
    return (
        f"A `{system}` model trained with uwm_jax: {average} after step {step:,}, "
        f"{size / 1e6:,.1f} million numbers in `model.safetensors`, described by `model.json`. "
        f"What it can do: {uses}."
    )


def _given(given: Sequence[str]) -> str:
    return f", given {' and '.join(given)}" if given else ""


def _size(shape: Iterable[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _use(repo: str, described: Mapping[str, Any], program: bool) -> str:
    acting = described["acting"]
    lines = [
        "## Use",
        "With uwm_jax, in JAX; the name of this repository stands wherever a workdir is read:",
        "```bash\n"
        f"python -m uwm_jax.sample --workdir={repo} --mode={acting} --inputs=IN.npz --output=OUT.npz\n"
        f"python -m uwm_jax.evaluate --workdir={repo} --config.data.path=DATASET --output=DIR\n"
        f"python -m uwm_jax.serve --workdir={repo}\n"
        f"python -m uwm_jax.train --config=FILE.py --config.init_from={repo} --workdir=DIR\n"
        "```",
    ]
    if program:
        lines += [
            "In PyTorch, on a server for a robot, or without uwm_jax, with torch, numpy and safetensors alone:",
            f"```bash\npython -m uwm_jax.serve --export={repo}\nhf download {repo} --local-dir=DIR\n```",
            "```python\n"
            "import uwm_torch  # of DIR\n\n"
            'policy = uwm_torch.load("DIR", device="cuda")\n'
            "policy.reset(1)  # one episode; then at every control step, with a first axis of episodes:\n"
            f"action = policy.act({{{_observation(described)}}})[0]\n"
            "```",
        ]
    return "\n\n".join(lines)


def _observation(described: Mapping[str, Any]) -> str:
    keys = [*described["camera_order"], *sorted(described["low_dim"]), *(["text"] if described["text_dim"] else [])]
    return ", ".join(f'"{key}": ...' for key in keys)


def _inputs(described: Mapping[str, Any]) -> str:
    obs = len(described["window"]["obs"])
    rows = [["input", "shape", "values"]]
    for camera in described["camera_order"]:
        height, width = described["cameras"][camera]
        turned = described["flip"].get(camera)
        note = f", turned as in its dataset ({turned})" if turned else ""
        rows.append([f"`obs/{camera}`", f"({obs}, {height}, {width}, 3)", f"uint8 RGB{note}"])
    rows += [
        [f"`obs/{key}`", f"({obs}, {size})", "float32, raw units"] for key, size in sorted(described["low_dim"].items())
    ]
    if described["text_dim"]:
        encoder = described.get("text_encoder") or {}
        rows.append(
            [
                "`obs/text`",
                f"({described['text_dim']},)",
                f"embedding by {encoder.get('name', 'an encoder that is not recorded')}",
            ]
        )
    length, width = described["shapes"]["action"]
    rows.append(["`action` (output)", f"({length}, {width})", "float32, raw units, a row for each step"])
    limits = "" if not described.get("limits") else "\n\nActions are cut to the limits that `model.json` states."
    return f"## Inputs and actions\n\n{_table(rows)}{limits}"


def _data(described: Mapping[str, Any], run: Run | None) -> str:
    lines = ["## Data"]
    if run and run.manifests:
        rows = [["dataset", "splits", "trained on", "fingerprint"]]
        learned = {entry["fingerprint"] for entry in described["fingerprints"]["data"] or []}
        for source, manifest in run.manifests.items():
            splits = "; ".join(
                f"{name}: {split['episodes']:,} episodes, {split['steps']:,} steps"
                for name, split in manifest["splits"].items()
            )
            prints = ", ".join(f"`{one[:12]}`" for one in sorted(learned)) if len(run.manifests) == 1 else ""
            name = f"{manifest.get('name')} {manifest.get('version')}"
            rows.append([f"{source}: {name}" if source else name, splits, run.used.get(source, ""), prints])
        lines.append(_table(rows))
    else:
        learned_from = described["fingerprints"].get("data")
        lines.append(
            _table(
                [["fingerprint", "split"], *([f"`{one['fingerprint'][:12]}`", one["split"]] for one in learned_from)]
            )
            if learned_from
            else "What it was trained on is not recorded."
        )
    if run and (leak := run.eval_how.get("leak")):
        lines.append(f"Note: {_plain(leak)}")
    return "\n\n".join(lines)


def _training(described: Mapping[str, Any], run: Run | None) -> str:
    config = described["config"]
    facts = [f"batches of {config['batch_size']}, learning rate {config['optimizer']['learning_rate']:g}"]
    if base := _origin(config.get("init_from") or ""):
        facts.append(f"started from [{base.repo}](https://huggingface.co/{base.repo}) at {base.revision}")
    elif config.get("init_from") or (run and run.branched_from):
        facts.append("started from another run")
    if run and run.starts:
        last = run.starts[-1]
        facts.append(f"config `{os.path.basename(str(last.get('config_file', '')))}`")
        changed = ", ".join(f"`{name}={_local(value)}`" for name, value in last.get("changed", {}).items())
        facts.append(f"changed by flags: {changed}" if changed else "")
        facts.append(f"started {last.get('time', '')}")
    code = run.code_version if run and run.code_version else described["code_version"]
    facts.append(
        f"uwm_jax {code}; `model.json` has the whole config, and the fingerprint of the run is "
        f"`{described['fingerprints']['run'][:12]}`"
    )
    return "## Training\n\n" + "\n".join(f"- {_plain(fact)}" for fact in facts if fact)


def _local(value: Any) -> Any:
    """A value of a field; of an absolute path the last part alone, for the rest tells of somebody's machine."""
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def _results(described: Mapping[str, Any], run: Run | None) -> str:
    step, parts = described["step"], ["## Results"]
    measured = (
        [
            (f"held-out windows{_of_data(run)}", run.evaluations.get(step, {})),
            (f"episodes of {run.rollout_how.get('env', 'the simulator')}", run.rollouts.get(step, {})),
        ]
        if run
        else []
    )
    for of, metrics in measured:
        if not metrics:
            continue
        n = max(m.n for m in metrics.values())
        episodes = max(m.episodes for m in metrics.values())
        count = f"{n:,} {of}" if n == episodes else f"{n:,} {of}, from {episodes:,} episodes"
        parts.append(f"Step {step:,}, {count}. In brackets: 95 % intervals, clustered by episode.")
        rows = [["what", "numbers", "mean and interval"]]
        rows += [[*names.of(name), _interval(m)] for name, m in metrics.items()]
        parts.append(_table(rows))
    if len(parts) == 1:
        parts.append(f"Step {step:,} was not evaluated before it was uploaded.")
    return "\n\n".join(parts)


def _of_data(run: Run) -> str:
    return "" if run.eval_how.get("own_data", True) else " of data that is not the run's own"


def _interval(m: Interval) -> str:
    return f"{m.mean:.4g} [{m.lo:.4g}, {m.hi:.4g}]" if m.is_conclusive else f"{m.mean:.4g} (too few episodes)"


def _licence(licence: str) -> str:
    told = "The publisher named none." if licence == UNKNOWN else f"`{licence}`, of the weights."
    return f"## Licence\n\n{told} The code, uwm_jax and `uwm_torch.py`, is Apache-2.0."


def _table(rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(_plain(str(cell)) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _plain(text: str) -> str:
    """A text of a run in a line of Markdown: no markup of tables or HTML."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
