#!/usr/bin/env bash
# The Python client and the grpcurl commands of the docs, against real processes. Wants python3 with what
# clients/python/requirements-dev.txt names, and grpcurl, on the PATH (tests/all.sh sees to both); $SPRAT names the
# program to test. Words go to pytest, such as test_download.py or `-k liar`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

SPRAT=$(realpath "${SPRAT:-$root/target/release/sprat}")
[ -x "$SPRAT" ] || {
    echo "$SPRAT is no program; build it, or name another with SPRAT" >&2
    exit 1
}
if ! python3 -c 'import blake3, cryptography, grpc, grpc_tools, hatchling, mypy, numpy, pytest' 2>/dev/null; then
    echo "SKIPPED: the Python client: a package of clients/python/requirements-dev.txt is missing"
    echo "0 passed, 0 failed"
    exit
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# gRPC's own log would tell of every refused handshake, and refusals are what some tests want.
export SPRAT GRPC_VERBOSITY=NONE PYTHONPATH=$root/clients/python/src:$here PYTHONDONTWRITEBYTECODE=1
export XDG_CONFIG_HOME=$scratch
unset "${!SPRAT_@}"
cd "$here"
python3 -m pytest -p no:cacheprovider --rootdir "$here" --basetemp "$scratch/pytest" -v "$@"
