# shellcheck shell=bash
# Environment of a training job; sourced by the launchers. A value that is already set always wins.
# Everything here concerns the machine. What is trained is decided by gin files and --gin.X=Y alone.

# Threads per rank for the dense CPU work: torchrun's own default of 1 wastes cores when there are few ranks, and the
# library default (all cores in every rank) makes ranks fight for them. NPROC is set by the launcher.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((num_cores / NPROC) > 1 ? (num_cores / NPROC) : 1))}"

# glibc 2.35 and newer: memory in huge pages. Steps on a CPU take 1.05 - 1.11x less time (gpsd_dist/distributed/huge_pages.py).
glibc_version=$(getconf GNU_LIBC_VERSION 2>/dev/null) || true
if [[ ${GLIBC_TUNABLES-} != *glibc.malloc.hugetlb* && $glibc_version =~ ^glibc\ ([0-9]+)\.([0-9]+) ]] &&
    ((BASH_REMATCH[1] > 2 || BASH_REMATCH[1] == 2 && BASH_REMATCH[2] >= 35)); then
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1"
fi

# Python's output reaches the log when it is written, not when a buffer is full; the last lines before a crash matter.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# Seconds between SIGTERM and SIGKILL when torchrun stops its ranks: enough to finish the step and write a checkpoint.
# Slurm and Kubernetes wait 120 s here (torchrun's default of 30 s would cut into a large checkpoint).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"

# NCCL: a collective that fails or times out brings its rank down, so that torchrun can restart the job (1 is also the
# default of recent PyTorch; older ones hang).
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# NCCL: every rank remembers its last 2000 collectives, with the Python stack of each, for microseconds per collective.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}}"

# NCCL: when a collective times out, they are written to a file; torch.distributed.flight_recorder.fr_trace compares ranks.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# NCCL: WARN prints the reason of a failure and is silent otherwise; INFO shows the transport chosen per link.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# CUDA allocator: growing segments instead of fixed ones; batches of changing token counts fragment memory otherwise.
# (PYTORCH_CUDA_ALLOC_CONF is the name of before torch 2.9, which still counts where somebody has set it.)
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"

# Only on Hopper (H100, H200) for HSTU in bf16: ptxas of CUDA 12.8 and 12.9, which Triton brings, miscompiles some kernels;
# `python -m gpsd_dist.doctor` says which one is used. That of CUDA 13.3 or later:
#   export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas

# Only where the automatic choice is wrong (several networks, docker0 picked): name the interface that reaches the other
# nodes, for NCCL's set-up traffic and for gloo. `ip route get <other node>` shows it.
#   export NCCL_SOCKET_IFNAME=eth0
#   export GLOO_SOCKET_IFNAME=eth0

# Only for InfiniBand or RoCE: the adapters NCCL may use, and the GID index of RoCE v2 (`show_gids`).
#   export NCCL_IB_HCA=mlx5_0,mlx5_1
#   export NCCL_IB_GID_INDEX=3

# Only without InfiniBand, when probing for it is slow or wrong: plain sockets.
#   export NCCL_IB_DISABLE=1
