package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"countersign/appliance"
	"countersign/internal/cause"
	"countersign/internal/keystore"
	"countersign/internal/manage"
	"countersign/noise"
)

// A device or an address can come up later than the machine. The daemon then starts without: the
// admin API serves, the state says what is missing, and peers are served when it has come. A
// failure that no wait can heal ends the daemon with the exit code of its class.

// heals reports a failure of the start that can end by itself: a token that does not answer, a
// machine in a state that is not approved yet, an address or a name that the network does not have
// yet, a compromised Noise key whose successor is about to be activated.
func heals(err error) bool {
	var name *net.DNSError
	return errors.Is(err, keystore.ErrUnavailable) || errors.Is(err, keystore.ErrSealed) ||
		errors.Is(err, manage.ErrNotFound) || errors.Is(err, syscall.EADDRNOTAVAIL) || errors.As(err, &name) ||
		errors.Is(err, syscall.ENODEV)
}

// door is a listener for peers whose address may come up later than the daemon. Accept waits for
// the address.
type door struct {
	address string
	profile noise.Profile
	bound   chan struct{} // closed with inner set
	closed  chan struct{}

	mu    sync.Mutex
	inner net.Listener // nil: not bound yet
	done  bool         // Close was called
}

// peerDoors returns the listeners for peers. Those with a given socket are bound.
func peerDoors(c Config, given sockets) (all []*door) {
	for _, d := range []struct {
		address string
		profile noise.Profile
	}{{c.Listen, noise.CountersignV1}, {c.ListenPubky, noise.PubkyV1}} {
		if d.address == "" {
			continue
		}
		each := &door{
			address: d.address, profile: d.profile, bound: make(chan struct{}), closed: make(chan struct{}),
		}
		if l := given[d.address]; l != nil {
			each.inner = l
			close(each.bound)
		}
		all = append(all, each)
	}
	return all
}

// bind binds the address, unless the address is bound.
func (d *door) bind(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.inner != nil || d.done {
		return nil
	}
	// Go's default is MPTCP, which a sandbox's rules for TCP ports do not cover.
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(ctx, "tcp", d.address)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	d.inner = l
	close(d.bound)
	return nil
}

// Accept waits for the address, then for a connection.
func (d *door) Accept() (net.Conn, error) {
	select {
	case <-d.bound:
		return d.inner.Accept()
	case <-d.closed:
		return nil, net.ErrClosed
	}
}

func (d *door) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.done {
		return nil
	}
	d.done = true
	close(d.closed)
	if d.inner != nil {
		return d.inner.Close()
	}
	return nil
}

// Addr returns the bound address, or nil.
func (d *door) Addr() net.Addr {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.inner == nil {
		return nil
	}
	return d.inner.Addr()
}

// lookForMissing binds the addresses that are there, and returns what peers can't be served
// without. A failure that no wait can heal is an error.
func lookForMissing(ctx context.Context, app *appliance.Appliance, doors []*door) (missing []string, err error) {
	for _, d := range doors {
		err := d.bind(ctx)
		if err != nil && !heals(err) {
			return nil, err
		} else if err != nil {
			missing = append(missing, fmt.Sprintf("the address %s (%v)", d.address, err))
		}
	}
	err = app.Keys.Listening()
	switch {
	case err != nil && !heals(err):
		return nil, err
	case err != nil:
		missing = append(missing, fmt.Sprintf("the Noise key (%v)", err))
	}
	return missing, nil
}

// waits has what the start waits for, and the addresses that were lost since, as causes of the
// state.
type waits struct {
	doors   []*door
	missing atomic.Pointer[[]string]
}

func (w *waits) set(missing []string) { w.missing.Store(&missing) }

func (w *waits) causes() (all []cause.Cause) {
	if missing := w.missing.Load(); missing != nil {
		for _, what := range *missing {
			all = append(all, cause.Starting.Of("", "no peer is served yet: the daemon waits for %s", what))
		}
	}
	for _, d := range w.doors {
		if at := d.Addr(); at != nil && !hasAddress(at) {
			all = append(all, cause.AddressAway.Of(d.address, "the machine has no such address now"))
		}
	}
	return all
}

// waitEvery is the interval between two looks for what is missing.
const waitEvery = time.Second

// stillStarting extends the service manager's timeout for the start (sd_notify) by 30 s.
const stillStarting = "EXTEND_TIMEOUT_USEC=30000000"

// waitUntilReady returns when peers can be served: all addresses are bound, and the Noise key's
// token answers. The error is one that no wait can heal, or that of ctx.
func waitUntilReady(
	ctx context.Context, app *appliance.Appliance, doors []*door, waiting *waits, manager *notifier, log *slog.Logger,
) error {
	ticker := time.NewTicker(waitEvery)
	defer ticker.Stop()
	var told []string
	var toldAt time.Time
	for {
		missing, err := lookForMissing(ctx, app, doors)
		if err != nil {
			return err
		}
		waiting.set(missing)
		if len(missing) == 0 {
			if len(told) > 0 {
				manager.send("STATUS=serves peers")
			}
			return nil
		}
		if len(missing) != len(told) || !slices.Equal(missing, told) && time.Since(toldAt) > time.Minute {
			log.Warn("no peer is served yet: what is missing may come", "waits_for", strings.Join(missing, "; "))
			told, toldAt = missing, time.Now()
		}
		status := cause.Line(strings.Join(missing, "; "))
		manager.send("STATUS=waits for " + status + "\n" + stillStarting)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}
