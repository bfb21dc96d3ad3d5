package mirror

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"countersign/internal/backup"
	"countersign/internal/ledger/disktest"
	"countersign/internal/mirror/mirrortest"
	"countersign/internal/scantest"

	"golang.org/x/crypto/ssh"
)

func TestMain(m *testing.M) {
	disktest.Serve()
	os.Exit(scantest.Run(m))
}

// id is that of the appliance of the tests.
const id = "0123456789abcdef"

// rig is a Mirror with its folder and server.
type rig struct {
	*Mirror
	t      *testing.T
	server *mirrortest.Server
	log    *scantest.Buffer

	mu      sync.Mutex
	shipped map[string]int64
	keep    int // backups
}

// newRig makes a Mirror that has not begun. change may change its server.
func newRig(t *testing.T, change func(*Server)) *rig {
	t.Helper()
	r := &rig{t: t, server: mirrortest.New(t), log: new(scantest.Buffer), shipped: map[string]int64{}, keep: 3}
	to, err := Parse(r.server.URL(), r.server.KeyFile, []string{r.server.HostKey})
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&to)
	}
	r.Mirror = r.another(to)
	return r
}

// another returns the Mirror of a next daemon, on the same folder.
func (r *rig) another(to Server) *Mirror {
	folder := r.t.TempDir()
	if r.Mirror != nil {
		folder = r.folder
	}
	log := slog.New(slog.NewTextHandler(scantest.Tee("the log of a mirror", r.log), nil))
	m := New(folder, to, log)
	m.times.tick, m.times.retryFirst, m.times.retryMost = 10*time.Millisecond, 10*time.Millisecond, 40*time.Millisecond
	r.t.Cleanup(m.Close)
	return m
}

// told counts a text in the log.
func (r *rig) told(text string) int { return strings.Count(r.log.String(), text) }

func (r *rig) begin() {
	r.Begin(Rule{ID: id, Spare: func(names []string) []string {
		slices.Sort(names)
		return names[:max(0, len(names)-r.keep)]
	}, Shipped: func() map[string]int64 {
		r.mu.Lock()
		defer r.mu.Unlock()
		all := map[string]int64{}
		for name, size := range r.shipped {
			all[name] = size
		}
		return all
	}})
}

// name returns the name of the n-th file.
func name(s backup.Suffix, n int) string {
	return s.Name(id, time.Date(2026, 1, 1, 0, n, 0, 0, time.UTC))
}

// content is random, as encrypted files are.
func content(size int) []byte {
	b := make([]byte, size)
	rand.Read(b)
	return b
}

// put writes a file of the folder as the appliance does: a whole backup gets its name.
func (r *rig) put(name string, b []byte) {
	r.t.Helper()
	path := filepath.Join(r.folder, name)
	if err := errors.Join(os.WriteFile(path+".new", b, 0o600), os.Rename(path+".new", path)); err != nil {
		r.t.Fatal(err)
	}
}

// at returns the content of a file at the server, or nil.
func (r *rig) at(name string) []byte {
	r.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.server.Folder, name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.t.Fatal(err)
	}
	return b
}

func (r *rig) atServer(name string, b []byte) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.server.Folder, name), b, 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// names are those at the server.
func (r *rig) names() (all []string) {
	r.t.Helper()
	entries, err := os.ReadDir(r.server.Folder)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func (r *rig) eventually(what string, is func() bool) {
	r.t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			age, moving, err := r.Behind()
			r.t.Fatalf("not in time: %s; behind %v, moving %v, %v; at the server %v\n%s",
				what, age, moving, err, r.names(), r.log.String())
		}
	}
}

// has waits until the server has all of the folder.
func (r *rig) has(names ...string) {
	r.t.Helper()
	r.eventually(fmt.Sprint("the server has ", names), func() bool {
		age, _, err := r.Behind()
		return age == 0 && err == nil && !slices.ContainsFunc(names, func(n string) bool { return r.Has(n) != Yes })
	})
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(r.folder, n))
		if err != nil || !bytes.Equal(b, r.at(n)) {
			r.t.Fatalf("%s: %d bytes here, %v, and %d at the server", n, len(b), err, len(r.at(n)))
		}
	}
}

func (r *rig) fails(text string) {
	r.t.Helper()
	r.eventually("the failure is: "+text, func() bool {
		_, _, err := r.Behind()
		return err != nil && strings.Contains(err.Error(), text)
	})
}

// TestCarries: old and new backups and lists are at the server. Lists grow there by whole records.
// Files of others are not touched, and not sent.
func TestCarries(t *testing.T) {
	r := newRig(t, nil)
	first, second := name(backup.Whole, 1), name(backup.Whole, 5)
	lists, grows := name(backup.Lists, 2), name(backup.Lists, 6)
	r.put(first, content(3<<20))
	r.put(lists, content(70_000))
	r.put("notes.txt", []byte("mine"))
	r.put(backup.Whole.Name("fedcba9876543210", time.Now()), content(10))
	r.atServer("notes of another", []byte("theirs"))
	if got := r.Has(first); got != Unknown {
		t.Errorf("before the begin: %s", got)
	}
	r.begin()
	r.has(first, lists)
	whole := content(500_000)
	r.mu.Lock()
	r.shipped[grows] = 100_000
	r.mu.Unlock()
	r.put(grows, whole)
	r.put(second, content(100))
	r.eventually("the first records", func() bool {
		return bytes.Equal(r.at(grows), whole[:100_000]) && r.Has(second) == Yes
	})
	r.mu.Lock()
	r.shipped[grows] = 400_000
	r.mu.Unlock()
	r.eventually("the next records", func() bool { return bytes.Equal(r.at(grows), whole[:400_000]) })
	r.mu.Lock()
	r.shipped[grows] = int64(len(whole))
	r.mu.Unlock()
	r.Close() // the last lists
	r.has(first, second, lists, grows)
	if all := r.names(); len(all) != 5 {
		t.Errorf("at the server: %v", all)
	}
}

// TestGoesOn cuts the line in the middle of a backup. The next connection, and the next daemon, go
// on where the server has it, and the final name comes last. Meanwhile the state has the age.
func TestGoesOn(t *testing.T) {
	r := newRig(t, nil)
	const size = syncEvery + 8<<20
	big, lists := name(backup.Whole, 1), name(backup.Lists, 2)
	r.put(big, content(size))
	r.server.Cut(syncEvery + 4<<20)
	r.begin()
	r.eventually("the server is gone", func() bool {
		age, _, err := r.Behind()
		return age > 0 && err != nil && r.server.Sent() >= 0 && len(r.at(big+backup.PartSuffix)) > syncEvery
	})
	if r.at(big) != nil || r.Has(big) == Yes {
		t.Fatal("half a backup has the final name")
	}
	r.put(lists, content(1000))
	r.Close()
	// The server's power goes, too: of what was not synced, the disk has the length.
	part := r.at(big + backup.PartSuffix)
	clear(part[syncEvery+100_000 : syncEvery+200_000])
	r.atServer(big+backup.PartSuffix, part)
	r.server.Away(false)
	r.server.Sent()
	r.Mirror = r.another(r.Mirror.server)
	r.begin()
	r.has(big, lists)
	if sent := r.server.Sent(); sent > size-syncEvery+window {
		t.Errorf("%d bytes were sent, of which the server had %d", sent, len(part))
	}
	if all := r.names(); len(all) != 2 {
		t.Errorf("at the server: %v", all)
	}
}

// TestFlaps: a server that goes and comes has one line at each begin and end, and the state
// follows.
func TestFlaps(t *testing.T) {
	r := newRig(t, nil)
	lists := name(backup.Lists, 1)
	var all []byte
	r.begin()
	for n := range 3 {
		r.server.Away(true)
		all = append(all, content(1000)...)
		r.put(lists, all)
		r.fails("connect")
		r.server.Away(false)
		r.has(lists)
		r.eventually("one line each", func() bool {
			return r.told("are not carried") == n+1 && r.told("are carried to the SFTP server again") == n+1
		})
	}
}

// TestSilentServer: a server that answers nothing any more costs the time of one operation. No
// goroutine and no connection is left.
func TestSilentServer(t *testing.T) {
	r := newRig(t, nil)
	r.times.within = 500 * time.Millisecond
	lists, all := name(backup.Lists, 1), content(3000)
	r.put(lists, all[:1000])
	r.begin()
	r.has(lists)
	r.server.Silence(true)
	r.put(lists, all[:2000])
	r.fails("not answered within")
	r.server.Away(false)
	r.has(lists)
	r.server.Silence(true)
	began := time.Now()
	r.times.atStop = time.Second
	r.put(lists, all)
	r.Close()
	select {
	case <-r.done:
	default:
		t.Errorf("it still runs %v after its end", time.Since(began))
	}
	r.server.Away(false)
	r.eventually("no connection is left", func() bool { return r.server.Connections() == 0 })
}

// TestRefused: who answers must have the configured host key, must let the key in, and must have
// the folder. Each error says what to do.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*rig, *Server)
		text   string
		heal   func(*rig)
	}{
		{"another host key", func(r *rig, s *Server) {
			other, err := Parse(r.server.URL(), r.server.KeyFile, []string{r.server.NewKey("other")})
			if err != nil {
				t.Fatal(err)
			}
			s.HostKeys = other.HostKeys
		}, "the server shows the host key SHA256:", nil},
		{"a type that the server has not", func(r *rig, s *Server) {
			other, err := Parse(r.server.URL(), r.server.KeyFile, []string{rsaKey})
			if err != nil {
				t.Fatal(err)
			}
			s.HostKeys = other.HostKeys
		}, "no host key of a type in sftp_host_keys (rsa-sha2-512, rsa-sha2-256)", nil},
		{"a key that is not let in", func(r *rig, s *Server) { r.server.Authorize(r.server.NewKey("another")) },
			"the server refuses the key SHA256:", func(r *rig) { r.server.Authorize(r.server.NewKey("client")) }},
		{"no folder", func(r *rig, _ *Server) { r.ok(os.Remove(r.server.Folder)) },
			"make the folder at the server", func(r *rig) { r.ok(os.Mkdir(r.server.Folder, 0o700)) }},
		{"no key file", func(r *rig, _ *Server) { r.ok(os.Rename(r.server.KeyFile, r.server.KeyFile+".away")) },
			"SSH key: open", func(r *rig) { r.ok(os.Rename(r.server.KeyFile+".away", r.server.KeyFile)) }},
		{"a key file for all", func(r *rig, _ *Server) { r.ok(os.Chmod(r.server.KeyFile, 0o644)) },
			"mode", func(r *rig) { r.ok(os.Chmod(r.server.KeyFile, 0o600)) }},
		{"no key", func(r *rig, _ *Server) { r.ok(os.WriteFile(r.server.KeyFile, []byte("nothing"), 0o600)) },
			"it is no private key of SSH in PEM", func(r *rig) { r.server.Authorize(r.server.NewKey("client")) }},
		{"a folder in the way", func(r *rig, _ *Server) {
			r.ok(os.Mkdir(filepath.Join(r.server.Folder, name(backup.Whole, 1)), 0o700))
		}, "it is no file at the server", func(r *rig) {
			r.ok(os.Remove(filepath.Join(r.server.Folder, name(backup.Whole, 1))))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, nil)
			to := r.Mirror.server
			c.change(r, &to)
			r.Mirror = r.another(to)
			r.put(name(backup.Whole, 1), content(1000))
			r.begin()
			r.fails(c.text)
			r.eventually("one line of the failure", func() bool { return r.told("are not carried") == 1 })
			if c.heal == nil {
				if len(r.names()) > 0 {
					t.Errorf("at the server: %v", r.names())
				}
				return
			}
			c.heal(r)
			r.has(name(backup.Whole, 1))
		})
	}
}

func (r *rig) ok(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// TestFullDisk has the server's disk full for a backup, and then not.
func TestFullDisk(t *testing.T) {
	disk := disktest.New(t)
	r := newRig(t, func(s *Server) { s.Folder = disk.Dir() })
	r.server.Folder = disk.Dir()
	var room, attempts atomic.Int64 // bytes of a file; at the backup
	room.Store(1 << 20)
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Truncate {
			attempts.Add(1)
		} else if op.Kind == disktest.Write && op.Offset+int64(len(op.Data)) > room.Load() {
			return syscall.ENOSPC
		}
		return 0
	})
	r.put(name(backup.Whole, 1), content(3<<20))
	r.put(name(backup.Lists, 2), content(1000))
	r.begin()
	r.fails("write")
	before := attempts.Load()
	r.eventually("several attempts", func() bool {
		if _, moving, err := r.Behind(); moving || err == nil {
			t.Fatalf("on a full disk: moving %v, %v", moving, err)
		}
		return attempts.Load() >= before+10
	})
	r.eventually("the lists are at the server all the same", func() bool { return r.Has(name(backup.Lists, 2)) == Yes })
	if r.at(name(backup.Whole, 1)) != nil || r.Has(name(backup.Whole, 1)) == Yes {
		t.Error("a backup has its final name, and is not whole")
	}
	room.Store(8 << 20)
	r.has(name(backup.Whole, 1), name(backup.Lists, 2))
}

// TestOneFileFails: a backup that the server does not take is tried again later, and lists go on
// meanwhile, in the same connection.
func TestOneFileFails(t *testing.T) {
	r := newRig(t, nil)
	r.times.retryFirst, r.times.retryMost = time.Hour, time.Hour
	whole, other, lists := name(backup.Whole, 1), name(backup.Whole, 2), name(backup.Lists, 3)
	r.ok(os.Mkdir(filepath.Join(r.server.Folder, other), 0o700))
	r.put(whole, content(1000))
	r.put(other, content(1000))
	r.begin()
	r.fails("it is no file at the server")
	all := content(3000)
	for n := 1000; n <= 3000; n += 1000 {
		r.put(lists, all[:n])
		r.eventually("lists go on", func() bool { return r.Has(lists) == Yes && bytes.Equal(r.at(lists), all[:n]) })
	}
	if r.Has(whole) != Yes || r.Has(other) != No {
		t.Errorf("the server has a backup: %s, and one in the way of a folder: %s", r.Has(whole), r.Has(other))
	}
	r.fails("it is no file at the server")
}

// TestLocalLoss: what is lost in the folder stays at the server. The rule for backups is asked of
// what the server has, and lists that no backup needs go with them.
func TestLocalLoss(t *testing.T) {
	r := newRig(t, nil)
	var all []string
	for n := range 3 {
		all = append(all, name(backup.Whole, 10*n), name(backup.Lists, 10*n+1))
	}
	for _, n := range all {
		r.put(n, content(1000))
	}
	r.times.list = 30 * time.Millisecond
	r.begin()
	r.has(all...)
	for _, n := range all {
		r.ok(os.Remove(filepath.Join(r.folder, n)))
	}
	r.surveyed()
	if got := r.names(); !slices.Equal(got, sorted(all)) {
		t.Errorf("after the loss of the folder: %v", got)
	}
	next := name(backup.Whole, 40) // the fourth: the first goes, and the lists of before the third
	r.put(next, content(1000))
	r.has(next)
	want := []string{all[2], all[3], all[4], all[5], next}
	r.eventually("the server has cleaned", func() bool { return r.at(all[0]) == nil })
	r.surveyed()
	if got := r.names(); !slices.Equal(got, sorted(want)) {
		t.Errorf("at the server: %v, want %v", got, want)
	}
	r.atServer(all[0]+otherSuffix, []byte("of a file that is gone"))
	r.atServer(all[2]+otherSuffix, []byte("of a file that is kept"))
	r.eventually("what was beside goes with the file", func() bool { return r.at(all[0]+otherSuffix) == nil })
	r.surveyed()
	if r.at(all[2]+otherSuffix) == nil {
		t.Error("what is beside a file that is kept was removed")
	}
	r.put(all[0], content(1000)) // would be removed at once
	r.surveyed()
	if r.at(all[0]) != nil || r.Has(all[0]) != No {
		t.Errorf("%s is at the server", all[0])
	}
	if age, _, err := r.Behind(); age != 0 || err != nil {
		t.Errorf("behind %v, %v", age, err)
	}
}

// surveyed waits until the server's folder was looked at, and what is to go is gone.
func (r *rig) surveyed() {
	r.t.Helper()
	marker := name(backup.Lists, 59) + backup.PartSuffix // the last to go, without a file in the folder
	r.atServer(marker, []byte("x"))
	r.eventually("the server's folder was looked at", func() bool { return r.at(marker) == nil })
}

func sorted(names []string) []string { return slices.Sorted(slices.Values(names)) }

// TestUnlike: a file at the server that is not the local one is not believed, whether its length
// or its content is another one, before or while the daemon runs. No content is lost.
func TestUnlike(t *testing.T) {
	r := newRig(t, nil)
	r.keep = 100
	r.times.list = 20 * time.Millisecond
	here, there := map[string][]byte{}, map[string][]byte{}
	damages := []func([]byte) []byte{
		func(b []byte) []byte { return content(len(b)) },
		func(b []byte) []byte { b[0]++; return b },
		func(b []byte) []byte { b[len(b)-1]++; return b },
		func(b []byte) []byte { return b[:len(b)/2] }, // from here on, the length shows the damage
		func(b []byte) []byte { return append(b, 1, 2, 3) },
		func([]byte) []byte { return nil },
		func(b []byte) []byte { return append(b[:len(b)/2], make([]byte, len(b)/4)...) },
	}
	damage := func(from int) {
		for i, change := range damages {
			for _, name := range []string{name(backup.Whole, i), name(backup.Lists, i)} {
				if i >= from {
					there[name] = change(bytes.Clone(here[name]))
					r.atServer(name, there[name])
				}
			}
		}
	}
	healed := func(what string) {
		t.Helper()
		r.eventually(what, func() bool {
			for name, b := range here {
				if !bytes.Equal(r.at(name), b) {
					return false
				}
			}
			return true
		})
	}
	for i := range damages {
		for _, name := range []string{name(backup.Whole, i), name(backup.Lists, i)} {
			here[name] = content(400_000)
			r.put(name, here[name])
			r.shipped[name] = 400_000
		}
	}
	damage(0)
	r.begin()
	healed("the server has the local files")
	for name, b := range there {
		grown := strings.HasSuffix(name, string(backup.Lists)) && bytes.HasPrefix(here[name], b)
		if !grown && !bytes.Equal(r.at(name+otherSuffix), b) {
			t.Errorf("%s: what was at the server is lost", name)
		}
	}
	r.has(slices.Collect(maps.Keys(here))...)
	damage(3)
	healed("the server has them again")
	for name := range here {
		r.ok(os.Remove(filepath.Join(r.server.Folder, name)))
	}
	healed("the server has them a third time")
}

// TestPlainServer: a server without the extensions of OpenSSH gets whole files, too, and another
// file of the same name is no hindrance.
func TestPlainServer(t *testing.T) {
	r := newRig(t, nil)
	r.server.Lack("fsync,posix-rename")
	whole, lists := name(backup.Whole, 1), name(backup.Lists, 2)
	r.put(whole, content(2<<20))
	r.put(lists, content(1000))
	r.atServer(whole, []byte("another"))
	r.atServer(whole+otherSuffix, []byte("one of before"))
	r.begin()
	r.has(whole, lists)
	if first, next := r.at(whole+otherSuffix), r.at(whole+otherSuffix+"-2"); string(first) != "one of before" ||
		string(next) != "another" {
		t.Errorf("beside it: %q and %q", first, next)
	}
}

// TestManyOthers: what is beside a file is never replaced. With too many of them, the file is left
// alone, the state says so, and other files go on.
func TestManyOthers(t *testing.T) {
	r := newRig(t, nil)
	whole, next := name(backup.Whole, 1), name(backup.Whole, 2)
	for n := 1; n <= mostOthers; n++ {
		r.atServer(other(whole, n), []byte(other("", n)))
	}
	r.atServer(whole, []byte("another"))
	r.put(whole, content(1000))
	r.put(next, content(1000))
	r.begin()
	r.fails("and 9 beside it")
	r.eventually("the next backup is there", func() bool { return r.Has(next) == Yes })
	for n := 1; n <= mostOthers; n++ {
		if got := r.at(other(whole, n)); string(got) != other("", n) {
			t.Errorf("%s: %q", other(whole, n), got)
		}
	}
	if string(r.at(whole)) != "another" {
		t.Error("the file was replaced")
	}
	r.ok(os.Remove(filepath.Join(r.server.Folder, other(whole, 3))))
	r.has(whole)
	if string(r.at(other(whole, 3))) != "another" {
		t.Error("what was at the server is lost")
	}
}

// TestNoRemovals: a server that refuses to remove and to replace files gets all the same. One line
// of the log says so.
func TestNoRemovals(t *testing.T) {
	r := newRig(t, nil)
	r.server.Lack("remove,posix-rename")
	r.times.list = 20 * time.Millisecond
	var all []string
	for n := range 6 { // of which three are to be kept
		all = append(all, name(backup.Whole, n))
		r.put(all[n], content(1000))
		if n == 0 {
			r.begin()
		}
		r.has(all[n])
	}
	lists := name(backup.Lists, 7)
	r.put(lists, content(1000))
	r.has(lists)
	r.eventually("one line", func() bool { return r.told("refuses to remove") == 1 })
	if got := r.names(); len(got) != len(all)+1 || r.told("are not carried") > 0 {
		t.Errorf("at the server: %v", got)
	}
}

// TestFuture: names from the future make no backup spare, and newer names at the server do not make
// the folder's newest one spare.
func TestFuture(t *testing.T) {
	r := newRig(t, nil)
	r.times.list = 20 * time.Millisecond
	future := func(s backup.Suffix, after time.Duration) string { return s.Name(id, time.Now().Add(after)) }
	newest := name(backup.Whole, 10)
	kept := []string{name(backup.Whole, 1), name(backup.Lists, 2), name(backup.Whole, 3), name(backup.Lists, 4)}
	for n := range 4 {
		after := 2*skew + time.Duration(n)*time.Minute
		kept = append(kept, future(backup.Whole, after), future(backup.Lists, after))
	}
	spare := name(backup.Whole, 0)
	for _, n := range append(kept, spare) {
		r.atServer(n, content(100))
	}
	r.put(newest, content(100))
	r.begin()
	r.has(newest)
	r.eventually("the oldest goes, by the rule", func() bool { return r.at(spare) == nil })
	if got := r.names(); !slices.Equal(got, sorted(append(kept, newest))) {
		t.Errorf("at the server: %v", got)
	}
	for n := range r.keep {
		r.atServer(future(backup.Whole, skew/2+time.Duration(n)*time.Minute), content(100))
	}
	r.eventually("by the rule, the rest goes", func() bool { return r.at(kept[0]) == nil && r.at(kept[2]) == nil })
	r.ok(os.Remove(filepath.Join(r.server.Folder, newest)))
	r.eventually("the newest is there again", func() bool { return r.at(newest) != nil })
}

// TestNewestFirst: while the server does not take the newest backup, no older one goes.
func TestNewestFirst(t *testing.T) {
	r := newRig(t, nil)
	r.times.list = 20 * time.Millisecond
	for n := range 6 {
		r.atServer(name(backup.Whole, n), content(100))
	}
	newest := name(backup.Whole, 10)
	r.ok(os.Mkdir(filepath.Join(r.server.Folder, newest), 0o700))
	r.put(newest, content(100))
	r.begin()
	r.fails("it is no file at the server")
	r.surveyed()
	r.surveyed()
	if got := r.names(); len(got) != 7 {
		t.Errorf("at the server: %v", got)
	}
	r.ok(os.Remove(filepath.Join(r.server.Folder, newest)))
	r.has(newest)
	r.eventually("the oldest go", func() bool { return len(r.names()) == 3 })
}

// TestMoves: a backup moves when the server has acknowledged more of it than in any attempt, and
// an earlier failure is over then.
func TestMoves(t *testing.T) {
	r := newRig(t, nil)
	r.send("a backup")
	if _, moving, _ := r.Behind(); moving {
		t.Error("it moves before the server has a byte")
	}
	r.send("")
	big := name(backup.Whole, 1)
	r.put(big, content(12<<20))
	r.server.Slow(30 << 20)
	r.server.Cut(3 << 20)
	r.begin()
	r.eventually("it fails", func() bool { return r.told("are not carried") == 1 })
	r.server.Away(false)
	r.server.Cut(9 << 20)
	r.eventually("it moves, and fails again", func() bool { return r.told("are not carried") == 2 })
	r.server.Away(false)
	r.has(big)
}

// TestSlow: a link that can't bring a window within the time of an operation brings a backup.
func TestSlow(t *testing.T) {
	r := newRig(t, nil)
	r.times.within = time.Second
	r.server.Slow(512 << 10)
	r.put(name(backup.Whole, 1), content(window+window/4))
	r.put(name(backup.Lists, 1), content(1000))
	r.begin()
	r.has(name(backup.Whole, 1))
	if r.told("are not carried") > 0 {
		t.Error("it has failed meanwhile")
	}
}

// TestServerText: what a server says at a disconnect is a short line in an error.
func TestServerText(t *testing.T) {
	r := newRig(t, nil)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	r.ok(err)
	defer listener.Close()
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		text := strings.Repeat("\x1b[2J\nlevel=ERROR \u202e", 200)
		payload := append([]byte{1}, ssh.Marshal(struct {
			Reason         uint32
			Text, Language string
		}{2, text, ""})...)
		padding := 16 - (len(payload)+5)%8
		b := binary.BigEndian.AppendUint32([]byte("SSH-2.0-x\r\n"), uint32(len(payload)+1+padding))
		conn.Write(slices.Concat(b, []byte{byte(padding)}, payload, make([]byte, padding)))
		io.Copy(io.Discard, conn)
	}()
	to := r.Mirror.server
	to.Address = listener.Addr().String()
	_, err = to.dial(t.Context(), defaultTimes)
	if err == nil || !strings.Contains(err.Error(), "disconnect, reason 2: ") || len(err.Error()) > 300 ||
		strings.ContainsAny(err.Error(), "\n\x1b\u202e") {
		t.Errorf("%q", err)
	}
}

// TestTalkativeServer: a server that sends without an end is cut off, and costs no memory.
func TestTalkativeServer(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	conn := &meteredConn{Conn: ours}
	conn.left.Store(mostRead)
	go func() {
		for b := make([]byte, 1<<20); ; {
			if _, err := theirs.Write(b); err != nil {
				return
			}
		}
	}()
	n, err := io.Copy(io.Discard, conn)
	if err == nil || !strings.Contains(err.Error(), "more than 8 MiB at once") || n > mostRead+1<<20 {
		t.Errorf("%d bytes, %v", n, err)
	}
	if _, err := ours.Write([]byte("x")); err == nil {
		t.Error("the connection is open")
	}
}

// TestServerHasMore: lists that only the server has are not thrown away, when an older copy of the
// folder was put in place.
func TestServerHasMore(t *testing.T) {
	r := newRig(t, nil)
	lists := name(backup.Lists, 1)
	more := content(5000)
	r.put(lists, more[:3000])
	r.atServer(lists, more)
	r.begin()
	r.eventually("it is told", func() bool { return r.told("keeps it") == 1 && r.Has(lists) == Yes })
	if !bytes.Equal(r.at(lists), more) {
		t.Error("the server has lost lists")
	}
}

const rsaKey = "ssh-rsa " +
	"AAAAB3NzaC1yc2EAAAADAQABAAAAgQC4mS5vYjNlYlYvVw7fQd0rJb2V0m4mZ0aXoWb8l6g7YdT0nq3dWf0q0pQkI1p2j6Wm" +
	"1o7mXvJm0b6mQm4wTzB8qXk1yq7m7l7vJbZ9lq5jV8r0qX8n5wT1ZgqfQxYxM3f3m8c0pJm8q3bQm5nXk0u2h1x5v0lq7m8r2b6kQ4Hh9Q=="

// TestParse refuses addresses and keys with an error for the operator.
func TestParse(t *testing.T) {
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGPHSpuA2hgXhsrWNYjN9sJ7y3vD9v8rVdHnVnqZk5lH"
	s, err := Parse("sftp://backup@[::1]:2222/a/b/", "k", []string{key + " comment"})
	if err != nil || s.Address != "[::1]:2222" || s.User != "backup" || s.Folder != "/a/b" || s.String() !=
		"sftp://backup@[::1]:2222/a/b" {
		t.Errorf("%+v, %v", s, err)
	}
	s, err = Parse("sftp://backup@host/", "k", []string{key})
	if err != nil || s.Address != "host:22" || s.Folder != "/" {
		t.Errorf("%+v, %v", s, err)
	}
	for address, text := range map[string]string{
		"ftp://u@h/f": "is not an address", "sftp://h/f": "names no user", "sftp://u@h": "names no folder",
		"sftp://u:hunter2@h/f": "a password is not used", "sftp://u@h:0/f": "is not an address",
		"sftp://u@h/f?x": "is not an address", "sftp://u@h/%1b[2J": "names no folder", "u@h:/f": "is not an address",
		"sftp://u:hunter2@h:x/f": "is not an address", "sftp://a%20b@h/f": "names no user", "": "is not an address",
	} {
		_, err := Parse(address, "k", []string{key})
		if err == nil || !strings.HasPrefix(err.Error(), "sftp: ") || !strings.Contains(err.Error(), text) ||
			strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%q: %v", address, err)
		}
	}
	for line, text := range map[string]string{
		"": "is not a type and a key", "host " + key: "leave out the host's name",
		key + "\n" + key: "is not a type and a key",
		"sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAIGPHSpuA2hgXhsrWNYjN9sJ7y3vD9v8rVd" +
			"HnVnqZk5lHAAAABHNzaDo=": "is not a host key",
	} {
		_, err := Parse("sftp://u@h/f", "k", []string{line})
		if err == nil || !strings.HasPrefix(err.Error(), "sftp_host_keys") || !strings.Contains(err.Error(), text) {
			t.Errorf("%q: %v", line, err)
		}
	}
	_, err = Parse("sftp://u@h/f", "", []string{key})
	if err == nil || !strings.HasPrefix(err.Error(), "sftp_key_file") {
		t.Error(err)
	}
	if _, err := Parse("sftp://u@h/f", "k", nil); err == nil || !strings.HasPrefix(err.Error(), "sftp_host_keys") {
		t.Error(err)
	}
}
