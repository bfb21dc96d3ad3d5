// Package ledger is the appliance's memory: spent nonces, admissions and their outcomes, the events of the audit log with
// the hashes of their tree, receipts, keys and peers, in one bbolt file. Begin reading at Admit, then at transact.
//
// What is promised:
//
//   - When Admit, Append or Update returns without an error, what it wrote is on disk (fsync done) and will be there
//     after a crash or a power cut.
//   - A nonce is fresh once in its scope, whatever is killed and whenever, until its own expiry and the margin after it have
//     passed by the ledger's time. What the clock does can't shorten that: see clock.
//   - A transaction that could not be written leaves nothing behind: ErrDisk, and the same request may be made again. When
//     it is not known whether it was written, the ledger refuses everything with ErrUnknownState and closes Failed; the
//     process must end, and opening the file again is the recovery.
//   - The hashes of the tree are in the transaction of their events.
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

// maxBatch bounds the requests in one transaction, and with it the time that a commit takes.
const maxBatch = 512

// maxBacklog bounds the outcomes that wait for a disk that takes them. No more are to be expected than there are requests under
// way, since nothing is admitted meanwhile.
const maxBacklog = 64 * maxBatch

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
)

// Seams for tests that break the disk.
var (
	openFile = os.OpenFile
	noSync   = func(what string) bool { return false }
)

// The buckets. Numbers in keys are big-endian.
var (
	bucketMeta      = []byte("meta")     // format, time, and the records of the table Meta
	bucketEvents    = []byte("events")   // a bucket for each segment, u64; in it u64 event -> its bytes
	bucketHashes    = []byte("hashes")   // u32 epoch || u64 chunk -> up to 64 hashes, in the order that Tree.Append makes them
	bucketEpochs    = []byte("epochs")   // u32 epoch -> Epoch in JSON
	bucketNonces    = []byte("nonces")   // a bucket for each u32 hour of expiry || u64 segment; in it u64 event -> spent
	bucketOutcomes  = []byte("outcomes") // the same; in it u64 event of the admission -> signature
	bucketReceipts  = []byte("receipts") // i64 time in ms || id (16) -> Receipt in JSON
	bucketIDs       = []byte("receipt_ids")
	bucketCounters  = []byte("counters")  // running totals: see windows.go
	bucketRisen     = []byte("risen")     // hash of a series (16) -> u64, the last number
	bucketDecisions = []byte("decisions") // u64 event -> i64 time in ms || record
	keyFormat       = []byte("format")
	keyTime         = []byte("time") // i64 Unix nanoseconds
)

func buckets() [][]byte {
	return [][]byte{bucketMeta, bucketEvents, bucketHashes, bucketEpochs, bucketNonces, bucketOutcomes, bucketReceipts, bucketIDs,
		bucketCounters, bucketRisen, bucketDecisions, []byte(Keys), []byte(Lines), []byte(Peers), []byte(Policies), []byte(Operators), []byte(Proposals)}
}

// Table is a named set of records that managing the appliance needs; their bytes belong to the caller.
type Table string

const (
	Keys      Table = "keys"
	Lines     Table = "lines" // of keys
	Peers     Table = "peers"
	Policies  Table = "policies"
	Operators Table = "operators"
	Proposals Table = "proposals"
	Meta      Table = "meta" // what is about the ledger itself; its format and time are there too
)

// Options say how long things are kept and what may be trusted. The zero value has the defaults.
type Options struct {
	Margin         time.Duration // that a nonce is kept after its own expiry. Default: 24 h
	MaxLifetime    time.Duration // of what is admitted. Default: 168 h. It bounds how fast a clock may be followed
	MaxNonces      int           // that may be alive. Default: 20,000,000, for which some 1 GiB of memory is needed
	ClockTolerance time.Duration // how far the clock may be behind the ledger's time. Default: 2 min

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
	// Without the monotonic reading, by which Go would compare two times and not see that the system's clock was set.
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
	suspended atomic.Pointer[error]    // why there are no admissions now
	admitted  atomic.Uint64            // since it was opened
	trouble   atomic.Pointer[error]    // why the last transaction was not written
	shown     atomic.Pointer[logState] // the log as it is on disk
	swept     []byte                   // Sweep's own: how far it has come with idle series

	mu sync.RWMutex // write-locked to replace db
	db *bolt.DB

	// The writer's own.
	log     logState
	nonces  nonces
	reserve reserve
	backlog []*request // outcomes that could not be written yet
}

// request is work for the writer: apply runs inside a transaction that others share, or, where alone is set, in one of its own
// that an error rolls back. It may run again. done, where somebody waits, gets the result of the commit.
type request struct {
	apply func(*txn) error
	alone bool
	done  chan error
}

// Create makes an empty ledger at path. It is built under a temporary name, fsynced, renamed, and the folder is fsynced,
// so that after a crash there is a whole ledger or none. An existing file is never touched.
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
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range buckets() {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		if err := tx.Bucket(bucketMeta).Put(keyFormat, binary.BigEndian.AppendUint32(nil, format)); err != nil {
			return err
		}
		t := &txn{tx: tx, now: now}
		if err := t.beginEpoch(0, audit.Daemon(), map[string]string{}); err != nil {
			return err
		}
		return t.finish()
	})
	return err
}

// moveInto gives a file that was closed its name, so that after a crash either it or what had the name before is there, whole.
// Which of them is settled once the folder is synced.
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

// Open opens the ledger at path and takes the file's lock. It looks at everything that a sound ledger has at its edges:
// see checkPages, checkLayout, loadLog and nonces.load; Check looks at all the rest.
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
	os.Remove(path + compacted) // that a crash has left; it takes room
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
		v := tx.Bucket(bucketMeta).Get(keyTime)
		if len(v) != 8 {
			return fmt.Errorf("%w: it has no time", ErrCorrupt)
		}
		l.clock.start(l.options, time.Unix(0, int64(binary.BigEndian.Uint64(v))))
		var err error
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

// guard runs what reads a file that may be damaged. bbolt answers damage with a panic, and with a memory fault where the
// file is shorter than it says: both become ErrCorrupt.
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
			Timeout:      100 * time.Millisecond,
			FreelistType: bolt.FreelistMapType,
			OpenFile:     openFile,
			NoSync:       noSync("commit"),
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
	if err := guard(func() error { return settlePages(path, db) }); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// settlePages looks at the pages of a file that was opened, and sees that what counts is on disk.
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

// rewriteMeta writes the two pages that say what counts once more, as they are, and syncs. Where the fsync of one has failed
// before, the system may take it for written and never write it, and what is built on it would not count after a power cut.
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
		return fmt.Errorf("%w: its format is %d, of a newer version, and this program knows %d", ErrFormat, f, format)
	} else if f < format {
		return fmt.Errorf("%w: its format is %d, of an older version, and this program knows %d", ErrFormat, f, format)
	}
	for _, name := range buckets() {
		b := tx.Bucket(name)
		if b == nil {
			return fmt.Errorf("%w: its bucket %s is missing", ErrCorrupt, name)
		}
		b.Cursor().Last() // walks one path from the root to a leaf
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

// Alive returns when the writer has come round to this request. It writes nothing, but for a disk that was in trouble: it
// tries that again. That the disk is in trouble still is not its error, since the writer is alive.
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
	if !joined(ctx, r) {
		select {
		case l.requests <- r:
		case <-l.stopping:
			return ErrClosed
		case <-ctx.Done():
			return fmt.Errorf("ledger: queue: %w", ctx.Err())
		}
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
					if len(l.backlog) > 0 {
						l.commit(nil)
					}
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
		if last > 0 {
			l.commit(batch[:last])
		}
		l.commit(batch[last:])
	} else {
		l.commit(batch)
	}
}

func wrap(err *error, doing string) {
	if *err != nil {
		*err = fmt.Errorf("ledger: %s: %w", doing, *err)
	}
}
