package softhsmtests

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMemoryIsLocked reads the status of the key workers of a serving daemon. With an unlimited
// RLIMIT_MEMLOCK their memory is locked. Below, nothing is locked and check says so. Key workers
// serve in both cases.
func TestMemoryIsLocked(t *testing.T) {
	const limitless = ^uint64(0)
	unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: limitless, Max: limitless}) // with CAP_SYS_RESOURCE
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		t.Fatal(err)
	}
	locks, says := limit.Cur == limitless, "NOT locked, so that a PIN"
	if locks {
		says = "ok: locked, so that no secret"
	}
	s := newSystem(t)
	if out, code := s.daemon("check"); code != 0 || !strings.Contains(out, says) {
		t.Errorf("check: %d\n%s", code, out)
	}
	p := s.serve()
	s.enrol()
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Error(err)
	}
	for _, pid := range p.workers() {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil || strings.Contains(string(b), "VmLck:\t       0 kB") == locks {
			t.Errorf("%d: want locked memory: %v, %v\n%s", pid, locks, err, b)
		}
	}
}
