package hsm_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign/hsm"
	"countersign/internal/keystore"
)

// shim is SoftHSM behind a fault injector, softhsm-tests/testdata/shim.c. The faults are documented
// there.
type shim struct {
	t      *testing.T
	config hsm.Config
	dir    string
}

// Indices of functions in CK_FUNCTION_LIST (PKCS#11 v2.40).
const (
	initialize, finalize, getSessionInfo = 0, 1, 15
	openSession, closeSession, login     = 12, 13, 18
	signInit, sign, deriveKey            = 42, 43, 62
)

const (
	ckrDeviceError, ckrSessionCount, ckrAlreadyLoggedIn = 0x30, 0xb1, 0x100
	ckrTypeInconsistent, ckrMechanismInvalid            = 0x63, 0x70
	isHeld                                              = -1 // in the log: the call has not returned yet
)

// fault is a line of the shim's script.
type fault struct {
	function    int
	kind        string
	argument    uint
	count, skip int
}

// call is a line of the shim's log.
type call struct {
	function int
	session  uint
	code     int
}

// compileShim builds the shim and returns its path.
func compileShim(t *testing.T) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "shim.so")
	source := filepath.Join("..", "softhsm-tests", "testdata", "shim.c")
	gcc := exec.Command("gcc", "-O2", "-shared", "-fPIC", "-o", out, source, "-ldl", "-lpthread")
	if text, err := gcc.CombinedOutput(); err != nil {
		t.Fatalf("gcc %s: %v\n%s", source, err, text)
	}
	return out
}

// newShim makes a token behind the shim, and a configuration with the given Config.Sessions.
func newShim(t *testing.T, sessions int) *shim {
	t.Helper()
	s := &shim{t: t, config: newToken(t), dir: t.TempDir()}
	s.config.Sessions, s.config.Share = sessions, 1
	s.config.Module = compileShim(t)
	t.Setenv("SHIM_SCRIPT", filepath.Join(s.dir, "script"))
	t.Setenv("SHIM_LOG", filepath.Join(s.dir, "log"))
	return s
}

// inject replaces the shim's script: from now on the module has these faults and no others.
func (s *shim) inject(faults ...fault) {
	s.t.Helper()
	var b strings.Builder
	for _, f := range faults {
		end := time.Now().Add(time.Hour).UnixMilli()
		fmt.Fprintf(&b, "0 %d -1 %d %s %d %d %d\n", end, f.function, f.kind, f.argument, f.count, f.skip)
	}
	write(s.t, filepath.Join(s.dir, "new"), b.String())
	if err := os.Rename(filepath.Join(s.dir, "new"), filepath.Join(s.dir, "script")); err != nil {
		s.t.Fatal(err)
	}
}

// calls reads the shim's log.
func (s *shim) calls() (all []call) {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.dir, "log"))
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var c call
		if _, err := fmt.Sscan(line, &c.function, &c.session, &c.code); err != nil {
			s.t.Fatalf("%q: %v", line, err)
		}
		all = append(all, c)
	}
	return all
}

// count returns the number of completed calls of a function, or of its calls with the given return
// value.
func (s *shim) count(function int, codes ...int) (n int) {
	s.t.Helper()
	for _, c := range s.calls() {
		counts := len(codes) == 0 && c.code != isHeld || len(codes) == 1 && c.code == codes[0]
		if c.function == function && counts {
			n++
		}
	}
	return n
}

// openSessions returns the number of open sessions, the login session included.
func (s *shim) openSessions() int {
	s.t.Helper()
	open := map[uint]bool{}
	for _, c := range s.calls() {
		switch {
		case c.function == finalize:
			clear(open)
		case c.function == openSession && c.code == 0:
			open[c.session] = true
		case c.function == closeSession && c.code == 0:
			delete(open, c.session)
		}
	}
	return len(open)
}

// closeSessions closes all sessions except the login session, by failing operations: the store
// closes the session of a failed operation.
func (s *shim) closeSessions(store *hsm.Store) {
	s.t.Helper()
	absent := keystore.Ref{Name: "absent", Version: 1}
	for range store.IdleSessions() {
		if _, err := store.Key(s.t.Context(), absent); !errors.Is(err, keystore.ErrNotFound) {
			s.t.Fatal(err)
		}
	}
	if n := s.openSessions(); n != 1 {
		s.t.Fatalf("%d sessions are open", n)
	}
}

// eventually waits for a condition, for at most 20 s.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timeout: %s", what)
		}
	}
}

// generate makes a key with the key's name as the tag.
func generate(t *testing.T, store *hsm.Store, name string, alg keystore.Algorithm) keystore.Key {
	t.Helper()
	var tag keystore.Tag
	copy(tag[:], name)
	key, err := store.Generate(t.Context(), keystore.Ref{Name: name, Version: 1}, alg, tag)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// signs checks that a key makes a valid signature.
func signs(t *testing.T, key keystore.Key) {
	t.Helper()
	if sig, err := key.Sign(t.Context(), []byte("m"), nil); err != nil || !key.Info().Verify([]byte("m"), sig) {
		t.Errorf("%v, or the signature does not verify", err)
	}
}
