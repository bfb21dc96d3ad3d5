#!/usr/bin/env bash
# Sets .run/ up and serves until Ctrl-C.
cd "$(dirname "$0")/.."
. scripts/setup.sh

cat <<TEXT

Countersign serves on $listen until Ctrl-C. In another terminal, in this folder, type:

  export COUNTERSIGN_SERVER=$listen COUNTERSIGN_SERVER_KEY=\$(cat $run/noise.pub) COUNTERSIGN_IDENTITY=$run/demo-peer.key
  $bin/countersign keys
  $bin/countersign sign --json --key payments --type paykit-subscription-v2 --as subscriber examples/subscription.json >signed.json
  $bin/countersign verify signed.json
  $bin/countersign verify signed.json          # the second time it is a replay
  $bin/countersign admin --socket $run/admin.sock audit list

The log is in $run/log.
TEXT
trap 'echo; echo stopping' INT TERM
wait "$daemon" || true # ends at the first signal
if ! stop; then died; fi
if grep -q '^countersignd:' "$run/log"; then died; fi
echo stopped
