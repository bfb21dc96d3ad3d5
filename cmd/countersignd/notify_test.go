package main

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"countersign/internal/cause"
)

// TestProbesFail probes doors that take connections and answer nothing, and doors that answer. Only
// an answer feeds the watchdog.
func TestProbesFail(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	socket := filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := newKnocker(l)
	if err := (prober{admin: served}).probeAdmin(ctx); err == nil {
		t.Error("an admin API that accepts nothing is alive")
	}
	hang := make(chan struct{})
	api := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang })}
	go api.Serve(served)
	ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := (prober{admin: served}).probeAdmin(ctx); err == nil {
		t.Error("an admin API that does not answer is alive")
	}
	close(hang)
	if err := (prober{admin: served}).probeAdmin(t.Context()); err != nil {
		t.Errorf("an admin API that answers: %v", err)
	}
	if conn, err := net.Dial("unix", socket); err != nil {
		t.Errorf("the admin socket: %v", err)
	} else {
		conn.Close()
	}
	api.Close()
	if err := (prober{admin: served}).probeAdmin(t.Context()); err == nil {
		t.Error("an admin socket that is closed is alive")
	}
	peers, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := probePeers(ctx, peers.Addr()); err == nil {
		t.Error("a listener that does not answer is alive")
	}
	go func() {
		for {
			conn, err := peers.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := probePeers(ctx, peers.Addr()); err != nil {
		t.Errorf("a listener that refuses the message: %v", err)
	}
	peers.Close()
	if err := probePeers(ctx, peers.Addr()); err == nil {
		t.Error("a listener that is closed is alive")
	}
}

// TestAddressGone: a listener whose address is taken from the machine (192.0.2.1 is nobody's) is no
// reason for a restart. A closed listener at an address of the machine is.
func TestAddressGone(t *testing.T) {
	at := func(address string) net.Addr {
		to, err := net.ResolveTCPAddr("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		return to
	}
	if hasAddress(at("192.0.2.1:7700")) {
		t.Error("192.0.2.1 is an address of this machine")
	}
	for _, address := range []string{"127.0.0.1:7700", "0.0.0.0:7700"} {
		if !hasAddress(at(address)) {
			t.Errorf("%s is no address of this machine", address)
		}
	}
}

// away is a listener at an address that no machine has (RFC 5737).
type away struct{ net.Listener }

func (away) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 7700} }

// TestAddressAway: a listener whose address has gone while serving is a cause until the address is
// back.
func TestAddressAway(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d := &door{address: "192.0.2.1:7700", inner: away{}}
	w := waits{doors: []*door{d, {address: "127.0.0.1:1"}}} // the second is not bound yet
	if all := w.causes(); len(all) != 1 || all[0].Kind != cause.AddressAway || all[0].Subject != d.address {
		t.Errorf("the causes are %v", all)
	}
	d.inner = l
	if all := w.causes(); len(all) != 0 {
		t.Errorf("with the address the causes are %v", all)
	}
}
