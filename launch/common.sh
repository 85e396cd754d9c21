# shellcheck shell=bash
# What local.sh and multi_node.sh share: help, number of processes, Python, import path. Sourced, never run.

repo_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

show_help_if_asked() { # show_help_if_asked SCRIPT ARGUMENTS...: the comment at the top of the script is its help
    local script=$1
    shift
    if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
        awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$script"
        [[ $# -gt 0 ]] || die "no arguments for gpsd_dist.train: at least one --gin_file is needed"
        exit 0
    fi
}

count_gpus() {
    if ! command -v nvidia-smi >/dev/null; then
        echo 0
    elif [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cvE '^(-1)?$' || true
    else
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true
    fi
}

setup_environment() { # sets NPROC, MAX_RESTARTS, python and what env.sh exports
    local num_gpus num_cores
    num_gpus=$(count_gpus)
    num_cores=$(getconf _NPROCESSORS_ONLN)
    command -v nproc >/dev/null && num_cores=$(OMP_NUM_THREADS='' nproc) # respects cgroup cpusets and taskset
    NPROC=${NPROC:-$((num_gpus > 0 ? num_gpus : num_cores))}
    [[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC=$NPROC is not a positive number"
    [[ ${MAX_RESTARTS:=3} =~ ^[0-9]+$ ]] || die "MAX_RESTARTS=$MAX_RESTARTS is not a number"
    if ((num_gpus > 0 && NPROC > num_gpus)); then
        die "NPROC=$NPROC, but this node has $num_gpus visible GPUs; lower NPROC, or hide the GPUs with CUDA_VISIBLE_DEVICES="
    fi

    # The Python that torchrun on PATH belongs to, else the one of 'make setup'.
    python=${GPSD_PYTHON:-$(dirname "$(command -v torchrun || echo "$repo_root/.venv/bin/torchrun")")/python}
    command -v "$python" >/dev/null || die "no Python at '$python'; run 'make setup', or set GPSD_PYTHON=/path/to/python"

    # The working directory stays the caller's, so that relative paths mean what they say.
    export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$repo_root"
    # shellcheck source=launch/env.sh
    source "$repo_root/launch/env.sh"
}
