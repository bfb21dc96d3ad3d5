#!/usr/bin/env bash
# Sets .run/ up and serves until Ctrl-C.
cd "$(dirname "$0")/.."
. scripts/setup.sh
trap 'echo; echo stopping; kill -TERM "$daemon" 2>/dev/null || true' INT TERM

# For another terminal: the demo's peer, and its operator with the agent that has his key.
cat >"$run/env.new" <<ENV
export COUNTERSIGN_SERVER=$listen COUNTERSIGN_SERVER_KEY=$(cat "$run/noise.pub") COUNTERSIGN_IDENTITY="$here/$run/demo-peer.key"
export COUNTERSIGN_SOCKET="$here/$run/admin.sock" COUNTERSIGN_OPERATOR=admin SSH_AUTH_SOCK="$SSH_AUTH_SOCK" XDG_RUNTIME_DIR="$XDG_RUNTIME_DIR"
ENV
mv "$run/env.new" "$run/env"
cat <<TEXT

Countersign serves on $listen (profile countersign-v1) and $pubky (pubky-noise-v1) until Ctrl-C. In another terminal, in this folder, type:

  . $run/env
  $bin/countersign sign --json --key payments --type paykit-subscription-v2 --as subscriber examples/subscription.json >signed.json
  $bin/countersign verify signed.json
  $bin/countersign verify signed.json          # the second time it is a replay
  $bin/countersign admin whoami
  $bin/countersign admin audit list

README.md has more. The log is in $run/log.
TEXT
while kill -0 "$daemon" 2>/dev/null; do wait "$daemon" || true; done # a signal ends wait before the daemon has ended
rm -f "$run/env" # its agent goes
wait "$daemon" || died
endTPM
trap - EXIT
echo stopped
