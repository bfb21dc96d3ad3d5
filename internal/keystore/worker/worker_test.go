package worker

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
)

// The workers of these tests are processes of this test binary. A test injects faults into its
// workers by files in a shared directory: see device.fault.

// workerEnv is the environment variable with a worker's number.
const workerEnv = "COUNTERSIGN_TEST_WORKER"

func TestMain(m *testing.M) {
	if number := os.Getenv(workerEnv); number != "" {
		if err := runWorker(number); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	if left := leftOver(); left != "" {
		fmt.Fprintf(os.Stderr, "all pools are closed, and there are goroutines:\n%s", left)
		code = 1
	}
	os.Exit(code)
}

// leftOver waits for the goroutines of this package and returns the stacks of those still running
// after bound.
func leftOver() (left string) {
	for deadline := time.Now().Add(bound); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		left = ""
		stacks := make([]byte, 1<<20)
		for stack := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
			if strings.Contains(stack, "keystore/worker.") && !strings.Contains(stack, "worker.TestMain") &&
				!strings.Contains(stack, "worker.runStarter") {
				left += stack + "\n\n"
			}
		}
		if left == "" {
			break
		}
	}
	return left
}

// bound is the timeout of every wait in these tests. Only a hanging test reaches the bound.
const bound = 30 * time.Second

var (
	seed         = [32]byte{7}
	private      = ed25519.NewKeyFromSeed(seed[:])
	agreement, _ = ecdh.X25519().NewPrivateKey(seed[:])

	payments = keystore.Info{
		Ref: keystore.Ref{Name: "payments", Version: 1}, Algorithm: keystore.Ed25519,
		PublicKey: private.Public().(ed25519.PublicKey), Custody: "memory", Tag: keystore.Tag{1},
	}
	noise = keystore.Info{
		Ref: keystore.Ref{Name: "noise", Version: 1}, Algorithm: keystore.X25519,
		PublicKey: agreement.PublicKey().Bytes(), Custody: "memory", Tag: keystore.Tag{2},
	}
	message = []byte("m")
)

// --- the worker's side

// dirEnv is the environment variable with the directory of the harness.
const dirEnv = workerEnv + "_DIR"

// testLanes is the number of lanes of these workers.
const testLanes = 16

func runWorker(number string) error {
	socket := os.NewFile(3, "key worker")
	if os.Getenv(workerEnv+"_RAW") != "" {
		return rawWorker(socket, number)
	}
	return Serve(socket, func(ctx context.Context, gate LogIn) (keystore.Store, int, error) {
		dir := os.Getenv(dirEnv)
		d := &device{Memory: keystoretest.NewMemory(), dir: dir, number: number}
		d.record("open")
		if err := d.fault("open"); err != nil {
			return nil, 0, err
		}
		err := gate(ctx, func(lastTry bool) error {
			if lastTry {
				d.record("last-try")
			}
			d.record("login")
			return d.fault("login")
		})
		if err != nil {
			d.fault("denied")
			return nil, 0, err
		}
		_, err = d.Memory.Import(ctx, payments.Ref, filepath.Join(dir, "seed"), payments.Tag)
		return d, testLanes, err
	})
}

// device is an in-memory store with injected faults.
type device struct {
	*keystoretest.Memory
	dir, number string
	signing     atomic.Int64
}

// record appends a line to the test's record: the event, the worker's number, its process id, and
// the time in nanoseconds.
func (d *device) record(event ...any) {
	f, err := os.OpenFile(filepath.Join(d.dir, "record"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	line := strings.TrimSpace(fmt.Sprint(event...))
	fmt.Fprintf(f, "%s %s %d %d\n", line, d.number, os.Getpid(), time.Now().UnixNano())
}

// fault performs the faults that the test has injected for an operation. A fault is a file with the
// fault's kind. The file op is for any worker, the file op.1 for worker 1. One fault removes the
// file, unless the name ends in .always.
func (d *device) fault(op string) error {
	for _, name := range []string{op, op + "." + d.number, op + ".always", op + "." + d.number + ".always"} {
		path := filepath.Join(d.dir, name)
		kind, err := os.ReadFile(path)
		if err != nil || !strings.HasSuffix(name, ".always") && os.Remove(path) != nil {
			continue // no fault, or another worker has taken the fault
		}
		d.record("hit-" + op)
		if err := d.perform(string(kind)); err != nil {
			return err
		}
	}
	return nil
}

func (d *device) perform(kind string) error {
	switch kind {
	case "crash":
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case "stop":
		syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		select {} // other threads may stop before this one
	case "hang":
		select {}
	case "grow":
		grow()
	case "wait":
		d.wait()
	case "grow, wait":
		grow()
		d.wait()
	case "wait, unavailable":
		d.wait()
		return keystore.ErrUnavailable
	case "wait, refused":
		d.wait()
		return keystore.ErrAuth
	case "nothing":
	case "shout":
		os.Stderr.Write(append(bytes.Repeat([]byte("a"), 1<<20), '\n'))
	case "crash, child":
		child := exec.Command("sleep", "60")
		child.Stderr = os.Stderr
		if err := child.Start(); err != nil {
			panic(err)
		}
		os.WriteFile(filepath.Join(d.dir, "child"), []byte(strconv.Itoa(child.Process.Pid)), 0o600)
		os.Exit(3)
	case "exit":
		os.Exit(3)
	case "wrong":
		return errWrongAnswer
	default:
		for _, class := range classes {
			if class.Error() == kind {
				return fmt.Errorf("the device: %w", class)
			}
		}
		panic("what is " + kind)
	}
	return nil
}

// errWrongAnswer makes an operation succeed with a wrong answer.
var errWrongAnswer = errors.New("wrong answer")

// grow allocates more memory than memoryLimit and never frees the memory.
func grow() {
	flags := syscall.MAP_ANON | syscall.MAP_PRIVATE | syscall.MAP_POPULATE
	if _, err := syscall.Mmap(-1, 0, memoryLimit+16<<20, syscall.PROT_READ|syscall.PROT_WRITE, flags); err != nil {
		panic(err)
	}
}

// wait blocks until the test injects go.
func (d *device) wait() {
	for {
		if _, err := os.Stat(filepath.Join(d.dir, "go")); err == nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (d *device) Bind(info keystore.Info) keystore.Key { return deviceKey{d.Memory.Bind(info), d} }

func (d *device) Key(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	if err := d.fault("key"); errors.Is(err, errWrongAnswer) {
		ref = payments.Ref
	} else if err != nil {
		return nil, err
	}
	return d.Memory.Key(ctx, ref)
}

func (d *device) Compare(ctx context.Context, infos []keystore.Info) ([]error, error) {
	return keystore.CompareEach(ctx, d.Key, infos)
}

func (d *device) Keys(ctx context.Context) ([]keystore.Ref, error) {
	if err := d.fault("keys"); errors.Is(err, keystore.ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return slices.Repeat([]keystore.Ref{payments.Ref}, 100_000), nil
	}
	return d.Memory.Keys(ctx)
}

func (d *device) Generate(
	ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag,
) (keystore.Key, error) {
	d.record("generate")
	if err := d.fault("generate"); err != nil {
		return nil, err
	}
	return d.Memory.Generate(ctx, ref, alg, tag)
}

func (d *device) Import(ctx context.Context, ref keystore.Ref, path string, tag keystore.Tag) (keystore.Key, error) {
	d.record("import")
	if err := d.fault("import"); err != nil {
		return nil, err
	}
	return d.Memory.Import(ctx, ref, path, tag)
}

func (d *device) Destroy(ctx context.Context, ref keystore.Ref, tag keystore.Tag) error {
	d.record("destroy")
	if err := d.fault("destroy"); err != nil {
		return err
	}
	return d.Memory.Destroy(ctx, ref, tag)
}

type deviceKey struct {
	keystore.Key
	device *device
}

func (k deviceKey) Sign(ctx context.Context, message []byte, judge keystore.Judge) ([]byte, error) {
	k.device.record("sign-", k.device.signing.Add(1))
	defer k.device.signing.Add(-1)
	if err := k.device.fault("sign"); errors.Is(err, errWrongAnswer) {
		return make([]byte, ed25519.SignatureSize), nil
	} else if err != nil {
		return nil, err
	}
	return k.Key.Sign(ctx, message, judge)
}

func (k deviceKey) Exchange(_ context.Context, peer [32]byte) (shared [32]byte, err error) {
	if err := k.device.fault("exchange"); errors.Is(err, errWrongAnswer) {
		return [32]byte{1}, nil
	} else if err != nil {
		return shared, err
	}
	public, err := ecdh.X25519().NewPublicKey(peer[:])
	if err != nil {
		return shared, err
	}
	secret, err := agreement.ECDH(public)
	copy(shared[:], secret)
	return shared, err
}

// rawWorker is a worker without Serve. A raw worker violates the protocol once, as injected.
func rawWorker(socket *os.File, number string) error {
	p, err := newPipe(socket)
	if err != nil {
		return err
	}
	var d device
	for {
		id, k, body, err := p.receive()
		if err != nil {
			return nil
		}
		switch k {
		case hello:
			d = device{dir: os.Getenv(dirEnv), number: number}
			if os.Remove(filepath.Join(d.dir, "open")) == nil { // report a refused PIN, answer, and exit at once
				p.send(1, loginRequest)
				if _, k, _, err := p.receive(); err != nil || k != loginReply {
					return fmt.Errorf("%v %w", k, err)
				}
				p.enqueue(1, loginEnded, encodeError(keystore.ErrAuth))
				p.send(id, result)
				os.Exit(0)
			}
			p.send(id, result)
		case request: // opKey
			b, err := json.Marshal(payments)
			if err != nil {
				return err
			}
			p.send(id, result, b)
		case sign:
			path := filepath.Join(d.dir, "violate")
			kind, _ := os.ReadFile(path)
			if os.Remove(path) == nil {
				d.record("hit-sign")
				violations[string(kind)](p, id)
				continue
			}
			p.send(id, result, ed25519.Sign(private, body[4:]))
		}
	}
}

// violations are faulty frames of a worker that does not exit. Each function sends its frames in
// place of the answer to call id.
var violations = map[string]func(p *pipe, id uint64){
	"an unknown id":             func(p *pipe, id uint64) { p.send(id+1000, result, make([]byte, 64)) },
	"an unknown kind":           func(p *pipe, id uint64) { p.send(id, 99) },
	"a frame that the pool has": func(p *pipe, id uint64) { p.send(id, hello) },
	"a frame that is too long": func(p *pipe, _ uint64) {
		p.conn.Write([]byte{0, 16, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, byte(result)})
	},
	"a frame that is too short": func(p *pipe, _ uint64) { p.conn.Write(make([]byte, headerSize)) },
	"half a frame": func(p *pipe, _ uint64) {
		p.conn.Write([]byte{0, 0, 1, 0, 0, 0})
		p.conn.CloseWrite()
	},
	"a short answer":             func(p *pipe, id uint64) { p.send(id, result, []byte{1, 2, 3}) },
	"an empty answer":            func(p *pipe, id uint64) { p.send(id, result) },
	"an error without a text":    func(p *pipe, id uint64) { p.send(id, failure, []byte{0}) },
	"a login that nobody allows": func(p *pipe, id uint64) { p.send(id, loginEnded, encodeError(keystore.ErrAuth)) },
	"questions without end": func(p *pipe, id uint64) {
		for range 100 {
			p.enqueue(id, loginRequest)
		}
		p.flush()
	},
	"the answer twice": func(p *pipe, id uint64) {
		for range 2 {
			p.enqueue(id, result, ed25519.Sign(private, message))
		}
		p.flush()
	},
	"the end of its answers": func(p *pipe, _ uint64) { p.conn.CloseWrite() },
}

// --- the test's side

type harness struct {
	*Pool
	t   *testing.T
	dir string

	mu       sync.Mutex
	reported []bool   // the calls of OnChange about the token
	keys     []string // the calls of OnChange about keys
	log      bytes.Buffer
}

// newHarness makes a harness without a pool.
func newHarness(t *testing.T) *harness {
	t.Parallel()
	h := &harness{t: t, dir: t.TempDir()}
	text := "keypair-seed:" + base64.RawURLEncoding.EncodeToString(seed[:]) + "\n"
	if err := os.WriteFile(filepath.Join(h.dir, "seed"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *harness) config(change func(c *Config)) Config {
	c := Config{
		Name: "test", Workers: 2, InFlight: 16, Memory: 1 << 40, Deadline: 5 * time.Second,
		Log: slog.New(slog.NewTextHandler(h, nil)), Start: h.start(),
		OnChange: func(resource string, up bool, _ error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			if resource == "test" {
				h.reported = append(h.reported, up)
			} else {
				h.keys = append(h.keys, fmt.Sprint(resource, " ", up))
			}
		},
	}
	if change != nil {
		change(&c)
	}
	return c
}

// start returns a Config.Start that runs this test's binary, with more variables.
func (h *harness) start(more ...string) func(int, string, *os.File, *os.File) (Process, error) {
	return func(number int, _ string, socket, stderr *os.File) (Process, error) {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", workerEnv, number), dirEnv+"="+h.dir,
			"GOTRACEBACK=none", "GORACE=atexit_sleep_ms=0")
		cmd.Env = append(cmd.Env, more...)
		return Exec(cmd, socket, stderr, nil)
	}
}

// Write appends to the pool's log.
func (h *harness) Write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log.Write(b)
}

func (h *harness) changes() []bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.reported)
}

// openPool opens a pool and waits until all workers are ready.
func openPool(t *testing.T, change func(c *Config)) *harness {
	t.Helper()
	h := newHarness(t)
	pool, err := Open(h.within(bound), h.config(change), false)
	if err != nil {
		t.Fatal(err)
	}
	h.Pool = pool
	t.Cleanup(h.end)
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
	return h
}

// end checks that every reservation was released, and closes the pool. TestMain checks that no
// goroutine is left.
func (h *harness) end() {
	h.t.Helper()
	h.eventually("nobody has a place or waits for one", func() bool {
		h.Pool.mu.Lock()
		defer h.Pool.mu.Unlock()
		busy := len(h.queue)
		for _, s := range h.slots {
			if s.process != nil {
				busy += s.process.inFlight
			}
		}
		return busy == 0
	})
	h.close()
	if h.t.Failed() {
		h.t.Logf("the log:\n%s\nthe record:\n%s", h.log.String(), h.tail())
	}
}

// close checks that Close returns and that all processes have ended by then.
func (h *harness) close() {
	h.t.Helper()
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		h.Close()
	}()
	select {
	case <-closed:
	case <-time.After(bound):
		h.t.Fatal("Close does not come back")
	}
	for _, line := range h.record("") {
		if pid, err := strconv.Atoi(line[2]); err != nil || alive(pid) {
			h.t.Errorf("process %s is left: %v", line[2], err)
		}
	}
}

func alive(pid int) bool { return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }

func (h *harness) within(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	h.t.Cleanup(cancel)
	return ctx
}

func (h *harness) eventually(what string, holds func() bool) {
	h.t.Helper()
	for deadline := time.Now().Add(bound); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("it did not come to be: %s\n%s", what, h.tail())
		}
	}
}

// inject injects a fault, see device.fault. The rename makes the file appear atomically.
func (h *harness) inject(name, kind string) {
	h.t.Helper()
	whole := filepath.Join(h.dir, "inject.tmp")
	if err := os.WriteFile(whole, []byte(kind), 0o600); err != nil {
		h.t.Fatal(err)
	}
	if err := os.Rename(whole, filepath.Join(h.dir, name)); err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) clear(name string) {
	h.t.Helper()
	if err := os.Remove(filepath.Join(h.dir, name)); err != nil {
		h.t.Fatal(err)
	}
}

// record returns the record's lines with an event of this prefix: event, number, pid, time.
func (h *harness) record(event string) (lines [][]string) {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.dir, "record"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		h.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 4 && strings.HasPrefix(f[0], event) {
			lines = append(lines, f)
		}
	}
	return lines
}

// tail is the end of the record, for the log of a failed test.
func (h *harness) tail() string {
	var b strings.Builder
	lines := h.record("")
	for _, line := range lines[max(0, len(lines)-30):] {
		fmt.Fprintln(&b, line)
	}
	return b.String()
}

func (h *harness) count(event string) int { return len(h.record(event)) }

func (h *harness) pids() (pids []int) {
	for _, w := range h.Status().Workers {
		pids = append(pids, w.PID)
	}
	return pids
}

func (h *harness) restarts() (n int) {
	for _, w := range h.Status().Workers {
		n += w.Restarts
	}
	return n
}

// faulty returns the process that had the nth and last fault of an operation.
func (h *harness) faulty(op string, n int) (pid int) {
	h.t.Helper()
	hits := h.record("hit-" + op)
	if len(hits) != n {
		h.t.Fatalf("there was trouble %d times, want %d", len(hits), n)
	}
	pid, err := strconv.Atoi(hits[n-1][2])
	if err != nil {
		h.t.Fatal(err)
	}
	return pid
}

// sign makes a signature and verifies the signature as its judge.
func (h *harness) sign(ctx context.Context) error {
	_, err := h.Bind(payments).Sign(ctx, message, func(signature []byte) bool {
		return payments.Verify(message, signature)
	})
	return err
}

func (h *harness) mustSign() {
	h.t.Helper()
	if err := h.sign(h.within(bound)); err != nil {
		h.t.Errorf("sign: %v", err)
	}
}

// replaced waits until the worker with the nth fault has ended and the slot has a new worker.
func (h *harness) replaced(op string, n int) {
	h.t.Helper()
	pid := h.faulty(op, n)
	h.eventually("it is gone and replaced", func() bool {
		now := h.pids()
		return !alive(pid) && !slices.Contains(now, 0) && !slices.Contains(now, pid)
	})
}

// --- faulty workers

// TestSickWorkerIsReplaced injects every fault of a device or a process. Each fault costs the
// worker and not the call.
func TestSickWorkerIsReplaced(t *testing.T) {
	h := openPool(t, func(c *Config) { c.Deadline = time.Second })
	for n, kind := range []string{
		"crash", "exit", "stop", "hang", "wrong", "crash, child",
		keystore.ErrUnavailable.Error(), keystore.ErrNotFound.Error(), keystore.ErrUnfit.Error(),
		keystore.ErrAmbiguous.Error(), keystore.ErrRefused.Error(),
	} {
		h.faultOnce("sign", kind, n+1)
	}
	h.killChild()
}

// faultOnce has one call meet a fault, and checks the call's success and the worker's replacement.
func (h *harness) faultOnce(name, kind string, n int) {
	h.t.Helper()
	for range healthyCalls { // a healthy worker is replaced without a backoff
		h.mustSign()
	}
	h.inject(name, kind)
	h.mustSign()
	h.replaced("sign", n)
	if h.t.Failed() {
		h.t.Fatal(kind)
	}
}

// killChild kills the child process of a worker that has ended.
func (h *harness) killChild() {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.dir, "child"))
	if err != nil {
		h.t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		h.t.Fatal(err)
	}
	syscall.Kill(pid, syscall.SIGKILL)
}

// TestRubbishOnTheSocket has workers violate the protocol. The worker is replaced at once, without
// waiting for the deadline, and another worker gets the call. A second answer to a call costs the
// worker too, but the first answer counts.
func TestRubbishOnTheSocket(t *testing.T) {
	h := newHarness(t)
	var err error
	h.Pool, err = Open(h.within(bound), h.config(func(c *Config) {
		c.Start, c.Deadline = h.start(rawEnv), time.Minute
	}), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.end)
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
	for n, kind := range slices.Sorted(maps.Keys(violations)) {
		h.faultOnce("violate", kind, n+1)
	}
}

// rawEnv is the variable of raw workers.
const rawEnv = workerEnv + "_RAW=1"

// TestAnswerAboutAnotherKey has a worker describe another key than requested. The worker is
// replaced.
func TestAnswerAboutAnotherKey(t *testing.T) {
	h := openPool(t, nil)
	h.inject("key", "wrong")
	if _, err := h.Key(h.within(bound), noise.Ref); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("a key that is not there: %v, want %v", err, keystore.ErrNotFound)
	}
	h.replaced("key", 1)
}

// TestBelievedWithoutAnother has all workers give the same error about a key. The error is
// believed, and no worker is replaced.
func TestBelievedWithoutAnother(t *testing.T) {
	h := openPool(t, nil)
	h.inject("sign.always", keystore.ErrNotFound.Error())
	if err := h.sign(h.within(bound)); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("%v, want %v", err, keystore.ErrNotFound)
	}
	if n := h.count("sign"); n != 2 || h.restarts() != 0 {
		t.Errorf("%d workers were asked, %d replaced; want 2, 0", n, h.restarts())
	}
}

// TestSingleWorker has the only worker crash after a healthy life. The call waits for the next
// worker.
func TestSingleWorker(t *testing.T) {
	h := openPool(t, func(c *Config) { c.Workers = 1 })
	for range healthyCalls {
		h.mustSign()
	}
	h.inject("sign", "crash")
	h.mustSign()
	h.replaced("sign", 1)
}

// TestBothCrash has all healthy workers crash with one call. The call waits for the next worker.
func TestBothCrash(t *testing.T) {
	h := openPool(t, func(c *Config) { c.Spread = true })
	h.eventually("both were of use", func() bool {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(h.mustSign)
		}
		wg.Wait()
		return !slices.ContainsFunc(h.Status().Workers, func(w keystore.Worker) bool { return w.Served < healthyCalls })
	})
	h.inject("sign.0", "crash")
	h.inject("sign.1", "crash")
	h.mustSign()
}

// TestLateRefusal has a device report ErrUnavailable after the caller has left. The worker is still
// replaced.
func TestLateRefusal(t *testing.T) {
	h := openPool(t, nil)
	h.inject("sign", "wait, unavailable")
	ctx, leave := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- h.sign(ctx) }()
	h.eventually("the device has the call", func() bool { return h.count("hit-sign") == 1 })
	leave()
	if err := <-ended; !errors.Is(err, context.Canceled) || !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("a caller that leaves: %v", err)
	}
	if h.restarts() != 0 {
		t.Error("a caller that leaves costs a worker")
	}
	h.inject("go", "")
	h.replaced("sign", 1)
}

// TestStartLooks checks the health check of a start. A worker with a wrong answer does not come
// into use. A worker whose device has another key under the name does.
func TestStartLooks(t *testing.T) {
	h := openPool(t, nil)
	h.Bind(noise)
	h.inject("exchange.0.always", "wrong")
	old := h.pids()
	syscall.Kill(old[0], syscall.SIGKILL)
	h.eventually("it was tried again and again", func() bool { return h.count("hit-exchange") >= 3 })
	if now := h.pids(); now[0] != 0 || now[1] != old[1] {
		t.Errorf("the workers are %v, were %v", now, old)
	}
	h.mustSign()
	h.inject("exchange.0.always", keystore.ErrUnfit.Error())
	h.eventually("it is there", func() bool { return h.pids()[0] != 0 })
}

// TestTooLong sends a message and an answer above maxFrame. Both give an error, and no worker is
// replaced.
func TestTooLong(t *testing.T) {
	h := openPool(t, nil)
	_, err := h.Bind(payments).Sign(h.within(bound), make([]byte, maxFrame), nil)
	if !errors.Is(err, keystore.ErrRefused) {
		t.Errorf("a message: %v, want %v", err, keystore.ErrRefused)
	}
	h.inject("keys", "wrong")
	ctx := h.within(bound)
	if _, err := h.Keys(ctx); err == nil || ctx.Err() != nil {
		t.Errorf("an answer: %v", err)
	}
	long := make([]byte, maxMessage-100)
	judge := func(signature []byte) bool { return payments.Verify(long, signature) }
	if _, err := h.Bind(payments).Sign(h.within(bound), long, judge); err != nil {
		t.Errorf("a long message: %v", err)
	}
	if h.restarts() != 0 {
		t.Errorf("%d workers were lost", h.restarts())
	}
}

// TestShouting has a module write lines of 1 MiB to stderr. The module is not blocked, and the log
// stays small.
func TestShouting(t *testing.T) {
	h := openPool(t, nil)
	for range 3 {
		h.inject("sign", "shout")
		h.mustSign()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.restarts() != 0 || h.log.Len() > 100<<10 {
		t.Errorf("%d workers were lost, the log has %d bytes", h.restarts(), h.log.Len())
	}
}

// --- contexts and queues

// TestCallsEndWithTheirContext has calls end at their context's end, before their deadline, while
// the worker hangs.
func TestCallsEndWithTheirContext(t *testing.T) {
	for _, kind := range []string{"hang", "stop"} {
		t.Run(kind, func(t *testing.T) {
			h := openPool(t, func(c *Config) { c.Deadline = 10 * time.Minute; c.Workers = 1 })
			h.inject("sign.always", kind)
			pid := h.pids()[0]
			ctx, leave := context.WithCancel(t.Context())
			long := make([]byte, 64<<10) // 40 such messages exceed the socket's buffer
			ended := make(chan error, 40)
			for range cap(ended) { // 16 are in flight, 24 in the queue
				go func() {
					_, err := h.Bind(payments).Sign(ctx, long, nil)
					ended <- err
				}()
			}
			h.eventually("it has a call, and others wait", func() bool {
				h.Pool.mu.Lock()
				defer h.Pool.mu.Unlock()
				return len(h.queue) == cap(ended)-h.Pool.config.InFlight
			})
			h.eventually("the device has one", func() bool { return h.count("hit-sign") > 0 })
			leave()
			for range cap(ended) {
				select {
				case err := <-ended:
					if !errors.Is(err, keystore.ErrUnavailable) || !errors.Is(err, context.Canceled) {
						t.Errorf("%v", err)
					}
				case <-time.After(bound):
					t.Fatal("a call outlives its context")
				}
			}
			h.clear("sign.always")
			syscall.Kill(pid, syscall.SIGKILL) // or Close would wait for the shutdown of a hanging process
		})
	}
}

// TestEndedContext has operations with an ended context. No worker gets such a call.
func TestEndedContext(t *testing.T) {
	h := openPool(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ref, tag := keystore.Ref{Name: "new", Version: 1}, keystore.Tag{9}
	if _, err := h.Generate(ctx, ref, keystore.Ed25519, tag); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("generate: %v", err)
	}
	if _, err := h.Import(ctx, ref, filepath.Join(h.dir, "seed"), tag); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("import: %v", err)
	}
	if err := h.sign(ctx); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("sign: %v", err)
	}
	h.mustSign() // any call sent before is on record now
	if n := h.count("generate") + h.count("import") + h.count("sign"); n != 1 {
		t.Errorf("%d operations were begun, want 1", n)
	}
}

// TestInFlight has ten calls for a worker with at most three in flight. Seven wait in the queue and
// are sent later.
func TestInFlight(t *testing.T) {
	h := openPool(t, func(c *Config) { c.InFlight = 3; c.Workers = 1 })
	h.inject("sign.always", "wait")
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(h.mustSign)
	}
	h.eventually("seven wait", func() bool {
		h.Pool.mu.Lock()
		defer h.Pool.mu.Unlock()
		return len(h.queue) == 7
	})
	h.eventually("three are with the device", func() bool { return h.count("hit-sign") == 3 })
	h.inject("go", "")
	wg.Wait()
	for _, line := range h.record("sign-") {
		if n, err := strconv.Atoi(strings.TrimPrefix(line[0], "sign-")); err != nil || n > 3 {
			t.Errorf("the device had %d calls at once: %v", n, err)
		}
	}
}

// --- making and destroying keys

// TestMakingIsNotRepeated has workers die during a generation and an import. The call fails without
// a retry, and the process has ended when the call returns. A destruction is retried with another
// worker, and every worker destroys the key.
func TestMakingIsNotRepeated(t *testing.T) {
	h := openPool(t, func(c *Config) { c.Deadline = 400 * time.Millisecond })
	ref, tag := keystore.Ref{Name: "new", Version: 1}, keystore.Tag{9}
	made := func(op string) error {
		if op == "generate" {
			_, err := h.Generate(h.within(bound), ref, keystore.Ed25519, tag)
			return err
		}
		_, err := h.Import(h.within(bound), ref, filepath.Join(h.dir, "seed"), tag)
		return err
	}
	for i, op := range []string{"generate", "import", "generate", "import"} {
		h.inject(op, []string{"crash", "crash", "hang", "hang"}[i])
		if err := made(op); !errors.Is(err, keystore.ErrUnavailable) {
			t.Errorf("%s: %v, want %v", op, err, keystore.ErrUnavailable)
		}
		if n := h.count(op); n != 1+i/2 {
			t.Fatalf("%s was done %d times, want %d", op, n, 1+i/2)
		}
		if pid := h.faulty(op, 1+i/2); alive(pid) {
			t.Errorf("%s: process %d may still make the key", op, pid)
		}
	}
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
	for _, op := range []string{"generate", "import"} { // without a fault both succeed
		ref.Name = op
		if err := made(op); err != nil {
			t.Errorf("%s: %v", op, err)
		}
	}
	h.inject("destroy", "crash")
	if err := h.Destroy(h.within(bound), ref, tag); err != nil {
		t.Errorf("destroy: %v", err)
	}
	survivor := h.record("destroy")[1][2]
	bySurvivor := func(line []string) bool { return line[2] == survivor }
	if h.count("destroy") < 3 || !slices.ContainsFunc(h.record("destroy")[2:], bySurvivor) {
		t.Errorf("destroyed by %v", h.record("destroy"))
	}
}

// TestImportEndsWithItsContext has an import end at its context's end while its worker hangs in the
// start.
func TestImportEndsWithItsContext(t *testing.T) {
	h := openPool(t, func(c *Config) { c.Deadline = time.Minute })
	h.inject("open", "hang")
	ctx, leave := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := h.Import(ctx, keystore.Ref{Name: "new", Version: 1}, filepath.Join(h.dir, "seed"), keystore.Tag{9})
		ended <- err
	}()
	h.eventually("its worker hangs", func() bool { return h.count("hit-open") == 1 })
	leave()
	select {
	case err := <-ended:
		if !errors.Is(err, keystore.ErrUnavailable) {
			t.Error(err)
		}
	case <-time.After(bound):
		t.Fatal("the import outlives its context")
	}
	syscall.Kill(h.faulty("open", 1), syscall.SIGKILL) // or the shutdown would wait for the process
}

// --- outages

// TestOutage has all workers die again and again. The backoff between starts grows, calls fail at
// once, and each outage is reported once, and so is its end.
func TestOutage(t *testing.T) {
	h := openPool(t, nil)
	for outage := range 2 {
		opened := h.count("open")
		h.inject("open.always", "exit")
		for _, pid := range h.pids() {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		h.eventually("it is told", func() bool { return len(h.changes()) == 2*outage+1 })
		ctx := h.within(2 * bound)
		if err := h.sign(ctx); !errors.Is(err, keystore.ErrUnavailable) || ctx.Err() != nil {
			t.Errorf("sign: %v, want %v", err, keystore.ErrUnavailable)
		}
		if st := h.Status(); st.Up || st.Cause == "" {
			t.Errorf("the status is %+v", st)
		}
		if outage == 0 {
			h.paused(opened)
		}
		h.clear("open.always")
		h.Retry() // ends the backoff of up to 3 s
		h.eventually("it signs", func() bool { return h.sign(h.within(bound)) == nil })
		h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
		h.eventually("that is told", func() bool { return len(h.changes()) == 2*outage+2 })
	}
	if got := h.changes(); !slices.Equal(got, []bool{false, true, false, true}) {
		t.Errorf("it was told: %v", got)
	}
}

// paused checks the backoff between the first five starts of worker 0.
func (h *harness) paused(from int) {
	h.t.Helper()
	var starts []int64
	h.eventually("one worker was started five times", func() bool {
		starts = nil
		for _, line := range h.record("open")[from:] {
			if line[1] == "0" {
				at, err := strconv.ParseInt(line[3], 10, 64)
				if err != nil {
					h.t.Fatal(err)
				}
				starts = append(starts, at)
			}
		}
		return len(starts) >= 5
	})
	shortest := minBackoff / 2 * (1 + 2 + 4 + 8) // the first start comes without a backoff
	if took := time.Duration(starts[4] - starts[0]); took < shortest {
		h.t.Errorf("five starts took %v, want at least %v", took, shortest)
	}
}

// TestPatientOpen opens a pool without its device. A patient pool reports an outage, and recovers
// when the device is back.
func TestPatientOpen(t *testing.T) {
	h := newHarness(t)
	h.inject("open.always", "exit")
	if _, err := Open(h.within(bound), h.config(nil), false); !errors.Is(err, keystore.ErrUnavailable) {
		t.Fatalf("not patient: %v, want %v", err, keystore.ErrUnavailable)
	}
	var err error
	if h.Pool, err = Open(h.within(bound), h.config(nil), true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.end)
	h.eventually("it is told", func() bool { return len(h.changes()) == 1 })
	h.clear("open.always")
	h.eventually("it signs", func() bool { return h.sign(h.within(bound)) == nil })
	h.eventually("that is told", func() bool { return slices.Equal(h.changes(), []bool{false, true}) })
}

// TestSlowListener has an OnChange that hangs. The pool is not blocked, and the queue of changes is
// bounded and alternates between down and up.
func TestSlowListener(t *testing.T) {
	p := &Pool{changed: make(chan struct{}, 1), closed: make(chan struct{}), opened: true, slots: []*slot{{}}}
	for range 10 * maxChanges {
		p.slots[0].starting = false
		p.slotsChanged()
		p.reportRecovery() // for a call answered before the outage
		if !p.outageReported.Load() {
			t.Fatal("a recovery is reported during an outage")
		}
		p.slots[0].starting = true
		p.slotsChanged()
		p.reportRecovery()
	}
	if len(p.changes) > maxChanges+1 {
		t.Errorf("%d changes are queued", len(p.changes))
	}
	for i, n := range p.changes {
		if n.up != (i%2 == 1) {
			t.Fatalf("change %d has up = %v", i, n.up)
		}
	}
}

// --- logins

// TestRefusedPINAtStart starts three workers with a wrong PIN. Only one tries the PIN.
func TestRefusedPINAtStart(t *testing.T) {
	h := newHarness(t)
	h.inject("login.always", keystore.ErrAuth.Error())
	_, err := Open(h.within(bound), h.config(func(c *Config) { c.Workers = 3 }), true)
	if !errors.Is(err, keystore.ErrAuth) {
		t.Errorf("%v, want %v", err, keystore.ErrAuth)
	}
	if n := h.count("login"); n != 1 {
		t.Errorf("the PIN was tried %d times", n)
	}
}

// TestRefusedPIN has the token refuse a PIN. No worker logs in afterwards, neither a worker
// waiting for permission nor a new one, until Retry. The same holds if the refused worker exits.
func TestRefusedPIN(t *testing.T) {
	for _, after := range []string{"nothing", "exit"} {
		t.Run("then "+after, func(t *testing.T) {
			h := openPool(t, nil)
			h.inject("login.always", "wait, refused")
			h.inject("denied.always", after)
			for _, pid := range h.pids() {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			h.eventually("one logs in, the other one waits", func() bool {
				return h.count("open") == 4 && h.count("login") == 3
			})
			h.inject("go", "")
			for round := range 3 { // each round has one more login
				h.eventually("both have stopped", func() bool { return h.restarts() == 4+2*round })
				if err := h.sign(h.within(bound)); !errors.Is(err, keystore.ErrAuth) {
					t.Errorf("sign: %v, want %v", err, keystore.ErrAuth)
				}
				if n := h.count("login"); n != 3+round {
					t.Fatalf("there were %d logins, want %d", n, 3+round)
				}
				if round == 2 {
					h.clear("login.always")
				}
				h.Retry()
			}
			h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
			h.mustSign()
			if n := h.count("login"); n != 7 {
				t.Errorf("there were %d logins, want 7", n)
			}
		})
	}
}

// TestRefusedPINAfterHealth changes the PIN beside two healthy workers, which end one after the
// other. No third worker is expected then: the pool says that it is down, calls fail at once, and
// the faults are gone after Retry.
func TestRefusedPINAfterHealth(t *testing.T) {
	h := openPool(t, nil)
	h.inject("login.always", keystore.ErrAuth.Error())
	first, second := h.pids()[0], h.pids()[1]
	syscall.Kill(first, syscall.SIGKILL)
	h.eventually("the standby serves alone", func() bool {
		return h.hasFaults(keystore.FaultPINRefused, keystore.FaultRedundancy)
	})
	if !h.Status().Up {
		t.Error("the token is down with a worker")
	}
	h.mustSign()
	syscall.Kill(second, syscall.SIGKILL)
	h.eventually("the token is down", func() bool { return !h.Status().Up && len(h.changes()) == 1 })
	if !h.hasFaults(keystore.FaultPINRefused) {
		t.Errorf("the faults are %v", h.Status().Faults)
	}
	ctx := h.within(bound)
	if err := h.sign(ctx); !errors.Is(err, keystore.ErrAuth) || ctx.Err() != nil {
		t.Errorf("sign: %v, want %v", err, keystore.ErrAuth)
	}
	h.clear("login.always")
	h.Retry()
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
	h.mustSign()
	h.eventually("nothing is left of it", func() bool { return h.hasFaults() && len(h.changes()) == 2 })
}

// hasFaults reports whether the status has faults of exactly these kinds.
func (h *harness) hasFaults(want ...keystore.FaultKind) bool {
	var got []keystore.FaultKind
	for _, f := range h.Status().Faults {
		got = append(got, f.Kind)
	}
	return slices.Equal(got, want)
}

// TestRefusalIsRemembered opens a pool again and again with a refused PIN, as a service manager
// does. The PIN reaches the token once for each PIN file, and once for each word of an operator.
func TestRefusalIsRemembered(t *testing.T) {
	h := newHarness(t)
	h.inject("login.always", keystore.ErrAuth.Error())
	pin := filepath.Join(h.dir, "pin")
	write := func() {
		t.Helper()
		if err := errors.Join(os.WriteFile(pin+".new", []byte("x"), 0o600), os.Rename(pin+".new", pin)); err != nil {
			t.Fatal(err)
		}
	}
	write()
	memo := filepath.Join(h.dir, "memo")
	device := "pkcs11:token=test"
	open := func(what string, logins int, change func(c *Config)) {
		t.Helper()
		before := h.count("login")
		_, err := Open(h.within(bound), h.config(func(c *Config) {
			c.PINFile, c.Memo = pin, memo
			if change != nil {
				change(c)
			}
			c.IdentifyPIN = func() string { return IdentifyPIN(c.Name, device, pin) }
		}), true)
		if !errors.Is(err, keystore.ErrAuth) {
			t.Errorf("%s: %v, want %v", what, err, keystore.ErrAuth)
		}
		if n := h.count("login") - before; n != logins {
			t.Errorf("%s: the PIN was tried %d times, want %d", what, n, logins)
		}
	}
	open("first", 1, nil)
	for range 4 {
		open("again", 0, nil)
	}
	open("another token", 1, func(c *Config) { c.Name, c.Memo = "other", memo+".other" })
	open("another device", 1, func(*Config) { device = "pkcs11:token=other" })
	device = "pkcs11:token=test"
	open("the first device once more", 1, nil) // one refusal is remembered for each token
	write()
	open("another PIN file", 1, nil)
	open("the same file", 0, nil)
	open("by an operator", 1, func(c *Config) { c.Retry = true })
	open("afterwards", 0, nil)
	if n := h.count("last-try"); n != 1 {
		t.Errorf("%d logins were permitted on the last try, want the operator's", n)
	}
	if b, err := os.ReadFile(memo); err != nil || json.Unmarshal(b, new(memoOf)) != nil {
		t.Errorf("the file is %q, %v", b, err)
	}
	if err := os.WriteFile(memo, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	open("a damaged file", 0, nil)
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(memo), ".new-*")); err != nil || len(left) > 0 {
		t.Errorf("files are left: %v, %v", left, err)
	}
	nowhere := func(c *Config) { c.Memo = filepath.Join(h.dir, "none", "memo") }
	_, err := Open(h.within(bound), h.config(func(c *Config) {
		c.PINFile, c.IdentifyPIN = pin, func() string { return IdentifyPIN(c.Name, device, pin) }
		nowhere(c)
	}), true)
	if !errors.Is(err, keystore.ErrAuth) || !strings.Contains(err.Error(), "can't be written") {
		t.Errorf("a folder that takes no file: %v", err)
	}
}

type memoOf = struct{ Digest, At, Error string }

// TestCorrectedPINFile corrects the PIN file of a running pool, which then logs in without a word
// of an operator, but not on the last try.
func TestCorrectedPINFile(t *testing.T) {
	var pin string
	h := openPool(t, func(c *Config) {
		dir := t.TempDir()
		pin = filepath.Join(dir, "pin")
		c.PINFile, c.Memo, c.Deadline = pin, filepath.Join(dir, "memo"), time.Second
		c.IdentifyPIN = func() string { return IdentifyPIN(c.Name, "", pin) }
	})
	h.inject("login.always", keystore.ErrAuth.Error())
	for _, pid := range h.pids() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	h.eventually("the token is down", func() bool { return !h.Status().Up })
	h.clear("login.always")
	if err := os.WriteFile(pin, []byte("right"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) && h.hasFaults() })
	h.mustSign()
	if n := h.count("last-try"); n != 0 {
		t.Errorf("%d logins were permitted on the last try", n)
	}
}

// TestLastTry has a token with one try left. No PIN is refused, so the pool looks again by itself,
// and serves once the token has its tries back. An operator's Retry permits one login.
func TestLastTry(t *testing.T) {
	h := openPool(t, nil)
	h.inject("login.always", keystore.ErrLastTry.Error())
	for _, pid := range h.pids() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	h.eventually("the token is down", func() bool { return !h.Status().Up && h.hasFaults(keystore.FaultLocked) })
	h.Retry()
	h.eventually("an operator's login is permitted", func() bool { return h.count("last-try") == 1 })
	h.clear("login.always")
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) && h.hasFaults() })
	h.mustSign()
}

// TestFaults brings a token into each state that its status tells, and out of it again: none needs
// a restart or a request to be over.
func TestFaults(t *testing.T) {
	h := openPool(t, func(c *Config) { c.Deadline = time.Second })
	h.inject("open.1.always", "exit")
	syscall.Kill(h.pids()[1], syscall.SIGKILL)
	h.eventually("the standby is missing", func() bool { return h.hasFaults(keystore.FaultRedundancy) })
	h.clear("open.1.always")
	h.eventually("the standby is back", func() bool { return h.hasFaults() })

	for _, name := range []string{"sign.always", "key.always"} {
		h.inject(name, keystore.ErrNotFound.Error())
	}
	before := h.pids()
	for range 3 {
		if err := h.sign(h.within(bound)); !errors.Is(err, keystore.ErrNotFound) {
			t.Errorf("sign: %v, want %v", err, keystore.ErrNotFound)
		}
	}
	h.eventually("the key is missing", func() bool { return h.hasFaults(keystore.FaultKeyMissing) })
	if st := h.Status(); !st.Up || st.Faults[0].Key != payments.Ref || !slices.Equal(h.pids(), before) {
		t.Errorf("with a lost key: %+v", st)
	}
	for _, name := range []string{"sign.always", "key.always"} {
		h.clear(name)
	}
	h.eventually("the key is back", func() bool { return h.hasFaults() })
	h.eventually("one change each", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return slices.Equal(h.keys, []string{"payments/1 false", "payments/1 true"})
	})

	for _, name := range []string{"sign.always", "key.always", "keys.always"} {
		h.inject(name, keystore.ErrNotFound.Error())
	}
	h.sign(h.within(bound))
	h.eventually("the token is empty", func() bool {
		return h.hasFaults(keystore.FaultKeyMissing, keystore.FaultReplaced)
	})
	for _, name := range []string{"sign.always", "key.always", "keys.always"} {
		h.clear(name)
	}
	h.eventually("the right token is back", func() bool { return h.hasFaults() })

	for range manyEnds {
		h.faultOnce("sign", "crash", h.count("hit-sign")+1)
	}
	h.eventually("workers end again and again", func() bool { return h.hasFaults(keystore.FaultRestarts) })
	h.Pool.mu.Lock()
	for i := range h.ends { // as if that had been long ago
		h.ends[i] = h.ends[i].Add(-endsTime)
	}
	h.Pool.mu.Unlock()
	if !h.hasFaults() {
		t.Errorf("the faults are %v", h.Status().Faults)
	}
}

// TestOldRefusal has a worker from before Retry report a refused PIN. The report is out of date and
// does not forbid logins.
func TestOldRefusal(t *testing.T) {
	h := openPool(t, nil)
	h.Retry()
	h.inject("sign", keystore.ErrAuth.Error())
	h.mustSign()
	h.replaced("sign", 1)
	h.inject("sign.0", keystore.ErrAuth.Error()) // worker 0 was started after Retry
	h.eventually("it is refused", func() bool { h.sign(h.within(bound)); return h.count("hit-sign") == 2 })
	h.eventually("nothing logs in", func() bool {
		h.Pool.mu.Lock()
		defer h.Pool.mu.Unlock()
		return h.authErr != nil && h.slots[0].process == nil
	})
	h.Retry()
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
}

// TestLastWords has a worker exit right after its frames. The frames count, although the pool may
// see the exit first.
func TestLastWords(t *testing.T) {
	h := newHarness(t)
	h.inject("open", "exit")
	slow := &slowGate{loginResult: make(chan bool, 1)}
	start := func(socket, stderr *os.File) (Process, error) { return h.start(rawEnv)(0, "", socket, stderr) }
	p, err := startProcess(start, "test", slog.New(slog.DiscardHandler), slow, func(uint64) {})
	if err != nil {
		t.Fatal(err)
	}
	defer p.shutdown(closeTimeout)
	if _, err := p.roundTrip(h.within(bound), bound, func(error) {}, hello); err != nil {
		t.Errorf("its answer is lost: %v", err)
	}
	if refused := <-slow.loginResult; !refused {
		t.Error("that it was refused is lost")
	}
}

// slowGate is a loginGate whose loginDone takes until the worker's exit could have been noticed.
type slowGate struct{ loginResult chan bool }

func (g *slowGate) requestLogin(p *process, id uint64) {
	p.beginLogin()
	p.pipe.send(id, loginReply, []byte{1})
}

func (g *slowGate) loginDone(p *process, refused error) {
	for alive(p.child.PID()) {
		runtime.Gosched()
	}
	select {
	case <-p.dead:
	case <-time.After(exitTimeout / 4):
	}
	p.endLogin()
	g.loginResult <- errors.Is(refused, keystore.ErrAuth)
}

// TestDeathInLogin has a worker die during its login. The other workers still log in.
func TestDeathInLogin(t *testing.T) {
	h := newHarness(t)
	h.inject("login", "crash")
	var err error
	if h.Pool, err = Open(h.within(bound), h.config(func(c *Config) { c.Workers = 3 }), true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.end)
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
	if n := h.count("login"); n != 4 {
		t.Errorf("there were %d logins, want 4", n)
	}
}

// TestOneLoginAtATime has three workers request a login. Two wait until the first login has ended.
func TestOneLoginAtATime(t *testing.T) {
	h := newHarness(t)
	h.inject("login", "wait")
	opened := make(chan error, 1)
	go func() {
		var err error
		h.Pool, err = Open(h.within(bound), h.config(func(c *Config) { c.Workers = 3 }), false)
		opened <- err
	}()
	h.eventually("all want to log in", func() bool { return h.count("open") == 3 })
	h.eventually("one does", func() bool { return h.count("login") == 1 })
	h.inject("go", "")
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.end)
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
	hit := h.record("hit-login")[0]
	if first := h.record("login")[0]; first[2] != hit[2] {
		t.Errorf("%v logged in while %v did", first, hit)
	}
}

// --- Close

// TestClose closes a pool with calls in flight and in the queue. All of them fail, and so do later
// calls.
func TestClose(t *testing.T) {
	var starts atomic.Int64
	h := openPool(t, func(c *Config) {
		c.Workers, c.InFlight, c.Deadline = 1, 2, time.Minute
		start := c.Start
		c.Start = func(number int, seedFile string, socket, stderr *os.File) (Process, error) {
			starts.Add(1)
			return start(number, seedFile, socket, stderr)
		}
	})
	h.inject("sign.always", "hang")
	ended := make(chan error, 6)
	for range cap(ended) {
		go func() { ended <- h.sign(context.Background()) }()
	}
	h.eventually("two are with the device", func() bool { return h.count("hit-sign") == 2 })
	h.close()
	for range cap(ended) {
		select {
		case err := <-ended:
			if !errors.Is(err, keystore.ErrUnavailable) {
				t.Error(err)
			}
		case <-time.After(bound):
			t.Fatal("a call outlives its pool")
		}
	}
	if err := h.sign(h.within(bound)); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("afterwards: %v", err)
	}
	_, err := h.Import(h.within(bound), noise.Ref, filepath.Join(h.dir, "seed"), noise.Tag)
	if !errors.Is(err, keystore.ErrUnavailable) || starts.Load() != 1 {
		t.Errorf("an import afterwards: %v, with %d processes", err, starts.Load())
	}
}

// TestCloseLeavesTimeForALogin closes a pool during a login. The worker is not killed before
// closeTimeout.
func TestCloseLeavesTimeForALogin(t *testing.T) {
	h := newHarness(t)
	h.inject("login", "wait")
	ctx, cancel := context.WithCancel(t.Context())
	opened := make(chan error, 1)
	go func() {
		_, err := Open(ctx, h.config(func(c *Config) { c.Workers = 1 }), false)
		opened <- err
	}()
	h.eventually("it logs in", func() bool { return h.count("hit-login") == 1 })
	pid := h.faulty("login", 1)
	began := time.Now()
	cancel()
	if err := <-opened; !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("%v, want %v", err, keystore.ErrUnavailable)
	}
	if took := time.Since(began); took < closeTimeout || alive(pid) {
		t.Errorf("it was cut off after %v, and lives: %v", took, alive(pid))
	}
}

// --- memory

const memoryLimit = 64 << 20 // bytes; above the memory of a new worker under the race detector

// TestRenewal has a worker grow above the memory limit. The worker is renewed, and no call fails.
func TestRenewal(t *testing.T) {
	for _, workers := range []int{1, 2} {
		t.Run(fmt.Sprint(workers), func(t *testing.T) {
			h := openPool(t, func(c *Config) {
				c.Memory, c.Deadline, c.Workers = memoryLimit, 4*time.Second, workers
			})
			old := h.pids()[0]
			h.inject("sign", "grow")
			var wg sync.WaitGroup
			var renewed atomic.Bool
			for range 4 {
				wg.Go(func() {
					for !renewed.Load() {
						h.mustSign()
					}
				})
			}
			h.eventually("it is renewed", func() bool {
				pid := h.pids()[0]
				return pid != 0 && pid != old && !alive(old)
			})
			renewed.Store(true)
			wg.Wait()
			h.mu.Lock()
			defer h.mu.Unlock()
			if log := h.log.String(); strings.Contains(log, "given up") || !strings.Contains(log, "renewed") {
				t.Errorf("the log:\n%s", log)
			}
		})
	}
}

// TestRenewalWaits has a worker grow during a destruction. The renewal waits for the end of the
// destruction, or the destruction would never return.
func TestRenewalWaits(t *testing.T) {
	h := openPool(t, func(c *Config) { c.Memory = memoryLimit; c.Deadline = 4 * time.Second })
	h.inject("destroy.1", "grow, wait")
	ended := make(chan error, 1)
	go func() { ended <- h.Destroy(context.Background(), payments.Ref, keystore.Tag{9}) }()
	h.eventually("it is to be renewed", func() bool {
		h.Pool.mu.Lock()
		defer h.Pool.mu.Unlock()
		return h.slots[1].process != nil && h.slots[1].process.retiring || h.slots[1].restarts > 0
	})
	h.inject("go", "")
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(bound):
		t.Fatal("the destruction does not end")
	}
	h.replaced("destroy", 1)
}

// --- all at once

// TestManyFaults has callers sign while workers have one fault after another. Each call succeeds or
// gives ErrUnavailable.
func TestManyFaults(t *testing.T) {
	h := openPool(t, func(c *Config) { c.Spread = true; c.InFlight = 2; c.Deadline = time.Second })
	var wg sync.WaitGroup
	var over atomic.Bool
	var signed atomic.Int64
	for range 6 {
		wg.Go(func() {
			for !over.Load() {
				if err := h.sign(h.within(bound)); err == nil {
					signed.Add(1)
				} else if !errors.Is(err, keystore.ErrUnavailable) {
					t.Error(err)
				}
			}
		})
	}
	kinds := []string{"crash", "wrong", keystore.ErrUnavailable.Error(), "exit", "stop"}
	for i, kind := range kinds {
		h.inject("sign", kind)
		h.eventually(kind, func() bool { return h.count("hit-sign") == i+1 })
		since := signed.Load()
		h.eventually("it signs", func() bool { return signed.Load() > since+10 })
	}
	over.Store(true)
	wg.Wait()
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
}

// TestCountsOutliveWorkers: the calls and errors of a worker's place go on when its process is
// replaced, so that a rate of them is right.
func TestCountsOutliveWorkers(t *testing.T) {
	h := openPool(t, func(c *Config) { c.Deadline = time.Second })
	counts := func() (calls, errs uint64) {
		for _, w := range h.Status().Workers {
			calls, errs = calls+w.Calls, errs+w.Errors
		}
		return calls, errs
	}
	const faults = 3
	for n := range faults {
		h.faultOnce("sign", "crash", n+1)
	}
	if calls, errs := counts(); calls < faults*(healthyCalls+1) || errs < faults {
		t.Errorf("%d calls, %d errors", calls, errs)
	}
	for _, w := range h.Status().Workers {
		if w.Calls > 0 && w.Served > 0 && w.Succeeded.IsZero() {
			t.Errorf("a worker has served, and has no time of it: %+v", w)
		}
	}
}

// TestDestroyedDuringAStart destroys a key while a worker starts. The worker's health check may
// have used the key, so another worker starts in its place, at once.
func TestDestroyedDuringAStart(t *testing.T) {
	var h *harness
	var starts atomic.Int32 // of the second slot
	begin := make(chan struct{})
	h = openPool(t, func(c *Config) {
		start := c.Start
		c.Start = func(number int, seed string, socket, stderr *os.File) (Process, error) {
			if number == 1 && starts.Add(1) == 2 {
				<-begin
				if err := h.Destroy(context.Background(), payments.Ref, keystore.Tag{9}); err != nil {
					t.Error(err)
				}
			}
			return start(number, seed, socket, stderr)
		}
	})
	close(begin)
	syscall.Kill(h.pids()[1], syscall.SIGKILL)
	h.eventually("a third start", func() bool { return starts.Load() == 3 })
	h.eventually("all workers are there", func() bool { return !slices.Contains(h.pids(), 0) })
	if n := starts.Load(); n != 3 {
		t.Errorf("%d starts", n)
	}
}
