package backup_test

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/internal/backup"

	"filippo.io/age"
)

// shipping is a Shipper with a folder.
type shipping struct {
	*backup.Shipper
	t      *testing.T
	folder string
	log    logOf
	id     *age.X25519Identity
	next   uint64
}

func newShipping(t *testing.T) *shipping {
	t.Helper()
	s := &shipping{t: t, folder: t.TempDir(), log: newLog(t), id: identity(t), next: 101}
	s.again()
	return s
}

// again is another start of the daemon.
func (s *shipping) again() {
	s.t.Helper()
	ship, err := backup.NewShipper(s.folder, []backup.Recipient{s.id.Recipient()}, slog.New(slog.DiscardHandler))
	if err != nil {
		s.t.Fatal(err)
	}
	s.Shipper = ship
	ship.Begin(s.log.log.ID())
	ship.Expect()
}

// base notes a backup with all lists until now.
func (s *shipping) base() { s.Base(s.next-1, 1) }

func text(number uint64) []byte { return fmt.Appendf(nil, "the list %d", number) }

// take gives the Shipper the next lists.
func (s *shipping) take(n int) {
	for range n {
		s.Take(s.next, text(s.next))
		s.next++
	}
}

func (s *shipping) manifest(last uint64) backup.Manifest {
	m := s.log.manifest()
	m.Lists, m.ListsKey = last, hex.EncodeToString(s.PublicKey())
	return m
}

// read reads the lists after a backup with the lists to last, and checks that each is what it was.
func (s *shipping) read(last, until uint64, ids ...age.Identity) (backup.Shipped, error) {
	s.t.Helper()
	return readLists(s.t, s.manifest(last), s.folder, until, append(ids, s.id)...)
}

func readLists(
	t *testing.T, m backup.Manifest, folder string, until uint64, ids ...age.Identity,
) (backup.Shipped, error) {
	t.Helper()
	next := m.Lists + 1
	got, err := backup.ReadLists(m, folder, ids, until, func(lists [][]byte) error {
		for _, l := range lists {
			if string(l) != string(text(next)) {
				t.Errorf("list %d is %q", next, l)
			}
			next++
		}
		return nil
	})
	if got.Last != next-1 {
		t.Errorf("the last list is said to be %d, and is %d", got.Last, next-1)
	}
	return got, err
}

func (s *shipping) files() []string {
	s.t.Helper()
	files, err := filepath.Glob(filepath.Join(s.folder, "*.lists"))
	if err != nil {
		s.t.Fatal(err)
	}
	return files
}

// TestLists ships lists of several starts and files, and reads them from each backup to each list.
func TestLists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShipping(t)
		for range 4 {
			s.take(3)
			time.Sleep(2 * time.Second)
		}
		s.Base(106, 1)
		s.take(5)
		time.Sleep(2 * time.Second)
		s.Close()
		if n := len(s.files()); n != 2 {
			t.Errorf("%d files, with a backup in between", n)
		}
		for last := uint64(100); last <= 117; last++ {
			for _, until := range []uint64{0, last, last + 1, 112, 116, 117, 118, math.MaxUint64} {
				got, err := s.read(last, until)
				if want := max(last, min(until, 117)); err != nil || got.Last != want && want <= 117 {
					t.Errorf("a backup with %d lists, until %d: %+v, %v", last, until, got, err)
				}
			}
		}
		if got, err := s.read(99, math.MaxUint64); err != nil || got.Last != 99 || len(got.Notes) != 1 {
			t.Errorf("a backup of before the first list: %+v, %v", got, err)
		}
		_, err := readLists(t, s.manifest(100), s.folder, math.MaxUint64, identity(t))
		if !errors.Is(err, backup.ErrRecipient) {
			t.Errorf("another recipient: %v", err)
		}
		old := s.manifest(100)
		time.Sleep(time.Second)
		s.again()
		s.take(2)
		time.Sleep(2 * time.Second)
		s.Close()
		got, err := readLists(t, old, s.folder, math.MaxUint64, s.id)
		if err != nil || got.Last != 117 || len(got.Notes) != 1 {
			t.Errorf("after another start: %+v, %v", got, err)
		}
		if got, err := s.read(117, math.MaxUint64); err != nil || got.Last != 119 || len(got.Files) != 1 {
			t.Errorf("of the other start: %+v, %v", got, err)
		}
	})
}

// TestForeignReader reads lists with Node and Debian's age, by the words of docs/SPEC.md.
func TestForeignReader(t *testing.T) {
	for _, tool := range []string{"node", "age"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("REQUIRE_DEVICES") != "" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
	s := newShipping(t)
	want := ""
	for n := range 2 {
		for i := range uint64(3) {
			want += fmt.Sprintf("%d %x\n", s.next+i, text(s.next+i))
		}
		s.take(3)
		eventually(t, func() bool {
			behind, err := s.Behind()
			if n == 0 {
				s.base()
			}
			return behind == 0 && err == nil
		})
	}
	s.Close()
	identity := filepath.Join(t.TempDir(), "identity")
	if err := os.WriteFile(identity, []byte(s.id.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := ""
	for _, file := range s.files() {
		cmd := exec.Command("node", "testdata/lists.js", file, identity)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		got += string(out)
	}
	if got != want {
		t.Errorf("Node has read\n%s\nwant\n%s", got, want)
	}
}

func eventually(t *testing.T, holds func() bool) {
	t.Helper()
	for began := time.Now(); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > 30*time.Second {
			t.Fatal("not within 30 s")
		}
	}
}

// TestEveryByteOfListsCounts flips each byte of a file of lists, and cuts the file at each length:
// no list is another then, and none is left out before the last one.
func TestEveryByteOfListsCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShipping(t)
		ends := []int64{}
		for range 3 {
			s.take(2)
			time.Sleep(2 * time.Second)
			info, err := os.Stat(s.files()[0])
			if err != nil {
				t.Fatal(err)
			}
			ends = append(ends, info.Size())
		}
		s.Close()
		path := s.files()[0]
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		write := func(b []byte) {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for i := range whole {
			b := bytes.Clone(whole)
			b[i] ^= 1 << (i % 8)
			write(b)
			if got, err := s.read(100, math.MaxUint64); !errors.Is(err, backup.ErrLists) {
				t.Fatalf("byte %d is another: %+v, %v", i, got, err)
			}
		}
		for n := range whole {
			lists := 100
			for _, end := range ends {
				if int64(n) >= end {
					lists += 2
				}
			}
			for _, zeros := range []int{0, 1, 100} {
				write(append(bytes.Clone(whole[:n]), make([]byte, zeros)...))
				got, err := s.read(100, math.MaxUint64)
				// Zeros fill up a head or a record that was begun.
				inside := !slices.Contains(ends, int64(n)) && n != 0 && n != 53
				if zeros > 0 && inside && errors.Is(err, backup.ErrLists) {
					continue
				}
				if err != nil || got.Last != uint64(lists) {
					t.Fatalf("cut after %d bytes, with %d zeros: %+v, %v", n, zeros, got, err)
				}
			}
		}
		first, second := whole[:ends[0]], whole[ends[0]:ends[1]]
		third, head := whole[ends[1]:], whole[:53]
		for name, b := range map[string][]byte{
			"without the second": slices.Concat(first, third),
			"turned round":       slices.Concat(first, third, second),
		} {
			write(b)
			if got, err := s.read(100, math.MaxUint64); !errors.Is(err, backup.ErrLists) || got.Last != 102 {
				t.Errorf("%s: %+v, %v", name, got, err)
			}
		}
		write(slices.Concat(head, second, third)) // as after a newer backup
		if got, err := s.read(100, math.MaxUint64); err != nil || got.Last != 100 || len(got.Notes) != 1 {
			t.Errorf("without the first: %+v, %v", got, err)
		}
		write(slices.Concat(first, first[53:], second, second, third))
		if got, err := s.read(100, math.MaxUint64); err != nil || got.Last != 106 {
			t.Errorf("records twice: %+v, %v", got, err)
		}
	})
}

// TestForgedLists: whoever has the recipients alone can't write lists for a backup.
func TestForgedLists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShipping(t)
		s.take(1)
		time.Sleep(2 * time.Second)
		s.Close()
		m := s.manifest(100)
		genuine, err := os.ReadFile(s.files()[0])
		if err != nil {
			t.Fatal(err)
		}
		s.again() // with another key
		s.next = 102
		s.take(1)
		time.Sleep(2 * time.Second)
		s.Close()
		files := s.files()
		forged, err := os.ReadFile(files[1])
		if err != nil {
			t.Fatal(err)
		}
		if got, err := readLists(t, m, s.folder, math.MaxUint64, s.id); err != nil || got.Last != 101 {
			t.Errorf("a list with another key: %+v, %v", got, err)
		}
		for name, b := range map[string][]byte{
			"behind the genuine record": slices.Concat(genuine, forged[53:]),
			"with the genuine head":     slices.Concat(genuine[:53], forged[53:]),
		} {
			if err := os.WriteFile(files[1], b, 0o600); err != nil {
				t.Fatal(err)
			}
			if got, err := readLists(t, m, s.folder, math.MaxUint64, s.id); !errors.Is(err, backup.ErrLists) {
				t.Errorf("%s: %+v, %v", name, got, err)
			}
		}
	})
}

// behindOf compares what a Shipper says.
func (s *shipping) behindOf(when string, age time.Duration, needs, failing bool) {
	s.t.Helper()
	got, err := s.Behind()
	if got.Round(time.Second) != age || s.NeedsBase() != needs || (err != nil) != failing {
		s.t.Errorf("%s: behind %v (%v), needs a backup: %v; want %v, %v", when, got, err, s.NeedsBase(), age, needs)
	}
}

// reads checks that the lists of the last n numbers follow.
func (s *shipping) reads(when string, n uint64) {
	s.t.Helper()
	if got, err := s.read(s.next-1-n, math.MaxUint64); err != nil || got.Last != s.next-1 {
		s.t.Errorf("%s: %+v, %v; want to %d", when, got, err, s.next-1)
	}
}

// flood gives the Shipper more lists than it keeps.
func (s *shipping) flood() {
	big := make([]byte, 1<<20)
	for range 70 {
		s.Take(s.next, big)
		s.next++
	}
}

// away calls do with the folder away.
func (s *shipping) away(do func()) {
	s.t.Helper()
	if err := os.Rename(s.folder, s.folder+".away"); err != nil {
		s.t.Fatal(err)
	}
	do()
	if err := os.Rename(s.folder+".away", s.folder); err != nil {
		s.t.Fatal(err)
	}
}

// TestBehind follows the age of what a restore would lose: without a backup, with one, with a
// folder that takes no files, and after too many lists.
func TestBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShipping(t)
		s.NoBase()
		s.behindOf("before the first list", 0, false, false)
		s.take(1)
		<-s.Needed()
		time.Sleep(10 * time.Second)
		s.behindOf("without a backup", 10*time.Second, true, false)
		s.take(1)
		select {
		case <-s.Needed():
			t.Error("a backup is said to be needed at each list")
		default:
		}
		if files := s.files(); len(files) != 0 {
			t.Errorf("lists without a backup: %v", files)
		}
		s.Expect()
		s.take(1)
		s.NoBase()
		s.behindOf("after a backup that failed", 10*time.Second, true, false)
		s.Expect()
		s.take(1)
		s.Base(s.next-2, 1)
		time.Sleep(2 * time.Second)
		s.behindOf("with a backup", 0, false, false)
		s.reads("with a backup", 1)
		s.take(3)
		time.Sleep(10 * time.Second)
		s.behindOf("later", 0, false, false)

		s.away(func() {
			s.take(3)
			time.Sleep(30 * time.Second)
			s.behindOf("with the folder away", 30*time.Second, false, true)
		})
		time.Sleep(10 * time.Second)
		s.behindOf("with the folder back", 0, false, false)
		s.reads("with the folder back", 7)

		s.away(func() {
			s.take(1)
			time.Sleep(time.Minute)
			s.flood()
			s.behindOf("after too many lists", time.Minute, true, true)
			<-s.Needed()
			for range 3 { // the backup has its place, and the lists have none
				s.base()
				s.take(1)
				time.Sleep(30 * time.Second)
				s.behindOf("with a backup of what was dropped", 30*time.Second, false, true)
			}
			s.flood()
		})
		time.Sleep(20 * time.Second)
		<-s.Needed()
		s.behindOf("with what was dropped again", 20*time.Second, true, false)
		s.base()
		s.behindOf("with a backup of that", 0, false, false)
		s.take(1)
		time.Sleep(2 * time.Second)
		s.reads("after the gap", 1)

		s.Take(s.next, make([]byte, 33<<20)) // longer than any list that is kept
		s.next++
		s.behindOf("after a long list", 0, true, false)
		s.take(2)
		s.base()
		s.take(1)
		time.Sleep(2 * time.Second)
		s.behindOf("with a backup of the long list", 0, false, false)
		s.reads("after the long list", 1)
		s.Close()
	})
}

// TestFirstList: the first list of an old ledger has the number 1.
func TestFirstList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShipping(t)
		s.NoBase()
		s.next = 1
		s.take(1)
		s.behindOf("without a backup", 0, true, false)
		s.Expect()
		s.Base(1, 1)
		s.take(2)
		time.Sleep(2 * time.Second)
		s.behindOf("with a backup", 0, false, false)
		s.reads("after the first list", 2)
		s.Close()
	})
}

// TestLostLists removes and changes files under a Shipper, which says so and needs a backup, also
// when nothing is written meanwhile.
func TestLostLists(t *testing.T) {
	lose := map[string]func(t *testing.T, files []string) error{
		"the file of during the backup": func(_ *testing.T, files []string) error { return os.Remove(files[0]) },
		"the present file":              func(_ *testing.T, files []string) error { return os.Remove(files[1]) },
		"a part of the present file":    func(_ *testing.T, files []string) error { return os.Truncate(files[1], 60) },
		"the file, for a copy of it": func(_ *testing.T, files []string) error {
			b, err := os.ReadFile(files[1])
			return errors.Join(err, os.Remove(files[1]), os.WriteFile(files[1], b, 0o600))
		},
	}
	for name, lose := range lose {
		synctest.Test(t, func(t *testing.T) {
			s := newShipping(t)
			s.take(2)
			time.Sleep(2 * time.Second)
			s.Base(s.next-2, 1)
			s.take(1)
			time.Sleep(2 * time.Second)
			s.behindOf("before", 0, false, false)
			if err := lose(t, s.files()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Second)
			<-s.Needed()
			if age, _ := s.Behind(); age < 4*time.Second || !s.NeedsBase() { // noticed within a second
				t.Errorf("%s is lost: behind %v, needs a backup: %v", name, age, s.NeedsBase())
			}
			s.base()
			s.take(1)
			time.Sleep(2 * time.Second)
			s.behindOf(name+" is lost, with another backup", 0, false, false)
			if name != "a part of the present file" { // the damage is still there
				s.reads(name+" is lost", 1)
			}
			s.Lost()
			<-s.Needed()
			time.Sleep(3 * time.Second)
			s.behindOf("without the backup", 3*time.Second, true, false)
			s.base()
			s.behindOf("with the next backup", 0, false, false)
			s.Close()
		})
	}
}

// TestLostUnderLoad: lists that never stop do not hide the loss of their file, and share records.
func TestLostUnderLoad(t *testing.T) {
	s := newShipping(t)
	s.base()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Microsecond):
				s.take(1)
			}
		}
	}()
	eventually(t, func() bool { return len(s.files()) == 1 })
	if err := os.Remove(s.files()[0]); err != nil {
		t.Error(err)
	}
	eventually(t, s.NeedsBase)
	close(stop)
	<-done
	s.Close()
}

// TestManyLists: a backup is needed when many lists follow the newest one.
func TestManyLists(t *testing.T) {
	defer backup.SetMost(1 << 20)()
	synctest.Test(t, func(t *testing.T) {
		s := newShipping(t)
		s.take(1)
		s.base()
		time.Sleep(2 * time.Second)
		random := make([]byte, 64<<10)
		rand.Read(random)
		for range 16 {
			s.behindOf("before", 0, false, false)
			s.Take(s.next, random)
			s.next++
			time.Sleep(2 * time.Second)
		}
		<-s.Needed()
		s.behindOf("after a MiB", 0, true, false)
		s.base()
		s.behindOf("with another backup", 0, false, false)
		s.Close()
	})
}

// TestDamagedFiles: a file that is no file of lists, or is damaged, does not keep the lists of the
// others back, but is named.
func TestDamagedFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShipping(t)
		s.take(2)
		time.Sleep(2 * time.Second)
		s.Close()
		for name, content := range map[string]string{
			"a byte": "x", "text": strings.Repeat("text", 100),
			"a damaged record": "countersign-lists-v1\n" + strings.Repeat("k", 200),
		} {
			path := filepath.Join(s.folder, backup.Lists.Name(s.log.log.ID(), time.Now().Add(-time.Hour)))
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := s.read(100, math.MaxUint64)
			named := err != nil && strings.Contains(err.Error(), filepath.Base(path))
			if !errors.Is(err, backup.ErrLists) || !named || got.Last != 102 {
				t.Errorf("%s: %+v, %v", name, got, err)
			}
			for _, until := range []uint64{0, 100, 101, 102} {
				if got, err := s.read(100, until); err != nil || got.Last != max(100, until) {
					t.Errorf("%s, until %d: %+v, %v", name, until, got, err)
				}
			}
		}
	})
}

// TestOldDamage: damage and a torn end among lists that the backup has keep no later lists back.
func TestOldDamage(t *testing.T) {
	for _, torn := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := newShipping(t)
			s.take(2)
			time.Sleep(2 * time.Second)
			info, err := os.Stat(s.files()[0])
			if err != nil {
				t.Fatal(err)
			}
			s.take(2)
			time.Sleep(2 * time.Second)
			s.base()
			s.take(5)
			time.Sleep(3 * time.Second)
			s.Close()
			b, err := os.ReadFile(s.files()[0])
			if err != nil {
				t.Fatal(err)
			}
			if b[info.Size()+3] ^= 1; torn {
				b = b[:info.Size()+30]
				b[info.Size()+3] ^= 1
			}
			if err := os.WriteFile(s.files()[0], b, 0o600); err != nil {
				t.Fatal(err)
			}
			if got, err := s.read(104, math.MaxUint64); got.Last != 109 || torn != (err == nil) ||
				!torn && !strings.Contains(err.Error(), "moved away") {
				t.Errorf("torn %v: %+v, %v", torn, got, err)
			}
			if got, err := s.read(104, 109); err != nil || got.Last != 109 {
				t.Errorf("torn %v, until 109: %+v, %v", torn, got, err)
			}
		})
	}
}

// TestPruneKeepsNeededLists: with a clock that was set back, a file of now has a name of before
// another one, and stays.
func TestPruneKeepsNeededLists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShipping(t)
		for range 3 {
			s.take(1)
			time.Sleep(2 * time.Second)
			s.base()
			s.take(1)
			time.Sleep(2 * time.Second)
		}
		later := time.Now().Add(time.Hour)
		path := filepath.Join(s.folder, backup.Lists.Name(s.log.log.ID(), later))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		before := s.files()
		if err := s.Prune(later.Add(time.Hour)); err != nil || len(before) != 5 {
			t.Fatalf("%v, %v", before, err)
		}
		if after := s.files(); !slices.Equal(after, before[1:]) {
			t.Errorf("left are %v of %v", after, before)
		}
		s.Close()
	})
}

// TestPruneLists keeps what a backup needs.
func TestPruneLists(t *testing.T) {
	s := newShipping(t)
	s.Close()
	folder, id := s.folder, s.log.log.ID()
	const other = "fedcba9876543210"
	at := func(minute int) time.Time { return time.Date(2026, 11, 30, 12, minute, 0, 0, time.UTC) }
	for _, minute := range []int{0, 10, 20, 30} {
		for _, of := range []string{id, other} {
			if err := os.WriteFile(filepath.Join(folder, backup.Lists.Name(of, at(minute))), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		made time.Time
		want string // minutes of the files that stay
	}{
		{at(0), "00 10 20 30"}, {at(10), "00 10 20 30"}, {at(10).Add(time.Second), "10 20 30"}, {at(15), "10 20 30"},
		{at(30), "20 30"}, {at(59), "30"},
	} {
		if err := s.Prune(c.made); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(folder)
		if err != nil {
			t.Fatal(err)
		}
		var mine []string
		others := 0
		for _, e := range entries {
			if begun, ok := backup.Lists.Begun(e.Name(), id); ok {
				mine = append(mine, begun.Format("04"))
			} else {
				others++
			}
		}
		if got := strings.Join(mine, " "); got != c.want || others != 4 {
			t.Errorf("for a backup of %s, %s stay, and %d of another appliance", c.made.Format("04:05"), got, others)
		}
	}
}
