#!/usr/bin/env bash
# From a fresh clone to a trained model on two CPU cores: set up, build data from the standard
# library's sources, train on 2 processes x 2 virtual stages, stop, resume, finish, summarise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
config=configs/quickstart.yaml
attnres=.venv/bin/attnres-train

echo "== first half: train, save, stop"
$attnres train $config train.stop_after=60 "$@"
echo "== second half: resume from the checkpoint"
$attnres train $config "$@" train.stop_after=null
echo "== summary"
$attnres report $config "$@"
