#!/usr/bin/env bash
# Makes the keys of an image's maker in a new folder: image/keys.sh FOLDER NEEDED SSH_PUBLIC_KEY...
#
#   PK, KEK, db     Secure Boot: .key, .crt and .auth, the file that a firmware in setup mode enrols
#   pcr.key         signs what an image measures (ECDSA P-256)
#   release.keys    the SSH public keys whose owners release updates, and how many of them must
#
# The folder makes every machine of yours boot and unlock what its holder wants: keep it on a machine
# without a network. TEST=1 marks the keys as test keys, which images name on their console.
set -euo pipefail
if (($# < 3)) || ! [[ $2 =~ ^[1-9][0-9]?$ ]] || (($# - 2 < $2)); then
  echo "usage: image/keys.sh FOLDER NEEDED SSH_PUBLIC_KEY_FILE... (as many keys as needed, or more)" >&2
  exit 2
fi
folder=$1 needed=$2
shift 2
umask 077
if [ -e "$folder" ]; then
  echo "image/keys.sh: $folder exists: name a new folder" >&2
  exit 1
fi
for file in "$@"; do
  ssh-keygen -l -f "$file" >/dev/null || { echo "image/keys.sh: $file is no SSH public key" >&2; exit 1; }
done
new=$folder.new
rm -rf "$new"
mkdir -p "$new"
name="Countersign ${TEST:+TEST }$(date -u +%Y)"
owner=$(cat /proc/sys/kernel/random/uuid)
for key in PK KEK db; do
  openssl req -new -x509 -newkey rsa:3072 -sha256 -nodes -days 10950 -subj "/CN=$name $key/" \
    -keyout "$new/$key.key" -out "$new/$key.crt" 2>/dev/null
  openssl x509 -in "$new/$key.crt" -outform DER -out "$new/$key.der"
  sbsiglist --owner "$owner" --type x509 --output "$new/$key.esl" "$new/$key.der"
done
sign() { # sign VARIABLE BY
  sbvarsign --attr NON_VOLATILE,BOOTSERVICE_ACCESS,RUNTIME_ACCESS,TIME_BASED_AUTHENTICATED_WRITE_ACCESS \
    --key "$new/$2.key" --cert "$new/$2.crt" --output "$new/$1.auth" "$1" "$new/$1.esl" >/dev/null
}
sign PK PK
sign KEK PK
sign db KEK
rm "$new"/*.der "$new"/*.esl
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$new/pcr.key" 2>/dev/null
{
  echo "needed $needed"
  for file in "$@"; do cut -d ' ' -f 1,2 "$file"; done
} >"$new/release.keys"
[ -z "${TEST:-}" ] || touch "$new/TEST"
mv "$new" "$folder"
