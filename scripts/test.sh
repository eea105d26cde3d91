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
# A test that hangs ends its process, with the stacks of its threads, and that ends the whole: what
# xdist starts in its place may wait for ever.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
    --max-worker-restart 0 -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true "$@"
