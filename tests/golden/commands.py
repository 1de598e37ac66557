"""Golden sets through the real commands: official weights become a workdir, which is sampled and converted back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.golden import reference
from uwm_jax import cli, convert, sample


def run(module: ModuleType, *arguments: str) -> None:
    """Runs a command in this process."""
    assert cli.call(module.main, [module.__name__, *arguments], module.define_flags) == 0


@dataclasses.dataclass(frozen=True)
class Converted:
    """A golden set as `convert from-torch` made a workdir of it."""

    name: str
    folder: Path
    g: dict[str, np.ndarray]

    @classmethod
    def make(cls, name: str, folder: Path) -> Converted:
        g, weights, normalizer = reference.numbers(name), folder / "official.safetensors", folder / "normalizer.npz"
        save_file(reference.weights(name), weights)
        np.savez(normalizer, **{f"action/{part}": g[f"action_{part}"] for part in ("scale", "offset")})
        official = f"--official-config={reference.official_yaml(name)}"
        given = f"--input={weights}", official, f"--normalizer={normalizer}"
        run(convert, "from-torch", *given, f"--workdir={folder / 'run'}")
        return cls(name, folder, g)

    def sample(self, mode: str, draws: dict[str, np.ndarray], *flags: str) -> dict[str, np.ndarray]:
        """OUT of the sample command for the golden observations and actions (raw units), in PyTorch's layouts but for
        frames, which are channels last."""
        arrays = {k: x for k, x in self.g.items() if k.startswith(("obs/", "next_obs/"))}
        np.savez(self.folder / "in.npz", **arrays, action=self.g["action"], **draws)
        inputs, output = f"--inputs={self.folder / 'in.npz'}", f"--output={self.folder / 'out.npz'}"
        run(sample, f"--workdir={self.folder / 'run'}", f"--mode={mode}", inputs, output, *flags)
        with np.load(self.folder / "out.npz", allow_pickle=False) as file:
            return dict(file)

    def assert_round_trip(self) -> None:
        """`convert to-torch` gives the bits and names that from-torch was given, also with its own description."""
        back, again = self.folder / "back.safetensors", self.folder / "again.safetensors"
        run(convert, "to-torch", f"--workdir={self.folder / 'run'}", f"--output={back}")
        described = f"--official-config={back.with_suffix('.json')}"
        run(convert, "from-torch", f"--input={back}", described, f"--workdir={self.folder / 'second'}")
        run(convert, "to-torch", f"--workdir={self.folder / 'second'}", f"--output={again}")
        wanted = reference.weights(self.name)
        for found in (load_file(back), load_file(again)):
            assert found.keys() == wanted.keys()
            assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
