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

// fact is something that was released: from a mark on, and until another one where retention ends it, it must be on disk.
type fact struct {
	what       string
	from, upto int // upto 0: for ever
	holds      func(*ledger.Ledger) error
}

// story is what a ledger goes through on a disk that is recorded.
type story struct {
	t       *testing.T
	disk    *disktest.Disk
	l       *ledger.Ledger
	o       ledger.Options
	wall    time.Time
	random  *rand.Rand
	private ed25519.PrivateKey
	log     audit.Log

	mu    sync.Mutex
	facts []*fact
	epoch map[uint32][]*fact // what goes with an epoch
	count []counted30        // what a series had at the least
	nonce []*fact            // what goes with the clock
}

// counted30 says what the series "payments" had in 30 days after an admission.
type counted30 struct {
	from  int
	total int64
}

func (s *story) know(what string, holds func(*ledger.Ledger) error) *fact {
	f := &fact{what: what, holds: holds, from: s.disk.Mark()}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.facts = append(s.facts, f)
	return f
}

func (s *story) must(err error) {
	if err != nil {
		s.t.Error(err)
		panic(err)
	}
}

// tell has everything happen that changes the ledger's files.
func tell(t *testing.T, without string) *story {
	s := &story{t: t, disk: disktest.New(t), random: rand.New(rand.NewPCG(1, 2)), wall: time.Unix(1_800_000_000, 0), epoch: map[uint32][]*fact{},
		private: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))}
	begin := s.wall
	// Nobody sets this clock, so that the wall is followed at once.
	s.o = ledger.Options{Wall: func() time.Time { return s.wall }, Elapsed: func() time.Duration { return s.wall.Sub(begin) }}
	var err error
	s.log, err = audit.NewLog(s.private.Public().(ed25519.PublicKey))
	s.must(err)
	path := filepath.Join(s.disk.Dir(), "ledger.db")
	s.must(ledger.Create(path, s.o))
	s.know("the ledger", func(*ledger.Ledger) error { return nil })
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
		s.know(fmt.Sprintf("epoch %d", next), func(l *ledger.Ledger) error {
			if e, _, _ := l.Head(); e < next {
				return fmt.Errorf("the present epoch is %d", e)
			}
			return nil
		})
		s.checkpointOf(next - 1) // its final one
		s.admissions(2)
		s.expire()
		if without != "commit" {
			s.refused(disktest.Datasync, syscall.EIO)
		}
		s.refused(disktest.Write, syscall.ENOSPC)
		s.admissions(2)
		if round == 1 {
			if without != "commit" {
				s.failedSync()
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

// refused has the disk refuse the first operation of a kind: nothing is written, and the ledger goes on. What the system took
// for written may be lost.
func (s *story) refused(kind disktest.Kind, errno syscall.Errno) {
	var once sync.Once
	s.disk.Fail(func(op disktest.Op) (answer syscall.Errno) {
		if op.Kind == kind {
			once.Do(func() { answer = errno })
		}
		return answer
	})
	err := s.l.Update(s.t.Context(), func(tx *ledger.Tx) error { return tx.Append(note("refused")) })
	s.disk.Fail(nil)
	if errno == syscall.ENOSPC && err == nil { // there was a reserve to give up
		return
	}
	if !errors.Is(err, ledger.ErrDisk) {
		s.t.Errorf("the disk has refused: %v", err)
	}
}

// failedSync has the disk refuse the fsync of a page that makes a transaction count: the ledger ends there.
func (s *story) failedSync() {
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
		s.t.Errorf("the fsync of what counts has failed: %v", err)
	}
	s.disk.Fail(nil)
}

// admissions come at once, and so in few transactions; some are settled, some with a receipt.
func (s *story) admissions(n int) {
	epoch, _, _ := s.l.Head()
	var wg sync.WaitGroup
	for range n {
		var a ledger.Admission
		for i := range a.Nonce {
			a.Nonce[i] = byte(s.random.Uint32())
		}
		a.Scope, a.Digest, a.KeyVersion, a.ExpiresAt = ledger.KeyScope("payments"), a.Nonce, 1, s.wall.Unix()+int64(s.random.IntN(3))*3600
		settled, paid := s.random.IntN(3) > 0, s.random.IntN(2) > 0
		wg.Go(func() {
			text := fmt.Sprintf("admitted %x", a.Nonce[:4])
			var total int64
			a.Counts = []ledger.Count{{Series: "payments", Add: big.NewInt(3)}}
			a.Decide = func(used []ledger.Used) ([]byte, error) {
				total = used[0][len(ledger.Windows)-1].Int64()
				return []byte(text), nil
			}
			r, err := s.l.Admit(s.t.Context(), a, func(ledger.Verdict) []byte { return []byte(text) })
			s.must(err)
			s.mu.Lock()
			s.count = append(s.count, counted30{s.disk.Mark(), total})
			s.mu.Unlock()
			s.know("decision "+text, func(l *ledger.Ledger) error {
				d, err := l.Decision(r.Event)
				if err == nil && string(d.Record) != text {
					err = fmt.Errorf("it is %q", d.Record)
				}
				return err
			})
			spent := s.know("nonce "+text, func(l *ledger.Ledger) error {
				found, err := l.Spent(s.t.Context(), a.Scope, a.Nonce)
				if err == nil && found.Event != r.Event {
					err = fmt.Errorf("it was spent by event %d", found.Event)
				}
				return err
			})
			event := s.know("event "+text, func(l *ledger.Ledger) error { return isEvent(l, r.Event, text) })
			s.mu.Lock()
			s.nonce, s.epoch[epoch] = append(s.nonce, spent), append(s.epoch[epoch], event)
			s.mu.Unlock()
			if !settled {
				return
			}
			signature := bytes.Repeat(a.Nonce[:1], 64)
			var receipt *ledger.Receipt
			if paid {
				receipt = &ledger.Receipt{ID: ledger.ReceiptID(a.Nonce[:16]), TimeMS: s.wall.UnixMilli(), Event: r.Event}
			}
			s.must(s.l.Settle(s.t.Context(), r, signature, note("settled"), receipt))
			_, err = s.l.Append(s.t.Context(), note("after it"))
			s.must(err)
			outcome := s.know("outcome of "+text, func(l *ledger.Ledger) error {
				found, err := l.Spent(s.t.Context(), a.Scope, a.Nonce)
				if err == nil && !bytes.Equal(found.Signature, signature) {
					err = fmt.Errorf("the signature is %x", found.Signature)
				}
				return err
			})
			s.mu.Lock()
			s.nonce = append(s.nonce, outcome)
			s.mu.Unlock()
			if paid {
				s.know("receipt of "+text, func(l *ledger.Ledger) error {
					_, err := l.Receipt(receipt.ID)
					return err
				})
			}
		})
	}
	wg.Wait()
}

func isEvent(l *ledger.Ledger, index uint64, text string) (err error) {
	err = fmt.Errorf("it is not there")
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

func (s *story) checkpoint() {
	epoch, _, _ := s.l.Head()
	s.checkpointOf(epoch)
}

// checkpointOf signs a checkpoint and shows it.
func (s *story) checkpointOf(epoch uint32) {
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
	s.know(fmt.Sprintf("the checkpoint of epoch %d", epoch), func(l *ledger.Ledger) error {
		e, err := l.Epoch(epoch)
		if err == nil && e.Signed < c.Size {
			err = fmt.Errorf("the newest is of %d events", e.Signed)
		}
		return err
	})
	tree := s.know(fmt.Sprintf("the tree of %d events of epoch %d", c.Size, epoch), func(l *ledger.Ledger) error {
		return l.Hashes(epoch, func(r audit.Reader) error {
			tree, err := audit.LoadTree(c.Size, r)
			if err != nil {
				return err
			}
			if root, err := tree.Root(); err != nil || root != c.Root {
				return fmt.Errorf("its root is %v, %v, and %v was shown", root, err, c.Root)
			}
			return nil
		})
	})
	s.epoch[epoch] = append(s.epoch[epoch], tree)
}

func (s *story) records(round int) {
	name := fmt.Sprint("key ", round)
	s.must(s.l.Update(s.t.Context(), func(tx *ledger.Tx) error {
		return errors.Join(tx.Put(ledger.Keys, name, []byte("x")), tx.Append(note("made")))
	}))
	s.know(name, func(l *ledger.Ledger) error {
		found := errors.New("it is not there")
		return errors.Join(l.All(ledger.Keys, func(k string, _ []byte) error {
			if k == name {
				found = nil
			}
			return nil
		}), found)
	})
}

// expire lets time go by until the nonces so far have expired.
func (s *story) expire() {
	mark := s.disk.Mark()
	for _, f := range s.nonce {
		f.upto = mark
	}
	s.nonce = nil
	s.wall = s.wall.Add(48 * time.Hour)
	s.must(s.l.AcceptTime(s.t.Context(), note("later")))
}

// drop takes an epoch away, step by step.
func (s *story) drop(epoch uint32) {
	mark := s.disk.Mark()
	for _, f := range s.epoch[epoch] {
		f.upto = mark
	}
	s.must(s.l.Drop(s.t.Context(), epoch, note("dropped")))
	s.know(fmt.Sprintf("that epoch %d was dropped", epoch), func(l *ledger.Ledger) error {
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

// judge opens what a cut has left.
func (s *story) judge(dir string, at int) error {
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
		if f.from > at || f.upto != 0 && f.upto <= at {
			continue
		}
		if err := f.holds(l); err != nil {
			return fmt.Errorf("%s: %w", f.what, err)
		}
	}
	// What was admitted is counted, and nothing is that was never asked for.
	var least, has int64
	for _, c := range s.count {
		if c.from <= at {
			least = max(least, c.total)
		}
	}
	a := ledger.Admission{Scope: "k", ExpiresAt: s.wall.Unix() + 3600, Counts: []ledger.Count{{Series: "payments", Add: new(big.Int)}}}
	a.Decide = func(used []ledger.Used) ([]byte, error) {
		has = used[0][len(ledger.Windows)-1].Int64()
		return nil, nil
	}
	if _, err := l.Admit(s.t.Context(), a, event); err != nil {
		return fmt.Errorf("it does not go on: %w", err)
	}
	if has < least || has%3 != 0 || has > 3*int64(len(s.count)) {
		return fmt.Errorf("it has counted %d, and what was released makes %d at the least", has, least)
	}
	return nil
}

// some says how many disks are judged: 4,000, unless CRASH_STATES says otherwise.
func some(t *testing.T, r disktest.Record) disktest.Options {
	total := 4000
	if v := os.Getenv("CRASH_STATES"); v != "" {
		var err error
		if total, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	return disktest.Options{Total: total, States: 2*total/len(r.Ops) + 1}
}

// TestPowerCuts has the power go at each moment of a ledger's life, and opens every disk that could be left: what was released
// is there, no spent nonce is fresh, and the tree is that of every checkpoint that was shown.
func TestPowerCuts(t *testing.T) {
	defer ledger.SmallReserve()()
	s := tell(t, "")
	s.disk.Unmount()
	r := disktest.Explore(t, s.disk.Record(), some(t, s.disk.Record()), s.judge)
	t.Logf("explored %d states, %d violations", r.States, len(r.Violations))
	if len(s.facts) < 100 || r.States < 1000 {
		t.Errorf("%d facts, %d states: the test has lost its point", len(s.facts), r.States)
	}
}

// TestPowerCutsFindALostSync: the test above can fail. Without any one kind of fsync, it does.
func TestPowerCutsFindALostSync(t *testing.T) {
	defer ledger.SmallReserve()()
	for _, kind := range []string{"commit", "file", "folder", "meta"} {
		t.Run(kind, func(t *testing.T) {
			restore := ledger.SkipSync(kind)
			s := tell(t, kind)
			restore()
			s.disk.Unmount()
			r := disktest.Search(t, s.disk.Record(), some(t, s.disk.Record()), s.judge)
			if len(r.Violations) == 0 {
				t.Errorf("%d states, and nothing was found", r.States)
			}
		})
	}
}
