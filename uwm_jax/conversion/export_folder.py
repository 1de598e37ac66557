"""A checkpoint as a folder that runs by itself: weights, their description, a probe, and the program that runs them.

    model.safetensors   the parameters under official names
    model.json          what they mean (`conversion.to_torch.describe`), with fingerprints of weights, run and data
    probe.npz           inputs, noise and JAX's outputs of each use (`conversion.probe`)
    uwm_torch.py        the model in PyTorch (`torch_bridge/uwm_torch.py`), a copy

Of a system that `uwm_torch.py` does not run, the first two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uwm_jax import files, systems, torch_bridge
from uwm_jax.conversion import probe as probe_lib
from uwm_jax.conversion.to_torch import describe
from uwm_jax.data.robot import parse_limits
from uwm_jax.data.spec import DataSpec
from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, Place
from uwm_jax.systems.base import System
from uwm_jax.torch_bridge import layout, official_codecs, weights
from uwm_jax.torch_bridge.description import DESCRIPTION, PROBE, PROGRAM, WEIGHTS
from uwm_jax.training import codec_store, fixed_fields, inference, lineage
from uwm_jax.training.checkpoints.reader import CheckpointReader


def to_folder(
    workdir: AnyPath,
    output: AnyPath,
    step: int | None = None,
    overrides: Iterable[tuple[str, str]] = (),
    parameters: str | None = None,
    uses: Sequence[str] = (),
    limits: str | None = None,
) -> None:
    """Writes an export folder; all of it or nothing.

    Args:
      workdir: any of our workdirs.
      output: a folder that does not exist yet, or is empty.
      step, overrides, parameters: as in `to_torch`.
      uses: what the folder is to answer; () for all that the system does. A codec that none of them needs is left out.
      limits: of the robot's actions, as `parse_limits` takes them; None for none.

    Raises:
      UserError: the folder is not empty; there is no such use; limits do not fit; the run has an AdaLN that official
        checkpoints do not have.
    """
    workdir, output = files.place(workdir, "--workdir"), files.place(output, "--output")
    check_new(output)
    system, params, frozen, step = inference.load_for_inference(workdir, step, overrides, parameters)
    official = systems.official(system.config.system)
    chosen = choose_uses(system, uses, runs=official.runs)
    tensors = layout.to_official(params, official.entry_of(system.config))
    of_codec = official_codecs.tensors(system.codec, frozen, codec_store.folder(workdir, system.config))
    needs_codec = not official.runs or any(probe_lib.needs_codec(system, use) for use in chosen)
    described = describe(system, tensors | of_codec, step, workdir)
    described |= inference.parameters_used(workdir, step, parameters)
    described["uses"] = {use: described["uses"][use] for use in chosen}
    described["limits"] = describe_limits(system.spec, limits)
    notes = []
    if needs_codec:
        tensors |= of_codec
    elif of_codec:
        described["codec"]["included"] = False
        described["tensors"] = {name: told for name, told in described["tensors"].items() if name in tensors}
        size = sum(t.nbytes for t in of_codec.values()) / 1e6
        notes.append(f"without the codec, which these uses do not need ({len(of_codec)} tensors, {size:.1f} MB)")
    probe = None
    if official.runs:
        probe = probe_lib.make(system, params, frozen, chosen, workdir, step)
        described["probe"] = probe.describe()
        notes.append(f"a probe of {probe.rows} rows: {probe.source}" + (probe.why and f" ({probe.why})"))
    else:
        notes.append(f"weights and description only, since {PROGRAM} does not run {system.config.system}")
    with files.new_folder(output, last=DESCRIPTION) as staging:
        weights.write_weights(staging / WEIGHTS, dict(sorted(tensors.items())))
        described["fingerprints"] = fingerprints(staging / WEIGHTS, workdir, step)
        files.write_text(staging / DESCRIPTION, json.dumps(described, indent=2) + "\n")
        if probe is not None:
            with files.writing(staging / PROBE, "wb") as file:
                np.savez_compressed(file, **probe.arrays)  # type: ignore[arg-type]  # as in `sample`
            files.write_bytes(staging / PROGRAM, (Path(torch_bridge.__file__).parent / PROGRAM).read_bytes())
    print(f"wrote {output}: {len(tensors)} tensors of step {step}, uses {', '.join(chosen)}; {'; '.join(notes)}")


def check_new(output: Place) -> None:
    """Raises UserError unless a folder can be made at `output`, where there is none or an empty one."""
    files.check_output(output, "--output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {str(output)!r} is not empty; an export needs a folder of its own.")


def describe_limits(spec: DataSpec, limits: str | None) -> dict[str, list[float | None]] | None:
    """{"low": one number for each column of the robot's action, None for no bound, "high"}; None without limits.

    Raises:
      UserError: the limits do not fit the action, or robots of several widths acted in the data.
    """
    if limits is None:
        return None
    widths = {robot.width for robot in spec.robots.values()} or {spec.action_dim}
    if len(widths) > 1:
        raise UserError(
            f"--limits={limits}: this model's robots have actions of {sorted(widths)} numbers. Leave it out."
        )
    low, high = parse_limits(limits, widths.pop())
    return {"low": _or_none(low), "high": _or_none(high)}


def _or_none(bounds: np.ndarray) -> list[float | None]:
    return [float(x) if np.isfinite(x) else None for x in bounds]


def choose_uses(system: System, asked: Sequence[str], *, runs: bool) -> list[str]:
    """The uses that an export answers, in the system's order; all where none is asked for.

    Args:
      runs: whether `uwm_torch.py` runs the system.
    """
    known = ", ".join(system.uses)
    if asked and not runs:
        raise UserError(
            f"--uses={','.join(asked)}: {PROGRAM} does not run a {system.config.system} model, so that the export is "
            "weights and description only, and all of them. Leave the flag out."
        )
    for use in asked:
        if use not in system.uses:
            raise UserError(f"--uses={','.join(asked)}: a {system.config.system} model has no use {use!r}: {known}.")
    return [use for use in system.uses if use in asked or not asked]


def fingerprints(weights_file: Path, workdir: Place, step: int) -> dict[str, Any]:
    """{"weights": SHA-256 of the file, "run": SHA-256 of the checkpoint's config, step and digests of arrays, "data":
    the datasets that its parameters learned from (`lineage.of_checkpoint`), None where that is not known}."""
    with weights_file.open("rb") as file:
        of_weights = hashlib.file_digest(file, "sha256").hexdigest()
    stored = CheckpointReader(workdir.absolute() / "checkpoints", step)
    position = stored.data_iter if "data_iter" in stored.items else {}
    run = {"config": stored.assets["config"], "step": step, "digests": stored.assets.get("digests")}
    text = json.dumps(run, sort_keys=True, separators=(",", ":"))
    return {
        "weights": of_weights,
        "run": hashlib.sha256(text.encode()).hexdigest(),
        "data": lineage.of_checkpoint(stored.assets, position, fixed_fields.stored_config(stored)),
    }
