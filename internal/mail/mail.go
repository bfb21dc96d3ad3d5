// Package mail sends one text at a time to a mail server by SMTP (RFC 5321), over TLS. Begin
// reading at Server.Send.
//
// A password leaves only over TLS, and only to a server whose certificate is valid for the
// configured name. No header has a line break of a caller: addresses are checked, and other texts
// are encoded words (RFC 2047).
package mail

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"mime"
	"mime/quotedprintable"
	"net"
	netmail "net/mail"
	"net/netip"
	"net/smtp"
	"net/textproto"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/internal/keystore"
	"countersign/internal/secret"
)

// The values of Server.TLS.
const (
	StartTLS = "starttls" // RFC 3207, usually on port 587
	Implicit = "implicit" // RFC 8314, usually on port 465
	None     = "none"     // for a server of this machine only, without a password
)

// maxSubject is the largest length of a subject in bytes.
const maxSubject = 200

// Server is a mail server with the sender's account.
type Server struct {
	Address      string // host:port
	TLS          string // StartTLS, Implicit or None
	From         string // the sender's address
	User         string // "": no sign-in
	PasswordFile string // one line; read at each attempt
	CAFile       string // certificate authorities in PEM, in place of the system's; read at each attempt
}

// Check checks the fields. An error begins with the name of the configuration's field.
func (s Server) Check() error {
	host, port, err := net.SplitHostPort(s.Address)
	n, notPort := strconv.ParseUint(port, 10, 16)
	if err != nil || notPort != nil || host == "" || n == 0 {
		return fmt.Errorf("server: %q is not host:port, such as mail.example.com:587", s.Address)
	}
	if err := CheckAddress(s.From); err != nil {
		return fmt.Errorf("from: %w", err)
	}
	switch {
	case s.TLS != StartTLS && s.TLS != Implicit && s.TLS != None:
		return fmt.Errorf("tls: %q is none of starttls, implicit, none", s.TLS)
	case s.TLS == None && !local(host):
		return fmt.Errorf("tls: without TLS only a server of this machine can be used, such as 127.0.0.1:25, "+
			"and not %s", s.Address)
	case s.TLS == None && s.User != "":
		return errors.New("user: a password is sent over TLS only: set tls to starttls or implicit")
	case (s.User == "") != (s.PasswordFile == ""):
		return errors.New("user and password_file are set together, or neither")
	case strings.ContainsAny(s.User, "\r\n\x00"):
		return errors.New("user: it must be one line")
	}
	if s.CAFile != "" {
		_, err = s.trust(host)
	}
	return err
}

func local(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// CheckAddress checks the address of a mailbox, without a name and in ASCII: ops@example.com.
func CheckAddress(address string) error {
	parsed, err := netmail.ParseAddress(address)
	ascii := strings.IndexFunc(address, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
	if err != nil || parsed.Address != address || !ascii || len(address) > 254 || strings.ContainsAny(address, `<>"`) {
		return fmt.Errorf("%q is not an address such as ops@example.com", address)
	}
	return nil
}

// trust returns the TLS configuration for a host.
func (s Server) trust(host string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host}
	if s.CAFile == "" {
		return c, nil
	}
	pem, err := os.ReadFile(s.CAFile)
	if err != nil {
		return nil, fmt.Errorf("ca_file: %w", err)
	}
	c.RootCAs = x509.NewCertPool()
	if !c.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("ca_file: %s has no certificate in PEM", s.CAFile)
	}
	return c, nil
}

// Mail is a text to one recipient.
type Mail struct {
	ID      string // of letters, digits, - and _: the left part of the Message-ID, the same for all attempts
	To      string
	Subject string
	Text    string // lines that end with \n
	At      time.Time
}

// Send makes one attempt, and returns the last answer of the server.
func (s Server) Send(ctx context.Context, m Mail) (answer string, err error) {
	message, err := s.compose(m)
	if err != nil {
		return "", err
	}
	host, _, err := net.SplitHostPort(s.Address)
	if err != nil {
		return "", err
	}
	trust, err := s.trust(host)
	if err != nil {
		return "", err
	}
	conn, err := s.dial(ctx, trust)
	if err != nil {
		return "", fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	c, err := smtp.NewClient(conn, host)
	if err != nil {
		return "", fmt.Errorf("greeting: %w", err)
	}
	defer c.Close()
	if err := s.begin(c, trust); err != nil {
		return "", err
	}
	if err := c.Mail(s.From); err != nil {
		return "", fmt.Errorf("from %s: %w", s.From, err)
	}
	if err := c.Rcpt(m.To); err != nil {
		return "", fmt.Errorf("to %s: %w", m.To, err)
	}
	if answer, err = data(c.Text, message); err != nil {
		return "", fmt.Errorf("data: %w", err)
	}
	c.Quit() // the server has the message
	return answer, nil
}

func (s Server) dial(ctx context.Context, trust *tls.Config) (net.Conn, error) {
	var plain net.Dialer
	if s.TLS == Implicit {
		return (&tls.Dialer{NetDialer: &plain, Config: trust}).DialContext(ctx, "tcp", s.Address)
	}
	conn, err := plain.DialContext(ctx, "tcp", s.Address)
	if err != nil {
		return nil, err
	}
	if to, ok := conn.RemoteAddr().(*net.TCPAddr); s.TLS == None && !(ok && to.IP.IsLoopback()) {
		conn.Close() // localhost may resolve to another machine
		return nil, errors.New("without TLS only to this machine")
	}
	return conn, nil
}

// begin says hello, turns TLS on, and signs in.
func (s Server) begin(c *smtp.Client, trust *tls.Config) error {
	name, err := os.Hostname()
	if err != nil || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) || name == "" {
		name = "localhost"
	}
	if err := c.Hello(name); err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	if s.TLS == StartTLS {
		if offered, _ := c.Extension("STARTTLS"); !offered {
			return errors.New("the server offers no STARTTLS, and nothing is sent without TLS")
		}
		if err := c.StartTLS(trust); err != nil {
			return fmt.Errorf("starttls: %w", err)
		}
	}
	if s.User == "" {
		return nil
	}
	b, err := keystore.ReadSecret(s.PasswordFile, "password file")
	if err != nil {
		return err
	}
	defer b.Wipe()
	password := secret.New(bytes.TrimRight(b.Expose(), "\r\n"))
	if password.Empty() || bytes.ContainsAny(password.Expose(), "\r\n\x00") {
		return fmt.Errorf("password file %s: it must have the password on one line and nothing else", s.PasswordFile)
	}
	_, offered := c.Extension("AUTH")
	ways := strings.Fields(strings.ToUpper(offered))
	plain := slices.Contains(ways, "PLAIN")
	if !plain && !slices.Contains(ways, "LOGIN") {
		return errors.New("the server offers neither AUTH PLAIN nor AUTH LOGIN, so the user can't sign in")
	}
	if err := c.Auth(&signIn{s.User, password, plain}); err != nil {
		var refused *textproto.Error
		if errors.As(err, &refused) { // the text may repeat what was sent
			return fmt.Errorf("sign in as %s: the server answered %d", s.User, refused.Code)
		}
		return fmt.Errorf("sign in as %s: %w", s.User, err)
	}
	return nil
}

// signIn signs in by AUTH PLAIN (RFC 4616), or by AUTH LOGIN, which some servers offer alone. The
// connection has TLS: Check demands TLS with a user. smtp.PlainAuth would keep the password as a
// string.
type signIn struct {
	user     string
	password secret.Bytes
	plain    bool
}

func (a *signIn) Start(server *smtp.ServerInfo) (string, []byte, error) {
	switch {
	case !server.TLS:
		return "", nil, errors.New("a password is sent over TLS only")
	case a.plain:
		return "PLAIN", slices.Concat([]byte("\x00"+a.user+"\x00"), a.password.Expose()), nil
	}
	return "LOGIN", nil, nil
}

func (a *signIn) Next(question []byte, more bool) ([]byte, error) {
	switch asked := strings.ToLower(string(question)); {
	case !more:
		return nil, nil
	case !a.plain && strings.HasPrefix(asked, "user"):
		return []byte(a.user), nil
	case !a.plain && strings.HasPrefix(asked, "pass"):
		return a.password.Expose(), nil
	}
	return nil, errors.New("the server asks for neither user nor password")
}

// data sends the message, and returns the answer of the server. Package net/smtp would not return
// the answer.
func data(c *textproto.Conn, message []byte) (string, error) {
	n, err := c.Cmd("DATA")
	if err != nil {
		return "", err
	}
	c.StartResponse(n)
	_, _, err = c.ReadResponse(354)
	c.EndResponse(n)
	if err != nil {
		return "", err
	}
	w := c.DotWriter()
	if _, err := w.Write(message); err != nil {
		return "", err
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	code, text, err := c.ReadResponse(250)
	return fmt.Sprintf("%d %s", code, text), err
}

// compose returns the message in the form of RFC 5322, in ASCII.
func (s Server) compose(m Mail) ([]byte, error) {
	for _, address := range []string{s.From, m.To} {
		if err := CheckAddress(address); err != nil {
			return nil, err
		}
	}
	for _, c := range m.ID {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", c) {
			return nil, fmt.Errorf("the id %q of a mail has more than letters, digits, - and _", m.ID)
		}
	}
	subject := m.Subject
	if len(subject) > maxSubject {
		subject = strings.ToValidUTF8(subject[:maxSubject], "") + "…"
	}
	_, domain, _ := strings.Cut(s.From, "@")
	var b bytes.Buffer
	for _, h := range [][2]string{
		{"Date", m.At.UTC().Format(time.RFC1123Z)},
		{"From", s.From},
		{"To", m.To},
		{"Message-ID", "<" + m.ID + "@" + domain + ">"},
		{"Subject", mime.QEncoding.Encode("utf-8", subject)},
		{"Auto-Submitted", "auto-generated"}, // RFC 3834: no answer by a machine
		{"MIME-Version", "1.0"},
		{"Content-Type", "text/plain; charset=utf-8"},
		{"Content-Transfer-Encoding", "quoted-printable"},
	} {
		fmt.Fprintf(&b, "%s: %s\r\n", h[0], h[1])
	}
	b.WriteString("\r\n")
	w := quotedprintable.NewWriter(&b)
	if _, err := w.Write([]byte(m.Text)); err != nil {
		return nil, err
	}
	return b.Bytes(), w.Close()
}
