package worker

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"countersign/internal/keystore"
)

// call is a request that is not frequent.
type call struct {
	Op        string             `json:"op"`
	Ref       keystore.Ref       `json:"ref,omitzero"`
	Algorithm keystore.Algorithm `json:"algorithm,omitempty"`
	Tag       keystore.Tag       `json:"tag,omitzero"`
	Path      string             `json:"path,omitempty"`
}

const (
	opKey, opKeys, opGenerate   = "key", "keys", "generate"
	opImport, opDestroy, opLook = "import", "destroy", "inspect"
	opDefine, opRead, opRise    = "define counter", "read counter", "rise counter"
)

// LogIn decides whether there may be a login, and runs it; see hsm.Config.
type LogIn func(ctx context.Context, logIn func() error) error

// closeTime is how long a device may take to be closed before the process ends all the same.
const closeTime = 2 * time.Second

// Serve is the key worker: it opens a store and serves it until the pool closes the socket. socket is descriptor 3 of a
// process that a Pool has started. open opens the store with the configuration that the pool sends; lanes is how many
// signatures, or batches of them, are made at the same time. The process must end when Serve returns, whatever the device
// is doing.
func Serve(socket *os.File, open func(ctx context.Context, config []byte, gate LogIn) (store keystore.Store, lanes int, err error)) error {
	p, err := newPipe(socket)
	if err != nil {
		return fmt.Errorf("key worker: descriptor 3: %w", err)
	}
	socket.Close()
	w := &server{pipe: p, keys: map[uint32]keystore.Key{}, signings: make(chan signing, maxQueue), logins: map[uint64]chan bool{}}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for {
		id, k, body, err := p.receive()
		switch {
		case errors.Is(err, io.EOF):
			cancel()
			w.close()
			return nil
		case err != nil:
			return fmt.Errorf("key worker: %w", err)
		}
		switch k {
		case hello:
			w.opening.Go(func() {
				store, lanes, err := open(ctx, body, w.logIn)
				w.mu.Lock()
				w.store = store
				w.mu.Unlock()
				for range lanes {
					go w.lane(ctx, lanes)
				}
				w.answer(id, nil, err)
			})
		case mayLogin:
			w.mu.Lock()
			answer := w.logins[id]
			w.mu.Unlock()
			if answer != nil {
				answer <- len(body) == 1 && body[0] == 1
			}
		case bind:
			var info keystore.Info
			if err := json.Unmarshal(body, &info); err != nil {
				return fmt.Errorf("key worker: bind: %w", err)
			}
			w.keys[uint32(id)] = w.store.Bind(info)
		case sign, exchange:
			if len(body) < 4 {
				return fmt.Errorf("key worker: a request of %d bytes", len(body))
			}
			key := w.keys[binary.BigEndian.Uint32(body)]
			if key == nil {
				return errors.New("key worker: a key that was not bound")
			}
			if k == sign {
				w.signings <- signing{id, keystore.Signing{Key: key, Message: body[4:]}}
				continue
			}
			go func() {
				var peer [32]byte
				copy(peer[:], body[4:])
				shared, err := key.Exchange(ctx, peer)
				w.answer(id, shared[:], err)
			}()
		case request:
			var c call
			if err := json.Unmarshal(body, &c); err != nil {
				return fmt.Errorf("key worker: %w", err)
			}
			go func() {
				answer, err := w.do(ctx, c)
				w.answer(id, answer, err)
			}()
		default:
			return fmt.Errorf("key worker: a frame of kind %d", k)
		}
	}
}

// maxQueue is more signatures than a pool sends at once.
const maxQueue = 1024

type server struct {
	pipe     *pipe
	keys     map[uint32]keystore.Key // the reader's
	signings chan signing

	opening   sync.WaitGroup
	loggingIn sync.Mutex // the pool gives leave for one login at a time

	mu     sync.Mutex
	store  keystore.Store       // under mu until hello is answered
	logins map[uint64]chan bool // under mu: who waits for leave
	asked  uint64               // under mu
}

type signing struct {
	id uint64
	keystore.Signing
}

// lane makes signatures, one of so many lanes. It takes its part of what waits, so that it never does one after another
// what another lane could do meanwhile, and sends the answers together.
func (w *server) lane(ctx context.Context, lanes int) {
	for {
		var some []signing
		select {
		case s := <-w.signings:
			some = append(some, s)
		case <-ctx.Done():
			return
		}
		for range (len(w.signings) - 1) / (2 * lanes) {
			select {
			case s := <-w.signings:
				some = append(some, s)
			default: // another lane was faster
			}
		}
		w.sign(ctx, some)
		for _, s := range some {
			w.put(s.id, s.Signature, s.Err)
		}
		w.pipe.flush()
	}
}

func (w *server) sign(ctx context.Context, some []signing) {
	if store, ok := w.store.(keystore.BatchSigner); ok {
		all := make([]*keystore.Signing, len(some))
		for i := range some {
			all[i] = &some[i].Signing
		}
		store.SignBatch(ctx, all)
		return
	}
	for i := range some {
		s := &some[i]
		s.Signature, s.Err = s.Key.Sign(ctx, s.Message, nil)
	}
}

// answer sends an answer; an error of the pipe is seen by the reader.
func (w *server) answer(id uint64, body []byte, err error) {
	w.put(id, body, err)
	w.pipe.flush()
}

func (w *server) put(id uint64, body []byte, err error) {
	if err != nil {
		w.pipe.put(id, failure, encodeError(err))
		return
	}
	if err := w.pipe.put(id, result, body); err != nil { // it is too long: the pool must not wait for it
		w.pipe.put(id, failure, encodeError(err))
	}
}

func (w *server) do(ctx context.Context, c call) ([]byte, error) {
	var answer any
	var err error
	var key keystore.Key
	switch c.Op {
	case opKey:
		key, err = w.store.Key(ctx, c.Ref)
	case opKeys:
		answer, err = w.store.Keys(ctx)
	case opGenerate:
		key, err = w.store.Generate(ctx, c.Ref, c.Algorithm, c.Tag)
	case opImport:
		key, err = w.store.Import(ctx, c.Ref, c.Path, c.Tag)
	case opDestroy:
		err = w.store.Destroy(ctx, c.Ref, c.Tag)
	case opLook:
		answer, err = w.store.Inspect(ctx)
	case opDefine, opRead, opRise:
		answer, err = w.count(ctx, c.Op)
	default:
		err = fmt.Errorf("key worker: there is no operation %q", c.Op)
	}
	if err != nil {
		return nil, err
	}
	if key != nil {
		answer = key.Info()
	}
	return json.Marshal(answer)
}

func (w *server) count(ctx context.Context, op string) (value uint64, err error) {
	counter, ok := w.store.(keystore.Counter)
	switch {
	case !ok:
		err = fmt.Errorf("%w: this device has no counter", keystore.ErrRefused)
	case op == opDefine:
		err = counter.DefineCounter(ctx)
	case op == opRead:
		value, err = counter.ReadCounter(ctx)
	default:
		value, err = counter.IncrementCounter(ctx)
	}
	return value, err
}

// logIn asks the pool for leave, since a PIN that another worker has found to be wrong must not be tried again.
func (w *server) logIn(ctx context.Context, logIn func() error) error {
	w.loggingIn.Lock()
	defer w.loggingIn.Unlock()
	answer := make(chan bool, 1)
	w.mu.Lock()
	w.asked++
	id := w.asked
	w.logins[id] = answer
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		delete(w.logins, id)
		w.mu.Unlock()
	}()
	if err := w.pipe.send(id, askLogin); err != nil {
		return fmt.Errorf("%w: %w", keystore.ErrUnavailable, err)
	}
	select {
	case may := <-answer:
		if !may {
			return fmt.Errorf("%w: it was refused before and is not tried again until an operator says so", keystore.ErrAuth)
		}
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
	}
	err := logIn()
	var refused []byte
	if errors.Is(err, keystore.ErrAuth) {
		refused = encodeError(err)
	}
	w.pipe.send(id, loggedIn, refused)
	return err
}

// close ends what the device is at, for a bounded time. A module that is cut off while it logs in can leave its token
// broken (SoftHSM, whose token file is half written then).
func (w *server) close() {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		w.opening.Wait()
		w.mu.Lock()
		store := w.store
		w.mu.Unlock()
		if store != nil {
			store.Close()
		}
	}()
	select {
	case <-closed:
	case <-time.After(closeTime):
	}
}
