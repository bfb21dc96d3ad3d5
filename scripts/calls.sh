#!/bin/sh
# Adds to internal/sandbox/testdata/traced.txt the system calls that the daemon, the launcher and
# the key workers make after they have confined themselves, in tests of softhsm-tests. The arguments
# are names of tests; the default is all. The tests run under strace, ten at a time. The file has
# the calls of ten tests at their end, and an interrupted run goes on where it was: CALLS is the
# folder of its state (default: /tmp/countersign-calls; remove it to begin again). A call that the
# daemon and the key workers are known to make is not traced any more, so that tests slow down by
# some percent only. Tests whose code tries what is forbidden are left out, and so are units, which
# strace can't follow. Needs strace.
set -eu
cd "$(dirname "$0")/.."
command -v strace >/dev/null || { echo "calls.sh: strace is missing: apt-get install strace" >&2; exit 1; }
state=${CALLS:-/tmp/countersign-calls}
traced=$PWD/internal/sandbox/testdata/traced.txt
export GOEXPERIMENT=runtimesecret LC_ALL=C
mkdir -p "$state"
touch "$traced" "$state/done"
go test -c -o "$state/tests" ./softhsm-tests
cd softhsm-tests
[ $# -gt 0 ] || set -- $("$state/tests" -test.list '^Test' | grep '^Test' |
	grep -vE '^Test(Forbidden|BrokenInto|Hostile|Unit)')
while :; do
	some=$(printf '%s\n' "$@" | grep -vxFf "$state/done" | head -n 10)
	[ -n "$some" ] || break
	rm -rf "$state/calls"
	mkdir "$state/calls"
	CALLS="$state/calls" KNOWN=$(awk '{ of[$2] = of[$2] $1 }
		END { for (c in of) if (of[c] ~ /daemon.*worker/ && c !~ /^(clone|vfork|execve|seccomp)/) printf "%s,", c }' \
		"$traced") "$state/tests" -test.run "^($(echo $some | tr ' ' '|'))\$" -test.timeout 60m >"$state/out" 2>&1 ||
		grep -e '^--- FAIL' -e '^panic' "$state/out" >&2 || true
	for file in "$state"/calls/*; do
		[ -e "$file" ] || continue
		awk '
		# A process p is confined by the filters of under[p], or not at all (""). A key worker is under
		# those of the launcher until it has loaded its own. own[p] is the kind whose filters p loads.
		function called(tid, line,    p, name, c) {
			p = of[tid]; name = line; sub(/[( ].*/, "", name)
			if (name !~ /^[a-z]/ || name == "clone3") return # clone3 fails with ENOSYS
			if (index(line, "execve(\"") == 1) {
				note(p, name); flush(p)
				if (p != tid || under[p] == own[p] && own[p] != "launcher") under[tid] = ""
				of[tid] = tid; above[tid] = under[tid]
				own[tid] = index(line, "\"key-worker\"") ? "worker" : index(line, "\"launcher\"") ? "launcher" : "daemon"
				return
			}
			if (line !~ /^seccomp.SECCOMP_SET_MODE_FILTER/) { note(p, name); return }
			# The filter before was not the last: what was called in between tells nothing.
			note(p, name); under[p] = above[p]; flush(p); under[p] = own[p]
		}
		function note(p, name) { if (under[p] != "") calls[p " " name] = 1 }
		function flush(p,    c) {
			for (c in calls) if (index(c, p " ") == 1) {
				if (under[p] != "") print under[p], substr(c, length(p) + 2)
				delete calls[c]
			}
		}
		function born(child, parent) {
			of[child] = child; own[child] = own[parent]; under[child] = above[child] = under[parent]
		}
		{
			tid = $1; line = $0; sub(/^[0-9]+ +/, "", line)
			if (!(tid in of)) {
				born(tid, forking); forking = ""
				if (own[tid] == "") own[tid] = "daemon"
			}
			if (line !~ /^<\.\.\./ && line !~ /^[-+]/) called(tid, line)
			# The child of a vfork comes before the end of the call in its parent.
			if (line ~ /^(clone|vfork).*(VFORK|vfork).*unfinished/) forking = of[tid]
			else if (line ~ /^clone.*CLONE_THREAD.*unfinished/) thread[tid] = 1
			else if (line ~ /(clone3?|vfork)(\(| resumed)/ && line ~ /= [0-9]+$/) {
				child = line; sub(/.*= /, "", child)
				if (line ~ /CLONE_THREAD/ || thread[tid]) of[child] = of[tid]
				else if (!(child in of)) born(child, of[tid])
				thread[tid] = 0
			}
		}
		END { for (p in under) flush(p) }
		' "$file"
	done | sort -u - "$traced" >"$state/traced"
	cp "$state/traced" "$traced"
	echo "$some" >>"$state/done"
	echo "calls.sh: $(wc -l <"$traced") calls after" $some >&2
done
