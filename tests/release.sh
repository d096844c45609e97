#!/usr/bin/env bash
# Packs a release from a binary that is there already, twice, and demands the same bytes; then unpacks it into an empty
# root as the guide says, and checks the units there: that systemd understands them, that they stay as closed as they
# are, that users and folders come out as meant. Nothing is installed on this machine and nothing is started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
binary=${1:-target/release/sprat}
# systemd-analyze counts from 0, closed, to 100, open. The tracker has 13, the peer 14.
threshold=15

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
first=$(DIST=$work/first deploy/release.sh "$binary")
DIST=$work/second deploy/release.sh "$binary" >/dev/null
cmp "$work/first/SHA256SUMS" "$work/second/SHA256SUMS"
cmp "$work/first/B3SUMS" "$work/second/B3SUMS"
cat "$work/first/SHA256SUMS"

root=$work/root
mkdir -p "$root/usr" "$root/etc"
tar -C "$root/usr" --strip-components=1 -xzf "$first"
"$root/usr/bin/sprat" version
zcat "$root/usr/share/man/man1/sprat.1.gz" | cmp - docs/sprat.1

if ! command -v systemd-analyze >/dev/null; then
    echo 'SKIPPED: the systemd units: need systemd-analyze (package systemd)'
    exit
fi
for unit in sprat-tracker sprat-peer; do
    # By its path, so that the program is looked for where the test has put it.
    sed "s#/usr/bin/sprat#$root/usr/bin/sprat#" "$root/usr/lib/systemd/system/$unit.service" >"$work/$unit.service"
    systemd-analyze verify --man=no "$work/$unit.service"
    systemd-analyze security --offline=true --threshold="$threshold" --no-pager "$work/$unit.service" | tail -n 1
done

# Both in the given root, and of the one named file.
systemd-sysusers --root="$root" "$root/usr/lib/sysusers.d/sprat.conf"
user() { sed -n "s/^$1:[^:]*:\([0-9]*\):.*/\1/p" "$root/etc/passwd"; }
[ -n "$(user sprat-tracker)" ] && [ -n "$(user sprat-peer)" ] && [ "$(user sprat-tracker)" != "$(user sprat-peer)" ]
if [ "$(id -u)" -ne 0 ]; then
    echo 'SKIPPED: the folders of the services: systemd-tmpfiles needs root to give them away'
    exit
fi
systemd-tmpfiles --root="$root" --create "$root/usr/lib/tmpfiles.d/sprat.conf"
owned() { stat -c '%a %u' "$root$1" | diff - <(echo "$2 $3"); }
owned /var/lib/sprat-tracker 700 "$(user sprat-tracker)"
owned /var/lib/sprat-peer 700 "$(user sprat-peer)"
owned /srv/sprat 755 "$(user sprat-peer)"
owned /etc/sprat 755 0
echo 'the release and its units are as they should be'
