#!/usr/bin/env bash
# Renames the Go module: scripts/module-path.sh [--force] PATH
#
# The module is called `countersign`, a name that `go get` can't fetch. Once the repository has a public address, this
# script gives the module that path, for example example.org/keys/countersign. It changes the module line of go.mod, the
# imports of all tracked Go files, and the places in comments and documents that name a package or require the module.
#
# Names on the wire and on a machine stay, although some begin with `countersign/` as well: the prologue countersign-v1,
# the origins countersign/ID of audit logs, labels on tokens, commands, systemd units and folders. module_test.go holds
# the result against the tree before it.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { echo "usage: scripts/module-path.sh [--force] PATH" >&2; exit 2; }
refuse() { echo "module-path: $*" >&2; exit 1; }

force='' new=''
for argument; do
  case $argument in
  --force) force=yes ;;
  -*) usage ;;
  *) [ -z "$new" ] || usage; new=$argument ;;
  esac
done
[ -n "$new" ] || usage

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The go command's own rules: the first element has a dot, and a last one such as /v2 is a major version.
cat >"$work/check.go" <<'GO'
package main

import (
	"fmt"
	"os"

	"golang.org/x/mod/module"
)

func main() {
	if err := module.CheckPath(os.Args[1]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	_, major, _ := module.SplitPathVersion(os.Args[1])
	if prefix := module.PathMajorPrefix(major); prefix != "" {
		fmt.Println(prefix + ".0.0")
	} else {
		fmt.Println("v0.0.0")
	}
}
GO
version=$(GOWORK=off go run "$work/check.go" "$new" 2>"$work/err") ||
  refuse "${version:-$(cat "$work/err")}; give the path that \`go get\` shall fetch, such as example.org/keys/countersign"

old=$(GOWORK=off go list -m)
if [ "$old" = "$new" ]; then
  echo "module path: $new already, nothing changed"
  exit 0
fi
if [ -z "$force" ] && [ -n "$(git status --porcelain)" ]; then
  refuse "the work tree has changes: commit them first, so that the renaming is a commit of its own, or give --force"
fi

old_re=${old//./\\.}
packages=$(git ls-files '*.go' | sed -n 's|/[^/]*$||p' | sort -u | sed 's/\./\\./g' | paste -sd '|')

# A package that a sentence names, but neither /run/countersign/client nor the label countersign/noise/1.
package="s#(^|[^[:alnum:]_/.-])$old_re/($packages)([^[:alnum:]_/-]|\$)#\\1$new/\\2\\3#g"
cat >"$work/go.sed" <<SED
/^import \(/,/^\)/ s#^([[:space:]]*([[:alnum:]_.]+[[:space:]]+)?")$old_re("|/)#\1$new\3#
s#^(import[[:space:]]+([[:alnum:]_.]+[[:space:]]+)?")$old_re("|/)#\1$new\3#
/^[[:space:]]*\/\// { $package; $package; }
SED
# Twice, since two packages may have one separator between them. The other lines are those of a go.mod and of go mod edit.
cat >"$work/md.sed" <<SED
$package
$package
s#\b(require[[:space:]]+)$old_re[[:space:]]+v[0-9]+\.0\.0#\1$new $version#g
s#\b(replace[[:space:]]+)$old_re([[:space:]]+=>)#\1$new\2#g
s#(-require=)$old_re@v[0-9]+\.0\.0#\1$new@$version#g
s#(-replace=)$old_re=#\1$new=#g
SED

changed=0
rewrite() { # rewrite SED FILE...: counts in $changed the files that get another content
  local script=$1 file
  shift
  changed=0
  for file; do
    sed -E -f "$script" "$file" >"$work/new"
    cmp -s "$work/new" "$file" && continue
    case $file in *.go) gofmt "$work/new" >"$work/formatted" && mv "$work/formatted" "$work/new" ;; esac
    cat "$work/new" >"$file" # keeps its mode
    changed=$((changed + 1))
  done
}
mapfile -d '' -t files < <(git ls-files -z '*.go')
rewrite "$work/go.sed" "${files[@]}"
go_files=$changed
mapfile -d '' -t files < <(git ls-files -z '*.md')
rewrite "$work/md.sed" "${files[@]}"

# go.mod comes last: after an interruption, the script with --force goes on where it was.
GOWORK=off go mod edit -module "$new"
echo "module path: $old is now $new in go.mod, $go_files .go files and $changed .md files"
