#!/usr/bin/env bash
# Rehearses a run of several processes on this machine's CPU, before it costs accelerator time.
# Usage: bash launch/rehearse.sh [--processes 4] [flags of uwm_jax.train]
# Without --config it trains configs/quickstart.py for a few steps in tiny form. See launch/rehearse.py.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
  echo "error: there is no .venv here: bash launch/quickstart.sh makes one, or python3 -m venv .venv and" \
    ".venv/bin/pip install -e '.[demo]'" >&2
  exit 2
fi
exec .venv/bin/python -m launch.rehearse "$@"
