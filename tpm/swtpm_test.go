package tpm_test

import (
	"context"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"countersign/tpm"
	"countersign/tpm/tpmtest"
)

// config returns a configuration with a new state directory.
func config(t testing.TB, e *tpmtest.Emulator) tpm.Config {
	return tpm.Config{
		Device: e.Socket, State: filepath.Join(t.TempDir(), "keys"), PCRs: []uint{7, 11}, Deadline: 5 * time.Second,
	}
}

// open provisions and opens a store.
func open(t testing.TB, c tpm.Config) *tpm.Store {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := tpm.Provision(ctx, c); err != nil {
		t.Fatal(err)
	}
	s, err := tpm.Open(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// tap is a socket proxy that records all traffic.
type tap struct {
	path string
	mu   sync.Mutex
	seen []byte
}

func newTap(t testing.TB, to string) *tap {
	t.Helper()
	p := &tap{path: to + ".tap"}
	l, err := net.Listen("unix", p.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	pump := func(from, to net.Conn) {
		defer from.Close()
		defer to.Close()
		buf := make([]byte, 4096)
		for {
			n, err := from.Read(buf)
			p.mu.Lock()
			p.seen = append(p.seen, buf[:n]...)
			p.mu.Unlock()
			if _, failed := to.Write(buf[:n]); err != nil || failed != nil {
				return
			}
		}
	}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("unix", to)
			if err != nil {
				in.Close()
				continue
			}
			go pump(in, out)
			go pump(out, in)
		}
	}()
	return p
}

func (p *tap) bytes() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]byte(nil), p.seen...)
}
