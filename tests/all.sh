#!/usr/bin/env bash
# Everything that must hold, from a clean clone: format, lints, docs, build, a release and its service units, tests, the
# demo, a client in another language, Prometheus, downloads that are killed again and again, small benches, and the
# policy for outside crates. Needs Debian (or its like) and cargo; installs what else is missing when run as root, and
# says at the end what it had to skip. Goes on after a failure; fails if anything failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
exec </dev/null

logs=$PWD/target/checks
tools=$PWD/target/tools
venv=$PWD/target/venv
mkdir -p "$logs"
export PATH=$venv/bin:$tools/bin:$PATH CARGO_TERM_PROGRESS_WHEN=never

passed=0 failed=0 failures=() skipped=()
limit=() # nobody presses Ctrl-C in CI
[ -n "${CI:-}" ] && limit=(timeout --kill-after=10 40m)

heading() { printf '\n==> %s\n' "$1"; }
have() { command -v "$1" >/dev/null; }
skip() {
    printf 'SKIPPED: %s\n' "$1"
    skipped+=("$1")
}

# step NAME COMMAND...: counts the command and the tests that it reports. A line `SKIPPED: reason` in its output is
# repeated at the end.
step() {
    local name=$1 log=$logs/${1// /-}.log start=$SECONDS ok bad line
    shift
    heading "$name: $*"
    if "${limit[@]}" "$@" 2>&1 | tee "$log"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        failures+=("$name")
    fi
    while read -r ok bad; do
        passed=$((passed + ok)) failed=$((failed + bad))
    done < <(sed -nE 's/^test result: \w+\. ([0-9]+) passed; ([0-9]+) failed;.*/\1 \2/p' "$log")
    while read -r line; do
        skipped+=("$name: $line")
    done < <(sed -nE 's/^test (.*) \.\.\. ignored.*/\1/p; s/^(test .* \.\.\. )?SKIPPED: //p' "$log")
    printf '(%s: %d s)\n' "$name" $((SECONDS - start))
}

# Debian packages for the commands that the tests call.
system_tools() {
    local missing=() pair
    for pair in b3sum:b3sum cc:gcc chromium:chromium curl:curl faketime:faketime ip:iproute2 openssl:openssl tmux:tmux \
        python3:python3 systemd-analyze:systemd; do
        have "${pair%%:*}" || missing+=("${pair#*:}")
    done
    have cc || missing+=(libc6-dev)
    have docker && ! have debootstrap && missing+=(debootstrap)
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
    [ ${#missing[@]} -eq 0 ] && return
    if [ "$(id -u)" -ne 0 ] || ! have apt-get; then
        skip "what needs these packages, which only root can install, with apt-get: ${missing[*]}"
        return
    fi
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "${missing[@]}" ||
        skip "what needs these packages, which apt-get could not install: ${missing[*]}"
}

# What tests/clients and tests/dashboard import; again after the lists changed.
python_tools() {
    local wanted=(clients/python/requirements-dev.txt tests/dashboard/requirements.txt)
    cmp -s <(cat "${wanted[@]}") "$venv/installed.txt" && return
    python3 -m venv "$venv" && "$venv/bin/pip" install --quiet "${wanted[@]/#/-r}" &&
        cat "${wanted[@]}" >"$venv/installed.txt" ||
        skip "the Python client and the operator's page: their packages could not be installed"
}

# Prometheus and promtool, unpacked beside the other tools: to install the package would start a service.
prometheus_tools() {
    have promtool && have prometheus && return
    local folder=$tools/prometheus
    rm -rf "$folder" && mkdir -p "$folder" "$tools/bin"
    (cd "$folder" && { apt-get -qq update || true; } && apt-get -qq download prometheus && dpkg -x prometheus_*.deb . &&
        cp usr/bin/prometheus usr/bin/promtool "$tools/bin/") 2>"$logs/prometheus-tools.log" ||
        skip "what Prometheus makes of deploy/monitoring: its Debian package cannot be fetched"
}

# Whether this user and this kernel can make network namespaces with slow links.
slow_links() {
    local name=sprat-probe-$$ can=1
    ip netns add "$name" && tc -n "$name" qdisc add dev lo root tbf rate 1mbit burst 32kb latency 50ms && can=0
    ip netns del "$name"
    return $can
}

# cargo_tool COMMAND CRATE VERSION: unoptimised, because it builds sooner than it would pay off.
cargo_tool() {
    have "$1" || CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --root "$tools" "$2@$3" ||
        skip "what needs $1: cargo could not install $2"
}

heading "tools"
system_tools
python_tools
prometheus_tools
cargo_tool grpcurl grpcurl-rs 0.2.1
cargo_tool cargo-deny cargo-deny 0.20.2

# One profile for all, so that every dependency is built once; without the optimisation across crates, for which each of
# the test programs would take as long as a release.
export CARGO_PROFILE_RELEASE_LTO=false CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16
step "format" cargo fmt --check
step "lints" cargo clippy --release --all-targets --locked -- -D warnings
step "docs" env RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps --document-private-items
step "build" cargo build --release --locked
step "release" bash tests/release.sh
step "tests" cargo test --release --locked --no-fail-fast
step "demo" cargo run --release --locked -- demo
[ -e tests/clients/run.sh ] && step "clients" bash tests/clients/run.sh
have promtool && have prometheus && step "monitoring" python3 tests/monitoring/check.py target/release/sprat
step "containers" python3 tests/compose/run.py
step "page" env PICTURES="$logs/pictures" bash tests/dashboard/run.sh
if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    [ -e "$venv/installed.txt" ] &&
        step "capacity" "$venv/bin/python" tests/bench/capacity.py --peers 20 --files 1000 --shared 1000 --seconds 1
    step "kills" python3 tests/bench/kill_resume.py --cycles 20 --mib 16
    if slow_links 2>/dev/null; then
        step "swarm bench" python3 tests/bench/bench.py swarm --peers 2 --mib 8 --reps 1 --dir "$PWD/target/bench"
    else
        skip "the swarm bench: needs root, the commands ip and tc, and a kernel with tbf"
    fi
else
    skip "kills and the swarm bench: need Python 3.11"
fi
if have cargo-deny; then
    deny=(cargo deny --locked --config deploy/deny.toml)
    step "crates" "${deny[@]}" check --hide-inclusion-graph licenses bans sources
    if timeout 120 "${deny[@]}" fetch db >"$logs/advisory-db.log" 2>&1; then
        step "advisories" "${deny[@]}" check advisories
    else
        skip "advisories about outside crates: the advisory database cannot be fetched from here"
    fi
fi

heading "summary"
for line in "${skipped[@]}"; do printf 'SKIPPED: %s\n' "$line"; done
for line in "${failures[@]}"; do printf 'FAILED: %s (target/checks/%s.log)\n' "$line" "${line// /-}"; done
printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" -eq 0 ]
