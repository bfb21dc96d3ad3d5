// Package ledgertest opens ledgers for tests, each with a replica. The replica gets the encoded
// lists of writes only. When the ledger is closed, the buckets of ledger and replica are compared.
// Then the replica is opened as a ledger, and the memory of both is compared.
package ledgertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"countersign/internal/ledger"
	"countersign/internal/scantest"

	bolt "go.etcd.io/bbolt"
)

// Open opens a ledger as ledger.Open does. The test fails if the replica differs from the ledger
// when the ledger is closed.
func Open(t testing.TB, path string, o ledger.Options) (*ledger.Ledger, error) {
	t.Helper()
	f := &follower{t: t, options: o, dir: t.TempDir()}
	watched := o
	watched.Replicate = f.take
	if o.MarginOf != nil { // read once: the replica must have the margin from the opening of the ledger
		watched.MarginOf = func(v ledger.View) (margin time.Duration, err error) {
			margin, err = o.MarginOf(v)
			f.options.MarginOf = func(ledger.View) (time.Duration, error) { return margin, err }
			return margin, err
		}
	}
	l, err := ledger.Open(path, watched)
	if err != nil {
		return nil, err
	}
	if err := write(l, f.path()); err != nil {
		t.Fatal(err)
	}
	if f.replica, err = ledger.OpenReplica(f.path()); err != nil {
		t.Fatal(err)
	}
	f.l = l
	return l, nil
}

// write writes a snapshot of a ledger to a file.
func write(l *ledger.Ledger, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := l.Snapshot(f); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// follower sends the lists to a replica, and compares ledger and replica once.
type follower struct {
	t       testing.TB
	options ledger.Options
	l       *ledger.Ledger
	dir     string

	mu      sync.Mutex
	replica *ledger.Replica // nil after the comparison
	lists   int             // number of lists so far
}

func (f *follower) path() string { return filepath.Join(f.dir, "replica.db") }

// take applies a committed list to the replica. A nil list means that the ledger is being closed.
func (f *follower) take(list []byte) {
	if list == nil {
		f.end()
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lists++
	if f.replica == nil {
		f.t.Error("the ledger writes after its end")
	} else if err := f.replica.Apply(list); err != nil {
		f.t.Errorf("list %d: %v", f.lists, err)
	}
}

// end compares ledger and replica. A ledger with an unknown state is not compared: its disk may be
// one list ahead.
func (f *follower) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.replica == nil {
		return
	}
	if err := f.replica.Close(); err != nil {
		f.t.Error(err)
	}
	f.replica = nil
	scantest.SawLedger(f.path())
	select {
	case <-f.l.Failed():
		return
	default:
	}
	if err := f.compare(); err != nil {
		f.t.Errorf("the replica differs after %d lists: %v", f.lists, err)
	}
}

// compare compares the buckets, and then the memory of the ledger and of the replica as a ledger.
func (f *follower) compare() error {
	original := filepath.Join(f.dir, "original.db")
	if err := write(f.l, original); errors.Is(err, fs.ErrClosed) {
		return nil // the test has closed the ledger's file, to break the ledger
	} else if err != nil {
		return err
	}
	if err := Equal(original, f.path()); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	now := f.l.Time()
	want, err := f.l.Digest(ctx, now)
	if err != nil {
		return err
	}
	took, err := ledger.Open(f.path(), f.options)
	if err != nil {
		return fmt.Errorf("the replica can't take over: %w", err)
	}
	defer took.Close()
	if got, err := took.Digest(ctx, now); err != nil || got != want {
		return fmt.Errorf("its memory differs: %s, want %s, %w", got, want, err)
	}
	return nil
}

// Equal returns an error that names the first difference between the buckets of two ledger files.
func Equal(path, other string) error {
	x, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return err
	}
	defer x.Close()
	y, err := bolt.Open(other, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return err
	}
	defer y.Close()
	return x.View(func(x *bolt.Tx) error {
		return y.View(func(y *bolt.Tx) error { return equal("", x.Cursor(), y.Cursor(), x.Bucket, y.Bucket) })
	})
}

type buckets = func(name []byte) *bolt.Bucket

// equal compares the records of two buckets, and the buckets inside them, in order.
func equal(path string, x, y *bolt.Cursor, inX, inY buckets) error {
	k, v := x.First()
	other, w := y.First()
	for ; k != nil || other != nil; k, v = x.Next() {
		if !bytes.Equal(k, other) || !bytes.Equal(v, w) || (v == nil) != (w == nil) {
			return fmt.Errorf("%s: %x is %x, the replica has %x: %x", path, k, v, other, w)
		}
		if v == nil {
			x, y := inX(k), inY(k)
			if err := equal(path+"/"+string(k), x.Cursor(), y.Cursor(), x.Bucket, y.Bucket); err != nil {
				return err
			}
		}
		other, w = y.Next()
	}
	return nil
}
