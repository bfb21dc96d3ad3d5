//go:build unix

package journal

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"countersign/internal/keystore"
)

// Key workers write, and do not run on Windows. Auditors read there: see Read.

// Writer appends to the journal of a token. Several writers, in this process and in others, may
// append to one journal. A Writer is safe for concurrent use.
type Writer struct {
	c  Config
	mu sync.Mutex

	lock *os.File // locked (flock) during each append; the kernel ends the lock with the process
	file *os.File // the newest file, or nil
	size int64    // of file after the last append; another size is that of another writer's append
	next uint64   // number of the next line
	last [32]byte // CHAIN of the last line
}

// New returns a writer for the journal of a token. The first Append opens the files.
func New(c Config) *Writer { return &Writer{c: c} }

// failed classes an error of the journal.
func failed(err error) error { return fmt.Errorf("%w: %w", keystore.ErrJournal, err) }

// Close closes the files.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var err error
	for _, f := range []*os.File{w.file, w.lock} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	w.file, w.lock = nil, nil
	return err
}

// Append writes the lines of signatures, all or none, in one write. Number, Time and the chain are
// set by Append. After an error (keystore.ErrJournal) none of the signatures may leave the key
// worker: a signature without a line would be worse than none. Each Append tries again.
func (w *Writer) Append(entries ...Entry) (err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.lock == nil {
		path := filepath.Join(w.c.Folder, w.c.Token+".lock")
		if w.lock, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
			w.lock = nil
			return failed(err)
		}
	}
	fd := int(w.lock.Fd())
	if err := retry(func() error { return syscall.Flock(fd, syscall.LOCK_EX) }); err != nil {
		return failed(err)
	}
	defer syscall.Flock(fd, syscall.LOCK_UN)
	if err := w.follow(); err != nil {
		return failed(err)
	}
	if w.size >= w.c.Size {
		if err := w.rotate(); err != nil {
			return failed(err)
		}
	}
	if err := w.write(entries...); err != nil {
		return failed(err)
	}
	return nil
}

func retry(f func() error) (err error) {
	for err = syscall.EINTR; err == syscall.EINTR; err = f() {
	}
	return err
}

// write appends lines to the file, in one write. A part of a write is taken back, so that the lines
// of before stay the end of the file.
func (w *Writer) write(entries ...Entry) error {
	var b []byte
	next, last, now := w.next, w.last, time.Now()
	for _, e := range entries {
		e.Number, e.Time = next, now
		b = e.append(b, &last)
		next++
	}
	if _, err := w.file.WriteAt(b, w.size); err != nil {
		return errors.Join(err, w.file.Truncate(w.size)) // WriteAt does not tell of a part that it has written
	}
	w.size, w.next, w.last = w.size+int64(len(b)), next, last
	return nil
}

// Size returns the bytes of all files of the journal.
func (w *Writer) Size() (sum uint64, err error) {
	numbers, err := files(w.c)
	for _, n := range numbers {
		if st, err := os.Stat(w.c.path(n)); err == nil { // another writer may have removed the file
			sum += uint64(st.Size())
		}
	}
	return sum, err
}

func (c Config) path(number uint64) string { return filepath.Join(c.Folder, c.name(number)) }

// follow finds the end of the journal, if the file is not as this writer has left it: at the first
// append, after an append of another writer, and after a crash in the middle of a write.
func (w *Writer) follow() error {
	if w.file != nil {
		if st, err := w.file.Stat(); err == nil && st.Size() == w.size && st.Sys().(*syscall.Stat_t).Nlink > 0 {
			return nil
		}
		w.file.Close()
		w.file = nil
	}
	numbers, err := files(w.c)
	if err != nil {
		return err
	}
	if len(numbers) == 0 {
		w.next, w.last = 0, [32]byte{}
		return w.begin()
	}
	number := numbers[len(numbers)-1]
	file, err := os.OpenFile(w.c.path(number), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	end, entry, err := tail(file)
	if err != nil {
		// The end is no line: of a write that a crash has cut off, or damage. The lines before
		// stay.
		if end, entry, err = w.cut(file, number); err != nil {
			file.Close()
			return err
		}
	}
	w.file, w.size, w.next, w.last = file, end, entry.Number+1, entry.chain
	if entry.Kind == End { // a crash came before the next file
		w.file.Close()
		w.file = nil
		return w.begin()
	}
	return nil
}

// maxLine bounds a line in bytes: the id of a webhook has up to 128, a key up to 75.
const maxLine = 512

// tail returns the last line of a file, and the size of the file.
func tail(file *os.File) (end int64, last Entry, err error) {
	st, err := file.Stat()
	if err != nil {
		return 0, last, err
	}
	b := make([]byte, min(st.Size(), maxLine))
	if _, err := file.ReadAt(b, st.Size()-int64(len(b))); err != nil && !errors.Is(err, io.EOF) {
		return 0, last, err
	}
	text, ended := bytes.CutSuffix(b, []byte("\n"))
	if !ended {
		return 0, last, errors.New("the last line has no end")
	}
	last, err = parse(text[bytes.LastIndexByte(text, '\n')+1:])
	return st.Size(), last, err
}

// cut moves the end of a file that is no line to a file of its own, and notes it. A file without
// any line begins again after the file before.
func (w *Writer) cut(file *os.File, number uint64) (end int64, last Entry, err error) {
	b, err := os.ReadFile(file.Name())
	if err != nil {
		return 0, last, err
	}
	last, err = w.before(number)
	if err != nil {
		return 0, last, err
	}
	chain, broken := last.chain, false
	for line := range bytes.Lines(b) {
		text, ended := bytes.CutSuffix(line, []byte("\n"))
		e, err := parse(text)
		if end == 0 && chain == [32]byte{} {
			chain = e.Digest // of begin, and the file before was dropped
		}
		if !ended || err != nil || e.Number != last.Number+1 || link(chain, text[:len(text)-64]) != e.chain {
			broken = true
			break
		}
		last, chain, end = e, e.chain, end+int64(len(line))
	}
	if !broken && end > 0 {
		return end, last, nil // whole by now
	}
	rest := b[end:]
	if broken {
		if err := os.WriteFile(file.Name()+".cut", rest, 0o600); err != nil {
			return 0, last, err
		}
	}
	if err := file.Truncate(end); err != nil {
		return 0, last, err
	}
	w.file, w.size, w.next, w.last = file, end, last.Number+1, chain
	if end == 0 {
		if err := w.write(Entry{Kind: Begin, Digest: chain}); err != nil {
			return 0, last, err
		}
	}
	if !broken { // a crash came before the first line
		return w.size, Entry{Number: w.next - 1, Kind: Begin, chain: w.last}, nil
	}
	if err := w.write(Entry{Kind: Cut, Detail: strconv.Itoa(len(rest)), Digest: sha256.Sum256(rest)}); err != nil {
		return 0, last, err
	}
	return w.size, Entry{Number: w.next - 1, Kind: Cut, chain: w.last}, nil
}

// before returns the last line of the file before the file with a number.
func (w *Writer) before(number uint64) (last Entry, err error) {
	numbers, err := files(w.c)
	if err != nil {
		return last, err
	}
	i := slices.Index(numbers, number)
	if i <= 0 {
		return Entry{Number: number - 1}, nil
	}
	file, err := os.Open(w.c.path(numbers[i-1]))
	if err != nil {
		return last, err
	}
	defer file.Close()
	if _, last, err = tail(file); err != nil || last.Number != number-1 {
		return Entry{Number: number - 1}, nil // damaged too: a fault for Read
	}
	return last, nil
}

// begin makes the next file, and removes the oldest ones. The chain of before is in the file's
// first line.
func (w *Writer) begin() error {
	file, err := os.OpenFile(w.c.path(w.next), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w.file, w.size = file, 0
	if err := w.write(Entry{Kind: Begin, Digest: w.last}); err != nil {
		w.file.Close()
		w.file = nil
		return errors.Join(err, os.Remove(file.Name()))
	}
	numbers, err := files(w.c)
	if err != nil {
		return err
	}
	for _, old := range numbers[:max(0, len(numbers)-max(w.c.Files, 1))] {
		os.Remove(w.c.path(old) + ".cut")
		if err := os.Remove(w.c.path(old)); err != nil {
			return err
		}
	}
	return nil
}

// rotate ends the file, and begins the next one.
func (w *Writer) rotate() error {
	if err := w.write(Entry{Kind: End}); err != nil {
		return err
	}
	w.file.Close()
	w.file = nil
	return w.begin()
}
