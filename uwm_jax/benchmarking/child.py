"""A process of one side of a comparison, which answers one JSON line for each that it reads."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Self

from uwm_jax.errors import RunError


class Child:
    """Runs a module, whose `main` calls `serve`; use it in a `with`, whose end ends it.

    Args:
      module: its name.
      what: the process, for a message such as "--torch: the process that runs torch".

    Raises:
      RunError: the process ended; the message has the last line that it printed.
    """

    def __init__(self, module: str, what: str):
        self._what, self._errors = what, tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The answer to a request, JSON values both."""
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["probably because the machine's memory was full"]
            raise RunError(f"{self._what} ended with status {status}: {last[0]}")
        return json.loads(answer)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # which ends it
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def serve(answer: Callable[[dict[str, Any]], Any]) -> None:
    """Answers requests from the standard input until it ends."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
