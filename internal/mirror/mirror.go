// Package mirror carries the files of a folder of backups to an SFTP server, so that a lost
// machine is no lost ledger. Begin reading at Mirror, then at pass and carry.
package mirror

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign/internal/backup"
)

// times are the times of a Mirror. Tests set others.
type times struct {
	tick       time.Duration // between two looks at the folder
	retryFirst time.Duration // after a failure; then twice as long, and so on
	retryMost  time.Duration
	steady     time.Duration // a connection of this age makes the next retry the first one
	dial       time.Duration // for a connection with the sign-in
	within     time.Duration // for one operation at the server
	syncWithin time.Duration // for the server's disk
	list       time.Duration // between two looks at the server's folder
	atStop     time.Duration // for the last lists, when the daemon stops
}

var defaultTimes = times{
	tick: 500 * time.Millisecond, retryFirst: time.Second, retryMost: 2 * time.Minute, steady: time.Minute,
	dial: 30 * time.Second, within: 30 * time.Second, syncWithin: 2 * time.Minute, list: 10 * time.Minute,
	atStop: 5 * time.Second,
}

// piece is what is sent at first, and waited for: a slow link must bring it within the time of an
// operation. window is the most bytes of a backup that the server has not acknowledged, and
// syncEvery the most that its disk may not have. Each divides the next.
const (
	piece     = 128 << 10
	window    = 1 << 20
	syncEvery = 16 << 20
)

// mostRefusals ends the removals of one look at the server's folder: lists wait meanwhile.
const mostRefusals = 16

// skew is how far in the future the time of a name may be. Later ones count for nothing, since they
// would make all others spare.
const skew = time.Hour

// Mirror carries backups and lists of writes to a server as the folder gets them. The ledger's
// writer, the Shipper and requests never wait for a Mirror, which reads files that are there.
//
// The invariants:
//
//   - A backup at the server with its final name is whole, and on the server's disk where the
//     server has fsync@openssh.com. A file of lists has a prefix of the local file.
//   - The server is asked for the length of a file before each write, and content is read back. A
//     file that this daemon has not written is compared before the file counts.
//   - A local loss removes nothing at the server. What the server keeps follows from what the
//     server has, and nothing goes before the folder's newest backup is there. A file of the server
//     that is not the local one is kept beside it, as NAME.other, or NAME.other-2 and so on.
//   - Memory is bounded whatever the server sends, and each operation has a deadline, after which
//     the connection is closed.
type Mirror struct {
	folder string
	server Server
	log    *slog.Logger
	times  times

	begin   sync.Once
	end     sync.Once
	closing chan struct{}
	done    chan struct{}
	cancel  context.CancelFunc // ends the connection

	rule    Rule // set by Begin; belongs to run
	refused bool // a line of the log says that the server refuses removals; belongs to run

	held     error         // of the last attempt at backups, in a connection that has not ended; belongs to run
	heldTill time.Time     // belongs to run: no backup is sent before
	heldWait time.Duration // belongs to run

	mu      sync.Mutex
	files   map[string]*file // guarded by mu: of the folder, by name; run alone changes them
	remote  map[string]int64 // guarded by mu: lengths of the server's files; nil before the first look
	failure error            // guarded by mu: of the last attempt
	sending string           // guarded by mu: name of a backup; or ""
	moved   time.Time        // guarded by mu: last time at which the server had more of a backup than ever
}

// Rule says what is carried and kept.
type Rule struct {
	ID string // of the appliance's log: no other files are touched
	// Spare returns those of the names of backups that are not to be kept. All but the result are
	// kept of a part of the names, too.
	Spare func(names []string) []string
	// Shipped returns the bytes of whole records in files of lists that grow, by name. Nil: no
	// file grows.
	Shipped func() map[string]int64
}

// otherSuffix ends the name of a server's file with another content than the local one. The next
// ones are otherSuffix-2 and so on, to mostOthers.
const (
	otherSuffix = ".other"
	mostOthers  = 9
)

// other returns the name of the n-th file beside a file.
func other(name string, n int) string {
	if n == 1 {
		return name + otherSuffix
	}
	return fmt.Sprintf("%s%s-%d", name, otherSuffix, n)
}

// original returns the name of the file that a file is beside, or else the name itself.
func original(name string) string {
	of, _, _ := strings.Cut(name, otherSuffix)
	for n := 1; n <= mostOthers; n++ {
		if name == other(of, n) {
			return of
		}
	}
	return name
}

// file is a file of the folder.
type file struct {
	name    string
	whole   bool      // a backup never changes; otherwise a file of lists
	made    time.Time // by its name
	size    int64     // bytes that the server should have
	grows   bool
	wanted  bool      // by the rule, the server keeps the file
	there   int64     // length at the server, as left by this daemon or compared
	checked bool      // there is true, and has the content of the local file
	since   time.Time // since when the server lacks some; zero: nothing
	told    bool      // a line of the log says that the server's file is another one
	most    int64     // bytes of a part that the server has acknowledged, the most of all attempts
}

// New returns a Mirror of a folder.
func New(folder string, server Server, log *slog.Logger) *Mirror {
	return &Mirror{
		folder: folder, server: server, log: log, times: defaultTimes, closing: make(chan struct{}),
		done: make(chan struct{}), files: map[string]*file{},
	}
}

// Server returns where the files go.
func (m *Mirror) Server() Server { return m.server }

// Begin begins to carry.
func (m *Mirror) Begin(rule Rule) {
	m.begin.Do(func() {
		ctx, cancel := context.WithCancel(context.Background())
		m.mu.Lock()
		m.rule, m.cancel = rule, cancel
		m.mu.Unlock()
		go m.run(ctx)
	})
}

// Close carries the last lists, within some seconds, and ends the connection.
func (m *Mirror) Close() {
	m.begin.Do(func() { close(m.done) }) // for a Mirror without Begin
	m.end.Do(func() { close(m.closing) })
	m.mu.Lock()
	cancel := m.cancel
	m.mu.Unlock()
	if cancel == nil {
		return
	}
	defer cancel()
	select {
	case <-m.done:
		return
	case <-time.After(m.times.atStop):
		m.log.Error("the SFTP server does not take the last lists of writes")
	}
	cancel()
	select {
	case <-m.done:
	case <-time.After(time.Second): // the folder hangs
	}
}

// Behind returns for how long the server has lacked something of the folder, counted from the
// start of this daemon at most, and why the last attempt has failed, or nil. moving says that a
// backup is being sent, and that the server takes it without an error.
func (m *Mirror) Behind() (age time.Duration, moving bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.files {
		if f.wanted && !f.since.IsZero() {
			age = max(age, time.Since(f.since))
		}
	}
	recent := time.Since(m.moved) < m.times.within+m.times.syncWithin
	return age, m.sending != "" && m.failure == nil && recent, m.failure
}

// The results of Has.
const (
	Yes     = "yes"
	No      = "no"
	Sending = "sending"
	Unknown = "unknown" // the server has not been reached since the start
)

// Has says whether the server has a file of the folder, as far as known, without a wait.
func (m *Mirror) Has(name string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.files[name]
	switch {
	case m.remote == nil:
		return Unknown
	case f != nil && f.checked && f.since.IsZero():
		return Yes
	case m.sending == name:
		return Sending
	}
	return No
}

// errClosing ends the sending of a backup. The next daemon goes on with it.
var errClosing = errors.New("the daemon stops")

// run looks at the folder and carries until Close, and once more for the last lists.
func (m *Mirror) run(ctx context.Context) {
	defer close(m.done)
	var s *session
	defer func() { s.close() }()
	tick := time.NewTicker(m.times.tick)
	defer tick.Stop()
	var retry time.Time
	wait := m.times.retryFirst
	for ctx.Err() == nil {
		closing := false
		select {
		case <-m.closing:
			closing = true
		case <-tick.C:
		}
		err := m.look(time.Now())
		if s.gone() { // a server may end an idle connection, which is no failure
			if time.Since(s.began) < m.times.steady {
				retry = time.Now().Add(wait)
				wait = min(2*wait, m.times.retryMost)
			}
			s.close()
			s = nil
		}
		if s == nil && closing {
			return
		}
		if time.Now().Before(retry) {
			continue
		}
		if s == nil && err == nil {
			s, err = m.server.dial(ctx, m.times)
		}
		if err == nil {
			err = m.pass(s, closing)
			if errors.Is(err, errClosing) {
				err = m.pass(s, true)
				closing = true
			}
		}
		if ctx.Err() != nil {
			return
		}
		m.note(cmp.Or(err, m.held))
		if closing {
			return
		}
		if err == nil {
			if time.Since(s.began) > m.times.steady {
				wait = m.times.retryFirst
			}
			continue
		}
		s.close()
		s = nil
		retry = time.Now().Add(wait)
		wait = min(2*wait, m.times.retryMost)
	}
}

// note keeps the result of an attempt. The begin and the end of failures are lines of the log.
func (m *Mirror) note(err error) {
	m.mu.Lock()
	before := m.failure
	m.failure = err
	m.mu.Unlock()
	switch {
	case err != nil && before == nil:
		m.log.Warn("backups are not carried to the SFTP server; a retry follows", "err", err)
	case err == nil && before != nil:
		m.log.Info("backups are carried to the SFTP server again")
	}
}

// kind returns the time in a name of an appliance's backup or file of lists.
func kind(name, id string) (made time.Time, whole, ok bool) {
	if made, ok = backup.Whole.Begun(name, id); ok {
		return made, true, true
	}
	made, ok = backup.Lists.Begun(name, id)
	return made, false, ok
}

// look notes the files of the folder. An absent folder changes nothing.
func (m *Mirror) look(now time.Time) error {
	var grown map[string]int64
	entries, err := os.ReadDir(m.folder)
	if err != nil {
		return fmt.Errorf("the folder of backups: %w", err)
	}
	if m.rule.Shipped != nil {
		grown = m.rule.Shipped() // after the names, so that a file of this daemon is known by its size
	}
	found := map[string]*file{}
	for _, e := range entries {
		made, whole, ok := kind(e.Name(), m.rule.ID)
		if !ok || !e.Type().IsRegular() {
			continue
		}
		info, err := e.Info()
		if err != nil { // removed meanwhile
			continue
		}
		f := &file{name: e.Name(), whole: whole, made: made, size: info.Size()}
		if n, ok := grown[f.name]; ok {
			f.size, f.grows = n, true
		}
		found[f.name] = f
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, f := range found {
		old := m.files[name]
		switch {
		case old == nil:
			f.since = now
		case f.size == old.size:
			f.there, f.checked, f.since, f.told, f.most = old.there, old.checked, old.since, old.told, old.most
		default:
			f.there, f.checked, f.since, f.told = old.there, old.checked && f.size > old.size, old.since, old.told
			if f.since.IsZero() {
				f.since = now
			}
		}
	}
	m.files = found
	m.want()
	return nil
}

// want sets which files the server would keep, of its own and those of the folder together. The
// rest is not sent, since the next cleaning of the server would remove the rest. The caller holds
// mu.
func (m *Mirror) want() {
	all := map[string]bool{}
	for name := range m.files {
		all[name] = true
	}
	for name := range m.remote {
		all[name] = true
	}
	spare := m.spare(all)
	for name, f := range m.files {
		f.wanted = !spare[name] || f.grows
	}
}

// newest returns the name of the folder's newest backup, or "".
func (m *Mirror) newest() (newest string) {
	for name, f := range m.files {
		if f.whole && time.Until(f.made) <= skew {
			newest = max(newest, name) // by time
		}
	}
	return newest
}

// spare returns which of some files are not to be kept: backups by the rule of the folder, and
// lists as Shipper.Prune does: those that are followed by others of before the newest backup but
// one. The folder's newest backup is kept, whatever the server has.
func (m *Mirror) spare(all map[string]bool) map[string]bool {
	var backups, lists []string
	for name := range all {
		made, whole, ok := kind(name, m.rule.ID)
		switch {
		case time.Until(made) > skew:
		case ok && whole:
			backups = append(backups, name)
		case ok:
			lists = append(lists, name)
		}
	}
	spare := map[string]bool{}
	if len(backups) == 0 {
		return spare
	}
	for _, name := range m.rule.Spare(backups) {
		spare[name] = true
	}
	slices.Sort(backups) // by time
	slices.Sort(lists)
	made, _, _ := kind(backups[max(0, len(backups)-2)], m.rule.ID)
	for i, name := range lists[:max(0, len(lists)-1)] {
		if next, _, _ := kind(lists[i+1], m.rule.ID); next.Before(made) {
			spare[name] = true
		}
	}
	delete(spare, m.newest())
	return spare
}

// lacking returns copies of the files of which the server lacks some: lists from the oldest on, or
// backups from the newest on.
func (m *Mirror) lacking(whole bool) (all []file) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.files {
		if f.whole == whole && f.wanted && !f.since.IsZero() {
			all = append(all, *f)
		}
	}
	slices.SortFunc(all, func(x, y file) int {
		if whole {
			x, y = y, x
		}
		return cmp.Compare(x.name, y.name)
	})
	return all
}

// pass carries what the server lacks: the lists first, which are small and the newest. Between two
// pieces of a backup, the lists have their turn. A file with an error does not stop the others, and
// backups with an error, such as a full disk, are tried again later while lists go on. While the
// daemon stops, lists alone are carried.
func (m *Mirror) pass(s *session, closing bool) error {
	if time.Since(s.listed) >= m.times.list && !closing {
		if err := m.survey(s); err != nil {
			return err
		}
	}
	failed := m.carryLists(s)
	if failed != nil && s.gone() || closing {
		return failed
	}
	if time.Now().Before(m.heldTill) {
		return failed
	}
	began, turn := time.Now(), time.Now()
	var held error
	between := func() error {
		select {
		case <-m.closing:
			return errClosing
		default:
		}
		if time.Since(turn) < m.times.tick {
			return nil
		}
		turn = time.Now()
		err := m.look(turn)
		if err == nil {
			err = m.carryLists(s)
		}
		if s.gone() {
			return err
		}
		failed = cmp.Or(failed, err)
		if err != nil || m.moved.After(began) { // further than the attempt that has failed
			m.note(cmp.Or(err, held))
		}
		return nil
	}
	for _, f := range m.lacking(true) {
		err := m.carry(s, f, between)
		if errors.Is(err, errClosing) || err != nil && s.gone() {
			return err
		}
		if err == nil {
			s.listed = time.Time{} // the new backup may make others spare
		}
		held = cmp.Or(held, err)
	}
	m.hold(held)
	return failed
}

// hold keeps the error of backups, and sets the time of the next attempt.
func (m *Mirror) hold(err error) {
	m.held = err
	if err == nil {
		m.heldTill, m.heldWait = time.Time{}, 0
		return
	}
	m.heldWait = min(max(2*m.heldWait, m.times.retryFirst), m.times.retryMost)
	m.heldTill = time.Now().Add(m.heldWait)
}

func (m *Mirror) carryLists(s *session) (failed error) {
	for _, f := range m.lacking(false) {
		err := m.carry(s, f, func() error { return nil })
		if err != nil && s.gone() {
			return err
		}
		failed = cmp.Or(failed, err)
	}
	return failed
}

// survey looks at the server's folder, forgets what has changed there, and removes files that the
// rule does not keep of those there. A server may refuse that, and keep all.
func (m *Mirror) survey(s *session) error {
	remote, beside, err := s.list(m.rule.ID)
	if err != nil {
		return err
	}
	has := map[string]bool{}
	for name := range remote {
		has[name] = true
	}
	var gone []string
	for name := range m.spare(has) {
		gone = append(gone, name)
	}
	m.mu.Lock()
	m.remote = remote
	for name, f := range m.files {
		if size, ok := remote[name]; !ok || f.checked && size != f.there {
			f.checked = false
			if f.since.IsZero() {
				f.since = time.Now()
			}
		}
	}
	m.want()
	for _, name := range beside {
		of, part := strings.CutSuffix(name, backup.PartSuffix)
		of = original(of)
		f, kept := m.files[of], has[of] && !slices.Contains(gone, of)
		if part && (f == nil || !f.wanted || f.since.IsZero()) || !part && !kept && f == nil {
			gone = append(gone, name) // a part without its file, or a copy beside a file of before
		}
	}
	newest := m.files[m.newest()]
	there := newest != nil && newest.checked && newest.since.IsZero()
	gone = slices.DeleteFunc(gone, func(name string) bool {
		f := m.files[name]
		return f != nil && f.grows || !there && !strings.HasSuffix(name, string(backup.PartSuffix))
	})
	m.mu.Unlock()
	slices.Sort(gone)
	var removed []string
	for refusals := 0; len(gone) > 0 && refusals < mostRefusals; gone = gone[1:] {
		name := gone[0]
		if err := s.remove(name); err != nil && s.gone() {
			return err
		} else if err != nil {
			if refusals++; !m.refused {
				m.log.Warn("the SFTP server refuses to remove a file that is not to be kept, and keeps it", "err", err)
			}
			m.refused = true
			continue
		}
		removed = append(removed, name)
		m.mu.Lock()
		delete(m.remote, name)
		m.mu.Unlock()
	}
	if len(removed) > 0 {
		m.log.Info("files that are not to be kept were removed from the SFTP server", "names", removed)
	}
	s.listed = time.Now()
	return nil
}

// carry brings a file to the server, from the end of the server's copy on.
func (m *Mirror) carry(s *session, f file, between func() error) error {
	asked := time.Now()
	local, err := os.Open(filepath.Join(m.folder, f.name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // removed meanwhile: the next look forgets it
	} else if err != nil {
		return err
	}
	defer local.Close()
	at, err := s.size(f.name)
	if err != nil {
		return err
	}
	if at >= 0 && !(f.checked && at == f.there) {
		alike, err := s.alike(local, f.name, min(at, f.size))
		if err != nil {
			return err
		}
		switch {
		case alike && at > f.size && !f.whole && !f.grows:
			m.tell(f, "the SFTP server has more of a file of lists than the folder, and keeps it", at)
			m.have(f, at, asked)
			return nil
		case !alike || at > f.size || f.whole && at < f.size:
			if err := s.putBeside(f.name); err != nil {
				return err
			}
			m.tell(f, "the SFTP server has another file of this name, which is kept beside: "+
				"the folder's is sent anew", at)
			at = -1
		}
	}
	switch {
	case at < 0:
		if f.whole {
			m.send(f.name)
			defer m.send("")
		}
		err = s.upload(local, f, func(at int64) error {
			m.took(f, at)
			return between()
		})
	case at < f.size:
		err = s.append(local, f, at)
	}
	if err != nil {
		return err
	}
	m.have(f, f.size, asked)
	return nil
}

// send notes that a backup is being sent, or "" at its end.
func (m *Mirror) send(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sending = name
}

// took notes that the server has acknowledged so many bytes.
func (m *Mirror) took(f file, at int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now := m.files[f.name]; now != nil && f.whole && at > now.most {
		now.most, m.moved = at, time.Now()
	}
}

// tell writes one line about a file.
func (m *Mirror) tell(f file, text string, size int64) {
	m.mu.Lock()
	now := m.files[f.name]
	told := now == nil || now.told
	if now != nil {
		now.told = true
	}
	m.mu.Unlock()
	if !told {
		m.log.Warn(text, "name", f.name, "bytes", f.size, "server", size)
	}
}

// have notes that the server has the file as the file was when asked. Later bytes are newer than
// that.
func (m *Mirror) have(f file, there int64, asked time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.remote[f.name] = there
	now := m.files[f.name]
	if now == nil {
		return
	}
	now.there, now.checked, now.told = there, true, there > f.size
	now.since, now.most = time.Time{}, 0
	if now.size != f.size {
		now.since = asked
	}
}
