package tpm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"countersign/internal/keystore"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"
)

// bus gives access to the TPM: one user at a time, with a connection for each user and a timeout
// for each command. The connection is closed after any error, because a late response must not be
// taken for the response to the next command. At the end of a connection the kernel's resource
// manager flushes the objects loaded through it. swtpm serves one connection at a time.
type bus struct {
	path    string
	timeout time.Duration // for one command
	busy    chan struct{} // semaphore of one; the holder is the user of the bus

	// stale is guarded by busy. stale reports a broken connection: objects and sessions of the
	// connection may still be loaded in the TPM.
	stale bool

	mu     sync.Mutex
	conn   connection // guarded by mu; the connection in use, for close
	closed bool       // guarded by mu
}

// connection is a connection to a TPM: a device file or a Unix socket.
type connection interface {
	io.ReadWriteCloser
	SetDeadline(time.Time) error
}

func newBus(c Config) *bus {
	return &bus{path: c.Device, timeout: c.Deadline, busy: make(chan struct{}, 1)}
}

// close interrupts the command in flight and refuses further use.
func (b *bus) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.conn != nil {
		b.conn.Close()
	}
}

// use runs a sequence of commands. do must flush every object and session it loads; after a broken
// connection the next call of use flushes the rest.
func (b *bus) use(ctx context.Context, do func(transport.TPM) error) error {
	select {
	case b.busy <- struct{}{}:
		defer func() { <-b.busy }()
	case <-ctx.Done():
		return fmt.Errorf("tpm: %w: the TPM is busy: %w", keystore.ErrUnavailable, ctx.Err())
	}
	conn, err := b.dial(ctx)
	if err != nil {
		return fmt.Errorf("tpm: %w: %w", keystore.ErrUnavailable, err)
	}
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		conn.Close()
		return errClosed
	}
	b.conn = conn
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.conn = nil
		b.mu.Unlock()
		conn.Close()
	}()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	c := &channel{conn: conn, timeout: b.timeout}
	if b.stale {
		if err := b.flushStale(c); err != nil {
			return err
		}
		b.stale = false
	}
	defer func() { b.stale = c.broken != nil }()
	err = do(c)
	for _, full := range []error{tpm2.TPMRCObjectMemory, tpm2.TPMRCSessionMemory, tpm2.TPMRCSessionHandles} {
		// Another process has left the TPM full. A retry is safe, because the command did nothing.
		if errors.Is(err, full) {
			if err := b.flushStale(c); err != nil {
				return err
			}
			return do(c)
		}
	}
	return err
}

// flushStale flushes the objects and sessions left by an interrupted process in a TPM without a
// resource manager.
func (b *bus) flushStale(t transport.TPM) error {
	if st, err := os.Stat(b.path); err != nil || st.Mode()&os.ModeSocket == 0 {
		return nil // the kernel's resource manager flushes after each connection
	}
	return flushAll(t, transientFirst, loadedSessionFirst)
}

// dial opens the device file, or connects to the socket, and waits for other users within the
// timeout of a command. A socket with a full queue of connections gives EAGAIN (unix(7)): swtpm's
// queue has one place, and a connection that was closed keeps the place until swtpm sees the end. A
// device file without the kernel's resource manager gives EBUSY while another process uses the TPM.
func (b *bus) dial(ctx context.Context) (connection, error) {
	ctx, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	var busy error // of the last try
	for backoff := time.Millisecond; ; backoff = min(2*backoff, 100*time.Millisecond) {
		conn, err := b.dialOnce(ctx)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EBUSY) {
			busy = err
			select {
			case <-time.After(backoff):
				continue
			case <-ctx.Done():
			}
		}
		if err != nil && busy != nil && ctx.Err() != nil {
			return nil, fmt.Errorf("%w: another process uses the TPM: %w", ctx.Err(), busy)
		}
		return conn, err
	}
}

func (b *bus) dialOnce(ctx context.Context) (connection, error) {
	st, err := os.Stat(b.path)
	if err != nil {
		return nil, err
	}
	if st.Mode()&os.ModeSocket != 0 {
		return new(net.Dialer).DialContext(ctx, "unix", b.path)
	}
	if st.Mode()&os.ModeDevice == 0 {
		return nil, fmt.Errorf("%s is neither a device nor a socket", b.path)
	}
	// Not by os.OpenFile, which makes a file non-blocking that can be polled: the driver then takes
	// a command and returns at once, and a read before the response is the end of the file.
	fd, err := unix.Open(b.path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: b.path, Err: err}
	}
	return os.NewFile(uintptr(fd), b.path), nil
}

// channel is a transport.TPM over one connection. After an error every further command fails.
type channel struct {
	conn    connection
	timeout time.Duration
	broken  error // the first error
}

// A response begins with a header of u16 tag, u32 size and u32 code (TPM 2.0 Part 2 section 6).
const (
	headerSize  = 10
	maxResponse = 4096 // the kernel's limit
)

var errNoResponse = errors.New("the TPM has sent no valid response")

// Send sends a command and returns the response. The command is sent again after a response of
// TPM_RC_RETRY, TPM_RC_YIELDED or TPM_RC_TESTING, with a backoff of 1 to 100 ms and within the
// timeout. A TPM asks for a retry before its first try of a PIN, to record the try in its memory,
// and during its self-test.
func (c *channel) Send(command []byte) (response []byte, err error) {
	if c.broken != nil {
		return nil, c.broken
	}
	defer func() {
		if err != nil {
			c.broken = fmt.Errorf("tpm: %w: %w: %w", keystore.ErrUnavailable, errNoResponse, err)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				go c.conn.Close() // without a poll the driver may hold the file until its own end
			} else {
				c.conn.Close()
			}
			err = c.broken
		}
	}()
	deadline := time.Now().Add(c.timeout)
	exchange := c.exchange
	if err := c.conn.SetDeadline(deadline); errors.Is(err, os.ErrNoDeadline) {
		exchange = func(command []byte) ([]byte, error) { return c.exchangeUntil(deadline, command) }
	} else if err != nil {
		return nil, err
	}
	for backoff := time.Millisecond; ; backoff = min(2*backoff, 100*time.Millisecond) {
		response, err := exchange(command)
		if err != nil || !time.Now().Add(backoff).Before(deadline) {
			return response, err
		}
		switch tpm2.TPMRC(binary.BigEndian.Uint32(response[6:])) {
		case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting:
			time.Sleep(backoff)
		default:
			return response, nil
		}
	}
}

// exchangeUntil is exchange for a device file without deadlines of its own: a driver that can't be
// polled. After the deadline the goroutine stays in the driver until the driver returns, and nobody
// reads the response.
func (c *channel) exchangeUntil(deadline time.Time, command []byte) ([]byte, error) {
	type answer struct {
		response []byte
		err      error
	}
	answers := make(chan answer, 1)
	own := bytes.Clone(command) // the caller may reuse the memory after the deadline
	go func() {
		response, err := c.exchange(own)
		answers <- answer{response, err}
	}()
	select {
	case a := <-answers:
		return a.response, a.err
	case <-time.After(time.Until(deadline)):
		return nil, os.ErrDeadlineExceeded
	}
}

// exchange sends a command once and reads the response.
func (c *channel) exchange(command []byte) ([]byte, error) {
	if _, err := c.conn.Write(command); err != nil {
		return nil, err
	}
	// A device returns the whole response to one read. A socket may return the response in parts.
	buf := make([]byte, maxResponse)
	n, err := io.ReadAtLeast(c.conn, buf, headerSize)
	if err != nil {
		return nil, err
	}
	size := int(binary.BigEndian.Uint32(buf[2:]))
	if size < headerSize || size > maxResponse || size < n {
		return nil, fmt.Errorf("a response of %d bytes claims a size of %d, at most %d are allowed",
			n, size, maxResponse)
	}
	if _, err := io.ReadFull(c.conn, buf[n:size]); err != nil {
		return nil, err
	}
	return buf[:size], nil
}
