#!/usr/bin/env bash
# Sets .run/ up and serves until Ctrl-C.
cd "$(dirname "$0")/.."
. scripts/setup.sh
trap 'echo; echo stopping; kill -TERM "$daemon" 2>/dev/null || true' INT TERM

cat <<TEXT

Countersign serves on $listen (profile countersign-v1) and $pubky (pubky-noise-v1) until Ctrl-C. In another terminal, in this folder, type:

  export COUNTERSIGN_SERVER=$listen COUNTERSIGN_SERVER_KEY=\$(cat $run/noise.pub) COUNTERSIGN_IDENTITY=$run/demo-peer.key
  $bin/countersign keys
  $bin/countersign sign --json --key payments --type paykit-subscription-v2 --as subscriber examples/subscription.json >signed.json
  $bin/countersign verify signed.json
  $bin/countersign verify signed.json          # the second time it is a replay
  export COUNTERSIGN_SOCKET=$run/admin.sock COUNTERSIGN_OPERATOR=admin SSH_AUTH_SOCK=$SSH_AUTH_SOCK XDG_RUNTIME_DIR=$XDG_RUNTIME_DIR
  $bin/countersign admin whoami
  $bin/countersign admin audit list

The log is in $run/log.
TEXT
while kill -0 "$daemon" 2>/dev/null; do wait "$daemon" || true; done # a signal ends wait before the daemon has ended
wait "$daemon" || died
endTPM
trap - EXIT
echo stopped
