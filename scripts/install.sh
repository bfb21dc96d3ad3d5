#!/usr/bin/env bash
# Installs what bin/ has, with its units, manual pages and documents: scripts/install.sh [DESTDIR]
# puts all below that folder, with the paths of a Debian system. PARTS=cli installs only the tool
# with its pages; BIN is another folder than bin/. The tool of another platform can't print its
# pages, so PAGES names the folder of one that can.
set -euo pipefail
cd "$(dirname "$0")/.."
root=${1:-} bin=${BIN:-bin} parts=${PARTS:-all}
pages=${PAGES:-$bin}
umask 022

put() { # put FOLDER FILE...: installs files with mode 0644
  install -d "$root$1"
  install -m 0644 -t "$root$1" "${@:2}"
}
write() { # write FILE COMMAND...: installs the output of a command
  install -d "$root$(dirname "$1")"
  "${@:2}" >"$root$1"
  chmod 0644 "$root$1"
}
program() { # program NAME: installs a program with its pages and completions
  install -d "$root/usr/bin" "$root/usr/share/man/man1"
  install -m 0755 -t "$root/usr/bin" "$bin/$1"
  "$pages/$1" man "$root/usr/share/man/man1"
  write "/usr/share/bash-completion/completions/$1" "$pages/$1" completion bash
  write "/usr/share/zsh/vendor-completions/_$1" "$pages/$1" completion zsh
  write "/usr/share/fish/vendor_completions.d/$1.fish" "$pages/$1" completion fish
}

program countersign
if [ "$parts" = all ]; then
  program countersignd
  (cd packaging/systemd && find . -maxdepth 1 -name 'countersignd*.[st]*' -type f) | sort | while read -r unit; do
    put /lib/systemd/system "packaging/systemd/$unit"
  done
  (cd packaging/systemd && find . -mindepth 2 -name '*.conf' -type f) | sort | while read -r file; do
    put "/usr/share/countersign/systemd/$(dirname "$file" | sed 's|^\./||')" "packaging/systemd/$file"
  done
  write /usr/lib/sysusers.d/countersign.conf cat packaging/systemd/countersign.sysusers
  write /usr/lib/tmpfiles.d/countersign.conf cat packaging/systemd/countersign.tmpfiles
  write /usr/share/countersign/reference.toml "$bin/countersignd" config
  put /usr/share/countersign/policies examples/policies/*
  put /usr/share/countersign/monitoring monitoring/dashboard.json monitoring/rules.yml
  put /usr/share/countersign admin/openapi.json
  put /usr/share/doc/countersign README.md NEWS.md docs/*.md
else
  put /usr/share/doc/countersign-cli NEWS.md docs/PEERS.md docs/SPEC.md
fi
find "$root/usr/share/man/man1" -name 'countersign*.1' -exec chmod 0644 {} + -exec gzip -9nf {} +
