#!/usr/bin/env bash
# The operator's page in a real Chromium, over real trackers. Wants chromium, and python3 with playwright,
# axe-playwright-python and what clients/python/requirements-dev.txt names, on the PATH (tests/all.sh sees to all); $SPRAT
# names the program to test, $PICTURES a folder for pictures of the page. Words go to pytest.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

SPRAT=$(realpath "${SPRAT:-$root/target/release/sprat}")
[ -x "$SPRAT" ] || {
    echo "$SPRAT is no program; build it, or name another with SPRAT" >&2
    exit 1
}
skip() {
    echo "SKIPPED: the operator's page in a browser: $1"
    echo "0 passed, 0 failed"
    exit
}
CHROMIUM=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || skip "there is no chromium"
python3 -c 'import axe_playwright_python, cryptography, grpc, playwright, pytest' 2>/dev/null ||
    skip "a package of tests/dashboard/requirements.txt or clients/python/requirements-dev.txt is missing"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
PICTURES=$(realpath -m "${PICTURES:-$scratch/pictures}")
export SPRAT CHROMIUM PICTURES GRPC_VERBOSITY=NONE PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=$root/clients/python/src:$root/tests/clients:$here
export XDG_CONFIG_HOME=$scratch HOME=$scratch
unset "${!SPRAT_@}"
cd "$here"
python3 -m pytest -p no:cacheprovider --rootdir "$here" --basetemp "$scratch/pytest" -v "$@"
