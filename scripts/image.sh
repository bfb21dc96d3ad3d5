#!/usr/bin/env bash
# Makes an image in dist/ or the folder of DIST:
#
#   countersign-VARIANT_VERSION.raw     a disk, for a rack machine
#   countersign-VARIANT_VERSION.qcow2   the same, for a VM
#   countersign-VARIANT_VERSION.efi     the signed image alone, for an update
#
# KEYS is the folder of image/keys.sh. VARIANT is vm (default) or rack, and SETTINGS a countersign.toml
# for the ESP. MODULES has the paths of vendors' PKCS#11 modules, separated by spaces. Without KEYS, the
# script makes keys for tests in image/test-keys, and the image says so on its console.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH+=:/usr/sbin:/sbin # depmod, sfdisk, mkfs.fat
dist=${DIST:-dist} variant=${VARIANT:-vm}
heading=$(grep -m 1 -E '^## [0-9]' NEWS.md)
version=${VERSION:-$(sed -E 's/^## ([^ ,]+).*/\1/' <<<"$heading")}
epoch=$(date -u -d "${heading##* }" +%s)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
keys=${KEYS:-image/test-keys}
if [ ! -e "$keys" ]; then
  if [ -n "${KEYS:-}" ]; then
    echo "scripts/image.sh: there is no folder $keys: make it by image/keys.sh" >&2
    exit 1
  fi
  echo "NOTE: no KEYS are named: $keys gets keys for tests, and the image protects nothing" >&2
  ssh-keygen -q -t ed25519 -N '' -C 'test release key' -f "$work/release"
  TEST=1 image/keys.sh "$keys" 1 "$work/release.pub"
  cp "$work/release" "$keys/release.key" # for updates of a machine that was made with test keys
fi
scripts/console.sh
MACHINE=1 scripts/build.sh "$work/bin"
modules=()
for module in ${MODULES:-}; do modules+=(--module "$module"); done
go run ./image/build image --variant "$variant" --keys "$keys" --programs "$work/bin" --version "$version" \
  --epoch "$epoch" --out "$dist" ${LEVEL:+--level "$LEVEL"} ${SETTINGS:+--settings "$SETTINGS"} "${modules[@]}"
ls -l "$dist/countersign-${variant}_$version".*
