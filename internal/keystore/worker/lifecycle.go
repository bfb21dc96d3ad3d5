package worker

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"time"

	"countersign/internal/keystore"
)

// run keeps one slot filled until the pool is closed.
func (p *Pool) run(s *slot, first chan<- error) {
	for {
		proc, err := p.begin(context.Background(), s.number)
		if first != nil {
			first <- err
			first = nil
		}
		if err == nil {
			began := time.Now()
			p.ready(s, proc)
			p.watch(proc)
			select {
			case <-proc.dead:
			case <-p.closed:
				p.mu.Lock()
				s.process = nil
				p.mu.Unlock()
				proc.close(closeTime + time.Second)
				return
			}
			proc.mu.Lock()
			err = proc.why
			proc.mu.Unlock()
			if proc.served.Load() >= soundCalls || time.Since(began) >= sound || errors.Is(err, errRenewed) {
				s.fails = -1 // it was well: this is the first time
			}
			if errors.Is(err, errRenewed) {
				p.config.Log.Info("a key worker is renewed", "token", p.config.Name, "worker", proc.name, "served", proc.served.Load(), "memory", p.config.Memory)
			} else {
				p.config.Log.Warn("a key worker is given up", "token", p.config.Name, "worker", proc.name, "err", err)
			}
		} else if s.fails == 0 && p.isOpen() && !errors.Is(err, keystore.ErrAuth) { // others may serve, and nobody would know
			p.config.Log.Warn("a key worker can't be started; it is tried again", "token", p.config.Name, "worker", s.number+1, "err", err)
		}
		if p.isClosed() {
			if proc != nil {
				proc.close(closeTime)
			}
			return
		}
		p.mu.Lock()
		s.fails++
		s.restarts++
		s.process, s.starting = nil, s.fails == 0
		p.cause = err
		retry, auth := p.retry, p.authFail
		p.settle()
		p.mu.Unlock()
		if proc != nil {
			proc.close(closeTime)
		}
		if auth != nil {
			select {
			case <-retry:
			case <-p.closed:
				return
			}
		} else if s.fails > 0 {
			pause := min(firstPause<<min(s.fails-1, 10), longestPause)
			select {
			case <-time.After(pause/2 + mrand.N(pause/2)): // so that workers don't come in step
			case <-retry:
			case <-p.closed:
				return
			}
		}
	}
}

// begin starts a worker, waits until its device is open, and looks whether it does what is right. What has been started
// is the caller's to close, also where there is an error.
func (p *Pool) begin(ctx context.Context, number int) (*process, error) {
	p.mu.Lock()
	retries := p.retries
	p.mu.Unlock()
	proc, err := start(p.config.Command(number), fmt.Sprintf("%s/%d", p.config.Name, number+1), p.config.Log, p)
	if err != nil {
		return nil, err
	}
	proc.retries = retries
	ctx, cancel := p.within(ctx, slowFactor*p.config.Deadline)
	defer cancel()
	if _, err = proc.do(ctx, slowFactor*p.config.Deadline, func(error) {}, hello, p.config.Hello); err == nil {
		err = p.look(ctx, proc)
	}
	if err != nil {
		if errors.Is(err, errDied) {
			proc.mu.Lock()
			err = fmt.Errorf("%w: the key worker ended while it opened the device: %w", keystore.ErrUnavailable, proc.why)
			proc.mu.Unlock()
		}
		if errors.Is(err, keystore.ErrAuth) {
			p.refusedPIN(err, retries)
		}
	}
	return proc, err
}

// within returns a context that ends with the pool, too.
func (p *Pool) within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, d)
	go func() {
		select {
		case <-p.closed:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// look asks a worker for something that shows that its device works and that changes nothing: an exchange whose result
// is known, or, where there is no key for that, what it has of a key.
func (p *Pool) look(ctx context.Context, proc *process) error {
	var some *key
	p.mu.Lock()
	for _, k := range p.keys {
		if some == nil || k.info.Algorithm == keystore.X25519 || some.info.Algorithm != keystore.X25519 && mrand.N(2) == 0 {
			some = k
		}
	}
	p.mu.Unlock()
	if some == nil {
		return nil
	}
	if some.info.Algorithm != keystore.X25519 {
		_, err := proc.ask(ctx, slowFactor*p.config.Deadline, func(error) {}, call{Op: opKey, Ref: some.info.Ref})
		return ofKey(err)
	}
	own, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	theirs, err := ecdh.X25519().NewPublicKey(some.info.PublicKey)
	if err != nil {
		return err
	}
	want, err := own.ECDH(theirs)
	if err != nil {
		return err
	}
	got, err := proc.use(ctx, p.config.Deadline, func(error) {}, exchange, some, own.PublicKey().Bytes())
	if err == nil && !bytes.Equal(got, want) {
		err = keystore.ErrWrong
	}
	return ofKey(err)
}

// ofKey lets pass what is the matter with one key: it may have been deleted, or changed. Whoever uses it is told; a device
// that says so works.
func ofKey(err error) error {
	if errors.Is(err, keystore.ErrNotFound) || errors.Is(err, keystore.ErrUnfit) || errors.Is(err, keystore.ErrAmbiguous) || errors.Is(err, keystore.ErrSealed) {
		return nil
	}
	return err
}

// watch gives a worker up when it is late, and looks after one that is idle.
func (p *Pool) watch(proc *process) {
	p.loops.Go(func() {
		ticker := time.NewTicker(p.config.Deadline / 8)
		defer ticker.Stop()
		ready := time.Now()
		looking := make(chan struct{}, 1)
		for {
			var now time.Time
			select {
			case now = <-ticker.C:
			case <-proc.dead:
				return
			case <-p.closed:
				return
			}
			proc.overdue(now)
			p.renew(proc)
			if p.told.Load() && p.sealing.Load() == 0 && now.Sub(ready) > recovered {
				p.back()
			}
			if now.UnixNano()-proc.used.Load() > int64(lookEvery) {
				select {
				case looking <- struct{}{}:
					go func() {
						defer func() { <-looking }()
						ctx, cancel := context.WithTimeout(context.Background(), slowFactor*p.config.Deadline)
						defer cancel()
						if err := p.look(ctx, proc); err != nil {
							proc.fail(err)
						}
						proc.used.Store(time.Now().UnixNano())
					}()
				default:
				}
			}
		}
	})
}

var errRenewed = errors.New("it had grown too large")

// renew ends a worker that has grown too large, when it has nothing to do any more and while another one is there.
func (p *Pool) renew(proc *process) {
	if proc.memory() <= p.config.Memory {
		return
	}
	p.mu.Lock()
	others := 0
	for _, s := range p.slots {
		if s.process != nil && s.process != proc && !s.process.retiring && !s.process.isDead() {
			others++
		}
	}
	proc.retiring = others > 0 || len(p.slots) == 1
	p.settle() // some may be waiting for it, if it stays after all
	idle := proc.retiring && proc.busy == 0
	p.mu.Unlock()
	if idle {
		proc.retire()
	}
}

// ready puts a worker into its slot.
func (p *Pool) ready(s *slot, proc *process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.process, s.starting = proc, false
	p.settle()
}
