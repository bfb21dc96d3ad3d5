#!/bin/sh
# Prints the system calls that the daemon, the launcher and the key workers make after they have
# confined themselves, in runs of the tests in softhsm-tests. internal/sandbox/calls.go permits
# these calls. The arguments are those of go test, for example: scripts/calls.sh -run TestSignals
# Needs strace.
set -eu
cd "$(dirname "$0")/.."
export CALLS="${CALLS:-$(mktemp -d)}"
command -v strace >/dev/null || { echo "calls.sh: strace is missing: apt-get install strace" >&2; exit 1; }
GOEXPERIMENT=runtimesecret go test -count=1 "$@" ./softhsm-tests || echo "calls.sh: a test has failed" >&2
for file in "$CALLS"/*.calls; do
	awk '
	function called(tid, line) {
		process = of[tid]
		if (index(line, "execve(\"") == 1) {
			confined[tid] = 0; of[tid] = tid; process = tid; executed[tid] = 1
			kind[tid] = index(line, "\"key-worker\"") ? "worker" : index(line, "\"launcher\"") ? "launcher" : "daemon"
		}
		name = line; sub(/[( ].*/, "", name)
		if (line ~ /^seccomp.SECCOMP_SET_MODE_FILTER/) confined[process] = 1
		else if (confined[process] && name ~ /^[a-z]/) print kind[process], name
	}
	{
		tid = $1; line = $0; sub(/^[0-9]+ +/, "", line)
		if (!(tid in of)) { of[tid] = tid; kind[tid] = "daemon" }
		if (line !~ /^<\.\.\./ && line !~ /^[-+]/) called(tid, line)
		if (line ~ /(clone|clone3|vfork)(\(| resumed)/ && line ~ /= [0-9]+$/) {
			child = line; sub(/.*= /, "", child)
			if (executed[child]) ; # the parent of a vfork comes back later
			else if (line ~ /CLONE_THREAD/ || thread[tid]) of[child] = of[tid]
			else { of[child] = child; kind[child] = kind[of[tid]]; confined[child] = confined[of[tid]] }
			thread[tid] = 0
		} else if (line ~ /^clone.*CLONE_THREAD.*unfinished/) thread[tid] = 1
	}' "$file"
done | sort | uniq -c | sort -k2,2 -k1,1nr
