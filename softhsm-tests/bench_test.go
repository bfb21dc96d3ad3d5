package softhsmtests

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign/client"
	"countersign/hsm"
	"countersign/keystore"
	"countersign/keystore/worker"
)

// Every benchmark prints lines NAME PARAMETERS ratio X, with the two figures that made it. A ratio is taken from rounds
// in which its two sides take turns, since the machine may be busy with other things: the medians are compared.
const (
	rounds   = 5
	warmUp   = 200 * time.Millisecond
	measured = 1500 * time.Millisecond
)

// compile builds a program or a shared object of testdata/ with gcc.
func compile(t testing.TB, source string, flags ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), strings.TrimSuffix(source, ".c")+".out")
	if text, err := exec.Command("gcc", append(append([]string{"-O2", "-Wall", "-o", out, filepath.Join("testdata", source)}, flags...), "-ldl", "-lpthread")...).CombinedOutput(); err != nil {
		t.Fatalf("gcc %s: %v\n%s", source, err, text)
	}
	return out
}

func (s *system) hsmConfig(module string, sessions int) hsm.Config {
	return hsm.Config{URI: "pkcs11:token=system%20test", Module: module, PINFile: s.path("pin"), Sessions: sessions, Share: 1}
}

// pool opens the token behind the process boundary as the daemon does, with the daemon's own worker.
func (s *system) pool(b testing.TB, c hsm.Config, workers, memory int) *worker.Pool {
	b.Helper()
	hello, err := json.Marshal(c)
	if err != nil {
		b.Fatal(err)
	}
	p, err := worker.Open(b.Context(), worker.Config{
		Name: "bench", Hello: hello, Workers: workers, Spread: true, InFlight: 2 * c.Sessions, Memory: memory, Deadline: 5 * time.Second, Log: slog.New(slog.DiscardHandler),
		Command: func(int) *exec.Cmd {
			cmd := exec.Command(filepath.Join(bin, "countersignd"), "key-worker", "bench")
			return cmd
		},
	}, false)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	return p
}

// side is one side of a comparison: it measures once and returns calls a second.
type side func() float64

// compare prints the ratio of each side to the first.
func compare(parameters string, floor side, sides map[string]side) {
	figures := map[string][]float64{}
	for range rounds {
		figures[""] = append(figures[""], floor())
		for name, measure := range sides {
			figures[name] = append(figures[name], measure())
		}
	}
	median := func(name string) float64 {
		slices.Sort(figures[name])
		return figures[name][rounds/2]
	}
	for _, name := range slices.Sorted(func(yield func(string) bool) {
		for name := range sides {
			if !yield(name) {
				return
			}
		}
	}) {
		fmt.Fprintf(os.Stdout, "%s %s ratio %.2f (%.0f/s, floor %.0f/s)\n", name, parameters, median(name)/median(""), median(name), median(""))
	}
}

// signing measures a key with so many callers.
func signing(b *testing.B, key keystore.Key, callers int, verify bool) side {
	message := make([]byte, 115) // what message-v1 signs has about this length
	return func() float64 {
		return rate(b, callers, func(ctx context.Context, _ int) error {
			sig, err := key.Sign(ctx, message)
			if err == nil && verify && !key.Info().Verify(message, sig) {
				err = fmt.Errorf("a wrong signature")
			}
			return err
		})
	}
}

func findKey(b *testing.B, store keystore.Store) keystore.Key {
	b.Helper()
	key, err := store.Key(b.Context(), keystore.Ref{Name: "payments", Version: 1})
	if err != nil {
		b.Fatal(err)
	}
	return key
}

// BenchmarkBackend holds package hsm, in this process and behind the boundary, against a loop in C on the same token. The
// pool verifies each signature, which the floor does not: what that takes is measured too.
func BenchmarkBackend(b *testing.B) {
	s := newSystem(b)
	p := s.serve()
	s.enrol()
	p.stop()
	b.Setenv("SOFTHSM2_CONF", s.path("softhsm2.conf"))
	program := compile(b, "floor.c")
	floor := func(module string, sessions int) side {
		return func() float64 {
			out, err := exec.Command(program, module, s.path("pin"), "countersign/payments/1", strconv.Itoa(sessions), strconv.Itoa(int(measured/time.Millisecond))).CombinedOutput()
			if err != nil {
				b.Fatalf("floor: %v\n%s", err, out)
			}
			n, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
			if err != nil {
				b.Fatal(err)
			}
			return n
		}
	}
	best, most := 0, 0.0
	for _, n := range []int{1, 2, 4, 8, 16} {
		if r := floor(softHSM, n)(); r > most {
			best, most = n, r
		}
	}
	store, err := hsm.Open(b.Context(), s.hsmConfig(softHSM, 4))
	if err != nil {
		b.Fatal(err)
	}
	key, pooled := findKey(b, store), findKey(b, s.pool(b, s.hsmConfig(softHSM, 4), 2, 1<<30))
	compare(fmt.Sprintf("softhsm %d", best), floor(softHSM, best), map[string]side{
		"hsm":        signing(b, key, 4, false),
		"hsm+verify": signing(b, key, 4, true),
		"worker":     signing(b, pooled, 16, false),
	})

	store.Close() // the shim is SoftHSM too: there is one of it in a process

	// What a network HSM looks like: each call takes 5 ms more and no CPU.
	shim := compile(b, "shim.c", "-shared", "-fPIC")
	b.Setenv("SHIM_DELAY", "5000")
	slow, err := hsm.Open(b.Context(), s.hsmConfig(shim, 16))
	if err != nil {
		b.Fatal(err)
	}
	defer slow.Close()
	one := s.pool(b, s.hsmConfig(shim, 16), 1, 1<<30)
	compare("softhsm+5ms 16", floor(shim, 16), map[string]side{
		"hsm":    signing(b, findKey(b, slow), 16, false),
		"worker": signing(b, findKey(b, one), 32, false),
	})
}

// BenchmarkSign compares the whole path (64 requests in flight over 8 connections, admitted on disk, signed, verified by
// the appliance and again by the client, all on this machine) with what the token alone does in the same run.
func BenchmarkSign(b *testing.B) {
	s := newSystem(b)
	p := s.serve()
	s.enrol()
	p.stop()
	s.edit("countersign.toml", `"debug"`, `"warn"`)
	b.Setenv("SOFTHSM2_CONF", s.path("softhsm2.conf"))
	store, err := hsm.Open(b.Context(), s.hsmConfig(softHSM, 4))
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	key := findKey(b, store)

	p = s.serve()
	var clients []*client.Client
	for range 8 {
		clients = append(clients, s.dial())
	}
	compare("softhsm 64", signing(b, key, 4, false), map[string]side{"sign": func() float64 {
		return rate(b, 64, func(ctx context.Context, caller int) error {
			_, err := clients[caller%len(clients)].Sign(ctx, "payments", message("AAAA"))
			return err
		})
	}})
	p.stop()
}

// rate returns how many calls a second so many callers get done after a short warm-up.
func rate(b *testing.B, callers int, call func(ctx context.Context, caller int) error) float64 {
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
