package worker

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"countersign/internal/keystore"
)

// process is one key worker as the pool sees it. After the first fault the process is killed and
// never used again.
type process struct {
	name      string
	child     Process
	pipe      *pipe
	gate      loginGate
	journaled func(size uint64) // gets the size of the journal in bytes
	retries   int               // Pool.retries at the time of the start
	destroyed uint64            // Pool.destroyed at the time of the start

	inFlight int  // under the pool's mu: reserved calls
	retiring bool // under the pool's mu: no new calls

	mu     sync.Mutex
	calls  map[uint64]*pending // under mu, by id; nil after the worker was given up or retired
	nextID uint64              // under mu
	why    error               // under mu: the fault; set before dead is closed

	bindMu sync.Mutex
	bound  map[uint32]bool // under bindMu: numbers of the keys that the worker knows

	login  chan struct{} // under mu: closed at the end of the permitted login; nil if none is permitted
	asking atomic.Bool   // the worker has requested a login, and the login has neither ended nor been denied

	dead    chan struct{} // closed when the worker is given up or retired
	drained chan struct{} // closed when all frames of the worker have been read
	reaped  chan struct{} // closed when the operating system's process has ended
	served  atomic.Uint64 // number of successful calls
	failed  atomic.Uint64 // number of failed calls
	lastUse atomic.Int64  // time of the last successful call or end of a health check, Unix nanoseconds

	succeeded atomic.Int64 // time of the last successful call or health check, Unix nanoseconds; 0: none
	resident  atomic.Int64 // private memory in bytes, as monitor has seen it
}

// pending is a call without an answer yet. done runs once, with the call's error, at the answer or
// at the worker's end.
type pending struct {
	answer   chan answer
	deadline time.Time
	done     func(error)
}

type answer struct {
	body []byte
	err  error
}

// ignoreDone is the done of a call without a reservation.
func ignoreDone(error) {}

var (
	// errGivenUp ends the calls in flight of a worker that is given up.
	errGivenUp = fmt.Errorf("%w: the key worker that had the call was given up", keystore.ErrUnavailable)
	errLate    = errors.New("a call did not come back from the device in time")
)

// exitTimeout bounds two waits at the end of a worker. A worker that has ended may have unread
// frames, and a worker that has closed its socket may still be about to end.
const exitTimeout = time.Second

// startProcess has a key worker started. The worker is ready after its answer to hello.
func startProcess(
	start func(socket, stderr *os.File) (Process, error), name string, log *slog.Logger, gate loginGate,
	journaled func(size uint64),
) (*process, error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "key worker"), os.NewFile(uintptr(fds[1]), "key worker")
	defer ours.Close()
	defer theirs.Close()
	p := &process{
		name: name, gate: gate, journaled: journaled, calls: map[uint64]*pending{}, bound: map[uint32]bool{},
		dead: make(chan struct{}), drained: make(chan struct{}), reaped: make(chan struct{}),
	}
	if p.pipe, err = newPipe(ours); err != nil {
		return nil, err
	}
	says, stderr, err := os.Pipe()
	if err != nil {
		p.pipe.conn.Close()
		return nil, err
	}
	p.child, err = start(theirs, stderr)
	stderr.Close()
	if err != nil {
		says.Close()
		p.pipe.conn.Close()
		return nil, fmt.Errorf("%w: start a key worker: %w", keystore.ErrUnavailable, err)
	}
	p.lastUse.Store(time.Now().UnixNano())
	go func() {
		defer close(p.reaped)
		lines, read := &lineLogger{remaining: maxLines, log: func(text string) {
			log.Warn("a key worker says", "worker", name, "pid", p.child.PID(), "text", text)
		}}, make(chan struct{})
		go func() {
			defer close(read)
			io.Copy(lines, says)
		}()
		err := p.child.Wait()
		if err == nil {
			err = errors.New("the process has exited")
		}
		says.SetReadDeadline(time.Now().Add(exitTimeout)) // a child of the worker may hold the worker's stderr open
		<-read
		says.Close()
		lines.flush()
		select {
		case <-p.drained: // frames from before the end count: answers, and a refused PIN
		case <-time.After(exitTimeout):
		}
		p.fail(err)
	}()
	go p.read()
	return p, nil
}

// fail gives the worker up: kills the process and ends its calls with errGivenUp. Only the first
// reason is kept.
func (p *process) fail(why error) {
	p.mu.Lock()
	first := p.why == nil
	if first {
		p.why = why
		p.failed.Add(uint64(len(p.calls)))
		close(p.dead) // before the calls end below: their retries must not choose this worker again
	}
	calls := p.calls
	p.calls = nil
	p.mu.Unlock()
	if first {
		p.child.Kill()
		p.pipe.conn.Close()
	}
	for _, c := range calls {
		c.answer <- answer{err: errGivenUp}
		c.done(errGivenUp)
	}
}

// failure is the reason of fail or retire, or nil.
func (p *process) failure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.why
}

// isDead reports a worker that was given up or retired.
func (p *process) isDead() bool {
	select {
	case <-p.dead:
		return true
	default:
		return false
	}
}

// waitReaped waits until the process has ended, or for at most timeout: the kernel can't kill a
// process that hangs in a driver, and callers must not hang with the process.
func (p *process) waitReaped(timeout time.Duration) {
	select {
	case <-p.reaped:
	case <-time.After(timeout):
	}
}

// shutdown lets the worker end by itself, and kills the worker after timeout. Until then the
// worker's frames are read: the news of a refused PIN must not be lost.
func (p *process) shutdown(timeout time.Duration) {
	p.pipe.conn.CloseWrite()
	p.waitReaped(timeout)
	p.fail(errors.New("closed"))
	p.child.Kill() // fail does not kill a retired worker
	p.waitReaped(timeout)
}

// retire takes an idle worker out of use. The caller shuts the worker down afterwards. A worker
// with a call stays: health checks and destructions have no reservation, so the pool does not know
// of these calls.
func (p *process) retire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.why == nil && len(p.calls) == 0 {
		p.why, p.calls = errRenewed, nil
		close(p.dead)
	}
}

// read handles the worker's frames until the socket's end, and then gives the worker up.
func (p *process) read() {
	err := p.readFrames()
	close(p.drained)
	if !errors.Is(err, errProtocol) {
		p.waitReaped(exitTimeout) // the exit status is a better reason than the socket's end
	}
	p.fail(err)
	p.pipe.conn.Close()
}

func (p *process) readFrames() error {
	for {
		id, k, body, err := p.pipe.receive()
		if err != nil {
			return fmt.Errorf("read from the key worker: %w", err)
		}
		switch k {
		case loginRequest:
			if !p.asking.CompareAndSwap(false, true) {
				return fmt.Errorf("%w: two login requests at once", errProtocol)
			}
			go p.gate.requestLogin(p, id)
			continue
		case loginEnded:
			if !p.loggingIn() {
				return fmt.Errorf("%w: the end of a login that was not granted", errProtocol)
			}
			var refused error
			if len(body) > 0 {
				refused = decodeError(body)
			}
			p.gate.loginDone(p, refused)
			continue
		case journaled:
			p.journaled(id)
			continue
		case result, failure:
		default:
			return fmt.Errorf("%w: a frame of kind %d", errProtocol, k)
		}
		p.mu.Lock()
		c := p.calls[id]
		delete(p.calls, id)
		p.mu.Unlock()
		if c == nil {
			return fmt.Errorf("%w: an answer to call %d, which is not in flight", errProtocol, id)
		}
		if k == failure {
			p.failed.Add(1)
			err = decodeError(body)
			c.answer <- answer{err: err}
		} else {
			p.served.Add(1)
			now := time.Now().UnixNano()
			p.lastUse.Store(now)
			p.succeeded.Store(now)
			c.answer <- answer{body: body}
		}
		c.done(err)
	}
}

// checkDeadlines gives the worker up if a call has missed its deadline.
func (p *process) checkDeadlines(now time.Time) {
	p.mu.Lock()
	late := false
	for _, c := range p.calls {
		late = late || now.After(c.deadline)
	}
	p.mu.Unlock()
	if late {
		p.fail(errLate)
	}
}

// roundTrip sends a frame and waits for the answer, for the worker's end, or for the end of ctx.
// After the end of ctx the call stays in flight until its own deadline, so a hanging device is
// still noticed. done runs exactly once.
func (p *process) roundTrip(
	ctx context.Context, timeout time.Duration, done func(error), k kind, body ...[]byte,
) ([]byte, error) {
	c := &pending{answer: make(chan answer, 1), deadline: time.Now().Add(timeout), done: done}
	p.mu.Lock()
	if p.calls == nil {
		p.mu.Unlock()
		done(errGivenUp)
		return nil, errGivenUp
	}
	p.nextID++
	id := p.nextID
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

// request is a round trip for a call in JSON.
func (p *process) request(ctx context.Context, timeout time.Duration, done func(error), c call) ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		done(err)
		return nil, err
	}
	return p.roundTrip(ctx, timeout, done, request, b)
}

// useKey is a round trip for a use of a key. The first use of a key sends a bind frame before.
func (p *process) useKey(
	ctx context.Context, timeout time.Duration, done func(error), k kind, key *key, body []byte,
) ([]byte, error) {
	p.bindMu.Lock()
	if !p.bound[key.number] {
		p.bound[key.number] = true
		// bindMu keeps frames of other callers behind this one. An error of the pipe comes again
		// with the next frame.
		p.pipe.send(uint64(key.number), bind, key.encoded)
	}
	p.bindMu.Unlock()
	var number [4]byte
	binary.BigEndian.PutUint32(number[:], key.number)
	return p.roundTrip(ctx, timeout, done, k, number[:], body)
}
