package softhsmtests

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign/client"
	"countersign/hsm"
	"countersign/keystore"
)

// BenchmarkSign compares the whole path (64 requests in flight over 8 connections, admitted on disk, signed, verified by
// the appliance and again by the client, all on this machine) with what the token alone does in the same run (8 callers
// of package hsm in this process). It prints one line: the ratio, and the two rates that made it.
func BenchmarkSign(b *testing.B) {
	s := newSystem(b)
	p := s.serve()
	s.enrol()
	p.stop()
	s.edit("countersign.toml", `"debug"`, `"warn"`)

	b.Setenv("SOFTHSM2_CONF", s.path("softhsm2.conf"))
	store, err := hsm.Open(b.Context(), hsm.Config{
		URI: "pkcs11:token=system%20test", Module: softHSM, PINFile: s.path("pin"), Sessions: 8,
	})
	if err != nil {
		b.Fatal(err)
	}
	key, err := store.Key(b.Context(), keystore.Ref{Name: "payments", Version: 1})
	if err != nil {
		b.Fatal(err)
	}
	message115 := make([]byte, 115) // what message-v1 signs has about this length
	token := rate(b, 8, func(ctx context.Context, _ int) error {
		_, err := key.Sign(ctx, message115)
		return err
	})
	store.Close()

	p = s.serve()
	var clients []*client.Client
	for range 8 {
		clients = append(clients, s.dial())
	}
	whole := rate(b, 64, func(ctx context.Context, caller int) error {
		_, err := clients[caller%len(clients)].Sign(ctx, "payments", message("AAAA"))
		return err
	})
	p.stop()
	fmt.Fprintf(os.Stdout, "sign softhsm 64 ratio %.2f (%.0f/s through the appliance, %.0f/s in the token alone)\n", whole/token, whole, token)
}

// rate returns how many calls a second so many callers get done, over three seconds after a short warm-up.
func rate(b *testing.B, callers int, call func(ctx context.Context, caller int) error) float64 {
	const warmUp, measured = 300 * time.Millisecond, 3 * time.Second
	ctx, cancel := context.WithCancel(b.Context())
	var done atomic.Int64
	var wg sync.WaitGroup
	for caller := range callers {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := call(context.WithoutCancel(ctx), caller); err != nil {
					b.Error(err)
					return
				}
				done.Add(1)
			}
		})
	}
	time.Sleep(warmUp)
	before, begin := done.Load(), time.Now()
	time.Sleep(measured)
	n, took := done.Load()-before, time.Since(begin)
	cancel()
	wg.Wait()
	return float64(n) / took.Seconds()
}
