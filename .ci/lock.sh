#!/usr/bin/env bash
# Regenerates the locks (`make lock`):
#   requirements-cpu.txt   what a run needs, CPU          from requirements-cpu.in
#   requirements.txt       what a run needs, CUDA         from requirements-cpu.in with the CUDA build of fbgemm
#   requirements-dev.txt   what tests and checks add      from requirements-dev.in
#   requirements-serve.txt what a server alone needs, CPU from requirements-serve.in
#   .ci/uv.txt             what installs all these        from its own line of uv
#   .ci/audit.txt          what `make audit` runs         from its own line of pip-audit
# Pins that still fit are kept; delete a line of a lock (or pass --upgrade) to let it move.
# Hashes are those that the index gives for every file of a version. setup_venv.sh says which package has none.
# Only metadata is resolved, so the CUDA wheels are not downloaded. Needs uv: on PATH, or UV=/path/to/uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=${UV:-uv}
if ! command -v "$uv" >/dev/null; then
    echo "lock: '$uv' not found; install it (python -m pip install uv) or pass UV=/path/to/uv" >&2
    exit 1
fi

compile() {
    "$uv" pip compile --quiet --generate-hashes --no-config --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --custom-compile-command "make lock" "$@" >/dev/null
}

compile requirements-cpu.in --override .ci/lock-overrides.txt --output-file requirements-cpu.txt "$@"

# Same input with the CUDA build of fbgemm. The CPU pins are the starting point, so that both locks agree.
cuda_dir=$(mktemp -d)
trap 'rm -rf "$cuda_dir"' EXIT
sed 's/^fbgemm-gpu-cpu==/fbgemm-gpu==/' requirements-cpu.in >"$cuda_dir/requirements-cuda.in"
{ grep -h '^[^ ]*==' requirements-cpu.txt requirements.txt 2>/dev/null || true; } | sed 's/ *\\$//' >"$cuda_dir/start.txt"
awk -F'==' '!seen[$1]++' "$cuda_dir/start.txt" >"$cuda_dir/requirements.txt"
grep '^python-dateutil' .ci/lock-overrides.txt >"$cuda_dir/overrides.txt"
(
    cd "$cuda_dir"
    compile requirements-cuda.in --override overrides.txt --output-file requirements.txt "$@"
)
cp "$cuda_dir/requirements.txt" requirements.txt

# The running lock is a constraint (requirements-dev.in names it), and what it holds is left out: one list serves both builds.
mapfile -t held < <(sed -n 's/^\([A-Za-z0-9_.-]*\)==.*/--no-emit-package=\1/p' requirements-cpu.txt)
# Tests want Triton, which a CPU build of torch goes without.
grep -v '^triton' .ci/lock-overrides.txt >"$cuda_dir/dev-overrides.txt"
compile requirements-dev.in --override "$cuda_dir/dev-overrides.txt" "${held[@]}" --output-file requirements-dev.txt "$@"
compile requirements-serve.in --override .ci/lock-overrides.txt --output-file requirements-serve.txt "$@"
for tool in uv pip-audit; do
    lock=.ci/${tool#pip-}.txt
    sed -n "s/^\($tool==[^ ]*\).*/\1/p" "$lock" >"$cuda_dir/$tool.in"
    compile "$cuda_dir/$tool.in" --no-annotate --output-file "$lock" "$@"
done
echo "lock: wrote requirements-cpu.txt, requirements.txt, requirements-dev.txt, requirements-serve.txt, .ci/uv.txt, .ci/audit.txt"
