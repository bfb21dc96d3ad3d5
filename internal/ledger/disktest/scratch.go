package disktest

import (
	"cmp"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// scratch makes a directory for crash states: in memory under /dev/shm, else on disk.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "disktest")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// scratchDir is a directory that holds one crash state after the other. Pages equal to those of the
// previous crash state are not written again.
type scratchDir struct {
	dir   string
	files map[string]laidFile
}

// laidFile is a file as put has written it. A modification time other than untouched shows a later
// write by check.
type laidFile struct {
	content
	inode uint64
}

var untouched = time.Unix(1e9, 0)

var zeros page

func newScratchDir(root string) *scratchDir {
	dir, err := os.MkdirTemp(root, "")
	if err != nil {
		dir = filepath.Join(root, "missing") // put returns the error
	}
	return &scratchDir{dir, map[string]laidFile{}}
}

// put makes the directory hold the crash state s, and nothing else.
func (f *scratchDir) put(s *state) error {
	wanted := map[string]bool{".": true}
	for _, p := range s.dirs {
		wanted[p] = true
	}
	err := filepath.WalkDir(f.dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(f.dir, p)
		if _, file := s.files[name]; e.Type().IsRegular() && file || e.IsDir() && wanted[name] {
			return nil
		}
		if err := os.RemoveAll(p); err != nil {
			return err
		}
		if e.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, p := range s.dirs {
		if err := os.Mkdir(filepath.Join(f.dir, p), 0o700); err != nil && !os.IsExist(err) {
			return err
		}
	}
	for p, c := range s.files {
		if err := f.putFile(p, c); err != nil {
			return err
		}
	}
	return nil
}

func (f *scratchDir) putFile(name string, c content) error {
	old := f.files[name]
	delete(f.files, name)
	p := filepath.Join(f.dir, name)
	var st syscall.Stat_t
	if err := syscall.Lstat(p, &st); err != nil || st.Ino != old.inode ||
		st.Mtim.Nano() != untouched.UnixNano() || st.Nlink > 1 {
		os.Remove(p)
		old = laidFile{}
	}
	file, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	if old.inode == 0 || old.size != c.size {
		if err := file.Truncate(c.size); err != nil {
			return err
		}
	}
	for i := 0; i < len(c.pages); {
		from, run := i, [][]byte(nil)
		for ; i < len(c.pages) && c.pages[i] != old.pages.at(i) && len(run) < 1024; i++ {
			run = append(run, cmp.Or(c.pages[i], &zeros).data[:min(pageSize, c.size-int64(i)*pageSize)])
		}
		if len(run) == 0 {
			i++
			continue
		}
		if err := pwritev(int(file.Fd()), run, int64(from)*pageSize); err != nil {
			return &os.PathError{Op: "write", Path: p, Err: err}
		}
	}
	if err := file.Chmod(fs.FileMode(c.mode)); err != nil {
		return err
	}
	if err := os.Chtimes(p, untouched, untouched); err != nil {
		return err
	}
	if err := syscall.Fstat(int(file.Fd()), &st); err != nil {
		return err
	}
	f.files[name] = laidFile{c, st.Ino}
	return nil
}

func pwritev(fd int, run [][]byte, off int64) error {
	total := 0
	for _, b := range run {
		total += len(b)
	}
	n, err := unix.Pwritev(fd, run, off)
	if err == nil && n < total {
		err = syscall.ENOSPC
	}
	return err
}
