#!/usr/bin/env bash
# Runs each fuzz target for a time (FUZZTIME, default 1m), as many at once as there are processors (FUZZJOBS), one worker each. What
# makes one fail is kept as a file in the package's testdata/fuzz, and from then on is a test.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${FUZZTIME:-1m}
jobs=${FUZZJOBS:-$(nproc)}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

targets=$(grep -rHo --include='*_test.go' '^func Fuzz[A-Za-z0-9]*' . | sed 's|/[^/]*_test.go:func | |' | sort | grep -E "${FUZZ:-.}")
[ -n "$targets" ] || { echo "no fuzz target matches FUZZ=${FUZZ:-.}" >&2; exit 2; }
one() {
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
