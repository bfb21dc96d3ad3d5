package worker

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"countersign/internal/keystore"
)

// process is one key worker. It lives until something about it is wrong; then it is killed.
type process struct {
	name    string
	cmd     *exec.Cmd
	pipe    *pipe
	gate    gate
	retries int // of the pool, when it was started

	busy     int  // under the pool's mu: calls that it has and that have not been answered
	retiring bool // under the pool's mu: it gets no more of them

	mu    sync.Mutex
	calls map[uint64]*pending // under mu
	next  uint64              // under mu
	why   error               // under mu: what was wrong; set before dead is closed

	binding sync.Mutex
	bound   map[uint32]bool // under binding: the keys that it knows by number

	login  chan struct{} // under mu: closed when the login that it was given leave for has ended
	asking atomic.Bool   // it has asked for a login that has neither ended nor been denied

	dead    chan struct{} // closed when nothing more is to be expected
	drained chan struct{} // closed when all that it said has been read
	reaped  chan struct{} // closed when the process is gone
	served  atomic.Uint64 // calls that went well
	used    atomic.Int64  // when the last one did, Unix nanoseconds
}

// pending is a call that waits for its answer. done runs once, with its error, when it has an answer or never will.
type pending struct {
	answer chan answer
	late   time.Time
	done   func(error)
}

type answer struct {
	body []byte
	err  error
}

// errDied is how calls end whose worker has been given up.
var errDied = fmt.Errorf("%w: the key worker that had the call was given up", keystore.ErrUnavailable)

// endTime is how long its last words may take after a worker has ended, and its end after its last words.
const endTime = time.Second

// onOneThread runs what starts a process on a thread that stays: Pdeathsig is of the thread that has started the child, and Go ends
// threads as it likes.
func onOneThread(start func() error) error {
	done := make(chan error)
	starter() <- func() { done <- start() }
	return <-done
}

var starter = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go keepThread(work)
	return work
})

func keepThread(work <-chan func()) {
	runtime.LockOSThread()
	for f := range work {
		f()
	}
}

// start runs a command as a key worker. The worker is not ready before hello has been answered.
func start(cmd *exec.Cmd, name string, log *slog.Logger, gate gate) (*process, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "key worker"), os.NewFile(uintptr(fds[1]), "key worker")
	defer ours.Close()
	defer theirs.Close()
	p := &process{
		name: name, cmd: cmd, gate: gate, calls: map[uint64]*pending{}, bound: map[uint32]bool{},
		dead: make(chan struct{}), drained: make(chan struct{}), reaped: make(chan struct{}),
	}
	if p.pipe, err = newPipe(ours); err != nil {
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true,            // a Ctrl-C at the terminal is for the daemon
		Pdeathsig: syscall.SIGKILL, // one that outlived the daemon could finish a key after the next one has cleared it away
	}
	stderr := &lines{left: maxLines, say: func(text string) {
		log.Warn("a key worker says", "worker", name, "pid", cmd.Process.Pid, "text", text)
	}}
	cmd.Stderr, cmd.WaitDelay = stderr, endTime // a child of its own may hold its stderr open
	if err := onOneThread(cmd.Start); err != nil {
		p.pipe.conn.Close()
		return nil, fmt.Errorf("%w: start a key worker: %w", keystore.ErrUnavailable, err)
	}
	p.used.Store(time.Now().UnixNano())
	go func() {
		defer close(p.reaped)
		err := cmd.Wait()
		if err == nil {
			err = errors.New("it ended")
		}
		stderr.end()
		select {
		case <-p.drained: // what it said before its end counts: answers, and that a PIN was refused
		case <-time.After(endTime):
		}
		p.fail(err)
	}()
	go p.read()
	return p, nil
}

// fail gives the worker up, for the first reason that comes.
func (p *process) fail(why error) {
	p.mu.Lock()
	first := p.why == nil
	if first {
		p.why = why
		close(p.dead) // whose call ends below must not take it for well
	}
	calls := p.calls
	p.calls = nil
	p.mu.Unlock()
	if first {
		p.cmd.Process.Kill()
		p.pipe.conn.Close()
	}
	for _, c := range calls {
		c.answer <- answer{err: errDied}
		c.done(errDied)
	}
}

// isDead reports that the worker has been given up or retired.
func (p *process) isDead() bool {
	select {
	case <-p.dead:
		return true
	default:
		return false
	}
}

// gone waits until the process is.
func (p *process) gone(within time.Duration) {
	select {
	case <-p.reaped:
	case <-time.After(within): // the kernel can't end it: others must not wait for that
	}
}

// close lets the worker end by itself. What it still says is read: that a PIN was refused must not be missed.
func (p *process) close(within time.Duration) {
	p.pipe.conn.CloseWrite()
	p.gone(within)
	p.fail(errors.New("closed"))
	p.cmd.Process.Kill() // one that was retired, too
	p.gone(within)
}

// retire takes a worker that has no calls out of use; close is the caller's.
func (p *process) retire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.why == nil && len(p.calls) == 0 { // what looks at it, or destroys a key, has no place
		p.why, p.calls = errRenewed, nil
		close(p.dead)
	}
}

// memory returns the bytes of memory that the worker has for itself (proc(5), statm: resident less shared), or 0.
func (p *process) memory() int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	var size, resident, shared int
	if _, scanned := fmt.Sscan(string(b), &size, &resident, &shared); err != nil || scanned != nil {
		return 0
	}
	return (resident - shared) * os.Getpagesize()
}

func (p *process) read() {
	err := p.answers()
	close(p.drained)
	if !errors.Is(err, errProtocol) {
		p.gone(endTime) // the process' own end says more than the end of what it says
	}
	p.fail(err)
	p.pipe.conn.Close()
}

func (p *process) answers() error {
	for {
		id, k, body, err := p.pipe.receive()
		if err != nil {
			return fmt.Errorf("its answers ended: %w", err)
		}
		switch k {
		case askLogin:
			if !p.asking.CompareAndSwap(false, true) {
				return fmt.Errorf("%w: it asked for two logins at once", errProtocol)
			}
			go p.gate.ask(p, id)
			continue
		case loggedIn:
			if !p.loggingIn() {
				return fmt.Errorf("%w: it told of a login that it had no leave for", errProtocol)
			}
			var refused error
			if len(body) > 0 {
				refused = decodeError(body)
			}
			p.gate.done(p, refused)
			continue
		case result, failure:
		default:
			return fmt.Errorf("%w: it sent a frame of kind %d", errProtocol, k)
		}
		p.mu.Lock()
		c := p.calls[id]
		delete(p.calls, id)
		p.mu.Unlock()
		if c == nil {
			return fmt.Errorf("%w: it answered what was not asked", errProtocol)
		}
		if k == failure {
			err = decodeError(body)
			c.answer <- answer{err: err}
		} else {
			p.served.Add(1)
			p.used.Store(time.Now().UnixNano())
			c.answer <- answer{body: body}
		}
		c.done(err)
	}
}

// overdue gives the worker up when a call has had its time.
func (p *process) overdue(now time.Time) {
	p.mu.Lock()
	late := false
	for _, c := range p.calls {
		late = late || now.After(c.late)
	}
	p.mu.Unlock()
	if late {
		p.fail(errLate)
	}
}

var errLate = errors.New("a call did not come back from the device in time")

// do sends a request and waits for its answer, for the worker's end or for ctx's. When ctx ends first the call stays
// with the worker, so that a device that hangs is noticed all the same. done runs once, in any case.
func (p *process) do(ctx context.Context, within time.Duration, done func(error), k kind, body ...[]byte) ([]byte, error) {
	c := &pending{answer: make(chan answer, 1), late: time.Now().Add(within), done: done}
	p.mu.Lock()
	if p.calls == nil {
		p.mu.Unlock()
		done(errDied)
		return nil, errDied
	}
	p.next++
	id := p.next
	p.calls[id] = c
	p.mu.Unlock()
	if err := p.pipe.send(id, k, body...); err != nil {
		p.fail(err)
	}
	select {
	case a := <-c.answer:
		return a.body, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: the device has not answered: %w", keystore.ErrUnavailable, ctx.Err())
	}
}

// ask is do for a request in JSON, and waits until within.
func (p *process) ask(ctx context.Context, within time.Duration, done func(error), c call) ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		done(err)
		return nil, err
	}
	return p.do(ctx, within, done, request, b)
}

// use is do for a key.
func (p *process) use(ctx context.Context, within time.Duration, done func(error), k kind, key *key, body []byte) ([]byte, error) {
	p.binding.Lock()
	if !p.bound[key.number] { // other callers' frames come after; an error is seen with the next frame
		p.bound[key.number] = true
		p.pipe.send(uint64(key.number), bind, key.encoded)
	}
	p.binding.Unlock()
	var number [4]byte
	binary.BigEndian.PutUint32(number[:], key.number)
	return p.do(ctx, within, done, k, number[:], body)
}
