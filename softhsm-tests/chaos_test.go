package softhsmtests

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign/client"
	"countersign/wire"
)

// The shim's script names a function by its index in CK_FUNCTION_LIST (PKCS#11 v2.40).
const (
	fnGetSlotList, fnOpenSession, fnFindInit = 4, 12, 26
	fnSignInit, fnSign, fnGetAttribute       = 42, 43, 24
	fnDeriveKey                              = 62
)

// codes are the return values from which package hsm recovers by a new PKCS#11 session, a new login
// or a reload of the module (PKCS#11 v2.40, section 5.1).
var codes = map[string]uint{
	"CKR_HOST_MEMORY": 0x02, "CKR_SLOT_ID_INVALID": 0x03, "CKR_GENERAL_ERROR": 0x05,
	"CKR_FUNCTION_FAILED": 0x06, "CKR_DEVICE_ERROR": 0x30, "CKR_DEVICE_MEMORY": 0x31,
	"CKR_DEVICE_REMOVED": 0x32, "CKR_FUNCTION_CANCELED": 0x50, "CKR_KEY_HANDLE_INVALID": 0x60,
	"CKR_KEY_FUNCTION_NOT_PERMITTED": 0x68, "CKR_MECHANISM_INVALID": 0x70, "CKR_OBJECT_HANDLE_INVALID": 0x82,
	"CKR_OPERATION_ACTIVE": 0x90, "CKR_OPERATION_NOT_INITIALIZED": 0x91, "CKR_SESSION_CLOSED": 0xb0,
	"CKR_SESSION_HANDLE_INVALID": 0xb3, "CKR_TOKEN_NOT_PRESENT": 0xe0, "CKR_TOKEN_NOT_RECOGNIZED": 0xe1,
	"CKR_USER_NOT_LOGGED_IN": 0x101, "CKR_CRYPTOKI_NOT_INITIALIZED": 0x190,
}

// fault is a line of the shim's script (testdata/shim.c describes the kinds).
type fault struct {
	lasts    time.Duration
	function int    // index in CK_FUNCTION_LIST, or -1 for every function
	kind     string // such as "hang"
	argument uint
	count    int // calls that the fault hits; 0 is every call while the fault lasts
}

// allFaults lists each return value and each other fault once.
func allFaults() (all []fault) {
	for i, name := range slices.Sorted(maps.Keys(codes)) {
		function := []int{fnSignInit, fnSign, fnDeriveKey}[i%3]
		all = append(all, fault{function: function, kind: "code", argument: codes[name], lasts: 100 * time.Millisecond})
	}
	for _, function := range []int{fnOpenSession, fnFindInit, fnGetAttribute, fnGetSlotList} {
		all = append(all, fault{
			function: function, kind: "code", argument: codes["CKR_DEVICE_ERROR"], lasts: 100 * time.Millisecond,
		})
	}
	for _, function := range []int{fnSignInit, fnSign, fnDeriveKey} {
		all = append(all,
			fault{function: function, kind: "hang", count: 1, lasts: 100 * time.Millisecond},
			fault{function: function, kind: "slow", argument: 20, lasts: 100 * time.Millisecond},
			fault{function: function, kind: "crash", count: 1, lasts: 100 * time.Millisecond})
	}
	return append(all,
		fault{function: fnSign, kind: "wrong", count: 1, lasts: 100 * time.Millisecond},
		fault{function: fnSign, kind: "short", count: 1, lasts: 100 * time.Millisecond},
		fault{function: fnSignInit, kind: "logout", count: 1, lasts: 100 * time.Millisecond},
		fault{function: fnDeriveKey, kind: "logout", count: 1, lasts: 100 * time.Millisecond},
		fault{function: -1, kind: "gone", lasts: 150 * time.Millisecond},
		fault{function: fnOpenSession, kind: "limit", argument: 2, lasts: 200 * time.Millisecond},
		fault{function: -1, kind: "lost", lasts: 100 * time.Millisecond},
	)
}

// chaosSeed logs the seed of the faults' order. The environment variable CHAOS_SEED repeats the
// order of an earlier run.
func chaosSeed(t *testing.T) uint64 {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("CHAOS_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("CHAOS_SEED=%d", seed)
	return seed
}

const (
	chaosDeadline = 300 * time.Millisecond // deadline of a call to the device
	chaosTimeout  = 10 * time.Second       // timeout of a request
	chaosGrace    = time.Second            // longest delay of an answer beyond chaosTimeout
)

// minSignatures is the number of signatures at which a chaos test may end.
func minSignatures() int64 {
	if os.Getenv("RACE") == "1" {
		return 3000 // the race detector is slow
	}
	return 20_000
}

// newChaos sets up a system that loads the shim in the place of SoftHSM's module.
func newChaos(t *testing.T) *system {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	p.stop()
	if err := os.Mkdir(s.path("shim"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.edit("countersign.toml", softHSM, compile(t, "shim.c", "-shared", "-fPIC"))
	s.edit("countersign.toml", "environment = {",
		fmt.Sprintf("deadline = %q\nfiles = [\".\"]\nenvironment = { SHIM_DIR = %q, SHIM_SCRIPT = %q,",
			chaosDeadline, s.path("shim"), s.path("script")))
	s.edit("countersign.toml", "[tokens.main]",
		fmt.Sprintf("[limits]\nrequest_timeout = %q\n\n[tokens.main]", chaosTimeout))
	s.edit("countersign.toml", `"debug"`, `"info"`)
	return s
}

// script writes the shim's script: fault i begins at begin + i*every. processOf chooses the process
// that the fault hits, or -1 for all.
func (s *system) script(
	begin time.Time, faults []fault, every time.Duration, processOf func(i int) int,
) (end time.Time) {
	var b strings.Builder
	for i, f := range faults {
		from := begin.Add(time.Duration(i) * every)
		fmt.Fprintf(&b, "%d %d %d %d %s %d %d 0\n", from.UnixMilli(), from.Add(f.lasts).UnixMilli(),
			processOf(i), f.function, f.kind, f.argument, f.count)
	}
	s.write("script.new", b.String())
	// The rename is atomic: the shim may be reading the script.
	if err := os.Rename(s.path("script.new"), s.path("script")); err != nil {
		s.t.Error(err)
	}
	return begin.Add(time.Duration(len(faults)) * every)
}

// waitForWorkers waits until both key workers run in five consecutive polls, 20 ms apart.
func (s *system) waitForWorkers(ctx context.Context) error {
	for good := 0; good < 5; {
		tokens, err := s.admin().Tokens(ctx)
		if err != nil {
			return err
		}
		good++
		for _, w := range tokens[0].Workers {
			if w.PID == 0 {
				good = 0
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil
}

// loadResult has the requests, failures and latencies of a load.
type loadResult struct {
	mu       sync.Mutex
	requests map[[32]byte]*request
	failures []error

	answers, handshakes atomic.Int64
	longest             atomic.Int64 // nanoseconds
}

func (o *loadResult) recordDuration(began time.Time) {
	for took := int64(time.Since(began)); ; {
		seen := o.longest.Load()
		if took <= seen || o.longest.CompareAndSwap(seen, took) {
			return
		}
	}
}

// load runs eight connections with four requests in flight each, and two loops of handshakes. load
// ends when over reports that the faults are over and minSignatures are answered. The SDK makes no
// retries.
func (s *system) load(t *testing.T, over func() bool) *loadResult {
	o := &loadResult{requests: map[[32]byte]*request{}}
	config := s.clientConfig()
	config.RetryFor = 0
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	more := func() bool {
		return ctx.Err() == nil && (!over() || o.answers.Load() < minSignatures())
	}
	fail := func(err error) {
		o.mu.Lock()
		o.failures = append(o.failures, err)
		o.mu.Unlock()
	}
	var wg sync.WaitGroup
	for range 8 {
		c, err := client.Dial(ctx, config)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for range 4 {
			wg.Go(func() {
				for more() {
					q := newRequest()
					o.mu.Lock()
					o.requests[q.document.Nonce] = q
					o.mu.Unlock()
					began := time.Now()
					signed, err := c.Sign(ctx, "payments", q.document)
					o.recordDuration(began)
					if err != nil {
						fail(err)
						continue
					}
					o.mu.Lock()
					q.answer = signed
					o.mu.Unlock()
					o.answers.Add(1)
				}
			})
		}
	}
	for range 2 {
		wg.Go(func() {
			for more() {
				began := time.Now()
				c, err := client.Dial(ctx, config)
				o.recordDuration(began)
				if err != nil {
					fail(fmt.Errorf("handshake: %w", err))
					continue
				}
				c.Close()
				o.handshakes.Add(1)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		t.Fatalf("only %d answers in time", o.answers.Load())
	}
	if longest := time.Duration(o.longest.Load()); longest > chaosTimeout+chaosGrace {
		t.Errorf("a request took %v", longest)
	}
	t.Logf("%d signatures, %d handshakes, %d failures, the longest request took %v",
		o.answers.Load(), o.handshakes.Load(), len(o.failures), time.Duration(o.longest.Load()))
	return o
}

// TestChaosOneWorkerAlive injects every fault, each into one of the two key workers, alternately.
// No request and no handshake fails, no wrong signature is released (the SDK verifies each), and no
// nonce is signed for two contents.
func TestChaosOneWorkerAlive(t *testing.T) {
	s := newChaos(t)
	faults := allFaults()
	seed := chaosSeed(t)
	rand.New(rand.NewPCG(seed, 1)).Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
	p := s.serve()
	var over atomic.Bool
	var injecting sync.WaitGroup
	defer injecting.Wait()
	injecting.Go(func() {
		defer over.Store(true)
		for i := range faults {
			if err := s.waitForWorkers(t.Context()); err != nil {
				t.Error(err)
				return
			}
			begin := time.Now().Add(10 * time.Millisecond)
			end := s.script(begin, faults[i:i+1], faults[i].lasts, func(int) int { return i % 2 })
			time.Sleep(time.Until(end) + chaosDeadline) // the pool notices a hanging call after the deadline
		}
	})
	o := s.load(t, over.Load)
	for i, err := range o.failures {
		if i == 5 {
			break
		}
		t.Errorf("failed: %v", err)
	}
	s.checkRequests(o.requests, 2000)
	s.mustReconcile()
	p.stop()
	if n := strings.Count(p.stderr.String(), "a key worker is given up"); n < len(faults)/4 {
		t.Errorf("only %d key workers were given up for %d faults: too few for the test to prove anything",
			n, len(faults))
	} else {
		t.Logf("%d faults, %d key workers given up", len(faults), n)
	}
}

// TestChaos injects the faults into all key workers at once. Requests may fail with "unavailable"
// and with no other code. Afterwards the appliance serves again without a restart.
func TestChaos(t *testing.T) {
	s := newChaos(t)
	faults := allFaults()
	seed := chaosSeed(t)
	rand.New(rand.NewPCG(seed, 2)).Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
	// The last fault removes the device for 3 s. No key worker can be started then, which short
	// faults may not achieve.
	outage := fault{function: -1, kind: "gone", lasts: 3 * time.Second}
	faults = append(faults[:24], outage)
	begin := time.Now().Add(2 * time.Second)
	end := s.script(begin, faults, 400*time.Millisecond, func(int) int { return -1 }).Add(outage.lasts)
	p := s.serve()
	o := s.load(t, func() bool { return time.Now().After(end) })
	for _, err := range o.failures {
		var refusal *client.Error
		if !errors.As(err, &refusal) || refusal.Code != wire.CodeUnavailable {
			if !strings.Contains(err.Error(), "handshake") {
				t.Errorf("a request failed, but not with unavailable: %v", err)
				break
			}
		}
	}
	s.checkRequests(o.requests, 2000)
	s.mustReconcile()
	events := 0
	for _, e := range s.events() {
		if e.Type == "DeviceUnavailable" && e.Resource == "main" { // a key that was not found has an event of its own
			events++
		}
	}
	p.stop()
	log := p.stderr.String()
	down, up := strings.Count(log, "the token does not serve"), strings.Count(log, "the token serves again")
	t.Logf("%d key workers given up, the token was down %d times and back %d times",
		strings.Count(log, "a key worker is given up"), down, up)
	if down == 0 || up != down || events != down {
		t.Errorf("%d requests failed; the log says %d times that the token is down and %d times that it is back; "+
			"%d events say that it is down", len(o.failures), down, up, events)
	}
}
