#!/usr/bin/env bash
# Runs every fuzz target for FUZZTIME (default 1m), FUZZJOBS targets at once (default: the number of
# processors), with one worker each. FUZZ selects targets: a regular expression on package and name.
# go test saves a failing input in the package's testdata/fuzz; later test runs repeat the input.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${FUZZTIME:-1m}
jobs=${FUZZJOBS:-$(nproc)}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

targets=$(grep -rHo --include='*_test.go' '^func Fuzz[A-Za-z0-9]*' . |
  sed 's|/[^/]*_test.go:func | |' | sort | grep -E "${FUZZ:-.}" || true)
[ -n "$targets" ] || {
  echo "no fuzz target matches FUZZ=${FUZZ:-.}: give a part of a package or name, such as noise" >&2
  exit 2
}
one() { # one FOLDER TARGET: fuzzes one target and prints one line
  log="$out/$(echo "$1.$2" | tr '/' '_')"
  if go test -run '^$' -fuzz "^$2\$" -fuzztime "$time" -fuzzminimizetime 10x -parallel 1 "$1" >"$log" 2>&1; then
    echo "$1 $2: $(grep -o 'execs: [0-9]*' "$log" | tail -1), no failure"
  else
    echo "$1 $2: FAILED"
    tail -n 20 "$log" | cut -c 1-500
    return 1
  fi
}
export -f one
export out time
echo "$(echo "$targets" | wc -l) targets, $time each, $jobs at once"
echo "$targets" | xargs -P "$jobs" -L 1 bash -c 'one "$0" "$1"'
