#!/usr/bin/env bash
# Makes the Debian packages, and the tool for other systems, in dist/ or the folder of DIST:
#
#   countersign_VERSION_amd64.deb        the daemon and the tool
#   countersign-cli_VERSION_ARCH.deb     the tool alone, for amd64 and arm64
#   countersign_VERSION_OS_ARCH[.exe]    the tool as one file, for Linux, macOS and Windows
#   countersign_VERSION.cdx.json         the SBOM (CycloneDX), also in the package
#   SHA256SUMS
#
# ONLY=daemon makes the first package and the SBOM. VERSION and COMMIT are those of build.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 022
export LC_ALL=C TZ=UTC
dist=${DIST:-dist}
mkdir -p "$dist"
dist=$(cd "$dist" && pwd -P)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "packages are made on Linux, amd64" >&2; exit 1; }

# All files have the time of the version's heading in NEWS.md.
heading=$(grep -m 1 -E '^## [0-9]' NEWS.md)
day=${heading##* }
version=${VERSION:-$(sed -E 's/^## ([^ ,]+).*/\1/' <<<"$heading")}
SOURCE_DATE_EPOCH=$(date -u -d "$day" +%s)
export SOURCE_DATE_EPOCH VERSION=${VERSION:-}

scripts/console.sh
scripts/build.sh "$work/bin"
mkdir "$work/notices"
go run ./packaging/notices -o "$work/notices" -version "$version" "$work/bin/countersign" "$work/bin/countersignd"

deb() { # deb PACKAGE ARCH CONTROL: makes a package of $work/root
  local package=$1 arch=$2 root=$work/root doc=$work/root/usr/share/doc/$1
  install -m 0644 "$work/notices/copyright" "$doc/copyright"
  printf '%s (%s) stable; urgency=medium\n\n  * See NEWS.md.\n\n -- Countersign <countersign@countersign.example.org>  %s\n' \
    "$package" "$version" "$(date -u -R -d "$day")" | gzip -9n >"$doc/changelog.gz"
  if [ "$package" = countersign ]; then
    install -m 0644 "$work/notices/sbom.cdx.json" "$root/usr/share/countersign/sbom.cdx.json"
    install -m 0644 "$work/notices/sbom.cdx.json" "$dist/countersign_$version.cdx.json"
  fi
  if [ -d "packaging/debian/overrides" ]; then
    install -D -m 0644 "packaging/debian/overrides/$package" "$root/usr/share/lintian/overrides/$package"
  fi
  install -d "$root/DEBIAN"
  (cd "$root" && find . -path ./DEBIAN -prune -o -type f -print0 | sort -z | xargs -0 md5sum | sed 's|  \./|  |') \
    >"$root/DEBIAN/md5sums"
  local size
  size=$(find "$root" -type f -printf '%s\n' | awk '{ n += int(($1 + 1023) / 1024) } END { print n }')
  sed "s/@VERSION@/$version/; s/@ARCH@/$arch/; s/@SIZE@/$size/" "packaging/debian/$3" >"$root/DEBIAN/control"
  if [ "$package" = countersign ]; then
    for script in preinst postinst prerm postrm; do
      sed "s/@VERSION@/$version/g" "packaging/debian/$script" >"$root/DEBIAN/$script"
      chmod 0755 "$root/DEBIAN/$script"
    done
  fi
  find "$root" -type d -exec chmod 0755 {} +
  find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
  dpkg-deb --root-owner-group -Zxz --build "$root" "$dist/${package}_${version}_$arch.deb" >/dev/null
  rm -rf "$root"
}

BIN=$work/bin scripts/install.sh "$work/root"
deb countersign amd64 control

if [ "${ONLY:-}" != daemon ]; then
  for platform in linux/amd64 linux/arm64 darwin/amd64 darwin/arm64 windows/amd64 windows/arm64; do
    os=${platform%/*} arch=${platform#*/} suffix=
    [ "$os" != windows ] || suffix=.exe
    CLI=$platform scripts/build.sh "$work/$os-$arch"
    install -m 0755 "$work/$os-$arch/countersign$suffix" "$dist/countersign_${version}_${os}_$arch$suffix"
    if [ "$os" = linux ]; then
      PARTS=cli BIN=$work/$os-$arch PAGES=$work/bin scripts/install.sh "$work/root"
      deb countersign-cli "$arch" control-cli
    fi
  done
fi
(cd "$dist" && sha256sum "countersign"*"_$version"* >SHA256SUMS && cat SHA256SUMS)
