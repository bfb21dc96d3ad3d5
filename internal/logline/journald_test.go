package logline_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"countersign/internal/logline"
	"countersign/internal/scrub"
)

// needJournald skips the test, or fails it with REQUIRE_DEVICES=1, where journald can't be run in a
// mount namespace.
func needJournald(t *testing.T) {
	t.Helper()
	var missing string
	for _, path := range []string{
		"/lib/systemd/systemd-journald", "/usr/bin/journalctl", "/usr/bin/unshare", "/usr/bin/cc",
	} {
		if _, err := os.Stat(path); err != nil {
			missing = err.Error()
		}
	}
	if os.Geteuid() != 0 {
		missing = "only root can mount another /run"
	}
	switch {
	case missing != "" && os.Getenv("REQUIRE_DEVICES") == "1":
		t.Fatal(missing)
	case missing != "":
		t.Skip(missing)
	}
}

// inRun returns a command of bash in a mount namespace in which dir is /run.
func inRun(dir, script string, args ...string) *exec.Cmd {
	script = "mount --bind " + dir + " /run && " + script
	mounts := []string{"--mount", "--propagation", "private", "bash", "-c", script, "bash"}
	return exec.Command("unshare", append(mounts, args...)...)
}

// newRun makes a folder for /run with the folders of journald.
func newRun(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"systemd/journal", "log/journal"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// hostile are lines that a peer or a module may cause, with texts that end a line, a field or an
// entry, move a terminal's cursor, or are too long.
func hostile(log *slog.Logger) {
	text := "1\n2\nPRIORITY=0\nMESSAGE=forged\n\x1b[2J\x00\x9b31m\xff\u2028\u202e"
	log.Warn("refused", "request", "k4wq2vz5n3xa7bcd", "peer", text, "a b\n=c", "d",
		"err", errors.Join(errors.New(text), errors.New("b")), slog.Group("g", slog.Group("h", "v", text)),
		"empty", "", "long", strings.Repeat("x\n", 1<<20))
}

// TestNativeProtocol has libsystemd send the same fields as the handler, and compares the bytes of
// the datagrams.
func TestNativeProtocol(t *testing.T) {
	needJournald(t)
	dir := newRun(t)
	path := filepath.Join(dir, "systemd/journal/socket")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	receive := func() []byte {
		t.Helper()
		b := make([]byte, 1<<18)
		l.SetReadDeadline(time.Now().Add(time.Minute))
		n, err := l.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return b[:n]
	}
	send := filepath.Join(t.TempDir(), "send")
	if out, err := exec.Command("cc", "-o", send, "testdata/send.c").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	socket, err := logline.DialJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	log := slog.New(new(scrub.Scrubber).Handler(logline.Journal.Handler(socket, slog.LevelInfo)))
	for _, line := range []func(){
		func() { log.Info("plain", "a", "b") }, func() { log.Error("m", "two", "1\n2", "end", "x\n") },
	} {
		line()
		ours := receive()
		var fields []string
		for name, value := range fieldsOf(t, ours) {
			fields = append(fields, name+"="+value)
		}
		// The map has lost the order of the fields.
		slices.SortFunc(fields, func(x, y string) int {
			name := func(s string) []byte { return []byte(strings.SplitAfter(s, "=")[0][:strings.Index(s, "=")]) }
			return bytes.Index(ours, name(x)) - bytes.Index(ours, name(y))
		})
		cmd := inRun(dir, `exec "$@"`, append([]string{send}, fields...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if theirs := receive(); !bytes.Equal(ours, theirs) {
			t.Errorf("the handler sends\n%q, and libsystemd\n%q", ours, theirs)
		}
	}
}

// TestJournald sends lines to a real journald, and finds the line of a request by journalctl. A
// hostile text is one field of one entry.
func TestJournald(t *testing.T) {
	needJournald(t)
	dir := newRun(t)
	journald := inRun(dir, "exec /lib/systemd/systemd-journald")
	if err := journald.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		journald.Process.Signal(syscall.SIGTERM)
		journald.Wait()
	})
	var socket interface{ Close() error }
	var log *slog.Logger
	eventually(t, "journald takes entries", func() bool {
		s, err := logline.DialJournal(filepath.Join(dir, "systemd/journal/socket"))
		if err != nil {
			return false
		}
		socket = s
		log = slog.New(new(scrub.Scrubber).Handler(logline.Journal.Handler(s, slog.LevelInfo)))
		return true
	})
	defer socket.Close()
	hostile(log)
	log.Info("the last line", "request", "another")
	find := func(args ...string) string {
		args = append([]string{"--directory", filepath.Join(dir, "log/journal"), "--no-pager", "--all"}, args...)
		out, _ := exec.Command("journalctl", args...).Output() // fails while there is no file
		return string(out)
	}
	eventually(t, "the last line is in the journal", func() bool {
		return strings.Contains(find("COUNTERSIGN_REQUEST=another"), "the last line request=another")
	})
	lines := find("COUNTERSIGN_REQUEST=k4wq2vz5n3xa7bcd", "--output=json")
	if strings.Count(lines, "\n") != 1 {
		t.Fatalf("%d entries have the id", strings.Count(lines, "\n"))
	}
	var entry map[string]any
	if err := json.Unmarshal([]byte(lines), &entry); err != nil {
		t.Fatal(err)
	}
	message, is := entry["MESSAGE"].(string)
	if !is || !strings.HasPrefix(message, `refused request=k4wq2vz5n3xa7bcd peer="1\n2\nPRIORITY=0\n`) ||
		strings.ContainsFunc(message, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		t.Errorf("the message is %.200q", entry["MESSAGE"])
	}
	if entry["PRIORITY"] != "4" || entry["SYSLOG_IDENTIFIER"] != "countersignd" || entry["COUNTERSIGN_A_B__C"] != "d" {
		t.Errorf("%v", entry)
	}
	text := find("COUNTERSIGN_REQUEST=k4wq2vz5n3xa7bcd")
	if strings.Count(text, "\n") != 1 || strings.Contains(text, "\x1b") {
		t.Errorf("journalctl shows %.300q", text)
	}
}

// TestHostileTexts writes lines with hostile texts in each format: the line is one line or one
// entry, of a bounded length, and has no control character.
func TestHostileTexts(t *testing.T) {
	for _, format := range []logline.Format{logline.Text, logline.JSON, logline.Journal} {
		var out bytes.Buffer
		hostile(slog.New(new(scrub.Scrubber).Handler(format.Handler(&out, slog.LevelInfo))))
		text := out.String()
		if len(text) > 16<<10 {
			t.Errorf("%s: %d bytes", format, len(text))
		}
		if format == logline.Journal {
			text = fieldsOf(t, out.Bytes())["MESSAGE"] + "\n"
		}
		if strings.Count(text, "\n") != 1 || strings.ContainsFunc(strings.TrimSuffix(text, "\n"), func(r rune) bool {
			return r < ' ' || r >= 0x7f && r < 0xa0
		}) {
			t.Errorf("%s: %.300q", format, text)
		}
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}
