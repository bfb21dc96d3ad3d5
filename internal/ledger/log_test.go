package ledger_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/mod/sumdb/tlog"
)

// reference is a tree that package tlog computes. reference is a tlog.HashReader.
type reference struct {
	size   int64
	hashes []tlog.Hash
}

func (r *reference) ReadHashes(indexes []int64) (found []tlog.Hash, err error) {
	for _, i := range indexes {
		found = append(found, r.hashes[i])
	}
	return found, nil
}

func (r *reference) append(t *testing.T, event []byte) {
	t.Helper()
	some, err := tlog.StoredHashes(r.size, event, r)
	if err != nil {
		t.Fatal(err)
	}
	r.size, r.hashes = r.size+1, append(r.hashes, some...)
}

func (r *reference) root(t *testing.T) audit.Hash {
	t.Helper()
	h, err := tlog.TreeHash(r.size, r)
	if err != nil {
		t.Fatal(err)
	}
	return audit.Hash(h)
}

// grow appends n events in one transaction.
func grow(t *testing.T, l *ledger.Ledger, n int) {
	t.Helper()
	if err := l.Update(t.Context(), func(tx *ledger.Tx) error {
		for i := range n {
			if err := tx.Append(note(fmt.Sprint("event ", i, " of ", n))); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// sameTree compares the tree and the stored hashes of the present epoch with those of package tlog
// over the same events.
func sameTree(t *testing.T, l *ledger.Ledger) {
	t.Helper()
	epoch, first, tree := l.Head()
	var want reference
	if err := l.Events(first, func(index uint64, event []byte) bool {
		if index != first+uint64(want.size) {
			t.Fatalf("event %d comes as number %d", index, want.size)
		}
		want.append(t, event)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	root, err := tree.Root()
	if err != nil || tree.Size != uint64(want.size) || root != want.root(t) {
		t.Fatalf("epoch %d: %d events with the root %v, want %d with %v; %v",
			epoch, tree.Size, root, want.size, want.root(t), err)
	}
	if err := l.Hashes(epoch, func(r audit.Reader) error {
		for i, h := range want.hashes {
			if got, err := r.ReadHashes([]int64{int64(i)}); err != nil || got[0] != audit.Hash(h) {
				return fmt.Errorf("hash %d is %v, want %v; %w", i, got, h, err)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// TestTheTreeIsThatOfTheEvents compares the tree at sizes around the edges of chunks and segments,
// before and after a new opening, in three epochs that begin at different positions of a segment.
func TestTheTreeIsThatOfTheEvents(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	for epoch := range 3 {
		for n := range 70 { // all edges of the first two chunks
			grow(t, l, 1)
			sameTree(t, l)
			if n%7 == 0 {
				l.Close()
				l = m.open(t)
				sameTree(t, l)
			}
		}
		for _, n := range []int{57, 1, 1, 4096 - 131, 1, 1, 4095, 1000 * epoch} {
			grow(t, l, n)
			sameTree(t, l)
			l.Close()
			l = m.open(t)
			sameTree(t, l)
		}
		if next, err := l.EndEpoch(t.Context(), audit.Daemon()); err != nil || next != uint32(epoch+1) {
			t.Fatal(next, err)
		}
		sameTree(t, l)
	}
}

// TestEpochsAreAChain checks that the first event of an epoch has the size and root of the epoch
// before, for sizes around the edges of chunks, and the time of the system's clock.
func TestEpochsAreAChain(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	sizes := []int{1, 2, 3, 31, 32, 33, 34, 35, 36, 64, 65, 1, 4096}
	var first uint64
	for n, size := range sizes {
		grow(t, l, size-1)
		m.step(time.Hour) // the ledger's time stays behind
		wall := m.wall.UnixMilli()
		_, _, tree := l.Head()
		root, err := tree.Root()
		if err != nil {
			t.Fatal(err)
		}
		if next, err := l.EndEpoch(t.Context(), audit.Daemon()); err != nil || next != uint32(n+1) {
			t.Fatal(next, err)
		}
		if n%3 == 0 {
			l.Close()
			l = m.open(t)
		}
		e, err := l.Epoch(uint32(n))
		if err != nil || e.First != first || e.Size != uint64(size) || string(e.Root) != string(root[:]) ||
			e.Ended == 0 || e.Final() {
			t.Errorf("%+v, %v", e, err)
		}
		first += uint64(size)
		var begun audit.Event
		l.Events(first, func(_ uint64, b []byte) bool { begun, err = audit.Decode(b); return false })
		if m := begun.Metadata; err != nil || begun.Type != audit.EpochBegun || m["first"] != fmt.Sprint(first) ||
			m["previous_size"] != fmt.Sprint(size) || begun.TimeMS != wall ||
			m["previous_root"] != base64.StdEncoding.EncodeToString(root[:]) {
			t.Errorf("%+v, %v", begun, err)
		}
		for event, want := range map[uint64]int{first - 1: n, first - uint64(size): n, first: n + 1} {
			if e, err := l.EpochOf(event); err != nil || e.Number != uint32(want) {
				t.Errorf("event %d is in epoch %d, want %d; %v", event, e.Number, want, err)
			}
		}
		if _, err := l.EpochOf(first + 1); !errors.Is(err, ledger.ErrNotFound) {
			t.Errorf("an event that does not exist: %v", err)
		}
		if err := l.Hashes(uint32(n), func(r audit.Reader) error {
			again, err := audit.LoadTree(uint64(size), r)
			if got, _ := again.Root(); got != root {
				t.Errorf("epoch %d: the root is %v, want %v", n, got, root)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	if all, err := l.Epochs(); err != nil || len(all) != len(sizes)+1 {
		t.Errorf("%d epochs, %v", len(all), err)
	}
}

// TestEventsFromAnywhere checks that each event from a number on comes once and in order, across
// the limits of read transactions and segments.
func TestEventsFromAnywhere(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	const n = 9001
	grow(t, l, n-1)
	for _, from := range []uint64{
		0, 1, 255, 256, 257, 4095, 4096, 4097, 3840, 3841, 8191, 8192, n - 256, n - 1, n, n + 5000, 1 << 63,
	} {
		next := from
		err := l.Events(from, func(index uint64, _ []byte) bool { next++; return index == next-1 })
		if err != nil || next != max(from, n) {
			t.Errorf("from %d up to %d, %v", from, next, err)
		}
		seen := 0
		if err := l.Events(from, func(uint64, []byte) bool { seen++; return seen < 300 }); err != nil || seen > 300 {
			t.Errorf("%d events, want at most 300; %v", seen, err)
		}
	}
}

// checkpointText returns a checkpoint with the parts that the ledger reads.
func checkpointText(tree audit.Tree) []byte {
	root, _ := tree.Root()
	return fmt.Appendf(nil, "origin\n%d\n%s\n\n— sig\n", tree.Size, root)
}

// TestSetCheckpoint checks that the largest checkpoint stays, and that a checkpoint of a missing
// epoch is refused without an end of the ledger.
func TestSetCheckpoint(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	_, _, one := l.Head()
	grow(t, l, 9)
	_, _, ten := l.Head()
	for _, tree := range []audit.Tree{ten, one, ten} {
		if err := l.SetCheckpoint(t.Context(), 0, tree.Size, checkpointText(tree)); err != nil {
			t.Fatal(err)
		}
		if e, err := l.Epoch(0); err != nil || e.Signed != 10 || e.Checkpoint != string(checkpointText(ten)) {
			t.Errorf("%+v, %v", e, err)
		}
	}
	if err := l.SetCheckpoint(t.Context(), 7, 1, nil); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("%v", err)
	}
	l.EndEpoch(t.Context(), audit.Daemon())
	if e, err := l.Epoch(0); err != nil || !e.Final() {
		t.Errorf("%+v, %v", e, err)
	}
	l.Close()
	l = m.open(t)
	grow(t, l, 1)
}

// TestDamageIsNamed changes records of a ledger. Open finds damage at the end of the log, and Check
// finds all other damage. The error names the damaged record.
func TestDamageIsNamed(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	a := m.admission(1, 1000)
	got := mustAdmit(t, l, a, ledger.Fresh)
	receipt := &ledger.Receipt{ID: ledger.ReceiptID{1}, TimeMS: 1}
	if err := l.Settle(t.Context(), got, []byte("s"), note("settled"), receipt); err != nil {
		t.Fatal(err)
	}
	grow(t, l, 5000)
	_, _, tree := l.Head()
	if err := l.SetCheckpoint(t.Context(), 0, tree.Size, checkpointText(tree)); err != nil {
		t.Fatal(err)
	}
	var last uint64
	var shown uint64
	if err := ledger.Check(closed(m, l), m.options, func(done, all uint64) {
		if all != 5003 || done < last || done > all {
			t.Errorf("progress %d of %d after %d", done, all, last)
		}
		last, shown = done, shown+1
	}); err != nil || shown < 2 {
		t.Fatal(shown, err)
	}
	in := func(path ...string) func(tx *bolt.Tx) *bolt.Bucket {
		return func(tx *bolt.Tx) *bolt.Bucket {
			b := tx.Bucket([]byte(path[0]))
			for _, name := range path[1:] {
				b = b.Bucket([]byte(name))
			}
			return b
		}
	}
	key := func(n uint64) string {
		return string([]byte{byte(n >> 56), 0, 0, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
	}
	flip := func(b func(*bolt.Tx) *bolt.Bucket, k string) func(tx *bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			v := append([]byte(nil), b(tx).Get([]byte(k))...)
			v[len(v)/2] ^= 1
			return b(tx).Put([]byte(k), v)
		}
	}
	remove := func(b func(*bolt.Tx) *bolt.Bucket, k string) func(tx *bolt.Tx) error {
		return func(tx *bolt.Tx) error { return b(tx).Delete([]byte(k)) }
	}
	put := func(b func(*bolt.Tx) *bolt.Bucket, k string, v []byte) func(tx *bolt.Tx) error {
		return func(tx *bolt.Tx) error { return b(tx).Put([]byte(k), v) }
	}
	hour := got.ExpiresAt / 3600
	spent := string([]byte{0, byte(hour >> 16), byte(hour >> 8), byte(hour)}) + key(0)
	const epoch0 = "\x00\x00\x00\x00"
	series, receiptID := strings.Repeat("s", 16), string(receipt.ID[:])
	for name, damage := range map[string]struct {
		open   bool   // Open finds the damage
		says   string // part of the error
		change func(tx *bolt.Tx) error
	}{
		"an event at the end":      {true, "event 5000 ", flip(in("events", key(1)), key(5000))},
		"an event before":          {false, "event 17 ", flip(in("events", key(0)), key(17))},
		"an event that is missing": {false, "event 18 ", remove(in("events", key(0)), key(18))},
		"the last event is gone":   {true, "hash", remove(in("events", key(1)), key(5002))},
		"a hash":                   {false, "event 114 ", flip(in("hashes"), epoch0+key(3))},
		"hashes are missing":       {false, "epoch 0", remove(in("hashes"), epoch0+key(5))},
		"the checkpoint": {true, "checkpoint", func(tx *bolt.Tx) error {
			v := string(in("epochs")(tx).Get([]byte(epoch0)))
			return in("epochs")(tx).Put([]byte(epoch0), []byte(strings.Replace(v, `origin\n5003`, `origin\n5002`, 1)))
		}},
		"a nonce":                  {true, "nonce", put(in("nonces", spent), key(1), []byte("short"))},
		"a nonce that was changed": {true, "event 1 ", flip(in("nonces", spent), key(1))},
		"a nonce in another segment": {true, "event 1 ", func(tx *bolt.Tx) error {
			v := append([]byte(nil), in("nonces", spent)(tx).Get([]byte(key(1)))...)
			other, err := in("nonces")(tx).CreateBucket([]byte(spent[:4] + key(1)))
			return errors.Join(err, other.Put([]byte(key(1)), v))
		}},
		"an outcome in another segment": {false, "outcomes", put(in("outcomes", spent), key(5000), []byte("s"))},
		"a receipt is gone":             {false, "receipt", remove(in("receipts"), key(1)+receiptID)},
		"a decision of no event":        {false, "decision", put(in("decisions"), key(1<<30), make([]byte, 9))},
		"a decision that is cut":        {false, "decision", put(in("decisions"), key(1), []byte("short"))},
		"a total that falls": {false, "series", func(tx *bolt.Tx) error {
			return errors.Join(
				in("counters")(tx).Put([]byte(series+key(1)), []byte{2}),
				in("counters")(tx).Put([]byte(series+key(2)), []byte{1}),
			)
		}},
		"the time": {true, "time", remove(in("meta"), "time")},
		"a bucket": {true, "counters", func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte("counters")) }},
	} {
		t.Run(name, func(t *testing.T) {
			whole := readFile(t, m.path)
			defer writeFile(t, m.path, whole)
			db, err := bolt.Open(m.path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(db.Update(damage.change), db.Close()); err != nil {
				t.Fatal(err)
			}
			l, err := ledgertest.Open(t, m.path, m.options)
			if err == nil {
				l.Close()
			}
			if damage.open != (err != nil) {
				t.Errorf("open: %v", err)
			}
			if !damage.open {
				err = ledger.Check(m.path, m.options, nil)
			}
			if !errors.Is(err, ledger.ErrCorrupt) || !strings.Contains(err.Error(), damage.says) {
				t.Errorf("%v; it should name %q", err, damage.says)
			}
		})
	}
}

// closed closes the ledger of a machine and returns its path.
func closed(m *machine, l *ledger.Ledger) string {
	l.Close()
	return m.path
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
