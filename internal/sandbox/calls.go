package sandbox

import (
	"os"
	"slices"
	"strings"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// permitted are the system calls of a key worker: of Go's runtime, of the C library, and of
// modules. A name that an architecture does not have is skipped. A test makes each call of the
// lists here, or TestTraced has the reason for the call.
const permitted = `
	read write readv writev pread64 pwrite64 close lseek open openat creat stat fstat lstat newfstatat statx
	access faccessat faccessat2 statfs fstatfs fcntl flock fsync fdatasync truncate ftruncate fallocate ioctl
	rename renameat renameat2 mkdir mkdirat rmdir unlink unlinkat link linkat readlink readlinkat
	chmod fchmod fchmodat chown fchown fchownat umask utimes utimensat getdents getdents64 getcwd fgetxattr
	dup dup2 dup3 pipe pipe2 eventfd eventfd2 poll ppoll select pselect6
	epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
	mmap munmap mremap mprotect madvise brk msync mlock mlock2 munlock mlockall munlockall
	memfd_create memfd_secret
	shmget shmat shmdt shmctl semget semop semtimedop semctl
	futex set_robust_list set_tid_address rseq arch_prctl prctl
	sched_yield sched_getaffinity sched_getparam sched_getscheduler
	sched_get_priority_max sched_get_priority_min getcpu
	gettid getpid getppid getuid geteuid getgid getegid getgroups
	uname sysinfo getrlimit getrusage times getrandom
	rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack
	pause nanosleep clock_nanosleep clock_gettime gettimeofday time
	alarm setitimer timer_create timer_settime timer_delete timerfd_create timerfd_settime
	sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg shutdown getsockopt setsockopt getsockname
	getpeername socketpair
	restart_syscall exit exit_group`

// refused are the system calls that fail with EPERM. Libraries try them, and go on after the
// failure: a log line to syslog, the name of a host, a helper program. All other system calls kill
// the process.
const refused = `
	bind listen accept accept4 fork vfork execve execveat wait4 waitid
	kill tkill setrlimit setpriority sched_setscheduler sched_setparam`

// launching are the system calls of the launcher beside those of its key workers, which inherit the
// launcher's filter and make it stricter: to start, to end and to confine key workers. The launcher
// has its user before it is confined. The signals of a confined launcher reach key workers only.
const launching = `
	clone execve wait4 waitid kill tkill tgkill pidfd_open pidfd_send_signal setpgid prlimit64 setrlimit
	capget capset seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self`

// own are the system calls of a key worker that have conditions: threads, signals and limits of its
// own.
const own = `
	clone tgkill prlimit64`

// serving are the system calls of the daemon. docs/DESIGN.md says how the list was made.
const serving = `
	read write writev pread64 pwrite64 close lseek open openat stat fstat newfstatat statx access statfs fstatfs
	fcntl flock fsync fdatasync truncate ftruncate fallocate ioctl fgetxattr
	renameat renameat2 mkdirat unlinkat readlinkat fchmod getdents64 getcwd pipe2 poll ppoll
	epoll_ctl epoll_pwait mmap munmap mremap mprotect madvise brk
	futex set_robust_list rseq prctl sched_yield sched_getaffinity
	gettid getpid getuid geteuid getgid getegid getgroups uname sysinfo getrandom
	rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack nanosleep clock_nanosleep clock_gettime gettimeofday time
	sendto recvfrom sendmsg recvmsg sendmmsg shutdown getsockopt setsockopt getsockname getpeername
	socketpair socket connect bind listen accept4 clone tgkill prlimit64 waitid wait4
	restart_syscall exit exit_group`

// calls returns the system calls that the process may make, and those that fail with EPERM. All
// others end the process. filters has conditions on the arguments of some.
func (r Rights) calls() (allow, fail string) {
	switch r.Kind {
	case Launcher:
		allow, fail = permitted+launching, without(refused, launching)
	case Daemon:
		allow = serving
	case Drill: // listens nowhere, and may be confined before Go has made its epoll
		const listening = "bind listen accept4"
		allow, fail = without(serving, listening)+" epoll_create1 eventfd2", listening
	default:
		allow, fail = permitted+own, refused
	}
	switch {
	case r.tcp(): // with the resolver, and its question for this machine's addresses
		return allow + " socket connect bind", without(fail, "bind") // Landlock lets no TCP port be bound
	case r.unixSockets():
		return allow + " socket connect", fail
	}
	return allow, fail + " socket connect"
}

// namespaces are the flags of clone that make a namespace.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// The types of sockets are numbers, not bits. A type without the bits of notStream is a stream; a
// type without the bits of neither is a stream or a datagram.
const (
	notStream = 0xf &^ unix.SOCK_STREAM
	neither   = unix.SOCK_SEQPACKET&^unix.SOCK_STREAM | unix.SOCK_PACKET&^unix.SOCK_DGRAM
)

// filters returns the process's filters of system calls. The kernel asks all filters, and the
// strictest answer counts. The arguments that decide are numbers: a filter can't look at memory.
//
// The first filters have the conditions of one system call each. The last filter has no conditions
// on arguments. The assembler of go-seccomp-bpf 1.6.0 does not load the number of the system call
// again after a condition has failed, so whatever comes next would be compared with an argument.
func (r Rights) filters() ([]seccomp.Filter, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, err
	}
	known := func(names string) []string {
		all := slices.DeleteFunc(strings.Fields(names), func(name string) bool {
			_, has := info.SyscallNames[name]
			return !has
		})
		slices.Sort(all)
		return slices.Compact(all)
	}
	filter := func(otherwise seccomp.Action, groups ...seccomp.SyscallGroup) seccomp.Filter {
		return seccomp.Filter{
			Flag:   seccomp.FilterFlagTSync,
			Policy: seccomp.Policy{DefaultAction: otherwise, Syscalls: groups},
		}
	}
	var all []seccomp.Filter
	// when has a system call end with an action if all conditions of one list hold.
	when := func(action seccomp.Action, name string, lists ...seccomp.ArgumentConditions) {
		group := seccomp.SyscallGroup{Action: action}
		for _, list := range lists {
			group.NamesWithCondtions = append(group.NamesWithCondtions,
				seccomp.NameWithConditions{Name: name, Conditions: list})
		}
		all = append(all, filter(seccomp.ActionAllow, group))
	}
	self := uint64(os.Getpid())
	none := fails(unix.EPERM)
	switch r.Kind {
	case Launcher:
		when(seccomp.ActionKillProcess, "clone", list(0, seccomp.BitsSet, namespaces))
	case Daemon, Drill:
		none = seccomp.ActionKillProcess
		// A datagram socket can be connected anew, to another socket of this machine.
		when(seccomp.ActionKillProcess, "socketpair", list(1, seccomp.BitsSet, notStream))
		when(seccomp.ActionKillProcess, "fcntl", // signals to other processes
			list(1, seccomp.Equal, unix.F_SETOWN), list(1, seccomp.Equal, unix.F_SETOWN_EX),
			list(1, seccomp.Equal, unix.F_SETSIG))
		fallthrough
	default:
		when(none, "clone", list(0, seccomp.BitsNotSet, unix.CLONE_THREAD))
		when(none, "tgkill", list(0, seccomp.NotEqual, self))
		when(none, "prlimit64", list(0, seccomp.NotEqual, 0, self))
	}
	// A key pressed by a program would be a command to the shell behind the daemon.
	when(fails(unix.EPERM), "ioctl", list(1, seccomp.Equal, unix.TIOCSTI), list(1, seccomp.Equal, unix.TIOCLINUX))
	switch {
	case r.tcp():
		types := uint64(neither)
		if !r.udp() {
			types = notStream
		}
		// Landlock confines neither Multipath TCP nor SCTP: a protocol, and a type.
		when(fails(unix.EPERM), "socket",
			list(0, seccomp.NotEqual, unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK),
			list(1, seccomp.BitsSet, neither),
			append(list(0, seccomp.NotEqual, unix.AF_NETLINK, unix.AF_UNIX), list(1, seccomp.BitsSet, types)...),
			list(2, seccomp.NotEqual, 0, unix.IPPROTO_TCP, unix.IPPROTO_UDP),
			append(list(0, seccomp.Equal, unix.AF_NETLINK), list(2, seccomp.NotEqual, unix.NETLINK_ROUTE)...),
		)
		if !r.unixSockets() && !r.Streams {
			// Datagrams are for the service manager and journald. A service that could be
			// commanded, such as one that starts containers, has a stream. Streams and packets
			// have bit 0.
			when(fails(unix.EPERM), "socket",
				append(list(0, seccomp.Equal, unix.AF_UNIX), list(1, seccomp.BitsSet, 1)...))
		}
	case r.unixSockets():
		when(fails(unix.EPERM), "socket", list(0, seccomp.NotEqual, unix.AF_UNIX))
	}
	allow, fail := r.calls()
	groups := []seccomp.SyscallGroup{
		{Action: seccomp.ActionAllow, Names: known(allow)},
		// The flags of clone3 are in memory: the C library then uses clone.
		{Action: fails(unix.ENOSYS), Names: known("clone3")},
	}
	if names := known(fail); len(names) > 0 {
		groups = append(groups, seccomp.SyscallGroup{Action: fails(unix.EPERM), Names: names})
	}
	// The last filter to load is the one that forbids to load filters. Its default is also for the
	// calls of another architecture.
	return append(all, filter(seccomp.ActionKillProcess, groups...)), nil
}

// without returns names without others.
func without(names, others string) string {
	return strings.Join(slices.DeleteFunc(strings.Fields(names), func(name string) bool {
		return slices.Contains(strings.Fields(others), name)
	}), " ")
}

// list returns the conditions of an argument for several values, which must all hold.
func list(argument uint32, is seccomp.Operation, values ...uint64) (all seccomp.ArgumentConditions) {
	for _, value := range values {
		all = append(all, seccomp.Condition{Argument: argument, Operation: is, Value: value})
	}
	return all
}

// fails is the action that has a system call fail with an error.
func fails(with unix.Errno) seccomp.Action { return seccomp.ActionErrno | seccomp.Action(with) }
