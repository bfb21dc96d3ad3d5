package softhsmtests

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"countersign/internal/sandbox"
)

// hostile configures the hostile module, with one variable.
func hostile(t *testing.T, variable, value string) *system {
	t.Helper()
	s := newSystem(t)
	s.emptyFolder("report")
	s.edit("countersign.toml", softHSM, compile(t, "hostile.c", "-shared", "-fPIC"))
	s.edit("countersign.toml", "environment = {",
		fmt.Sprintf("workers = 1\nenvironment = { HOSTILE_REPORT = %q, %s = %q,", s.path("report"), variable, value))
	return s
}

// TestHostileModuleIsConfined has a module try, from inside a key worker of the built daemon, what
// a key worker has no right to. errno names the mechanism: EACCES is Landlock's, EPERM that of the
// filter of system calls. The module serves all the same.
func TestHostileModuleIsConfined(t *testing.T) {
	s := hostile(t, "HOSTILE_FOLDER", "")
	s.edit("countersign.toml", `HOSTILE_FOLDER = ""`, fmt.Sprintf("HOSTILE_FOLDER = %q", "file:"+s.dir))
	p := s.serve()
	s.enrol()
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Errorf("the module does not serve: %v", err)
	}
	p.stop()
	b, err := os.ReadFile(s.path("report/report"))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]syscall.Errno{}
	for line := range strings.Lines(string(b)) {
		var act string
		var errno int
		if _, err := fmt.Sscan(line, &act, &errno); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		got[act] = syscall.Errno(errno)
	}
	want := map[string]syscall.Errno{
		"read-own-pin": 0, "read-program": 0, // which a key worker needs
		"read-ledger": syscall.EACCES, "write-ledger": syscall.EACCES, "read-other-pin": syscall.EACCES,
		"read-config": syscall.EACCES, "write-softhsm-config": syscall.EACCES, "make-file": syscall.EACCES,
		"read-shadow": syscall.EACCES, "read-daemon-memory": syscall.EACCES,
		"read-daemon-environment": syscall.EACCES,
		"execute":                 syscall.EPERM, "fork": syscall.EPERM, "signal-daemon": syscall.EPERM,
		"socket-tcp": syscall.EPERM, "socket-udp": syscall.EPERM, "socket-unix": syscall.EPERM,
	}
	for act, errno := range want {
		if e, tried := got[act]; !tried || e != errno {
			t.Errorf("%s: errno %d, tried: %v; want %d", act, e, tried, errno)
		}
	}
	if len(got) != len(want) {
		t.Errorf("the module has tried %d acts, and the test expects %d", len(got), len(want))
	}
	if _, err := os.Stat(s.path("planted")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the module has made a file: %v", err)
	}
}

// TestHostileModuleIsKilled has a module make a system call that no key worker needs. The kernel
// kills the process, and check says so.
func TestHostileModuleIsKilled(t *testing.T) {
	for _, act := range []string{"ptrace", "process_vm_readv", "mount", "user-namespace", "module", "32-bit"} {
		t.Run(act, func(t *testing.T) {
			s := hostile(t, "HOSTILE_FATAL", act)
			out, code := s.daemon("check")
			if code != 1 || !strings.Contains(out, "bad system call") {
				t.Errorf("check: %d\n%s", code, out)
			}
			if b, err := os.ReadFile(s.path("report/report")); err != nil || len(b) > 0 {
				t.Errorf("the module went on: %q, %v", b, err)
			}
		})
	}
}

// TestDaemonDropsCapabilities reads the status of each thread of a daemon that serves. The daemon
// has been started with the capabilities of the test.
func TestDaemonDropsCapabilities(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.cmd.Process.Pid))
	if err != nil || len(threads) == 0 {
		t.Fatal(threads, err)
	}
	for _, thread := range threads {
		b, err := os.ReadFile(thread)
		if errors.Is(err, os.ErrNotExist) {
			continue // the thread has ended
		} else if err != nil {
			t.Fatal(err)
		}
		want := []string{"CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n", "NoNewPrivs:\t1\n"}
		if os.Geteuid() == 0 {
			want = append(want, "CapBnd:\t0000000000000000\n")
		}
		for _, line := range want {
			if !strings.Contains(string(b), line) {
				t.Errorf("%s lacks %q:\n%s", thread, line, b)
			}
		}
	}
}

// TestUnconfinedIsTold gives a key worker the network, which a kernel with Landlock below ABI 10
// can't confine to ports. check, the log, the state and an alert say so. Without the network they
// don't.
func TestUnconfinedIsTold(t *testing.T) {
	s := newSystem(t)
	out, code := s.daemon("check")
	if code != 0 || !strings.Contains(out, "sandbox           key workers are confined\n") {
		t.Errorf("check: %d\n%s", code, out)
	}
	s.edit("countersign.toml", "environment = {", "network = [\"127.0.0.1:9\"]\nenvironment = {")
	lacks := sandbox.ABI() < 10
	out, code = s.daemon("check")
	if code != 0 || strings.Contains(out, "NOT WHOLE on this kernel: ") != lacks {
		t.Errorf("check, with the network: %d\n%s", code, out)
	}
	p := s.serve()
	s.enrol()
	if s.hasCause("sandbox-incomplete") != lacks {
		t.Errorf("the cause is not as the kernel is, with Landlock ABI %d", sandbox.ABI())
	}
	if lacks {
		eventually(t, "an alert", func() bool { return s.hasEvent("AlertFiring", "alert/sandbox-incomplete") })
	}
	p.stop()
	if strings.Contains(p.stderr.String(), "a process is not confined as intended") != lacks {
		t.Errorf("the log:\n%s", p.stderr)
	}
}
