#!/usr/bin/env bash
# The launch script under a real SLURM: munge, slurmctld and two slurmd of our own, in a temporary
# folder on this machine (Debian and Ubuntu: apt-get install slurm-wlm munge). A quarter of an hour.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
.venv/bin/python -m pytest -n 0 -rs -m nightly tests/cluster/test_slurm.py "$@"
