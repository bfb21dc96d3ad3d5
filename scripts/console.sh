#!/usr/bin/env bash
# Builds the web console into admin/console/dist, which the daemon embeds, if a source has changed
# since the last build. The packages are those of package-lock.json; no script of theirs runs.
set -euo pipefail
cd "$(dirname "$0")/../admin/console"

exec 9>node_modules.lock
flock 9 # two builds at a time would mix their files
lock=$(sha256sum package-lock.json)
if [ "$(cat node_modules/.lock 2>/dev/null)" != "$lock" ]; then
  npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
  echo "$lock" >node_modules/.lock
fi
built=dist/index.html
if [ ! -e $built ] || [ -n "$(find src build.mjs tsconfig.json package-lock.json ../openapi.json \
  ../../docs/OPERATIONS.md -newer $built ! -name generated.ts ! -name help.ts ! -type d -print -quit)" ]; then
  node build.mjs
fi
