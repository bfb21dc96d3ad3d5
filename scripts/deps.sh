#!/usr/bin/env bash
# Installs Debian packages by apt-get: with "build" those of make build, demo and run, with "image"
# also those of make image, and with "test" also those of the tests. Packages present are left alone. Go must be installed by hand.
# "list build", "list image" and "list test" only print the packages.
set -euo pipefail

list=
if [ "${1:-}" = list ]; then
  list=yes
  shift
fi
case ${1:-} in
  build | image | test) for=$1 ;;
  *) echo "usage: scripts/deps.sh [list] build|image|test" >&2; exit 2 ;;
esac

missing=()
need() { # need PACKAGE TEST...: adds the package to the missing ones if the test fails
  local package=$1
  shift
  if [ -n "$list" ]; then
    echo "$package"
  else
    "$@" >/dev/null 2>&1 || missing+=("$package")
  fi
}
need softhsm2 test -e /usr/lib/softhsm/libsofthsm2.so
need swtpm command -v swtpm
need gcc command -v gcc
need libc6-dev test -e /usr/include/stdlib.h
need openssl command -v openssl
need make command -v make
need openssh-client command -v ssh-agent
need nodejs command -v node # for the web console
need npm command -v npm
if [ "$for" != build ]; then
  need sbsigntool command -v sbsign     # signs for Secure Boot
  need faketime command -v faketime     # the same bytes each time
  need zstd command -v zstd
  need xz-utils command -v xz
  need gpgv command -v gpgv             # Debian's signature, for a new lock file
  need debian-archive-keyring test -e /usr/share/keyrings/debian-archive-keyring.gpg
  need kmod test -x /usr/sbin/depmod -o -x /sbin/depmod
  need dosfstools test -x /usr/sbin/mkfs.fat -o -x /sbin/mkfs.fat
  need mtools command -v mcopy
  need fdisk test -x /usr/sbin/sfdisk -o -x /sbin/sfdisk
  need qemu-utils command -v qemu-img
fi
if [ "$for" = test ]; then
  need qemu-system-x86 command -v qemu-system-x86_64 # boots the image
  need ovmf test -e /usr/share/OVMF/OVMF_CODE_4M.secboot.fd
  need curl command -v curl
  need p11-kit-modules bash -c 'compgen -G "/usr/lib/*/p11-kit-proxy.so"'
  need libnss3 bash -c 'compgen -G "/usr/lib/*/libsoftokn3.so"'
  need libnss3-tools command -v certutil
  need tpm2-tools command -v tpm2_pcrextend
  need age command -v age               # reads lists of writes as docs/SPEC.md says
  need openssh-server test -x /usr/sbin/sshd # an SFTP server for backups
  need openssh-sftp-server test -x /usr/lib/openssh/sftp-server
  need jq command -v jq                 # for the commands of docs/SPEC.md
  need prometheus command -v promtool   # for the rules of monitoring, and a scrape
  need python3 command -v python3       # reads the CSV of a report as a spreadsheet does
  need systemd command -v systemd-analyze # for the units of packaging/systemd
  need chromium command -v chromium     # for tests of passkeys in a browser
  need fuse2fs command -v fuse2fs       # for the image of a disk that is searched after a factory reset
  need git command -v git               # clones for tests of reproducible builds
  need lintian command -v lintian       # for the Debian packages
  need mmdebstrap command -v mmdebstrap # a fresh root that a package is installed in
  need systemd-container command -v systemd-nspawn
  need qemu-user-static command -v qemu-aarch64-static # runs the tool of arm64
  ((EUID == 0)) || need fuse3 command -v fusermount3 # for FUSE mounts without root
fi

if ((${#missing[@]})); then
  echo "installing: ${missing[*]}"
  as_root=()
  ((EUID == 0)) || as_root=(sudo)
  export DEBIAN_FRONTEND=noninteractive
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
[ -n "$list" ] || command -v go >/dev/null || {
  echo "go is not in PATH: install Go 1.26 or later (https://go.dev/dl)" >&2
  exit 1
}
