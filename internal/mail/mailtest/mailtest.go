// Package mailtest has a mail server for tests of what sends mail.
package mailtest

import (
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
	"net"
	"net/textproto"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/internal/scantest"
)

// Server is an SMTP server with TLS, in the process of the test. The exported fields are set before
// the first connection, except by Change.
type Server struct {
	TLS    *tls.Config
	CAFile string // the certificate of the server, in PEM

	Implicit bool
	StartTLS bool   // offered
	Auth     string // methods offered
	User     string
	Password string
	Answer   string // to the message, in place of 250

	listener net.Listener

	mu    sync.Mutex
	got   []string
	said  []string
	plain bool
}

// Address is the host:port of the server.
func (s *Server) Address() string { return s.listener.Addr().String() }

// Got returns the messages.
func (s *Server) Got() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.got)
}

// Said returns the commands of clients, each with the state of TLS.
func (s *Server) Said() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.said)
}

// Plain reports that a credential came without TLS.
func (s *Server) Plain() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.plain
}

// Change changes the fields of a server that runs.
func (s *Server) Change(change func(*Server)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

// New starts a server until the end of the test. The certificate is for 127.0.0.1, unless change,
// which is called before the start, gives the server another one.
func New(t testing.TB, change func(*Server)) *Server {
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
	s := &Server{
		CAFile: filepath.Join(t.TempDir(), "ca.pem"), StartTLS: true, Auth: "PLAIN LOGIN",
		User: "countersign", Password: "correct horse",
		TLS: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(s.CAFile, block, 0o600); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(s)
	}
	scantest.Secret("the password of a mail server", []byte(s.Password))
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

func (s *Server) serve(conn net.Conn) {
	defer func() { conn.Close() }()
	secure := s.Implicit
	if secure {
		conn = tls.Server(conn, s.TLS)
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
		known := user == s.User && password == s.Password
		s.mu.Unlock()
		if known {
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
			if s.StartTLS && !secure {
				say("250-STARTTLS")
			}
			if s.Auth != "" {
				say("250-AUTH " + s.Auth)
			}
			say("250 8BITMIME")
		case "STARTTLS":
			say("220 go on")
			conn = tls.Server(conn, s.TLS)
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
			if s.Answer != "" {
				say(s.Answer)
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
