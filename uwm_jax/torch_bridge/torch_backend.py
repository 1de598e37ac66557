"""An export folder as a backend: PyTorch runs it, by the `uwm_torch.py` that lies in the folder.

That file is a program, and loading a folder runs it with the rights of the caller: load only exports that you trust
(SECURITY.md). torch is imported by it alone, when a folder is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from uwm_jax.backend import Arrays, Backend, Noise, drawing
from uwm_jax.errors import UserError
from uwm_jax.files import AnyPath, Place, as_place, local_copy
from uwm_jax.systems.base import Promised, Use, draw_normal
from uwm_jax.torch_bridge import description
from uwm_jax.torch_bridge.description import DESCRIPTION, PROGRAM, WEIGHTS


class TorchBackend(Backend):
    """A model of an export folder.

    Args:
      folder: as `convert to-torch --output=DIR/` writes it.
      device: torch's name of a device, such as `cpu` or `cuda`.
      flag: names the folder in messages.

    Attributes:
      model: the folder's own policy, as `uwm_torch.load` makes it.
      description: `model.json`.
      limits: the stated (low, high) of the robot's actions, each (Dr,) with -inf and inf for no bound; None for none.

    Raises:
      UserError: the folder lacks a file, or has an unfit one; the export is of a system that `uwm_torch.py` does not
        run; torch or safetensors is not installed; there is no such device.
    """

    can_promise = True

    def __init__(self, folder: AnyPath, device: str = "cpu", flag: str = "--export"):
        self.folder = as_place(folder)
        where = f"{flag}={self.folder}"
        _require_files(self.folder, where)
        described = description.read(self.folder / DESCRIPTION, flag)
        stored = described.stored
        self.system, self.description = described.config.system, stored
        self.config, self.spec = described.config, described.spec
        self.step, self.parameters = described.step, described.parameters
        if not (self.folder / PROGRAM).is_file():
            raise UserError(
                f"{where}: there is no {PROGRAM}; an export of {self.system} may hold weights and their description "
                "only. Use the workdir, or make one of the export with `convert from-torch`."
            )
        try:
            self.uses = {name: Use(tuple(use["makes"]), tuple(use["given"])) for name, use in stored["uses"].items()}
            acting = str(stored["acting"])
            self.acting = acting if acting in self.uses else ""
            self._noise = {m: tuple(map(int, shape)) for m, shape in stored["noise"].items()}
            self._sampling = dict(stored["sampling"])
            self.limits = _limits(stored["limits"])
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{where}: {DESCRIPTION} lacks a field of export folders ({type(e).__name__}: {e}).") from e
        local = local_copy(self.folder)
        load = getattr(load_program(local / PROGRAM, where), "load", None)
        if load is None:
            raise UserError(f"{where}: {PROGRAM} has no function load; export the model again.")
        try:
            self.model = load(local, device=device)
        except Exception as e:  # of a program that need not be of this version
            told = e if isinstance(e, ValueError | RuntimeError | OSError) else f"{type(e).__name__}: {e}"
            raise UserError(f"{where}: {PROGRAM} cannot load it on the device {device!r}: {told}") from e

    def noise(self, use: str, seed: int, seeds: np.ndarray, decisions: np.ndarray) -> dict[str, np.ndarray]:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            numbers = np.uint32(seed), np.asarray(seeds, np.uint32), np.asarray(decisions, np.uint32)
            return {m: np.asarray(x) for m, x in _draw(tuple(self._noise.items()))(*numbers).items()}

    def sample(
        self,
        use: str,
        inputs: Mapping[str, np.ndarray],
        noise: Noise,
        promised: Promised | None = None,
        *,
        guided: bool = False,
        actions_only: bool = False,
    ) -> Arrays:
        """As `Backend.sample`.

        Raises:
          UserError: the export does not answer this use, or an input does not fit; named.
        """
        if use not in self.uses:
            raise UserError(f"{self.folder}: this export answers {', '.join(self.uses)}; found {use!r}.")
        arrays = {m: np.asarray(x) for m, x in noise.items()}
        rows = None if promised is None else tuple(np.asarray(x) for x in promised)
        try:
            made = self.model.sample(use, dict(inputs), noise=arrays, promised=rows, guided=guided)
        except ValueError as e:
            raise UserError(f"{self.folder}: {e}") from e
        return {key: np.asarray(x) for key, x in made.items() if not actions_only or key.startswith("action")}

    def describe_sampling(self) -> dict[str, Any]:
        return self._sampling


def _limits(stored: Mapping[str, Any] | None) -> tuple[np.ndarray, np.ndarray] | None:
    if stored is None:
        return None
    sides = ("low", -np.inf), ("high", np.inf)
    low, high = (np.asarray([none if x is None else x for x in stored[name]], np.float32) for name, none in sides)
    return low, high


def _require_files(folder: Place, where: str) -> None:
    if not folder.is_dir():
        raise UserError(f"{where}: there is no such folder. Expected one that `convert to-torch --output=DIR/` wrote.")
    if missing := [name for name in (DESCRIPTION, WEIGHTS) if not (folder / name).is_file()]:
        raise UserError(
            f"{where}: it has no {' and no '.join(missing)}. Expected a folder that `convert to-torch --output=DIR/` "
            "wrote."
        )


def load_program(path: Path, where: str) -> ModuleType:
    """Runs an export's own program and returns it as a module.

    Raises:
      UserError: it cannot be imported; `where` names the export.
    """
    name = f"uwm_torch_of_{abs(hash(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        raise UserError(
            f"{where}: {path.name} needs {e.name}, which is not installed: pip install 'uwm-jax[torch]'."
        ) from e
    except Exception as e:
        raise UserError(f"{where}: {path.name} is not a program that can be run ({type(e).__name__}: {e}).") from e
    return module


@functools.lru_cache(maxsize=8)
def _draw(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Any:
    return drawing(lambda key, rows: draw_normal(key, rows, dict(shapes)))
