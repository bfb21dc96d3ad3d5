package worker

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"os"
	"time"

	"countersign/internal/keystore"
)

const (
	// A worker was healthy if it lived for healthyTime, answered healthyCalls or was renewed. Its
	// successor starts at once. After n consecutive workers without health, the next start waits
	// for a backoff of minBackoff*2^(n-1), at most maxBackoff. Up to half of the backoff is
	// jitter.
	healthyTime  = time.Second
	healthyCalls = 100
	minBackoff   = 50 * time.Millisecond
	maxBackoff   = 3 * time.Second
	// healthCheckAfter is the idle time after which a worker has a health check.
	healthCheckAfter = 15 * time.Second
	// recoveryTime is the life of a worker after which an outage counts as over. An answered call
	// ends the outage earlier.
	recoveryTime = 5 * time.Second
)

// runSlot keeps one slot filled with a worker until the pool is closed. The result of the first
// start goes to first.
func (p *Pool) runSlot(s *slot, first chan<- error) {
	for {
		proc, err := p.startWorker(context.Background(), s.number, "")
		if first != nil {
			first <- err
			first = nil
		}
		if err == nil && !p.fillSlot(s, proc) {
			proc.fail(errDestroyed)
			err, s.failures = errDestroyed, -1 // 0 after the increment below: no backoff
		}
		if err == nil {
			started := time.Now()
			p.monitor(proc)
			select {
			case <-proc.dead:
			case <-p.closed:
				p.mu.Lock()
				s.process = nil
				p.mu.Unlock()
				proc.shutdown(closeTimeout + time.Second)
				return
			}
			err = proc.failure()
			if proc.served.Load() >= healthyCalls || time.Since(started) >= healthyTime || errors.Is(err, errRenewed) {
				s.failures = -1 // 0 after the increment below: no backoff
			}
			if errors.Is(err, errRenewed) {
				p.config.Log.Info("a key worker is renewed", "token", p.config.Name, "worker", proc.name,
					"served", proc.served.Load(), "memory", p.config.Memory)
			} else {
				p.config.Log.Warn("a key worker is given up", "token", p.config.Name, "worker", proc.name, "err", err)
			}
		} else if s.failures == 0 && p.isOpen() && !errors.Is(err, keystore.ErrAuth) {
			// Other workers may serve well, so only the log shows the missing one.
			p.config.Log.Warn("a key worker can't be started; it is tried again",
				"token", p.config.Name, "worker", s.number+1, "err", err)
		}
		if p.isClosed() {
			if proc != nil {
				proc.shutdown(closeTimeout)
			}
			return
		}
		p.mu.Lock()
		if s.process != nil && !errors.Is(err, errRenewed) {
			p.countEnd(time.Now())
		}
		s.failures++
		s.restarts++
		if proc != nil {
			s.calls += proc.served.Load()
			s.errors += proc.failed.Load()
		}
		// After a refused PIN nobody starts a worker, however healthy the one before was.
		s.process, s.starting = nil, s.failures == 0 && p.barred() == nil
		p.cause = err
		retry, authErr := p.retry, p.barred()
		p.slotsChanged()
		p.mu.Unlock()
		if proc != nil {
			proc.shutdown(closeTimeout)
		}
		if authErr == nil && s.failures == 0 {
			continue
		}
		var backoff <-chan time.Time // nil after a refused PIN: only Retry ends the wait
		if authErr == nil {
			pause := min(minBackoff<<min(s.failures-1, 10), maxBackoff)
			backoff = time.After(pause/2 + mrand.N(pause/2)) // jitter, or workers would start in step
		}
		select {
		case <-backoff:
		case <-retry:
		case <-p.closed:
			return
		}
	}
}

var errDestroyed = errors.New("a key was destroyed while the key worker started, which may have a copy")

// fillSlot puts a new worker into use, and reports whether that was right: a worker whose health
// check has used a key that was destroyed meanwhile may have a copy, and Destroy has not asked the
// worker to give the copy up.
func (p *Pool) fillSlot(s *slot, proc *process) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if proc.destroyed != p.destroyed {
		return false
	}
	s.process, s.starting = proc, false
	p.slotsChanged()
	return true
}

// startWorker starts a worker, waits until its device is open, and checks its health. The caller
// must shut the returned process down, also after an error. The process is nil if none was started.
// seedFile is the file of an import, or "".
func (p *Pool) startWorker(ctx context.Context, number int, seedFile string) (*process, error) {
	p.mu.Lock()
	retries, destroyed := p.retries, p.destroyed
	p.mu.Unlock()
	name := fmt.Sprintf("%s/%d", p.config.Name, number+1)
	proc, err := startProcess(func(socket, stderr *os.File) (Process, error) {
		return p.config.Start(number, seedFile, socket, stderr)
	}, name, p.config.Log, p, p.journalBytes.Store)
	if err != nil {
		return nil, err
	}
	proc.retries, proc.destroyed = retries, destroyed
	ctx, cancel := p.withTimeout(ctx, slowFactor*p.config.Deadline)
	defer cancel()
	_, err = proc.roundTrip(ctx, slowFactor*p.config.Deadline, ignoreDone, hello)
	if err == nil {
		err = p.checkHealth(ctx, proc)
	}
	if errors.Is(err, errGivenUp) {
		err = fmt.Errorf("%w: the key worker ended while it opened the device: %w",
			keystore.ErrUnavailable, proc.failure())
	}
	if errors.Is(err, keystore.ErrAuth) {
		err = p.stopLogins(err, retries)
	}
	return proc, err
}

// withTimeout returns a context with a timeout that also ends when the pool is closed.
func (p *Pool) withTimeout(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
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

// checkHealth has a worker prove that its device works, without a change on the device. The proof
// is an X25519 exchange with a known result. Without an exchange key, the proof is the description
// of some key. Without any key there is no check.
func (p *Pool) checkHealth(ctx context.Context, proc *process) error {
	k := p.healthCheckKey()
	if k == nil {
		return nil
	}
	if k.info.Algorithm != keystore.X25519 {
		_, err := proc.request(ctx, slowFactor*p.config.Deadline, ignoreDone, call{Op: opKey, Ref: k.info.Ref})
		return withoutKeyErrors(err)
	}
	own, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	theirs, err := ecdh.X25519().NewPublicKey(k.info.PublicKey)
	if err != nil {
		return err
	}
	want, err := own.ECDH(theirs)
	if err != nil {
		return err
	}
	got, err := proc.useKey(ctx, p.config.Deadline, ignoreDone, exchange, k, own.PublicKey().Bytes())
	if err == nil && !bytes.Equal(got, want) {
		err = keystore.ErrWrong
	}
	return withoutKeyErrors(err)
}

// healthCheckKey picks an exchange key if the pool has one, else a random key, else nil.
func (p *Pool) healthCheckKey() *key {
	p.mu.Lock()
	defer p.mu.Unlock()
	var picked *key
	for _, k := range p.keys {
		if picked == nil || k.info.Algorithm == keystore.X25519 ||
			picked.info.Algorithm != keystore.X25519 && mrand.N(2) == 0 {
			picked = k
		}
	}
	return picked
}

// withoutKeyErrors drops an error about one key: an operator may have deleted or changed the key. A
// device with such an answer works. The next user of the key gets the error.
func withoutKeyErrors(err error) error {
	if errors.Is(err, keystore.ErrNotFound) || errors.Is(err, keystore.ErrUnfit) ||
		errors.Is(err, keystore.ErrAmbiguous) || errors.Is(err, keystore.ErrSealed) {
		return nil
	}
	return err
}

// monitor watches a worker until its end: gives the worker up after a missed deadline, renews a
// worker with too much memory, and checks the health of an idle one.
func (p *Pool) monitor(proc *process) {
	p.goroutines.Go(func() {
		ticker := time.NewTicker(p.config.Deadline / 8)
		defer ticker.Stop()
		started := time.Now()
		checking := make(chan struct{}, 1) // capacity 1: one health check at a time
		for {
			var now time.Time
			select {
			case now = <-ticker.C:
			case <-proc.dead:
				return
			case <-p.closed:
				return
			}
			proc.checkDeadlines(now)
			p.renewIfLarge(proc)
			if p.outageReported.Load() && p.sealedCount.Load() == 0 && now.Sub(started) > recoveryTime {
				p.reportRecovery()
			}
			if now.UnixNano()-proc.lastUse.Load() > int64(healthCheckAfter) {
				select {
				case checking <- struct{}{}:
					go func() {
						defer func() { <-checking }()
						ctx, cancel := context.WithTimeout(context.Background(), slowFactor*p.config.Deadline)
						defer cancel()
						if err := p.checkHealth(ctx, proc); err != nil {
							proc.fail(err)
						}
						proc.lastUse.Store(time.Now().UnixNano())
					}()
				default:
				}
			}
		}
	})
}

var errRenewed = errors.New("the key worker had grown too large")

// renewIfLarge ends a worker above the memory limit once the worker is idle. Until then the worker
// gets no new calls. Renewal needs another worker that takes over, unless the pool has one slot
// only.
func (p *Pool) renewIfLarge(proc *process) {
	memory := proc.child.Memory()
	proc.resident.Store(int64(memory))
	if memory <= p.config.Memory {
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
	p.slotsChanged() // a worker that no longer retires takes calls from the queue
	idle := proc.retiring && proc.inFlight == 0
	p.mu.Unlock()
	if idle {
		proc.retire()
	}
}
