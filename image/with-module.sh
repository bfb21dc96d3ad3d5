#!/usr/bin/env bash
# Makes an image that has PKCS#11 modules of vendors: image/with-module.sh FILE... The files are modules,
# libraries that the modules need, and their configuration. They are in an initrd of their own, behind
# that of the image: signed and measured with it. On the machine, they are in
# /usr/lib/countersign-modules. KEYS, VARIANT, SETTINGS and DIST are those of make image.
set -euo pipefail
if (($# == 0)); then
  echo "usage: image/with-module.sh FILE..." >&2
  exit 2
fi
for module in "$@"; do
  [ -f "$module" ] || { echo "image/with-module.sh: there is no file $module" >&2; exit 1; }
done
modules=$(realpath -- "$@")
cd "$(dirname "$0")/.."
MODULES=${modules//$'\n'/ } exec make image
