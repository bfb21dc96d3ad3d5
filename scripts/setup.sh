#!/usr/bin/env bash
# Makes .run/: a configuration, a SoftHSM token and its PIN, a ledger, a first administrator, an
# enrolled peer and a signing key. With BACKEND=tpm the folder is .run-tpm/, and a TPM (swtpm)
# replaces the token. The script is idempotent: present parts stay as they are.
#
# demo.sh and run.sh source this script. Afterwards the daemon runs as process $daemon, `stop` ends
# the daemon, and an SSH agent has the administrator's key.
set -euo pipefail
umask 077

backend=${BACKEND:-softhsm}
case $backend in
softhsm) run=.run device="the SoftHSM token" ;;
tpm) run=.run-tpm device="the TPM (swtpm)" ;;
*) echo "BACKEND=$backend is unknown: set softhsm or tpm" >&2; exit 2 ;;
esac
bin=bin
listen=${LISTEN:-127.0.0.1:7700}      # profile countersign-v1
pubky=${LISTEN_PUBKY:-127.0.0.1:7701} # profile pubky-noise-v1
https=${LISTEN_HTTPS:-127.0.0.1:7780} # the web console
here=$(pwd -P)

secret() { # secret FILE: writes 32 random hex digits, unless the file exists
  [ -s "$1" ] || { od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$1.new" && mv "$1.new" "$1"; }
}

mkdir -p "$run/tokens" "$run/backups"
secret "$run/pin"
# Who can read the backups. The private half of a real appliance's recipient is on no such machine.
[ -e "$run/recovery" ] || ssh-keygen -q -t ed25519 -N '' -C recovery -f "$run/recovery"
# Two of three recovery holders bring the keys of a lost token back. Those of a real appliance are
# persons with machines of their own.
holders=(alice bob carol) recoverable=()
for holder in "${holders[@]}"; do
  [ -e "$run/$holder" ] || ssh-keygen -q -t ed25519 -N '' -C "$holder" -f "$run/$holder"
done
swtpm='' socket=''
if [ "$backend" = tpm ]; then
  socket=$(mktemp -d /tmp/swtpm.XXXXXX) # a socket path has at most 107 bytes
  swtpm socket --tpm2 --tpmstate dir="$run/tokens" --server type=unixio,path="$socket/sock" \
    --ctrl type=unixio,path="$socket/ctrl" --flags not-need-init,startup-clear 2>"$run/swtpm.log" &
  swtpm=$!
  for _ in $(seq 100); do [ -S "$socket/sock" ] && break; sleep 0.05; done
  init=(init)
  token="tpm = \"$socket/sock\"
state = \"keys\"
pcrs = [7, 11]
zero_pcrs = [7, 11] # this machine in software measures nothing"
else
  secret "$run/so-pin"
  cat >"$run/softhsm2.conf" <<CONF
directories.tokendir = $here/$run/tokens
objectstore.backend = file
log.level = ERROR
CONF
  init=(init --new-token --so-pin-file "$run/so-pin")
  if [ ! -e "$run/ledger.db" ]; then # decided when the keys are made
    recoverable=(--recoverable)
    init+=(--needed 2)
    for holder in "${holders[@]}"; do init+=(--holder "$holder=$run/$holder.pub"); done
  fi
  token="uri = \"pkcs11:token=countersign\"
module = \"/usr/lib/softhsm/libsofthsm2.so\"
pin_file = \"pin\"
sessions = 1 # SoftHSM is fastest with one session in each key worker
environment = { SOFTHSM2_CONF = \"$here/$run/softhsm2.conf\" }"
fi
endAgents() {
  [ -z "${agent_pids:-}" ] || kill $agent_pids 2>/dev/null || true
  [ -z "${agents:-}" ] || rm -rf "$agents"
}
endTPM() {
  endAgents
  if [ -n "$swtpm" ]; then
    kill "$swtpm" 2>/dev/null && wait "$swtpm" 2>/dev/null || true
    rm -rf "$socket"
  fi
}
trap endTPM EXIT

# An operator may have changed the policy, so a present file stays.
[ -e "$run/policy.cedar" ] || cat >"$run/policy.cedar" <<'CONF'
// The demo peer may use the key "payments" with every transcript type except raw. Signing raw is
// another action, "sign_raw".
permit (principal == Peer::"demo", action == Action::"sign", resource == Key::"payments");
CONF

cat >"$run/countersign.toml" <<CONF
# Made by make run and make demo. cmd/countersignd/config.go describes every field.
listen = "$listen"
listen_pubky = "$pubky"
admin_socket = "admin.sock"
admin_https = "$https"
ledger = "ledger.db"
policy = "policy.cedar"

[tokens.main]
$token

[backup]
folder = "backups"
recipients = ["$(cut -d ' ' -f 1-2 "$run/recovery.pub")"]
${tables:-}
CONF

"$bin/countersignd" "${init[@]}" --config "$run/countersign.toml" >/dev/null

admin() { "$bin/countersign" admin --socket "$run/admin.sock" "$@"; }
quietly() { # quietly COMMAND...: prints stderr only if the command fails, and then exits
  "$@" >/dev/null 2>"$run/err" </dev/null || { cat "$run/err" >&2; exit 1; }
}
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# Operators of a real appliance keep SSH keys in their own agents, best on FIDO keys
# (ssh-keygen -t ed25519-sk).
agents=$(mktemp -d /tmp/agents.XXXXXX) # a socket path has at most 107 bytes
export COUNTERSIGN_OPERATOR=admin XDG_RUNTIME_DIR="$here/$run/sessions" XDG_CONFIG_HOME="$here/$run/config" SSH_AUTH_SOCK SSH_AGENT_PID=''
new_operator() { # new_operator NAME: makes an SSH key and an agent with the key; sets SSH_AUTH_SOCK
  [ -e "$run/$1.key" ] || ssh-keygen -q -t ed25519 -N '' -C "$1" -f "$run/$1.key"
  eval "$(ssh-agent -a "$agents/$1")" >/dev/null
  agent_pids="${agent_pids:-} $SSH_AGENT_PID"
  ssh-add -q "$run/$1.key"
}

"$bin/countersignd" serve --config "$run/countersign.toml" 2>"$run/log" &
daemon=$!
stop() {
  if kill -0 "$daemon" 2>/dev/null; then
    kill -TERM "$daemon"
    wait "$daemon"
  fi
}
finish() { stop || true; endTPM; }
died() { # shows the end of the log of a daemon that stopped by itself, and exits
  tail -n 5 "$run/log" >&2
  exit 1
}
trap finish EXIT

new_operator admin
enrolled=''
for _ in $(seq 100); do # until the daemon answers, at most 10 s
  if as_root "$bin/countersign" admin --socket "$here/$run/admin.sock" operator first admin \
    --ssh-key "$here/$run/admin.key.pub" >/dev/null 2>"$run/err" ||
    grep -q '^countersign: error: conflict: ' "$run/err"; then # a first operator exists
    enrolled=yes
    break
  fi
  kill -0 "$daemon" 2>/dev/null || died
  grep -q '^countersign: error: unreachable: ' "$run/err" || break
  sleep 0.1
done
[ -n "$enrolled" ] || {
  cat "$run/err" >&2
  echo "the daemon does not answer on $run/admin.sock: read $run/log" >&2
  exit 1
}
quietly admin login admin
admin noise-key >"$run/noise.pub"

[ -e "$run/demo-peer.key" ] || "$bin/countersign" keygen "$run/demo-peer.key" >/dev/null
peer=$(sed -n 's/^# public key: //p' "$run/demo-peer.key")
admin peer list | grep -q "^demo  *$peer" || quietly admin peer add demo "$peer"
admin key show payments >/dev/null 2>&1 || quietly admin key create payments "${recoverable[@]}"
