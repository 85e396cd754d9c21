#!/usr/bin/env bash
# usage: .ci/setup_venv.sh VENV [cpu|cuda|serve] [dev]
# Makes VENV hold the pins of requirements-cpu.txt (requirements.txt for cuda; requirements-serve.txt for serve, the
# part of the CPU pins that a server needs), with `dev` also those of
# requirements-dev.txt (tests and checks). Does nothing when it already does.
# PYTHON=/path/to/python3.11 chooses the interpreter of a new VENV. UV=/path/to/uv chooses uv, UV=none does without it.
#
# Why not plain `pip install -r`: torchrec requires the CUDA build of fbgemm, which overwrites the CPU build, so a
# complete lock is installed with --no-deps. And PyPI's torch for Linux is the CUDA build: the CPU build has the local
# version +cpu. Asking for that version by name makes pip's configured sources either deliver it or fail without
# downloading anything; then PyTorch's CPU index is asked.
#
# Every package must have one of the hashes of its lock, but for torch's CPU build: it is not on PyPI, whose hashes the lock
# has, and is installed before. Whoever wants it checked as well serves it from a place of his own (pip's find-links).
# uv itself is held to the hashes of .ci/uv.txt; UV=path names one that you trust.
#
# The rest of a CPU lock is installed by uv, for some 4 CPU seconds. uv does not read pip's configuration, and
# asked for torch it would take the CUDA build and 3 GB with it. So torch stays with pip, uv gets the lock without that
# line and with --no-deps, and indexes and folders of wheels are handed on. Where there is no uv, or it fails, pip does it.
set -euo pipefail

readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

die() {
    echo "setup: $*" >&2
    exit 1
}

find_python() {
    local candidate path
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        path=$(command -v "$candidate" || true)
        # An activated but broken VENV must not be asked to rebuild itself.
        [[ -n $path && $path != "$(realpath -m "$venv")"/* ]] || path=false
        if "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$path"
            return
        fi
        [[ $candidate != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is not a Python >= 3.11"
    done
    die "no Python >= 3.11 on PATH; install python3.11 with its venv module, or set PYTHON=/path/to/python3.11"
}

make_venv() {
    local python
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    if [[ -e $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        die "$venv exists and is not a virtual environment; choose another place with VENV=path"
    fi
    python=$(find_python)
    echo "setup: creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || die "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3.11-venv"
}

install_torch_cpu() {
    local pin log
    pin=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$lock")
    [[ -n $pin ]] || die "$lock does not pin torch"
    log=$(mktemp)
    # shellcheck disable=SC2064  # expand now: `log` is local
    trap "rm -f '$log'" RETURN
    if "${pip[@]}" install --no-deps "torch==$pin+cpu" 2>"$log"; then
        return
    fi
    echo "setup: pip's configured sources have no torch $pin+cpu; trying $TORCH_CPU_INDEX"
    if ! "${pip[@]}" install --no-deps --index-url "$TORCH_CPU_INDEX" "torch==$pin+cpu"; then
        cat "$log" >&2
        die "torch $pin+cpu is neither in pip's configured sources (messages above) nor at $TORCH_CPU_INDEX"
    fi
}

find_uv() {
    if [[ ${UV:-} == none ]]; then return 1; fi
    if command -v "${UV:-uv}"; then return; fi
    if [[ ! -x $venv/.uv/bin/uv ]]; then
        "${pip[@]}" install --quiet --no-deps --require-hashes --target "$venv/.uv" -r "$root/.ci/uv.txt" >/dev/null 2>&1 ||
            echo "setup: pip cannot install uv as .ci/uv.txt has it, and installs all by itself" >&2
    fi
    [[ -x $venv/.uv/bin/uv ]] && echo "$venv/.uv/bin/uv"
}

# `pip config get` would read the user's file alone.
configured() { # configured NAME: what the files of pip's configuration say
    sed -n "s/^global\.$1='\(.*\)'\$/\1/p" <<<"$config" | sed 's/\\n/ /g'
}

# Hands on what pip is told by variables or by its configuration.
install_by_uv() {
    local uv name variable value cert config options=()
    uv=$(find_uv) || return 1
    config=$("${pip[@]}" config list 2>/dev/null || true)
    for name in index-url extra-index-url find-links; do
        variable=PIP_${name^^}
        variable=${variable//-/_}
        for value in ${!variable:-$(configured "$name")}; do
            options+=("--$name" "$value")
        done
    done
    value=${PIP_NO_INDEX:-$(configured no-index)}
    [[ ! ${value,,} =~ ^(1|y|yes|t|true|on)$ ]] || options+=(--no-index) # else uv asks PyPI
    cert=${SSL_CERT_FILE:-${PIP_CERT:-$(configured cert)}}
    [[ -z $cert ]] || export SSL_CERT_FILE=$cert
    # The best of all indexes, as pip does: by default uv stops at the first that knows a package.
    awk '/^torch==/ { skip = 1; next } /^[^ ]/ { skip = 0 } !skip' "$1" |
        "$uv" pip install --quiet --python "$venv/bin/python" --no-config --no-deps --require-hashes \
            --index-strategy unsafe-best-match "${options[@]}" -r - || return 1
}

# A lock that was installed is copied into the virtual environment: equal to its copy means nothing to do.
stamp_of() {
    case $1 in
    *requirements-dev.txt) echo "$venv/.installed-dev-lock" ;;
    *) echo "$venv/.installed-lock" ;;
    esac
}

is_installed() {
    [[ -x $venv/bin/python ]] && cmp -s "$1" "$(stamp_of "$1")"
}

[[ $# -ge 1 && $# -le 3 && $1 != -* ]] || die "usage: .ci/setup_venv.sh VENV [cpu|cuda|serve] [dev]"
venv=$1
flavor=${2:-cpu}
[[ ${3:-dev} == dev ]] || die "the third argument is '$3'; only 'dev' is known"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case $flavor in
cpu) lock=$root/requirements-cpu.txt ;;
cuda) lock=$root/requirements.txt ;;
serve) lock=$root/requirements-serve.txt ;;
*) die "flavor '$flavor' is none of cpu, cuda, serve" ;;
esac

locks=("$lock")
[[ $# -lt 3 ]] || locks+=("$root/requirements-dev.txt")

# The command of this checkout, which works in every folder; an installed package brings its own, which is left alone.
# -P: else a random.py in the folder in which it is typed would be run in place of the standard library's.
write_command() {
    local command=$venv/bin/gpsd-dist text
    [[ -x $venv/bin/python ]] || return 0
    # shellcheck disable=SC2016  # what is written expands when it is run
    printf -v text '#!/usr/bin/env bash\nPYTHONPATH=%q${PYTHONPATH:+:$PYTHONPATH} exec %q -P -m gpsd_dist "$@"' \
        "$root" "$(realpath -s "$venv")/bin/python"
    if [[ -e $command ]]; then
        [[ $(<"$command") != "$text" ]] && grep -q '^PYTHONPATH=.* -m gpsd_dist "$@"$' "$command" || return 0
    fi
    echo "$text" >"$command.new"
    chmod +x "$command.new"
    mv -f "$command.new" "$command"
}

is_complete=true
for each in "${locks[@]}"; do
    is_installed "$each" || is_complete=false
done
write_command
[[ $is_complete == false ]] || exit 0

start_s=$SECONDS
make_venv # which forgets the stamps if it has to build the environment anew
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
for each in "${locks[@]}"; do
    ! is_installed "$each" || continue
    [[ $(uname -s) != Linux || $each != */requirements-@(cpu|serve).txt ]] || install_torch_cpu
    # The CUDA lock has torch in it, with what torch needs there: that is pip's as a whole.
    if [[ $each == */requirements.txt ]] || ! install_by_uv "$each"; then
        "${pip[@]}" install --no-deps --require-hashes -r "$each"
    fi
    cp "$each" "$(stamp_of "$each")" # after its packages, so that an interrupted installation is repeated
    echo "setup: $venv holds $(basename "$each") after $((SECONDS - start_s)) s"
done
write_command
