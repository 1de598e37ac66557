"""Torch's side of the comparison in a process of its own, as its users run it.

Our commands tell the C library to keep the memory that a step frees (`host_memory`), which makes torch's training a
fourth faster than it is in a script of one's own; in a process of its own it meets the C library's defaults. Its
threads do not wait next to ours either. The process answers one JSON line for each that it reads.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uwm_jax.benchmarking import clock
from uwm_jax.errors import RunError


class TorchProcess(contextlib.AbstractContextManager["TorchProcess"]):
    """Runs rows of `torch_rows.TorchRows`, whose arguments these are; ends with the context.

    Raises:
      RunError: the process ended; the message has the last line that it printed.
    """

    def __init__(self, description: Mapping[str, Any], rows: Sequence[str]):
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "uwm_jax.benchmarking.torch_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.threads = int(self._ask({"description": description, "rows": list(rows)}))

    def load(self, row: str, arrays: Mapping[str, Any]) -> bool:
        """Makes ready the row that `block` repeats; False where torch lacks what it needs (diffusers)."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "inputs.npz"
            np.savez(path, **{name: np.asarray(x) for name, x in arrays.items()})  # type: ignore[arg-type]
            return bool(self._ask({"row": row, "inputs": str(path)}))

    def block(self, count: int) -> tuple[float, float]:
        """As `clock.block`, of the row that was loaded last."""
        wall, cpu = self._ask({"repeat": count})
        return wall, cpu

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["probably because the machine's memory was full"]
            raise RunError(f"--torch: the process that runs torch ended with status {status}: {last[0]}")
        return json.loads(answer)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # which ends it
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def main() -> None:
    """Answers requests from the standard input until it ends."""
    from uwm_jax.benchmarking.torch_rows import TorchRows, threads

    side: Any = None
    call: Any = None

    def repeat(count: int) -> None:
        for _ in range(count):
            call()

    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        if "description" in request:
            side, answer = TorchRows(request["description"], request["rows"]), threads()
        elif "row" in request:
            with np.load(request["inputs"]) as arrays:
                call = side.call(request["row"], dict(arrays))
            answer = call is not None
        else:
            answer = clock.block(repeat, request["repeat"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
