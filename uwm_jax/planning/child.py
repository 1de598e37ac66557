"""The child process that answers a request of `children`.

The parent sets the environment before jax starts, writes a request to the standard input, and reads JSON lines from the
standard output: `{"stage": ...}` on the way, `{"facts": ...}` or `{"failure": ...}` at the end.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from uwm_jax import ending, host_memory
from uwm_jax.errors import UserError
from uwm_jax.planning import compiling, measuring


def main() -> None:
    """Answers the request on the standard input."""
    host_memory.keep_freed()  # as commands do
    request = json.load(sys.stdin)
    ending.end_with(request["parent"])  # compiling takes minutes, in which nobody writes to a closed output
    with _answering():
        _tell("lowering the step")
        prepared, lowering = _timed(lambda: compiling.prepare(request))
        _tell("compiling the step")
        try:
            step, compiled = _timed(lambda: compiling.compiled(prepared.program.mesh, prepared.lowered))
        except MemoryError as e:
            found = compiling.verdict(str(e)) | {"facts": compiling.facts_before(prepared)}
            return _write({"failure": {"kind": "memory", **found}})
        _tell("reading the program")
        facts = compiling.facts_of(prepared, step)
        if request["measure"]:
            _tell("running the step")
            facts |= measuring.measure(prepared, step)
        del step
        _tell("compiling evaluations")
        found, evaluating = _timed(lambda: compiling.evaluations(prepared))
        seconds = {"lowering": lowering, "compiling": compiled, "evaluations": evaluating}
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _write({"facts": {**facts, **found, "compile_seconds": seconds, "host_bytes": host}})


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Turns what a user can mend into an answer."""
    try:
        yield
    except UserError as e:
        _write({"failure": {"kind": "config", "message": str(e)}})


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def _tell(stage: str) -> None:
    _write({"stage": stage})


def _write(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
