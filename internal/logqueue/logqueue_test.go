package logqueue_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"countersign/internal/logqueue"
)

// TestUnreadPipe fills a pipe that nobody reads. No Write blocks, the dropped lines are counted,
// and the reader that comes back gets the count in their place.
func TestUnreadPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	q := logqueue.New(w)
	const lines = 40_000
	for i := range lines {
		fmt.Fprintf(q, "line %06d %s\n", i, strings.Repeat("x", 100))
	}
	lost, since := q.Unread()
	if lost == 0 || since.IsZero() {
		t.Fatalf("%d lines are lost, since %v: want some", lost, since)
	}
	if q.Close(0) {
		t.Error("Close reports that all was written")
	}
	go func() { q.Close(time.Hour); w.Close() }()
	read, told, last := 0, 0, -1
	for s := bufio.NewScanner(r); s.Scan(); {
		var i, n int
		if _, err := fmt.Sscanf(s.Text(), "line %d", &i); err == nil {
			if i <= last {
				t.Fatalf("line %d comes after line %d", i, last)
			}
			read, last = read+1, i
		} else if _, after, ok := strings.Cut(s.Text(), " lines="); ok {
			fmt.Sscan(after, &n)
			told += n
		}
	}
	if read+told != lines || told < lost || q.Dropped() != uint64(told) {
		t.Errorf("%d lines were read, %d told and %d counted as dropped, of %d", read, told, q.Dropped(), lines)
	}
	if lost, _ := q.Unread(); lost != 0 {
		t.Errorf("%d lines are lost after the count was read", lost)
	}
}

// TestClosedPipe writes to a pipe whose reader has gone: the lines are lost and counted, and Close
// returns.
func TestClosedPipe(t *testing.T) {
	signal.Ignore(syscall.SIGPIPE)
	defer signal.Reset(syscall.SIGPIPE)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r.Close()
	q := logqueue.New(w)
	io.WriteString(q, "one\n")
	if q.Close(time.Hour) {
		t.Error("Close reports that all was written")
	}
	if lost, _ := q.Unread(); lost != 1 {
		t.Errorf("%d lines are lost, want 1", lost)
	}
}

// flaky is a destination that fails until it is mended.
type flaky struct {
	mu     sync.Mutex
	mended bool
	text   bytes.Buffer
}

func (f *flaky) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.mended {
		return 0, syscall.EPIPE
	}
	return f.text.Write(b)
}

// take returns the text so far, and forgets the text.
func (f *flaky) take() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.text.Reset()
	return f.text.String()
}

// TestReaderComesBack loses lines to a failing destination, as to a FIFO without a reader, and has
// them told with the next line.
func TestReaderComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &flaky{}
		q := logqueue.New(f)
		for range 3 {
			io.WriteString(q, "lost\n")
			synctest.Wait()
		}
		if lost, _ := q.Unread(); lost != 3 {
			t.Fatalf("%d lines are lost, want 3", lost)
		}
		f.mu.Lock()
		f.mended = true
		f.mu.Unlock()
		io.WriteString(q, "read\n")
		synctest.Wait()
		if lost, _ := q.Unread(); lost != 0 {
			t.Errorf("%d lines are lost after the reader has come back", lost)
		}
		if n := q.Dropped(); n != 3 {
			t.Errorf("%d lines are counted as dropped, want 3", n)
		}
		if !q.Close(time.Hour) {
			t.Error("Close reports lost lines")
		}
		if text := f.take(); !strings.Contains(text, "lines=3") || !strings.HasSuffix(text, "\nread\n") {
			t.Errorf("the reader got %q", text)
		}
	})
}

// TestPace has a stranger cause 10,000 lines: few are written, the others are counted, and lines of
// another kind come through.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &flaky{mended: true}
		paced := logqueue.NewPace(slog.NewTextHandler(b, nil))
		log := slog.New(paced)
		for i := range 10_000 {
			log.With("n", i).Warn("a stranger was here", "from", i)
		}
		log.Warn("something else")
		log.Debug("not shown at this level")
		before := b.take()
		written := strings.Count(before, "a stranger was here")
		if written == 0 || written > 100 {
			t.Errorf("%d lines were written", written)
		}
		if !strings.Contains(before, "something else") {
			t.Error("a line of another kind is missing")
		}
		if n := paced.LeftOut(); n != uint64(10_000-written) {
			t.Errorf("%d lines are counted as left out", n)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		after, want := b.take(), fmt.Sprintf("lines=%d ", 10_000-written)
		if strings.Count(after, want) != 1 {
			t.Errorf("the log says %q, want one line with %q", after, want)
		}
		log.Warn("a stranger was here")
		if b.take() == "" {
			t.Error("no line an hour later")
		}
	})
}

// TestPaceAtDebug bounds the lines that a peer can cause at debug, and leaves an operator those of
// an ordinary load.
func TestPaceAtDebug(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &flaky{mended: true}
		all := &slog.HandlerOptions{Level: slog.LevelDebug}
		log := slog.New(logqueue.NewPace(slog.NewTextHandler(b, all)))
		flood := func(from, to int) {
			t.Helper()
			for range 100_000 {
				log.Debug("served")
			}
			if n := strings.Count(b.take(), "msg=served"); n < from || n > to {
				t.Errorf("%d lines, want %d to %d", n, from, to)
			}
		}
		flood(5000, 5000)
		time.Sleep(time.Second)
		flood(1000, 1000)
		for range 10_000 { // ten seconds of 1,000 requests each
			time.Sleep(time.Millisecond)
			log.Debug("served")
		}
		if n := strings.Count(b.take(), "msg=served"); n < 9_990 {
			t.Errorf("%d lines of 10,000", n)
		}
	})
}

// TestFlush sees that Flush returns after the lines before it, and does not wait for a reader that
// reads no more.
func TestFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		q := logqueue.New(w)
		io.WriteString(q, "one\n")
		began := time.Now()
		q.Flush(time.Minute)
		if waited := time.Since(began); waited != time.Minute {
			t.Errorf("Flush waited %v for a reader, want a minute", waited)
		}
		read := make(chan string, 1)
		go func() {
			line, _ := bufio.NewReader(r).ReadString('\n')
			time.Sleep(time.Second)
			read <- line
			io.Copy(io.Discard, r)
		}()
		io.WriteString(q, "two\n")
		q.Flush(time.Minute)
		select {
		case line := <-read:
			if line != "one\n" {
				t.Errorf("read %q", line)
			}
		default:
			t.Error("Flush returned before the lines were written")
		}
		q.Close(time.Minute)
		q.Flush(time.Minute)
		w.Close()
	})
}
