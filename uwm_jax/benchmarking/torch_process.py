"""Torch's side of the comparison in a process of its own, as its users run it.

Our commands tell the C library to keep the memory that a step frees (`host_memory`), which makes torch's training a
fourth faster than it is in a script of one's own; in a process of its own it meets the C library's defaults. Its
threads do not wait next to ours either.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uwm_jax.benchmarking import clock
from uwm_jax.benchmarking.child import Child, serve


class TorchProcess(Child):
    """Runs rows of `torch_rows.TorchRows`, whose arguments these are; ends with the context.

    Raises:
      RunError: the process ended; the message has the last line that it printed.
    """

    def __init__(self, description: Mapping[str, Any], rows: Sequence[str]):
        super().__init__("uwm_jax.benchmarking.torch_process", "--torch: the process that runs torch")
        self.threads = int(self.ask({"description": description, "rows": list(rows)}))

    def load(self, row: str, arrays: Mapping[str, Any]) -> bool:
        """Makes ready the row that `block` repeats; False where torch lacks what it needs (diffusers)."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "inputs.npz"
            np.savez(path, **{name: np.asarray(x) for name, x in arrays.items()})  # type: ignore[arg-type]
            return bool(self.ask({"row": row, "inputs": str(path)}))

    def block(self, count: int) -> tuple[float, float]:
        """As `clock.block`, of the row that was loaded last."""
        wall, cpu = self.ask({"repeat": count})
        return wall, cpu


def main() -> None:
    """Answers requests from the standard input until it ends."""
    from uwm_jax.benchmarking.torch_rows import TorchRows, threads

    side: Any = None
    call: Any = None

    def repeat(count: int) -> None:
        for _ in range(count):
            call()

    def answer(request: dict[str, Any]) -> Any:
        nonlocal side, call
        if "description" in request:
            side = TorchRows(request["description"], request["rows"])
            return threads()
        if "row" in request:
            with np.load(request["inputs"]) as arrays:
                call = side.call(request["row"], dict(arrays))
            return call is not None
        return clock.block(repeat, request["repeat"])

    serve(answer)


if __name__ == "__main__":
    main()
