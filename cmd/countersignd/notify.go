package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"countersign/appliance"
	"countersign/internal/cause"
	"countersign/internal/logqueue"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// notifyTime is the timeout for one message to the service manager.
const notifyTime = time.Second

// notifier sends messages to the service manager.
type notifier struct {
	log    *slog.Logger
	path   string        // of the manager's socket, or "": the manager may make the socket again
	conn   *net.UnixConn // to the manager's abstract socket, or nil
	unread atomic.Bool   // the last message was not taken
}

// newNotifier finds the socket of the service manager (NOTIFY_SOCKET, sd_notify(3)). A confined
// daemon can connect to no abstract socket (Landlock, ABI 6), so the connection to one is made now,
// and is the only one.
func newNotifier(log *slog.Logger) (*notifier, error) {
	const variable = "NOTIFY_SOCKET"
	n := &notifier{log: log}
	switch name := os.Getenv(variable); {
	case name == "" || filepath.IsAbs(name):
		n.path = name
	case strings.HasPrefix(name, "@") && len(name) > 1:
		conn, err := dialManager(name)
		if err != nil {
			return nil, fmt.Errorf("%s: the service manager can't be reached: %w", variable, err)
		}
		n.conn = conn
	default:
		return nil, fmt.Errorf("%s is %q: the service manager's socket is a path, or @ and an abstract name; "+
			"start the daemon without %s, or by another manager", variable, name, variable)
	}
	return n, nil
}

func dialManager(name string) (*net.UnixConn, error) {
	return net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
}

// causes returns a cause until the service manager takes a message again.
func (n *notifier) causes() []cause.Cause {
	if !n.unread.Load() {
		return nil
	}
	return []cause.Cause{cause.NotifyUnread.Of("", "the last notification was not taken")}
}

// unreadLog returns a cause while the log has a gap that nobody has been told of.
func unreadLog(q *logqueue.Queue) []cause.Cause {
	lines, since := q.Unread()
	if lines == 0 {
		return nil
	}
	return []cause.Cause{cause.LogUnread.Of("", "%d lines since %s", lines, since.UTC().Format(time.RFC3339))}
}

// send sends a message to the service manager (sd_notify), and reports whether the message was
// sent or there is no manager to send to. A manager that does not read costs notifyTime. The
// library's SdNotify would wait without a limit.
func (n *notifier) send(state string) bool {
	conn := n.conn
	if conn == nil {
		if n.path == "" {
			return true
		}
		var err error
		if conn, err = dialManager(n.path); err != nil {
			n.log.Warn("the service manager's socket can't be used", "err", err)
			return true
		}
		defer conn.Close()
	}
	conn.SetWriteDeadline(time.Now().Add(notifyTime))
	_, err := conn.Write([]byte(state))
	n.unread.Store(err != nil)
	if err != nil {
		n.log.Warn("the service manager does not read notifications", "notification", state, "err", err)
		return false
	}
	return true
}

// watchdog notifies systemd's watchdog while requests are served. systemd restarts a daemon without
// notifications.
func watchdog(ctx context.Context, p prober, n *notifier, log *slog.Logger) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		return
	}
	ticker := time.NewTicker(interval / 3)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		alive, cancel := context.WithTimeout(ctx, interval/3)
		err := p.probe(alive)
		cancel()
		if err != nil {
			log.Error("watchdog: requests are not served", "err", err)
			continue
		}
		n.send(daemon.SdNotifyWatchdog)
	}
}

// prober proves from outside that requests are served.
type prober struct {
	app   *appliance.Appliance
	admin *knocker
	doors []*door
}

// probe sends requests to each door of the daemon. The proof covers the loop of the ledger's
// writer, the admin API's server with its handlers, and each peer listener's loop of connections
// with the log lines on the way. A lack of file descriptors prevents a probe, and is no proof of a
// daemon that hangs: strangers must not cause a restart.
func (p prober) probe(ctx context.Context) error {
	if err := p.app.Alive(ctx); err != nil {
		return fmt.Errorf("the ledger: %w", err)
	}
	if err := p.probeAdmin(ctx); err != nil && !noDescriptors(err) {
		return fmt.Errorf("the admin API: %w", err)
	}
	for _, d := range p.doors {
		if d.Addr() == nil { // the machine does not have the address yet
			continue
		}
		if err := probePeers(ctx, d.Addr()); err != nil && !noDescriptors(err) && hasAddress(d.Addr()) {
			return fmt.Errorf("the listener %s: %w", d.address, err)
		}
	}
	return nil
}

// noDescriptors reports a lack of file descriptors or of ports.
func noDescriptors(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.EADDRNOTAVAIL)
}

// hasAddress reports whether the machine has an address now. A listener whose address is taken from
// the machine serves again when the address is back, and a restart can't help. The port is that of
// the listener, so an address that the machine has is in use.
func hasAddress(at net.Addr) bool {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), at.Network(), at.String())
	if err == nil {
		l.Close()
	}
	return !errors.Is(err, syscall.EADDRNOTAVAIL)
}

// knocker is the listener of the admin socket. The daemon has no right to connect to Unix sockets,
// since other programs serve there, so its own connections do not go through the kernel.
type knocker struct {
	net.Listener
	knocks chan net.Conn
	served chan accepted
	closed chan struct{}
	once   sync.Once
}

// accepted is a result of Accept.
type accepted struct {
	conn net.Conn
	err  error
}

func newKnocker(l net.Listener) *knocker {
	k := &knocker{
		Listener: l, knocks: make(chan net.Conn), served: make(chan accepted), closed: make(chan struct{}),
	}
	go func() {
		for {
			conn, err := l.Accept()
			select {
			case k.served <- accepted{conn, err}:
			case <-k.closed:
				if err == nil {
					conn.Close()
				}
				return
			}
		}
	}()
	return k
}

func (k *knocker) Accept() (net.Conn, error) {
	select {
	case a := <-k.served:
		return a.conn, a.err
	case conn := <-k.knocks:
		return conn, nil
	case <-k.closed:
		return nil, net.ErrClosed
	}
}

func (k *knocker) Close() error {
	k.once.Do(func() { close(k.closed) })
	return k.Listener.Close()
}

// knock returns a connection to the server of the listener.
func (k *knocker) knock(ctx context.Context) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "knock")
		end, failed := net.FileConn(file)
		file.Close()
		ends[i], err = end, errors.Join(err, failed)
	}
	if err == nil {
		select {
		case k.knocks <- ends[1]:
			return ends[0], nil
		case <-ctx.Done():
			err = ctx.Err()
		case <-k.closed:
			err = net.ErrClosed
		}
	}
	for _, end := range ends {
		if end != nil {
			end.Close()
		}
	}
	return nil, err
}

// probeAdmin requests the health of the daemon over a connection like those of the Unix socket. Any
// answer is a proof.
func (p prober) probeAdmin(ctx context.Context) error {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return p.admin.knock(ctx) },
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/health/alive", nil)
	if err != nil {
		return err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	return response.Body.Close()
}

// probePeers sends a first message that is too long for a handshake. The listener refuses the
// message before any limit and before any use of the token. The end of the connection is the proof,
// also where the connection was one too many.
func probePeers(ctx context.Context, at net.Addr) error {
	conn, err := new(net.Dialer).DialContext(ctx, at.Network(), at.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	end, _ := ctx.Deadline()
	conn.SetDeadline(end)
	conn.Write(binary.BigEndian.AppendUint32(nil, 1<<31)) // an error is the end of the connection
	_, err = conn.Read(make([]byte, 1))
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return fmt.Errorf("a message that is too long was not refused: %w", err)
}
