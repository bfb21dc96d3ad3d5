package launcher

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"time"

	"countersign/internal/keystore/worker"

	"golang.org/x/sys/unix"
)

// Config is the launcher's configuration.
type Config struct {
	Digest string // of the configuration; New compares it
	// Faults are what is wrong with the files of the tokens, one line each, for Launcher.Faults.
	Faults []string
	// PIN returns the digest of the state of a token's PIN file, or "" for no token.
	PIN func(token string) string
	// Command makes the command of a worker, and the worker's configuration, which the worker reads
	// from descriptor 4. An error refuses the worker.
	Command func(Start) (cmd *exec.Cmd, config []byte, err error)
	// Most returns the number of workers of a token that may live at a time.
	Most func(token string) int
	// Enter confines the launcher. The workers inherit the confinement.
	Enter func() error
}

// maxConfig is the largest configuration of a worker in bytes. A pipe holds so much unread.
const maxConfig = 64 << 10

// endTime bounds the wait for the workers at the launcher's end: the kernel can't kill a process
// that hangs in a driver.
const endTime = 5 * time.Second

// Serve starts workers until the daemon closes the socket, or sends a packet that is none of the
// protocol. Afterwards Serve kills the workers and waits for them. Each worker is started by this
// process, so the workers die with it, however it ends.
func Serve(socket *os.File, c Config) error {
	conn, err := fileConn(socket)
	if err != nil {
		return err
	}
	socket.Close()
	defer conn.Close()
	first := hello{Digest: c.Digest, User: os.Geteuid(), Faults: c.Faults}
	if err = c.Enter(); err != nil {
		first.Err = err.Error()
	}
	if failed := send(conn, first); failed != nil || err != nil {
		return errors.Join(err, failed)
	}
	s := &server{Config: c, conn: conn, children: map[uint64]child{}}
	err = s.serve()
	s.end()
	return err
}

// Refuse answers New with an error, in the place of Serve.
func Refuse(socket *os.File, why error) error {
	conn, err := fileConn(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	return send(conn, hello{Err: why.Error()})
}

type server struct {
	Config
	conn    *net.UnixConn
	waiting sync.WaitGroup // for the ends of children

	mu       sync.Mutex
	children map[uint64]child // under mu: started and not ended
}

type child struct {
	*worker.Child
	token string
}

// serve handles the daemon's packets. One worker is started at a time.
func (s *server) serve() error {
	lastID := uint64(0)
	for {
		var r request
		files, err := receive(s.conn, &r, 2)
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) { // a daemon may have left answers unread
			return nil
		} else if err != nil {
			return err
		}
		switch {
		case r.Start != nil && !r.Kill && r.PIN == "" && r.ID > lastID && len(files) == 2:
			lastID = r.ID
			err = s.start(r.ID, *r.Start, files[0], files[1])
		case r.PIN != "" && r.Start == nil && !r.Kill && r.ID > lastID && len(files) == 0:
			lastID = r.ID
			if digest := s.PIN(r.PIN); digest != "" {
				err = send(s.conn, answer{ID: r.ID, Digest: digest})
			} else {
				err = errPacket // the daemon and the launcher have one configuration
			}
		case r.Kill && r.Start == nil && r.PIN == "" && len(files) == 0:
			s.mu.Lock()
			if c, lives := s.children[r.ID]; lives { // an end and a kill may cross
				c.Kill()
			}
			s.mu.Unlock()
		default:
			err = errPacket
		}
		closeAll(files)
		if err != nil {
			return err
		}
	}
}

// start starts a worker, and answers. The error is one of the socket.
func (s *server) start(id uint64, what Start, socket, stderr *os.File) error {
	c, err := s.startChild(what, socket, stderr)
	if err != nil {
		return send(s.conn, answer{ID: id, Err: err.Error()})
	}
	s.mu.Lock()
	s.children[id] = child{c, what.Token}
	s.mu.Unlock()
	var statm []*os.File
	if c.Statm() != nil {
		statm = append(statm, c.Statm())
	}
	err = send(s.conn, answer{ID: id, PID: c.PID()}, statm...)
	s.waiting.Go(func() {
		how := "exit status 0"
		if err := c.Wait(); err != nil {
			how = err.Error()
		}
		s.mu.Lock()
		delete(s.children, id)
		s.mu.Unlock()
		send(s.conn, answer{ID: id, Ended: how}) // an error is the end of the socket
	})
	return err
}

func (s *server) startChild(what Start, socket, stderr *os.File) (*worker.Child, error) {
	cmd, config, err := s.Command(what)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	lives := 0
	for _, c := range s.children {
		if c.token == what.Token {
			lives++
		}
	}
	s.mu.Unlock()
	if most := s.Most(what.Token); lives >= most {
		return nil, fmt.Errorf("launcher: %d key workers of the token have not ended, at most %d may live", lives, most)
	}
	// A worker has no other descriptor of the daemon's than a socket and a pipe.
	if kind, err := kindOf(socket); err != nil || kind != unix.S_IFSOCK {
		return nil, fmt.Errorf("launcher: the worker's socket is none (%v)", err)
	}
	if kind, err := kindOf(stderr); err != nil || kind != unix.S_IFIFO {
		return nil, fmt.Errorf("launcher: the worker's stderr is no pipe (%v)", err)
	}
	if len(config) > maxConfig {
		return nil, fmt.Errorf("launcher: a configuration of %d bytes, at most %d are allowed", len(config), maxConfig)
	}
	theirs, ours, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	_, err = ours.Write(config) // fits into the pipe
	ours.Close()
	if err != nil {
		return nil, err
	}
	return worker.Exec(cmd, socket, stderr, theirs)
}

func kindOf(f *os.File) (uint32, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return st.Mode & unix.S_IFMT, err
}

// end kills all workers and waits for them.
func (s *server) end() {
	s.mu.Lock()
	for _, c := range s.children {
		c.Kill()
	}
	s.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.waiting.Wait()
	}()
	select {
	case <-ended:
	case <-time.After(endTime):
	}
}
