#!/usr/bin/env bash
# Create .venv, or bring it up to date, with the package (editable) and everything the tests need.
# Does nothing when neither the packaging files nor Python changed. Needs the package index only.
# PYTHON=... names the Python for a new .venv; without it: python3, or the newest that is supported.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $1" >&2
    exit 2
}
version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
supported() { [[ "$(version "$1")" == 3.1[123].* ]]; }
wanted="Python 3.11, 3.12 or 3.13 is needed"

if version .venv/bin/python > /dev/null; then
    python=.venv/bin/python
    own=$(version "$python")
    supported "$python" || fail "$wanted, .venv is of $own: remove it first"
    if [ -n "${PYTHON:-}" ] && [ "$(version "$PYTHON")" != "$own" ]; then
        fail "PYTHON is $PYTHON, .venv is of $own: remove it first"
    fi
elif [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
    supported "$python" || fail "$wanted, $python is $(version "$python" || echo missing)"
else
    for python in python3 python3.13 python3.12 python3.11 ''; do
        supported "$python" && break
    done
    found="python3 is $(version python3 || echo missing)"
    [ -n "$python" ] || fail "$wanted, $found: name another with PYTHON=..."
    [ "$python" = python3 ] || echo "$wanted, $found: taking $python ($(version "$python"))"
fi

state=$({ version "$python"; pwd; cat pyproject.toml setup.py constraints.txt; } | sha256sum)
if [ "$python" = .venv/bin/python ] && [ "$(cat .venv/.installed 2>/dev/null)" = "$state" ]; then
    exit
fi
if [ "$python" = .venv/bin/python ] && [ -f .venv/.installed ]; then
    echo "bringing .venv up to date; pip downloads what has changed"
else
    echo "setting up .venv with Python $(version "$python"), once; pip downloads what it has not kept:"
    echo "  0.7 GB (2.6 GB unpacked, a few minutes) where it finds a CPU build of torch;"
    echo "  3 GB (5.3 GB unpacked, 14 minutes were seen) with CUDA, which PyPI's torch for Linux has."
    echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu leads to the CPU build."
fi
[ "$python" = .venv/bin/python ] || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
echo "$state" > .venv/.installed
