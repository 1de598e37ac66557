"""Stubs of programs that launchers call: they know the subcommands and flags below, refuse others, and keep calls.

They are in the references of the tools: kubernetes.io/docs/reference/kubectl, docs.docker.com/reference/cli,
slurm.schedmd.com/man_index.html.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

FLAGS = {
    "kubectl create": ("filename", "context", "namespace"),
    "kubectl get": ("selector", "output", "context", "namespace"),
    "kubectl logs": ("selector", "follow", "tail", "context", "namespace"),
    "kubectl delete": ("context", "namespace"),
    "docker build": ("file", "platform", "build-arg", "tag"),
    "docker push": (),
    "sbatch": (
        *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "time", "signal", "requeue", "open-mode"),
        *("output", "export", "partition", "account", "dependency"),
    ),
    "srun": ("kill-on-bad-exit", "export"),
    "squeue": ("user", "name"),
    "scancel": ("user", "name"),
}

STUB = """#!{python}
import json, sys
name, arguments = {name!r}, sys.argv[1:]
text = sys.stdin.read() if not sys.stdin.isatty() else ""
with open({calls!r}, "a") as file:
    file.write(json.dumps([name, *arguments]) + "\\n")
if text:
    open({text!r}, "w").write(text)
"""


def install(folder: Path, *names: str) -> None:
    """Makes stubs of programs in a folder, which keeps their calls."""
    folder.mkdir(exist_ok=True)
    for name in names:
        file = folder / name
        calls, text = str(folder / "calls.jsonl"), str(folder / "stdin")
        file.write_text(STUB.format(python=sys.executable, name=name, calls=calls, text=text))
        file.chmod(0o755)


def calls(folder: Path) -> list[list[str]]:
    """Those so far, which the references allow."""
    file = folder / "calls.jsonl"
    made = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for call in made:
        check(call)
    return made


def check(call: Sequence[str]) -> None:
    """Fails where the references know no such subcommand or flag."""
    key = call[0] if call[0] in FLAGS else " ".join(call[:2])
    assert key in FLAGS, call
    for word in call[1:]:
        if word.startswith("-"):
            assert word.startswith("--") and word.partition("=")[0][2:] in FLAGS[key], f"{word} of {' '.join(call)}"
