#!/usr/bin/env bash
# From a fresh clone: environment, linter, formatter, type checker, the whole test suite.
# Usage: bash launch/test.sh [pytest arguments]    e.g. -m 'not slow', or tests/models
# PYTHON names the interpreter that makes .venv (default python3). Installs again only when pyproject.toml, the
# constraints or this file have changed.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
if [ ! -x "$python" ]; then
  "${PYTHON:-python3}" -m venv .venv
fi

stamp=.venv/installed-for-tests
wanted=$(cat pyproject.toml launch/constraints.txt launch/test.sh | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  # data-prep with a hyphen: the pip that comes with Python 3.11 does not find the extra by the underscore.
  "$python" -m pip install --quiet --disable-pip-version-check --constraint launch/constraints.txt --editable '.[data-prep,dev]'
  # The robots' client of openpi, which the tests of the policy server use unmodified. It asks for numpy 1 but runs with
  # numpy 2, so that it comes without what it asks for, and what its modules import is named here.
  "$python" -m pip install --quiet --disable-pip-version-check 'dm-tree>=0.1.8' msgpack pillow typing-extensions websockets
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps 'openpi-client>=0.1.2,<0.2'
  echo "$wanted" > "$stamp"
fi

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# A file's tests share what they have made, so a file stays with one worker; `-n 0` runs all in one process (for --pdb).
"$python" -m pytest -n auto --maxprocesses=4 --dist=loadfile "$@"
