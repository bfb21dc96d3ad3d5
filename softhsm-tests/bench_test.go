package softhsmtests

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign/client"
	"countersign/hsm"
	"countersign/internal/eddsa"
	"countersign/internal/journal"
	"countersign/internal/keystore"
	"countersign/internal/keystore/worker"
	"countersign/internal/sandbox"
	"countersign/tpm"
	"countersign/tpm/tpmtest"
	"countersign/transcript"
)

// Every benchmark prints lines of the form "NAME PARAMETERS ratio X", followed by the two rates of
// the ratio. A ratio is the median over 41 rounds. In each round the two sides of the ratio run for
// 150 ms each, one after the other, since other load on the machine varies over time.
const (
	rounds   = 41
	warmUp   = 30 * time.Millisecond
	measured = 150 * time.Millisecond
)

// compile builds a program or a shared object from a C file in testdata/ with gcc.
func compile(t testing.TB, source string, flags ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), strings.TrimSuffix(source, ".c")+".out")
	args := slices.Concat([]string{"-O2", "-Wall", "-o", out, filepath.Join("testdata", source)}, flags,
		[]string{"-ldl", "-lpthread"})
	if text, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc %s: %v\n%s", source, err, text)
	}
	return out
}

func (s *system) hsmConfig(module string, sessions int) hsm.Config {
	return hsm.Config{
		URI: "pkcs11:token=system%20test", Module: module, PINFile: s.path("pin"), Sessions: sessions, Share: 1,
	}
}

// pool opens the token through key workers, as the daemon does. The workers are processes of the
// built countersignd.
func (s *system) pool(b testing.TB, c hsm.Config, workers, memory int) *worker.Pool {
	b.Helper()
	return openPool(b, map[string]any{"hsm": c}, workers, memory, max(16, 2*c.Sessions))
}

func openPool(b testing.TB, device map[string]any, workers, memory, inFlight int) *worker.Pool {
	b.Helper()
	start := func(_ int, seedFile string, socket, stderr *os.File) (worker.Process, error) {
		r := sandbox.Rights{
			Read:  []string{"/usr", "/etc", "/lib", "/lib64", "/dev/urandom", "/proc/self"},
			Write: []string{os.TempDir()}, Sockets: []string{os.TempDir()},
		}
		if seedFile != "" {
			r.Read = append(r.Read, seedFile)
		}
		device := maps.Clone(device)
		device["rights"] = r
		text, err := json.Marshal(device)
		if err != nil {
			return nil, err
		}
		config, ours, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		defer config.Close()
		_, err = ours.Write(text) // fits into the pipe
		ours.Close()
		if err != nil {
			return nil, err
		}
		cmd := exec.Command(filepath.Join(bin, "countersignd"), "key-worker", "bench")
		return worker.Exec(cmd, socket, stderr, config)
	}
	p, err := worker.Open(b.Context(), worker.Config{
		Name: "bench", Start: start, Workers: workers, Spread: true, InFlight: inFlight, Memory: memory,
		Deadline: 5 * time.Second, Log: slog.New(slog.DiscardHandler),
	}, false)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	return p
}

// measurement is one side of a ratio. Each call measures for 150 ms and returns calls per second.
type measurement func() float64

// compare prints the ratio of each side to the floor, the rate of the device alone.
func compare(parameters string, floor measurement, names []string, sides ...measurement) {
	// The first measurement of each side is discarded: sessions open, key handles are found.
	for _, measure := range append(sides, floor) {
		measure()
	}
	figures, ratios := make([][]float64, len(sides)), make([][]float64, len(sides))
	var floors []float64
	for range rounds {
		for i, measure := range sides {
			at := floor()
			got := measure()
			floors, figures[i], ratios[i] = append(floors, at), append(figures[i], got), append(ratios[i], got/at)
		}
	}
	for i, name := range names {
		fmt.Fprintf(os.Stdout, "%s %s ratio %.2f (%.0f/s, floor %.0f/s)\n",
			name, parameters, median(ratios[i]), median(figures[i]), median(floors))
	}
}

func median(of []float64) float64 {
	slices.Sort(of)
	return of[len(of)/2]
}

// cLoop starts the signing loop in C (testdata/floor.c) on a PKCS#11 module. The returned function
// makes a measurement of the loop with a number of PKCS#11 sessions.
func (s *system) cLoop(b *testing.B, program, module string) func(sessions int) measurement {
	cmd := exec.Command(program, module, s.path("pin"), "countersign/payments/1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	answers := bufio.NewReader(out)
	return func(sessions int) measurement {
		return func() (rate float64) {
			fmt.Fprintln(in, sessions, int(measured/time.Millisecond))
			if _, err := fmt.Fscanln(answers, &rate); err != nil {
				b.Fatalf("no rate from the loop in C: %v", err)
			}
			return rate
		}
	}
}

// bestSessions finds the number of sessions with the highest rate, among 1, 2, 4, 8 and 16. The
// returned floor is the measurement with this number.
func bestSessions(loop func(sessions int) measurement) (sessions int, floor measurement) {
	most := 0.0
	for _, n := range []int{1, 2, 4, 8, 16} {
		var seen []float64
		for range 9 {
			seen = append(seen, loop(n)())
		}
		if r := median(seen); r > most {
			sessions, most = n, r
		}
	}
	return sessions, loop(sessions)
}

// parsedDocument parses a document of a type for now.
func parsedDocument(t testing.TB, typ, payload string) *transcript.Document {
	t.Helper()
	now := time.Now().Unix()
	r := transcript.Request{Type: typ, Payload: []byte(payload), Timestamp: now, ExpiresAt: now + 60}
	rand.Read(r.Nonce[:])
	doc, err := transcript.Parse(r)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// signing makes a measurement of a key with a number of concurrent callers. With verify set, each
// signature is verified before the call returns, as in the appliance.
func signing(b *testing.B, key keystore.Key, callers int, verify bool) measurement {
	doc := parsedDocument(b, "message-v1", `{"context":"bench","message":"AAAA"}`)
	message, input := doc.Message, doc.Input()
	info := key.Info()
	verifies := func(signature []byte) bool { return info.Verify(message, signature) }
	if _, err := key.Sign(b.Context(), input, verifies); err != nil {
		input = message // a key of a device without a key worker signs its input
	}
	var judge keystore.Judge
	if verify {
		public, err := eddsa.ParsePublicKey(key.Info().PublicKey)
		if err != nil {
			b.Fatal(err)
		}
		judge = func(signature []byte) bool { return public.Verify(message, signature) == nil }
	}
	return func() float64 {
		return rate(b, callers, func(ctx context.Context, _ int) error {
			_, err := key.Sign(ctx, input, judge)
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

// BenchmarkBackend measures package hsm, in this process and in key workers, with and without the
// verification of each signature. The floor is a loop in C on the same token.
func BenchmarkBackend(b *testing.B) {
	s := newSystem(b)
	p := s.serve()
	s.enrol()
	p.stop()
	b.Setenv("SOFTHSM2_CONF", s.path("softhsm2.conf"))
	program := compile(b, "floor.c")
	sessions, floor := bestSessions(s.cLoop(b, program, softHSM))
	cores := runtime.NumCPU() // a software token is fastest with one session for each core
	store, err := hsm.Open(b.Context(), s.hsmConfig(softHSM, cores))
	if err != nil {
		b.Fatal(err)
	}
	// A key worker sets GOMAXPROCS in the same way: its threads block in C.
	before := runtime.GOMAXPROCS(cores + 2)
	key := findKey(b, store)
	compare(fmt.Sprintf("softhsm %d", sessions), floor, []string{"hsm", "hsm+verify"},
		signing(b, key, cores, false), signing(b, key, cores, true))
	store.Close() // the shim below loads SoftHSM too, and a process has one instance of SoftHSM
	runtime.GOMAXPROCS(before)
	pooled := findKey(b, s.pool(b, s.hsmConfig(softHSM, 1), 2, 1<<30))
	config := journal.Config{Folder: s.path("ledger.db.journal"), Token: "bench", Size: 64 << 20, Files: 4}
	device := map[string]any{"hsm": s.hsmConfig(softHSM, 1), "journal": config}
	noted := findKey(b, openPool(b, device, 2, 1<<30, 16))
	compare(fmt.Sprintf("softhsm %d", sessions), floor, []string{"worker", "worker+journal", "worker+verify"},
		signing(b, pooled, 64, false), signing(b, noted, 64, false), signing(b, pooled, 64, true))

	// The shim imitates a network HSM: each call takes 5 ms more and no CPU.
	shim := compile(b, "shim.c", "-shared", "-fPIC")
	b.Setenv("SHIM_DELAY", "5000")
	slow, err := hsm.Open(b.Context(), s.hsmConfig(shim, 16))
	if err != nil {
		b.Fatal(err)
	}
	defer slow.Close()
	one := s.pool(b, s.hsmConfig(shim, 16), 1, 1<<30)
	compare("softhsm+5ms 16", s.cLoop(b, program, shim)(16), []string{"hsm", "worker"},
		signing(b, findKey(b, slow), 16, false), signing(b, findKey(b, one), 64, false))
}

// BenchmarkTPM measures a TPM-sealed Ed25519 key in key workers. The floor is crypto/ed25519 in
// this process, on all cores.
func BenchmarkTPM(b *testing.B) {
	e := tpmtest.New(b)
	c := tpm.Config{Device: e.Socket, State: b.TempDir(), PCRs: []uint{7}, Deadline: 5 * time.Second}
	if err := tpm.Provision(b.Context(), c); err != nil {
		b.Fatal(err)
	}
	pool := openPool(b, map[string]any{"tpm": c}, 2, 1<<30, 256)
	ref := keystore.Ref{Name: "payments", Version: 1}
	key, err := pool.Generate(b.Context(), ref, keystore.Ed25519, keystore.Tag{1})
	if err != nil {
		b.Fatal(err)
	}
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		b.Fatal(err)
	}
	message := make([]byte, 115)
	plain := func() float64 {
		return rate(b, runtime.NumCPU(), func(context.Context, int) error {
			ed25519.Sign(private, message)
			return nil
		})
	}
	compare("worker 64", plain, []string{"tpm-sealed", "tpm-sealed+verify"},
		signing(b, key, 64, false), signing(b, key, 64, true))
}

// newMeasured is newSystem with an enrolled peer, one session of the token and a short log. No
// daemon runs.
func newMeasured(b *testing.B) *system {
	s := newSystem(b)
	p := s.serve()
	s.enrol()
	p.stop()
	s.edit("countersign.toml", `"debug"`, `"warn"`)
	s.edit("countersign.toml", "[tokens.main]", "[tokens.main]\nsessions = 1")
	return s
}

func (s *system) dialEight() (clients []*client.Client) {
	for range 8 {
		clients = append(clients, s.dial())
	}
	return clients
}

// BenchmarkSign measures sign requests through a running daemon: 64 requests in flight over 8
// connections. Each is admitted on disk, signed, verified by the appliance and again by the client,
// all on this machine. The floor is the token alone, measured in the same run.
func BenchmarkSign(b *testing.B) {
	s := newMeasured(b)
	b.Setenv("SOFTHSM2_CONF", s.path("softhsm2.conf"))
	_, floor := bestSessions(s.cLoop(b, compile(b, "floor.c"), softHSM))
	p := s.serve()
	clients := s.dialEight()
	compare("softhsm 64", floor, []string{"sign"}, func() float64 {
		return rate(b, 64, func(ctx context.Context, caller int) error {
			_, err := clients[caller%len(clients)].Sign(ctx, "payments", message("AAAA"))
			return err
		})
	})
	p.stop()
}

// BenchmarkLatency prints how long a peer waits for one signature and for one verification, with 1
// and with 64 requests in flight over up to 8 connections, each for five seconds. The lines have
// the form "latency OPERATION softhsm CALLERS: RATE/s, p50 MEDIAN ms, p99 PERCENTILE ms". The time
// of a signature runs from the call of the SDK to its return: the client has verified the signature
// by then. A verification is of a document that was signed just before.
func BenchmarkLatency(b *testing.B) {
	s := newMeasured(b)
	p := s.serve()
	clients := s.dialEight()
	for _, callers := range []int{1, 64} {
		signed := make([][]*client.Signed, callers)
		latency(b, "sign", callers, func(caller int) (bool, error) {
			done, err := clients[caller%len(clients)].Sign(b.Context(), "payments", message("AAAA"))
			signed[caller] = append(signed[caller], done)
			return true, err
		})
		latency(b, "verify", callers, func(caller int) (bool, error) {
			if len(signed[caller]) == 0 {
				return false, nil
			}
			_, err := clients[caller%len(clients)].Verify(b.Context(), "payments", signed[caller][0])
			signed[caller] = signed[caller][1:]
			return true, err
		})
	}
	p.stop()
}

// latency prints the rate, the median and the 99th percentile of a call. Each caller calls again at
// once, for five seconds or until the call has no more work. The first ten calls of each caller
// are a warm-up.
func latency(b *testing.B, operation string, callers int, call func(caller int) (more bool, err error)) {
	const warmUps, duration = 10, 5 * time.Second
	took := make([][]float64, callers) // ms
	began := time.Now()
	var wg sync.WaitGroup
	for caller := range callers {
		wg.Go(func() {
			for n := 0; time.Since(began) < duration; n++ {
				at := time.Now()
				more, err := call(caller)
				if err != nil {
					b.Errorf("%s: %v", operation, err)
				}
				if err != nil || !more {
					return
				}
				if n >= warmUps {
					took[caller] = append(took[caller], float64(time.Since(at).Microseconds())/1000)
				}
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(began).Seconds()
	all := slices.Sorted(slices.Values(slices.Concat(took...)))
	if len(all) < 100 {
		b.Fatalf("%s: %d calls in %.1f s are too few for a percentile", operation, len(all), elapsed)
	}
	fmt.Printf("latency %s softhsm %d: %.0f/s, p50 %.1f ms, p99 %.1f ms\n", operation, callers,
		float64(len(all)+warmUps*callers)/elapsed, all[len(all)/2], all[len(all)*99/100])
}

// rate returns the calls per second of a number of concurrent callers, after a warm-up of 30 ms.
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
