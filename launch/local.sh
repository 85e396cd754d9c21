#!/usr/bin/env bash
# Training on this machine: one process per GPU, or per core where there is no GPU.
#
# usage: [NPROC=n] launch/local.sh ARGUMENTS_OF_gpsd_dist.train
#   launch/local.sh --gin_file configs/stage/pretrain.gin --gin_file configs/data/kuairand.gin \
#       --gin_file configs/model/l4h64a4.gin --gin.OUTPUT_DIR=runs/kr/pretrain
#
# environment:
#   NPROC         processes = ranks (default: visible GPUs, else cores)
#   MAX_RESTARTS  restarts of all ranks after one has failed (default 3); each resumes from the last checkpoint
#   GPSD_PYTHON   Python to use (default: the one of the torchrun on PATH, else .venv/bin/python)
# launch/env.sh lists further variables, launch/README.md what the exit status says.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

show_help_if_asked "$0" "$@"
setup_environment
exec "$python" -m gpsd_dist.launcher --standalone --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
    -m gpsd_dist.train "$@"
