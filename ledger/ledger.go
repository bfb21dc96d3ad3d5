// Package ledger is the appliance's memory: spent nonces, admissions and their outcomes, the events of the audit log,
// keys and peers, in one bbolt file. Begin reading at Admit.
//
// What is promised:
//
//   - When Admit, Append or Update returns without an error, what it wrote is on disk (fsync done) and will be there
//     after a crash or a power cut.
//   - A nonce is fresh once in its scope, whatever is killed and whenever.
//   - After a commit that failed, nobody knows what is on disk. The ledger then refuses everything with ErrUnknownState
//     and closes Failed; the process must end, and opening the file again is the recovery.
//
// One goroutine writes. It gathers the requests that wait into one transaction (group commit), so that callers share an
// fsync; a lone request waits for nobody.
package ledger

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// format is the version of the file's layout. A ledger with a higher one belongs to a newer program.
const format = 1

// maxBatch bounds the requests in one transaction, and with it the time that a commit takes.
const maxBatch = 512

// At opening.
var (
	ErrMissing = errors.New("there is no ledger here")
	ErrExists  = errors.New("there is a ledger here already")
	ErrInUse   = errors.New("another process uses this ledger")
	ErrFormat  = errors.New("written by a newer version of countersign")
	ErrCorrupt = errors.New("the file is damaged or is not a ledger")
)

// At use.
var (
	ErrClosed       = errors.New("ledger: closed")
	ErrUnknownState = errors.New("ledger: a commit failed and the state on disk is unknown")
	ErrNotFound     = errors.New("ledger: no such entry")
)

// openFile is a seam for tests that break the disk.
var openFile = os.OpenFile

var (
	bucketMeta   = []byte("meta")
	bucketNonces = []byte("nonces")
	bucketEvents = []byte("events")
	keyFormat    = []byte("format")
)

// Table is a named set of records that managing the appliance needs; their bytes belong to the caller.
type Table string

const (
	Keys  Table = "keys"
	Peers Table = "peers"
	Meta  Table = "meta" // what is about the ledger itself; its format is there too
)

// Ledger is safe for concurrent use.
type Ledger struct {
	db        *bolt.DB
	requests  chan *request
	stopping  chan struct{} // closed by Close: no more requests
	done      chan struct{} // closed when the writer has ended
	failed    chan struct{} // closed at the first failed commit
	stop      sync.Once
	suspended atomic.Pointer[error] // why there are no admissions now
	admitted  atomic.Uint64         // since it was opened
}

// request is work for the writer: apply, unless it is nil, runs inside a transaction that others share, or, where alone is
// set, in one of its own that an error rolls back. done, where somebody waits, gets the result of the commit.
type request struct {
	apply func(*bolt.Tx) error
	alone bool
	done  chan error
}

// Create makes an empty ledger at path. It is built under a temporary name, fsynced, renamed, and the folder is fsynced,
// so that after a crash there is a whole ledger or none. An existing file is never touched.
func Create(path string) (err error) {
	defer wrap(&err, "create")
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	// The lock keeps two creators from replacing each other's work between look and rename.
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return ErrInUse
	}
	if _, err := os.Lstat(path); err == nil {
		return ErrExists
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := build(temp); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return dir.Sync()
}

func build(path string) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second})
	if err != nil {
		return err
	}
	defer db.Close()
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketMeta, bucketNonces, bucketEvents, []byte(Keys), []byte(Peers)} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketMeta).Put(keyFormat, binary.BigEndian.AppendUint32(nil, format))
	})
	if err != nil {
		return err
	}
	return db.Sync() // bbolt's commit uses fdatasync; this is the fsync before the rename
}

// Open opens the ledger at path and takes the file's lock.
func Open(path string) (l *Ledger, err error) {
	defer wrap(&err, "open")
	if st, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil, ErrMissing
	} else if err != nil {
		return nil, err
	} else if st.Size() == 0 {
		return nil, ErrCorrupt // bbolt would make a new database of it
	}
	db, err := openBolt(path)
	if err != nil {
		return nil, err
	}
	l = &Ledger{
		db: db, requests: make(chan *request, 4*maxBatch),
		stopping: make(chan struct{}), done: make(chan struct{}), failed: make(chan struct{}),
	}
	go l.write()
	return l, nil
}

// openBolt opens the file and looks at everything that a sound ledger has. bbolt answers damage with a panic, and with a
// memory fault where the file is shorter than it says: both become ErrCorrupt.
func openBolt(path string) (db *bolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			db, err = nil, fmt.Errorf("%w: %v", ErrCorrupt, r)
		}
	}()
	db, err = bolt.Open(path, 0o600, &bolt.Options{
		Timeout:      100 * time.Millisecond,
		FreelistType: bolt.FreelistMapType,
		OpenFile:     openFile,
	})
	var system syscall.Errno
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, ErrInUse
	case errors.As(err, &system):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if err := db.View(checkLayout); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

func checkLayout(tx *bolt.Tx) error {
	meta := tx.Bucket(bucketMeta)
	if meta == nil {
		return fmt.Errorf("%w: it has no format", ErrCorrupt)
	}
	v := meta.Get(keyFormat)
	if len(v) != 4 {
		return fmt.Errorf("%w: it has no format", ErrCorrupt)
	}
	if f := binary.BigEndian.Uint32(v); f == 0 {
		return fmt.Errorf("%w: its format is 0", ErrCorrupt)
	} else if f > format {
		return fmt.Errorf("%w: its format is %d, this program knows %d", ErrFormat, f, format)
	}
	for _, name := range [][]byte{bucketNonces, bucketEvents, []byte(Keys), []byte(Peers)} {
		b := tx.Bucket(name)
		if b == nil {
			return fmt.Errorf("%w: its bucket %s is missing", ErrCorrupt, name)
		}
		b.Cursor().Last() // walks one path from the root to a leaf
	}
	last, _ := tx.Bucket(bucketEvents).Cursor().Last()
	if n := tx.Bucket(bucketEvents).Sequence(); n > 0 && (len(last) != 8 || binary.BigEndian.Uint64(last) != n-1) {
		return fmt.Errorf("%w: %d events were written, the last one found is %x", ErrCorrupt, n, last)
	}
	return nil
}

// Close finishes what was handed in and closes the file.
func (l *Ledger) Close() error {
	l.stop.Do(func() { close(l.stopping) })
	<-l.done
	return l.db.Close()
}

// Suspend makes Admit refuse with err, until it is called with nil. All else goes on.
func (l *Ledger) Suspend(err error) {
	if err == nil {
		l.suspended.Store(nil)
		return
	}
	l.suspended.Store(&err)
}

// Admitted is how many admissions there were since the ledger was opened.
func (l *Ledger) Admitted() uint64 { return l.admitted.Load() }

// Failed is closed when a commit has failed: the process must end.
func (l *Ledger) Failed() <-chan struct{} { return l.failed }

// Alive returns when the writer has come round to this request, without writing anything.
func (l *Ledger) Alive(ctx context.Context) error {
	return l.submit(ctx, &request{done: make(chan error, 1)})
}

// submit hands a request to the writer and waits for its commit, unless nobody wants to know (done is nil). Where ctx
// ends first, the request may still be carried out.
func (l *Ledger) submit(ctx context.Context, r *request) error {
	select {
	case <-l.failed:
		return ErrUnknownState
	case <-l.stopping:
		return ErrClosed
	default:
	}
	select {
	case l.requests <- r:
	case <-l.stopping:
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("ledger: queue: %w", ctx.Err())
	}
	if r.done == nil {
		return nil
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("ledger: waiting for the disk: %w", ctx.Err())
	case <-l.done:
	}
	select { // the writer has ended: it has answered by now, or never will
	case err := <-r.done:
		return err
	default:
		return ErrClosed
	}
}

// write is the one writer.
func (l *Ledger) write() {
	defer close(l.done)
	for {
		select {
		case first := <-l.requests:
			l.serve(first)
		case <-l.stopping:
			for { // what was handed in before
				select {
				case first := <-l.requests:
					l.serve(first)
				default:
					return
				}
			}
		}
	}
}

// serve carries out a request and all that wait behind it, as far as they fit into one transaction.
func (l *Ledger) serve(first *request) {
	batch := []*request{first}
gather:
	for len(batch) < maxBatch && !batch[len(batch)-1].alone {
		select {
		case r := <-l.requests:
			batch = append(batch, r)
		default:
			break gather
		}
	}
	if last := len(batch) - 1; batch[last].alone {
		l.commit(batch[:last])
		l.commit(batch[last:])
	} else {
		l.commit(batch)
	}
}

// commit carries out a batch in one transaction and tells each request how it ended.
func (l *Ledger) commit(batch []*request) {
	if len(batch) == 0 {
		return
	}
	err := l.transact(batch)
	for _, r := range batch {
		if r.done != nil {
			r.done <- err
		}
	}
}

func (l *Ledger) transact(batch []*request) error {
	select {
	case <-l.failed:
		return ErrUnknownState
	default:
	}
	batch = slices.DeleteFunc(slices.Clone(batch), func(r *request) bool { return r.apply == nil })
	if len(batch) == 0 {
		return nil
	}
	tx, err := l.db.Begin(true)
	if err != nil {
		return l.fail(err)
	}
	defer tx.Rollback() // does nothing after a commit
	for _, r := range batch {
		if err := r.apply(tx); err != nil && r.alone {
			return err
		} else if err != nil {
			return l.fail(err) // nothing that shares a transaction may fail but for damage
		}
	}
	if err := tx.Commit(); err != nil {
		return l.fail(err)
	}
	return nil
}

// fail ends the ledger's life. Only the writer calls it, once.
func (l *Ledger) fail(err error) error {
	close(l.failed)
	return fmt.Errorf("%w: %w", ErrUnknownState, err)
}

func wrap(err *error, doing string) {
	if *err != nil {
		*err = fmt.Errorf("ledger: %s: %w", doing, *err)
	}
}
