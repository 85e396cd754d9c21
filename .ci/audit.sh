#!/usr/bin/env bash
# usage: .ci/audit.sh VENV
# Asks PyPI which pins of the locks have known vulnerabilities (`make audit`). Status 1 if one has, and also if PyPI did not
# answer: an audit that reached nobody has passed nothing. pip-audit lives in VENV/.audit, and is held to .ci/audit.txt.
set -euo pipefail
[[ $# == 1 ]] || { echo "usage: .ci/audit.sh VENV" >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tool=$1/.audit
if ! cmp -s .ci/audit.txt "$tool/lock"; then
    "$1/bin/python" -m venv --clear "$tool"
    "$tool/bin/python" -m pip install --quiet --no-deps --require-hashes -r .ci/audit.txt
    cp .ci/audit.txt "$tool/lock"
fi

status=0
for lock in requirements*.txt .ci/uv.txt .ci/audit.txt; do
    echo "audit: $lock"
    # --strict: a pin that PyPI was not asked about, or does not know, is no pin without vulnerabilities.
    "$tool/bin/pip-audit" --strict --disable-pip --no-deps --progress-spinner off -r "$lock" || status=1
done
exit "$status"
