// Package launcher has the process that starts key workers. The daemon starts the launcher before
// all else, and then gives up the right to start programs. The launcher knows the tokens from the
// configuration that it has read itself. A request of the daemon names a token, and brings the
// worker's socket and stderr: neither a command line, nor a variable, nor a device.
//
// Begin reading at request, the protocol. Launcher is the daemon's side, and Serve the launcher's.
package launcher

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"countersign/internal/keystore/worker"

	"github.com/go-json-experiment/json"
	"golang.org/x/sys/unix"
)

// The protocol is one JSON document for each packet of a SOCK_SEQPACKET socket. Either side ends
// the connection at the first packet that is none of these, and the launcher ends with the
// connection, after all its workers.

// maxPacket is the largest packet in bytes. A path has at most 4096, and JSON at most 6 for each.
const maxPacket = 32 << 10

// request is a packet of the daemon, with one of Start, Kill and PIN. Start has two descriptors:
// the worker's socket and stderr.
type request struct {
	ID    uint64 `json:"id"`              // of the worker: chosen by the daemon, larger than each before
	Start *Start `json:"start,omitempty"` // start a worker
	Kill  bool   `json:"kill,omitempty"`  // kill the worker
	PIN   string `json:"pin,omitempty"`   // say which state the PIN file of this token has; ID is new, too
}

// Start says which worker to start.
type Start struct {
	Token string `json:"token"`      // a token of the configuration
	Seed  string `json:"seed"`       // a seed file that the worker may read, or ""
	Make  bool   `json:"make_token"` // the worker makes the token first: countersignd init
	// Replace has the worker put the records of another TPM aside before.
	Replace bool `json:"replace_tpm,omitempty"`
}

// answer is a packet of the launcher. One answer to Start has PID or Err. After PID comes one
// answer with Ended. One answer to PIN has Digest.
type answer struct {
	ID     uint64 `json:"id"`
	PID    int    `json:"pid,omitempty"` // with one descriptor, /proc/PID/statm, or none
	Err    string `json:"error,omitempty"`
	Ended  string `json:"ended,omitempty"`  // how the process has ended, such as "signal: killed"
	Digest string `json:"digest,omitempty"` // of the state of a PIN file
}

// hello is the launcher's first packet.
type hello struct {
	Digest string   `json:"digest"` // of the configuration, as Serve got it
	User   int      `json:"user"`   // of the launcher and its workers
	Faults []string `json:"faults,omitempty"`
	Err    string   `json:"error,omitempty"`
}

// ErrEnded is the error of each call after the launcher's end.
var ErrEnded = errors.New("the launcher of the key workers has ended")

// Launcher is the daemon's side. The methods are for any number of callers.
type Launcher struct {
	conn  *net.UnixConn
	first hello
	wait  func() error  // for the process's end, if it is a child
	ended chan struct{} // closed with why set
	why   error

	mu      sync.Mutex
	lastID  uint64                 // under mu
	workers map[uint64]*process    // under mu: not ended yet; nil after the launcher's end
	asked   map[uint64]chan string // under mu: requests with PIN without an answer yet; each has room for one
}

// process is a worker as the daemon sees it.
type process struct {
	launcher *Launcher
	id       uint64
	started  chan answer // capacity 1
	ended    chan error  // capacity 1
	pid      int
	statm    *os.File
}

// New runs a command as the launcher, with its socket as descriptor 3, and waits until the launcher
// is ready. An error of the launcher is an error of New. digest names the configuration: a launcher
// that has read another one is refused.
func New(cmd *exec.Cmd, digest string) (*Launcher, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("launcher: socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "launcher"), os.NewFile(uintptr(fds[1]), "launcher")
	defer theirs.Close()
	conn, err := fileConn(ours)
	ours.Close() // or the launcher would not see the end of the connection
	if err != nil {
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{theirs}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Setpgid = true // Ctrl-C at the terminal is for the daemon only
	// The end of the socket ends the launcher, too: a confined daemon can't send signals, and the
	// kernel sends none to another user's process.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	if err := worker.OnStarterThread(cmd.Start); err != nil {
		conn.Close()
		return nil, fmt.Errorf("launcher: %w", err)
	}
	theirs.Close() // or the launcher's end would not be seen
	return begin(conn, cmd.Wait, digest)
}

// Dial connects to a socket where the service manager starts a launcher for each connection, and
// waits until the launcher is ready. For digest see New.
func Dial(path, digest string) (*Launcher, error) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Net: "unixpacket", Name: path})
	if err != nil {
		return nil, fmt.Errorf("launcher: %w; systemctl start countersignd-keys.socket", err)
	}
	return begin(conn, func() error { return nil }, digest)
}

// begin reads the launcher's first packet.
func begin(conn *net.UnixConn, wait func() error, digest string) (*Launcher, error) {
	l := &Launcher{
		conn: conn, wait: wait, ended: make(chan struct{}),
		workers: map[uint64]*process{}, asked: map[uint64]chan string{},
	}
	_, err := receive(conn, &l.first, 0)
	switch {
	case err != nil:
		err = ErrEnded
	case l.first.Err != "":
		err = errors.New(l.first.Err)
	case l.first.Digest != digest:
		err = errors.New("launcher: the configuration has changed during the start; start again")
	}
	if err != nil {
		conn.Close()
		wait()
		return nil, err
	}
	go l.read()
	return l, nil
}

// User returns the user of the launcher and its workers.
func (l *Launcher) User() int { return l.first.User }

// Faults returns what the launcher has found wrong with the files of the tokens.
func (l *Launcher) Faults() []string { return l.first.Faults }

// PIN returns the digest of the state of a token's PIN file, or "" after the launcher's end.
func (l *Launcher) PIN(token string) string {
	answer := make(chan string, 1)
	l.mu.Lock()
	l.lastID++
	id := l.lastID
	l.asked[id] = answer
	err := send(l.conn, request{ID: id, PIN: token})
	l.mu.Unlock()
	if err != nil {
		return ""
	}
	select {
	case digest := <-answer:
		return digest
	case <-l.ended:
		return ""
	}
}

// Ended returns a channel that is closed at the launcher's end. No worker outlives the launcher.
func (l *Launcher) Ended() <-chan struct{} { return l.ended }

// Why returns the reason of the launcher's end. Why waits for the end.
func (l *Launcher) Why() error {
	<-l.ended
	return l.why
}

// Close ends the launcher and its workers, and waits for the end.
func (l *Launcher) Close() {
	l.conn.CloseWrite()
	<-l.ended
}

// Start starts a worker. The files are the caller's.
func (l *Launcher) Start(s Start, socket, stderr *os.File) (worker.Process, error) {
	p := &process{launcher: l, started: make(chan answer, 1), ended: make(chan error, 1)}
	l.mu.Lock()
	if l.workers == nil {
		l.mu.Unlock()
		return nil, l.Why()
	}
	l.lastID++
	p.id = l.lastID
	l.workers[p.id] = p
	// The lock keeps the numbers of packets in order.
	err := send(l.conn, request{ID: p.id, Start: &s}, socket, stderr)
	l.mu.Unlock()
	if err != nil {
		l.forget(p.id)
		return nil, err
	}
	a := <-p.started
	if a.Err != "" {
		return nil, errors.New(a.Err)
	}
	return p, nil
}

// forget takes a worker out of the list, and returns the worker or nil.
func (l *Launcher) forget(id uint64) *process {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.workers[id]
	delete(l.workers, id)
	return p
}

// read handles the launcher's packets until its end.
func (l *Launcher) read() {
	err := l.readAnswers()
	l.conn.Close() // an answer that is none ends the launcher
	if ended := l.wait(); ended != nil {
		err = ended
	}
	l.mu.Lock()
	workers := l.workers
	l.workers = nil
	l.why = fmt.Errorf("%w: %v", ErrEnded, err)
	close(l.ended)
	l.mu.Unlock()
	for _, p := range workers {
		select {
		case p.started <- answer{Err: l.why.Error()}:
		default: // the worker was started
		}
		p.statm.Close()
		p.ended <- l.why
	}
}

func (l *Launcher) readAnswers() error {
	for {
		var a answer
		files, err := receive(l.conn, &a, 1)
		if err != nil {
			return err
		}
		l.mu.Lock()
		if asked := l.asked[a.ID]; asked != nil && a.Digest != "" && len(files) == 0 {
			delete(l.asked, a.ID)
			l.mu.Unlock()
			asked <- a.Digest
			continue
		}
		p := l.workers[a.ID]
		inTurn := p != nil && (p.pid != 0) == (a.Ended != "") && (a.PID > 0 || a.Err != "" || a.Ended != "")
		if inTurn && a.PID == 0 {
			delete(l.workers, a.ID)
		}
		l.mu.Unlock()
		switch {
		case !inTurn:
			closeAll(files)
			return fmt.Errorf("launcher: an answer about the worker %d that is out of turn", a.ID)
		case a.Ended != "":
			p.statm.Close()
			p.ended <- errors.New(a.Ended)
		default:
			p.pid = a.PID
			if len(files) > 0 {
				p.statm = files[0]
			}
			p.started <- a
		}
	}
}

func (p *process) PID() int { return p.pid }

func (p *process) Memory() int { return worker.ReadStatm(p.statm) }

func (p *process) Kill() {
	// A failure is the launcher's end, which ends the worker.
	send(p.launcher.conn, request{ID: p.id, Kill: true})
}

func (p *process) Wait() error {
	err := <-p.ended
	p.ended <- err
	return err
}

// fileConn returns a connection of a socket.
func fileConn(file *os.File) (*net.UnixConn, error) {
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("launcher: %w", err)
	}
	of, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, errors.New("launcher: not a Unix socket")
	}
	return of, nil
}

// send sends one packet with descriptors.
func send(conn *net.UnixConn, packet any, files ...*os.File) error {
	text, err := json.Marshal(packet)
	if err != nil {
		return fmt.Errorf("launcher: %w", err)
	}
	if len(text) > maxPacket {
		return fmt.Errorf("launcher: a packet of %d bytes, at most %d are allowed", len(text), maxPacket)
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := conn.WriteMsgUnix(text, rights, nil); err != nil {
		return fmt.Errorf("launcher: %w", err)
	}
	return nil
}

// errPacket is the class of errors of packets that are none of the protocol.
var errPacket = errors.New("launcher: the other end violates the protocol")

// receive reads one packet, with at most a number of descriptors. An error leaves no descriptor
// open.
func receive(conn *net.UnixConn, packet any, most int) (files []*os.File, err error) {
	text := make([]byte, maxPacket+1)
	rights := make([]byte, unix.CmsgSpace(4*(most+1)))
	n, nRights, flags, _, err := conn.ReadMsgUnix(text, rights)
	if err != nil {
		return nil, err
	}
	if n == 0 && nRights == 0 {
		return nil, io.EOF
	}
	messages, err := unix.ParseSocketControlMessage(rights[:nRights])
	for i := range messages {
		fds, failed := unix.ParseUnixRights(&messages[i])
		err = errors.Join(err, failed)
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	switch {
	case err != nil:
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || n > maxPacket:
		err = fmt.Errorf("%w: a packet that is too long", errPacket)
	case len(files) > most:
		err = fmt.Errorf("%w: %d descriptors", errPacket, len(files))
	default:
		err = json.Unmarshal(text[:n], packet, json.RejectUnknownMembers(true))
	}
	if err != nil {
		closeAll(files)
		return nil, err
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
