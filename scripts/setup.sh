#!/usr/bin/env bash
# Create .venv, or bring it up to date, with the package (editable) and everything the tests need.
# Does nothing when neither the packaging files nor Python changed. Needs the package index only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old: Python 3.11 or newer is needed (PYTHON=...)" >&2
    exit 2
}
wanted=$({ "$python" --version; pwd; cat pyproject.toml setup.py constraints.txt; } | sha256sum)
if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
    echo "setting up .venv (first time: a few minutes of downloads)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c constraints.txt -e '.[dev]'
    echo "$wanted" > .venv/.installed
fi
