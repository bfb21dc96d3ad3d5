#!/usr/bin/env bash
# The main job, once, on real parts: a document is signed by a key in a SoftHSM token, or with BACKEND=tpm by one that a TPM
# has sealed, over Noise, and judged by the appliance and by OpenSSL; and what must be refused is refused.
cd "$(dirname "$0")/.."
. scripts/setup.sh

work=$(mktemp -d)
trap 'finish; rm -rf "$work"' EXIT
export COUNTERSIGN_SERVER=$listen COUNTERSIGN_SERVER_KEY COUNTERSIGN_IDENTITY=$run/demo-peer.key
COUNTERSIGN_SERVER_KEY=$(cat "$run/noise.pub")
signed=0 verified=0 refused=0

fail() { echo "demo: FAILED: $*" >&2; exit 1; }
field() { sed -n "s/^  \"$1\": \"\\{0,1\\}\\([^\",]*\\)\"\\{0,1\\},\\{0,1\\}\$/\\1/p" "$2"; } # field NAME FILE: of indented JSON
unhex() { tr a-f A-F | basenc -d --base16; }
unbase64url() { tr -- '-_' '+/' | sed 's/$/==/' | basenc -d --base64 --ignore-garbage 2>/dev/null || true; }

refuse() { # refuse CODE WHAT COMMAND...: the command must fail with that code
  local code=$1 what=$2
  shift 2
  if "$@" >"$work/out" 2>"$work/err"; then fail "$what was accepted"; fi
  grep -q "^countersign: $code: " "$work/err" || fail "$what: expected $code, got: $(cat "$work/err")"
  refused=$((refused + 1))
  echo "refused:   $what: $(sed 's/^countersign: //' "$work/err" | head -n 1)"
}

sign() { "$bin/countersign" sign --json --key payments --type paykit-subscription-v2 --as subscriber "$@"; }

echo "signing examples/subscription.json with the key \"payments\" of $device:"
admin key show payments | sed 's/^/           /'
nonce=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
now=$(date +%s)
sign --nonce "$nonce" --timestamp "$now" examples/subscription.json >"$work/signed.json" || fail "sign"
signed=$((signed + 1))
event=$(field event "$work/signed.json")
echo "signed:    signature $(field signature "$work/signed.json")"
echo "           admitted as event $event before the key was used:"
admin audit list --from "$event" --limit 1 | sed 's/^/           /'

# An identical request after a lost answer gets the same answer.
sign --nonce "$nonce" --timestamp "$now" examples/subscription.json >"$work/again.json" || fail "sign again"
[ "$(field signature "$work/again.json")" = "$(field signature "$work/signed.json")" ] || fail "the repetition has another signature"
[ "$(field repeated "$work/again.json")" = true ] || fail "the repetition is not marked"
signed=$((signed + 1))
echo "signed:    the same request again: the same signature, marked as repeated"

"$bin/countersign" verify --key payments "$work/signed.json" >"$work/out" || fail "verify"
verified=$((verified + 1))
echo "verified:  by the appliance: $(cat "$work/out")"

# OpenSSL knows nothing of us: a public key, 32 bytes of message, 64 bytes of signature.
"$bin/countersign" transcript encode paykit-subscription-v2 "$work/signed.json" --json >"$work/encoded.json" || fail "encode"
field canonical "$work/encoded.json" | unhex | openssl dgst -sha256 -binary >"$work/message"
key=$(admin key show payments --json | sed -n 's/.*"public_key": "\([0-9a-f]*\)".*/\1/p')
{ printf 302a300506032b6570032100; printf %s "$key"; } | unhex >"$work/key.der" # RFC 8410
field signature "$work/signed.json" | unbase64url >"$work/signature"
openssl pkeyutl -verify -pubin -keyform DER -inkey "$work/key.der" -rawin -in "$work/message" -sigfile "$work/signature" >"$work/out" 2>&1 ||
  fail "OpenSSL: $(cat "$work/out")"
verified=$((verified + 1))
echo "verified:  by OpenSSL, over the SHA-256 of the document's canonical bytes: $(cat "$work/out")"

refuse replay "the signed document a second time" "$bin/countersign" verify "$work/signed.json"
sed 's/"amount":"1000"/"amount":"9000"/; s/"amount": "1000"/"amount": "9000"/' "$work/signed.json" >"$work/tampered.json"
cmp -s "$work/signed.json" "$work/tampered.json" && fail "nothing was tampered with"
refuse invalid_signature "a document with another amount" "$bin/countersign" verify "$work/tampered.json"
sed 's/"1000"/"2000"/' examples/subscription.json >"$work/other.json"
refuse replay "another document under the nonce of the first" sign --nonce "$nonce" --timestamp "$now" "$work/other.json"
refuse expired "a document that expired an hour ago" sign --timestamp "$((now - 7200))" examples/subscription.json
"$bin/countersign" keygen "$work/stranger.key" >/dev/null
refuse handshake_refused "a stranger" "$bin/countersign" ping --identity "$work/stranger.key"

# Two people: what widens what peers may do needs both.
first_agent=$SSH_AUTH_SOCK
new_operator second
second_agent=$SSH_AUTH_SOCK
export SSH_AUTH_SOCK=$first_agent
second() { COUNTERSIGN_OPERATOR=second SSH_AUTH_SOCK=$second_agent XDG_RUNTIME_DIR="$work/second" admin "$@"; }
admin operator show second >/dev/null 2>&1 || quietly admin operator add second --roles approver --ssh-key "$run/second.key.pub"
quietly admin approvals needed 2
shop=$("$bin/countersign" keygen "$work/shop.key")
admin peer add shop "$shop" </dev/null >"$work/out" 2>"$work/err" || fail "propose: $(cat "$work/err")"
echo "proposed:  $(cat "$work/out")"
proposal=$(sed -n 's/^proposal \([0-9]*\):.*/\1/p' "$work/out")
admin peer list | grep -q '^shop ' && fail "one person has enrolled a peer"
second proposal approve "$proposal" </dev/null >"$work/out" 2>"$work/err" || fail "approve: $(cat "$work/err")"
admin peer list | grep -q '^shop ' || fail "two approvals have not enrolled the peer"
echo "approved:  by a second SSH key: $(cat "$work/out")"
quietly admin peer remove shop
admin approvals needed 1 </dev/null >"$work/out" 2>"$work/err" || fail "approvals needed 1: $(cat "$work/err")"
quietly second proposal approve "$(sed -n 's/^proposal \([0-9]*\):.*/\1/p' "$work/out")"

# The log, checked by who has nothing but its key.
vkey=$(admin audit key)
"$bin/countersign" proof --log-key "$vkey" "$event" >"$work/out" || fail "proof"
verified=$((verified + 1))
echo "verified:  event $event is in the audit log: $(sed -n 's/^event *//p' "$work/out")"
admin audit export "$work/log" >/dev/null || fail "export"
"$bin/countersign" audit verify "$work/log" --key "$vkey" >"$work/out" || fail "audit verify"
verified=$((verified + 1))
echo "verified:  the whole log: $(sed -n 's/^valid *//p' "$work/out"); $(sed -n 's/^signatures */signatures: /p' "$work/out")"
"$bin/countersign" audit approvals "$work/log" --key "$vkey" >"$work/out" || fail "audit approvals"
verified=$((verified + 1))
echo "verified:  who approved of what, by the log alone:"
sed -n "/^proposal $proposal /,/^outcome/s/^/           /p" "$work/out"
bundle=$(find "$work/log/epochs/" -path '*entries*' -type f | head -n 1)
sed -i 's/SignatureRejected/SignatureVerified/; s/SubscriptionCreated/SubscriptionCreat3d/' "$bundle"
refuse wrong_event "a log with an event that was changed" "$bin/countersign" audit verify "$work/log" --key "$vkey"

stop || fail "the daemon did not end well: $(tail -n 3 "$run/log")"
echo "next:      type \"make run\" to try it yourself; README.md has the commands. \"make clean\" removes bin/, .run/ and .run-tpm/"
echo "demo: ok, $signed signed, $verified verified, $refused refused as they should be"
