package journal_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"countersign/internal/journal"
	"countersign/internal/keystore"

	"golang.org/x/sys/unix"
)

// TestMain is also the main function of a writer in a process of its own, see
// TestWritersOfManyProcesses.
func TestMain(m *testing.M) {
	if folder := os.Getenv("JOURNAL_FOLDER"); folder != "" {
		w := journal.New(config(folder))
		for i := 0; ; i++ {
			if err := w.Append(entries(i, 3)...); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			fmt.Println(i)
		}
	}
	os.Exit(m.Run())
}

func config(folder string) journal.Config {
	return journal.Config{Folder: folder, Token: "main", Size: 4096, Files: 1000}
}

// entries are n signatures of a batch with a number.
func entries(batch, n int) (all []journal.Entry) {
	for i := range n {
		all = append(all, journal.Entry{
			Key: keystore.Ref{Name: "payments", Version: 2}, Kind: "message-v1",
			Digest: sha256.Sum256(fmt.Append(nil, batch, i)),
		})
	}
	return all
}

// read returns the signatures and the report of the journal in a folder.
func read(t *testing.T, folder string) (all []journal.Entry, r journal.Report) {
	t.Helper()
	r, err := journal.Read(folder, "main", func(e journal.Entry) error {
		if e.Signature() {
			all = append(all, e)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all, r
}

func filesOf(t *testing.T, folder string) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(folder, "*.journal"))
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

func appendAll(t *testing.T, w *journal.Writer, batches ...int) {
	t.Helper()
	for _, b := range batches {
		if err := w.Append(entries(b, 2)...); err != nil {
			t.Fatal(err)
		}
	}
}

// sound wants n signatures, each with its line, and no fault.
func sound(t *testing.T, folder string, n int) {
	t.Helper()
	all, r := read(t, folder)
	if len(all) != n || len(r.Faults) > 0 {
		t.Errorf("%d signatures, want %d; faults: %q", len(all), n, r.Faults)
	}
}

// TestAppendAndRead writes over several files and by two writers in turn, one of which is replaced.
func TestAppendAndRead(t *testing.T) {
	dir := t.TempDir()
	one, two := journal.New(config(dir)), journal.New(config(dir))
	for i := range 50 {
		appendAll(t, one, 2*i)
		if i%7 == 0 {
			two.Close()
			two = journal.New(config(dir))
		}
		appendAll(t, two, 2*i+1)
	}
	sound(t, dir, 200)
	if n := len(filesOf(t, dir)); n < 5 {
		t.Errorf("%d files", n)
	}
	all, r := read(t, dir)
	for i, e := range all {
		want := entries(i/2, 2)[i%2]
		if e.Key != want.Key || e.Kind != want.Kind || e.Digest != want.Digest || i > 0 && e.Number <= all[i-1].Number {
			t.Fatalf("line %d: %+v", i, e)
		}
	}
	if tokens, err := journal.Tokens(dir); err != nil || !slices.Equal(tokens, []string{"main"}) {
		t.Error(tokens, err)
	}
	// An older journal is a beginning of this one.
	if b, err := os.ReadFile(filesOf(t, dir)[0]); err != nil || len(r.Head) != 64 || !bytes.Contains(b, []byte("\n")) {
		t.Error(err, r.Head)
	}
}

// TestOldFilesAreDropped bounds the journal. The report says which lines are gone.
func TestOldFilesAreDropped(t *testing.T) {
	dir := t.TempDir()
	c := config(dir)
	c.Files = 2
	w := journal.New(c)
	for i := range 60 {
		appendAll(t, w, i)
	}
	all, r := read(t, dir)
	if files := filesOf(t, dir); len(files) != 2 || r.First == 0 || len(r.Faults) > 0 {
		t.Errorf("%d files, from line %d on, %q", len(files), r.First, r.Faults)
	}
	if last := all[len(all)-1]; last.Digest != entries(59, 2)[1].Digest {
		t.Error("the last signature is missing")
	}
}

// TestTornEnd cuts the last file at each of its bytes, as a crash does. The next writer goes on
// behind the last whole line, and what was cut off is told. No whole line is lost.
func TestTornEnd(t *testing.T) {
	dir := t.TempDir()
	w := journal.New(journal.Config{Folder: dir, Token: "main", Size: 1 << 20, Files: 10})
	appendAll(t, w, 0, 1)
	whole, err := os.ReadFile(filesOf(t, dir)[0])
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(whole) {
		torn := t.TempDir()
		path := filepath.Join(torn, filepath.Base(filesOf(t, dir)[0]))
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		kept := max(0, bytes.Count(whole[:n], []byte("\n"))-1) // without the line begin
		if all, _ := read(t, torn); len(all) != kept {
			t.Fatalf("%d bytes: %d signatures are read, want %d", n, len(all), kept)
		}
		appendAll(t, journal.New(config(torn)), 7)
		all, r := read(t, torn)
		clean := n == 0 || whole[n-1] == '\n'
		if len(all) != kept+2 || (len(r.Faults) == 0) != clean || !clean && !strings.Contains(r.Faults[0], ".cut") {
			t.Fatalf("%d bytes: %d signatures, want %d; faults: %q", n, len(all), kept+2, r.Faults)
		}
		rest, err := os.ReadFile(path + ".cut")
		if !clean && (err != nil || !bytes.HasSuffix(whole[:n], rest)) {
			t.Fatalf("%d bytes: what was cut off is %q, %v", n, rest, err)
		}
	}
}

// TestZerosAtTheEnd: after a power cut, the end of a file can be zeros.
func TestZerosAtTheEnd(t *testing.T) {
	dir := t.TempDir()
	appendAll(t, journal.New(config(dir)), 0)
	f, err := os.OpenFile(filesOf(t, dir)[0], os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.Write(make([]byte, 1000))
	f.Close()
	appendAll(t, journal.New(config(dir)), 1)
	if all, r := read(t, dir); len(all) != 4 || len(r.Faults) != 1 {
		t.Errorf("%d signatures; %q", len(all), r.Faults)
	}
}

// TestEachChangedByte changes each byte of a journal, removes and exchanges lines and files. Each
// change is a fault.
func TestEachChangedByte(t *testing.T) {
	dir := t.TempDir()
	c := config(dir)
	c.Size = 800
	w := journal.New(c)
	for i := range 10 {
		appendAll(t, w, i)
	}
	files := filesOf(t, dir)
	if len(files) < 3 {
		t.Fatalf("%d files", len(files))
	}
	faulty := func(what string) {
		t.Helper()
		r, err := journal.Read(dir, "main", func(journal.Entry) error { return nil })
		if err != nil || len(r.Faults) == 0 {
			t.Errorf("%s is not noticed: %v", what, err)
		}
	}
	for n, path := range files[:2] {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		write := func(b []byte) {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for i := range b {
			changed := bytes.Clone(b)
			changed[i] ^= 1
			write(changed)
			faulty(fmt.Sprintf("file %d, byte %d", n, i))
		}
		lines := bytes.SplitAfter(b, []byte("\n"))
		for i := 1; i < len(lines)-2; i++ {
			write(bytes.Join(slices.Delete(slices.Clone(lines), i, i+1), nil))
			faulty(fmt.Sprintf("file %d without line %d", n, i))
			swapped := slices.Clone(lines)
			swapped[i], swapped[i+1] = swapped[i+1], swapped[i]
			write(bytes.Join(swapped, nil))
			faulty(fmt.Sprintf("file %d, lines %d and %d exchanged", n, i, i+1))
		}
		write(b)
	}
	for i, path := range files {
		if i == 0 {
			continue // as retention does
		}
		os.Rename(path, path+".away")
		faulty(fmt.Sprintf("a missing file %d of %d", i, len(files)))
		os.Rename(path+".away", path)
	}
	sound(t, dir, 20)
}

// TestFullDisk fills the disk of a journal (tmpfs where the test may mount, otherwise a limit of
// the file size). No line is written in part, and the journal goes on when there is room.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	c := journal.Config{Folder: dir, Token: "main", Size: 1 << 20, Files: 3}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	w := journal.New(c)
	written := 0
	var err error
	for err == nil && written < 100_000 {
		if err = w.Append(entries(written, 3)...); err == nil {
			written += 3
		}
	}
	if !errors.Is(err, keystore.ErrJournal) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	for range 3 {
		if err := w.Append(entries(0, 3)...); !errors.Is(err, keystore.ErrJournal) {
			t.Fatal(err)
		}
	}
	sound(t, dir, written)
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=256k"); err != nil {
		t.Fatal(err)
	}
	if err := w.Append(entries(1, 3)...); err != nil {
		t.Fatal(err)
	}
	sound(t, dir, written+3)
}

// TestWritersOfManyProcesses has processes append to one journal at once, and kills them one after
// another. Each answered append is there, the chain is whole, and the next process goes on.
func TestWritersOfManyProcesses(t *testing.T) {
	dir := t.TempDir()
	answered := 0
	for range 3 {
		var all sync.WaitGroup
		var mu sync.Mutex
		for range 4 {
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), "JOURNAL_FOLDER="+dir)
			out, err := cmd.StdoutPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			all.Go(func() {
				b := make([]byte, 1)
				for n := 0; n < 100; { // lines
					if _, err := out.Read(b); err != nil {
						t.Error(err)
						return
					}
					if b[0] == '\n' {
						n++
					}
				}
				cmd.Process.Kill()
				rest, _ := io.ReadAll(out)
				cmd.Wait()
				mu.Lock()
				answered += 100 + bytes.Count(rest, []byte("\n"))
				mu.Unlock()
			})
		}
		all.Wait()
	}
	appendAll(t, journal.New(config(dir)), 0) // after a kill between two files
	all, r := read(t, dir)
	for _, fault := range r.Faults {
		if !strings.Contains(fault, ".cut") { // a process was killed within its write
			t.Error(fault)
		}
	}
	if len(all) < 3*answered {
		t.Errorf("%d signatures are in the journal, and %d were answered", len(all), 3*answered)
	}
}

// TestFolderIsGone: without the folder nothing is written, and with it again the journal goes on.
func TestFolderIsGone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	w := journal.New(config(dir))
	if err := w.Append(entries(0, 1)...); !errors.Is(err, keystore.ErrJournal) {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	appendAll(t, w, 1)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := w.Append(entries(2, 1)...); !errors.Is(err, keystore.ErrJournal) {
		t.Fatal(err)
	}
}

// BenchmarkAppend appends batches of 1 and of 16 signatures.
func BenchmarkAppend(b *testing.B) {
	for _, n := range []int{1, 16} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			w := journal.New(journal.Config{Folder: b.TempDir(), Token: "main", Size: 64 << 20, Files: 2})
			batch := entries(0, n)
			for b.Loop() {
				if err := w.Append(batch...); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
