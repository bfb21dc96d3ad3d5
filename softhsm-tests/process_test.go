package softhsmtests

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign/audit"

	"golang.org/x/sys/unix"
)

// TestUnreadStderr fills a stderr that nobody reads. The daemon signs as before, follows SIGTERM
// and ends in order.
func TestUnreadStderr(t *testing.T) {
	s := newSystem(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	size, err := unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 4096)
	if err != nil {
		t.Fatal(err)
	}
	unix.SetNonblock(int(w.Fd()), false) // Fd has done so already: the daemon gets a blocking pipe, as usual
	p := s.serveTo(w)
	s.enrol()
	c := s.dial()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for waiting, calls := 0, 0; ; calls++ { // until the next line does not fit into the pipe
		if waiting, err = unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ); err != nil {
			t.Fatal(err)
		}
		if waiting > size-200 && calls > 200 {
			break
		}
		if _, err := c.Ping(ctx); err != nil {
			t.Fatalf("with %d bytes unread: %v", waiting, err)
		}
	}
	if _, err := c.Sign(ctx, "payments", message("unreadit")); err != nil {
		t.Errorf("with a full pipe: %v", err)
	}
	for !s.hasCause("log-unread") { // until the queue is full, too
		for range 1000 {
			if _, err := c.Ping(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	go io.Copy(io.Discard, r)
	for s.hasCause("log-unread") {
		if _, err := c.Ping(ctx); err != nil { // each line may be the one that flows
			t.Fatal(err)
		}
	}
	p.stop()
	if last := s.lastEvent(); last != "Stopped" {
		t.Errorf("the last event is %s", last)
	}
}

// TestSignals checks that SIGHUP reloads, that a reader of stderr that leaves does not end the
// daemon, and that SIGTERM then ends the daemon in order.
func TestSignals(t *testing.T) {
	s := newSystem(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := s.serveTo(w)
	log := &lines{changed: make(chan struct{}, 1)}
	go io.Copy(log, r)
	s.enrol()
	for _, step := range []struct{ old, new, want string }{
		{`log_level = "debug"`, `log_level = "info"`, "log_level_changed=true other_changes_need_a_restart=false"},
		{`log_level = "info"`, `log_level = "loud"`, "nothing was reloaded"},
		{`log_level = "loud"`, "log_level = \"info\"\nadmin_name = \"here\"", "other_changes_need_a_restart=true"},
	} {
		s.edit("countersign.toml", step.old, step.new)
		p.cmd.Process.Signal(syscall.SIGHUP)
		log.await(t, step.want)
	}
	s.write("policy.cedar", "forbid (principal, action, resource);")
	p.cmd.Process.Signal(syscall.SIGHUP)
	log.await(t, "the policy file is another than the policy in force")
	c := s.dial()
	if _, err := c.Sign(t.Context(), "payments", message("reloaded")); err != nil {
		t.Errorf("after SIGHUP: %v", err)
	}
	r.Close()
	p.cmd.Process.Signal(syscall.SIGHUP) // a line into the broken pipe
	if _, err := c.Sign(t.Context(), "payments", message("brokenup")); err != nil {
		t.Errorf("without a reader of stderr: %v", err)
	}
	p.stop()
	if last := s.lastEvent(); last != "Stopped" {
		t.Errorf("the last event is %s", last)
	}
}

// TestUnreadNotifications starts the daemon with a service manager that reads nothing. The daemon
// serves and stops.
func TestUnreadNotifications(t *testing.T) {
	s := newSystem(t)
	path := filepath.Join(t.TempDir(), "unread")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	full, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	full.SetWriteDeadline(time.Now().Add(time.Second))
	for err == nil {
		_, err = full.Write([]byte("full"))
	}
	cmd := exec.Command(filepath.Join(bin, "countersignd"), "serve", "--config", s.path("countersign.toml"))
	log := &lines{changed: make(chan struct{}, 1)}
	cmd.Env, cmd.Stderr = append(os.Environ(), "NOTIFY_SOCKET="+path, "WATCHDOG_USEC=300000"), log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer cmd.Process.Kill()
	log.await(t, "does not read notifications")
	s.enrolRoot()
	s.enrol()
	if !s.hasCause("notify-unread") {
		t.Error("the state does not say that notifications are unread")
	}
	if _, err := s.dial().Sign(t.Context(), "payments", message("unreadit")); err != nil {
		t.Error(err)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("after SIGTERM: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the daemon runs 30 s after SIGTERM")
	}
}

// TestWatchdogProves feeds the watchdog while requests are served, at each of the daemon's doors.
func TestWatchdogProves(t *testing.T) {
	s := newSystem(t)
	p := s.serve("WATCHDOG_USEC=600000")
	for range 3 {
		if got := p.notified(); got != "WATCHDOG=1" {
			t.Fatalf("notified %q", got)
		}
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	for p.notified() != "STOPPING=1" {
	}
	p.stop()
}

// TestDescriptorsRunOut opens connections until the daemon has no file descriptor for a further
// one. Strangers can't starve the watchdog by that, and the peer is served when they have gone.
func TestDescriptorsRunOut(t *testing.T) {
	s := newSystem(t)
	cmd := exec.Command("prlimit", "--nofile=128", filepath.Join(bin, "countersignd"), "serve",
		"--config", s.path("countersign.toml"))
	log := &lines{changed: make(chan struct{}, 1)}
	cmd.Env, cmd.Stderr = append(os.Environ(), "WATCHDOG_USEC=3000000"), log
	p := s.start(cmd)
	s.enrolRoot()
	s.enrol()
	var all []net.Conn
	for range 200 {
		conn, err := net.Dial("tcp", s.listen)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, conn)
	}
	log.await(t, "too many open files")
	for range 3 {
		if got := p.notified(); got != "WATCHDOG=1" {
			t.Fatalf("notified %q", got)
		}
	}
	for _, conn := range all {
		conn.Close()
	}
	if _, err := s.dial().Sign(t.Context(), "payments", message("descript")); err != nil {
		t.Error(err)
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	for p.notified() != "STOPPING=1" {
	}
	p.stop()
}

// TestStrangersFillNoLog has a stranger send 2,000 first messages that are not TLS to the HTTPS
// listener, and as many that are no handshake to the peers' listener: the log counts them.
func TestStrangersFillNoLog(t *testing.T) {
	s := newSystem(t)
	address := newFolder(t).listen
	s.edit("countersign.toml", `log_level = "debug"`, `log_level = "info"`) // debug has each line
	s.edit("countersign.toml", "admin_socket", "admin_https = \""+address+"\"\nadmin_socket")
	if out, code := s.daemon("init"); code != 0 {
		t.Fatalf("init: %d %s", code, out)
	}
	p := s.serve()
	for range 2000 {
		for _, to := range []string{address, s.listen} {
			conn, err := net.Dial("tcp", to)
			if err != nil {
				t.Fatal(err)
			}
			conn.SetDeadline(time.Now().Add(30 * time.Second))
			conn.Write([]byte("\xff\xff\xff\xffGET / HTTP/1.0\r\n\r\n"))
			io.Copy(io.Discard, conn) // until the daemon hangs up
			conn.Close()
		}
	}
	p.stop()
	if n := strings.Count(p.stderr.String(), "\n"); n > 200 {
		t.Errorf("4,000 messages of strangers made %d lines of the log", n)
	}
}

// hasCause reports whether the state has a cause with a code.
func (s *system) hasCause(code string) bool {
	s.t.Helper()
	return regexp.MustCompile(`(?m)^cause +` + code + `\b`).MatchString(s.must("admin", "state"))
}

// serveTo serves with stderr to a file, which is closed in this process.
func (s *system) serveTo(stderr *os.File) *process {
	s.t.Helper()
	cmd := exec.Command(filepath.Join(bin, "countersignd"), "serve", "--config", s.path("countersign.toml"))
	cmd.Env, cmd.Stderr = os.Environ(), stderr
	p := s.start(cmd)
	stderr.Close()
	s.enrolRoot()
	return p
}

// lastEvent returns the type of the last event of a daemon that has ended.
func (s *system) lastEvent() string {
	s.t.Helper()
	p := s.serve()
	defer p.stop()
	all := s.events()
	for i := len(all) - 1; i > 0; i-- {
		if all[i].Type == audit.Started {
			return string(all[i-1].Type)
		}
	}
	s.t.Fatal("the new start has no event")
	return ""
}

// lines is an io.Writer for a log, with a wait for a text.
type lines struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{} // of capacity 1
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(b)
	select {
	case l.changed <- struct{}{}:
	default:
	}
	return len(b), nil
}

// await waits until the log has a text, and forgets the log up to there.
func (l *lines) await(t *testing.T, text string) {
	t.Helper()
	for end := time.After(30 * time.Second); ; {
		l.mu.Lock()
		_, after, found := strings.Cut(l.text.String(), text)
		if found {
			l.text.Reset()
			l.text.WriteString(after)
		}
		l.mu.Unlock()
		if found {
			return
		}
		select {
		case <-l.changed:
		case <-end:
			t.Fatalf("the log does not say %q", text)
		}
	}
}
