package mail

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"mime"
	"mime/quotedprintable"
	"net"
	netmail "net/mail"
	"net/textproto"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/internal/scantest"
)

func TestMain(m *testing.M) { os.Exit(scantest.Run(m)) }

// server is an SMTP server with TLS, in the process of the test.
type server struct {
	t        *testing.T
	listener net.Listener
	tls      *tls.Config
	caFile   string

	implicit bool
	starttls bool   // offered
	auth     string // methods offered
	user     string
	password string
	answer   string // to the message, in place of 250

	mu    sync.Mutex
	got   []string // messages
	said  []string // commands, with the state of TLS
	plain bool     // a credential came without TLS
}

// newServer starts a server whose certificate is for 127.0.0.1.
func newServer(t *testing.T, change func(*server)) *server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "mail"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s := &server{
		t: t, caFile: filepath.Join(t.TempDir(), "ca.pem"), starttls: true, auth: "PLAIN LOGIN",
		user: "countersign", password: "correct horse",
		tls: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
	}
	scantest.Secret("the password of a mail server", []byte(s.password))
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(s.caFile, block, 0o600); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(s)
	}
	if s.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(func() { s.listener.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			conn, err := s.listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { s.serve(conn) })
		}
	})
	return s
}

func (s *server) serve(conn net.Conn) {
	defer func() { conn.Close() }()
	secure := s.implicit
	if secure {
		conn = tls.Server(conn, s.tls)
	}
	text := textproto.NewConn(conn)
	say := func(line string) { text.PrintfLine("%s", line) }
	line := func() string { l, _ := text.ReadLine(); return l }
	decoded := func() string {
		b, _ := base64.StdEncoding.DecodeString(line())
		return string(b)
	}
	authenticated := func(user, password string) {
		s.mu.Lock()
		s.plain = s.plain || !secure
		s.mu.Unlock()
		if user == s.user && password == s.password {
			say("235 welcome")
		} else {
			say("535 no: " + base64.StdEncoding.EncodeToString([]byte(password))) // as some servers do
		}
	}
	say("220 mail ESMTP")
	for {
		l, err := text.ReadLine()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.said = append(s.said, fmt.Sprintf("%s tls=%v", l, secure))
		if !strings.HasPrefix(l, "AUTH ") {
			scantest.Saw("a command to the mail server", l)
		}
		s.mu.Unlock()
		verb, rest, _ := strings.Cut(l, " ")
		switch verb {
		case "EHLO":
			say("250-mail")
			if s.starttls && !secure {
				say("250-STARTTLS")
			}
			if s.auth != "" {
				say("250-AUTH " + s.auth)
			}
			say("250 8BITMIME")
		case "STARTTLS":
			say("220 go on")
			conn = tls.Server(conn, s.tls)
			text, secure = textproto.NewConn(conn), true
		case "AUTH":
			if arg, ok := strings.CutPrefix(rest, "PLAIN "); ok {
				b, _ := base64.StdEncoding.DecodeString(arg)
				parts := strings.Split(string(b), "\x00")
				authenticated(parts[1], parts[2])
				break
			}
			say("334 " + base64.StdEncoding.EncodeToString([]byte("Username:")))
			user := decoded()
			say("334 " + base64.StdEncoding.EncodeToString([]byte("Password:")))
			authenticated(user, decoded())
		case "MAIL", "RCPT":
			say("250 ok")
		case "DATA":
			say("354 go on")
			b, err := io.ReadAll(text.DotReader())
			if err != nil {
				return
			}
			if s.answer != "" {
				say(s.answer)
				break
			}
			s.mu.Lock()
			scantest.Saw("a mail", string(b))
			s.got = append(s.got, string(b))
			s.mu.Unlock()
			say("250 queued as 4711")
		case "QUIT":
			say("221 bye")
			return
		default:
			say("502 unknown")
		}
	}
}

// client returns the configuration for a server.
func (s *server) client(t *testing.T, mode string) Server {
	t.Helper()
	path := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(path, []byte(s.password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Server{
		Address: s.listener.Addr().String(), TLS: mode, From: "alerts@example.com", User: s.user,
		PasswordFile: path, CAFile: s.caFile,
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
				s := newServer(t, func(s *server) { s.implicit, s.auth = mode == Implicit, auth })
				answer, err := s.client(t, mode).Send(t.Context(), sample)
				if err != nil || answer != "250 queued as 4711" || s.plain || len(s.got) != 1 {
					t.Fatalf("%q, %v; the server has %q", answer, err, s.got)
				}
				m, err := netmail.ReadMessage(bufio.NewReader(strings.NewReader(s.got[0])))
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
	other := newServer(t, nil)
	for name, change := range map[string]func(s *server, c *Server){
		"no STARTTLS": func(s *server, c *Server) { s.starttls = false },
		"a stranger":  func(s *server, c *Server) { c.CAFile = other.caFile },
		"another name": func(s *server, c *Server) {
			c.Address = strings.Replace(c.Address, "127.0.0.1", "127.0.0.2", 1)
		},
		"plain greeter": func(s *server, c *Server) { c.TLS = Implicit },
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, nil)
			c := s.client(t, StartTLS)
			change(s, &c)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if _, err := c.Send(ctx, sample); err == nil {
				t.Error("the mail was sent")
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, line := range s.said {
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
	s := newServer(t, nil)
	c := s.client(t, StartTLS)
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
	full := newServer(t, func(s *server) { s.answer = "452 the disk is full" })
	_, err = full.client(t, StartTLS).Send(t.Context(), sample)
	if err == nil || !strings.Contains(err.Error(), "452") {
		t.Errorf("%v", err)
	}
	without := newServer(t, func(s *server) { s.auth = "XOAUTH2" })
	_, err = without.client(t, StartTLS).Send(t.Context(), sample)
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
	s := newServer(t, nil)
	c := s.client(t, StartTLS)
	evil := sample
	evil.Subject = "a\r\nBcc: eve@example.com\r\n\r\nhello \u202e" + strings.Repeat("long ", 100)
	evil.Text = "one\r\n.\r\nMAIL FROM:<eve@example.com>\r\n"
	if _, err := c.Send(t.Context(), evil); err != nil {
		t.Fatal(err)
	}
	m, err := netmail.ReadMessage(bufio.NewReader(strings.NewReader(s.got[0])))
	if err != nil || m.Header.Get("Bcc") != "" || len(m.Header) != 9 {
		t.Errorf("%v, %v", m.Header, err)
	}
	subject, err := new(mime.WordDecoder).DecodeHeader(m.Header.Get("Subject"))
	if err != nil || !strings.HasPrefix(subject, "a\r\nBcc:") {
		t.Errorf("%q, %v", subject, err)
	}
	for _, line := range s.said {
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
	local := newServer(t, func(s *server) { s.starttls = false })
	c := Server{Address: local.listener.Addr().String(), TLS: None, From: "a@example.com"}
	if err := c.Check(); err != nil {
		t.Error(err)
	}
	if _, err := c.Send(t.Context(), sample); err != nil {
		t.Error(err)
	}
}
