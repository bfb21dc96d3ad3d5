// Package sandbox takes rights away from the running process, for good: capabilities, files, TCP
// ports, programs, and system calls. The code that runs afterwards may be hostile, such as a
// PKCS#11 module. Begin reading at Rights.Enter.
package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// Rights are the rights that a process keeps. The zero value keeps the open descriptors only. A
// path that does not exist gives no right, also if a file comes to be there afterwards. A path
// stands for the file that has the path at the time of Enter: a file that is put in its place later
// is another file, so for files that are replaced the right must be for their folder.
type Rights struct {
	Kind    Kind     `json:"kind,omitempty"`
	Read    []string `json:"read,omitempty"`    // files, or folders with all that is below
	Write   []string `json:"write,omitempty"`   // the same, to read, write, make, rename and remove
	Devices []string `json:"devices,omitempty"` // device files, to read, write and control (ioctl)
	Sockets []string `json:"sockets,omitempty"` // folders of Unix sockets, to connect to
	Streams bool     `json:"streams,omitempty"` // of a daemon: Unix streams, for Sockets
	Connect []uint16 `json:"connect,omitempty"` // TCP ports, on any host; of a key worker UDP ports, too
	Bind    []uint16 `json:"bind,omitempty"`    // TCP ports to listen on
	Names   bool     `json:"names,omitempty"`   // of a daemon: UDP, to resolve names of hosts
	Execute []string `json:"execute,omitempty"` // programs, and their interpreters
	Remove  []string `json:"remove,omitempty"`  // folders to remove files from, such as a socket
	Keep    []uint   `json:"keep,omitempty"`    // capabilities
}

// Kind is the kind of a process, which decides the system calls.
type Kind string

// The kinds.
const (
	Worker   Kind = ""         // loads a foreign module, and serves one socket
	Launcher Kind = "launcher" // starts key workers, which are confined further
	Daemon   Kind = "daemon"   // serves peers and operators
	Drill    Kind = "drill"    // restores a backup, and tells the daemon by its Unix socket
)

// unixSockets reports that the process may make Unix sockets of each type and connect them. A
// daemon may make datagram sockets only, and with Streams also streams.
func (r Rights) unixSockets() bool {
	return r.Kind != Daemon && len(r.Connect)+len(r.Sockets) > 0
}

// udp reports that the process may make UDP sockets.
func (r Rights) udp() bool { return r.Names || r.Kind != Daemon && len(r.Connect) > 0 }

// tcp reports that the process may make TCP sockets.
func (r Rights) tcp() bool { return r.Kind == Daemon || len(r.Connect) > 0 }

// The rights of Landlock. No right but that of Execute includes the execution of a file.
const (
	readRights  = ll.AccessFSReadFile | ll.AccessFSReadDir
	writeRights = readRights | ll.AccessFSWriteFile | ll.AccessFSTruncate | ll.AccessFSMakeReg |
		ll.AccessFSMakeDir | ll.AccessFSMakeSym | ll.AccessFSRemoveFile | ll.AccessFSRemoveDir
	fileRights   = ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSTruncate | ll.AccessFSExecute
	deviceRights = ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSIoctlDev
)

// Enter confines all threads of the process, those of C included. The process has no way back.
// Enter tries a forbidden act of each mechanism at its end. An error means that the process may be
// confined in part: such a process must do no work. A kernel that lacks a part is no error: see
// Missing.
func (r Rights) Enter() error {
	abi, filters := ABI(), seccomp.Supported() // nothing can ask the kernel after the filter
	if err := DropCapabilities(r.Keep...); err != nil {
		return err
	}
	rules, err := r.rules()
	if err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	if err := landlock.V10.BestEffort().Restrict(rules...); err != nil {
		return fmt.Errorf("sandbox: Landlock: %w", err)
	}
	// The filters are the last step, since the steps before need system calls that they forbid.
	if filters {
		all, err := r.filters()
		for _, filter := range all {
			err = errors.Join(err, seccomp.LoadFilter(filter))
		}
		if err != nil {
			return fmt.Errorf("sandbox: system calls: %w", err)
		}
		if _, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0); !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("sandbox: the filter has let the process make a socket: %v", err)
		}
	}
	if abi > 0 {
		if _, err := os.ReadDir("/"); !errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("sandbox: Landlock has let the process read the folder /: %v", err)
		}
	}
	return nil
}

// rules returns the rules of Landlock. Some rights are for folders only, so a rule for a file has
// fewer of them.
func (r Rights) rules() (all []landlock.Rule, err error) {
	add := func(rights landlock.AccessFSSet, path string) {
		info, err := os.Stat(path)
		if err != nil {
			return
		}
		if !info.IsDir() {
			rights &= fileRights | ll.AccessFSIoctlDev
		}
		all = append(all, landlock.PathAccess(rights, path).IgnoreIfMissing())
	}
	for _, kind := range []struct {
		rights landlock.AccessFSSet
		paths  []string
	}{
		{readRights, r.Read}, {writeRights, r.Write}, {deviceRights, r.Devices},
		{ll.AccessFSResolveUnix, r.Sockets}, {ll.AccessFSExecute | ll.AccessFSReadFile, r.Execute},
		{ll.AccessFSRemoveFile, r.Remove},
	} {
		for _, path := range kind.paths {
			if !filepath.IsAbs(path) || filepath.Clean(path) == "/" {
				return nil, fmt.Errorf("no right can be for the path %q: name a file or a folder below /", path)
			}
			add(kind.rights, path)
		}
	}
	for _, port := range r.Bind {
		all = append(all, landlock.BindTCP(port))
	}
	for _, port := range r.Connect {
		all = append(all, landlock.ConnectTCP(port))
		if r.Kind != Daemon {
			all = append(all, landlock.ConnectSendUDP(port))
		}
	}
	if r.Names {
		all = append(all, landlock.ConnectTCP(dns), landlock.ConnectSendUDP(dns))
	}
	if r.udp() {
		all = append(all, landlock.BindUDP(0)) // the kernel binds a UDP socket at its first datagram
	}
	return all, nil
}

// dns is the port of name servers.
const dns = 53

// DropCapabilities takes all capabilities but some from all threads, and from every program that
// they could execute (no_new_privs): root without capabilities is a user like others. A capability
// that the process does not have is not given.
func DropCapabilities(keep ...uint) error {
	if err := dropCapabilities(keep); err != nil {
		return fmt.Errorf("sandbox: drop the capabilities: %w", err)
	}
	if err := allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("sandbox: no_new_privs: %w", err)
	}
	return nil
}

func dropCapabilities(keep []uint) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has, kept [2]unix.CapUserData
	if err := unix.Capget(&header, &has[0]); err != nil {
		return err
	}
	for _, c := range keep {
		bit := uint32(1) << (c % 32)
		kept[c/32].Permitted |= bit & has[c/32].Permitted
		kept[c/32].Effective |= bit & has[c/32].Effective
	}
	// The bounding set comes first, because only a process with CAP_SETPCAP can empty that set.
	if has[0].Effective&(1<<unix.CAP_SETPCAP) != 0 {
		for c := uint(0); ; c++ {
			if _, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); errors.Is(err, unix.EINVAL) {
				break // the kernel has no such capability
			} else if err != nil {
				return err
			}
			if slices.Contains(keep, c) {
				continue
			}
			if err := allThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0); err != nil {
				return err
			}
		}
	}
	// A filter that the service manager has set may refuse capset, which then has nothing to take.
	if has == kept {
		return nil
	}
	// A set without a capability also takes the capability from the ambient set.
	return allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&kept[0])), 0)
}

// allThreads makes a system call on each thread, also on threads that C code has started. Package
// syscall can do so only in a program without C. Threads with different results end the process.
//
//go:uintptrescapes
func allThreads(number, arg1, arg2, arg3 uintptr) error {
	if _, _, errno := psx.Syscall6(number, arg1, arg2, arg3, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// ABI returns the version of Landlock of this kernel; 0 is none.
func ABI() int {
	abi, err := ll.LandlockGetABIVersion()
	if err != nil {
		return 0
	}
	return abi
}

// Missing returns what this kernel does not forbid, although a process with the rights r should not
// be able to do so.
func (r Rights) Missing() []string { return r.missing(ABI(), seccomp.Supported()) }

// missing is Missing for a version of Landlock (landlock(7) has a list of them) and for a kernel
// with or without filters of system calls. A filter that permits no socket and no signal makes up
// for a part of Landlock.
func (r Rights) missing(abi int, filters bool) (all []string) {
	if !filters {
		all = append(all, "system calls are not confined (Linux 4.14 and CONFIG_SECCOMP_FILTER)")
	}
	for _, part := range []struct {
		since    int
		filtered bool // the filter does the same
		what     string
	}{
		{1, false, "files are not confined (Landlock, Linux 5.13)"},
		{3, false, "foreign files can be truncated (Landlock, Linux 6.2)"},
		{4, !r.tcp(), "each TCP port can be connected to (Landlock, Linux 6.7)"},
		{5, false, "devices can be controlled by ioctl (Landlock, Linux 6.10)"},
		{6, !r.unixSockets(), "abstract Unix sockets can be connected to (Landlock, Linux 6.12)"},
		{9, !r.unixSockets(), "each Unix socket can be connected to (Landlock, ABI 9)"},
		{10, !r.udp(), "each UDP port can be sent to (Landlock, ABI 10)"},
	} {
		if abi < part.since && !(filters && part.filtered) {
			all = append(all, part.what)
		}
	}
	return all
}
