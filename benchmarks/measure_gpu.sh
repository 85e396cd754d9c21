#!/usr/bin/env bash
# Measures the CUDA path, what is worth most first and compiling last: speeds by the GPU suite, and the tests marked `gpu`.
#
#     [OUT=runs/gpu] [LIMIT_S=585] [ONLY="GROUP ..."] [KIT=.gpu] benchmarks/measure_gpu.sh
#
# Needs one GPU, and torch, pyarrow, rich and pytest. Libraries that the machine lacks can be brought in the folder KIT,
# which git ignores: KIT/fbgemm_gpu-*.tar.xz (FBGEMM for this GPU, packed as it lies in site-packages) and
# KIT/wheels/*.whl. They are unpacked into a temporary folder and used from there. Without FBGEMM, the parts that need
# none of it still run.
#
# $OUT gets log.txt and a JSON file for each group, rewritten after every part. Every group has its own process and time
# limit. A group whose limit does not fit into what is left of LIMIT_S seconds is cut, and a shorter one behind it may
# still run. The last line says which groups were cut: ONLY with their names is the next call. Exit status 1 if a group
# failed or was cut.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
OUT=${OUT:-runs/gpu} LIMIT_S=${LIMIT_S:-585} ONLY=${ONLY:-} KIT=${KIT:-.gpu}
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
failed=() cut=() known=()

run() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 left=$((LIMIT_S - SECONDS)) status=0
    shift 2
    known+=("$name")
    [[ -z $ONLY || " $ONLY " == *" $name "* ]] || return 0
    if ((left < seconds)); then
        echo "== $name: cut, its limit is $seconds s and $left of $LIMIT_S s remain"
        cut+=("$name")
        return
    fi
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
    local fbgemm=false name
    unpack_kit
    nvidia-smi
    python3 -m pip list --format freeze
    command -v ptxas nvcc
    if has_fbgemm; then fbgemm=true; else failed+=("FBGEMM"); fi

    if $fbgemm; then
        measure lookup 75 lookup,host_syncs
        measure l4 50 train/l4h256a4
        measure l24 75 train/l24h1024a16
    else
        echo "== FBGEMM or TorchRec does not work here (see above): left out are the parts that need them"
    fi
    measure attention 50 attention
    if $fbgemm; then
        check tests 90 tests/numerics/test_two_part_attention.py tests/integration/test_host_syncs.py \
            tests/unit/benchmarks/test_step_split.py
    fi
    check hstu_tests 80 tests/numerics/test_hstu_kernel.py
    measure hstu 50 hstu_kernel
    if $fbgemm; then
        measure l4_sparse_dist 45 train/l4h256a4/sparse_dist
        measure l24_recomputed 65 train/l24h1024a16/activation_checkpointing
        measure l24_sparse_dist 65 train/l24h1024a16/sparse_dist
        measure l4_profile 45 train/l4h256a4/profile
        measure l4_ranking 45 train/l4h256a4/ranking
        measure l4_frozen 45 train/l4h256a4/frozen
        measure l4_recomputed 45 train/l4h256a4/activation_checkpointing
        measure l4_sasrec 45 train/l4h256a4/sasrec
        measure l4_hstu 60 train/l4h256a4/hstu
        check graph_tests 90 tests/integration/test_padded_training.py
        measure l4_compiled 120 train/l4h256a4/compile
        measure l24_compiled 200 train/l24h1024a16/compile
        measure l4_graphs 120 train/l4h256a4/cuda_graphs
    fi
    for name in $ONLY; do
        [[ " ${known[*]} " == *" $name "* ]] || failed+=("ONLY names $name, which is no group; there are ${known[*]}")
    done
    if ((${#failed[@]})); then printf '== failed: %s\n' "${failed[@]}"; fi
    if ((${#cut[@]})); then echo "== cut, for the next call: ONLY=\"${cut[*]}\" benchmarks/measure_gpu.sh"; fi
    ((${#failed[@]} + ${#cut[@]} == 0))
}

main 2>&1 | tee "$OUT/log.txt"
exit "${PIPESTATUS[0]}"
