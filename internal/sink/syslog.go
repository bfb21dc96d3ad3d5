package sink

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"countersign/audit"

	"golang.org/x/sys/unix"
)

// Syslog is a Receiver that sends events to a syslog server over TLS (RFC 5425), each as a message
// of RFC 5424 with the facility 13 (log audit). PROCID is the id of the audit log, and the message
// is the line of a file sink. There is no structured data: the name of an element needs an
// enterprise number, and the project has none.
//
// Syslog has no acknowledgement. Deliver returns nil when the server's kernel has acknowledged all
// bytes. A server that ends before reading them loses them: the numbers of the next events show the
// gap.
type Syslog struct {
	Address string // host:port
	CAFile  string // path of certificate authorities in PEM, read for each connection; "": those of the system
	Host    string // HOSTNAME of the messages
	LogID   string // of the audit log: the part of its name behind the slash

	conn   *tls.Conn
	tcp    *net.TCPConn
	closed chan struct{} // closed when the server has ended the connection
}

const (
	facility     = 13 // log audit
	severityOK   = 6  // informational
	severityFail = 4  // warning: the outcome is a refusal or a failure
)

// Resume returns 0: a server does not tell what it has.
func (*Syslog) Resume() (uint64, error) { return 0, nil }

// Deliver sends the messages and waits for the acknowledgement of their last byte.
func (s *Syslog) Deliver(ctx context.Context, b Batch) error {
	if err := s.connect(ctx); err != nil {
		return err
	}
	var messages []byte
	for _, g := range b.Gaps {
		messages = s.message(messages, severityFail, time.Now().UnixMilli(), "Gap", g.line())
	}
	for _, r := range b.Events {
		severity := severityOK
		if r.Event.Outcome != "ok" {
			severity = severityFail
		}
		line, err := audit.JSONLines.AppendEvent(nil, r.Index, r.Entry)
		if err != nil {
			return err
		}
		messages = s.message(messages, severity, r.Event.TimeMS, string(r.Event.Type), line)
	}
	end, _ := ctx.Deadline()
	s.conn.SetWriteDeadline(end)
	_, err := s.conn.Write(messages)
	if err == nil {
		err = s.acknowledged(ctx)
	}
	if err != nil {
		s.Close()
	}
	return err
}

// message appends a message with its length (octet counting of RFC 5425).
func (s *Syslog) message(b []byte, severity int, ms int64, id string, line []byte) []byte {
	at := time.UnixMilli(ms).UTC().Format("2006-01-02T15:04:05.000Z")
	text := fmt.Sprintf("<%d>1 %s %s countersign %s %s - %s", facility*8+severity, at, name(s.Host, 255),
		name(s.LogID, 128), name(id, 32), bytes.TrimSuffix(line, []byte("\n")))
	return append(append(strconv.AppendInt(b, int64(len(text)), 10), ' '), text...)
}

// name returns a text as a field of the header: printable ASCII without blanks.
func name(text string, most int) string {
	text = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return -1
		}
		return r
	}, text)
	if text = text[:min(len(text), most)]; text == "" {
		return "-"
	}
	return text
}

// connect makes a connection unless there is one that the server has not ended.
func (s *Syslog) connect(ctx context.Context) error {
	if s.conn != nil {
		select {
		case <-s.closed:
			s.Close()
		default:
			return nil
		}
	}
	host, _, err := net.SplitHostPort(s.Address)
	if err != nil {
		return err
	}
	trust := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host}
	if s.CAFile != "" {
		pem, err := os.ReadFile(s.CAFile)
		if err != nil {
			return fmt.Errorf("ca_file: %w", err)
		}
		trust.RootCAs = x509.NewCertPool()
		if !trust.RootCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("ca_file: %s has no certificate in PEM", s.CAFile)
		}
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.Address)
	if err != nil {
		return err
	}
	secured := tls.Client(conn, trust)
	if err := secured.HandshakeContext(ctx); err != nil {
		conn.Close()
		return err
	}
	closed := make(chan struct{})
	go func() { // a server sends nothing but the end of the connection
		defer close(closed)
		b := make([]byte, 1)
		secured.Read(b)
	}()
	s.conn, s.tcp, s.closed = secured, conn.(*net.TCPConn), closed
	return nil
}

// acknowledged waits until the server's kernel has acknowledged all bytes.
func (s *Syslog) acknowledged(ctx context.Context) error {
	raw, err := s.tcp.SyscallConn()
	if err != nil {
		return err
	}
	for {
		var left int
		var failed error
		if err := raw.Control(func(fd uintptr) {
			left, failed = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
		}); err != nil {
			return err
		}
		if failed != nil {
			return failed
		}
		if left == 0 {
			select {
			case <-s.closed:
				return errors.New("the server has ended the connection")
			default:
				return nil
			}
		}
		timer := time.NewTimer(5 * time.Millisecond)
		select {
		case <-ctx.Done():
			return fmt.Errorf("the server has not acknowledged %d bytes: %w", left, ctx.Err())
		case <-s.closed:
			return errors.New("the server has ended the connection")
		case <-timer.C:
		}
	}
}

// Close ends the connection.
func (s *Syslog) Close() error {
	if s.conn == nil {
		return nil
	}
	s.conn.SetWriteDeadline(time.Now().Add(time.Second)) // for the alert close_notify
	err := s.conn.Close()
	s.conn, s.tcp = nil, nil
	return err
}
