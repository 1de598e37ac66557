#!/usr/bin/env bash
# From a fresh clone to a report: environment, demonstration data, training, samples of all five modes.
# Usage: bash launch/quickstart.sh    (UWM_DATA_DIR, default data/, holds the dataset; PYTHON names the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'

started=$SECONDS
.venv/bin/python -m data_prep.demo
.venv/bin/python -m uwm_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
.venv/bin/python -m uwm_jax.evaluate --workdir=runs/quickstart
echo "done in $((SECONDS - started)) s after installation: open runs/quickstart/report.html"
echo "for the other commands of README.md: source .venv/bin/activate"
