package ledger_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
)

// TestReplicaFindsDifferences checks that ledgertest.Equal finds differences. Every ledger of the
// tests ends with that comparison.
func TestReplicaFindsDifferences(t *testing.T) {
	dir, begin := t.TempDir(), time.Now()
	file := func(name string, change func(l *ledger.Ledger)) string {
		path := filepath.Join(dir, name)
		now := func() time.Time { return begin }
		if err := ledger.Create(path, ledger.Options{Wall: now}); err != nil {
			t.Fatal(err)
		}
		l, err := ledgertest.Open(t, path, ledger.Options{Wall: now, Elapsed: func() time.Duration { return 0 }})
		if err != nil {
			t.Fatal(err)
		}
		change(l)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		return path
	}
	put := func(key, value string) func(l *ledger.Ledger) {
		return func(l *ledger.Ledger) {
			err := l.Update(t.Context(), func(tx *ledger.Tx) error { return tx.Put(ledger.Keys, key, []byte(value)) })
			if err != nil {
				t.Error(err)
			}
		}
	}
	same := file("a", put("k", "v"))
	if err := ledgertest.Equal(same, file("b", put("k", "v"))); err != nil {
		t.Error(err)
	}
	for name, other := range map[string]func(*ledger.Ledger){
		"another value": put("k", "w"),
		"another key":   put("l", "v"),
		"one more":      func(l *ledger.Ledger) { put("k", "v")(l); put("m", "")(l) },
		"a nonce":       func(l *ledger.Ledger) { put("k", "v")(l); mustAdmit(t, l, admission("k", 1, 1, 1), 0) },
	} {
		if ledgertest.Equal(same, file(name, other)) == nil {
			t.Errorf("%s is not found", name)
		}
	}
}

// TestDecodeWrites checks that a decoded list encodes to the same bytes again, and that malformed
// lists are refused.
func TestDecodeWrites(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	var lists [][]byte
	keep := func(list []byte) {
		if list != nil {
			lists = append(lists, list)
		}
	}
	l, err := ledger.Open(path, ledger.Options{Replicate: keep}) // without a replica: the test takes its place
	if err != nil {
		t.Fatal(err)
	}
	furnish(t, l)
	l.Close()
	if len(lists) < 20 {
		t.Fatalf("%d lists", len(lists))
	}
	random := rand.New(rand.NewPCG(1, 2))
	for _, list := range lists {
		w, err := ledger.DecodeWrites(list)
		if err != nil {
			t.Fatal(err)
		}
		if again := w.Encode(); !bytes.Equal(again, list) {
			t.Fatalf("read and encoded again, %x is %x", list, again)
		}
		for range 50 { // a changed or cut list is an error or another list, and never a panic
			broken := bytes.Clone(list)
			broken[random.IntN(len(broken))] ^= byte(1 + random.IntN(255))
			broken = broken[:len(broken)-random.IntN(2)*random.IntN(len(broken))]
			if w, err := ledger.DecodeWrites(broken); err == nil {
				w.Encode()
			}
		}
	}
	for name, list := range map[string][]byte{
		"nothing": nil, "another version": append([]byte{1}, lists[0][1:]...), "cut": lists[0][:len(lists[0])-1],
		"no bucket":      append(bytes.Clone(lists[0][:17]), 0x81, 1, 'k', 1, 'v'),
		"unknown bucket": append(bytes.Clone(lists[0][:17]), 1, 200, 0, 1, 'k', 1, 'v'),
		"a root made":    append(bytes.Clone(lists[0][:17]), 3, 1, 0),
		"unknown write":  append(bytes.Clone(lists[0][:17]), 9, 1, 0, 1, 'k'),
		"too long": append(bytes.Clone(lists[0][:17]), 2, 1, 0,
			0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f),
	} {
		if _, err := ledger.DecodeWrites(list); err == nil {
			t.Errorf("%s is taken for a list", name)
		}
	}
}

// gate is a writer that blocks after some bytes until the channel open is closed.
type gate struct {
	io.Writer
	room    int           // bytes until the gate blocks
	stopped chan struct{} // closed when the gate blocks
	open    chan struct{}
}

func (g *gate) Write(b []byte) (int, error) {
	if g.room -= len(b); g.room < 0 && g.stopped != nil {
		close(g.stopped)
		g.stopped = nil
		<-g.open
	}
	return g.Writer.Write(b)
}

// TestSnapshot blocks a snapshot. Meanwhile admissions go on, even if the file grows to four times
// its size, Stats returns, and Compact refuses. The copy has the state at the begin of the
// snapshot.
func TestSnapshot(t *testing.T) {
	l, _ := create(t)
	furnish(t, l)
	copied := filepath.Join(t.TempDir(), "copy.db")
	f, err := os.Create(copied)
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{Writer: f, room: 20_000, stopped: make(chan struct{}), open: make(chan struct{})}
	stopped, done := g.stopped, make(chan error, 1)
	go func() { done <- l.Snapshot(g) }()
	<-stopped
	before, err := l.Stats()
	if err != nil {
		t.Fatal(err)
	}
	for before.FileSize*4 > size(t, l) {
		if err := l.Fill(t.Context(), 20_000, time.Now().Unix()+1000); err != nil {
			t.Fatal(err)
		}
	}
	mustAdmit(t, l, admission("k", 100, 1, 1), ledger.Fresh)
	if _, _, _, err := l.Compact(t.Context(), note("compacted")); !errors.Is(err, ledger.ErrBusy) {
		t.Errorf("compaction during a snapshot: %v", err)
	}
	close(g.open)
	if err := errors.Join(<-done, f.Close()); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := l.Compact(t.Context(), note("compacted")); err != nil {
		t.Errorf("compaction after it: %v", err)
	}
	checkFile(t, copied)
	c := open(t, copied)
	if s, err := c.Stats(); err != nil || s.Events != before.Events || s.Nonces != before.Nonces {
		t.Errorf("the copy has %d events and %d nonces, the ledger had %d and %d: %v",
			s.Events, s.Nonces, before.Events, before.Nonces, err)
	}
	mustAdmit(t, c, admission("k", 100, 1, 1), ledger.Fresh) // admitted after the snapshot had begun
	l.Close()
	if err := l.Snapshot(io.Discard); !errors.Is(err, ledger.ErrClosed) {
		t.Errorf("of a closed ledger: %v", err)
	}
}

func size(t *testing.T, l *ledger.Ledger) int64 {
	t.Helper()
	s, err := l.Stats()
	if err != nil {
		t.Fatal(err)
	}
	return s.FileSize
}

// TestLittleAddressSpace: a ledger opens where the address space has no room for the mapping.
func TestLittleAddressSpace(t *testing.T) {
	defer ledger.MapSize(1 << 47)() // more than any process has on amd64 and arm64
	l, path := create(t)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	l.Close()
	mustAdmit(t, open(t, path), admission("k", 1, 1, 1), ledger.Repeated)
}

// TestStatsWaitForNothing checks that Stats returns while the writer is busy.
func TestStatsWaitForNothing(t *testing.T) {
	l, _ := create(t)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	release := l.Occupy()
	s, err := l.Stats()
	release()
	if err != nil || s.Nonces != 1 {
		t.Errorf("%d nonces, %v", s.Nonces, err)
	}
}

// TestMarginOf checks that the margin is read from the ledger's records at opening.
func TestMarginOf(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	m.options.MarginOf = func(v ledger.View) (time.Duration, error) {
		if v.Get(ledger.Meta, "margin") == nil {
			return 24 * time.Hour, nil
		}
		return time.Hour, nil
	}
	l := m.open(t)
	mustAdmit(t, l, m.admission(1, time.Hour), ledger.Fresh)
	put := func(tx *ledger.Tx) error { return tx.Put(ledger.Meta, "margin", []byte("1h")) }
	if err := l.Update(t.Context(), put); err != nil {
		t.Fatal(err)
	}
	m.pass(4 * time.Hour)
	if s, err := l.Stats(); err != nil || s.Nonces != 1 {
		t.Errorf("with a day: %d nonces, %v", s.Nonces, err)
	}
	l.Close()
	l = m.open(t)
	m.pass(24 * time.Hour) // the ledger's time follows the clock
	if err := l.Alive(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, err := l.Stats(); err != nil || s.Nonces != 0 {
		t.Errorf("with an hour: %d nonces, %v", s.Nonces, err)
	}
	l.Close()
	m.options.MarginOf = func(ledger.View) (time.Duration, error) { return 0, errSpent }
	_, err := ledger.Open(m.path, m.options) // without a replica: it does not open
	if !errors.Is(err, errSpent) {
		t.Errorf("a record that can't be read: %v", err)
	}
}

// TestReplicaNeedsEachList: a replica takes the list that follows and no other, and all lists of a
// call or none.
func TestReplicaNeedsEachList(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	var lists [][]byte
	keep := func(list []byte) {
		if list != nil {
			lists = append(lists, list)
		}
	}
	l, err := ledger.Open(path, ledger.Options{Replicate: keep}) // without a replica: the test opens one
	if err != nil {
		t.Fatal(err)
	}
	furnish(t, l)
	base := filepath.Join(t.TempDir(), "base.db")
	if err := l.Copy(func(c ledger.Copy) error {
		if last := ledger.NumberOf(lists[len(lists)-1]); c.Lists != last {
			t.Errorf("the copy has the lists to %d, and the last one is %d", c.Lists, last)
		}
		f, err := os.Create(base)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = c.WriteTo(f)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	lists = nil
	for range 3 {
		if _, err := l.Append(t.Context(), note("after the copy")); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := ledger.OpenReplica(base)
	if err != nil {
		t.Fatal(err)
	}
	for _, wrong := range [][][]byte{{lists[1]}, {lists[0], lists[2]}, {lists[0], lists[0]}, {lists[0], nil}} {
		if err := r.Apply(wrong...); err == nil {
			t.Errorf("a replica takes %d lists that do not follow", len(wrong))
		}
	}
	if err := r.Apply(lists...); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := ledgertest.Equal(path, base); err != nil {
		t.Error(err)
	}
}
