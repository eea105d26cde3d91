#!/usr/bin/env bash
# Set up, then lint, types, import rules and tests. Arguments go to pytest: `scripts/test.sh -x
# tests/model`; -n 0 runs all in one process, as --pdb needs it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two processes, each with whole files: half of the time goes by waiting for processes to start.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
