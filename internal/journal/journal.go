// Package journal keeps the journal of a token's key workers: one line for each signature that
// leaves a key worker. A daemon in other hands can have documents signed, but can't write the
// journal, so the signatures don't stay unnoticed: see countersign audit reconcile. Begin reading
// at Writer.Append; Read is for auditors.
//
// Invariant: a signature leaves a key worker only after its line has been written, whole, behind
// all lines before. The lines of all key workers of a token, present and replaced, are one hash
// chain. Nobody waits for the disk: a power cut may lose the last lines, and a crash of a process
// loses none.
//
// A line has seven fields, separated by one space, and ends in a line feed:
//
//	NUMBER MS KEY KIND DETAIL DIGEST CHAIN
//
// NUMBER counts the lines from 0 on, MS is the time in Unix milliseconds by the key worker's clock,
// KEY is name/version, KIND and DETAIL say what was signed (package form), DIGEST and CHAIN have 64
// hex digits. An empty KEY or DETAIL is a hyphen. CHAIN is SHA-256 of the CHAIN before, as 32
// bytes, and of the line up to and without CHAIN. Before the first line, CHAIN is zero.
package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"countersign/internal/keystore"
)

// Kinds of lines that are no signatures.
const (
	Begin = "begin" // the first line of a file; DIGEST is the CHAIN of the line before
	End   = "end"   // the last line of a file that is followed by another
	Cut   = "cut"   // DETAIL bytes with the SHA-256 DIGEST were no lines, and are in a file NAME.cut now
	Try   = "try"   // proves that the journal can be written again
)

// Entry is a line.
type Entry struct {
	Number uint64
	Time   time.Time
	Key    keystore.Ref // zero: none
	Kind   string
	Detail string
	Digest [32]byte
	chain  [32]byte
}

// Signature reports that the line is of a signature.
func (e Entry) Signature() bool { return e.Key != keystore.Ref{} }

// Chain returns the CHAIN of a line that was read.
func (e Entry) Chain() [32]byte { return e.chain }

// Config says where the journal of a token is. The files are FOLDER/TOKEN.NUMBER.journal with the
// number of the first line in 20 digits.
type Config struct {
	Folder string `json:"folder"`
	Token  string `json:"token"`
	Size   int64  `json:"size"`  // bytes of a file; a larger file is followed by another
	Files  int    `json:"files"` // files to keep; the oldest is removed
}

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

// append appends the line of an entry, and moves the chain on.
func (e Entry) append(b []byte, chain *[32]byte) []byte {
	key, detail := "-", e.Detail
	if e.Signature() {
		key = e.Key.String()
	}
	if detail == "" {
		detail = "-"
	}
	start := len(b)
	b = strconv.AppendUint(b, e.Number, 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, e.Time.UnixMilli(), 10)
	for _, field := range []string{key, e.Kind, detail} {
		b = append(b, ' ')
		b = append(b, field...)
	}
	b = append(b, ' ')
	b = hex.AppendEncode(b, e.Digest[:])
	b = append(b, ' ')
	*chain = link(*chain, b[start:])
	b = hex.AppendEncode(b, chain[:])
	return append(b, '\n')
}

// link is the next CHAIN.
func link(before [32]byte, line []byte) (chain [32]byte) {
	h := sha256.New()
	h.Write(before[:])
	h.Write(line)
	h.Sum(chain[:0])
	return chain
}

// maxLine bounds a line in bytes: the id of a webhook has up to 128, a key up to 75.
const maxLine = 512

// parse reads a line without its line feed, strictly.
func parse(line []byte) (e Entry, err error) {
	bad := errors.New("it is no line of a journal")
	f := strings.Split(string(line), " ")
	if len(f) != 7 {
		return e, bad
	}
	number, err1 := strconv.ParseUint(f[0], 10, 64)
	ms, err2 := strconv.ParseInt(f[1], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return e, bad
	}
	e = Entry{Number: number, Time: time.UnixMilli(ms), Kind: f[3], Detail: f[4]}
	if f[2] != "-" {
		if e.Key, err = keystore.ParseRef(f[2]); err != nil {
			return e, bad
		}
	}
	if e.Detail == "-" {
		e.Detail = ""
	}
	for i, to := range []*[32]byte{&e.Digest, &e.chain} {
		if len(f[5+i]) != 64 {
			return e, bad
		}
		if _, err := hex.Decode(to[:], []byte(f[5+i])); err != nil {
			return e, bad
		}
	}
	again := e.append(nil, new([32]byte)) // the canonical form of all but CHAIN
	if !bytes.Equal(again[:len(again)-65], line[:len(line)-64]) || hex.EncodeToString(e.chain[:]) != f[6] {
		return e, bad
	}
	return e, nil
}

// files lists the files of a journal, the oldest first.
func files(c Config) (numbers []uint64, err error) {
	all, err := os.ReadDir(c.Folder)
	if err != nil {
		return nil, err
	}
	for _, f := range all {
		text, ours := strings.CutPrefix(f.Name(), c.Token+".")
		text, journal := strings.CutSuffix(text, ".journal")
		if n, err := strconv.ParseUint(text, 10, 64); ours && journal && err == nil && c.name(n) == f.Name() {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
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

func (c Config) name(number uint64) string { return fmt.Sprintf("%s.%020d.journal", c.Token, number) }

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
