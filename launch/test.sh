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
  # A robot's machine may have numpy 1: our own client is tested in an environment with it, where this Python has a wheel.
  "$python" -m venv .venv/numpy1
  "$python" -m pip --python .venv/numpy1 install --quiet --disable-pip-version-check --only-binary=:all: 'numpy<2' msgpack websockets ||
    echo "launch/test.sh: there is no numpy 1 for this Python, so the test of a client under it is skipped." >&2
  # Beam wants an older protobuf: its tests run in an environment with both on top of .venv's packages.
  beam=.venv/beam/bin/python
  "$python" -m venv --without-pip .venv/beam
  below=$("$python" -c 'import site; print(site.getsitepackages()[0])')
  packages=$("$beam" -c 'import site; print(site.getsitepackages()[0])')
  echo "$below" > "$packages/below.pth"
  "$beam" -m pip install --quiet --disable-pip-version-check --only-binary=:all: 'apache-beam>=2.60,<3' 2> .venv/beam/pip.log || {
    cat .venv/beam/pip.log >&2
    rm -r .venv/beam
    echo "launch/test.sh: Apache Beam cannot be installed for this Python, so the tests on its pipelines are skipped." >&2
  }
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
