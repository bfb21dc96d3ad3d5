package mail

import (
	"bufio"
	"context"
	"encoding/base64"
	"io"
	"mime"
	"mime/quotedprintable"
	"net"
	netmail "net/mail"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign/internal/mail/mailtest"
	"countersign/internal/scantest"
)

func TestMain(m *testing.M) { os.Exit(scantest.Run(m)) }

// account returns the configuration for a server.
func account(t *testing.T, s *mailtest.Server, mode string) Server {
	t.Helper()
	path := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(path, []byte(s.Password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Server{
		Address: s.Address(), TLS: mode, From: "alerts@example.com", User: s.User,
		PasswordFile: path, CAFile: s.CAFile,
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	return c
}

var sample = Mail{
	ID: "alert_1", To: "ops@example.com", Subject: "countersign: replays: critical", At: time.Unix(1_800_000_000, 0),
	Text: "14 replays were refused – within 1h\n.\nend\n",
}

// TestSend sends a mail over both kinds of TLS and with both kinds of sign-in, and reads the mail
// as a program for mail does.
func TestSend(t *testing.T) {
	for _, mode := range []string{StartTLS, Implicit} {
		for _, auth := range []string{"PLAIN LOGIN", "LOGIN"} {
			t.Run(mode+" "+auth, func(t *testing.T) {
				s := mailtest.New(t, func(s *mailtest.Server) { s.Implicit, s.Auth = mode == Implicit, auth })
				answer, err := account(t, s, mode).Send(t.Context(), sample)
				if err != nil || answer != "250 queued as 4711" || s.Plain() || len(s.Got()) != 1 {
					t.Fatalf("%q, %v; the server has %q", answer, err, s.Got())
				}
				m, err := netmail.ReadMessage(bufio.NewReader(strings.NewReader(s.Got()[0])))
				if err != nil {
					t.Fatal(err)
				}
				text, err := io.ReadAll(quotedprintable.NewReader(m.Body))
				if err != nil || strings.ReplaceAll(string(text), "\r\n", "\n") != sample.Text {
					t.Errorf("%q, %v", text, err)
				}
				for name, want := range map[string]string{
					"Subject": sample.Subject, "To": sample.To, "From": "alerts@example.com",
					"Message-Id": "<alert_1@example.com>", "Auto-Submitted": "auto-generated",
				} {
					if got := m.Header.Get(name); got != want {
						t.Errorf("%s: %q, want %q", name, got, want)
					}
				}
			})
		}
	}
}

// TestNothingWithoutTLS: without STARTTLS, with a stranger's certificate, or with a certificate for
// another name, the server gets neither a password nor a mail.
func TestNothingWithoutTLS(t *testing.T) {
	other := mailtest.New(t, nil)
	for name, change := range map[string]func(s *mailtest.Server, c *Server){
		"no STARTTLS": func(s *mailtest.Server, c *Server) { s.StartTLS = false },
		"a stranger":  func(s *mailtest.Server, c *Server) { c.CAFile = other.CAFile },
		"another name": func(s *mailtest.Server, c *Server) {
			c.Address = strings.Replace(c.Address, "127.0.0.1", "127.0.0.2", 1)
		},
		"plain greeter": func(s *mailtest.Server, c *Server) { c.TLS = Implicit },
	} {
		t.Run(name, func(t *testing.T) {
			s := mailtest.New(t, nil)
			c := account(t, s, StartTLS)
			change(s, &c)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if _, err := c.Send(ctx, sample); err == nil {
				t.Error("the mail was sent")
			}
			for _, line := range s.Said() {
				if strings.HasPrefix(line, "AUTH") || strings.HasPrefix(line, "MAIL") {
					t.Errorf("the server was told %s", line)
				}
			}
		})
	}
}

// TestRefusals: an error says what the server has answered, and never has the password, even where
// the server repeats the password.
func TestRefusals(t *testing.T) {
	s := mailtest.New(t, nil)
	c := account(t, s, StartTLS)
	if err := os.WriteFile(c.PasswordFile, []byte("another password\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := c.Send(t.Context(), sample)
	repeated := base64.StdEncoding.EncodeToString([]byte("another password"))
	if err == nil || !strings.Contains(err.Error(), "535") || strings.Contains(err.Error(), repeated) ||
		strings.Contains(err.Error(), "another") {
		t.Errorf("%v", err)
	}
	if err := os.Chmod(c.PasswordFile, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Send(t.Context(), sample); err == nil || !strings.Contains(err.Error(), "mode") {
		t.Errorf("a password that everybody can read: %v", err)
	}
	full := mailtest.New(t, func(s *mailtest.Server) { s.Answer = "452 the disk is full" })
	_, err = account(t, full, StartTLS).Send(t.Context(), sample)
	if err == nil || !strings.Contains(err.Error(), "452") {
		t.Errorf("%v", err)
	}
	without := mailtest.New(t, func(s *mailtest.Server) { s.Auth = "XOAUTH2" })
	_, err = account(t, without, StartTLS).Send(t.Context(), sample)
	if err == nil || !strings.Contains(err.Error(), "AUTH PLAIN") {
		t.Errorf("%v", err)
	}
}

// TestSilentServer: the timeout of the caller ends an attempt at a server that says nothing.
func TestSilentServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, mode := range []string{StartTLS, Implicit} {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			if conn, err := l.Accept(); err == nil {
				defer conn.Close()
				cancel()
				io.Copy(io.Discard, conn)
			}
		}()
		c := Server{Address: l.Addr().String(), TLS: mode, From: "alerts@example.com"}
		if _, err := c.Send(ctx, sample); err == nil {
			t.Error("a silent server has taken a mail")
		}
	}
}

// TestNoHeaderInjection: line breaks of texts add no header and no recipient.
func TestNoHeaderInjection(t *testing.T) {
	s := mailtest.New(t, nil)
	c := account(t, s, StartTLS)
	evil := sample
	evil.Subject = "a\r\nBcc: eve@example.com\r\n\r\nhello \u202e" + strings.Repeat("long ", 100)
	evil.Text = "one\r\n.\r\nMAIL FROM:<eve@example.com>\r\n"
	if _, err := c.Send(t.Context(), evil); err != nil {
		t.Fatal(err)
	}
	m, err := netmail.ReadMessage(bufio.NewReader(strings.NewReader(s.Got()[0])))
	if err != nil || m.Header.Get("Bcc") != "" || len(m.Header) != 9 {
		t.Errorf("%v, %v", m.Header, err)
	}
	subject, err := new(mime.WordDecoder).DecodeHeader(m.Header.Get("Subject"))
	if err != nil || !strings.HasPrefix(subject, "a\r\nBcc:") {
		t.Errorf("%q, %v", subject, err)
	}
	for _, line := range s.Said() {
		if strings.Contains(line, "eve") {
			t.Errorf("the server was told %s", line)
		}
	}
	for _, address := range []string{
		"", "ops", "ops@example.com\r\nBcc: eve@example.com", "Ops <ops@example.com>",
		"ops@example.com, eve@example.com",
		"ops @example.com", "öps@example.com", "<ops@example.com>", "ops@example.com>", "\"a b\"@example.com",
	} {
		bad := sample
		bad.To = address
		if _, err := c.Send(t.Context(), bad); err == nil || CheckAddress(address) == nil {
			t.Errorf("%q is taken for an address", address)
		}
	}
	bad := sample
	bad.ID = "a>\r\nBcc: eve"
	if _, err := c.Send(t.Context(), bad); err == nil {
		t.Error("a Message-ID with a line break")
	}
}

// TestCheck names the field of each fault.
func TestCheck(t *testing.T) {
	good := Server{Address: "mail.example.com:587", TLS: StartTLS, From: "a@example.com", User: "u", PasswordFile: "p"}
	for want, change := range map[string]func(*Server){
		"":         func(*Server) {},
		"server: ": func(s *Server) { s.Address = "mail.example.com" },
		"from: ":   func(s *Server) { s.From = "Alerts <a@example.com>" },
		"tls: ":    func(s *Server) { s.TLS = "yes" },
		"tls: without TLS only": func(s *Server) {
			s.TLS, s.User, s.PasswordFile = None, "", ""
		},
		"user: a password": func(s *Server) { s.TLS, s.Address = None, "127.0.0.1:25" },
		"user and":         func(s *Server) { s.PasswordFile = "" },
		"user: it":         func(s *Server) { s.User = "a\nb" },
		"ca_file: ":        func(s *Server) { s.CAFile = "/does/not/exist" },
	} {
		s := good
		change(&s)
		if err := s.Check(); (err == nil) != (want == "") || err != nil && !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	local := mailtest.New(t, func(s *mailtest.Server) { s.StartTLS = false })
	c := Server{Address: local.Address(), TLS: None, From: "a@example.com"}
	if err := c.Check(); err != nil {
		t.Error(err)
	}
	if _, err := c.Send(t.Context(), sample); err != nil {
		t.Error(err)
	}
}
