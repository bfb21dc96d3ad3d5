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
// software tokens. A name that an architecture does not have is skipped.
const permitted = `
	read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 close close_range lseek
	open openat openat2 creat stat fstat lstat newfstatat statx access faccessat faccessat2 statfs fstatfs
	fcntl flock fsync fdatasync sync_file_range truncate ftruncate fallocate fadvise64 ioctl
	rename renameat renameat2 mkdir mkdirat rmdir unlink unlinkat symlink symlinkat link linkat
	readlink readlinkat chmod fchmod fchmodat chown fchown fchownat lchown umask utime utimes
	utimensat futimesat getdents getdents64 getcwd chdir fchdir copy_file_range sendfile
	getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
	dup dup2 dup3 pipe pipe2 eventfd eventfd2 poll ppoll select pselect6
	epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
	mmap munmap mremap mprotect madvise brk msync mincore mlock mlock2 munlock mlockall munlockall
	memfd_create memfd_secret membarrier get_mempolicy
	shmget shmat shmdt shmctl semget semop semtimedop semctl
	futex set_robust_list get_robust_list set_tid_address rseq arch_prctl prctl
	sched_yield sched_getaffinity sched_setaffinity sched_getparam sched_getscheduler
	sched_get_priority_max sched_get_priority_min getcpu getpriority
	gettid getpid getppid getpgrp getpgid getsid getuid geteuid getgid getegid getgroups
	getresuid getresgid capget uname sysinfo getrlimit getrusage times getrandom
	rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
	pause nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time
	setitimer getitimer alarm timer_create timer_settime timer_gettime timer_getoverrun timer_delete
	timerfd_create timerfd_settime timerfd_gettime
	sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg shutdown getsockopt setsockopt getsockname
	getpeername socketpair
	restart_syscall exit exit_group`

// refused are the system calls that fail with EPERM. Libraries try them, and go on after the
// failure: a log line to syslog, the name of a host, a helper program. All other system calls kill
// the process.
const refused = `
	bind listen accept accept4 fork vfork execve execveat wait4 waitid
	kill tkill setrlimit setpriority sched_setscheduler sched_setparam`

// filters returns the process's filters of system calls. The kernel asks all filters, and the
// strictest answer counts. The arguments that decide are numbers: a filter can't look at memory.
//
// The first filter has no conditions on arguments, and each of the others has those of one system
// call. The assembler of go-seccomp-bpf 1.6.0 does not load the number of the system call again
// after a condition has failed, so whatever comes next would be compared with an argument.
func (r Rights) filters() ([]seccomp.Filter, error) {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil, err
	}
	known := func(names string) []string {
		return slices.DeleteFunc(strings.Fields(names), func(name string) bool {
			_, has := info.SyscallNames[name]
			return !has
		})
	}
	filter := func(otherwise seccomp.Action, groups ...seccomp.SyscallGroup) seccomp.Filter {
		return seccomp.Filter{
			Flag:   seccomp.FilterFlagTSync,
			Policy: seccomp.Policy{DefaultAction: otherwise, Syscalls: groups},
		}
	}
	// refuse has a system call fail if all conditions of one list hold.
	refuse := func(name string, lists ...seccomp.ArgumentConditions) seccomp.Filter {
		group := seccomp.SyscallGroup{Action: fails(unix.EPERM)}
		for _, list := range lists {
			group.NamesWithCondtions = append(group.NamesWithCondtions,
				seccomp.NameWithConditions{Name: name, Conditions: list})
		}
		return filter(seccomp.ActionAllow, group)
	}
	self := uint64(os.Getpid())
	allow, fail := permitted+" clone tgkill prlimit64", refused
	all := []seccomp.Filter{
		refuse("clone", list(0, seccomp.BitsNotSet, unix.CLONE_THREAD)),
		refuse("tgkill", list(0, seccomp.NotEqual, self)),
		refuse("prlimit64", list(0, seccomp.NotEqual, 0, self)),
	}
	switch {
	case len(r.Connect) > 0: // with the resolver, and its question for this machine's addresses
		allow += " socket connect bind" // Landlock has no TCP port to bind
		fail = strings.Replace(fail, "bind ", "", 1)
		// Landlock confines neither Multipath TCP nor SCTP: a protocol, and a type.
		const noStream = unix.SOCK_SEQPACKET&^unix.SOCK_STREAM | unix.SOCK_PACKET&^unix.SOCK_DGRAM
		all = append(all, refuse("socket",
			list(0, seccomp.NotEqual, unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK),
			list(1, seccomp.BitsSet, noStream),
			list(2, seccomp.NotEqual, 0, unix.IPPROTO_TCP, unix.IPPROTO_UDP),
			append(list(0, seccomp.Equal, unix.AF_NETLINK), list(2, seccomp.NotEqual, unix.NETLINK_ROUTE)...),
		))
	case len(r.Sockets) > 0:
		allow += " socket connect"
		all = append(all, refuse("socket", list(0, seccomp.NotEqual, unix.AF_UNIX)))
	default:
		fail += " socket connect"
	}
	// The last filter to load is the one that forbids to load filters. Its default is also for the
	// calls of another architecture. The flags of clone3 are in memory: the C library then uses
	// clone.
	return append(all, filter(seccomp.ActionKillProcess,
		seccomp.SyscallGroup{Action: seccomp.ActionAllow, Names: known(allow)},
		seccomp.SyscallGroup{Action: fails(unix.ENOSYS), Names: known("clone3")},
		seccomp.SyscallGroup{Action: fails(unix.EPERM), Names: known(fail)},
	)), nil
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
