package backup

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"countersign/internal/durable"

	"golang.org/x/sys/unix"
)

// Bounds of a Shipper.
const (
	shipEvery  = time.Second
	shipRetry  = 5 * time.Second
	shipBatch  = 4 << 20   // bytes of lists in a record; a longer list has a record alone
	shipList   = 32 << 20  // bytes of a list; a longer one breaks the chain
	shipQueue  = 64 << 20  // bytes of lists in memory
	shipLeast  = 256 << 20 // bytes that stay free on the disk of the folder
	shipAtStop = 5 * time.Second
)

// Shipper writes the lists of a ledger's writes beside the backups, as they are committed. The
// writer of the ledger never waits for a Shipper. Begin reading at run.
//
// The invariant: while the Shipper is not behind, a backup of this daemon is in the folder, and so
// is each list that was committed after the backup and longer than a moment ago.
//
// Lists that the folder does not take wait in memory. When these are too many, later lists are
// dropped: the chain is broken until a backup has what was dropped.
type Shipper struct {
	folder string
	to     []Recipient
	log    *slog.Logger
	key    listsKey
	least  uint64 // bytes; replaceable for tests

	wake    chan struct{} // of capacity 1: there is a batch
	broken  chan struct{} // of capacity 1: see Broken
	closing chan struct{}
	done    chan struct{}
	begin   sync.Once
	end     sync.Once

	mu       sync.Mutex
	id       string    // of the appliance's log
	queue    []list    // guarded by mu: not written, the oldest first
	bytes    int       // guarded by mu: sum of the queue
	dropping bool      // guarded by mu: lists are dropped until the queue is empty
	from     uint64    // guarded by mu: the first list of the unbroken chain; 0 before the first one
	since    time.Time // guarded by mu: of the first write after which the newest backup has a gap; zero: none
	based    uint64    // guarded by mu: the last list in the newest backup, once there is one
	failure  error     // guarded by mu: of the last attempt to write
	rotate   bool      // guarded by mu: the next record begins a new file

	// The fields below belong to run.
	file *os.File
	size int64 // of the whole records in file
}

// NewShipper returns a Shipper for a folder. Lists wait in memory until Begin.
func NewShipper(folder string, to []Recipient, log *slog.Logger) (*Shipper, error) {
	key, err := newListsKey()
	if err != nil {
		return nil, err
	}
	return &Shipper{
		folder: folder, to: to, log: log, key: key, least: shipLeast, wake: make(chan struct{}, 1),
		broken: make(chan struct{}, 1), closing: make(chan struct{}), done: make(chan struct{}),
	}, nil
}

// PublicKey returns the key for Manifest.ListsKey.
func (s *Shipper) PublicKey() []byte { return s.key.public }

// Take takes a list that was committed. Take never waits for the folder.
func (s *Shipper) Take(number uint64, bytes []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.dropping = len(s.queue) > 0 && (s.dropping || s.bytes+len(bytes) > shipQueue)
	if s.dropping || len(bytes) > shipList {
		s.breakChain(0, now)
		return
	}
	if s.from == 0 { // the first list, or the first one after a gap
		s.breakChain(number, now)
	}
	s.queue, s.bytes = append(s.queue, list{number, bytes, now}), s.bytes+len(bytes)
	if s.bytes >= shipBatch {
		signal(s.wake)
	}
}

// breakChain notes that the unbroken chain begins with a list; 0 is one to come. The caller holds
// mu.
func (s *Shipper) breakChain(from uint64, now time.Time) {
	s.from = from
	if s.since.IsZero() {
		s.since = now
	}
	if from != 0 {
		signal(s.broken)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Base notes that a backup is in the folder, and the number of the last list in its ledger.
func (s *Shipper) Base(last uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.based, s.rotate = last, true
	if !s.needsBase() && s.from != 0 {
		s.since = time.Time{}
	}
}

// Lost notes that the newest backup is no longer in the folder.
func (s *Shipper) Lost() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.based = 0
	if s.from != 0 {
		s.breakChain(s.from, time.Now())
	}
}

// needsBase reports that the chain begins after the newest backup. The caller holds mu.
func (s *Shipper) needsBase() bool { return s.from != 0 && s.based+1 < s.from }

// NeedsBase reports that only a new backup lets a restore reach the present.
func (s *Shipper) NeedsBase() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.needsBase()
}

// Broken returns a channel that has a value after NeedsBase has become true.
func (s *Shipper) Broken() <-chan struct{} { return s.broken }

// Behind returns the age of the oldest write that a restore would not have, and why the folder took
// no lists at the last attempt, or nil.
func (s *Shipper) Behind() (age time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.since.IsZero():
		age = time.Since(s.since)
	case len(s.queue) > 0:
		age = time.Since(s.queue[0].at)
	}
	return age, s.failure
}

// Begin begins to write the lists of the appliance whose log has the id.
func (s *Shipper) Begin(id string) {
	s.begin.Do(func() {
		s.id = id
		go s.run()
	})
}

// Close writes what is queued, within some seconds.
func (s *Shipper) Close() {
	s.begin.Do(func() { close(s.done) }) // for a Shipper without Begin
	s.end.Do(func() { close(s.closing) })
	select {
	case <-s.done:
	case <-time.After(shipAtStop):
		s.log.Error("the folder of backups does not take the last lists of writes")
	}
}

func (s *Shipper) run() {
	defer close(s.done)
	tick := time.NewTicker(shipEvery)
	defer tick.Stop()
	var retry time.Time
	for closing := false; ; {
		select {
		case <-s.closing:
			closing = true
		case <-tick.C:
		case <-s.wake:
		}
		if !closing && time.Now().Before(retry) {
			continue
		}
		for {
			wrote, err := s.ship()
			if err != nil {
				retry = time.Now().Add(shipRetry)
			}
			if err != nil || !wrote {
				break
			}
		}
		if closing {
			s.closeFile()
			return
		}
	}
}

// ship writes a record with the oldest lists of the queue. wrote is false for an empty queue.
func (s *Shipper) ship() (wrote bool, err error) {
	s.mu.Lock()
	batch, size := s.batch()
	rotate := s.rotate
	s.rotate = false
	s.mu.Unlock()
	if rotate {
		s.closeFile()
	}
	if len(batch) > 0 {
		err = s.write(batch)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if s.failure == nil {
			s.log.Warn("lists of writes are not shipped to the folder of backups", "err", err)
		}
		s.failure = err
		return false, err
	}
	if len(batch) > 0 {
		if s.failure != nil {
			s.log.Info("lists of writes are shipped again")
		}
		s.failure = nil
		s.queue, s.bytes = s.queue[len(batch):], s.bytes-size
	}
	return len(batch) > 0, nil
}

// batch returns the lists of the next record, which stay in the queue, and their bytes. The queue
// has no gap inside. The caller holds mu.
func (s *Shipper) batch() (lists []list, size int) {
	for i, l := range s.queue {
		if i > 0 && size+len(l.bytes) > shipBatch {
			break
		}
		lists, size = s.queue[:i+1], size+len(l.bytes)
	}
	return lists, size
}

// write appends a record, and syncs. After an error the file has whole records only, or is closed.
func (s *Shipper) write(lists []list) error {
	var disk unix.Statfs_t
	if err := unix.Statfs(s.folder, &disk); err != nil {
		return fmt.Errorf("%s: %w", s.folder, err)
	}
	record, err := s.key.record(s.to, lists)
	if err != nil {
		return err
	}
	if free := disk.Bavail * uint64(disk.Bsize); free < s.least+uint64(len(record)) {
		return fmt.Errorf("%s has %d MiB free: at least %d MiB stay free", s.folder, free>>20, s.least>>20)
	}
	if s.file != nil && s.removed() { // with the lists in it
		s.closeFile()
		s.mu.Lock()
		s.breakChain(lists[0].number, time.Now())
		s.mu.Unlock()
	}
	if s.file == nil {
		if err := s.create(); err != nil {
			return err
		}
	}
	_, err = s.file.WriteAt(record, s.size)
	if err = errors.Join(err, s.file.Sync()); err == nil {
		s.size += int64(len(record))
		return nil
	}
	if cut := errors.Join(s.file.Truncate(s.size), s.file.Sync()); cut != nil {
		s.closeFile() // and the next record is in a file of its own
	}
	return err
}

// removed reports that the name of the file is no longer that of the file.
func (s *Shipper) removed() bool {
	named, err := os.Lstat(s.file.Name())
	mine, err2 := s.file.Stat()
	return errors.Is(err, fs.ErrNotExist) || err == nil && err2 == nil && !os.SameFile(named, mine)
}

// create begins a file. A name has one second: within the same second, the name is of a later one.
func (s *Shipper) create() error {
	var path string
	var f *os.File
	err := fs.ErrExist
	for at := time.Now(); errors.Is(err, fs.ErrExist); at = at.Add(time.Second) {
		path = filepath.Join(s.folder, Lists.Name(s.id, at))
		f, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	}
	if err != nil {
		return err
	}
	head := append([]byte(listsMagic), s.key.public...)
	_, err = f.Write(head)
	if err = errors.Join(err, durable.Sync(s.folder)); err != nil {
		f.Close()
		os.Remove(path)
		return err
	}
	s.file, s.size = f, int64(len(head))
	return nil
}

func (s *Shipper) closeFile() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}
