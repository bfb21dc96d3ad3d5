package ledger_test

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/ledger/ledgertest"
)

func TestMain(m *testing.M) {
	disktest.Serve()
	os.Exit(m.Run())
}

// fact is a promise of the ledger to a caller, for example that a nonce is spent. The fact must
// hold for every disk that a power cut between the marks from and until can leave.
type fact struct {
	what        string
	from, until int // marks of the disk; until is 0 for a fact that always holds
	holds       func(*ledger.Ledger) error
}

// scenario is a sequence of operations of a ledger on a recorded disk, with the facts that follow.
type scenario struct {
	t       *testing.T
	disk    *disktest.Disk
	l       *ledger.Ledger
	o       ledger.Options
	wall    time.Time
	random  *rand.Rand
	private ed25519.PrivateKey
	log     audit.Log

	mu       sync.Mutex
	facts    []*fact
	ofEpoch  map[uint32][]*fact // facts that end when the epoch is dropped
	totals   []countedTotal     // lower bounds for the series "payments"
	ofNonces []*fact            // facts that end when the nonces expire
}

// countedTotal is the sum of the series "payments" in 30 days after an admission.
type countedTotal struct {
	from  int
	total int64
}

// expect records a fact that holds from now on.
func (s *scenario) expect(what string, holds func(*ledger.Ledger) error) *fact {
	f := &fact{what: what, holds: holds, from: s.disk.Mark()}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.facts = append(s.facts, f)
	return f
}

// must panics for an error.
func (s *scenario) must(err error) {
	if err != nil {
		s.t.Error(err)
		panic(err)
	}
}

// runScenario executes each operation that changes the ledger's files. skipped is the kind of fsync
// that the ledger leaves out, or "".
func runScenario(t *testing.T, skipped string) *scenario {
	s := &scenario{
		t: t, disk: disktest.New(t), random: rand.New(rand.NewPCG(1, 2)), wall: time.Unix(1_800_000_000, 0),
		ofEpoch: map[uint32][]*fact{}, private: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32)),
	}
	begin := s.wall
	// The monotonic clock agrees with the system's clock, so the ledger's time follows at once.
	s.o = ledger.Options{
		Wall:    func() time.Time { return s.wall },
		Elapsed: func() time.Duration { return s.wall.Sub(begin) },
	}
	var err error
	s.log, err = audit.NewLog(s.private.Public().(ed25519.PublicKey))
	s.must(err)
	path := filepath.Join(s.disk.Dir(), "ledger.db")
	s.must(ledger.Create(path, s.o))
	s.expect("the ledger", func(*ledger.Ledger) error { return nil })
	s.l, err = ledgertest.Open(t, path, s.o)
	s.must(err)
	defer func() { s.l.Close() }()
	for round := range 4 {
		s.admissions(6)
		s.checkpoint()
		s.records(round)
		s.admissions(3)
		next, err := s.l.EndEpoch(t.Context(), audit.Daemon())
		s.must(err)
		s.expect(fmt.Sprintf("epoch %d", next), func(l *ledger.Ledger) error {
			if e, _, _ := l.Head(); e < next {
				return fmt.Errorf("the present epoch is %d", e)
			}
			return nil
		})
		s.checkpointOf(next - 1) // the final checkpoint of the ended epoch
		s.admissions(2)
		s.expire()
		if skipped != "commit" {
			s.failOnce(disktest.Datasync, syscall.EIO)
		}
		s.failOnce(disktest.Write, syscall.ENOSPC)
		s.admissions(2)
		if round == 1 {
			if skipped != "commit" {
				s.failMetaSync()
			}
			s.l.Close()
			s.l, err = ledgertest.Open(t, path, s.o)
			s.must(err)
		}
		if round == 2 {
			s.drop(0)
		}
		s.admissions(4)
		if round >= 1 {
			_, _, _, err = s.l.Compact(t.Context(), note("compacted"))
			s.must(err)
		}
	}
	s.drop(1)
	s.admissions(3)
	return s
}

// failOnce lets the first disk operation of a kind fail. The transaction is not written, and the
// ledger goes on. A page of the failed transaction may be lost or written.
func (s *scenario) failOnce(kind disktest.Kind, errno syscall.Errno) {
	var once sync.Once
	s.disk.Fail(func(op disktest.Op) (answer syscall.Errno) {
		if op.Kind == kind {
			once.Do(func() { answer = errno })
		}
		return answer
	})
	err := s.l.Update(s.t.Context(), func(tx *ledger.Tx) error { return tx.Append(note("refused")) })
	s.disk.Fail(nil)
	if errno == syscall.ENOSPC && err == nil { // the ledger has released its reserve
		return
	}
	if !errors.Is(err, ledger.ErrDisk) {
		s.t.Errorf("a failed disk operation: %v", err)
	}
}

// failMetaSync lets the fsync of a meta page fail. The ledger then ends with ErrUnknownState.
func (s *scenario) failMetaSync() {
	var meta bool
	s.disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Write && op.Offset < 2*4096 {
			meta = true
		}
		if meta && op.Kind == disktest.Datasync {
			return syscall.EIO
		}
		return 0
	})
	if _, err := s.l.Append(s.t.Context(), note("is it there?")); !errors.Is(err, ledger.ErrUnknownState) {
		s.t.Errorf("the fsync of a meta page has failed: %v", err)
	}
	s.disk.Fail(nil)
}

// admissions makes n concurrent admissions, which share few transactions. About two thirds get an
// outcome, half of these with a receipt.
func (s *scenario) admissions(n int) {
	epoch, _, _ := s.l.Head()
	var wg sync.WaitGroup
	for range n {
		var a ledger.Admission
		for i := range a.Nonce {
			a.Nonce[i] = byte(s.random.Uint32())
		}
		a.Scope, a.Digest, a.KeyVersion = ledger.KeyScope("payments"), a.Nonce, 1
		a.ExpiresAt = s.wall.Unix() + int64(s.random.IntN(3))*3600
		settled, paid := s.random.IntN(3) > 0, s.random.IntN(2) > 0
		wg.Go(func() {
			text := fmt.Sprintf("admitted %x", a.Nonce[:4])
			var total int64
			a.Counts = countIn(ledger.Count{Series: "payments", Add: big.NewInt(3)})
			a.Decide = func(used []ledger.Used) ([]byte, error) {
				total = used[0][len(ledger.Windows)-1].Int64()
				return []byte(text), nil
			}
			r, err := s.l.Admit(s.t.Context(), a, func(ledger.Verdict) []byte { return []byte(text) })
			s.must(err)
			s.mu.Lock()
			s.totals = append(s.totals, countedTotal{s.disk.Mark(), total})
			s.mu.Unlock()
			s.expect("decision "+text, func(l *ledger.Ledger) error {
				d, err := l.Decision(r.Event)
				if err == nil && string(d.Record) != text {
					err = fmt.Errorf("it is %q", d.Record)
				}
				return err
			})
			spent := s.expect("nonce "+text, func(l *ledger.Ledger) error {
				found, err := l.Spent(s.t.Context(), a.Scope, a.Nonce)
				if err == nil && found.Event != r.Event {
					err = fmt.Errorf("it was spent by event %d", found.Event)
				}
				return err
			})
			event := s.expect("event "+text, func(l *ledger.Ledger) error { return isEvent(l, r.Event, text) })
			s.mu.Lock()
			s.ofNonces, s.ofEpoch[epoch] = append(s.ofNonces, spent), append(s.ofEpoch[epoch], event)
			s.mu.Unlock()
			if !settled {
				return
			}
			signature := bytes.Repeat(a.Nonce[:1], 64)
			var receipt *ledger.Receipt
			if paid {
				id := ledger.ReceiptID(a.Nonce[:16])
				receipt = &ledger.Receipt{ID: id, TimeMS: s.wall.UnixMilli(), Event: r.Event}
			}
			s.must(s.l.Settle(s.t.Context(), r, signature, note("settled"), receipt))
			_, err = s.l.Append(s.t.Context(), note("after it"))
			s.must(err)
			outcome := s.expect("outcome of "+text, func(l *ledger.Ledger) error {
				found, err := l.Spent(s.t.Context(), a.Scope, a.Nonce)
				if err == nil && !bytes.Equal(found.Signature, signature) {
					err = fmt.Errorf("the signature is %x", found.Signature)
				}
				return err
			})
			s.mu.Lock()
			s.ofNonces = append(s.ofNonces, outcome)
			s.mu.Unlock()
			if paid {
				s.expect("receipt of "+text, func(l *ledger.Ledger) error {
					_, err := l.Receipt(receipt.ID)
					return err
				})
			}
		})
	}
	wg.Wait()
}

// isEvent returns an error unless an event has a text.
func isEvent(l *ledger.Ledger, index uint64, text string) (err error) {
	err = errors.New("it is missing")
	if failed := l.Events(index, func(found uint64, b []byte) bool {
		if found == index && string(b) == text {
			err = nil
		} else {
			err = fmt.Errorf("it is %q at %d", b, found)
		}
		return false
	}); failed != nil {
		return failed
	}
	return err
}

// checkpoint publishes a checkpoint of the present epoch.
func (s *scenario) checkpoint() {
	epoch, _, _ := s.l.Head()
	s.checkpointOf(epoch)
}

// checkpointOf signs and publishes a checkpoint of an epoch.
func (s *scenario) checkpointOf(epoch uint32) {
	e, err := s.l.Epoch(epoch)
	s.must(err)
	c := audit.Checkpoint{Epoch: epoch, Size: e.Size, Root: audit.Hash(append(e.Root, make([]byte, 32-len(e.Root))...))}
	if e.Ended == 0 {
		_, _, tree := s.l.Head()
		c.Size = tree.Size
		c.Root, err = tree.Root()
		s.must(err)
	}
	text, err := s.log.Sign(c, func(m []byte) ([]byte, error) { return ed25519.Sign(s.private, m), nil })
	s.must(err)
	s.must(s.l.SetCheckpoint(s.t.Context(), epoch, c.Size, text))
	s.expect(fmt.Sprintf("the checkpoint of epoch %d", epoch), func(l *ledger.Ledger) error {
		e, err := l.Epoch(epoch)
		if err == nil && e.Signed < c.Size {
			err = fmt.Errorf("the newest is of %d events", e.Signed)
		}
		return err
	})
	tree := s.expect(fmt.Sprintf("the tree of %d events of epoch %d", c.Size, epoch), func(l *ledger.Ledger) error {
		return l.Hashes(epoch, func(r audit.Reader) error {
			tree, err := audit.LoadTree(c.Size, r)
			if err != nil {
				return err
			}
			if root, err := tree.Root(); err != nil || root != c.Root {
				return fmt.Errorf("its root is %v, %v, the published root is %v", root, err, c.Root)
			}
			return nil
		})
	})
	s.ofEpoch[epoch] = append(s.ofEpoch[epoch], tree)
}

// records writes a record of a key.
func (s *scenario) records(round int) {
	name := fmt.Sprint("key ", round)
	s.must(s.l.Update(s.t.Context(), func(tx *ledger.Tx) error {
		return errors.Join(tx.Put(ledger.Keys, name, []byte("x")), tx.Append(note("made")))
	}))
	s.expect(name, func(l *ledger.Ledger) error {
		found := errors.New("it is missing")
		return errors.Join(l.All(ledger.Keys, func(k string, _ []byte) error {
			if k == name {
				found = nil
			}
			return nil
		}), found)
	})
}

// expire moves the clock forward until all nonces so far have expired.
func (s *scenario) expire() {
	mark := s.disk.Mark()
	for _, f := range s.ofNonces {
		f.until = mark
	}
	s.ofNonces = nil
	s.wall = s.wall.Add(48 * time.Hour)
	s.must(s.l.AcceptTime(s.t.Context(), note("later")))
}

// drop drops an epoch and sweeps until its records are removed.
func (s *scenario) drop(epoch uint32) {
	mark := s.disk.Mark()
	for _, f := range s.ofEpoch[epoch] {
		f.until = mark
	}
	s.must(s.l.Drop(s.t.Context(), epoch, note("dropped")))
	s.expect(fmt.Sprintf("that epoch %d was dropped", epoch), func(l *ledger.Ledger) error {
		if err := l.Hashes(epoch, func(audit.Reader) error { return nil }); !errors.Is(err, ledger.ErrDropped) {
			return fmt.Errorf("its hashes can be read: %v", err)
		}
		return nil
	})
	for more := true; more; {
		var err error
		more, err = s.l.Sweep(s.t.Context(), 0, 0)
		s.must(err)
	}
}

// judge checks a disk that a power cut at the mark at could leave: the ledger opens, all facts
// hold, and an admission works.
func (s *scenario) judge(dir string, at int) error {
	path := filepath.Join(dir, "ledger.db")
	err := ledger.Check(path, s.o, nil)
	if errors.Is(err, ledger.ErrMissing) && at < s.facts[0].from {
		return nil
	} else if err != nil {
		return err
	}
	l, err := ledger.Open(path, s.o) // without a replica: it is read only, thousands of times
	if err != nil {
		return err
	}
	defer l.Close()
	for _, f := range s.facts {
		if f.from > at || f.until != 0 && f.until <= at {
			continue
		}
		if err := f.holds(l); err != nil {
			return fmt.Errorf("%s: %w", f.what, err)
		}
	}
	// The series has at least the published total, and at most the sum of all admissions.
	var least, has int64
	for _, c := range s.totals {
		if c.from <= at {
			least = max(least, c.total)
		}
	}
	a := ledger.Admission{Scope: "k", ExpiresAt: s.wall.Unix() + 3600}
	a.Counts = countIn(ledger.Count{Series: "payments", Add: new(big.Int)})
	a.Decide = func(used []ledger.Used) ([]byte, error) {
		has = used[0][len(ledger.Windows)-1].Int64()
		return nil, nil
	}
	if _, err := l.Admit(s.t.Context(), a, event); err != nil {
		return fmt.Errorf("the ledger does not admit: %w", err)
	}
	if has < least || has%3 != 0 || has > 3*int64(len(s.totals)) {
		return fmt.Errorf("the series has %d, want at least %d", has, least)
	}
	return nil
}

// searchOptions returns the number of disks to judge: CRASH_STATES, or 4,000 by default.
func searchOptions(t *testing.T, r disktest.Record) disktest.Options {
	total := 4000
	if v := os.Getenv("CRASH_STATES"); v != "" {
		var err error
		if total, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	return disktest.Options{Total: total, States: 2*total/len(r.Ops) + 1}
}

// TestPowerCuts simulates a power cut at each moment of a scenario, and judges the disks that the
// cut could leave. All promises to callers hold: no spent nonce is fresh again, and the tree agrees
// with each published checkpoint.
func TestPowerCuts(t *testing.T) {
	defer ledger.SmallReserve()()
	s := runScenario(t, "")
	s.disk.Unmount()
	r := disktest.Explore(t, s.disk.Record(), searchOptions(t, s.disk.Record()), s.judge)
	t.Logf("explored %d states, %d violations", r.States, len(r.Violations))
	if len(s.facts) < 100 || r.States < 1000 {
		t.Errorf("%d facts, %d states: want at least 100 and 1000", len(s.facts), r.States)
	}
}

// TestPowerCutsFindALostSync leaves out one kind of fsync at a time. The search of TestPowerCuts
// finds a violation for each kind.
func TestPowerCutsFindALostSync(t *testing.T) {
	defer ledger.SmallReserve()()
	for _, kind := range []string{"commit", "file", "folder", "meta"} {
		t.Run(kind, func(t *testing.T) {
			restore := ledger.SkipSync(kind)
			s := runScenario(t, kind)
			restore()
			s.disk.Unmount()
			r := disktest.Search(t, s.disk.Record(), searchOptions(t, s.disk.Record()), s.judge)
			if len(r.Violations) == 0 {
				t.Errorf("%d states, and nothing was found", r.States)
			}
		})
	}
}
