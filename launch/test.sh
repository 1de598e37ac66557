#!/usr/bin/env bash
# From a fresh clone: environment, linter, formatter, type checker, the whole test suite.
# Usage: bash launch/test.sh [pytest arguments]    e.g. -m 'not slow', or tests/models
# PYTHON names the interpreter that makes .venv (default python3). Installs again only when pyproject.toml or the
# constraints have changed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
if [ ! -x "$python" ]; then
  "${PYTHON:-python3}" -m venv .venv
fi

stamp=.venv/installed-for-tests
wanted=$(cat pyproject.toml launch/constraints.txt | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  # data-prep with a hyphen: the pip that comes with Python 3.11 does not find the extra by the underscore.
  "$python" -m pip install --quiet --disable-pip-version-check --constraint launch/constraints.txt --editable '.[data-prep,dev]'
  echo "$wanted" > "$stamp"
fi

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# A file's tests share what they have made, so a file stays with one worker; `-n 0` runs all in one process (for --pdb).
"$python" -m pytest -n auto --maxprocesses=4 --dist=loadfile "$@"
