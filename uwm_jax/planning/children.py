"""One child process for each compilation, and a cache of its answers.

A compilation takes minutes and gigabytes; in a process of its own its memory is given back, jax starts with the
environment that TPU topologies need, and one that dies is a row of the table.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import uwm_jax
from uwm_jax import host_tpu
from uwm_jax.errors import warn
from uwm_jax.files import write_text
from uwm_jax.reading import read_json

Answer = dict[str, Any]  # {"facts": ...} or {"failure": {"kind", "message", ...}}, with "seconds" and "cached"
Say = Callable[[str], None]

CACHE_VARIABLE = "XDG_CACHE_HOME"
SAY_EVERY = 30.0  # seconds of one stage between lines
_NOT_CACHED = ("config", "process")  # kinds of failures that the next call may not have

# Before jax starts: no search for a TPU and none of its worker hosts, and several such processes at once.
TPU_ENVIRONMENT = {
    **host_tpu.ABSENT,
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # libtpu's threads have 64 KiB of stack, on which a pass over the schedule of a large v6e program, which calls
    # itself for every user of an instruction, ends in a segmentation fault.
    "LIBTPU_INIT_ARGS": "--fibers_default_thread_stack_size=16777216 --default_thread_stack_size=16777216",
}


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/uwm_jax/plan`, by default below `~/.cache`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache") / "uwm_jax" / "plan"


def ask(request: Mapping[str, Any], *, name: str, cache: Path | None, say: Say) -> Answer:
    """The answer of `child` to a request.

    Args:
      name: of the topology, for lines about progress.
      cache: directory of answers by fingerprint; None for none.
      say: prints a line.
    """
    if known := recall(request, cache):
        return known
    file = _file(request, cache)
    began = time.monotonic()
    answer = _in_child(request, name, say)
    answer["seconds"] = time.monotonic() - began
    say(f"{name}: {'failed' if 'failure' in answer else 'planned'} after {answer['seconds']:.0f} s")
    if file and not _may_change(answer):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(answer))
        except OSError as e:
            warn(f"--cache: {file.parent} cannot be written ({e.strerror}): the next call compiles again.")
    return {**answer, "cached": False}


def recall(request: Mapping[str, Any], cache: Path | None) -> Answer | None:
    """The answer to a request that `ask` has kept; None if there is none that can be read."""
    file = _file(request, cache)
    if file and file.exists():
        with contextlib.suppress(Exception):  # an unreadable answer is made again
            return {**read_json(file), "cached": True}
    return None


def _file(request: Mapping[str, Any], cache: Path | None) -> Path | None:
    return cache / f"{fingerprint(request)}.json" if cache and request["description"] is not None else None


def _may_change(answer: Answer) -> bool:
    """Whether the next call may have another answer to the same request."""
    failure = answer.get("failure")
    return (failure["kind"] if failure else answer["facts"].get("evaluation_failure_kind")) in _NOT_CACHED


def fingerprint(request: Mapping[str, Any]) -> str:
    """Identifies what an answer depends on: the request, the versions of libraries, our source, and what
    the environment tells JAX and libtpu."""
    versions = {name: _version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax")}
    environment = {k: v for k, v in _tpu_environment().items() if k.startswith(("JAX_", "LIBTPU_"))}
    about = {"request": request, "versions": versions, "source": _source(), "environment": environment}
    content = json.dumps(about, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source() -> str:
    folder = Path(uwm_jax.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _tpu_environment() -> dict[str, str]:
    """The environment of a child that compiles for a topology; flags of libtpu that the user sets come last and win."""
    environment = {**os.environ, **TPU_ENVIRONMENT}
    flags = (TPU_ENVIRONMENT["LIBTPU_INIT_ARGS"], os.environ.get("LIBTPU_INIT_ARGS", ""))
    environment["LIBTPU_INIT_ARGS"] = " ".join(flags).strip()
    environment.pop("XLA_FLAGS", None)  # such as simulated devices, which a TPU run does not have
    return environment


def _in_child(request: Mapping[str, Any], name: str, say: Say) -> Answer:
    environment = dict(os.environ) if request["description"] is None else _tpu_environment()
    command = [sys.executable, "-m", "uwm_jax.planning.child"]
    with tempfile.TemporaryFile("w+") as noise:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True, env=environment
        )
        try:
            return _converse(process, request, name, say, noise)
        finally:
            process.kill()
            process.wait()


def _converse(process: Any, request: Mapping[str, Any], name: str, say: Say, noise: Any) -> Answer:
    clock, found = _Clock(name, say), {}
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps({**request, "parent": os.getpid()}))
        process.stdin.close()
    with clock:
        for line in process.stdout:
            try:
                told = json.loads(line)
            except ValueError:  # a line for people
                say(f"{name}: {line.rstrip()}")
                continue
            if "stage" in told:
                clock.stage(told["stage"])
            else:
                found = told
    status = process.wait()
    if found:
        return found
    noise.seek(0)
    last = [line for line in noise.read().splitlines() if line.strip()][-1:]
    said = last[0].strip() if last else "it said nothing"
    if status == -signal.SIGKILL:
        said = "probably because the machine's memory was full"
    how = f"status {status}" if status >= 0 else f"signal {-status} ({signal.strsignal(-status)})"
    return {"failure": {"kind": "process", "message": f"the compiling process ended with {how}: {said}"}}


class _Clock:
    """Says at which stage a child is, when it enters one and every `SAY_EVERY` seconds."""

    def __init__(self, name: str, say: Say):
        self._name, self._say = name, say
        self._stage, self._since = "starting", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def stage(self, stage: str) -> None:
        self._stage, self._since = stage, time.monotonic()
        self._say(f"{self._name}: {stage}")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ended.wait(SAY_EVERY):
            self._say(f"{self._name}: {self._stage}, {time.monotonic() - self._since:.0f} s")
