package worker

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"countersign/internal/keystore"
)

// A frame is a big-endian u32 length of what follows, a u64 id, a byte for its kind, and a body. An answer has the id of
// its request. Bodies of what is frequent are bytes, of the rest JSON.
type kind byte

const (
	hello    kind = iota + 1 // the worker's configuration; answered when the device is ready
	bind                     // id: a number for a key from now on; body: keystore.Info; no answer
	sign                     // body: u32 number of the key, message; answer: signature
	exchange                 // body: u32 number of the key, public key; answer: secret
	request                  // body: call; answer: as the operation has it
	result                   // the answer, in good case
	failure                  // the answer: a class, and text
	askLogin                 // worker to pool: may I log in?
	mayLogin                 // pool to worker, with askLogin's id; body: 1 yes, 0 no
	loggedIn                 // worker to pool, with askLogin's id; body: as failure, where the PIN was refused; else empty
)

const (
	headerSize = 4 + 8 + 1
	maxFrame   = 1 << 20 // a list of thousands of keys
	maxMessage = maxFrame - headerSize
)

var errProtocol = errors.New("worker: the other end does not keep to the protocol")

// pipe is one end of the socket. Whoever sends while another is writing leaves the frame to him: what waits goes out in
// one write. Nobody waits for the other end to read.
type pipe struct {
	conn *net.UnixConn
	raw  syscall.RawConn
	r    *bufio.Reader

	mu      sync.Mutex
	writing bool
	buf     []byte
	spare   []byte
	err     error
}

func newPipe(file *os.File) (*pipe, error) {
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	unix, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, errors.New("it is not a Unix socket")
	}
	raw, err := unix.SyscallConn()
	return &pipe{conn: unix, raw: raw, r: bufio.NewReaderSize(unix, 64<<10)}, err
}

// send puts a frame and flushes.
func (p *pipe) send(id uint64, k kind, body ...[]byte) error {
	if err := p.put(id, k, body...); err != nil {
		return err
	}
	return p.flush()
}

// put appends a frame to what goes out with the next flush, which the caller owes.
func (p *pipe) put(id uint64, k kind, body ...[]byte) error {
	n := headerSize - 4
	for _, b := range body {
		n += len(b)
	}
	if n > maxFrame {
		return fmt.Errorf("worker: a frame of %d bytes", n)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.buf = binary.BigEndian.AppendUint32(p.buf, uint32(n))
	p.buf = binary.BigEndian.AppendUint64(p.buf, id)
	p.buf = append(p.buf, byte(k))
	for _, b := range body {
		p.buf = append(p.buf, b...)
	}
	return nil
}

// flush writes what was put, or leaves it to whoever is writing; what the socket does not take at once is written behind
// the caller's back. It gives an error at the latest when the other end is known to be gone. The reader sees that too.
func (p *pipe) flush() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.writing {
		return p.err
	}
	p.writing = true
	for len(p.buf) > 0 && p.err == nil {
		out := p.buf
		p.buf = p.spare[:0]
		p.mu.Unlock()
		n, err := p.try(out)
		if err == nil && n < len(out) {
			go p.rest(out, n)
			p.mu.Lock()
			return p.err
		}
		clear(out) // there may be a shared secret in it
		p.mu.Lock()
		p.spare, p.err = out, err
	}
	p.writing = false
	return p.err
}

// try writes what the socket takes without waiting.
func (p *pipe) try(out []byte) (n int, err error) {
	failed := p.raw.Write(func(fd uintptr) bool {
		n, err = syscall.Write(int(fd), out)
		return err != syscall.EINTR
	})
	if err == syscall.EAGAIN {
		return 0, nil
	}
	return max(n, 0), errors.Join(failed, err)
}

// rest writes what try has left, and then what has come meanwhile.
func (p *pipe) rest(out []byte, n int) {
	_, err := p.conn.Write(out[n:])
	clear(out)
	p.mu.Lock()
	p.spare, p.err, p.writing = out, err, false
	p.mu.Unlock()
	p.flush()
}

// receive returns the next frame; its body is the caller's.
func (p *pipe) receive() (id uint64, k kind, body []byte, err error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(p.r, header[:]); err != nil {
		return 0, 0, nil, err
	}
	n := binary.BigEndian.Uint32(header[:])
	if n < headerSize-4 || n > maxFrame {
		return 0, 0, nil, fmt.Errorf("%w: a frame of %d bytes", errProtocol, n)
	}
	body = make([]byte, n-(headerSize-4))
	_, err = io.ReadFull(p.r, body)
	return binary.BigEndian.Uint64(header[4:]), kind(header[12]), body, err
}

// classes are the errors of package keystore that mean the same on both sides.
var classes = []error{
	keystore.ErrUnavailable, keystore.ErrAuth, keystore.ErrNotFound, keystore.ErrExists, keystore.ErrAmbiguous, keystore.ErrUnfit,
	keystore.ErrRefused, keystore.ErrPeerKey, keystore.ErrSealed,
}

// remoteError is an error of the other side.
type remoteError struct {
	class error
	text  string
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.class }

func encodeError(err error) []byte {
	class := byte(255)
	for i, c := range classes {
		if errors.Is(err, c) {
			class = byte(i)
			break
		}
	}
	text := err.Error()
	return append([]byte{class}, text[:min(len(text), 4096)]...)
}

// decodeError gives an error without a class as it is: the device was not asked, and to ask again is of no use.
func decodeError(body []byte) error {
	if len(body) == 0 {
		return errors.New("worker: an error without a text")
	}
	e := &remoteError{text: string(body[1:])}
	if int(body[0]) < len(classes) {
		e.class = classes[body[0]]
	}
	return e
}
