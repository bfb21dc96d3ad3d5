package logline

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"unicode"
)

// JournalSocket is the socket of journald for entries with fields.
const JournalSocket = "/run/systemd/journal/socket"

// journalSocket is a connection to journald. A restart of journald replaces the socket's file, so a
// write that fails connects again.
type journalSocket struct {
	path string
	mu   sync.Mutex
	conn net.Conn // nil: not connected
}

// DialJournal returns a writer to journald, for entries of the format Journal. Each Write sends one
// entry.
func DialJournal(path string) (io.WriteCloser, error) {
	s := &journalSocket{path: path}
	return s, s.dial()
}

// dial connects. The caller holds mu, or nobody else has the socket.
func (s *journalSocket) dial() (err error) {
	s.close()
	if s.conn, err = net.Dial("unixgram", s.path); err != nil {
		s.conn = nil
		return fmt.Errorf("journald: %w", err)
	}
	return nil
}

func (s *journalSocket) close() {
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
}

func (s *journalSocket) Write(entry []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		if n, err := s.conn.Write(entry); err == nil {
			return n, nil
		}
	}
	if err := s.dial(); err != nil {
		return 0, err
	}
	return s.conn.Write(entry)
}

// Close ends the connection.
func (s *journalSocket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.close()
	return nil
}

// fields is a handler for journald (systemd's Native Journal Protocol). The field MESSAGE has the
// message and the attributes, as a person reads them. Each attribute is a field too, so that
// journalctl COUNTERSIGN_REQUEST=ID finds the lines of a request.
type fields struct {
	to    io.Writer
	level slog.Leveler
	attrs []field // of WithAttrs
	group string  // of WithGroup, with a dot at the end
}

type field struct{ name, value string }

func (f *fields) Enabled(_ context.Context, level slog.Level) bool { return level >= f.level.Level() }

func (f *fields) WithAttrs(attrs []slog.Attr) slog.Handler {
	more := *f
	more.attrs = append([]field(nil), f.attrs...)
	for _, a := range attrs {
		more.attrs = appendField(more.attrs, f.group, a)
	}
	return &more
}

func (f *fields) WithGroup(name string) slog.Handler {
	if name == "" {
		return f
	}
	more := *f
	more.group += name + "."
	return &more
}

func appendField(all []field, group string, a slog.Attr) []field {
	if a.Equal(slog.Attr{}) { // handlers leave out the empty attribute
		return all
	}
	v := a.Value.Resolve()
	if v.Kind() != slog.KindGroup {
		return append(all, field{group + a.Key, v.String()})
	}
	if a.Key != "" {
		group += a.Key + "."
	}
	for _, member := range v.Group() {
		all = appendField(all, group, member)
	}
	return all
}

func (f *fields) Handle(_ context.Context, r slog.Record) error {
	all := append([]field(nil), f.attrs...)
	r.Attrs(func(a slog.Attr) bool {
		all = appendField(all, f.group, a)
		return true
	})
	var entry bytes.Buffer
	message := r.Message
	if strings.ContainsFunc(message, func(r rune) bool { return !unicode.IsPrint(r) }) {
		message = strconv.Quote(message)
	}
	for _, each := range all {
		message += " " + quoted(each.name) + "=" + quoted(each.value)
	}
	put(&entry, "MESSAGE", message)
	put(&entry, "PRIORITY", priority(r.Level))
	put(&entry, "SYSLOG_IDENTIFIER", "countersignd")
	for _, each := range all {
		put(&entry, "COUNTERSIGN_"+fieldName(each.name), each.value)
	}
	_, err := f.to.Write(entry.Bytes())
	return err
}

// put appends a field. A value with line ends has its length in front.
func put(entry *bytes.Buffer, name, value string) {
	entry.WriteString(name)
	if !strings.Contains(value, "\n") {
		entry.WriteString("=" + value + "\n")
		return
	}
	entry.WriteByte('\n')
	entry.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(value))))
	entry.WriteString(value + "\n")
}

// maxFieldName is the longest name of an attribute in the name of a field. journald ignores a field
// with a name of more than 64 bytes.
const maxFieldName = 64 - len("COUNTERSIGN_")

// fieldName returns the name of an attribute in the characters of journald's names.
func fieldName(name string) string {
	name = strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z':
			return r - 'a' + 'A'
		case r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
			return r
		}
		return '_'
	}, name)
	return name[:min(len(name), maxFieldName)]
}

// priority returns the level in syslog's numbers (RFC 5424 section 6.2.1).
func priority(level slog.Level) string {
	switch {
	case level >= slog.LevelError:
		return "3"
	case level >= slog.LevelWarn:
		return "4"
	case level >= slog.LevelInfo:
		return "6"
	}
	return "7"
}

// quoted returns a value as slog.TextHandler writes a value: with quotes where a reader needs them.
func quoted(value string) string {
	plain := func(r rune) bool { return r != ' ' && r != '"' && r != '=' && unicode.IsPrint(r) }
	if value != "" && !strings.ContainsFunc(value, func(r rune) bool { return !plain(r) }) {
		return value
	}
	return strconv.Quote(value)
}
