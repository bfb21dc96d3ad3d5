// Package ledger is the durable storage of the appliance, in one bbolt file: spent nonces,
// admissions and outcomes, the events of the audit log with the hashes of their tree, receipts,
// keys and peers. Begin reading at Admit, then at transact.
//
// The guarantees:
//
//   - When Admit, Append or Update returns without an error, the writes are on disk (fsync done)
//     and survive a crash or a power cut.
//   - A nonce is fresh once in its scope, until the ledger's time has passed the nonce's expiry and
//     the margin. Killed processes and changes of the system's clock do not weaken this guarantee:
//     see clock.
//   - A failed transaction leaves nothing behind: ErrDisk means that the same request may be made
//     again. If the ledger can't tell whether a transaction was written, every request fails with
//     ErrUnknownState and the channel Failed is closed. The process must then end. The recovery is
//     to open the file again.
//   - An event and the hashes of its tree are written in one transaction.
//   - Memory follows the disk: see Follow.
//
// A single goroutine, the writer, executes all requests. The writer combines waiting requests into
// one transaction (group commit), so that callers share an fsync. A lone request does not wait for
// others. The result of a transaction is a list of writes: see Writes.
package ledger

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
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

// Errors of Create and Open.
var (
	ErrMissing = errors.New("there is no ledger here")
	ErrExists  = errors.New("there is a ledger here already")
	ErrInUse   = errors.New("another process uses this ledger")
	ErrFormat  = errors.New("written by another version of countersign")
	ErrOlder   = fmt.Errorf("%w: it has an older format", ErrFormat)
	ErrCorrupt = errors.New("the file is damaged or is not a ledger")
)

// Errors of an open ledger.
var (
	ErrClosed       = errors.New("ledger: closed")
	ErrUnknownState = errors.New("ledger: a commit failed and the state on disk is unknown")
	ErrDisk         = errors.New("ledger: the disk refused the write, and nothing was written")
	ErrClock        = errors.New("ledger: the clock is behind the ledger's time")
	ErrTooMany      = errors.New("ledger: too many nonces are alive")
	ErrShare        = fmt.Errorf("%w in the share of this peer", ErrTooMany)
	ErrVerifying    = fmt.Errorf("%w in the share of verification", ErrTooMany)
	ErrNotFound     = errors.New("ledger: no such entry")
	ErrDropped      = errors.New("ledger: dropped by retention")
	ErrBusy         = errors.New("ledger: a snapshot is being written")
	ErrHeld         = errors.New("ledger: there is a legal hold of this name already")
	ErrTooManyHolds = errors.New("ledger: an epoch has too many legal holds")
	ErrRestored     = errors.New("ledger: a document of before the ledger was restored")
)

// Replaceable for tests, which break the disk and the mapping.
var (
	openFile = os.OpenFile
	noSync   = func(what string) bool { return false }

	// mapSize is the size of the mapping into memory, 64 GiB. A file that fits is never mapped
	// again. For a new mapping bbolt waits for all readers: a snapshot of minutes would stop the
	// writer. The mapping is address space; only used pages take memory. Where the address space is
	// limited (ulimit -v), the mapping has the size of the file.
	mapSize = min(64<<30, math.MaxInt/2) // less on 32-bit machines
)

// growBy is the step by which the file grows: 1 MiB.
const growBy = 1 << 20

// Options are the retention of nonces and the clocks. The zero value has the defaults.
type Options struct {
	Margin         time.Duration // for which a nonce is kept after its expiry. Default: 24 h
	MaxLifetime    time.Duration // of a document; bounds the rate of the ledger's time, see clock. Default: 168 h
	MaxNonces      int           // nonces that have not expired. Default: 20,000,000, with some 1 GiB of memory
	Bounds         Bounds        // of MaxNonces. Default: DefaultBounds
	ClockTolerance time.Duration // by which the clock may be behind the ledger's time. Default: 2 min

	// AsIs refuses a file of an older format with ErrOlder, in place of a migration.
	AsIs bool

	// MarginOf, if set, reads the margin from the ledger's records at opening and replaces Margin.
	MarginOf func(View) (time.Duration, error)

	// Replicate, if set, gets each durable list of writes for a Replica, in order and encoded (see
	// Writes.Encode), before the writer executes the next request. Close calls Replicate with nil
	// after the last list, while the file is still open.
	Replicate func(list []byte)

	// Committed, if set, is told of each transaction that writes: its requests, its time with the
	// decisions, the part of it for the disk, and its error. The writer waits for Committed.
	Committed func(requests int, took, disk time.Duration, err error)

	Wall    func() time.Time     // the system's clock. Default: time.Now
	Elapsed func() time.Duration // a clock that can't be set. Default: the system's monotonic clock
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
	b := DefaultBounds(o.MaxNonces)
	o.Bounds.Peer = cmp.Or(o.Bounds.Peer, b.Peer)
	o.Bounds.Verifying = cmp.Or(o.Bounds.Verifying, b.Verifying)
	o.Bounds.Own = cmp.Or(o.Bounds.Own, b.Own)
	wall := o.Wall
	if wall == nil {
		wall = time.Now
	}
	// Round removes the monotonic reading. With the reading, Go would compare two times by it and
	// miss a change of the system's clock.
	o.Wall = func() time.Time { return wall().Round(0) }
	if o.Elapsed == nil {
		begin := time.Now()
		o.Elapsed = func() time.Duration { return time.Since(begin) }
	}
}

// Ledger is an open ledger. All methods are safe for concurrent use.
type Ledger struct {
	path      string
	options   Options
	clock     clock
	requests  chan *request
	stopping  chan struct{} // closed by Close: new requests are refused
	done      chan struct{} // closed when the writer has ended
	failed    chan struct{} // closed at the first commit whose result is unknown
	stop      sync.Once
	ended     sync.Once
	suspended atomic.Pointer[error]    // reason of Suspend, or nil
	waiting   atomic.Int64             // length of backlog, for readers
	admitted  atomic.Uint64            // since the ledger was opened
	trouble   atomic.Pointer[error]    // why the last transaction was not written, or nil
	published atomic.Pointer[logState] // end of the log on disk, for readers
	swept     []byte                   // belongs to Sweep: key at which the search for idle series goes on

	// copying is read-locked during a snapshot, and write-locked while compaction replaces the
	// file. A snapshot may take minutes, and the writer must never wait for it: db has a lock of
	// its own.
	copying sync.RWMutex

	mu sync.RWMutex // write-locked for a replacement of db
	db *bolt.DB

	// The fields below belong to the writer.
	log       logState
	nonces    nonces
	restored  int64 // Unix seconds: see Restore; 0 without one
	reserve   reserve
	backlog   []*request // outcomes that wait for the disk
	followers []*follower
}

// Create makes an empty ledger at path. Create builds the file under a temporary name, syncs and
// renames the file, and syncs the folder: after a crash there is a complete ledger or none. An
// existing file is never changed.
func Create(path string, o Options) (err error) {
	defer wrap(&err, "create")
	o.fill()
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	// The lock prevents that two processes both see no file and then replace each other's ledger.
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
	if err := syncAndRename(temp, path); err != nil {
		return err
	}
	return syncPath(filepath.Dir(path), "folder")
}

// build creates the file with the first event.
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
		if err := t.bucket(bucketMeta).put(keyFormat, binary.BigEndian.AppendUint32(nil, uint32(Format))); err != nil {
			return err
		}
		if err := t.beginEpoch(0, audit.Daemon(), nil, t.now); err != nil {
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

// syncAndRename syncs a closed file and renames it. After a crash, the name has either this file or
// the file before, complete. The name is durable when the folder is synced.
func syncAndRename(temp, path string) error {
	if err := syncPath(temp, "file"); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// syncPath syncs a file or folder. what is the kind for noSync.
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

// Open opens the ledger at path and locks the file. Open checks a part of the file for damage: see
// checkPages, checkLayout, loadLog and nonces.load. Check reads all of the file. A file of an older
// format is migrated first: see migrate.
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
	if err := guard(func() error {
		if err := migrate(path, db, o.AsIs); err != nil {
			return err
		}
		return l.load()
	}); err != nil {
		db.Close()
		return nil, err
	}
	os.Remove(path + compactSuffix) // a crash may have left the file
	l.reserve = reserve{path: path + ".reserve"}
	if err := l.reserve.acquire(); err != nil {
		l.setTrouble(err)
	}
	go l.write()
	return l, nil
}

// load loads the memory of the writer from the file.
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
		if l.restored, err = restoredAt(root(tx, bucketMeta).Get(keyRestored)); err != nil {
			return err
		}
		l.log, err = loadLog(tx)
		return err
	})
	if err != nil {
		return err
	}
	l.published.Store(new(l.log))
	l.nonces.margin = l.options.Margin
	return l.nonces.load(l.db, l.clock.time(), l.log.next)
}

// guard calls a function that reads a file which may be damaged. bbolt panics on damage, and a file
// that is too short causes a memory fault. Both become ErrCorrupt.
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
		return nil, ErrCorrupt // bbolt would initialize an empty file
	}
	err = guard(func() (err error) {
		options := &bolt.Options{
			Timeout:         100 * time.Millisecond,
			FreelistType:    bolt.FreelistMapType,
			OpenFile:        openFile,
			NoSync:          noSync("commit"),
			InitialMmapSize: mapSize,
		}
		if db, err = bolt.Open(path, 0o600, options); errors.Is(err, syscall.ENOMEM) {
			options.InitialMmapSize = 0
			db, err = bolt.Open(path, 0o600, options)
		}
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
	if err := guard(func() error { return recoverPages(path, db) }); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// recoverPages checks the pages of an opened file and writes the meta pages again.
func recoverPages(path string, db *bolt.DB) error {
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

// rewriteMeta writes bbolt's two meta pages again, unchanged, and syncs. A meta page points to the
// root of a transaction. After a failed fsync of a meta page, the kernel may consider the page
// written and never write it. Later transactions would then be lost in a power cut.
func rewriteMeta(f *os.File, pageSize int64) error {
	if noSync("meta") {
		return nil
	}
	for _, at := range []int64{0, pageSize} { // one at a time: the other page stays intact
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

// checkLayout checks the format, and that each bucket exists.
func checkLayout(tx *bolt.Tx) error {
	if f, err := formatOf(tx); err != nil {
		return err
	} else if f != Format {
		return fmt.Errorf("%w: its format is %d, and this program knows %d", ErrFormat, f, Format)
	}
	for number := range buckets {
		b := root(tx, byte(number))
		if b == nil {
			return fmt.Errorf("%w: its bucket %s is missing", ErrCorrupt, buckets[number].name)
		}
		b.Cursor().Last() // reads one path from the root to a leaf: panics on damage
	}
	return nil
}

// Close executes the queued requests and closes the file.
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

// Suspend makes Admit fail with err until Suspend(nil). Other requests are not affected.
func (l *Ledger) Suspend(err error) {
	if err == nil {
		l.suspended.Store(nil)
		return
	}
	l.suspended.Store(&err)
}

// Admitted returns the number of calls of Admit since the ledger was opened, without suspended
// calls.
func (l *Ledger) Admitted() uint64 { return l.admitted.Load() }

// Failed returns a channel that is closed when the state on disk is unknown. The process must then
// end.
func (l *Ledger) Failed() <-chan struct{} { return l.failed }

// Trouble returns the reason why the last transaction was not written, or nil. The error wraps
// ErrDisk.
func (l *Ledger) Trouble() error {
	if err := l.trouble.Load(); err != nil {
		return *err
	}
	return nil
}

// setTrouble sets the error of Trouble. nil clears the error.
func (l *Ledger) setTrouble(err error) {
	if err == nil {
		l.trouble.Store(nil)
	} else {
		err = fmt.Errorf("%w: %w", ErrDisk, err)
		l.trouble.Store(&err)
	}
}

// Alive returns when the writer has executed an empty request. Alive writes nothing unless the last
// transaction was not written: the disk is then tried again. ErrDisk is no error of Alive, because
// the writer is alive.
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

// view reads the last transaction on disk.
func (l *Ledger) view(read func(*bolt.Tx) error) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	err := l.db.View(read)
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return ErrClosed
	}
	return err
}

// wrap adds the operation to an error.
func wrap(err *error, doing string) {
	if *err != nil {
		*err = fmt.Errorf("ledger: %s: %w", doing, *err)
	}
}
