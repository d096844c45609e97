#!/usr/bin/env bash
# The Python client and the grpcurl commands of the docs, against real processes. Wants python3 with grpcio,
# grpcio-tools, blake3 and cryptography, and grpcurl, on the PATH (tests/all.sh sees to both); $SPRAT names the program
# to test. With words, only the tests that they name run, such as test_client.Joining.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..

SPRAT=$(realpath "${SPRAT:-$root/target/release/sprat}")
[ -x "$SPRAT" ] || {
    echo "$SPRAT is no program; build it, or name another with SPRAT" >&2
    exit 1
}
if ! python3 -c 'import grpc, grpc_tools, blake3, cryptography' 2>/dev/null; then
    echo "SKIPPED: the Python client: grpcio, grpcio-tools, blake3 or cryptography is missing"
    echo "0 passed, 0 failed"
    exit
fi

stubs=$(mktemp -d)
trap 'rm -rf "$stubs"' EXIT
python3 -m grpc_tools.protoc -I "$root/proto" --python_out="$stubs" --grpc_python_out="$stubs" \
    "$root"/proto/sprat/v1/*.proto

# gRPC's own log would tell of every refused handshake, and refusals are what some tests want.
export SPRAT GRPC_VERBOSITY=NONE PYTHONPATH=$stubs:$here PYTHONDONTWRITEBYTECODE=1 XDG_CONFIG_HOME=$stubs
unset "${!SPRAT_@}"
cd "$stubs"
python3 - "$@" <<'PYTHON'
import signal
import sys
import unittest


class Result(unittest.TextTestResult):
    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what the tests started is ended
suite = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:] or ["test_client", "test_grpcurl"])
result = unittest.TextTestRunner(sys.stdout, verbosity=2, resultclass=Result).run(suite)
failed = len({test.id().split(" ")[0] for test, _ in result.failures + result.errors})
for test, reason in result.skipped:
    print(f"SKIPPED: {test}: {reason}")
# As cargo says it, for tests/all.sh.
print(f"test result: {'FAILED' if failed else 'ok'}. {result.passed} passed; {failed} failed; 0 ignored")
print(f"{result.passed} passed, {failed} failed")
sys.exit(not result.wasSuccessful())
PYTHON
