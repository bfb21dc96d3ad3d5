// Package worker puts a process boundary between the daemon and the code that reaches a device: a key worker is the
// daemon run again, with the device's module loaded and the PIN read there and nowhere else. Begin reading at Pool.do,
// through which every use of a key goes; Serve is the other side.
//
// What holds: a call has an answer, or an error, by its context's end, whatever the device does. A worker that is late,
// crashes, answers wrongly or says that its device does not answer is killed and replaced, and the call goes to another
// one; Ed25519 and X25519 are deterministic, and a second ECDSA signature is as good as the first. What makes keys is not
// repeated; a destruction is, since it touches only what its tag marks. When no worker can be had, calls fail at once until
// one is back.
package worker

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"countersign/internal/keystore"
)

// Config says how workers are run. Its zero values are not defaults: the caller decides.
type Config struct {
	Name     string                     // of the token, for the log
	Command  func(number int) *exec.Cmd // the command of a new worker, which calls Serve with descriptor 3
	Hello    []byte                     // the configuration that the worker opens its device with; no secrets
	Workers  int                        // how many; each but the first is a hot standby
	Spread   bool                       // all workers are used at the same time, not only the first that is well
	InFlight int                        // calls that one worker may have at once
	Memory   int                        // bytes of memory at which a worker is renewed, without a call lost: modules leak
	Deadline time.Duration              // for one use of a key by the device; what is slow has slowFactor of them
	Log      *slog.Logger
	// OnChange, where it is set, hears that no worker can be had any more, and that one has served again. It runs beside
	// everything else, one call after another.
	OnChange func(up bool, cause error)
}

const (
	// slowFactor is how many deadlines a start, a generation or a look at the token may take.
	slowFactor = 4
	// A worker that was well for sound, or has served soundCalls, is replaced at once when it ends; one that keeps dying
	// is replaced after a pause that doubles from firstPause to longestPause.
	sound        = time.Second
	soundCalls   = 100
	firstPause   = 50 * time.Millisecond
	longestPause = 3 * time.Second
	// lookEvery is how long a worker may be idle before it is asked whether its device is there.
	lookEvery = 15 * time.Second
	// tries bounds how many workers see one call.
	tries = 4
	// recovered is how long a worker must be there for the device to count as back, unless it serves before.
	recovered = 5 * time.Second
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

type note struct {
	up    bool
	cause error
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

func (p *Pool) Retry() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.authFail = nil
	p.retries++
	close(p.retry)
	p.retry = make(chan struct{})
}

func (p *Pool) Status() keystore.Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := keystore.Status{Up: !p.down && len(p.sealed) == 0}
	if !st.Up && p.cause != nil {
		st.Cause = p.cause.Error()
	}
	for _, s := range p.slots {
		w := keystore.Worker{Restarts: s.restarts}
		if s.process != nil {
			w.PID, w.Served = s.process.cmd.Process.Pid, s.process.served.Load()
		}
		st.Workers = append(st.Workers, w)
	}
	return st
}

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

// ask lets one worker at a time log in, and none after a PIN was refused.
func (p *Pool) ask(proc *process, id uint64) {
	select {
	case p.login <- struct{}{}:
	case <-proc.dead:
		return
	case <-p.closed:
		return
	}
	p.mu.Lock()
	may := p.authFail == nil
	p.mu.Unlock()
	if !may {
		<-p.login
		proc.asking.Store(false)
		proc.pipe.send(id, mayLogin, []byte{0})
		return
	}
	ended := proc.beginLogin()
	proc.pipe.send(id, mayLogin, []byte{1})
	select {
	case <-ended:
	case <-proc.dead: // nobody knows what came of it: a refused PIN would have been told first
	}
	<-p.login
}

func (p *Pool) done(proc *process, refusedPIN error) {
	if refusedPIN != nil {
		p.mu.Lock()
		retries := p.retries
		p.mu.Unlock()
		p.refusedPIN(refusedPIN, retries)
	}
	proc.endLogin()
}

// refusedPIN ends all logins until Retry, unless there has been one since whoever says so knew of the last.
func (p *Pool) refusedPIN(err error, retries int) {
	p.mu.Lock()
	news := p.authFail == nil && p.retries == retries
	if news {
		p.authFail = err
	}
	news = news && p.open
	p.mu.Unlock()
	if news {
		p.config.Log.Error("the token has refused the PIN; nothing logs in to it until an operator says so", "token", p.config.Name, "err", err)
	}
}

// ready puts a worker into its slot.
func (p *Pool) ready(s *slot, proc *process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.process, s.starting = proc, false
	p.settle()
}

// settle is called, under mu, whenever a worker has come or gone: it sees whether there are workers at all, and gives those
// that wait what there is.
func (p *Pool) settle() {
	down := true
	for _, s := range p.slots {
		down = down && s.process == nil && !s.starting
	}
	p.down = down
	if down && p.open && !p.told.Load() {
		p.told.Store(true)
		p.note(note{false, p.cause})
	}
	p.waiting = slices.DeleteFunc(p.waiting, func(w *waiter) bool {
		proc, coming := p.choose(w.tried)
		if proc != nil || !coming {
			w.process <- proc
		}
		return proc != nil || !coming
	})
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

// noteSealed keeps count of the keys that the device does not give out to this machine as it is. The first of them is an
// outage, and the last one's return its end.
func (p *Pool) noteSealed(ref keystore.Ref, err error) {
	sealed := errors.Is(err, keystore.ErrSealed)
	if !sealed && (err != nil || p.sealing.Load() == 0) {
		return
	}
	p.mu.Lock()
	if sealed {
		p.sealed[ref] = true
	} else {
		delete(p.sealed, ref)
	}
	p.sealing.Store(int64(len(p.sealed)))
	if sealed && !p.told.Load() {
		p.told.Store(true)
		p.cause = err
		p.note(note{false, err})
	}
	p.mu.Unlock()
	if !sealed {
		p.back()
	}
}

// back says that the device serves again, unless the call that shows it was the last one before the end.
func (p *Pool) back() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.told.Load() && !p.down && len(p.sealed) == 0 {
		p.told.Store(false)
		p.note(note{up: true})
	}
}

// maxNotes is how many wait for a listener that takes its time.
const maxNotes = 64

// note leaves word for tell, under mu. It never waits.
func (p *Pool) note(n note) {
	if n.up && len(p.notes) >= maxNotes {
		p.notes = p.notes[:len(p.notes)-1] // nobody has listened for a long time: this outage has not been
		return
	}
	p.notes = append(p.notes, n)
	select {
	case p.noted <- struct{}{}:
	default:
	}
}

// tell passes on, in order, what the pool has to say.
func (p *Pool) tell() {
	for {
		select {
		case <-p.noted:
		case <-p.closed:
			return
		}
		p.mu.Lock()
		notes := p.notes
		p.notes = nil
		p.mu.Unlock()
		for _, n := range notes {
			if p.isClosed() {
				return
			}
			if n.up {
				p.config.Log.Info("the token serves again", "token", p.config.Name)
			} else {
				p.config.Log.Error("the token does not serve: its keys are unavailable until it is back", "token", p.config.Name, "err", n.cause)
			}
			if p.config.OnChange != nil {
				p.config.OnChange(n.up, n.cause)
			}
		}
	}
}

// key is a keystore.Key behind the boundary.
type key struct {
	pool    *Pool
	info    keystore.Info
	number  uint32
	encoded []byte // info, as bind sends it
}

// Bind returns one and the same key for one and the same info.
func (p *Pool) Bind(info keystore.Info) keystore.Key {
	encoded, err := json.Marshal(info)
	if err != nil {
		panic("worker: a key's description that is not JSON: " + err.Error())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	k := p.keys[string(encoded)]
	if k == nil {
		k = &key{p, info, uint32(len(p.keys)), encoded}
		p.keys[string(encoded)] = k
	}
	return k
}

func (k *key) Info() keystore.Info { return k.info }

func (k *key) Sign(ctx context.Context, message []byte, judge keystore.Judge) ([]byte, error) {
	if k.info.Algorithm == keystore.X25519 {
		return nil, fmt.Errorf("%v: %w: it is not a signing key", k.info.Ref, keystore.ErrRefused)
	}
	return k.use(ctx, sign, message, func(signature []byte) error {
		if !judge.Accepts(signature) {
			return keystore.ErrWrong
		}
		return nil
	})
}

func (k *key) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	if k.info.Algorithm != keystore.X25519 {
		return shared, fmt.Errorf("%v: %w: it is not an exchange key", k.info.Ref, keystore.ErrRefused)
	}
	if keystore.LowOrder(peer) {
		return shared, keystore.ErrPeerKey
	}
	answer, err := k.use(ctx, exchange, peer[:], func(secret []byte) error {
		if len(secret) != len(shared) {
			return keystore.ErrWrong
		}
		return nil
	})
	if err != nil {
		return shared, err
	}
	defer clear(answer)
	return [32]byte(answer), nil
}

func (k *key) use(ctx context.Context, what kind, body []byte, check func([]byte) error) ([]byte, error) {
	if len(body) > maxMessage {
		return nil, fmt.Errorf("%v: %w: a message of %d bytes", k.info.Ref, keystore.ErrRefused, len(body))
	}
	p := k.pool
	answer, err := p.do(ctx, false, func(proc *process, done func(error)) ([]byte, error) {
		return proc.use(ctx, p.config.Deadline, done, what, k, body)
	}, check)
	p.noteSealed(k.info.Ref, err)
	return answer, err
}

// request carries out what is not frequent.
func (p *Pool) request(ctx context.Context, once bool, c call, check func(answer []byte) error) error {
	_, err := p.do(ctx, once, func(proc *process, done func(error)) ([]byte, error) {
		return proc.ask(ctx, slowFactor*p.config.Deadline, done, c)
	}, check)
	return err
}

// into reads an answer.
func into[T any](v *T) func(answer []byte) error {
	return func(answer []byte) error {
		var read T
		if err := json.Unmarshal(answer, &read); err != nil {
			return keystore.ErrWrong
		}
		*v = read
		return nil
	}
}

// about reads an answer that describes the key that was asked for.
func about(ref keystore.Ref, info *keystore.Info) func(answer []byte) error {
	return func(answer []byte) error {
		if err := into(info)(answer); err != nil {
			return err
		} else if info.Ref != ref {
			return keystore.ErrWrong
		}
		return nil
	}
}

func (p *Pool) Key(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	var info keystore.Info
	// A worker that does not find it is believed: whoever looks for a key must get an answer when there is none.
	err := p.request(ctx, false, call{Op: opKey, Ref: ref}, about(ref, &info))
	p.noteSealed(ref, err)
	if err != nil {
		return nil, err
	}
	return p.Bind(info), nil
}

func (p *Pool) Keys(ctx context.Context) (infos []keystore.Info, err error) {
	err = p.request(ctx, false, call{Op: opKeys}, into(&infos))
	return infos, err
}

func (p *Pool) Inspect(ctx context.Context) (found []keystore.Finding, err error) {
	err = p.request(ctx, true, call{Op: opLook}, into(&found))
	return found, err
}

func (p *Pool) Generate(ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag) (keystore.Key, error) {
	var info keystore.Info
	if err := p.request(ctx, true, call{Op: opGenerate, Ref: ref, Algorithm: alg, Tag: tag}, about(ref, &info)); err != nil {
		return nil, err
	}
	return p.Bind(info), nil
}

// Import runs in a worker of its own, which ends afterwards: nothing of the seed stays in a process.
func (p *Pool) Import(ctx context.Context, ref keystore.Ref, path string, tag keystore.Tag) (keystore.Key, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
	}
	p.mu.Lock()
	if p.isClosed() {
		p.mu.Unlock()
		return nil, errClosed
	}
	p.loops.Add(1) // Close waits for it
	p.mu.Unlock()
	defer p.loops.Done()
	proc, err := p.begin(ctx, len(p.slots))
	if err != nil {
		if proc != nil {
			p.loops.Go(func() { proc.close(closeTime) }) // it may be logging in
		}
		return nil, err
	}
	ctx, cancel := p.within(ctx, slowFactor*p.config.Deadline)
	defer cancel()
	var info keystore.Info
	answer, err := proc.ask(ctx, slowFactor*p.config.Deadline, func(error) {}, call{Op: opImport, Ref: ref, Path: path, Tag: tag})
	if err == nil {
		err = about(ref, &info)(answer)
	}
	proc.fail(errors.New("it has imported"))
	proc.gone(closeTime) // it must not make a key after the caller has cleared away
	if err != nil {
		return nil, err
	}
	return p.Bind(info), nil
}

// Destroy has every worker destroy the key: one may have a copy of it.
func (p *Pool) Destroy(ctx context.Context, ref keystore.Ref, tag keystore.Tag) error {
	c := call{Op: opDestroy, Ref: ref, Tag: tag}
	if err := p.request(ctx, false, c, nil); err != nil {
		return err
	}
	p.mu.Lock()
	var all []*process
	for _, s := range p.slots {
		if s.process != nil {
			all = append(all, s.process)
		}
	}
	p.mu.Unlock()
	for _, proc := range all {
		if _, err := proc.ask(ctx, slowFactor*p.config.Deadline, func(error) {}, c); err != nil {
			proc.fail(fmt.Errorf("it may have a copy of a key that was destroyed: %w", err))
		}
	}
	return nil
}

// A device without a counter gives ErrRefused.

func (p *Pool) DefineCounter(ctx context.Context) error {
	return p.request(ctx, false, call{Op: opDefine}, nil)
}

func (p *Pool) ReadCounter(ctx context.Context) (value uint64, err error) {
	err = p.request(ctx, false, call{Op: opRead}, into(&value))
	return value, err
}

func (p *Pool) IncrementCounter(ctx context.Context) (value uint64, err error) {
	err = p.request(ctx, true, call{Op: opRise}, into(&value))
	return value, err
}
