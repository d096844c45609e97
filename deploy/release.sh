#!/usr/bin/env bash
# Packs a release: the binary, its manual page and completions, the systemd units, the licence and the documents, as
# dist/sprat-VERSION-TARGET.tar.gz, with SHA256SUMS and B3SUMS beside it. The same source, toolchain and machine give
# the same bytes. With a binary as argument, that one is packed and nothing is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${DIST:-$PWD/dist}

if [ $# -eq 0 ]; then
    # Paths of this machine do not belong into the binary.
    RUSTFLAGS="--remap-path-prefix=$PWD=/sprat --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo" \
        cargo build --release --locked
    binary=${CARGO_TARGET_DIR:-target}/release/sprat
else
    binary=$1
fi

version=$("$binary" version --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["version"])')
target=$(rustc -vV | sed -n 's/^host: //p')
name=sprat-$version-$target
# The last commit's time: the same for everybody who packs this source.
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install -D -m 755 "$binary" "$work/$name/bin/sprat"
strip "$work/$name/bin/sprat"
add() { install -D -m 644 "$1" "$work/$name/$2"; }
made() { install -D -m 644 /dev/stdin "$work/$name/$1"; }
"$binary" man | gzip -9n | made share/man/man1/sprat.1.gz
"$binary" completions bash | made share/bash-completion/completions/sprat
"$binary" completions zsh | made share/zsh/site-functions/_sprat
"$binary" completions fish | made share/fish/vendor_completions.d/sprat.fish
add deploy/systemd/sprat-tracker.service lib/systemd/system/sprat-tracker.service
add deploy/systemd/sprat-peer.service lib/systemd/system/sprat-peer.service
add deploy/systemd/sprat.sysusers lib/sysusers.d/sprat.conf
add deploy/systemd/sprat.tmpfiles lib/tmpfiles.d/sprat.conf
add config.json share/doc/sprat/config.json
for file in LICENSE README.md CHANGELOG.md docs/operations.md; do
    add "$file" "share/doc/sprat/${file##*/}"
done

mkdir -p "$out"
tar -C "$work" --sort=name --format=gnu --owner=0 --group=0 --numeric-owner --mtime="@$epoch" -cf - "$name" |
    gzip -9n >"$out/$name.tar.gz"

cd "$out"
sha256sum "$name.tar.gz" >SHA256SUMS
b3sum "$name.tar.gz" >B3SUMS
# What was written is what a stranger will check and start.
sha256sum --quiet --check SHA256SUMS
b3sum --check B3SUMS >/dev/null
mkdir "$work/unpacked"
tar -C "$work/unpacked" -xzf "$name.tar.gz"
"$work/unpacked/$name/bin/sprat" version >/dev/null
printf '%s\n' "$out/$name.tar.gz"
