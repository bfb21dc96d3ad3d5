package worker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"countersign/internal/keystore"
)

// Pool is a keystore.Store whose device is used by key workers.
type Pool struct {
	config Config
	closed chan struct{}
	loops  sync.WaitGroup
	noted  chan struct{} // a place of one: there are notes

	login chan struct{} // a place of one: who is logging in

	mu       sync.Mutex
	slots    []*slot
	waiting  []*waiter
	keys     map[string]*key       // by what a worker has to know of them
	authFail error                 // a PIN was refused: no login until Retry
	retry    chan struct{}         // closed by Retry
	retries  int                   // how often there was one
	cause    error                 // why the last worker could not be had
	open     bool                  // Open has returned
	down     bool                  // no worker can be had
	told     atomic.Bool           // and that has been noted; set under mu
	notes    []note                // what is to be said, in turns: down, up, down
	sealed   map[keystore.Ref]bool // the keys that the device gives out in another state of this machine only
	sealing  atomic.Int64          // how many these are
}

// slot is the place of one worker.
type slot struct {
	number   int
	process  *process // the one that is ready, or nil
	starting bool     // one is being started, and there is no reason to think that it will fail
	fails    int      // processes that have ended badly in a row
	restarts int
}

type waiter struct {
	tried   []*process
	process chan *process // one that has a place for the waiter, or nil: there is none to be had
}

// Open starts the workers. It returns when one of them is ready, or with the error of the first that is not; then the
// pool is closed. Where patient is true and the device does not answer, there is a pool all the same, and it goes on
// trying.
func Open(ctx context.Context, c Config, patient bool) (*Pool, error) {
	p := &Pool{
		config: c, closed: make(chan struct{}), noted: make(chan struct{}, 1), login: make(chan struct{}, 1),
		keys: map[string]*key{}, sealed: map[keystore.Ref]bool{}, retry: make(chan struct{}),
	}
	first := make(chan error, c.Workers)
	for n := range c.Workers {
		s := &slot{number: n, starting: true}
		p.slots = append(p.slots, s)
	}
	p.loops.Go(p.tell)
	for _, s := range p.slots {
		p.loops.Go(func() { p.run(s, first) })
	}
	var err error
	for range c.Workers {
		select {
		case err = <-first:
		case <-ctx.Done():
			err = fmt.Errorf("%w: the device does not come back from its start: %w", keystore.ErrUnavailable, ctx.Err())
		}
		if err == nil || !errors.Is(err, keystore.ErrUnavailable) || ctx.Err() != nil {
			break // another worker can't do better
		}
	}
	if err == nil || patient && errors.Is(err, keystore.ErrUnavailable) {
		p.mu.Lock()
		p.open = true
		p.settle()
		p.mu.Unlock()
		return p, nil
	}
	p.Close()
	return nil, err
}

// Close ends all workers. Calls that are under way fail.
func (p *Pool) Close() error {
	p.mu.Lock()
	select {
	case <-p.closed:
		p.mu.Unlock()
		return nil
	default:
	}
	close(p.closed)
	for _, w := range p.waiting {
		w.process <- nil
	}
	p.waiting = nil
	p.mu.Unlock()
	p.loops.Wait()
	return nil
}

// isOpen reports that Open has returned, and Close has not begun: before, the caller is told of errors.
func (p *Pool) isOpen() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.open && !p.isClosed()
}

func (p *Pool) isClosed() bool {
	select {
	case <-p.closed:
		return true
	default:
		return false
	}
}

// choose takes a place at a worker that is not among those tried, under mu. Where there is none, coming says whether one
// can be waited for.
func (p *Pool) choose(tried []*process) (best *process, coming bool) {
	for _, s := range p.slots {
		proc := s.process
		switch {
		case proc == nil:
			coming = coming || s.starting
		case proc.retiring, proc.isDead(): // run decides in a moment what comes after it
			coming = true
		case slices.Contains(tried, proc):
		case proc.busy >= p.config.InFlight:
			coming = true
		case best == nil || p.config.Spread && proc.busy < best.busy:
			best = proc
		}
	}
	if best != nil {
		best.busy++
	}
	return best, coming
}

var errClosed = fmt.Errorf("%w: the key workers have been ended", keystore.ErrUnavailable)

// acquire returns a worker with a place for a call. release gives the place back.
func (p *Pool) acquire(ctx context.Context, tried []*process) (*process, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
	}
	p.mu.Lock()
	if p.isClosed() {
		p.mu.Unlock()
		return nil, errClosed
	}
	proc, coming := p.choose(tried)
	if proc != nil {
		p.mu.Unlock()
		return proc, nil
	}
	if !coming {
		err := p.none()
		p.mu.Unlock()
		return nil, err
	}
	w := &waiter{tried, make(chan *process, 1)}
	p.waiting = append(p.waiting, w)
	p.mu.Unlock()
	select {
	case proc = <-w.process:
	case <-ctx.Done():
		p.mu.Lock()
		i := slices.Index(p.waiting, w)
		if i >= 0 {
			p.waiting = slices.Delete(p.waiting, i, i+1)
		}
		p.mu.Unlock()
		if i < 0 { // it was given one in this moment
			if proc := <-w.process; proc != nil {
				p.release(proc)
			}
		}
		return nil, fmt.Errorf("%w: all key workers are busy: %w", keystore.ErrUnavailable, ctx.Err())
	}
	if proc == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		return nil, p.none()
	}
	return proc, nil
}

// none says why there is no worker, under mu.
func (p *Pool) none() error {
	if p.authFail != nil {
		return p.authFail
	}
	return fmt.Errorf("%w: there is no key worker for token %q", keystore.ErrUnavailable, p.config.Name)
}

func (p *Pool) release(proc *process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	proc.busy--
	for i, w := range p.waiting { // one place has become free: it is for the first that can use it
		if proc, _ := p.choose(w.tried); proc != nil {
			p.waiting = slices.Delete(p.waiting, i, i+1)
			w.process <- proc
			return
		}
	}
}

// do has one worker after another carry a call out until one has done it. check judges an answer. A worker that says that
// the key is missing or unfit is believed when there is nobody who knows better.
func (p *Pool) do(ctx context.Context, once bool, send func(proc *process, done func(error)) ([]byte, error), check func(answer []byte) error) ([]byte, error) {
	var tried, doubted []*process
	var failed error
	for range tries {
		proc, err := p.acquire(ctx, tried)
		if err != nil {
			if failed != nil {
				err = failed
			}
			return nil, err
		}
		answer, err := send(proc, func(err error) {
			p.release(proc)
			if errors.Is(err, keystore.ErrUnavailable) { // though nobody may be waiting for it any more
				proc.fail(err)
			}
		})
		if err == nil && check != nil {
			err = check(answer)
		}
		if err == nil {
			for _, d := range doubted {
				d.fail(errors.New("it could not do what another worker could"))
			}
			if p.told.Load() {
				p.back()
			}
			return answer, nil
		}
		failed = err
		tried = append(tried, proc)
		if once && errors.Is(err, keystore.ErrUnavailable) { // it must not make a key after the caller has cleared away
			proc.fail(err)
			proc.gone(closeTime)
			return nil, err
		}
		switch {
		case ctx.Err() != nil && errors.Is(err, ctx.Err()):
			return nil, err
		case errors.Is(err, keystore.ErrAuth):
			p.refusedPIN(err, proc.retries)
			proc.fail(err)
		case errors.Is(err, keystore.ErrUnavailable):
			proc.fail(err)
		case errors.Is(err, keystore.ErrNotFound), errors.Is(err, keystore.ErrUnfit), errors.Is(err, keystore.ErrAmbiguous), errors.Is(err, keystore.ErrRefused):
			doubted = append(doubted, proc)
		default:
			return nil, err
		}
		if once {
			return nil, err
		}
	}
	return nil, failed
}
