"""An export's probe, rerun in PyTorch: the largest difference to JAX's outputs for each use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from uwm_jax.conversion import probe as probe_lib
from uwm_jax.errors import RunError, UserError
from uwm_jax.files import AnyPath, Place, local_copy
from uwm_jax.reading import read_json
from uwm_jax.torch_bridge.description import DESCRIPTION, PROBE, PROGRAM, WEIGHTS
from uwm_jax.torch_bridge.npz_file import NpzArrays
from uwm_jax.torch_bridge.torch_backend import TorchBackend


class Difference(NamedTuple):
    """The largest difference of one use and the output that it is in: in normalised units, relative to the output's
    largest number where that exceeds 1; in [0, 1] units of frames."""

    use: str
    largest: float
    output: str


def check(folder: AnyPath, device: str = "cpu") -> list[Difference]:
    """Reruns the probe of an export folder.

    Raises:
      UserError: the folder is none, lacks its probe, or has an unfit one.
    """
    backend = TorchBackend(folder, device, "DIR")
    path = backend.folder / PROBE
    with NpzArrays(path, "DIR") as file:
        arrays = dict(file)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in arrays.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    inputs, noise = parts.pop("inputs", {}), parts.pop("noise", {})
    if not inputs or parts.keys() != backend.uses.keys():
        found = ", ".join(sorted(parts)) or "none"
        raise UserError(f"{path}: expected inputs and outputs of {', '.join(backend.uses)}, found those of {found}.")
    scale = backend.spec.normalizer.entries.get("action", (np.ones(1, np.float32),))[0]
    return [largest(use, backend.sample(use, inputs, noise), parts[use], scale) for use in backend.uses]


def largest(
    use: str, found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], scale: np.ndarray
) -> Difference:
    """The largest difference over all outputs.

    Args:
      found, expected: arrays of one use, keys as in `sample`'s outputs; of `found` more than those of `expected` may be
        there. Frames of uint8 may differ by one level, where two programs round a half.
      scale: (Da,) of the actions' normaliser: raw actions are compared in normalised units.

    Raises:
      UserError: an output is absent, has another shape, or holds no numbers.
    """
    differences = []
    for key, value in expected.items():
        if key not in found or found[key].shape != value.shape or value.dtype.kind not in "iuf":
            made = f"{found[key].dtype} {found[key].shape}" if key in found else "none"
            raise UserError(f"the probe's {use}/{key}: it has {value.dtype} {value.shape}, PyTorch makes {made}.")
        difference = np.abs(found[key].astype(np.float64) - value)
        if value.dtype == np.uint8:
            difference = np.where(difference > 1, difference / 255, 0)
        else:
            unit = np.abs(scale) if key == "action" else 1.0
            difference /= unit * max(1.0, float((np.abs(value) / unit).max(initial=0)))
        differences.append(Difference(use, float(np.nan_to_num(difference, nan=np.inf).max(initial=0)), key))
    return max(differences, key=lambda one: one.largest)


def refuse_differences(differences: Iterable[Difference], folder: Place) -> None:
    """Raises RunError where a use differs by more than `probe.USE`; the message says whether the weights are those that
    were exported."""
    bad = [one for one in differences if not one.largest <= probe_lib.USE]
    if not bad:
        return
    found = ", ".join(f"{one.use} by {one.largest:.1e} ({one.output})" for one in bad)
    told = _weights_told(local_copy(folder))
    raise RunError(f"{folder}: PyTorch differs from JAX's outputs by more than {probe_lib.USE:g}: {found}. {told}")


def _weights_told(folder: Path) -> str:
    with (folder / WEIGHTS).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    expected = (read_json(folder / DESCRIPTION).get("fingerprints") or {}).get("weights")
    if found != expected:
        sums = f"SHA-256 {found[:12]}, expected {str(expected)[:12]}"
        return f"{WEIGHTS} is not the file that was exported ({sums}): copy the folder again."
    return f"{WEIGHTS} is the file that was exported; {PROGRAM}, {DESCRIPTION}, {PROBE} or this PyTorch differs."
