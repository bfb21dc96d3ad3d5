package tpm

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"countersign/internal/keystore"

	"golang.org/x/sys/unix"
)

// TestFullQueue: a socket with a full queue of connections, as swtpm's after connections without a
// command, is tried again until the timeout, and is used when there is room.
func TestFullQueue(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), path)
	listener, err := net.FileListener(file)
	if err := errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for {
		conn, err := net.Dial("unix", path)
		if errors.Is(err, unix.EAGAIN) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	b := newBus(Config{Device: path, Deadline: 20 * time.Millisecond})
	if _, err := b.dial(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no room until the timeout: %v", err)
	}
	b.timeout = time.Minute
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
		}
	}()
	conn, err := b.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

// mute is a device that can't be polled, has no deadlines and never answers.
type mute struct{ closed chan struct{} }

func (m mute) Write(b []byte) (int, error) { return len(b), nil }
func (m mute) Read([]byte) (int, error)    { <-m.closed; return 0, os.ErrClosed }
func (m mute) Close() error                { close(m.closed); return nil }
func (m mute) SetDeadline(time.Time) error { return os.ErrNoDeadline }

// TestDeviceWithoutDeadlines: a command has its timeout where the device file has none.
func TestDeviceWithoutDeadlines(t *testing.T) {
	c := &channel{conn: mute{make(chan struct{})}, timeout: 20 * time.Millisecond}
	for range 2 { // the connection stays broken
		_, err := c.Send(make([]byte, headerSize))
		if !errors.Is(err, keystore.ErrUnavailable) || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a command to a mute device: %v", err)
		}
	}
}
