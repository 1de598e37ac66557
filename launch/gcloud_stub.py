"""A stand-in for gcloud on this machine: for rehearsals of `launch.tpu`, and its tests.

It refuses every command and flag that is not in `gcloud_reference.json`, a dated table of the tool's reference. Its
TPUs wait, become active and are taken away (`Cloud.preempt`); their workers are folders, and `ssh` starts real
processes in them. It is no imitation of the service: quotas, networks and keys are not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from uwm_jax.errors import UserError, suggest

VARIABLE = "GCLOUD_STUB"  # the folder of a cloud, in the environment of its gcloud
MARK = "GCLOUD_STUB_WORKER"  # the folder of a worker, in the environment of its processes

_REFERENCE = Path(__file__).with_name("gcloud_reference.json")
_READY = {"queued-resources": "ACTIVE", "tpu-vm": "READY"}
_WAITS = {"queued-resources": ("WAITING_FOR_RESOURCES", "PROVISIONING"), "tpu-vm": ("CREATING",)}
_GONE = {"queued-resources": ("SUSPENDING", "SUSPENDED"), "tpu-vm": ("PREEMPTED",)}


class Refused(Exception):
    """What gcloud would refuse; the message goes to stderr."""


class Cloud:
    """A pretended project, in a folder.

    Args:
      image: the environment of all workers, besides HOME and the variables that name a worker to JAX.
    """

    def __init__(self, folder: Path, image: Mapping[str, str] | None = None):
        self.folder = folder
        self.programs = folder / "bin"
        if image is not None:
            self.programs.mkdir(parents=True)
            (folder / "image.json").write_text(json.dumps(dict(image)))
            python, root = shlex.quote(sys.executable), shlex.quote(str(_REFERENCE.parents[1]))
            stub = f"{VARIABLE}={shlex.quote(str(folder))} PYTHONPATH={root} exec {python} -m launch.gcloud_stub"
            self._program("gcloud", f'{stub} "$@"')
            # An environment of a worker sees what is installed here, so that it needs neither network nor its own pip.
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            self._program(version, f'[ "$1 $2" != "-m venv" ] || set -- "$@" --without-pip\nexec {python} "$@"')

    def _program(self, name: str, line: str) -> None:
        file = self.programs / name
        file.write_text(f"#!/usr/bin/env bash\n{line}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    @property
    def environ(self) -> dict[str, str]:
        """The variables with which a process finds this gcloud before any other."""
        return {"PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}"}

    def calls(self) -> list[list[str]]:
        """The arguments of all calls so far."""
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def workers(self, name: str) -> list[Path]:
        """The home directories of a TPU's workers, by slice and host."""
        return sorted((self.folder / "homes" / name).iterdir())

    def preempt(self, name: str) -> None:
        """Takes a TPU away: its processes are killed, its disks are gone."""
        with self._locked() as tpus:
            tpu = tpus[name]
            self._end(name)
            tpu["states"] = list(_GONE[tpu["group"]])

    def call(self, arguments: Sequence[str]) -> int:
        """One call of gcloud; returns its exit status."""
        with (self.folder / "calls").open("a") as file:
            file.write(json.dumps(list(arguments)) + "\n")
        words, names, flags = check(arguments)
        group, action = words[-2:]
        if group == "buckets":
            known = json.loads((self.folder / "buckets.json").read_text())
            bucket = names[0].removeprefix("gs://").strip("/")
            if bucket not in known:
                raise Refused(f"gs://{bucket} not found: 404. NOT_FOUND")
            print(json.dumps({"name": bucket, **known[bucket]}))
            return 0
        if group == "versions":
            print((self.folder / "secrets" / flags["--secret"]).read_text(), end="")
            return 0
        action_of: dict[str, Callable[..., int]] = {
            "create": self._create,
            "describe": self._describe,
            "delete": self._delete,
            "ssh": self._ssh,
            "scp": self._scp,
        }
        return action_of[action](group, names, flags)

    def _create(self, group: str, names: Sequence[str], flags: Mapping[str, str]) -> int:
        (name,) = names
        labels = dict(pair.split("=") for pair in flags.get("--labels", "").split(",") if pair)
        kind, _, size = flags["--accelerator-type"].rpartition("-")
        chips = int(size) // (2 if kind in ("v4", "v5p") else 1)
        hosts = 1 if chips <= 4 or (kind == "v5litepod" and chips == 8) else chips // 4
        slices = int(flags.get("--node-count", "1"))
        with self._locked() as tpus:
            if name in tpus:
                raise Refused(f"ALREADY_EXISTS: Resource {name!r} already exists")
            states = [*_WAITS[group], _READY[group]]
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            tpus[name] = {
                "group": group,
                "states": states,
                "labels": labels,
                "hosts": hosts,
                "slices": slices,
                "port": port,
            }
        for number in range(slices * hosts):
            (self.folder / "homes" / name / f"{number:03}").mkdir(parents=True)
        return 0

    def _describe(self, group: str, names: Sequence[str], flags: Mapping[str, str]) -> int:
        (name,) = names
        with self._locked() as tpus:
            tpu = self._find(tpus, group, name)
            state = tpu["states"][0]
            if len(tpu["states"]) > 1:  # each look is a moment later
                tpu["states"].pop(0)
        if group == "tpu-vm":
            print(json.dumps({"name": name, "state": state, "labels": tpu["labels"]}))
        else:
            nodes = [{"nodeId": name, "node": {"labels": tpu["labels"]}}] * tpu["slices"]
            print(json.dumps({"name": name, "state": {"state": state}, "tpu": {"nodeSpec": nodes}}))
        return 0

    def _delete(self, group: str, names: Sequence[str], flags: Mapping[str, str]) -> int:
        (name,) = names
        with self._locked() as tpus:
            tpu = self._find(tpus, group, name)
            if (
                group == "queued-resources"
                and "--force" not in flags
                and tpu["states"][0] not in ("SUSPENDED", "FAILED")
            ):
                raise Refused(f"FAILED_PRECONDITION: {name} is {tpu['states'][0]}: its nodes must be deleted first")
            self._end(name)
            del tpus[name]
        return 0

    def _ssh(self, group: str, names: Sequence[str], flags: Mapping[str, str]) -> int:
        chosen = self._reach(group, names[0], flags)
        running = [
            subprocess.Popen(["bash", "-c", flags["--command"]], cwd=home, env=env, stdin=subprocess.DEVNULL)
            for home, env in chosen
        ]
        return max(abs(process.wait()) for process in running)

    def _scp(self, group: str, names: Sequence[str], flags: Mapping[str, str]) -> int:
        *sources, target = names
        name, _, folder = target.partition(":")
        for home, _ in self._reach(group, name, flags):
            for source in sources:
                shutil.copy(source, home / folder)
        return 0

    def _reach(self, group: str, name: str, flags: Mapping[str, str]) -> list[tuple[Path, dict[str, str]]]:
        """(home directory, environment) of the workers that `--node` and `--worker` name."""
        with self._locked() as tpus:
            tpu = self._find(tpus, group, name)
            if tpu["states"][0] != _READY[group]:
                raise Refused(f"{name} is {tpu['states'][0]}: cannot be reached by SSH")
        image = json.loads((self.folder / "image.json").read_text())
        count, found = tpu["slices"] * tpu["hosts"], []
        for number, home in enumerate(self.workers(name)):
            node, worker = divmod(number, tpu["hosts"])
            if flags.get("--node", "0") in ("all", str(node)) and flags.get("--worker", "0") in ("all", str(worker)):
                place = {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{tpu['port']}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(number),
                }
                env = {**self.environ, **image, **(place if count > 1 else {}), "HOME": str(home), MARK: str(home)}
                found.append((home, env))
        return found

    def _find(self, tpus: Mapping[str, Any], group: str, name: str) -> dict[str, Any]:
        if name not in tpus or tpus[name]["group"] != group:
            raise Refused(f"NOT_FOUND: Resource {name!r} was not found")
        return tpus[name]

    def _end(self, name: str) -> None:
        """Kills the processes of all workers of a TPU, and deletes their disks."""
        homes = self.folder / "homes" / name
        for _ in range(100):
            left = [pid for pid, home in _processes() if Path(home).is_relative_to(homes)]
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(homes, ignore_errors=True)

    def end(self) -> None:
        """Kills the processes of all workers."""
        for home in (self.folder / "homes").glob("*"):
            self._end(home.name)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        """The TPUs by name, which nobody else reads or changes meanwhile."""
        with (self.folder / "tpus.json").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            tpus = json.loads(file.read() or "{}")
            yield tpus
            file.seek(0)
            file.truncate()
            file.write(json.dumps(tpus))


def check(arguments: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """(words of the command, positional arguments, flags) of a call that the reference allows.

    Raises:
      Refused: it has no such command or flag, or one that is required is missing.
    """
    reference = json.loads(_REFERENCE.read_text())
    words = [name.split() for name in reference["commands"] if list(arguments[: len(name.split())]) == name.split()]
    if not words:
        raise Refused(f"Invalid choice: {' '.join(arguments[:4])!r}: not in the reference of {reference['read']}")
    command = reference["commands"][" ".join(words[0])]
    known = {flag.rstrip("="): flag.endswith("=") for flag in (*command["flags"], *reference["wide"])}
    names, flags = [], {}
    for argument in arguments[len(words[0]) :]:
        flag, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            names.append(argument)
        elif flag not in known:
            raise Refused(
                f"unrecognized arguments: {argument}{suggest(flag, known)} (reference of {reference['read']})"
            )
        elif known[flag] != bool(equals):
            raise Refused(f"argument {flag}: expected {'a value' if known[flag] else 'no value'}")
        else:
            flags[flag] = value
    least, most = command["positional"]
    if not least <= len(names) <= most:
        raise Refused(f"{' '.join(words[0])}: expected {least} to {most} names, found {names}")
    for group in command["required"]:
        if not flags.keys() & set(group):
            raise Refused(f"{' '.join(words[0])}: {' or '.join(group)} must be specified")
    for group in command["exclusive"]:
        if len(flags.keys() & set(group)) > 1:
            raise Refused(f"{' '.join(words[0])}: at most one of {', '.join(group)} may be specified")
    return words[0], names, flags


def _processes() -> list[tuple[int, str]]:
    """(pid, folder of its worker) of the processes of all workers, as /proc has them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                for variable in (entry / "environ").read_bytes().split(b"\0"):
                    name, _, value = variable.decode(errors="replace").partition("=")
                    if name == MARK:
                        found.append((int(entry.name), value))
    return found


def main() -> int:
    if not (folder := os.environ.get(VARIABLE)):
        raise UserError(f"{VARIABLE} names no folder of a cloud.")
    try:
        return Cloud(Path(folder)).call(sys.argv[1:])
    except Refused as e:
        print(f"ERROR: (gcloud) {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
