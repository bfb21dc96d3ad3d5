#!/usr/bin/env bash
# Sets up .run/ and serves until Ctrl-C.
cd "$(dirname "$0")/.."
. scripts/setup.sh
trap 'echo; echo stopping; kill -TERM "$daemon" 2>/dev/null || true' INT TERM

# .run/env turns another terminal into the demo peer and the operator admin. The SSH agent has the
# operator's key.
cat >"$run/env.new" <<ENV
export COUNTERSIGN_SERVER=$listen COUNTERSIGN_SERVER_KEY=$(cat "$run/noise.pub")
export COUNTERSIGN_IDENTITY="$here/$run/demo-peer.key"
export COUNTERSIGN_SOCKET="$here/$run/admin.sock" COUNTERSIGN_OPERATOR=admin
export SSH_AUTH_SOCK="$SSH_AUTH_SOCK" XDG_RUNTIME_DIR="$XDG_RUNTIME_DIR" XDG_CONFIG_HOME="$XDG_CONFIG_HOME"
ENV
mv "$run/env.new" "$run/env"

# The console's first passkey is one more credential of the operator admin, made by a link.
admin tls show --json 2>/dev/null | sed -n 's/^ *"ca": "\(.*\)",\{0,1\}$/\1/p' | sed 's/\\n/\n/g' >"$run/ca.pem" || true
linker=''
if ! admin operator show admin | grep -q passkey; then
  admin operator link admin --wait >"$run/link" 2>"$run/link.err" </dev/null &
  linker=$!
  for _ in $(seq 100); do [ -s "$run/link" ] && break; sleep 0.05; done
fi
cat <<TEXT

Countersign serves until Ctrl-C:

  $listen   peers, profile countersign-v1
  $pubky   peers, profile pubky-noise-v1

  https://localhost:${https##*:}   the web console
$(if [ -n "$linker" ]; then
  echo
  echo "Open this link in a browser of this machine. It works once, and makes the passkey of the operator admin:"
  echo
  echo "  $(cat "$run/link")"
else
  echo
  echo "Sign in as admin, with the passkey that you have made."
fi)

The browser warns of the certificate until it trusts the appliance's CA, $run/ca.pem.
Firefox: Settings, Certificates, Import. Chromium and Chrome on Linux:

  certutil -d sql:\$HOME/.pki/nssdb -A -t C,, -n countersign -i $run/ca.pem

In another terminal, in this folder, type:

  . $run/env
  $bin/countersign sign --json --key payments --type paykit-subscription-v2 --as subscriber examples/subscription.json >signed.json
  $bin/countersign verify signed.json
  $bin/countersign verify signed.json          # the second time it is a replay
  $bin/countersign admin whoami
  $bin/countersign admin audit list

README.md has more commands. The daemon's log is $run/log.
TEXT
# A signal interrupts wait before the daemon has ended, so wait runs again.
while kill -0 "$daemon" 2>/dev/null; do wait "$daemon" || true; done
rm -f "$run/env" "$run/link" # the agent ends with this script
[ -z "$linker" ] || kill "$linker" 2>/dev/null || true
wait "$daemon" || died
endTPM
trap - EXIT
echo stopped
