#!/usr/bin/env bash
# Measures the CUDA path in one go, the safest part first: speeds by the GPU suite, and the tests marked `gpu`.
#
#     [OUT=runs/gpu] [LIMIT_S=585] [KIT=.gpu] benchmarks/measure_gpu.sh
#
# Needs one GPU, and torch, pyarrow, rich and pytest. Libraries that the machine lacks can be brought in the folder KIT,
# which git ignores: KIT/fbgemm_gpu-*.tar.xz (FBGEMM for this GPU, packed as it lies in site-packages) and
# KIT/wheels/*.whl. They are unpacked into a temporary folder and used from there. Without FBGEMM, the parts that need
# none of it still run.
#
# $OUT gets log.txt and a JSON file for each group, rewritten after every part. Every group has its own process and time
# limit, and LIMIT_S seconds are the limit of all together: what has no time left is named. Exit status 1 if a group
# failed or was left out.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
OUT=${OUT:-runs/gpu} LIMIT_S=${LIMIT_S:-585} KIT=${KIT:-.gpu}
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
failed=()

run() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 left=$((LIMIT_S - SECONDS)) status=0
    shift 2
    if ((left < 20)); then
        echo "== $name: left out, $left of $LIMIT_S s remain"
        failed+=("$name")
        return
    fi
    ((seconds < left)) || seconds=$left
    echo "== $name: starts at $SECONDS s, limit $seconds s"
    timeout -k 5 "$seconds" "$@" || status=$?
    echo "== $name: ends at $SECONDS s, exit status $status"
    ((status == 0)) || failed+=("$name")
}

measure() { # NAME SECONDS PART,...
    run "$1" "$2" python3 -m benchmarks.run --suite gpu --names "$3" --out "$OUT/$1.json"
}

check() { # NAME SECONDS TEST_FILE...
    run "$1" "$2" python3 -m pytest -q -m gpu -p no:cacheprovider "${@:3}"
}

unpack_kit() {
    local file wheels=("$KIT"/wheels/*.whl)
    for file in "$KIT"/fbgemm_gpu-*.tar.xz; do
        [ ! -e "$file" ] || tar xJf "$file" -C "$SITE" || failed+=("unpacking $file")
    done
    if [ -e "${wheels[0]}" ]; then
        python3 -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "${wheels[@]}" ||
            failed+=("installing $KIT/wheels")
    fi
    export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
}

has_fbgemm() {
    python3 -c 'import torch, fbgemm_gpu, torchrec
torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2], device="cuda")).tolist()'
}

main() {
    local fbgemm=false
    unpack_kit
    nvidia-smi
    python3 -m pip list --format freeze
    command -v ptxas nvcc
    if has_fbgemm; then fbgemm=true; else failed+=("FBGEMM"); fi

    measure attention 60 attention
    if $fbgemm; then
        measure lookup 90 lookup,host_syncs
        check tests 150 tests/numerics/test_two_part_attention.py tests/integration/test_host_syncs.py \
            tests/unit/benchmarks/test_step_split.py
        measure l4 110 train/l4h256a4,train/l4h256a4/activation_checkpointing,train/l4h256a4/sparse_dist
        measure l24 190 train/l24h1024a16,train/l24h1024a16/activation_checkpointing,train/l24h1024a16/sparse_dist
        measure others 150 train/l4h256a4/ranking,train/l4h256a4/frozen,train/l4h256a4/sasrec,train/l4h256a4/profile
    else
        echo "== FBGEMM or TorchRec does not work here (see above): left out are the parts that need them"
    fi
    check hstu_tests 90 tests/numerics/test_hstu_kernel.py
    measure hstu 60 hstu_kernel
    if $fbgemm; then
        measure hstu_training 60 train/l4h256a4/hstu
    fi
    if $fbgemm; then
        check graph_tests 90 tests/integration/test_padded_training.py
        measure compiled 300 train/l4h256a4/compile,train/l24h1024a16/compile
        measure graphs 120 train/l4h256a4/cuda_graphs
    fi
    if ((${#failed[@]})); then
        printf '== failed or left out: %s\n' "${failed[@]}"
        return 1
    fi
}

main 2>&1 | tee "$OUT/log.txt"
exit "${PIPESTATUS[0]}"
