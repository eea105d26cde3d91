#!/usr/bin/env bash
# Train under torchrun, on one or several machines. Start it on every machine:
#
#   launch/torchrun.sh --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node 8 \
#       -- configs/kimi_linear_48b_attnres.yaml run.name=first
#
# Everything before -- goes to torchrun, everything after it to `attnres-train train`.
# --dry-run as the first argument prints the command instead.
set -euo pipefail

dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi
torchrun_options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    torchrun_options+=("$1")
    shift
done
if [ $# -lt 2 ]; then
    echo "usage: $0 [--dry-run] [TORCHRUN OPTIONS] -- CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi
shift

# The agents give each other this machine's name, and go on trying where it leads nowhere.
host=$(uname -n)
if ! getent hosts "$host" > /dev/null; then
    given=" ${torchrun_options[*]//_/-} "
    if [[ $given =~ " --local-addr"|" --master-addr" ]]; then
        : # another name is used
    elif [[ ! $given =~ " --nnodes" || $given =~ " --nnodes"[=\ ]1(:1)?" " ]]; then
        torchrun_options+=(--local-addr localhost)
    else
        echo "error: $host, the name of this machine, does not resolve: add --local-addr ADDRESS" >&2
        exit 2
    fi
fi

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python
[ -x "$repository/.venv/bin/python" ] && python=$repository/.venv/bin/python
command=("$python" -m torch.distributed.run "${torchrun_options[@]}" -m attnres_train train "$@")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
