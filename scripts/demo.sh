#!/usr/bin/env bash
# Shows the appliance at work, on real parts. A peer has a document signed over Noise, by a key in a
# SoftHSM token; with BACKEND=tpm, by a key sealed by a TPM. The appliance and OpenSSL verify the
# signature. Misuse is refused. All files stay in .run/demo/, so a reader can repeat offline checks.
cd "$(dirname "$0")/.."
hook=${LISTEN_HOOK:-127.0.0.1:7702} # the receiver of alerts
tables="[[webhooks]]
name = \"demo\"
url = \"http://$hook/\"
types = [\"alert\"]

[alerts] # shorter times than the default ones, so that the demo sees the end of an alert
replays_window = \"15s\"
quiet = \"5s\"

[limits]
clock_skew = \"2s\" # a restored appliance refuses new documents for twice as long
"
. scripts/setup.sh

work=$run/demo
rm -rf "$work"
mkdir "$work"
export COUNTERSIGN_SERVER=$listen COUNTERSIGN_SERVER_KEY COUNTERSIGN_IDENTITY=$run/demo-peer.key
COUNTERSIGN_SERVER_KEY=$(cat "$run/noise.pub")
signed=0 verified=0 refused=0 steps=0
exec 3>&1 # the terminal, for a command whose stdout goes to a file

fail() { echo "demo: FAILED: $*" >&2; exit 1; }
field() { # field NAME FILE: prints a field of indented JSON
  sed -n "s/^  \"$1\": \"\\{0,1\\}\\([^\",]*\\)\"\\{0,1\\},\\{0,1\\}\$/\\1/p" "$2"
}
unhex() { tr a-f A-F | basenc -d --base16; }
unbase64url() { tr -- '-_' '+/' | sed 's/$/==/' | basenc -d --base64 --ignore-garbage 2>/dev/null || true; }

step() { echo; echo "$((++steps)). $*"; }
fact() { printf '   %-11s %s\n' "$1" "$2" >&3; } # fact LABEL TEXT
show() { # show COMMAND...: prints the command and runs it
  fact command "$*"
  "$@"
}

refuse() { # refuse CODE WHAT COMMAND...: runs a command that must fail with an error code
  local code=$1 what=$2
  shift 2
  if "$@" >"$work/out" 2>"$work/err"; then fail "$what was accepted"; fi
  grep -q "^countersign: error: $code: " "$work/err" || fail "$what: expected $code, got: $(cat "$work/err")"
  refused=$((refused + 1))
  fact refused "$what"
  fact "  error" "$(sed -n '1s/^countersign: error: //; 1s/;.*//; 1p' "$work/err")"
}

"$bin/receiver" "$hook" "$(admin audit key --json | sed -n 's/^ *"webhook_key": "\(.*\)".*/\1/p')" >"$work/alerts.log" &
receiver=$!
trap 'kill "$receiver" 2>/dev/null || true; finish' EXIT

sign_command=("$bin/countersign" sign --json --key payments --type paykit-subscription-v2 --as subscriber)
admin_command=("$bin/countersign" admin --socket "$run/admin.sock")

echo "Set up: an appliance in $run/ with $device"
fact listener "$listen, profile countersign-v1"
fact peer "demo, with the identity file $COUNTERSIGN_IDENTITY"
fact operator "admin, with the SSH key $run/admin.key in an SSH agent"
fact daemon "bin/countersignd serve --config $run/countersign.toml, with its log in $run/log"

step "Sign a document with a key in $device"
fact document "examples/subscription.json"
nonce=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
now=$(date +%s)
show "${sign_command[@]}" --nonce "$nonce" --timestamp "$now" examples/subscription.json >"$work/signed.json" || fail "sign"
signed=$((signed + 1))
event=$(field event "$work/signed.json")
version=$(field version "$work/signed.json")
fact key "payments, version $version"
admin key show payments | awk -v RS= '/\nstate +active\n/' | sed -n '/^\(custody\|origin\|public key\) /s/^/   /p'
fact signature "$(field signature "$work/signed.json")"
fact file "$work/signed.json"
show "${admin_command[@]}" audit list --from "$event" --limit 1 >"$work/out" 2>"$work/err" ||
  fail "audit list: $(cat "$work/err")"
grep -q "^$event .*SignatureAdmitted" "$work/out" || fail "event $event is not the admission: $(cat "$work/out")"
fact admission "event $event of the audit log, on disk before the key was used"

step "Send the same request again, as a client does after a lost answer"
"${sign_command[@]}" --nonce "$nonce" --timestamp "$now" examples/subscription.json >"$work/again.json" || fail "sign again"
[ "$(field signature "$work/again.json")" = "$(field signature "$work/signed.json")" ] ||
  fail "the repetition has another signature"
[ "$(field repeated "$work/again.json")" = true ] || fail "the repetition is not marked"
signed=$((signed + 1))
fact answer "the same signature, marked as repeated"

step "Verify the signature by the appliance"
show "$bin/countersign" verify --key payments "$work/signed.json" >"$work/out" || fail "verify"
verified=$((verified + 1))
fact answer "$(cat "$work/out")"

# OpenSSL needs only a public key, a message of 32 bytes and a signature of 64 bytes.
step "Verify the signature by OpenSSL"
"$bin/countersign" transcript encode paykit-subscription-v2 "$work/signed.json" --json >"$work/encoded.json" ||
  fail "encode"
field canonical "$work/encoded.json" | unhex | openssl dgst -sha256 -binary >"$work/message"
key=$(admin key list | awk '$1 == "payments" && $4 == "active" { print $NF }')
{ printf 302a300506032b6570032100; printf %s "$key"; } | unhex >"$work/key.der" # RFC 8410
field signature "$work/signed.json" | unbase64url >"$work/signature"
fact message "the SHA-256 of the document's canonical bytes (countersign transcript encode)"
show openssl pkeyutl -verify -pubin -keyform DER -inkey "$work/key.der" -rawin -in "$work/message" \
  -sigfile "$work/signature" >"$work/out" 2>&1 || fail "OpenSSL: $(cat "$work/out")"
verified=$((verified + 1))
fact answer "$(cat "$work/out")"

step "Try misuse"
refuse replay "the signed document, verified a second time" "$bin/countersign" verify "$work/signed.json"
sed 's/"amount":"1000"/"amount":"9000"/; s/"amount": "1000"/"amount": "9000"/' \
  "$work/signed.json" >"$work/tampered.json"
cmp -s "$work/signed.json" "$work/tampered.json" && fail "nothing was tampered with"
refuse invalid_signature "the signed document with another amount" "$bin/countersign" verify "$work/tampered.json"
sed 's/"1000"/"2000"/' examples/subscription.json >"$work/other.json"
refuse replay "a signature for another document under the first nonce" \
  "${sign_command[@]}" --nonce "$nonce" --timestamp "$now" "$work/other.json"
refuse expired "a signature for a document that expired an hour ago" \
  "${sign_command[@]}" --timestamp "$((now - 7200))" examples/subscription.json
"$bin/countersign" keygen "$work/stranger.key" >/dev/null
refuse handshake_refused "a handshake by a peer that is not enrolled" \
  "$bin/countersign" ping --identity "$work/stranger.key"

step "Check the audit log with nothing but the log's public key"
vkey=$(admin audit key)
show "$bin/countersign" proof --log-key "$vkey" "$event" >"$work/out" || fail "proof"
verified=$((verified + 1))
fact proven "event $event, the admission, is in the log's Merkle tree"
show "${admin_command[@]}" audit export "$work/log" >/dev/null || fail "export"
show "$bin/countersign" audit verify "$work/log" --key "$vkey" >"$work/out" || fail "audit verify"
verified=$((verified + 1))
fact verified "$(sed -n 's/^valid *//p' "$work/out")"
fact signatures "$(sed -n 's/^signatures *//p' "$work/out")"
cp -r "$work/log" "$work/tampered-log"
bundle=$(find "$work/tampered-log/epochs/" -path '*entries*' -type f | head -n 1)
sed -i 's/SignatureRejected/SignatureVerified/; s/SubscriptionCreated/SubscriptionCreat3d/' "$bundle"
refuse wrong_event "a copy of the log with changed events" \
  "$bin/countersign" audit verify "$work/tampered-log" --key "$vkey"

step "Rotate the key while a peer is connected"
"$bin/countersign" line pin payments >"$work/payments.line" || fail "pin"
"$bin/countersign" watch --line "$work/payments.line" --until-rotations 1 --timeout 60s \
  >"$work/watched" 2>"$work/err" &
watcher=$!
until admin peer list | grep -q '^demo .* 1  *enrolled$'; do # until the peer has 1 connection
  kill -0 "$watcher" || fail "watch: $(cat "$work/err")"
  sleep 0.1
done
show "${admin_command[@]}" key rotate payments --now >"$work/out" || fail "rotate"
wait "$watcher" || fail "watch: $(cat "$work/err")"
"$bin/countersign" line follow --write "$work/payments.line" >"$work/out" || fail "follow the line"
"${sign_command[@]}" examples/subscription.json >"$work/new.json" || fail "sign after the rotation"
new=$(field version "$work/new.json")
[ "$new" -gt "$version" ] || fail "the old version has signed"
signed=$((signed + 1))
fact successor "version $new; version $version committed to its public key before the rotation"
fact peer "has followed the rotation from its pinned version, and acknowledged version $new"
fact signed "examples/subscription.json, by version $new"
state=$(admin key list | awk -v v="$version" '$1 == "payments" && $2 == v { print $4 }')
fact predecessor "version $version is $state"

step "Announce a rotation, and call it off"
"$bin/countersign" watch --line "$work/payments.line" --until-rotations 2 --timeout 60s \
  >"$work/watched" 2>"$work/err" &
watcher=$!
until admin peer list | grep -q '^demo .* 1  *enrolled$'; do
  kill -0 "$watcher" || fail "watch: $(cat "$work/err")"
  sleep 0.1
done
show "${admin_command[@]}" key rotate payments --in 2d >"$work/out" || fail "announce"
successor=$(sed -n 's/^public key *//p' "$work/out")
until grep -q . "$work/watched"; do # until the peer has heard of it
  kill -0 "$watcher" || fail "watch: $(cat "$work/err")"
  sleep 0.1
done
show "${admin_command[@]}" key rotate payments --cancel >"$work/out" || fail "call off"
wait "$watcher" || fail "watch: $(cat "$work/err")"
grep -q "version $((new + 1)) is called off: version $new stays" "$work/watched" ||
  fail "the peer was told: $(cat "$work/watched")"
fact peer "$(sed -n 's/, public key.*//; $p' "$work/watched")"
"${sign_command[@]}" examples/subscription.json >"$work/stays.json" || fail "sign after the rotation was called off"
[ "$(field version "$work/stays.json")" = "$new" ] || fail "version $new has not signed"
signed=$((signed + 1))
fact signed "examples/subscription.json, by version $new"
admin key show payments | grep -q "^public key *$successor" || fail "the successor is another one"
fact successor "version $((new + 1)) stays the committed one: a later rotation leads to it"

step "Enroll a peer with two operators"
first_agent=$SSH_AUTH_SOCK
new_operator second
second_agent=$SSH_AUTH_SOCK
export SSH_AUTH_SOCK=$first_agent
second() { COUNTERSIGN_OPERATOR=second SSH_AUTH_SOCK=$second_agent XDG_RUNTIME_DIR="$here/$work/second" admin "$@"; }
admin operator show second >/dev/null 2>&1 ||
  quietly admin operator add second --roles approver --ssh-key "$run/second.key.pub"
quietly admin approvals needed 2
fact quorum "2 approvals, of the operators admin and second"
shop=$("$bin/countersign" keygen "$work/shop.key")
show "${admin_command[@]}" peer add shop "$shop" </dev/null >"$work/out" 2>"$work/err" || fail "propose: $(cat "$work/err")"
proposal=$(sed -n 's/^proposal \([0-9]*\):.*/\1/p' "$work/out")
fact proposed "by admin: $(cat "$work/out")"
admin peer list | grep -q '^shop ' && fail "one operator has enrolled a peer"
second proposal approve "$proposal" </dev/null >"$work/out" 2>"$work/err" || fail "approve: $(cat "$work/err")"
admin peer list | grep -q '^shop ' || fail "two approvals have not enrolled the peer"
fact approved "by the SSH key of second: $(cat "$work/out")"
fact enrolled "the peer shop"
approve_second() { # approve_second: second approves the proposal that $work/out names
  proposal_of_policy=$(sed -n 's/^proposal \([0-9]*\):.*/\1/p' "$work/out")
  second proposal approve "$proposal_of_policy" </dev/null >"$work/out" 2>"$work/err" || fail "approve: $(cat "$work/err")"
}
cp "$run/policy.cedar" "$work/next.cedar"
echo 'permit (principal == Peer::"shop", action == Action::"sign", resource == Key::"payments");' >>"$work/next.cedar"
show "${admin_command[@]}" policy propose "$work/next.cedar" </dev/null >"$work/out" 2>"$work/err" ||
  fail "propose a policy: $(cat "$work/err")"
approve_second
fact approved "proposal $proposal_of_policy, a policy; before the signature, second has seen this:"
sed -n '/^| --- /,/would change$/p' "$work/err" | sed 's/^| /               /'
admin policy propose "$run/policy.cedar" </dev/null >"$work/out" 2>"$work/err" || fail "propose: $(cat "$work/err")"
approve_second
quietly admin peer remove shop
admin approvals needed 1 </dev/null >"$work/out" 2>"$work/err" || fail "approvals needed 1: $(cat "$work/err")"
quietly second proposal approve "$(sed -n 's/^proposal \([0-9]*\):.*/\1/p' "$work/out")"
admin audit export "$work/approved" >/dev/null || fail "export"
show "$bin/countersign" audit approvals "$work/approved" --key "$vkey" >"$work/out" ||
  fail "audit approvals: $(cat "$work/out")"
verified=$((verified + 1))
fact verified "$(grep -c '^approved' "$work/out") approvals, from the log alone; those of proposal $proposal:"
sed -n "/^proposal $proposal /,/^outcome/p" "$work/out" | sed 's/^/               /'

step "Be alerted, and see the alert end"
heard() { # heard TYPE: waits until the receiver has a message of the type about replays
  for _ in $(seq 600); do
    grep -q " $1 replays," "$work/alerts.log" && return
    kill -0 "$receiver" || fail "the receiver of alerts has ended"
    sleep 0.1
  done
  fail "the receiver was not told $1: $(cat "$work/alerts.log")"
}
heard alert.firing
fact "sent" "$(grep ' alert.firing replays,' "$work/alerts.log" | head -n 1)"
heard alert.resolved
fact "sent" "$(grep ' alert.resolved replays,' "$work/alerts.log" | head -n 1)"
grep -q '^refused' "$work/alerts.log" && fail "a message has no valid signature"
fact receiver "has verified both by the key of the audit log; its log is $work/alerts.log"
show "${admin_command[@]}" audit list --type AlertFiring >"$work/out" || fail "audit list"
grep -q 'AlertFiring' "$work/out" || fail "the log has no event of the alert: $(cat "$work/out")"
fact event "$(grep AlertFiring "$work/out" | head -n 1)"
show "${admin_command[@]}" alert list >"$work/out" || fail "alert list"
grep -q replays "$work/out" && fail "the alert fires on: $(cat "$work/out")"
fact now "$([ -s "$work/out" ] && sed -n 's/^alert *//p' "$work/out" || echo "no alert fires")"

lost_token='' # the keys of an older .run/, or of a TPM, can't come back
admin key show payments | grep -q '^custody *hsm-recoverable' && lost_token=' and its token'
step "Back up, lose the machine$lost_token, and restore elsewhere"
show "${admin_command[@]}" backup create >"$work/out" || fail "backup create"
backup=$run/backups/$(sed -n 's/^backup *//p' "$work/out")
fact backup "$(sed -n 's/^size *//p' "$work/out"), encrypted to an SSH key; $(sed -n 's/^log *//p' "$work/out")"
show "$bin/countersignd" backup verify "$backup" --identity "$run/recovery" >"$work/out" || fail "backup verify"
fact verified "$(sed -n 's/^ok: //p' "$work/out")"
show "$bin/countersignd" drill --config "$run/countersign.toml" --identity "$run/recovery" --scratch "$work" >"$work/out" ||
  fail "drill: $(cat "$work/out")"
fact drilled "$(sed -n 's/^proven *//p' "$work/out" | tail -n 4 | paste -sd ';' | sed 's/;/; /g')"
lost=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
then=$(date +%s)
"${sign_command[@]}" --nonce "$lost" --timestamp "$then" examples/subscription.json >"$work/lost.json" || fail "sign"
signed=$((signed + 1))
fact signed "a document after the backup; then the daemon stops; gone is the machine$lost_token"
stop || fail "the daemon did not stop cleanly: $(tail -n 3 "$run/log")"
other=$work/elsewhere
mkdir -p "$other/backups"
for part in pin softhsm2.conf; do # not in a backup
  [ ! -e "$run/$part" ] || cp "$run/$part" "$other/$part"
done
if [ -n "$lost_token" ]; then
  mkdir "$other/tokens" "$other/answers"
  sed -i "s|^directories.tokendir.*|directories.tokendir = $here/$other/tokens|" "$other/softhsm2.conf"
  sed "s|$here/$run|$here/$other|g" "$run/countersign.toml" >"$other/countersign.toml"
  cp "$run/policy.cedar" "$other/policy.cedar"
  show "$bin/countersignd" init --config "$other/countersign.toml" --token main --new-token --so-pin-file "$run/so-pin" \
    >"$work/out" 2>&1 || fail "init: $(cat "$work/out")"
  fact token "an empty one"
fi
restore=("$bin/countersignd" restore "$backup" --appliance "$(cut -d / -f 1-2 <<<"$vkey")" --identity "$run/recovery" --map "$here/$run=$here/$other"
  --proposer admin --text "$work/restore.txt")
show "${restore[@]}" >"$work/out" || fail "restore: $(cat "$work/out")"
fact reaches "$(sed -n 's/^reaches *//p' "$work/out")"
fact keys "$(sed -n 's/^keys *//p' "$work/out")"
show ssh-keygen -q -Y sign -n countersign-proposal-v1 -f "$run/admin.key" "$work/restore.txt" || fail "sign the text"
show "${restore[@]}" --approval "$work/restore.txt.sig" >"$work/out" || fail "restore: $(cat "$work/out")"
fact approved "by $(sed -n 's/^approved by *//p' "$work/out"), an operator of the backup"
if [ -n "$lost_token" ]; then
  returning=("$bin/countersignd" return-keys --config "$other/countersign.toml" --request "$work/return.request"
    --answers "$other/answers")
  fact command "${returning[*]}"
  "${returning[@]}" >"$work/return.log" 2>&1 &
  ceremony=$!
  for _ in $(seq 100); do # at most 10 s
    grep -q '^waiting' "$work/return.log" && break
    kill -0 "$ceremony" 2>/dev/null || fail "return-keys: $(cat "$work/return.log")"
    sleep 0.1
  done
  code=$(sed -n 's/^code *\([^:]*\):.*/\1/p' "$work/return.log")
  fact code "$code, which the holders get by a call"
  for holder in alice carol; do
    show "$bin/countersign" holder give "$work/return.request" --identity "$run/$holder" --code "$code" \
      --answer "$other/answers/$holder.answer" >"$work/out" || fail "holder give"
    fact answer "of $(sed -n 's/^holder *//p' "$work/out"), with shares of $(sed -n 's/^keys *//p' "$work/out")"
  done
  wait "$ceremony" || fail "return-keys: $(cat "$work/return.log")"
  fact returned "$(grep -c '^returned' "$work/return.log") keys, by the shares of 2 of 3 holders"
fi
"$bin/countersignd" serve --config "$other/countersign.toml" 2>"$other/log" &
daemon=$!
until "$bin/countersign" ping >/dev/null 2>&1; do
  kill -0 "$daemon" || fail "$(tail -n 3 "$other/log")"
  sleep 0.1
done
"${sign_command[@]}" --nonce "$lost" --timestamp "$then" examples/subscription.json >"$work/again.json" || fail "sign"
cmp -s <(sed 's/"repeated": false/"repeated": true/' "$work/lost.json") "$work/again.json" ||
  fail "the document of after the backup has another answer"
fact answered "that document again, with the same signature: the lists of writes have it"
refuse restored "a document with a time of before, which the old appliance may have signed" \
  "${sign_command[@]}" --nonce "$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')" --timestamp "$then" examples/subscription.json
until "${sign_command[@]}" examples/subscription.json >"$work/restored.json" 2>"$work/err"; do
  grep -q '^countersign: error: restored: ' "$work/err" || fail "sign after the restore: $(cat "$work/err")"
  sleep 0.5
done
signed=$((signed + 1))
fact signed "a new document, by the restored appliance in $other"
stop || fail "the restored daemon did not stop cleanly: $(tail -n 3 "$other/log")"
# One appliance goes on with these keys: the restored one. The counter of a TPM is bound to its ledger.
mv "$run/ledger.db" "$work/lost.db"
cp "$other/ledger.db" "$run/ledger.db"
fact "goes on" "$run, with the restored ledger; the lost one is $work/lost.db"
echo
echo "next: the commands openssl, audit verify and audit approvals above work again, without the daemon"
echo "next: \"make run\" serves the same appliance for your own commands; README.md lists some"
echo "next: \"make clean\" removes bin/, .run/ and .run-tpm/"
echo "demo: ok, $signed signed, $verified verified, $refused refused as they should be"
