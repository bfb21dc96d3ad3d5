package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// task is the work of a child process, in its environment: the rights, and what the child tries.
type task struct {
	Rights Rights
	Enter  bool   // confine the child first
	Acts   []act  // tried one after another
	Status bool   // print the status of all threads
	Fatal  string // the name of a system call, made at the end
}

// act is one attempt.
type act struct {
	Do     string // a name in attempts
	Path   string // of a file
	Number int    // a port, or the id of a process
}

const taskVariable = "SANDBOX_TASK"

func TestMain(m *testing.M) {
	if text := os.Getenv(taskVariable); text != "" {
		if err := child(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child carries a task out, and prints a line for each result.
func child(text string) error {
	var t task
	if err := json.Unmarshal([]byte(text), &t); err != nil {
		return err
	}
	if t.Enter {
		if err := t.Rights.Enter(); err != nil {
			return err
		}
	}
	for _, a := range t.Acts {
		fmt.Println(errnoOf(attempts[a.Do](a)))
	}
	if t.Status {
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, thread := range threads {
			b, err := os.ReadFile(filepath.Join("/proc/self/task", thread.Name(), "status"))
			if err != nil {
				return err
			}
			os.Stdout.Write(b)
		}
	}
	if t.Fatal != "" {
		const faulty = ^uintptr(0)
		_, _, errno := unix.Syscall6(fatal[t.Fatal], faulty, faulty, faulty, faulty, faulty, faulty)
		fmt.Println("survived:", errno)
	}
	return nil
}

// errnoOf returns the name of an error's number, or "ok".
func errnoOf(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

// attempts are the acts by name. Each leaves the machine as it was.
var attempts = map[string]func(act) error{
	"read": func(a act) error { _, err := os.ReadFile(a.Path); return err },
	"list": func(a act) error { _, err := os.ReadDir(a.Path); return err },
	"make": func(a act) error {
		err := os.WriteFile(a.Path, nil, 0o600)
		return errors.Join(err, os.RemoveAll(a.Path))
	},
	"append": func(a act) error {
		f, err := os.OpenFile(a.Path, os.O_WRONLY|os.O_APPEND, 0)
		if err == nil {
			f.Close()
		}
		return err
	},
	"truncate": func(a act) error { return os.Truncate(a.Path, 0) },
	"fork": func(act) error {
		pid, _, errno := unix.RawSyscall(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0)
		switch {
		case errno != 0:
			return errno
		case pid == 0:
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		return nil
	},
	// A file that is missing tells a filter from a lack of rights to files.
	"execute": func(a act) error { return unix.Exec("/missing", []string{"missing"}, nil) },
	"signal":  func(a act) error { return unix.Kill(a.Number, 0) },
	"signal a thread": func(a act) error {
		return unix.Tgkill(a.Number, a.Number, 0)
	},
	"limit": func(a act) error { return unix.Prlimit(a.Number, unix.RLIMIT_CORE, nil, &unix.Rlimit{}) },
	"TCP":   socket(unix.AF_INET, unix.SOCK_STREAM, 0),
	"MPTCP": socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP),
	"SCTP":  socket(unix.AF_INET, unix.SOCK_SEQPACKET, 0),
	"UDP":   socket(unix.AF_INET, unix.SOCK_DGRAM, 0),
	"Unix":  socket(unix.AF_UNIX, unix.SOCK_STREAM, 0),
	"connect": func(a act) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Connect(fd, &unix.SockaddrInet4{Port: a.Number, Addr: [4]byte{127, 0, 0, 1}})
	},
	"bind": func(a act) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
	},
	"x32": func(act) error { // getpid of the other ABI of the processor
		_, _, errno := unix.RawSyscall(0x40000000+39, 0, 0, 0)
		if errno != 0 {
			return errno
		}
		return nil
	},
}

func socket(family, kind, protocol int) func(act) error {
	return func(act) error {
		fd, err := unix.Socket(family, kind, protocol)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
}

// fatal are system calls that end a confined process. Their arguments have all bits set, which no
// call accepts.
var fatal = map[string]uintptr{
	"ptrace": unix.SYS_PTRACE, "process_vm_readv": unix.SYS_PROCESS_VM_READV,
	"process_vm_writev": unix.SYS_PROCESS_VM_WRITEV, "pidfd_getfd": unix.SYS_PIDFD_GETFD,
	"mount": unix.SYS_MOUNT, "umount2": unix.SYS_UMOUNT2, "move_mount": unix.SYS_MOVE_MOUNT,
	"pivot_root": unix.SYS_PIVOT_ROOT, "chroot": unix.SYS_CHROOT, "unshare": unix.SYS_UNSHARE,
	"setns": unix.SYS_SETNS, "bpf": unix.SYS_BPF, "perf_event_open": unix.SYS_PERF_EVENT_OPEN,
	"init_module": unix.SYS_INIT_MODULE, "finit_module": unix.SYS_FINIT_MODULE,
	"delete_module": unix.SYS_DELETE_MODULE, "kexec_load": unix.SYS_KEXEC_LOAD, "keyctl": unix.SYS_KEYCTL,
	"add_key": unix.SYS_ADD_KEY, "request_key": unix.SYS_REQUEST_KEY, "userfaultfd": unix.SYS_USERFAULTFD,
	"io_uring_setup": unix.SYS_IO_URING_SETUP, "open_by_handle_at": unix.SYS_OPEN_BY_HANDLE_AT,
	"setuid": unix.SYS_SETUID, "seccomp": unix.SYS_SECCOMP, "a call of the future": 1000,
}

// run carries a task out in a child process, and returns the lines and the error of its end.
func run(t *testing.T, work task) ([]string, error) {
	t.Helper()
	if ABI() < 6 {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatalf("Landlock ABI 6 is required, and this kernel has %d", ABI())
		}
		t.Skipf("this kernel has Landlock ABI %d; the test needs 6", ABI())
	}
	text, err := json.Marshal(work)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), taskVariable+"="+string(text))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, stderr.String())
	}
	return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n"), err
}

// TestEnterRefuses tries acts in a free process, where they succeed, and in a confined one. The
// error's number names the mechanism: EACCES is Landlock's, EPERM the filter's.
func TestEnterRefuses(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"read", "write", "foreign"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, "file"), []byte("text"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	listen := func() int {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l.Addr().(*net.TCPAddr).Port
	}
	ours, theirs := listen(), listen()
	files := Rights{Read: []string{filepath.Join(dir, "read")}, Write: []string{filepath.Join(dir, "write")}}
	network := Rights{Connect: []uint16{uint16(ours)}}
	drill := Rights{Kind: Drill, Read: files.Read, Write: files.Write, Sockets: []string{dir}}
	path := func(name string) string { return filepath.Join(dir, name) }
	self := os.Getpid()
	for _, c := range []struct {
		rights         Rights
		act            act
		free, confined string
	}{
		{files, act{Do: "read", Path: path("read/file")}, "ok", "ok"},
		{files, act{Do: "list", Path: path("read")}, "ok", "ok"},
		{files, act{Do: "append", Path: path("read/file")}, "ok", "EACCES"},
		{files, act{Do: "make", Path: path("read/new")}, "ok", "EACCES"},
		{files, act{Do: "read", Path: path("write/file")}, "ok", "ok"},
		{files, act{Do: "append", Path: path("write/file")}, "ok", "ok"},
		{files, act{Do: "make", Path: path("write/new")}, "ok", "ok"},
		{files, act{Do: "read", Path: path("foreign/file")}, "ok", "EACCES"},
		{files, act{Do: "list", Path: path("foreign")}, "ok", "EACCES"},
		{files, act{Do: "append", Path: path("foreign/file")}, "ok", "EACCES"},
		{files, act{Do: "make", Path: path("foreign/new")}, "ok", "EACCES"},
		{files, act{Do: "truncate", Path: path("foreign/file")}, "ok", "EACCES"},
		{files, act{Do: "read", Path: fmt.Sprintf("/proc/%d/environ", self)}, "ok", "EACCES"},
		{files, act{Do: "fork"}, "ok", "EPERM"},
		{files, act{Do: "execute"}, "ENOENT", "EPERM"},
		{files, act{Do: "signal", Number: self}, "ok", "EPERM"},
		{files, act{Do: "signal a thread", Number: self}, "ok", "EPERM"},
		{files, act{Do: "limit", Number: self}, "ok", "EPERM"},
		{files, act{Do: "limit", Number: 0}, "ok", "ok"},
		{files, act{Do: "TCP"}, "ok", "EPERM"},
		{files, act{Do: "UDP"}, "ok", "EPERM"},
		{files, act{Do: "Unix"}, "ok", "EPERM"},
		{network, act{Do: "connect", Number: ours}, "ok", "ok"},
		{network, act{Do: "connect", Number: theirs}, "ok", "EACCES"},
		{network, act{Do: "bind"}, "ok", "EACCES"},
		{network, act{Do: "UDP"}, "ok", "ok"},
		{network, act{Do: "MPTCP"}, "", "EPERM"}, // a kernel may lack the protocol
		{network, act{Do: "SCTP"}, "", "EPERM"},
		{Rights{Sockets: []string{dir}}, act{Do: "Unix"}, "ok", "ok"},
		{Rights{Sockets: []string{dir}}, act{Do: "TCP"}, "ok", "EPERM"},
		{drill, act{Do: "read", Path: path("read/file")}, "ok", "ok"},
		{drill, act{Do: "append", Path: path("read/file")}, "ok", "EACCES"},
		{drill, act{Do: "make", Path: path("write/new")}, "ok", "ok"},
		{drill, act{Do: "read", Path: path("foreign/file")}, "ok", "EACCES"},
		{drill, act{Do: "Unix"}, "ok", "ok"},
		{drill, act{Do: "TCP"}, "ok", "EPERM"},
		{drill, act{Do: "UDP"}, "ok", "EPERM"},
	} {
		for enter, want := range map[bool]string{false: c.free, true: c.confined} {
			if want == "" {
				continue
			}
			os.WriteFile(path("foreign/file"), []byte("text"), 0o600)
			got, err := run(t, task{Rights: c.rights, Enter: enter, Acts: []act{c.act}})
			if err != nil || len(got) != 1 || got[0] != want {
				t.Errorf("%+v, confined %v: %q, %v; want %s", c.act, enter, got, err, want)
			}
		}
	}
}

// TestEnterKills makes system calls that no key worker needs. The free process survives each of
// them, and the confined one is killed by the filter.
func TestEnterKills(t *testing.T) {
	for name := range fatal {
		if got, err := run(t, task{Fatal: name}); err != nil || !strings.HasPrefix(got[0], "survived") {
			t.Errorf("%s in a free process: %q, %v", name, got, err)
		}
		_, err := run(t, task{Enter: true, Fatal: name})
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGSYS {
			t.Errorf("%s in a confined process: %v; want the signal SIGSYS", name, err)
		}
	}
}

// TestEnterOtherABI makes a system call by the x32 ABI, whose numbers no list has.
func TestEnterOtherABI(t *testing.T) {
	if got, err := run(t, task{Enter: true, Acts: []act{{Do: "x32"}}}); err != nil || got[0] != "ENOSYS" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestEnterHoldsForAllThreads reads the status of each thread of a confined process.
func TestEnterHoldsForAllThreads(t *testing.T) {
	lines, err := run(t, task{Rights: Rights{Read: []string{"/proc/self"}}, Enter: true, Status: true})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
		"CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
	}
	if os.Geteuid() == 0 { // another user has no right to empty the set, and no use of it
		want["CapBnd"] = "0000000000000000"
	}
	threads := 0
	for _, line := range lines {
		name, value, _ := strings.Cut(line, ":")
		if name == "Pid" {
			threads++
		}
		if w, has := want[name]; has && strings.TrimSpace(value) != w {
			t.Errorf("%s; want %s", line, w)
		}
	}
	if threads < 2 {
		t.Errorf("the process has had %d threads", threads)
	}
}

// TestNoRightForTheRoot refuses rights that would be no confinement.
func TestNoRightForTheRoot(t *testing.T) {
	for _, r := range []Rights{
		{Read: []string{"/"}}, {Write: []string{"//"}}, {Sockets: []string{"/usr/.."}}, {Read: []string{"usr"}},
	} {
		if _, err := r.rules(); err == nil {
			t.Errorf("%+v is accepted", r)
		}
	}
}

// TestMissing lists what kernels lack. A filter makes up for Landlock where the process has no
// sockets.
func TestMissing(t *testing.T) {
	for _, c := range []struct {
		rights  Rights
		abi     int
		filters bool
		want    int
	}{
		{Rights{}, 10, true, 0}, {Rights{}, 7, true, 0}, {Rights{}, 5, true, 0}, {Rights{}, 4, true, 1},
		{Rights{}, 2, true, 2}, {Rights{}, 0, true, 3}, {Rights{}, 0, false, 8}, {Rights{}, 10, false, 1},
		{Rights{Sockets: []string{"/run"}}, 10, true, 0}, {Rights{Sockets: []string{"/run"}}, 7, true, 1},
		{Rights{Connect: []uint16{1}}, 10, true, 0}, {Rights{Connect: []uint16{1}}, 7, true, 2},
		{Rights{Connect: []uint16{1}}, 3, true, 5},
	} {
		if got := c.rights.missing(c.abi, c.filters); len(got) != c.want {
			t.Errorf("%+v, Landlock %d, filters %v: %q; want %d", c.rights, c.abi, c.filters, got, c.want)
		}
	}
}
