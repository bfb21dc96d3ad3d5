package tpm

import (
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
)

// bus is the way to the TPM: one user at a time, a connection for each, a deadline for each command. A connection on which
// anything went wrong is dropped: a late answer must not be taken for that of the next command. The kernel's resource
// manager forgets what a connection has loaded, and swtpm serves one connection at a time.
type bus struct {
	path     string
	deadline time.Duration
	turn     chan struct{}

	untidy bool // whose turn it is: a conversation broke off, and what it had loaded may be there still

	mu     sync.Mutex
	line   line // under mu: the one in use, so that close can cut it off
	closed bool // under mu
}

// line is a connection to a TPM.
type line interface {
	io.ReadWriteCloser
	SetDeadline(time.Time) error
}

func newBus(c Config) *bus {
	return &bus{path: c.Device, deadline: c.Deadline, turn: make(chan struct{}, 1)}
}

func (b *bus) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.line != nil {
		b.line.Close()
	}
}

// use runs a few commands in a row. do flushes what it loads; where a command does not come back the next one tidies up.
func (b *bus) use(ctx context.Context, do func(transport.TPM) error) error {
	select {
	case b.turn <- struct{}{}:
		defer func() { <-b.turn }()
	case <-ctx.Done():
		return fmt.Errorf("tpm: %w: it is busy: %w", keystore.ErrUnavailable, ctx.Err())
	}
	l, err := b.dial(ctx)
	if err != nil {
		return fmt.Errorf("tpm: %w: %w", keystore.ErrUnavailable, err)
	}
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		l.Close()
		return errClosed
	}
	b.line = l
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		b.line = nil
		b.mu.Unlock()
		l.Close()
	}()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	c := &conversation{line: l, deadline: b.deadline}
	if b.untidy {
		if err := b.tidy(c); err != nil {
			return err
		}
		b.untidy = false
	}
	defer func() { b.untidy = c.broken != nil }()
	err = do(c)
	for _, full := range []error{tpm2.TPMRCObjectMemory, tpm2.TPMRCSessionMemory, tpm2.TPMRCSessionHandles} {
		if errors.Is(err, full) { // by what another process has left: nothing was done yet
			if err := b.tidy(c); err != nil {
				return err
			}
			return do(c)
		}
	}
	return err
}

// tidy removes what a process that was cut off has left in a TPM without a resource manager.
func (b *bus) tidy(t transport.TPM) error {
	if st, err := os.Stat(b.path); err != nil || st.Mode()&os.ModeSocket == 0 {
		return nil // the kernel's resource manager does that
	}
	return flushAll(t, transientFirst, loadedSessionFirst)
}

func (b *bus) dial(ctx context.Context) (line, error) {
	st, err := os.Stat(b.path)
	if err != nil {
		return nil, err
	}
	if st.Mode()&os.ModeSocket != 0 {
		ctx, cancel := context.WithTimeout(ctx, b.deadline)
		defer cancel()
		conn, err := new(net.Dialer).DialContext(ctx, "unix", b.path)
		if err != nil {
			return nil, err
		}
		return conn, nil
	}
	if st.Mode()&os.ModeDevice == 0 {
		return nil, fmt.Errorf("%s is neither a device nor a socket", b.path)
	}
	return os.OpenFile(b.path, os.O_RDWR, 0)
}

// conversation is a transport.TPM over one line. After an error it says nothing any more.
type conversation struct {
	line     line
	deadline time.Duration
	broken   error
}

// TPM 2.0 Part 2 section 6: a response is u16 tag, u32 size, u32 code. maxResponse is the most that the kernel passes on.
const (
	headerSize  = 10
	maxResponse = 4096
)

var errNoAnswer = errors.New("the TPM has not answered well")

// Send passes a command on and returns its answer. A TPM that asks for it gets the command again: it does so when it has
// to write down first that a PIN is about to be tried, or while it tests itself.
func (c *conversation) Send(command []byte) (response []byte, err error) {
	if c.broken != nil {
		return nil, c.broken
	}
	defer func() {
		if err != nil {
			c.broken = fmt.Errorf("tpm: %w: %w: %w", keystore.ErrUnavailable, errNoAnswer, err)
			c.line.Close()
			err = c.broken
		}
	}()
	end := time.Now().Add(c.deadline)
	if err := c.line.SetDeadline(end); err != nil && !errors.Is(err, os.ErrNoDeadline) {
		return nil, err
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		response, err := c.exchange(command)
		if err != nil || !time.Now().Add(pause).Before(end) {
			return response, err
		}
		switch tpm2.TPMRC(binary.BigEndian.Uint32(response[6:])) {
		case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting:
			time.Sleep(pause)
		default:
			return response, nil
		}
	}
}

func (c *conversation) exchange(command []byte) ([]byte, error) {
	if _, err := c.line.Write(command); err != nil {
		return nil, err
	}
	// A device gives the whole response to one read; a socket may give it in parts.
	buf := make([]byte, maxResponse)
	n, err := io.ReadAtLeast(c.line, buf, headerSize)
	if err != nil {
		return nil, err
	}
	size := int(binary.BigEndian.Uint32(buf[2:]))
	if size < headerSize || size > maxResponse || size < n {
		return nil, fmt.Errorf("a response that says it has %d bytes", size)
	}
	if _, err := io.ReadFull(c.line, buf[n:size]); err != nil {
		return nil, err
	}
	return buf[:size], nil
}
