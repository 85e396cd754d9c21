#!/usr/bin/env bash
# Training on several machines: run the same command on every one of them. The nodes find each other through torchrun's
# c10d rendezvous, which one of them hosts; no further service is needed.
#
# usage: NNODES=n RDZV_ENDPOINT=host[:port] [...] launch/multi_node.sh ARGUMENTS_OF_gpsd_dist.train
#   NNODES=2 RDZV_ENDPOINT=node0:29400 RDZV_ID=kr1 launch/multi_node.sh --gin_file configs/stage/pretrain.gin ...
#
# environment:
#   NNODES         number of nodes, or MIN:MAX for an elastic job (required)
#   RDZV_ENDPOINT  one of the nodes, reachable from all (required); the port defaults to 29400
#   RDZV_ID        name of the job, the same on every node (default gpsd); two jobs on one endpoint need two names
#   NPROC          processes per node (default: visible GPUs, else cores)
#   MAX_RESTARTS   restarts of all ranks after one has failed (default 3); each resumes from the last checkpoint
#   LOCAL_ADDR     address of this node, where its host name does not resolve on the others (default: found by torchrun)
#   GPSD_PYTHON    Python to use (default: the one of the torchrun on PATH, else .venv/bin/python)
# launch/env.sh lists further variables, launch/README.md what the exit status says.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

show_help_if_asked "$0" "$@"
[[ -n ${NNODES:-} ]] || die "NNODES is not set; example: NNODES=2 RDZV_ENDPOINT=node0:29400 launch/multi_node.sh ..."
[[ $NNODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || die "NNODES=$NNODES is neither a number nor MIN:MAX"
[[ -n ${RDZV_ENDPOINT:-} ]] || die "RDZV_ENDPOINT is not set; name one node for all to meet at: RDZV_ENDPOINT=node0:29400"
setup_environment
exec "$python" -m gpsd_dist.launcher --nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-gpsd}" \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} -m gpsd_dist.train "$@"
