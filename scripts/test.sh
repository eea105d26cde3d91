#!/usr/bin/env bash
# Set up, then lint, import rules and tests. Arguments go to pytest: scripts/test.sh tests/model -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@"
