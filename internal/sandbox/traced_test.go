package sandbox

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// most are the rights of each kind of process with the most system calls.
var most = map[string]Rights{
	"daemon": {Kind: Daemon, Names: true}, "launcher": {Kind: Launcher, Connect: []uint16{1}},
	"worker": {Connect: []uint16{1}},
}

// TestTraced holds the lists of system calls against testdata/traced.txt, the calls that the tests
// of the built daemon make (scripts/calls.sh). Each of these is on the list of its kind. Each other
// call on a list is in untraced with the reason.
func TestTraced(t *testing.T) {
	b, err := os.ReadFile("testdata/traced.txt")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	if !slices.IsSorted(lines) || len(slices.Compact(slices.Clone(lines))) != len(lines) {
		t.Error("traced.txt is not sorted, or has a line twice")
	}
	traced := map[string]bool{}
	for _, line := range lines {
		kind, name, _ := strings.Cut(line, " ")
		r, known := most[kind]
		allow, fail := r.calls()
		if !known || !slices.Contains(strings.Fields(allow+" "+fail), name) {
			t.Errorf("%s: the call is not permitted", line)
		}
		traced[line] = true
	}
	reasons := map[string]string{}
	for _, u := range untraced {
		for kind := range strings.FieldsSeq(u.kinds) {
			for name := range strings.FieldsSeq(u.calls) {
				line := kind + " " + name
				if was := reasons[line]; was != "" {
					t.Errorf("%s has two reasons: %s, and %s", line, was, u.why)
				}
				if reasons[line] = u.why; traced[line] {
					t.Errorf("%s is traced: remove the call from %q", line, u.why)
				}
			}
		}
	}
	for kind, r := range most {
		allow, _ := r.calls()
		if kind == "launcher" { // the other calls are those of the key workers, which inherit the filter
			allow = launching
		}
		for name := range strings.FieldsSeq(allow) {
			line := kind + " " + name
			if !traced[line] && reasons[line] == "" {
				t.Errorf("%s is permitted, is made by no test, and has no reason: remove the call", line)
			}
			delete(reasons, line)
		}
	}
	for line, why := range reasons {
		t.Errorf("%s is not permitted: remove the call from %q", line, why)
	}
}

// untraced are the permitted calls that no test makes on the machine of the trace, with the reason.
var untraced = []struct{ kinds, why, calls string }{
	{"daemon worker", "other architectures and C libraries make the call in the place of one that is traced", `
		access stat statx ppoll renameat2`},
	{"daemon", "C libraries other than glibc open the resolver's files by this call", "open"},
	{"worker", "other architectures and C libraries make the call in the place of one that is traced", `
		creat lstat faccessat faccessat2 readlink readlinkat rename mkdirat rmdir getdents
		dup dup2 pipe pipe2 select pselect6 epoll_create epoll_wait readv arch_prctl set_tid_address
		getrlimit getcpu`},
	{"daemon worker", "a virtual machine whose clock the vDSO can't read", "clock_gettime gettimeofday time"},
	{"daemon worker", "the kernel itself goes on with a call after a signal", "restart_syscall"},
	{"daemon worker", "the end of a thread; the runtime of Go keeps its threads for long", "exit"},
	{"daemon", "a sleep by the clock of the C library", "clock_nanosleep"},
	{"daemon", "memory of the C library: more of the heap", "brk mremap"},
	{"daemon", "glibc before 2.37 sorts the addresses of a host by the size of the memory", "sysinfo"},
	{"daemon", "glibc asks the kernel for the addresses of this machine", "sendto"},
	{"daemon", "sources of names that other machines have: nss-resolve, nss-myhostname, nss-mdns", "prctl getgid"},
	{"daemon", "a relative path where the variable PWD is not set", "getcwd"},
	{"daemon launcher", "the end of a child with a kernel before 5.4, which has no pidfd for it", "wait4"},
	{"launcher", "a limit in the form of other architectures", "setrlimit"},
	{"launcher", "root's key workers get capabilities again where the bounding set could not be emptied", "capset"},
	{"worker", "files of other modules: the databases of NSS (SQLite), the tokens of openCryptoki, logs", `
		chmod fchmodat chown fchown fchownat umask fdatasync fallocate truncate link linkat getcwd msync mremap
		statfs fstatfs utimes utimensat`},
	{"worker", "memory that is shared by the programs of openCryptoki", `
		shmget shmat shmdt shmctl semget semop semtimedop semctl`},
	{"worker", "memory that is not swapped: of the process, where the limit allows, and of libraries", `
		mlock mlock2 mlockall munlock munlockall`},
	{"worker", "libffi behind p11-kit, where memory can't be made executable otherwise", "memfd_create"},
	{"worker", "modules seed their random numbers with what they find", `
		getgid getegid getgroups getppid getrusage sysinfo times`},
	{"worker", "threads of modules: their names, limits and priorities", `
		prctl prlimit64 sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min`},
	{"worker", "timeouts of modules", `
		alarm setitimer timer_create timer_settime timer_delete timerfd_create timerfd_settime rt_sigaction
		rt_sigtimedwait`},
	{"worker", "modules with event loops", "epoll_create1 eventfd eventfd2 socketpair"},
	{"worker", "modules of network HSMs", "bind getsockopt recvmsg recvmmsg sendmsg shutdown"},
}
