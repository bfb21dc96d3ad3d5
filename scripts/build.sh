#!/usr/bin/env bash
# Builds both programs into a folder: scripts/build.sh FOLDER. The same sources and the same Go give
# the same bytes, whatever the folder, the user, the umask, the locale and the time.
#
# VERSION names another version than the sources do, such as 0.2.0+site1. COMMIT names the commit
# where the sources are no clone. CLI=linux/arm64 builds only the tool, for that platform.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd -P)
out=$(mkdir -p "$1" && cd "$1" && pwd -P)
cd "$here"
umask 022

if [ -z "${COMMIT+x}" ]; then
  git() { command git -c safe.directory="$here" "$@"; }
  COMMIT=$(git rev-parse HEAD 2>/dev/null || true)
  [ -z "$COMMIT" ] || [ -z "$(git status --porcelain)" ] || COMMIT+=+dirty
fi
cli=$(go list -m)/internal/cli
names="-X $cli.commit=$COMMIT"
[ -z "${VERSION:-}" ] || names+=" -X $cli.release=$VERSION"

# The commit is a name of the linker, since Go's own stamp (-buildvcs) has a time, and is missing
# where another user owns the clone. What a user has set for Go must not change the program.
export GOEXPERIMENT=runtimesecret GOAMD64=v1 GOARM64=v8.0 GOWORK=off
export GOFLAGS="-trimpath -buildvcs=false -mod=readonly"
export CGO_CFLAGS="-O2 -fstack-protector-strong -D_FORTIFY_SOURCE=2" CGO_LDFLAGS=-O2
unset CGO_CPPFLAGS CGO_CXXFLAGS CGO_FFLAGS CC

build() { # build PROGRAM FLAG...
  local program=$1
  shift
  go build "$@" -o "$out/$program$suffix" "./cmd/$program"
}
suffix=''
if [ -n "${CLI:-}" ]; then
  export GOOS=${CLI%/*} GOARCH=${CLI#*/}
  [ "$GOOS" != windows ] || suffix=.exe
else
  # The daemon opens PKCS#11 modules, so it is linked to the C library, but asks the C library (NSS)
  # neither for hosts nor for users.
  CGO_ENABLED=1 build countersignd -buildmode=pie -tags=netgo,osusergo \
    -ldflags="-s -w $names -linkmode=external -extldflags=-Wl,-z,relro,-z,now"
fi
CGO_ENABLED=0 build countersign -ldflags="-s -w $names"
[ -z "${MACHINE:-}" ] || CGO_ENABLED=0 build countersign-machine -ldflags="-s -w $names" # for images
