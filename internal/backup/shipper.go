package backup

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
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

// shipMost is the most bytes of lists that follow a backup, or twice its size. Replaceable for
// tests.
var shipMost int64 = 1 << 30

// Shipper writes the lists of a ledger's writes beside the backups, as they are committed. The
// writer of the ledger never waits for a Shipper. Begin reading at Take, then at run.
//
// The invariant: while the Shipper is not behind, a backup of this daemon is in the folder, and so
// is each list that was committed after the backup and longer than a moment ago.
//
// The chain is the lists that are kept without a gap up to the present one. A backup joins the
// chain if the list after its last one is in the chain, or is still to come. Lists before the
// first backup of a daemon follow nothing, and are not kept. Lists that the folder does not take
// wait in memory. When these are too many, later lists are dropped: the chain begins anew, and
// another backup is needed.
type Shipper struct {
	folder string
	to     []Recipient
	log    *slog.Logger
	key    listsKey

	wake    chan struct{} // of capacity 1: there is a batch
	needed  chan struct{} // of capacity 1: see Needed
	closing chan struct{}
	done    chan struct{}
	begin   sync.Once
	end     sync.Once

	mu       sync.Mutex
	id       string // guarded by mu: of the appliance's log; "" before Begin
	queue    []list // guarded by mu: not written, the oldest first, without a gap
	bytes    int    // guarded by mu: sum of the queue
	idle     bool   // guarded by mu: no backup has begun that lists could follow
	dropping bool   // guarded by mu: lists are dropped until the queue is empty
	last     uint64 // guarded by mu: the last list that was taken or dropped
	from     uint64 // guarded by mu: the first list of the chain; 0 before the first list
	since    time.Time
	hasBase  bool   // guarded by mu: a backup of this daemon is in the folder
	based    uint64 // guarded by mu: the last list in the newest backup
	size     int64  // guarded by mu: bytes of the newest backup
	shipped  int64  // guarded by mu: bytes of lists after it
	failure  error  // guarded by mu: of the last attempt to write
	rotate   bool   // guarded by mu: the next record begins a new file
	files    []shippedFile
	before   []shippedFile

	file *os.File // the last one of files; belongs to run
}

// shippedFile is a file of lists of this daemon. files are those with lists after the newest
// backup, before those with lists after the backup before it. Both are guarded by mu.
type shippedFile struct {
	path string
	info fs.FileInfo // names the file itself
	size int64       // of the whole records
}

// NewShipper returns a Shipper for a folder.
func NewShipper(folder string, to []Recipient, log *slog.Logger) (*Shipper, error) {
	key, err := newListsKey()
	if err != nil {
		return nil, err
	}
	return &Shipper{
		folder: folder, to: to, log: log, key: key, idle: true, wake: make(chan struct{}, 1),
		needed: make(chan struct{}, 1), closing: make(chan struct{}), done: make(chan struct{}),
	}, nil
}

// PublicKey returns the key for Manifest.ListsKey.
func (s *Shipper) PublicKey() []byte { return s.key.public }

// Take takes a list that was committed. Take never waits for the folder.
func (s *Shipper) Take(number uint64, bytes []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.last = number
	if s.from == 0 {
		s.breakChain(1, now)
	}
	long := len(bytes) > shipList
	s.dropping = len(s.queue) > 0 && (s.dropping || long || s.bytes+len(bytes) > shipQueue)
	if s.idle || s.dropping || long {
		s.breakChain(number+1, now)
		return
	}
	s.queue, s.bytes = append(s.queue, list{number, bytes, now}), s.bytes+len(bytes)
	if s.bytes >= shipBatch {
		signal(s.wake)
	}
}

// breakChain begins the chain with a later list. The caller holds mu.
func (s *Shipper) breakChain(from uint64, now time.Time) {
	s.from = max(s.from, from)
	s.judge(now)
}

// judge sets since to the time of the first write after which the newest backup has a gap, or to
// zero where the backup joins the chain. The caller holds mu.
func (s *Shipper) judge(now time.Time) {
	if !s.apart() {
		s.since = time.Time{}
		return
	}
	if s.since.IsZero() {
		s.since = now
		signal(s.needed)
	}
}

// apart reports that no backup joins the chain. The caller holds mu.
func (s *Shipper) apart() bool { return s.from != 0 && (!s.hasBase || s.based+1 < s.from) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Expect notes that a backup begins: lists from now on are kept. Base or NoBase must follow.
func (s *Shipper) Expect() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.idle = false
}

// Base notes that a backup of size bytes is in the folder, and the number of the last list in its
// ledger.
func (s *Shipper) Base(last uint64, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hasBase, s.based, s.size, s.shipped, s.rotate = true, last, size, 0, true
	s.before, s.files = s.files, s.files[max(0, len(s.files)-1):] // the last one may have later lists
	s.judge(time.Now())
	if s.dropping && !s.apart() { // the queue is of before the gap, and later lists need the place
		s.queue, s.bytes, s.dropping = nil, 0, false
	}
}

// NoBase notes that the backup was not made.
func (s *Shipper) NoBase() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hasBase && !s.apart() {
		return
	}
	s.idle = true
	if !s.hasBase { // otherwise the lists in the queue lead an older backup on
		s.queue, s.bytes, s.dropping, s.failure = nil, 0, false, nil
	}
	if s.from != 0 {
		s.breakChain(s.last+1, time.Now())
	}
}

// Lost notes that the newest backup is no longer in the folder.
func (s *Shipper) Lost() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hasBase = false
	s.judge(time.Now())
}

// NeedsBase reports that another backup should be made: no backup joins the chain, or so many lists
// follow the newest one that a restore would take long.
func (s *Shipper) NeedsBase() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.apart() || s.long()
}

// long reports that many lists follow the newest backup. The caller holds mu.
func (s *Shipper) long() bool { return s.hasBase && s.shipped > max(shipMost, 2*s.size) }

// Needed returns a channel that gets a value when NeedsBase becomes true.
func (s *Shipper) Needed() <-chan struct{} { return s.needed }

// Behind returns the age of the oldest write that a restore would not have, as far as this daemon
// can know: a write of before its start has the age of its first write. err is why the folder took
// no lists at the last attempt, or nil.
func (s *Shipper) Behind() (age time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.since.IsZero() {
		age = time.Since(s.since)
	}
	later := func(l list) bool { return !s.hasBase || l.number > s.based }
	if i := slices.IndexFunc(s.queue, later); i >= 0 {
		age = max(age, time.Since(s.queue[i].at))
	}
	return age, s.failure
}

// Begin begins to write the lists of the appliance whose log has the id.
func (s *Shipper) Begin(id string) {
	s.begin.Do(func() {
		s.mu.Lock()
		s.id = id
		s.mu.Unlock()
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
		for more := true; more; {
			s.notice()
			left, err := s.ship()
			if err != nil {
				retry = time.Now().Add(shipRetry)
			}
			more = err == nil && (left >= shipBatch || closing && left > 0) // otherwise a record each second
		}
		if closing {
			s.closeFile()
			return
		}
	}
}

// notice breaks the chain if a file with lists after the newest backup is no longer what was
// written. A folder that is away may come back, so all files are looked for in the folder that is
// open: by their paths, a folder that goes away meanwhile would have none.
func (s *Shipper) notice() {
	folder, err := os.OpenRoot(s.folder)
	if err != nil {
		return
	}
	defer folder.Close()
	s.mu.Lock()
	files := slices.Clone(s.files)
	s.mu.Unlock()
	if !slices.ContainsFunc(files, func(f shippedFile) bool { return f.changed(folder) }) {
		return
	}
	s.closeFile()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files = nil
	next := s.last + 1
	if len(s.queue) > 0 {
		next = s.queue[0].number
	}
	s.breakChain(next, time.Now())
}

func (f shippedFile) changed(folder *os.Root) bool {
	is, err := folder.Lstat(filepath.Base(f.path))
	return errors.Is(err, fs.ErrNotExist) || err == nil && (!os.SameFile(is, f.info) || is.Size() != f.size)
}

// ship writes a record with the oldest lists of the queue, and returns the bytes of lists that are
// left in the queue.
func (s *Shipper) ship() (left int, err error) {
	s.mu.Lock()
	batch, size := s.batch()
	rotate := s.rotate
	s.rotate = false
	s.mu.Unlock()
	if rotate {
		s.closeFile()
	}
	if len(batch) == 0 {
		return 0, nil
	}
	last := batch[len(batch)-1].number
	err = s.write(batch)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if s.failure == nil {
			s.log.Warn("lists of writes are not shipped to the folder of backups", "err", err)
		}
		s.failure = err
		return s.bytes, err
	}
	if s.failure != nil {
		s.log.Info("lists of writes are shipped again")
	}
	s.failure = nil
	if len(s.queue) > 0 && s.queue[0].number <= last { // otherwise the queue was emptied meanwhile
		s.queue, s.bytes = slices.Delete(s.queue, 0, len(batch)), s.bytes-size
	}
	if s.long() {
		signal(s.needed)
	}
	return s.bytes, nil
}

// batch returns the lists of the next record, which stay in the queue, and their bytes. The caller
// holds mu.
func (s *Shipper) batch() (lists []list, size int) {
	for i, l := range s.queue {
		if i > 0 && size+len(l.bytes) > shipBatch {
			break
		}
		lists, size = append(lists, l), size+len(l.bytes)
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
	if free := disk.Bavail * uint64(disk.Bsize); free < shipLeast+uint64(len(record)) {
		return fmt.Errorf("%s has %d MiB free: at least %d MiB stay free", s.folder, free>>20, shipLeast>>20)
	}
	if s.file == nil {
		if err := s.create(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	at := s.files[len(s.files)-1].size
	s.mu.Unlock()
	_, err = s.file.WriteAt(record, at)
	if err = errors.Join(err, s.file.Sync()); err == nil {
		s.mu.Lock()
		s.files[len(s.files)-1].size += int64(len(record))
		s.shipped += int64(len(record))
		s.mu.Unlock()
		return nil
	}
	if cut := errors.Join(s.file.Truncate(at), s.file.Sync()); cut != nil {
		s.closeFile() // and the next record is in a file of its own
	}
	return err
}

// create begins a file. A name has one second: within the same second, the name is of a later one.
func (s *Shipper) create() error {
	s.mu.Lock()
	id := s.id
	s.mu.Unlock()
	var path string
	var f *os.File
	err := fs.ErrExist
	for at := time.Now(); errors.Is(err, fs.ErrExist); at = at.Add(time.Second) {
		path = filepath.Join(s.folder, Lists.Name(id, at))
		f, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	}
	if err != nil {
		return err
	}
	head := append([]byte(listsMagic), s.key.public...)
	_, err = f.Write(head)
	info, failed := f.Stat()
	if err = errors.Join(err, failed, durable.Sync(s.folder)); err != nil {
		f.Close()
		os.Remove(path)
		return err
	}
	s.file = f
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files = append(slices.Clone(s.files), shippedFile{path, info, int64(len(head))})
	return nil
}

func (s *Shipper) closeFile() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// Shipped returns the bytes of whole records that are on the disk, for each file of lists of this
// daemon that may grow, by name.
func (s *Shipper) Shipped() map[string]int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[string]int64{}
	for _, f := range slices.Concat(s.before, s.files) { // the size of one in both is newest in files
		all[filepath.Base(f.path)] = f.size
	}
	return all
}

// Prune removes the files of lists that no backup needs which was made at a time or later: the
// files that were followed by another one before. Lists after the last two backups of this daemon
// stay, whatever the clock says.
func (s *Shipper) Prune(made time.Time) error {
	s.mu.Lock()
	id, keep := s.id, map[string]bool{}
	for _, f := range slices.Concat(s.files, s.before) {
		keep[f.path] = true
	}
	s.mu.Unlock()
	entries, err := os.ReadDir(s.folder)
	if err != nil {
		return err
	}
	var before string
	for _, e := range entries { // sorted by name, which is by time
		begun, ok := Lists.Begun(e.Name(), id)
		if !ok || !e.Type().IsRegular() {
			continue
		}
		if before != "" && begun.Before(made.Truncate(time.Second)) && !keep[before] {
			err = errors.Join(err, os.Remove(before))
		}
		before = filepath.Join(s.folder, e.Name())
	}
	return err
}
