package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"countersign/internal/sandbox"

	"golang.org/x/sys/unix"
)

// proveCommand is the hidden command that tries, from inside each sandbox, what must not work.
const proveCommand = "prove-sandbox"

// target is what the acts are tried on: files, a process and ports that no sandbox has a right to.
type target struct {
	folder string // with a file of the name file
	pid    int
	port   int // of a server on 127.0.0.1
	socket string
}

// acts are the forbidden acts by name. Each leaves the machine as it was.
var acts = map[string]func(target) error{
	"read a file":   func(t target) error { _, err := os.ReadFile(t.folder + "/file"); return err },
	"list a folder": func(t target) error { _, err := os.ReadDir(t.folder); return err },
	"write a file": func(t target) error {
		f, err := os.OpenFile(t.folder+"/file", os.O_WRONLY|os.O_APPEND, 0)
		if err == nil {
			f.Close()
		}
		return err
	},
	"truncate a file": func(t target) error { return os.Truncate(t.folder+"/file", 0) },
	"make a file": func(t target) error {
		err := os.WriteFile(t.folder+"/new", nil, 0o600)
		return errors.Join(err, os.RemoveAll(t.folder+"/new"))
	},
	"execute a program": func(target) error {
		return unix.Exec("/bin/true", []string{"true"}, nil) // a success ends the process with status 0
	},
	"fork": func(target) error {
		pid, _, errno := unix.RawSyscall(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0)
		if errno == 0 && pid == 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		return failed(errno)
	},
	"make a user namespace": func(target) error { return unix.Unshare(unix.CLONE_NEWUSER) },
	"fork into a user namespace": func(target) error {
		pid, _, errno := unix.RawSyscall(unix.SYS_CLONE, uintptr(unix.SIGCHLD)|unix.CLONE_NEWUSER, 0, 0)
		if errno == 0 && pid == 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		return failed(errno)
	},
	"connect to a TCP port": func(t target) error {
		return withSocket(unix.AF_INET, unix.SOCK_STREAM, 0, func(fd int) error {
			return unix.Connect(fd, &unix.SockaddrInet4{Port: t.port, Addr: [4]byte{127, 0, 0, 1}})
		})
	},
	"listen on a TCP port": func(target) error {
		return withSocket(unix.AF_INET, unix.SOCK_STREAM, 0, func(fd int) error {
			return unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
		})
	},
	"send by UDP": func(target) error {
		return withSocket(unix.AF_INET, unix.SOCK_DGRAM, 0, func(int) error { return nil })
	},
	"use Multipath TCP": func(target) error {
		return withSocket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP, func(int) error { return nil })
	},
	"connect to a Unix socket": func(t target) error {
		return withSocket(unix.AF_UNIX, unix.SOCK_STREAM, 0, func(fd int) error {
			return unix.Connect(fd, &unix.SockaddrUnix{Name: t.socket})
		})
	},
	"trace a process": func(t target) error { return unix.PtraceSeize(t.pid) },
	"read the memory of a process": func(t target) error {
		into := make([]byte, 8)
		local := []unix.Iovec{{Base: &into[0], Len: 8}}
		_, err := unix.ProcessVMReadv(t.pid, local, []unix.RemoteIovec{{Base: 0x1000, Len: 8}}, 0)
		return err
	},
	"open the memory of a process": func(t target) error {
		f, err := os.Open(fmt.Sprintf("/proc/%d/mem", t.pid))
		if err == nil {
			f.Close()
		}
		return err
	},
	"take a descriptor of a process": func(t target) error {
		_, err := unix.PidfdGetfd(-1, 0, 0)
		return err
	},
	"signal a process": func(t target) error { return unix.Kill(t.pid, 0) },
	"load a module":    call(unix.SYS_FINIT_MODULE), "load a program into the kernel": call(unix.SYS_BPF),
	"mount": call(unix.SYS_MOUNT), "change the root": call(unix.SYS_CHROOT),
	"use keys of the kernel": call(unix.SYS_KEYCTL),
	"handle page faults":     call(unix.SYS_USERFAULTFD), "use io_uring": call(unix.SYS_IO_URING_SETUP),
	"load a filter":        call(unix.SYS_SECCOMP),
	"count events":         call(unix.SYS_PERF_EVENT_OPEN),
	"open by handle":       call(unix.SYS_OPEN_BY_HANDLE_AT),
	"a call of the future": call(1000),
}

// call makes a system call with arguments that no call accepts.
func call(number uintptr) func(target) error {
	return func(target) error {
		const faulty = ^uintptr(0)
		_, _, errno := unix.Syscall6(number, faulty, faulty, faulty, faulty, faulty, faulty)
		return failed(errno)
	}
}

func failed(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}

func withSocket(family, kind, protocol int, do func(fd int) error) error {
	fd, err := unix.Socket(family, kind, protocol)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return do(fd)
}

// try carries an act out, and returns the name of the error's number, or "done".
func try(act string, t target) string {
	do := acts[act]
	if do == nil {
		return "unknown"
	}
	err := do(t)
	var errno syscall.Errno
	switch {
	case err == nil:
		return "done"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

// proveSandbox has a child process for each sandbox and each act: the child confines itself as the
// configuration says, and tries the act. The lines have the sandbox, the act, and what came of it:
// done, the name of the error, or the signal that ended the child. The names of sandboxes are
// "daemon", "launcher" and those of tokens; "free" is a process without a sandbox.
func proveSandbox(path string, c Config, as, act string, stdout io.Writer) error {
	if as != "" { // a child
		return proveOne(path, c, as, act, stdout)
	}
	names := append([]string{"free", "daemon", "launcher"}, slices.Sorted(maps.Keys(c.Tokens))...)
	for _, name := range names {
		for _, act := range slices.Sorted(maps.Keys(acts)) {
			cmd := exec.Command("/proc/self/exe", proveCommand, "--config", path, "--as", name, "--act", act)
			out, err := cmd.Output()
			result := strings.TrimSpace(string(out))
			var exit *exec.ExitError
			switch {
			case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled():
				result = unix.SignalName(exit.Sys().(syscall.WaitStatus).Signal())
			case err != nil:
				return fmt.Errorf("prove %s, %s: %w", name, act, err)
			case result == "":
				result = "done" // another program took the process over
			}
			fmt.Fprintf(stdout, "%s\t%s\t%s\n", name, act, result)
		}
	}
	return nil
}

func proveOne(path string, c Config, as, act string, stdout io.Writer) error {
	// A foreign folder, process, port and socket come from the variables of the caller.
	var t target
	t.folder, t.socket = os.Getenv("PROVE_FOLDER"), os.Getenv("PROVE_SOCKET")
	t.pid, _ = strconv.Atoi(os.Getenv("PROVE_PID"))
	t.port, _ = strconv.Atoi(os.Getenv("PROVE_PORT"))
	rights := sandbox.Rights{}
	switch as {
	case "free":
		fmt.Fprintln(stdout, try(act, t))
		return nil
	case "daemon":
		rights = c.rights(path, peerDoors(c, nil), nil)
	case "launcher":
		rights = c.launcherRights("")
	default:
		token := c.Tokens[as]
		if token == nil {
			return configError{fmt.Errorf("--as %s: the configuration has no such token", as)}
		}
		rights = token.rights()
	}
	if err := rights.Enter(); err != nil {
		return err
	}
	runtime.LockOSThread()
	fmt.Fprintln(stdout, try(act, t))
	return nil
}
