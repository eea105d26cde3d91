#!/usr/bin/env bash
# Set up, then the tests that scripts/test.sh leaves out: those that take minutes or ask the package
# index (marked nightly) and those that need a GPU (marked gpu; told as skipped where there is none).
# Arguments go to pytest: --collect-only lists them, -m nightly takes the first kind only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
.venv/bin/python -m pytest -n 0 -rs -m 'nightly or gpu' "$@"
