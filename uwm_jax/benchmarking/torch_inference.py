"""The uses of an export folder in PyTorch, in a process of its own, as its users run it. Imports no JAX."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uwm_jax.benchmarking import clock
from uwm_jax.benchmarking.child import Child, serve

TORCH, GRAPHS, OFFICIAL = TORCH_SIDES = ("uwm_torch", "uwm_torch_graphs", "official")

Outputs = dict[str, np.ndarray]
Answer = Callable[[], Outputs]


class TorchSide(Child):
    """Runs one side.

    Args:
      side: `uwm_torch`, `uwm_torch_graphs` or `official`.
      device: `cpu` or `cuda`.

    Raises:
      RunError: the process ended; the message has the last line that it printed.
    """

    def __init__(self, side: str, device: str):
        super().__init__("uwm_jax.benchmarking.torch_inference", f"the process of {side}")
        told = self.ask({"side": side, "device": device})
        self.version, self.threads = str(told["version"]), int(told["threads"])

    def load(self, folder: Path) -> None:
        """Loads the model of an export folder in place of the one before."""
        self.ask({"folder": str(folder)})

    def first(self, use: str, inputs: Mapping[str, np.ndarray], noise: Mapping[str, np.ndarray]) -> Outputs:
        """Answers a use for the first time: what `calls` repeats."""
        with tempfile.TemporaryDirectory() as folder:
            given, made = (Path(folder) / name for name in ("in.npz", "out.npz"))
            arrays = {**inputs, **{f"noise/{m}": x for m, x in noise.items()}}
            np.savez(given, **arrays)  # type: ignore[arg-type]
            self.ask({"use": use, "inputs": str(given), "outputs": str(made)})
            with np.load(made) as found:
                return dict(found)

    def calls(self, count: int) -> list[float]:
        """As `clock.calls`, of the use that was answered last."""
        return [float(seconds) for seconds in self.ask({"calls": count})]


def main() -> None:
    """Answers requests from the standard input until it ends."""
    import torch

    from uwm_jax.benchmarking.torch_answers import Official, program_of
    from uwm_jax.benchmarking.torch_rows import threads

    side = device = ""
    model: Any = None
    call: Answer = dict

    def answer(request: dict[str, Any]) -> Any:
        nonlocal side, device, model, call
        if "side" in request:
            side, device = request["side"], request["device"]
            torch.set_num_threads(threads())
            return {"version": torch.__version__, "threads": torch.get_num_threads()}
        if "folder" in request:
            model, call = None, dict  # the one before, whose memory the next one needs
            folder = Path(request["folder"])
            model = Official(folder, device) if side == OFFICIAL else program_of(folder, device, side == GRAPHS)
            return None
        if "use" in request:
            with np.load(request["inputs"]) as arrays:
                both = dict(arrays)
            noise = {name.removeprefix("noise/"): x for name, x in both.items() if name.startswith("noise/")}
            inputs = {name: x for name, x in both.items() if not name.startswith("noise/")}
            call = functools.partial(model.sample, request["use"], inputs, noise)
            np.savez(request["outputs"], **call())
            return None
        return clock.calls(call, request["calls"])

    serve(answer)


if __name__ == "__main__":
    main()
