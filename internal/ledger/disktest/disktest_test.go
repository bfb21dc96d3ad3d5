package disktest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	Serve()
	os.Exit(m.Run())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func TestRecord(t *testing.T) {
	d := New(t)
	in := func(name string) string { return filepath.Join(d.Dir(), name) }
	f := create(t, in("a"))
	_, err := f.WriteAt([]byte("hello"), 10)
	must(t, err)
	must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20))
	var st syscall.Stat_t
	must(t, syscall.Fstat(int(f.Fd()), &st))
	if st.Size != 15 || st.Blocks*512 < 1<<20 {
		t.Errorf("after the allocation %d bytes in %d blocks", st.Size, st.Blocks)
	}
	must(t, f.Sync())
	if n := d.Mark(); n != 4 {
		t.Errorf("mark %d", n)
	}
	must(t, unix.Fallocate(int(f.Fd()), 0, 0, 8192))
	must(t, unix.Fdatasync(int(f.Fd())))
	must(t, f.Truncate(5000))
	const hole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := unix.Fallocate(int(f.Fd()), hole, 0, 4096); err != unix.EOPNOTSUPP {
		t.Errorf("a hole: %v", err)
	}
	must(t, os.Mkdir(in("sub"), 0o755))
	must(t, os.Rename(in("a"), in("sub/b")))
	must(t, os.Link(in("sub/b"), in("c")))
	must(t, os.Remove(in("c")))
	if err := os.Symlink("sub/b", in("c")); !errors.Is(err, unix.ENOTSUP) {
		t.Errorf("a symbolic link: %v", err)
	}
	if err := os.Remove(in("sub")); !errors.Is(err, syscall.ENOTEMPTY) {
		t.Errorf("a folder that isn't empty: %v", err)
	}
	must(t, syncDir(in("sub")))
	must(t, syncDir(d.Dir()))
	_, err = f.WriteAt([]byte("more"), 0) // f was opened under the old name
	must(t, err)
	got, err := os.ReadFile(in("sub/b"))
	must(t, err)
	want := make([]byte, 5000)
	copy(want, "more")
	copy(want[10:], "hello")
	if !bytes.Equal(got, want) {
		t.Errorf("read %q", got)
	}
	g, err := os.OpenFile(in("sub/b"), os.O_RDWR|os.O_TRUNC|os.O_APPEND, 0)
	must(t, err)
	must(t, g.Close())
	if info, err := os.Stat(in("sub/b")); err != nil || info.Size() != 0 {
		t.Errorf("emptied: %v, %v", info, err)
	}
	if _, err := os.Open(in("a")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old name: %v", err)
	}
	must(t, f.Close())
	must(t, os.Remove(in("sub/b")))
	must(t, os.Remove(in("sub")))
	d.Unmount()

	var ops []string
	for _, op := range d.Record().Ops {
		ops = append(ops, op.String())
	}
	if got, want := strings.Join(ops, "\n"), `create a
write a [10 +5)
allocate a [0 +1048576) keep size true
fsync a
allocate a [0 +8192) keep size false
fdatasync a
truncate a to 5000
mkdir sub
rename a to sub/b
link c
unlink c
fsync of folder sub
fsync of folder .
write sub/b [0 +4)
truncate sub/b to 0
unlink sub/b
rmdir sub`; got != want {
		t.Errorf("recorded\n%s", got)
	}
	if marks := d.Record().Marks; !slices.Equal(marks, []int{4}) {
		t.Errorf("marks %v", marks)
	}
}

// TestMap reads a mapped file during writes and garbage collections.
func TestMap(t *testing.T) {
	d := New(t)
	const size = 64 * pageSize
	path := filepath.Join(d.Dir(), "f")
	f := create(t, path)
	must(t, f.Truncate(size))
	for round := range 20 {
		r, err := os.Open(path)
		must(t, err)
		m, err := unix.Mmap(int(r.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
		must(t, err)
		rng := rand.New(rand.NewPCG(1, uint64(round)))
		for range 50 {
			b := bytes.Repeat([]byte{byte(rng.Uint32())}, 1+rng.IntN(3*pageSize))
			off := rng.IntN(size - len(b))
			_, err := f.WriteAt(b, int64(off))
			must(t, err)
			if !bytes.Equal(m[off:off+len(b)], b) {
				t.Fatalf("round %d: the map doesn't show what was written to %d", round, off)
			}
			if rng.IntN(10) == 0 {
				runtime.GC()
			}
		}
		whole, err := os.ReadFile(path)
		must(t, err)
		if !bytes.Equal(whole, m) {
			t.Fatalf("round %d: map and file differ", round)
		}
		must(t, unix.Munmap(m))
		must(t, r.Close())
	}
}

func TestFlock(t *testing.T) {
	d := New(t)
	path := filepath.Join(d.Dir(), "f")
	a, b := create(t, path), create(t, path)
	must(t, unix.Flock(int(a.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	if err := unix.Flock(int(b.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("a lock that is held: %v", err)
	}
	must(t, a.Close())
	must(t, unix.Flock(int(b.Fd()), unix.LOCK_EX|unix.LOCK_NB))
}

// TestMarks checks that an operation whose system call has returned lies before a later mark.
func TestMarks(t *testing.T) {
	d := New(t)
	const writers, writes = 4, 50
	var marks [writers][writes]int
	var wg sync.WaitGroup
	for w := range writers {
		f := create(t, filepath.Join(d.Dir(), fmt.Sprint(w)))
		wg.Go(func() {
			for i := range writes {
				f.WriteAt([]byte{byte(i)}, int64(i))
				f.Sync()
				marks[w][i] = d.Mark()
			}
		})
	}
	wg.Wait()
	r := d.Record()
	for w := range writers {
		syncs := -1 // index of the last fsync found; each write has one
		for i, op := range r.Ops {
			if op.Kind == Sync && op.Path == fmt.Sprint(w) {
				syncs++
				if marks[w][syncs] <= i || marks[w][syncs] > len(r.Ops) {
					t.Fatalf("writer %d: the mark after fsync %d, operation %d, is %d", w, syncs, i, marks[w][syncs])
				}
			}
		}
		if syncs != writes-1 {
			t.Errorf("writer %d: %d syncs", w, syncs+1)
		}
	}
	if len(r.Marks) != writers*writes || !slices.IsSorted(r.Marks) {
		t.Errorf("%d marks, in order: %v", len(r.Marks), slices.IsSorted(r.Marks))
	}
}

func TestFail(t *testing.T) {
	d := New(t)
	path := filepath.Join(d.Dir(), "f")
	f := create(t, path)
	for kind, do := range map[Kind]func() error{
		Create:   func() error { return os.WriteFile(path+"2", nil, 0o600) },
		Write:    func() error { _, err := f.Write([]byte("x")); return err },
		Truncate: func() error { return f.Truncate(1) },
		Allocate: func() error { return unix.Fallocate(int(f.Fd()), 0, 0, 4096) },
		Sync:     f.Sync,
		Datasync: func() error { return unix.Fdatasync(int(f.Fd())) },
		SyncDir:  func() error { return syncDir(d.Dir()) },
		Rename:   func() error { return os.Rename(path, path+"3") },
		Unlink:   func() error { return os.Remove(path) },
		Mkdir:    func() error { return os.Mkdir(path+"5", 0o700) },
	} {
		for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO, syscall.EROFS} {
			before := d.Mark()
			d.Fail(func(op Op) syscall.Errno {
				if op.Kind == kind {
					return errno
				}
				return 0
			})
			if err := do(); !errors.Is(err, errno) {
				t.Errorf("%v: %v", kind, err)
			}
			ops := d.Record().Ops[before:]
			if kind == Sync || kind == Datasync {
				if len(ops) != 1 || ops[0].Kind != FailedSync {
					t.Errorf("%v failed and was recorded as %v", kind, ops)
				}
			} else if len(ops) > 0 {
				t.Errorf("%v failed and was recorded as %v", kind, ops)
			}
		}
	}
	if info, err := f.Stat(); err != nil || info.Size() != 0 {
		t.Errorf("a failed operation has changed the file: %v, %v", info, err)
	}
	var asked atomic.Int64
	d.Fail(func(Op) syscall.Errno { asked.Add(1); return 0 })
	_, err := f.Write([]byte("x"))
	must(t, err)
	d.Fail(nil)
	must(t, f.Sync())
	if asked.Load() != 1 {
		t.Errorf("asked %d times", asked.Load())
	}
}

// contents lists a directory tree: names, modes, sizes and hashes.
func contents(dir string) (string, error) {
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		fmt.Fprintf(&b, "%s %v", name, e.IsDir())
		if !e.IsDir() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			info, err := e.Info()
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %v %d bytes %x", info.Mode(), len(data), sha256.Sum256(data))
		}
		b.WriteString("\n")
		return nil
	})
	return b.String(), err
}

// randomOps runs n random operations in the directory and calls after once per operation.
func randomOps(t *testing.T, dir string, rng *rand.Rand, n int, after func()) {
	t.Helper()
	must(t, os.Mkdir(filepath.Join(dir, "sub"), 0o700))
	for range n {
		name := func() string {
			return filepath.Join(dir, []string{"a", "b", "sub/a", "sub/b"}[rng.IntN(4)])
		}
		switch p := name(); rng.IntN(9) {
		case 0:
			os.Rename(p, name())
		case 8:
			os.Link(p, name())
		case 1:
			os.Remove(p)
		case 2:
			must(t, syncDir(filepath.Dir(p)))
		default:
			f, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE, []os.FileMode{0o600, 0o400}[rng.IntN(2)])
			must(t, err)
			switch rng.IntN(4) {
			case 0:
				must(t, f.Truncate(rng.Int64N(20_000)))
			case 1:
				must(t, f.Sync())
			default:
				b := bytes.Repeat([]byte{byte('a' + rng.IntN(26))}, 1+rng.IntN(9_000))
				_, err := f.WriteAt(b, rng.Int64N(12_000))
				must(t, err)
			}
			must(t, f.Close())
		}
		after()
	}
}

// TestAllSurvives checks two things. The crash state with all operations equals the directory the
// program saw, at each mark. And a scratch directory that held an earlier crash state equals a
// fresh one.
func TestAllSurvives(t *testing.T) {
	d := New(t)
	saw := map[int]string{}
	randomOps(t, d.Dir(), rand.New(rand.NewPCG(1, 2)), 150, func() {
		text, err := contents(d.Dir())
		must(t, err)
		saw[d.Mark()] = text
	})
	r := d.Record()
	met := map[int]bool{}
	root := scratch(t)
	used := newScratchDir(root)
	for c := range r.cuts(Options{States: 15, Total: 1 << 20, Seed: 1}) {
		fresh := newScratchDir(root)
		must(t, fresh.put(c.state))
		want, err := contents(fresh.dir)
		must(t, err)
		must(t, os.RemoveAll(fresh.dir))
		must(t, used.put(c.state))
		got, err := contents(used.dir)
		must(t, err)
		if got != want {
			t.Fatalf("state %d differs in a scratch directory that was used before", c.number)
		}
		switch c.number % 7 { // changes that a check might make
		case 0:
			os.WriteFile(filepath.Join(used.dir, "a"), []byte("overwritten"), 0o600)
		case 1:
			os.RemoveAll(filepath.Join(used.dir, "sub"))
		case 2:
			os.Rename(filepath.Join(used.dir, "a"), filepath.Join(used.dir, "b"))
		case 3:
			if f, err := os.OpenFile(filepath.Join(used.dir, "b"), os.O_RDWR, 0); err == nil {
				f.WriteAt([]byte("here"), 100)
				f.Close()
			}
		}
		if text, ok := saw[c.at]; ok && !met[c.at] {
			met[c.at] = true // the first crash state of a cut has all operations
			if want != text {
				t.Fatalf("after operation %d the program saw\n%s\nand the disk with all operations has\n%s",
					c.at, text, want)
			}
		}
	}
	if len(met) < 100 {
		t.Errorf("compared at %d marks only", len(met))
	}
}
