package logline_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"countersign/internal/logline"
	"countersign/internal/logqueue"
)

// fieldsOf reads an entry of the Native Journal Protocol.
func fieldsOf(t *testing.T, entry []byte) map[string]string {
	t.Helper()
	all := map[string]string{}
	for len(entry) > 0 {
		line, rest, ok := bytes.Cut(entry, []byte("\n"))
		if !ok {
			t.Fatalf("no line end after %q", entry)
		}
		name, value, short := bytes.Cut(line, []byte("="))
		if !short {
			if len(rest) < 8 {
				t.Fatalf("no length after %q", line)
			}
			n := binary.LittleEndian.Uint64(rest)
			value, rest = rest[8:8+n], rest[8+n+1:]
		}
		if _, twice := all[string(name)]; twice {
			t.Fatalf("%s comes twice", name)
		}
		all[string(name)], entry = string(value), rest
	}
	return all
}

// TestJournal sends lines to a socket as journald's: each line is one datagram, with its attributes
// in the message and as fields. A socket that comes back, as after a restart of journald, gets
// lines again.
func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	listen := func() *net.UnixConn {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := listen()
	socket, err := logline.DialJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	receive := func() map[string]string {
		t.Helper()
		b := make([]byte, 1<<16)
		l.SetReadDeadline(time.Now().Add(time.Minute))
		n, err := l.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return fieldsOf(t, b[:n])
	}
	log := slog.New(logline.Journal.Handler(socket, slog.LevelInfo)).With("request", "k4wq2vz5n3xa7bcd")
	log.Debug("not at this level")
	log.WithGroup("g").Warn("refused", "peer", "the shop", "a-b", "1\n2\nPRIORITY=0", slog.Attr{},
		slog.Group("h", "n", 5))
	got := receive()
	for name, want := range map[string]string{
		"MESSAGE":             `refused request=k4wq2vz5n3xa7bcd g.peer="the shop" g.a-b="1\n2\nPRIORITY=0" g.h.n=5`,
		"PRIORITY":            "4",
		"SYSLOG_IDENTIFIER":   "countersignd",
		"COUNTERSIGN_REQUEST": "k4wq2vz5n3xa7bcd", "COUNTERSIGN_G_PEER": "the shop",
		"COUNTERSIGN_G_A_B": "1\n2\nPRIORITY=0", "COUNTERSIGN_G_H_N": "5",
	} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
	l.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l = listen()
	defer l.Close()
	log.Error("again")
	if got := receive(); !strings.HasPrefix(got["MESSAGE"], "again") || got["PRIORITY"] != "3" {
		t.Errorf("%v", got)
	}
}

// TestFormats writes each format, and has the counts of a queue in the format of its lines.
func TestFormats(t *testing.T) {
	for _, f := range []logline.Format{logline.Text, logline.JSON, logline.Journal} {
		synctest.Test(t, func(t *testing.T) {
			var out bytes.Buffer
			failing := true
			q := logqueue.New(writer(func(b []byte) (int, error) {
				if failing {
					failing = false
					return 0, net.ErrClosed
				}
				return out.Write(b)
			}))
			q.Format(func(to io.Writer) slog.Handler { return f.Handler(to, slog.LevelInfo) })
			log := slog.New(f.Handler(q, slog.LevelInfo))
			log.Info("lost")
			synctest.Wait()
			log.Info("read", "n", 1)
			q.Close(time.Hour)
			text := out.String()
			switch f {
			case logline.Text:
				if strings.Count(text, "level=") != 2 {
					t.Errorf("%s", text)
				}
			case logline.JSON:
				for line := range strings.Lines(text) {
					if !json.Valid([]byte(line)) {
						t.Errorf("%s is no JSON", line)
					}
				}
			case logline.Journal:
				if strings.Count(text, "PRIORITY=") != 2 {
					t.Errorf("%s", text)
				}
			}
			if !strings.Contains(text, "lines of this log were dropped") || !strings.Contains(text, "read") {
				t.Errorf("%s", text)
			}
		})
	}
	if logline.Format("xml").Check() == nil || logline.Auto.Check() != nil {
		t.Error("auto is a format, and xml is none")
	}
	if f := logline.Auto.Chosen(); f != logline.Text {
		t.Errorf("stderr is not the journal, and auto is %s", f)
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(b []byte) (int, error) { return w(b) }

// TestLevelGoesBack sets a level for a time: the level goes back by itself, a later setting
// replaces an earlier one with its time, and a reload does not end the time.
func TestLevelGoesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := logline.NewLevel(slog.LevelInfo)
		var ended atomic.Int32
		is := func(want slog.Level, timed bool) {
			t.Helper()
			if s := l.State(); l.Level() != want || s.InForce != want || s.Until.IsZero() == timed {
				t.Errorf("%v, want %v", s, want)
			}
		}
		set := func(level slog.Level, lasts time.Duration) {
			l.Set(level, lasts, func(logline.State) { ended.Add(1) })
		}
		is(slog.LevelInfo, false)
		set(slog.LevelDebug, time.Hour)
		time.Sleep(50 * time.Minute)
		set(slog.LevelError, time.Hour)
		time.Sleep(50 * time.Minute)
		is(slog.LevelError, true) // the first hour does not end the second one
		l.Configure(slog.LevelWarn)
		is(slog.LevelError, true)
		time.Sleep(11 * time.Minute)
		is(slog.LevelWarn, false)
		set(slog.LevelDebug, time.Hour)
		l.Reset()
		is(slog.LevelWarn, false)
		time.Sleep(2 * time.Hour)
		if n := ended.Load(); n != 1 {
			t.Errorf("%d times went by to their end, want 1", n)
		}
		l.Configure(slog.LevelInfo)
		is(slog.LevelInfo, false)
	})
}
