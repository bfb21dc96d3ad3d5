package worker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"countersign/internal/keystore"
)

// maxAttempts is the largest number of workers for one call.
const maxAttempts = 4

// Pool is a keystore.Store on top of key workers.
type Pool struct {
	config     Config
	closed     chan struct{}
	goroutines sync.WaitGroup // Close waits for these

	loginLock chan struct{} // capacity 1: the worker that logs in holds the lock

	mu      sync.Mutex
	slots   []*slot
	queue   []*waiter       // calls without a worker, oldest first
	keys    map[string]*key // by the encoded keystore.Info
	opened  bool            // Open has returned
	authErr error           // the token's refusal of the PIN: no login until Retry, or another PIN file
	refusal refusal         // of authErr, across restarts
	lastTry bool            // an operator permits a login on the last try
	retry   chan struct{}   // Retry closes and replaces the channel
	retries int             // number of calls of Retry

	// The circuit breaker, see breaker.go. Under mu; the atomics are also read without mu.
	down           bool                   // no slot has a worker, or will have one soon
	cause          error                  // of the last failure
	outageReported atomic.Bool            // an outage is reported, and its end is not
	changes        []change               // the reports to OnChange: down, up, down, ...
	changed        chan struct{}          // capacity 1: changes is not empty
	sealed         map[keystore.Ref]error // keys that the device refuses in the machine's present state
	sealedCount    atomic.Int64
	destroyed      uint64 // keys that were destroyed, see fillSlot

	journalErr      atomic.Pointer[error] // the journal can't be written; nil: it can
	journalFailures atomic.Uint64         // signatures that were held back
	journalBytes    atomic.Uint64         // as a worker has told last

	// The faults, see faults.go. Under mu; the atomic is also read without mu.
	missing      map[*key]error // lost keys, with the error of the use
	missingCount atomic.Int64
	listed       int           // number of lost keys at the last listing
	emptied      bool          // the last listing had no key
	ends         []time.Time   // of the last workers that have ended, at most manyEnds
	probeNow     chan struct{} // capacity 1: a key was lost
}

// slot is one worker's place in the pool. Processes come and go, the slot stays.
type slot struct {
	number   int
	process  *process // the worker in use, or nil
	starting bool     // a start is under way, and the process before was healthy: calls wait for the start
	failures int      // consecutive processes that failed early, see runSlot
	restarts int
	calls    uint64 // successful calls of the processes before
	errors   uint64 // failed calls of the processes before
}

// waiter is a call in the queue.
type waiter struct {
	tried    []*process
	assigned chan *process // a worker with the call reserved, or nil: no worker can be had
}

// Open starts the workers and returns when the first of them is ready. Open fails when all starts
// have failed, or at the first failure that every worker would have, for example a refused PIN. The
// pool is then closed. With patient, an unavailable device (keystore.ErrUnavailable) is no failure,
// and with Config.Optional no failure is one: the pool opens and retries the starts.
func Open(ctx context.Context, c Config, patient bool) (*Pool, error) {
	p := &Pool{
		config: c, closed: make(chan struct{}), changed: make(chan struct{}, 1), loginLock: make(chan struct{}, 1),
		keys: map[string]*key{}, sealed: map[keystore.Ref]error{}, retry: make(chan struct{}),
		missing: map[*key]error{}, probeNow: make(chan struct{}, 1), refusal: newRefusal(c),
	}
	if c.Retry {
		if err := p.forgetRefusal(true); err != nil {
			return nil, err
		}
	}
	for n := range c.Workers {
		p.slots = append(p.slots, &slot{number: n, starting: true})
	}
	p.goroutines.Go(p.deliverChanges)
	p.goroutines.Go(p.probe)
	first := make(chan error, c.Workers)
	for _, s := range p.slots {
		p.goroutines.Go(func() { p.runSlot(s, first) })
	}
	var err error
	for range c.Workers {
		select {
		case err = <-first:
		case <-ctx.Done():
			err = fmt.Errorf("%w: the device has not finished its start: %w", keystore.ErrUnavailable, ctx.Err())
		}
		if err == nil || !errors.Is(err, keystore.ErrUnavailable) || ctx.Err() != nil {
			break // another worker can't do better
		}
	}
	if err == nil || patient && (p.config.Optional || errors.Is(err, keystore.ErrUnavailable)) {
		p.mu.Lock()
		p.opened = true
		p.slotsChanged()
		p.mu.Unlock()
		return p, nil
	}
	p.Close()
	return nil, err
}

// Close ends all workers. Calls in flight and calls in the queue fail.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.isClosed() {
		p.mu.Unlock()
		return nil
	}
	close(p.closed)
	for _, w := range p.queue {
		w.assigned <- nil
	}
	p.queue = nil
	p.mu.Unlock()
	p.goroutines.Wait()
	return nil
}

// isOpen reports a pool after Open and before Close. Before, Open returns errors to its caller, so
// the log need not have them.
func (p *Pool) isOpen() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.opened && !p.isClosed()
}

func (p *Pool) isClosed() bool {
	select {
	case <-p.closed:
		return true
	default:
		return false
	}
}

// sendFunc sends a call to a worker and waits for the answer. The call ends with done, which runs
// exactly once, possibly after sendFunc has returned: a worker keeps a call whose caller has left.
type sendFunc func(proc *process, done func(error)) ([]byte, error)

// do carries a call out. One worker after another gets the call until a worker has succeeded, at
// most maxAttempts workers, or one worker if atMostOnce. check, if not nil, validates an answer.
//
// An error about the key itself (keystore.ErrNotFound, ErrUnfit, ErrAmbiguous or ErrRefused) makes
// a worker a suspect. The next worker gets the call. After a success there, the suspects are
// replaced. Without a success, the error is believed.
func (p *Pool) do(
	ctx context.Context, atMostOnce bool, send sendFunc, check func(answer []byte) error,
) ([]byte, error) {
	var tried, suspects []*process
	var lastErr error
	for range maxAttempts {
		proc, err := p.acquire(ctx, tried)
		if err != nil {
			if lastErr != nil {
				err = lastErr
			}
			return nil, err
		}
		answer, err := send(proc, func(err error) {
			p.release(proc)
			if errors.Is(err, keystore.ErrUnavailable) { // the caller may have left before the answer
				proc.fail(err)
			}
		})
		if err == nil && check != nil {
			err = check(answer)
		}
		if err == nil {
			for _, s := range suspects {
				s.fail(errors.New("a call failed here, and succeeded at another key worker"))
			}
			if p.outageReported.Load() {
				p.reportRecovery()
			}
			return answer, nil
		}
		lastErr = err
		tried = append(tried, proc)
		if atMostOnce && errors.Is(err, keystore.ErrUnavailable) {
			// After this return the caller removes the remains of the key. The process must be
			// gone by then, or the process could still make the key.
			proc.fail(err)
			proc.waitReaped(closeTimeout)
			return nil, err
		}
		switch {
		case ctx.Err() != nil && errors.Is(err, ctx.Err()):
			return nil, err
		case errors.Is(err, keystore.ErrAuth):
			lastErr = p.stopLogins(err, proc.retries)
			if p.config.PINPerKey {
				return nil, lastErr
			}
			proc.fail(err)
		case errors.Is(err, keystore.ErrUnavailable):
			proc.fail(err)
		case errors.Is(err, keystore.ErrNotFound), errors.Is(err, keystore.ErrUnfit),
			errors.Is(err, keystore.ErrAmbiguous), errors.Is(err, keystore.ErrRefused):
			suspects = append(suspects, proc)
		default:
			return nil, err
		}
		if atMostOnce {
			return nil, lastErr
		}
	}
	return nil, lastErr
}

// reserve counts a call as in flight at a worker not in tried. The caller holds mu. Without such a
// worker, reserve returns nil, and expected reports whether waiting for a worker makes sense.
func (p *Pool) reserve(tried []*process) (best *process, expected bool) {
	for _, s := range p.slots {
		proc := s.process
		switch {
		case proc == nil:
			expected = expected || s.starting
		case proc.retiring, proc.isDead(): // runSlot is about to empty the slot
			expected = true
		case slices.Contains(tried, proc):
		case proc.inFlight >= p.config.InFlight:
			expected = true
		case best == nil || p.config.Spread && proc.inFlight < best.inFlight:
			best = proc
		}
	}
	if best != nil {
		best.inFlight++
	}
	return best, expected
}

var errClosed = fmt.Errorf("%w: the pool of key workers is closed", keystore.ErrUnavailable)

// acquire returns a worker with the call reserved. With all workers busy, the call waits in the
// queue until ctx ends. Every acquire needs one release.
func (p *Pool) acquire(ctx context.Context, tried []*process) (*process, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
	}
	p.mu.Lock()
	if p.isClosed() {
		p.mu.Unlock()
		return nil, errClosed
	}
	proc, expected := p.reserve(tried)
	if proc != nil {
		p.mu.Unlock()
		return proc, nil
	}
	if !expected {
		err := p.noWorker()
		p.mu.Unlock()
		return nil, err
	}
	w := &waiter{tried, make(chan *process, 1)}
	p.queue = append(p.queue, w)
	p.mu.Unlock()
	select {
	case proc = <-w.assigned:
	case <-ctx.Done():
		p.mu.Lock()
		i := slices.Index(p.queue, w)
		if i >= 0 {
			p.queue = slices.Delete(p.queue, i, i+1)
		}
		p.mu.Unlock()
		if i < 0 { // a worker was assigned at the same moment
			if proc := <-w.assigned; proc != nil {
				p.release(proc)
			}
		}
		return nil, fmt.Errorf("%w: all key workers are busy: %w", keystore.ErrUnavailable, ctx.Err())
	}
	if proc == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		return nil, p.noWorker()
	}
	return proc, nil
}

// noWorker is the error of a call without a worker. The caller holds mu.
func (p *Pool) noWorker() error {
	if refused := p.barred(); refused != nil {
		return refused
	}
	none := fmt.Errorf("%w: there is no key worker for token %q", keystore.ErrUnavailable, p.config.Name)
	if p.cause != nil {
		return fmt.Errorf("%w: %v", none, p.cause) // the class of the cause is not that of the call
	}
	return none
}

// release ends a reservation. The first call in the queue that can use a worker gets one.
func (p *Pool) release(proc *process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	proc.inFlight--
	for i, w := range p.queue {
		if proc, _ := p.reserve(w.tried); proc != nil {
			p.queue = slices.Delete(p.queue, i, i+1)
			w.assigned <- proc
			return
		}
	}
}

// dispatch goes through the queue after a change of the slots, under mu: a call gets a free worker,
// or nil if no worker is expected, or stays in the queue.
func (p *Pool) dispatch() {
	p.queue = slices.DeleteFunc(p.queue, func(w *waiter) bool {
		proc, expected := p.reserve(w.tried)
		answered := proc != nil || !expected
		if answered {
			w.assigned <- proc
		}
		return answered
	})
}
