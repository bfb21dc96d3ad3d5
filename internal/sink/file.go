package sink

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"countersign/audit"

	"golang.org/x/sys/unix"
)

// minFree is the free space that a file sink leaves to the other files of the disk, in bytes. The
// ledger may be one of them, and must not wait for space because of a copy of its events.
const minFree = 256 << 20

// File is a Receiver that appends events to a file as JSON lines, in the form of a report
// (audit.JSONLines). A gap is a line {"gap":{"before":…,"from":…,"why":…}}.
//
// The file ends with a whole line that is on the disk: Deliver syncs, and an incomplete line that a
// crash or a full disk has left is removed before the next one. The last line tells the position,
// so that no event is twice in the file.
//
// A file that would become larger than Size is renamed to PATH.NUMBER, with the number of the last
// event in 20 digits. The newest Files renamed files are kept.
type File struct {
	Path  string
	Size  int64 // bytes
	Files int

	f    *os.File
	size int64
	last uint64 // number after the last event of the file, or 0
	torn *int64 // size before a write or sync that has failed; what is behind is not on the disk
}

// lastLine has the fields by which the position is found.
type lastLine struct {
	Index *uint64 `json:"index"`
	Gap   *Gap    `json:"gap"`
}

func (l lastLine) next() (uint64, bool) {
	switch {
	case l.Index != nil:
		return *l.Index + 1, true
	case l.Gap != nil:
		return l.Gap.Before, true
	}
	return 0, false
}

// Resume opens the file, and removes an incomplete line at its end and what a failed write or sync
// has left: after a failed sync, Linux takes pages for written that are not. The lines of a daemon
// that has crashed before its sync are synced now, since they tell the position.
func (f *File) Resume() (uint64, error) {
	if f.f != nil {
		return f.last, nil
	}
	file, err := openFile(f.Path)
	if err != nil {
		return 0, err
	}
	if st, bad := file.Stat(); bad != nil {
		err = bad
	} else if f.torn != nil && st.Size() > *f.torn {
		err = file.Truncate(*f.torn)
	}
	var size int64
	var last uint64
	if err == nil {
		size, last, err = tail(file)
	}
	if err == nil {
		err = errors.Join(file.Truncate(size), file.Sync())
	}
	if err == nil {
		_, err = file.Seek(size, io.SeekStart)
	}
	if err == nil && last == 0 { // just rotated: the newest renamed file tells the position
		last = f.rotated()
	}
	if err != nil {
		return 0, errors.Join(err, file.Close())
	}
	f.f, f.size, f.last, f.torn = file, size, last, nil
	return last, nil
}

// openFile opens a file, and makes a new one with mode 0640, whatever the umask is: the daemon's
// group may have a collector, and nobody else reads events.
func openFile(path string) (*os.File, error) {
	const flags = os.O_RDWR | unix.O_NOFOLLOW | unix.O_NONBLOCK
	file, err := os.OpenFile(path, flags|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return os.OpenFile(path, flags, 0)
	} else if err != nil {
		return nil, err
	}
	if err := file.Chmod(0o640); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// tail returns the size of the whole lines of a file, and the number after the last event in them.
func tail(file *os.File) (size int64, next uint64, err error) {
	st, err := file.Stat()
	if err != nil {
		return 0, 0, err
	}
	if !st.Mode().IsRegular() {
		return 0, 0, fmt.Errorf("%s is not a regular file", file.Name())
	}
	const most = 1 << 20 // some 16 times the longest line
	from := max(0, st.Size()-most)
	b := make([]byte, st.Size()-from)
	if _, err := file.ReadAt(b, from); err != nil && err != io.EOF {
		return 0, 0, err
	}
	end := bytes.LastIndexByte(b, '\n') + 1
	if end == 0 && st.Size() > most {
		return 0, 0, fmt.Errorf("%s has no line of events at its end: move the file away", file.Name())
	}
	if end == 0 {
		return 0, 0, nil
	}
	line := b[bytes.LastIndexByte(b[:end-1], '\n')+1 : end]
	var l lastLine
	if err := json.Unmarshal(line, &l); err == nil {
		if next, ok := l.next(); ok {
			return from + int64(end), next, nil
		}
	}
	return 0, 0, fmt.Errorf("the last line of %s is not an event: move the file away", file.Name())
}

// rotated returns the number after the last event of the newest renamed file, or 0.
func (f *File) rotated() uint64 {
	all := f.renamed()
	if len(all) == 0 {
		return 0
	}
	file, err := os.Open(all[len(all)-1])
	if err != nil {
		return 0
	}
	defer file.Close()
	_, next, err := tail(file)
	if err != nil {
		return 0
	}
	return next
}

// renamed returns the paths of the renamed files, the oldest first.
func (f *File) renamed() (all []string) {
	found, err := filepath.Glob(escapeGlob(f.Path) + "." + strings.Repeat("[0-9]", 20))
	if err != nil {
		return nil
	}
	slices.Sort(found)
	return found
}

func escapeGlob(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// Deliver appends the events and syncs the file.
func (f *File) Deliver(_ context.Context, b Batch) error {
	if _, err := f.Resume(); err != nil {
		return err
	}
	lines, last, err := f.lines(b)
	if err != nil || len(lines) == 0 {
		return err
	}
	if err := f.room(len(lines)); err != nil {
		return err
	}
	if f.size > 0 && f.size+int64(len(lines)) > f.Size {
		if err := f.rotate(); err != nil {
			return err
		}
	}
	_, err = f.f.Write(lines)
	if err == nil {
		err = f.f.Sync()
	}
	if err != nil { // the next Resume removes what was written, and finds the position
		f.torn = new(f.size)
		f.Close()
		return err
	}
	f.size, f.last = f.size+int64(len(lines)), last
	return nil
}

// lines returns the lines of a batch without those that the file has already.
func (f *File) lines(b Batch) (lines []byte, last uint64, err error) {
	last = f.last
	for _, g := range b.Gaps {
		if g.Before <= last {
			continue
		}
		lines, last = append(lines, g.line()...), g.Before
	}
	for _, r := range b.Events {
		if r.Index < last {
			continue
		}
		if lines, err = audit.JSONLines.AppendEvent(lines, r.Index, r.Entry); err != nil {
			return nil, 0, err
		}
		last = r.Index + 1
	}
	return lines, last, nil
}

// room reports a disk without room for n bytes besides minFree.
func (f *File) room(n int) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.f.Fd()), &st); err != nil {
		return fmt.Errorf("statfs: %w", err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < uint64(n)+minFree {
		return fmt.Errorf("the disk of %s has %d MiB free, of which a sink leaves %d MiB: make room",
			f.Path, free>>20, minFree>>20)
	}
	return nil
}

// rotate renames the file. After a crash in between, the file is there under one of both names.
func (f *File) rotate() error {
	to := fmt.Sprintf("%s.%020d", f.Path, f.last-1)
	if err := os.Rename(f.Path, to); err != nil {
		return err
	}
	last := f.last
	f.Close()
	if all := f.renamed(); len(all) > f.Files {
		for _, old := range all[:len(all)-f.Files] {
			if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	_, err := f.Resume()
	f.last = last
	return err
}

// Close closes the file. Resume opens the file again.
func (f *File) Close() error {
	if f.f == nil {
		return nil
	}
	err := f.f.Close()
	f.f, f.size, f.last = nil, 0, 0
	return err
}
