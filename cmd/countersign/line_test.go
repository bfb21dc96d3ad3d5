package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/client"
	"countersign/client/clienttest"
	"countersign/noise"
	"countersign/wire"
)

// peerOf starts a fake appliance. The function with adds the flags of its peer to arguments.
func peerOf(t *testing.T) (s *clienttest.Server, dir string, with func(args ...string) []string) {
	t.Helper()
	s, err := clienttest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	dir = t.TempDir()
	identity := filepath.Join(dir, "peer.key")
	if err := os.WriteFile(identity, fmt.Appendf(nil, "%x\n", s.Peer.Private()), 0o600); err != nil {
		t.Fatal(err)
	}
	key := s.Statics[0].Public()
	return s, dir, func(args ...string) []string {
		return append(args, "--server", s.Address, "--server-key", hex.EncodeToString(key[:]), "--identity", identity)
	}
}

func lineAt(l *clienttest.KeyLine, version uint32) client.KeyLine {
	return client.KeyLine{Key: l.Key, Version: version, PublicKey: l.Public(version), Next: l.Next(version)}
}

// pinned writes a file with a pinned version.
func pinned(t *testing.T, dir string, l client.KeyLine) string {
	t.Helper()
	b, err := l.Encode()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, fmt.Sprintf("%s-%d.line", l.Key, l.Version))
	if err := os.WriteFile(path, append(b, '\n'), 0o640); err != nil {
		t.Fatal(err)
	}
	return path
}

func lineIn(t *testing.T, path string) client.KeyLine {
	t.Helper()
	l, err := readLine(path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLinePinAndFollow(t *testing.T) {
	s, dir, with := peerOf(t)
	status, out, stderr := call(t, "", with("line", "pin", "payments")...)
	if l, err := client.DecodeKeyLine([]byte(out)); status != 0 || err != nil || l != lineAt(s.Line, 1) {
		t.Fatalf("%d, %q, %s, %v", status, out, stderr, err)
	}
	path := pinned(t, dir, lineAt(s.Line, 1))
	status, _, stderr = call(t, "", with("line", "pin", "nothing")...)
	if status != 1 || !strings.Contains(stderr, "unknown_key") {
		t.Errorf("%d, %s", status, stderr)
	}
	status, out, _ = call(t, "", with("line", "follow", path)...)
	if status != 0 || strings.Contains(out, "step") || !strings.Contains(out, "line  version 1 of payments") {
		t.Errorf("nothing new: %d, %s", status, out)
	}
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown = 3, 4 })
	for _, write := range []bool{false, true} {
		args := with("line", "follow", path, "--json")
		if write {
			args = append(args, "--write")
		}
		status, out, stderr = call(t, "", args...)
		var doc struct {
			Key     string
			From    int
			Steps   []struct{ Version int }
			Line    json.RawMessage
			Written bool
		}
		if err := json.Unmarshal([]byte(out), &doc); err != nil || status != 0 {
			t.Fatalf("%d, %s, %s, %v", status, out, stderr, err)
		}
		if doc.From != 1 || len(doc.Steps) != 3 || doc.Steps[2].Version != 4 || doc.Written != write {
			t.Fatal(out)
		}
		want := lineAt(s.Line, 1)
		if write { // version 3 signs, and version 4 is announced
			want = lineAt(s.Line, 3)
			want.Announced = client.Successor{PublicKey: s.Line.Public(4), Next: s.Line.Next(4)}
		}
		if got := lineIn(t, path); got != want {
			t.Errorf("written %t: the file has %+v", write, got)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if files, _ := os.ReadDir(dir); len(files) != 2 {
		t.Errorf("files are left: %v", files)
	}
	status, out, _ = call(t, "", with("line", "follow", pinned(t, dir, lineAt(s.Line, 2)))...)
	if status != 0 || !strings.Contains(out, "step       to version 3           ") ||
		!strings.Contains(out, "line       version 3 of payments  ") ||
		!strings.Contains(out, "announced  version 4 of payments  ") {
		t.Errorf("%d, %s", status, out)
	}
}

// TestLineFollowNamesCompromises: a compromised version is named by line follow, and with --write
// the appliance learns that the peer knows. Before that, the pinned version leads to no signature.
func TestLineFollowNamesCompromises(t *testing.T) {
	s, dir, with := peerOf(t)
	path := pinned(t, dir, lineAt(s.Line, 1))
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown, s.Compromised = 3, 3, []uint32{1} })
	sign := with("sign", "--key", "payments", "--context", "release", "--line", path)
	if status, out, stderr := call(t, "hello", sign...); status != 1 || out != "" ||
		!strings.Contains(stderr, "compromised: ") || !strings.Contains(stderr, "line follow "+path) {
		t.Errorf("%d, %s, %s", status, out, stderr)
	}
	s.Do(func(s *clienttest.Server) { s.Greeting = [][]byte{wire.EncodeCompromise(s.Line.Compromise(1))} })
	told := false
	for range 50 { // a command may end with the answer before the event is delivered
		_, _, stderr := call(t, "", with("keys")...)
		told = told || strings.Contains(stderr, "version 1 of \"payments\" is COMPROMISED")
	}
	if !told || len(s.Seen().Acks) != 0 {
		t.Errorf("told %t, acknowledged %+v", told, s.Seen().Acks)
	}
	for _, write := range []bool{false, true} {
		args := with("line", "follow", path)
		if write {
			args = append(args, "--write")
		}
		status, out, stderr := call(t, "", args...)
		if status != 0 || !strings.Contains(out, "COMPROMISED  version 1 of payments  ") {
			t.Errorf("%d, %s, %s", status, out, stderr)
		}
		acks := s.Seen().Acks
		if write != (len(acks) == 1 && acks[0].Op == wire.OpCompromiseAck && acks[0].Version == 1) {
			t.Errorf("written %t: acknowledged %+v", write, acks)
		}
	}
	if status, out, stderr := call(t, "hello", sign...); status != 0 || !strings.Contains(out, "version 3") {
		t.Errorf("%d, %s, %s", status, out, stderr)
	}
}

func TestLineFollowRefuses(t *testing.T) {
	s, dir, with := peerOf(t)
	thief := clienttest.NewKeyLine("thief", 2)
	path := pinned(t, dir, lineAt(s.Line, 1))
	s.Do(func(s *clienttest.Server) {
		s.Answer = func(id string, request any) []byte {
			if r, is := request.(*wire.Line); is {
				next := s.Line.Next(2)
				forged := clienttest.Step(s.Line.Private[1], r.Key, 3, thief.Public(1), &next)
				steps := []wire.Succession{s.Line.Step(2), forged}
				return wire.EncodeAnswer(id, "", wire.Steps{Key: r.Key, Steps: steps}, nil)
			}
			return nil
		}
	})
	status, out, stderr := call(t, "", with("line", "follow", path, "--write")...)
	if status != 1 || out != "" || !strings.Contains(stderr, "broken_line") ||
		!strings.Contains(stderr, "from version 2") || lineIn(t, path) != lineAt(s.Line, 1) {
		t.Errorf("%d, %q, %s", status, out, stderr)
	}
	os.WriteFile(path, []byte(`{"key":"payments"}`), 0o600)
	status, _, stderr = call(t, "", with("line", "follow", path)...)
	if status != 1 || !strings.Contains(stderr, "malformed") {
		t.Errorf("%d, %s", status, stderr)
	}
}

func TestSignByLine(t *testing.T) {
	s, dir, with := peerOf(t)
	path := pinned(t, dir, lineAt(s.Line, 1))
	sign := func(key string) (int, string, string) {
		return call(t, "hello", with("sign", "--key", key, "--context", "release", "--line", path)...)
	}
	if status, out, stderr := sign("payments"); status != 0 || !strings.Contains(out, "version 1") || stderr != "" {
		t.Errorf("%d, %s, %s", status, out, stderr)
	}
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown = 3, 3 })
	status, out, stderr := sign("payments")
	if status != 0 || !strings.Contains(out, "version 3") || !strings.Contains(stderr, "line follow "+path) {
		t.Errorf("%d, %s, %s", status, out, stderr)
	}
	s.Do(func(s *clienttest.Server) { s.Shown = 2 })
	if status, out, stderr := sign("payments"); status != 1 || out != "" || !strings.Contains(stderr, "broken_line") {
		t.Errorf("%d, %s, %s", status, out, stderr)
	}
	if status, _, stderr := sign("receipts"); status != 2 {
		t.Errorf("%d, %s", status, stderr)
	}
}

// screen is the output of a running command.
type screen struct {
	mu      sync.Mutex
	b       bytes.Buffer
	changed sync.Cond
}

func newScreen() *screen {
	s := new(screen)
	s.changed.L = &s.mu
	return s
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.changed.Broadcast()
	return s.b.Write(p)
}

func (s *screen) String() string { s.mu.Lock(); defer s.mu.Unlock(); return s.b.String() }

// await waits for a text.
func (s *screen) await(ctx context.Context, text string) {
	defer context.AfterFunc(ctx, s.changed.Broadcast)()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !strings.Contains(s.b.String(), text) && ctx.Err() == nil {
		s.changed.Wait()
	}
}

func TestWatch(t *testing.T) {
	s, dir, with := peerOf(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	watch := func(args ...string) (out, errs *screen, ended chan int) {
		out, errs, ended = newScreen(), newScreen(), make(chan int, 1)
		go func() {
			ended <- run(ctx, with(append([]string{"watch"}, args...)...), strings.NewReader(""), out, errs)
		}()
		s.Await(ctx, func(seen clienttest.Seen) bool { return seen.Connections == 1 })
		return out, errs, ended
	}
	thief := clienttest.NewKeyLine("thief", 2)
	young, err := noise.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	newKey := young.Public()
	forged := s.Line.Rotation(2)
	step := clienttest.Step(s.Line.Private[0], "payments", 2, thief.Public(1), nil)
	forged.PublicKey, forged.Succession = thief.Public(1), &step

	s.Do(func(s *clienttest.Server) { s.Shown = 2 })
	out, errs, ended := watch("--json", "--line", pinned(t, dir, lineAt(s.Line, 1)), "--until-rotations", "2")
	s.Send(wire.EncodeRotation(forged))
	out.await(ctx, "another public key")
	s.Send(wire.EncodeRotation(s.Line.Rotation(2)))
	s.Await(ctx, func(seen clienttest.Seen) bool { return len(seen.Acks) == 1 })
	s.Send(wire.EncodeCompromise(s.Line.Compromise(1)))
	s.Await(ctx, func(seen clienttest.Seen) bool { return len(seen.Acks) == 2 })
	s.Send(wire.EncodeRotation(wire.Rotation{
		Key: wire.NoiseKey, Version: 2, PublicKey: newKey, ActivatesAt: 1704067200, RetiresAt: 1704153600,
	}))
	if status := <-ended; status != 0 {
		t.Errorf("%d, %s", status, errs)
	}
	var got []string
	for d := json.NewDecoder(strings.NewReader(out.String())); ; {
		var doc struct {
			Event   string
			Key     string
			Version int
			Error   string
		}
		if err := d.Decode(&doc); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(doc.Event, " ", doc.Key, doc.Version, doc.Error != ""))
	}
	want := "rotation payments2 true, rotation payments2 false, compromise payments1 false, rotation noise2 false"
	if strings.Join(got, ", ") != want || strings.Count(out.String(), "\n") != 4 {
		t.Errorf("%v\n%s", got, out)
	}
	if !strings.Contains(errs.String(), fmt.Sprintf("from 2024-01-01T00:00:00Z on use --server-key %x", newKey)) {
		t.Error(errs)
	}
	if acks := s.Seen().Acks; len(acks) != 3 || acks[0].Key != "payments" ||
		acks[1].Op != wire.OpCompromiseAck || acks[2].Key != "noise" {
		t.Errorf("%+v", acks)
	}

	// After a lost connection, the event comes at the next one. A signal ends the command.
	s.Await(ctx, func(seen clienttest.Seen) bool { return seen.Connections == 0 })
	out, errs, ended = watch()
	s.Do(func(s *clienttest.Server) { s.Greeting = [][]byte{wire.EncodeRotation(s.Line.Rotation(3))} })
	s.Drop()
	s.Await(ctx, func(seen clienttest.Seen) bool { return len(seen.Acks) == 4 })
	// A request under way replaces a dropped connection silently. The test drops connections until
	// one had no request.
	for ctx.Err() == nil && !strings.Contains(errs.String(), "trying again in 1s") {
		n := s.Seen().Accepted
		s.Drop()
		s.Await(ctx, func(seen clienttest.Seen) bool { return seen.Accepted > n && seen.Connections > 0 })
	}
	if ctx.Err() != nil {
		t.Error("the lost connection is not told")
	}
	cancel()
	status := <-ended
	onlyRetries := strings.Count(errs.String(), "\n") == strings.Count(errs.String(), "trying again")
	line := `"payments" version 3 from 2024-01-01T00:00:00Z on, public key `
	if status != 0 || !onlyRetries || !strings.HasPrefix(out.String(), line) {
		t.Errorf("%d, %s, %s", status, out, errs)
	}
}

// TestNewServerKeyIsTold checks that any command prints a new key of the listener, and leaves the
// acknowledgement to watch.
func TestNewServerKeyIsTold(t *testing.T) {
	s, _, with := peerOf(t)
	young, err := noise.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	newKey := young.Public()
	s.Do(func(s *clienttest.Server) {
		ofServer := wire.Rotation{
			Key: wire.NoiseKey, Version: 2, PublicKey: newKey, ActivatesAt: 1704067200, RetiresAt: 1704153600,
		}
		s.Greeting = [][]byte{wire.EncodeRotation(ofServer), wire.EncodeRotation(s.Line.Rotation(2))}
	})
	told := false
	for range 50 { // a command may end with the answer before the event is delivered
		_, _, stderr := call(t, "", with("keys")...)
		told = told || strings.Contains(stderr, fmt.Sprintf("%x", newKey))
	}
	if !told || len(s.Seen().Acks) != 0 {
		t.Errorf("told %t, acknowledged %+v", told, s.Seen().Acks)
	}
}

func TestWatchUsage(t *testing.T) {
	_, dir, with := peerOf(t)
	bad := filepath.Join(dir, "bad")
	os.WriteFile(bad, []byte("{}"), 0o600)
	for _, args := range [][]string{
		{"watch"}, with("watch", "--until-rotations", "-1"), with("watch", "more"),
		with("line"), with("line", "follow"),
	} {
		if status, _, stderr := call(t, "", args...); status != 2 {
			t.Errorf("%v: %d, %s", args, status, stderr)
		}
	}
	if status, _, _ := call(t, "", with("watch", "--line", bad)...); status != 1 {
		t.Errorf("a bad file: %d", status)
	}
}
