"""The commands of this version, with a line about each."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import uwm_jax
from uwm_jax.ending import drop_output
from uwm_jax.errors import closest

_FOLDER = Path(uwm_jax.__file__).parent


def commands() -> Iterator[tuple[str, str]]:
    """(module, first line of its docstring) of every command, read from the source files: nothing is imported."""
    for package in ("uwm_jax", "data_prep"):
        for file in sorted((_FOLDER.parent / package).glob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            if any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "command" for node in tree.body):
                yield f"{package}.{file.stem}", (ast.get_docstring(tree) or "").partition("\n")[0]


def script_of(module: str) -> str:
    """The console script of a command: `uwm-sample-inputs` of `uwm_jax.sample_inputs`."""
    return "uwm-" + module.rpartition(".")[2].replace("_", "-")


def overview() -> str:
    """All commands, one a line."""
    known = list(commands())
    width = max(len(module) for module, _ in known)
    lines = [f"uwm_jax {uwm_jax.__version__}. {uwm_jax.__doc__}", "", "python -m ..."]
    lines += [f"  {module.ljust(width)}  {line}" for module, line in known]
    example = script_of("uwm_jax.train")
    return "\n".join([*lines, "", f"Each takes --help, and is a script where this is installed (`{example}`)."])


def main(arguments: list[str]) -> int:
    if not arguments or set(arguments) <= {"--help", "-h", "-help"}:
        try:
            print(overview(), flush=True)
        except OSError as e:  # `| head`, or a full disk
            drop_output(sys.stdout)
            if not isinstance(e, BrokenPipeError):
                print(f"error: the output cannot be written: {e.strerror}.", file=sys.stderr)
                return 1
        return 0
    names = {module.rpartition(".")[2]: module for module, _ in commands()}
    close = closest(arguments[0].replace("-", "_"), names)
    hint = f"Did you mean python -m {names[close[0]]}?" if close else "Without arguments it lists the commands."
    print(f"error: python -m uwm_jax takes no arguments, found {arguments[0]!r}. {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
