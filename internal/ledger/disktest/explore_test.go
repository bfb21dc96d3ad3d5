package disktest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// valueFile keeps a value in a file and replaces the file for each new value. without names the
// fsync left out: "file", "folder", or "" for none.
type valueFile struct{ dir, without string }

func (s valueFile) set(value byte) error {
	f, err := os.Create(filepath.Join(s.dir, "value.tmp"))
	if err != nil {
		return err
	}
	defer f.Close()
	for range 3 { // pages
		if _, err := f.Write(slices.Repeat([]byte{value}, pageSize)); err != nil {
			return err
		}
	}
	if s.without != "file" {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if err := os.Rename(f.Name(), filepath.Join(s.dir, "value")); err != nil {
		return err
	}
	if s.without != "folder" {
		return syncDir(s.dir)
	}
	return nil
}

func (s valueFile) get() (byte, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, "value"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err == nil && (len(b) != 3*pageSize || !slices.Equal(b, slices.Repeat(b[:1], len(b)))) {
		err = fmt.Errorf("%d bytes, not of one value", len(b))
	}
	if err != nil {
		return 0, err
	}
	return b[0], nil
}

func TestValueFile(t *testing.T) {
	for _, without := range []string{"", "file", "folder"} {
		t.Run("without "+without, func(t *testing.T) {
			d := New(t)
			var marks []int
			for i := range 20 {
				if err := (valueFile{d.Dir(), without}).set(byte(i + 1)); err != nil {
					t.Fatal(err)
				}
				marks = append(marks, d.Mark())
			}
			d.Unmount()
			check := func(dir string, at int) error {
				acknowledged := byte(0)
				for _, m := range marks {
					if m <= at {
						acknowledged++
					}
				}
				v, err := valueFile{dir: dir}.get()
				if err == nil && (v < acknowledged || v > acknowledged+1) {
					err = fmt.Errorf("value %d, but %d was set", v, acknowledged)
				}
				return err
			}
			result := Search(t, d.Record(), Options{Seed: 1}, check)
			if bad := len(result.Violations) > 0; bad != (without != "") || !bad && result.States < 500 {
				t.Errorf("%+v", result)
			}
			if n := len(result.Violations); n >= maxViolations+2*runtime.GOMAXPROCS(0) {
				t.Errorf("the search continued to %d violations", n)
			}
			for _, v := range result.Violations {
				again := Search(t, d.Record(), v.Options, check)
				if again.States != 1 || len(again.Violations) != 1 || again.Violations[0].String() != v.String() {
					t.Errorf("%v\nand again it is\n%+v", v, again)
				}
			}
		})
	}
}

// TestCheckPanics checks that a memory fault in check becomes a violation, and that the directory
// of a violation is not used again.
func TestCheckPanics(t *testing.T) {
	ops := append(began("a", "A"), wrote("a", 0, "B"), wrote("a", 1, "B"))
	var dirs []string
	result := Search(t, Record{Ops: ops}, Options{Workers: 1}, func(dir string, at int) error {
		if slices.Contains(dirs, dir) {
			return fmt.Errorf("%s again", dir)
		}
		if at < 4 {
			return nil
		}
		dirs = append(dirs, dir)
		f, err := os.Open(filepath.Join(dir, "a"))
		if err != nil {
			return err
		}
		defer f.Close()
		m, err := unix.Mmap(int(f.Fd()), 0, 2*pageSize, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		defer unix.Munmap(m)
		return fmt.Errorf("read %d", m[pageSize])
	})
	if len(result.Violations) < maxViolations {
		t.Fatalf("%+v", result)
	}
	for _, v := range result.Violations {
		if !strings.Contains(v.Err.Error(), "panic") {
			t.Error(v)
		}
	}
}

// fill commits n transactions to a database on d and sets a mark after each.
func fill(t *testing.T, d *Disk, o bolt.Options, n int) (marks []int) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(d.Dir(), "db"), 0o600, &o)
	if err != nil {
		t.Fatal(err)
	}
	if err := syncDir(d.Dir()); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	marks = append(marks, d.Mark())
	for i := range n {
		if err := db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists([]byte("b"))
			if err != nil {
				return err
			}
			key, value := binary.BigEndian.AppendUint64(nil, uint64(i)), make([]byte, 100+rng.IntN(2000))
			if err := b.Put(key, value); err != nil {
				return err
			}
			if i%10 == 9 { // frees pages of the old value, so that bbolt uses freed pages
				return b.Put([]byte("big"), make([]byte, rng.IntN(30_000)))
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		marks = append(marks, d.Mark())
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return marks
}

// check returns a check that opens the database and finds every transaction committed before the
// cut.
func check(marks []int) func(string, int) error {
	return func(dir string, at int) (err error) {
		committed, _ := slices.BinarySearch(marks, at+1)
		if committed == 0 {
			return nil // bbolt creates its file in place, so a cut may leave half a file
		}
		committed--
		db, err := bolt.Open(filepath.Join(dir, "db"), 0o600, &bolt.Options{Timeout: time.Second, ReadOnly: false})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, db.Close()) }()
		return db.View(func(tx *bolt.Tx) error {
			var bad error
			for err := range tx.Check() { // no break: Check reads until the channel is drained
				bad = err
			}
			if bad != nil {
				return bad
			}
			b := tx.Bucket([]byte("b"))
			for i := range committed {
				if b == nil || b.Get(binary.BigEndian.AppendUint64(nil, uint64(i))) == nil {
					return fmt.Errorf("transaction %d of %d is lost", i, committed)
				}
			}
			return nil
		})
	}
}

func TestBolt(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options bolt.Options
		search  Options
		bad     bool
	}{
		{"as it is", bolt.Options{}, Options{Total: 8000}, false},
		{"without its list of free pages", bolt.Options{NoFreelistSync: true}, Options{Total: 1500}, false},
		{"without fsync", bolt.Options{NoSync: true}, Options{}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := New(t)
			marks := fill(t, d, tt.options, 200)
			d.Unmount()
			expect(t, d, tt.search, marks, tt.bad)
		})
	}
}

// TestFailedSync opens and fills a database again after the fsync of a meta page has failed. A cut
// may then damage the database.
func TestFailedSync(t *testing.T) {
	d := New(t)
	marks := fill(t, d, bolt.Options{}, 20)
	db, err := bolt.Open(filepath.Join(d.Dir(), "db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	put := func(tx *bolt.Tx) error { return tx.Bucket([]byte("b")).Put([]byte("k"), make([]byte, 1000)) }
	var last Op
	d.Fail(func(op Op) (errno syscall.Errno) {
		if op.Kind == Datasync && last.Kind == Write && last.Offset < 2*pageSize {
			errno = syscall.EIO
		}
		last = op
		return errno
	})
	if err := db.Update(put); !errors.Is(err, syscall.EIO) {
		t.Fatalf("an update of which the fsync fails: %v", err)
	}
	d.Fail(nil)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	marks = append(marks, fill(t, d, bolt.Options{}, 20)...)
	d.Unmount()
	expect(t, d, Options{}, marks[:21], true)
}

// expect searches for violations. A true bad means that the search must find some.
func expect(t *testing.T, d *Disk, o Options, marks []int, bad bool) {
	t.Helper()
	start := time.Now()
	o.Seed = 1
	result := Search(t, d.Record(), o, check(marks))
	took := time.Since(start)
	t.Logf("%d cuts, %d states, %v each", result.Cuts, result.States, took/time.Duration(result.States))
	for _, v := range result.Violations {
		t.Log(v)
	}
	if found := len(result.Violations) > 0; found != bad {
		t.Errorf("violations found: %v, want %v", found, bad)
	}
}
