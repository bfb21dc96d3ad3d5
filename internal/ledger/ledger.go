// Package ledger is the appliance's durable memory: spent nonces, admissions and their outcomes, the
// events of the audit log with the hashes of their tree, receipts, keys and peers, in one bbolt file.
// Begin reading at Admit, then at transact.
//
// The promises:
//
//   - When Admit, Append or Update returns without an error, its writes are on disk (fsync done) and
//     stay there through a crash or a power cut.
//   - A nonce is fresh once in its scope, whatever process is killed and whenever, until its own expiry
//     and the margin after it have passed by the ledger's time. The system's clock can't shorten that:
//     see clock.
//   - A transaction that could not be written leaves nothing behind: ErrDisk, and the same request may
//     be made again. When the ledger does not know whether a transaction was written, it refuses
//     everything with ErrUnknownState and closes Failed. The process must end; opening the file again
//     is the recovery.
//   - The hashes of the tree are in the transaction of their events.
//   - Memory follows the disk: see Follow.
//
// One goroutine writes. It gathers the requests that wait into one transaction (group commit), so that
// callers share an fsync; a lone request waits for no other. The result of a transaction is a list of
// writes: see Writes.
package ledger

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"countersign/audit"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// format is the version of the file's layout. A ledger with a higher one belongs to a newer program.
const format = 4

// At opening.
var (
	ErrMissing = errors.New("there is no ledger here")
	ErrExists  = errors.New("there is a ledger here already")
	ErrInUse   = errors.New("another process uses this ledger")
	ErrFormat  = errors.New("written by another version of countersign")
	ErrCorrupt = errors.New("the file is damaged or is not a ledger")
)

// At use.
var (
	ErrClosed       = errors.New("ledger: closed")
	ErrUnknownState = errors.New("ledger: a commit failed and the state on disk is unknown")
	ErrDisk         = errors.New("ledger: the disk does not take what is to be written; nothing of it was kept")
	ErrClock        = errors.New("ledger: the clock is behind the ledger's time")
	ErrTooMany      = errors.New("ledger: too many nonces are alive")
	ErrNotFound     = errors.New("ledger: no such entry")
	ErrDropped      = errors.New("ledger: it was dropped by retention")
	ErrBusy         = errors.New("ledger: a copy of the file is being made")
)

// Seams for tests that break the disk.
var (
	openFile = os.OpenFile
	noSync   = func(what string) bool { return false }
)

// The sizes of the file and of its mapping into memory.
const (
	// mapSize is the address space that the file is mapped into, 64 GiB. While a file fits, bbolt never
	// maps it anew, for which it would wait for all readers: a snapshot that takes minutes would stop
	// the writer. Only pages that are used take memory.
	mapSize = 64 << 30
	// growBy is how much the file grows at once, in bytes.
	growBy = 1 << 20
)

// Options say how long things are kept and which clock is trusted. The zero value has the defaults.
type Options struct {
	Margin         time.Duration // that a nonce is kept after its own expiry. Default: 24 h
	MaxLifetime    time.Duration // of what is admitted. Default: 168 h. It bounds how fast a clock may be followed
	MaxNonces      int           // that may be alive. Default: 20,000,000, for which some 1 GiB of memory is needed
	ClockTolerance time.Duration // how far the clock may be behind the ledger's time. Default: 2 min

	// MarginOf, if set, reads the margin out of the ledger's records at opening, in place of Margin.
	MarginOf func(View) (time.Duration, error)

	// Replicate, if set, gets each list of writes that was made durable, in order and encoded (see
	// Writes.Encode), before the writer decides anything else: for a Replica. Close calls it
	// with nil when the last list is out and the file is still open.
	Replicate func(list []byte)

	Wall    func() time.Time     // the system's clock; default: time.Now
	Elapsed func() time.Duration // a clock that nobody sets; default: the system's monotonic one
}

func (o *Options) fill() {
	set := func(d *time.Duration, to time.Duration) {
		if *d == 0 {
			*d = to
		}
	}
	set(&o.Margin, 24*time.Hour)
	set(&o.MaxLifetime, 7*24*time.Hour)
	set(&o.ClockTolerance, 2*time.Minute)
	if o.MaxNonces == 0 {
		o.MaxNonces = 20_000_000
	}
	wall := o.Wall
	if wall == nil {
		wall = time.Now
	}
	// Without the monotonic reading, by which Go would compare two times and not see that the system's
	// clock was set.
	o.Wall = func() time.Time { return wall().Round(0) }
	if o.Elapsed == nil {
		begin := time.Now()
		o.Elapsed = func() time.Duration { return time.Since(begin) }
	}
}

// Ledger is safe for concurrent use.
type Ledger struct {
	path      string
	options   Options
	clock     clock
	requests  chan *request
	stopping  chan struct{} // closed by Close: no more requests
	done      chan struct{} // closed when the writer has ended
	failed    chan struct{} // closed at the first commit whose result is unknown
	stop      sync.Once
	ended     sync.Once
	suspended atomic.Pointer[error]    // why there are no admissions now
	admitted  atomic.Uint64            // since the ledger was opened
	trouble   atomic.Pointer[error]    // why the last transaction was not written
	shown     atomic.Pointer[logState] // the log as it is on disk
	swept     []byte                   // Sweep's own: how far it has come with idle series

	// copying is read-locked while a snapshot is written, and write-locked while compaction replaces
	// the file: a snapshot may take minutes, which the writer must never wait for.
	copying sync.RWMutex

	mu sync.RWMutex // write-locked to replace db
	db *bolt.DB

	// The writer's own.
	log       logState
	nonces    nonces
	reserve   reserve
	backlog   []*request // outcomes that could not be written yet
	followers []*follower
}

// Create makes an empty ledger at path. The file is built under a temporary name, fsynced and
// renamed, and the folder is fsynced: after a crash there is a whole ledger or none. An existing file
// is never touched.
func Create(path string, o Options) (err error) {
	defer wrap(&err, "create")
	o.fill()
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
	if err := build(temp, o.Wall()); err != nil {
		return err
	}
	if err := moveInto(temp, path); err != nil {
		return err
	}
	return syncPath(filepath.Dir(path), "folder")
}

// build makes the file with its first event.
func build(path string, now time.Time) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.Update(func(tx *bolt.Tx) error {
		if err := makeRoots(tx); err != nil {
			return err
		}
		t := &txn{tx: tx, now: now}
		if err := t.bucket(bucketMeta).put(keyFormat, binary.BigEndian.AppendUint32(nil, format)); err != nil {
			return err
		}
		if err := t.beginEpoch(0, audit.Daemon(), nil); err != nil {
			return err
		}
		return t.finish()
	})
}

func makeRoots(tx *bolt.Tx) error {
	for _, b := range buckets {
		if _, err := tx.CreateBucket(b.name); err != nil {
			return err
		}
	}
	return nil
}

// moveInto gives a closed file its name. After a crash either this file or the one that had the name
// before is there, whole. Which of them is settled once the folder is synced.
func moveInto(temp, path string) error {
	if err := syncPath(temp, "file"); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

func syncPath(path, what string) error {
	if noSync(what) {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Open opens the ledger at path and takes the file's lock. It looks at everything that a sound ledger
// has at its edges: see checkPages, checkLayout, loadLog and nonces.load. Check looks at all the rest.
func Open(path string, o Options) (l *Ledger, err error) {
	defer wrap(&err, "open")
	o.fill()
	db, err := openBolt(path)
	if err != nil {
		return nil, err
	}
	l = &Ledger{
		path: path, options: o, db: db, requests: make(chan *request, 4*maxBatch),
		stopping: make(chan struct{}), done: make(chan struct{}), failed: make(chan struct{}),
	}
	if err := guard(l.load); err != nil {
		db.Close()
		return nil, err
	}
	os.Remove(path + compacted) // left by a crash; it takes room
	l.reserve = reserve{path: path + ".reserve"}
	if err := l.reserve.take(); err != nil {
		l.troubled(err)
	}
	go l.write()
	return l, nil
}

// load reads what the writer keeps in memory.
func (l *Ledger) load() error {
	err := l.db.View(func(tx *bolt.Tx) error {
		if err := checkLayout(tx); err != nil {
			return err
		}
		v := root(tx, bucketMeta).Get(keyTime)
		if len(v) != 8 {
			return fmt.Errorf("%w: it has no time", ErrCorrupt)
		}
		var err error
		if l.options.MarginOf != nil {
			if l.options.Margin, err = l.options.MarginOf(View{tx}); err != nil {
				return err
			}
		}
		l.clock.start(l.options, time.Unix(0, int64(binary.BigEndian.Uint64(v))))
		l.log, err = loadLog(tx)
		return err
	})
	if err != nil {
		return err
	}
	l.shown.Store(new(l.log))
	l.nonces.margin = l.options.Margin
	return l.nonces.load(l.db, l.clock.time(), l.log.next)
}

// guard runs a function that reads a file that may be damaged. bbolt answers damage with a panic, and
// with a memory fault where the file is shorter than it says: both become ErrCorrupt.
func guard(read func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrCorrupt, r)
		}
	}()
	return read()
}

func openBolt(path string) (db *bolt.DB, err error) {
	if st, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil, ErrMissing
	} else if err != nil {
		return nil, err
	} else if st.Size() == 0 {
		return nil, ErrCorrupt // bbolt would make a new database of it
	}
	err = guard(func() (err error) {
		db, err = bolt.Open(path, 0o600, &bolt.Options{
			Timeout:         100 * time.Millisecond,
			FreelistType:    bolt.FreelistMapType,
			OpenFile:        openFile,
			NoSync:          noSync("commit"),
			InitialMmapSize: mapSize,
		})
		var system syscall.Errno
		switch {
		case errors.Is(err, bolterrors.ErrTimeout):
			return ErrInUse
		case errors.As(err, &system), err == nil:
			return err
		}
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	})
	if err != nil {
		return nil, err
	}
	db.AllocSize = growBy
	if err := guard(func() error { return settlePages(path, db) }); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// settlePages checks the pages of a file that was opened, and sees that what counts is on disk.
func settlePages(path string, db *bolt.DB) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := checkPages(f, db); err != nil {
		return err
	}
	return rewriteMeta(f, int64(db.Info().PageSize))
}

// rewriteMeta writes the two pages that say what counts once more, as they are, and syncs. Where the
// fsync of such a page has failed before, the system may take the page for written and never write
// it, and everything built on it would not count after a power cut.
func rewriteMeta(f *os.File, pageSize int64) error {
	if noSync("meta") {
		return nil
	}
	for _, at := range []int64{0, pageSize} { // one at a time: the other one is whole
		page := make([]byte, pageSize)
		if _, err := f.ReadAt(page, at); err != nil {
			return err
		}
		if _, err := f.WriteAt(page, at); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

func checkLayout(tx *bolt.Tx) error {
	meta := root(tx, bucketMeta)
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
		return fmt.Errorf("%w: its format is %d, of a newer version, and this program knows %d", ErrFormat, f, format)
	} else if f < format {
		return fmt.Errorf("%w: its format is %d, of an older version, and this program knows %d", ErrFormat, f, format)
	}
	for number := range buckets {
		b := root(tx, byte(number))
		if b == nil {
			return fmt.Errorf("%w: its bucket %s is missing", ErrCorrupt, buckets[number].name)
		}
		b.Cursor().Last() // walks one path from the root to a leaf
	}
	return nil
}

// Close finishes what was handed in and closes the file.
func (l *Ledger) Close() error {
	l.stop.Do(func() { close(l.stopping) })
	<-l.done
	l.ended.Do(func() {
		if l.options.Replicate != nil {
			l.options.Replicate(nil)
		}
	})
	return l.db.Close()
}

// Suspend makes Admit refuse with err, until Suspend is called with nil. Everything else goes on.
func (l *Ledger) Suspend(err error) {
	if err == nil {
		l.suspended.Store(nil)
		return
	}
	l.suspended.Store(&err)
}

// Admitted is the number of admissions since the ledger was opened.
func (l *Ledger) Admitted() uint64 { return l.admitted.Load() }

// Failed is closed when the state on disk is unknown: the process must end.
func (l *Ledger) Failed() <-chan struct{} { return l.failed }

// Trouble says why the last transaction was not written, or nil. It wraps ErrDisk.
func (l *Ledger) Trouble() error {
	if err := l.trouble.Load(); err != nil {
		return *err
	}
	return nil
}

func (l *Ledger) troubled(err error) {
	if err == nil {
		l.trouble.Store(nil)
	} else {
		err = fmt.Errorf("%w: %w", ErrDisk, err)
		l.trouble.Store(&err)
	}
}

// Alive returns when the writer has come round to this request. Alive writes nothing, except to a
// disk that was in trouble, which it tries again. A disk that is in trouble still is not its error,
// since the writer is alive.
func (l *Ledger) Alive(ctx context.Context) error {
	err := l.submit(ctx, &request{done: make(chan error, 1), apply: func(t *txn) error {
		t.wrote = t.wrote || l.trouble.Load() != nil
		return nil
	}})
	if errors.Is(err, ErrDisk) {
		return nil
	}
	return err
}

// view reads what is on disk.
func (l *Ledger) view(read func(*bolt.Tx) error) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	err := l.db.View(read)
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	return err
}

func wrap(err *error, doing string) {
	if *err != nil {
		*err = fmt.Errorf("ledger: %s: %w", doing, *err)
	}
}
