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

// A frame on the socket has a header and a body. The header is a big-endian u32 with the length of
// the rest of the frame, a u64 id, and a byte with the kind. An answer has the id of its request.
// The bodies of frequent frames (sign, exchange) are raw bytes, the others are JSON.

// kind is the kind of a frame.
type kind byte

const (
	hello        kind = iota + 1 // no body; the answer comes when the device is open
	bind                         // body: keystore.Info; id: the key's number from now on; no answer
	sign                         // body: u32 number of the key, message; answer: signature
	exchange                     // body: u32 number of the key, public key; answer: shared secret
	request                      // body: call; answer: depends on the operation
	result                       // an answer: success
	failure                      // an answer: a byte with the error's class, then text
	loginRequest                 // worker to pool: asks for permission to log in
	loginReply                   // pool to worker, id of loginRequest; body: 1 granted, 0 denied
	loginEnded                   // worker to pool, id of loginRequest; body: none, or of failure if the PIN was refused
	journaled                    // worker to pool, id: size of the journal in bytes; no body
)

const (
	headerSize = 4 + 8 + 1
	maxFrame   = 1 << 20 // bytes; enough for a list of thousands of keys
	maxMessage = maxFrame - headerSize
)

var errProtocol = errors.New("worker: the other end violates the protocol")

// pipe is one end of the socket. Concurrent senders are combined: one goroutine writes, the others
// only append to its buffer, and the whole buffer goes out in one write. A sender never waits for
// the other end to read.
type pipe struct {
	conn *net.UnixConn
	raw  syscall.RawConn
	r    *bufio.Reader

	mu      sync.Mutex
	writing bool   // a goroutine is writing
	buf     []byte // frames for the next write
	spare   []byte // a written buffer, for reuse
	err     error  // of the last write; final
}

func newPipe(file *os.File) (*pipe, error) {
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	unix, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, errors.New("not a Unix socket")
	}
	raw, err := unix.SyscallConn()
	return &pipe{conn: unix, raw: raw, r: bufio.NewReaderSize(unix, 64<<10)}, err
}

// send enqueues a frame and flushes.
func (p *pipe) send(id uint64, k kind, body ...[]byte) error {
	if err := p.enqueue(id, k, body...); err != nil {
		return err
	}
	return p.flush()
}

// enqueue appends a frame to the buffer. The caller must flush afterwards.
func (p *pipe) enqueue(id uint64, k kind, body ...[]byte) error {
	n := headerSize - 4
	for _, b := range body {
		n += len(b)
	}
	if n > maxFrame {
		return fmt.Errorf("worker: a frame of %d bytes, at most %d are allowed", n, maxFrame)
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

// flush writes the buffer, or leaves the buffer to the goroutine that is writing now. With a full
// socket, the rest is written in the background. An error of a background write comes with a later
// flush. The reader sees a broken socket as well.
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
		n, err := p.writeNonblocking(out)
		if err == nil && n < len(out) {
			go p.writeRest(out, n)
			p.mu.Lock()
			return p.err
		}
		clear(out) // the frame may hold a shared secret
		p.mu.Lock()
		p.spare, p.err = out, err
	}
	p.writing = false
	return p.err
}

// writeNonblocking writes as much as the socket takes without waiting, possibly no byte.
func (p *pipe) writeNonblocking(out []byte) (n int, err error) {
	failed := p.raw.Write(func(fd uintptr) bool {
		n, err = syscall.Write(int(fd), out)
		return err != syscall.EINTR
	})
	if err == syscall.EAGAIN {
		return 0, nil
	}
	return max(n, 0), errors.Join(failed, err)
}

// writeRest writes a buffer from byte n on, waiting for the socket, and then the frames enqueued
// since.
func (p *pipe) writeRest(out []byte, n int) {
	_, err := p.conn.Write(out[n:])
	clear(out)
	p.mu.Lock()
	p.spare, p.err, p.writing = out, err, false
	p.mu.Unlock()
	p.flush()
}

// receive returns the next frame. The body belongs to the caller.
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

// classes are the errors of package keystore with the same meaning on both sides. A class's number
// on the socket is its index. A class that wraps another comes first.
var classes = []error{
	keystore.ErrReplaced, keystore.ErrLastTry, keystore.ErrLockedOut,
	keystore.ErrUnavailable, keystore.ErrAuth, keystore.ErrNotFound, keystore.ErrExists, keystore.ErrAmbiguous,
	keystore.ErrUnfit, keystore.ErrRefused, keystore.ErrPeerKey, keystore.ErrSealed,
	keystore.ErrForm, keystore.ErrJournal,
}

// remoteError is an error from the other side.
type remoteError struct {
	class error
	text  string
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.class }

// encodeError makes the body of a failure frame. Class 255 means no class, and the text is cut at
// 4096 bytes.
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

// encodeErrors makes a list of errors for JSON, with an empty element for nil.
func encodeErrors(all []error) [][]byte {
	encoded := make([][]byte, len(all))
	for i, err := range all {
		if err != nil {
			encoded[i] = encodeError(err)
		}
	}
	return encoded
}

// decodeErrors is the inverse of encodeErrors.
func decodeErrors(encoded [][]byte) []error {
	all := make([]error, len(encoded))
	for i, b := range encoded {
		if len(b) > 0 {
			all[i] = decodeError(b)
		}
	}
	return all
}

// decodeError is the inverse of encodeError. An error without a class stays without one: the device
// was not asked, and a retry is useless.
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
