// Package mirrortest has an SFTP server for tests: OpenSSH's sshd, one process for each
// connection, behind a line that the test can watch, cut and stop.
package mirrortest

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"countersign/internal/scantest"

	"golang.org/x/crypto/ssh"
)

// Server is an SFTP server on loopback.
type Server struct {
	Address string // host:port
	User    string
	Folder  string // of the files
	KeyFile string // of the client
	HostKey string // type and key

	t      testing.TB
	config string
	dir    string

	mu    sync.Mutex
	away  bool                   // guarded by mu: connections are refused
	lines map[net.Conn]*exec.Cmd // guarded by mu: with their sshd
	ended sync.WaitGroup

	sent   atomic.Int64 // bytes from clients
	cut    atomic.Int64 // bytes from clients until the line is cut; negative: it is not cut
	silent atomic.Bool  // nothing passes to clients
	rate   atomic.Int64 // bytes per second from clients; 0: as fast as can be
}

// sshd is Debian's path, which is in no user's PATH.
const sshd = "/usr/sbin/sshd"

// New starts a server with an empty folder and a client's key, and ends the server with the test.
func New(t testing.TB) *Server {
	t.Helper()
	if _, err := os.Stat(sshd); err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "" {
			t.Skipf("OpenSSH's server is missing: %v", err)
		}
		t.Fatal(err)
	}
	who, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &Server{
		User: who.Username, Folder: filepath.Join(dir, "files"), t: t, dir: dir,
		config: filepath.Join(dir, "sshd_config"), lines: map[net.Conn]*exec.Cmd{},
	}
	s.cut.Store(-1)
	if os.Geteuid() == 0 { // the folder of sshd's separation of privileges
		s.ok(os.MkdirAll("/run/sshd", 0o755))
	}
	s.ok(os.Mkdir(s.Folder, 0o755))
	s.HostKey = s.NewKey("host")
	s.KeyFile = filepath.Join(dir, "client")
	s.Authorize(s.NewKey("client"))
	s.configure("")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Address = listener.Addr().String()
	s.ended.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			s.serve(conn)
		}
	})
	t.Cleanup(func() {
		listener.Close()
		s.Away(true)
		s.ended.Wait()
	})
	return s
}

// Lack takes requests of SFTP and their extensions from the server, such as "fsync,posix-rename".
func (s *Server) Lack(requests string) { s.configure(" -P " + requests) }

func (s *Server) configure(options string) {
	s.t.Helper()
	s.ok(os.WriteFile(s.config, fmt.Appendf(nil, `HostKey %[1]s/host
AuthorizedKeysFile %[1]s/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp /usr/lib/openssh/sftp-server -u 0077%[2]s
`, s.dir, options), 0o600))
}

func (s *Server) ok(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// NewKey makes a private key in a file of the server's folder of keys, and returns the public one.
func (s *Server) NewKey(name string) (public string) {
	s.t.Helper()
	pub, private, err := ed25519.GenerateKey(rand.Reader)
	s.ok(err)
	block, err := ssh.MarshalPrivateKey(private, "")
	s.ok(err)
	key, err := ssh.NewPublicKey(pub)
	s.ok(err)
	scantest.Secret("the SSH key "+name, private.Seed())
	s.ok(os.WriteFile(s.Key(name), pem.EncodeToMemory(block), 0o600))
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

// Key returns the path of a private key.
func (s *Server) Key(name string) string { return filepath.Join(s.dir, name) }

// Authorize lets one client key in, and no other.
func (s *Server) Authorize(public string) {
	s.t.Helper()
	s.ok(os.WriteFile(filepath.Join(s.dir, "authorized_keys"), []byte(public+"\n"), 0o600))
}

// URL is the address of the folder.
func (s *Server) URL() string { return fmt.Sprintf("sftp://%s@%s%s", s.User, s.Address, s.Folder) }

// Sent returns the number of bytes that clients have sent, and forgets them.
func (s *Server) Sent() int64 { return s.sent.Swap(0) }

// Cut ends the connection that has sent so many bytes more, and all later ones, until Away(false).
func (s *Server) Cut(after int64) { s.cut.Store(after) }

// Silence has the server answer nothing from now on, or again.
func (s *Server) Silence(on bool) { s.silent.Store(on) }

// Slow has the line carry so many bytes per second from clients.
func (s *Server) Slow(rate int64) { s.rate.Store(rate) }

// Away ends all connections, and refuses further ones. Away(false) is the return of the server.
func (s *Server) Away(away bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = away
	for conn, cmd := range s.lines {
		conn.Close()
		cmd.Process.Kill()
	}
	if !away {
		s.cut.Store(-1)
		s.silent.Store(false)
	}
}

// Connections returns the number of open connections.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.lines)
}

// serve starts an sshd for a connection, as inetd does.
func (s *Server) serve(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		conn.Close()
		return
	}
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		s.t.Error(err)
		conn.Close()
		return
	}
	theirs, ours := os.NewFile(uintptr(fds[0]), "sshd"), os.NewFile(uintptr(fds[1]), "line")
	defer theirs.Close()
	line, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		s.t.Error(err)
		conn.Close()
		return
	}
	cmd := exec.Command(sshd, "-i", "-e", "-f", s.config)
	cmd.Stdin, cmd.Stdout = theirs, theirs
	if err := cmd.Start(); err != nil {
		s.t.Error(err)
		conn.Close()
		line.Close()
		return
	}
	s.lines[conn] = cmd
	s.ended.Go(func() {
		var both sync.WaitGroup
		both.Go(func() { s.forward(line, conn); line.Close() })
		both.Go(func() { s.back(conn, line); conn.Close() })
		both.Wait()
		cmd.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.lines, conn)
	})
}

// forward carries what a client sends.
func (s *Server) forward(to io.Writer, from net.Conn) {
	b := make([]byte, 16<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			from.Close()
			return
		}
		s.sent.Add(int64(n))
		if rate := s.rate.Load(); rate > 0 {
			time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
		}
		if left := s.cut.Load(); left >= 0 {
			if left == 0 || left < int64(n) {
				s.Away(true)
				return
			}
			s.cut.Add(-int64(n))
		}
		if _, err := to.Write(b[:n]); err != nil {
			from.Close()
			return
		}
	}
}

// back carries what the server answers.
func (s *Server) back(to io.Writer, from net.Conn) {
	b := make([]byte, 16<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		if s.silent.Load() {
			continue
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}
