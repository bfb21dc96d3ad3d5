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
	"sync/atomic"
	"time"

	"countersign/internal/escrow"
	"countersign/internal/keystore"
)

// call is the body of a request frame: an infrequent operation, in JSON.
type call struct {
	Op        string             `json:"op"` // one of the op constants
	Ref       keystore.Ref       `json:"ref,omitzero"`
	Algorithm keystore.Algorithm `json:"algorithm,omitempty"`
	Tag       keystore.Tag       `json:"tag,omitzero"`
	Path      string             `json:"path,omitempty"`
	Prove     bool               `json:"prove,omitempty"`
	Owner     keystore.Owner     `json:"owner,omitzero"` // of a counter
	Infos     []keystore.Info    `json:"infos,omitempty"`
	Holders   escrow.Set         `json:"holders,omitzero"`
	Envelope  []byte             `json:"envelope,omitempty"`
	Shares    []string           `json:"shares,omitempty"` // only from a process for recoveries
}

// sealed is the answer of opSeal.
type sealed struct {
	Info     keystore.Info `json:"info"`
	Envelope []byte        `json:"envelope"`
}

const (
	opKey, opKeys, opCompare       = "key", "keys", "compare"
	opGenerate                     = "generate"
	opImport, opDestroy, opInspect = "import", "destroy", "inspect"
	opSeal, opOpen                 = "seal", "open"
	opTry                          = "try the journal"
	opRecords                      = "records"
	opDefine, opRead, opIncrement  = "define counter", "read counter", "rise counter"
	opUndefine, opEvict            = "undefine counter", "evict storage root"
)

// LogIn asks for permission to log in to the device and runs logIn if permission is granted; see
// hsm.Config. A denied login gives keystore.ErrAuth. lastTry permits a login with one try left.
type LogIn func(ctx context.Context, logIn func(lastTry bool) error) error

// closeTimeout is the time for closing a device. Afterwards the process ends without closing.
const closeTimeout = 2 * time.Second

// Serve is a key worker's main loop: Serve opens a store and serves calls until the pool closes the
// socket. socket comes from Config.Start. open opens the store and must wrap each login in gate.
// lanes is the number of signatures, or of batches, made in parallel. The process must exit when
// Serve returns, whatever the device is doing.
func Serve(
	socket *os.File,
	open func(ctx context.Context, gate LogIn) (store keystore.Store, lanes int, err error),
) error {
	p, err := newPipe(socket)
	if err != nil {
		return fmt.Errorf("key worker: its socket: %w", err)
	}
	socket.Close()
	w := &server{
		pipe: p, signQueue: make(chan signing, maxQueue),
		keys: map[uint32]keystore.Key{}, logins: map[uint64]chan grant{},
	}
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
				store, lanes, err := open(ctx, w.logIn)
				w.mu.Lock()
				w.store = store
				w.mu.Unlock()
				for range lanes {
					go w.lane(ctx, lanes)
				}
				w.answer(id, nil, err)
				w.tellJournal()
			})
		case loginReply:
			w.mu.Lock()
			reply := w.logins[id]
			w.mu.Unlock()
			if reply != nil {
				answer := denied
				if len(body) == 1 {
					answer = grant(body[0])
				}
				reply <- answer
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
				w.signQueue <- signing{id, keystore.Signing{Key: key, Message: body[4:]}}
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

// maxQueue is the capacity of the queue of signatures, above the calls in flight of any pool.
const maxQueue = 1024

// server is the state of Serve.
type server struct {
	pipe      *pipe
	keys      map[uint32]keystore.Key // by number; only the reading goroutine uses the map
	signQueue chan signing

	told    atomic.Int64 // time of the last frame journaled, Unix nanoseconds
	opening sync.WaitGroup
	loginMu sync.Mutex // held during a login: the pool grants one at a time

	mu        sync.Mutex
	store     keystore.Store        // under mu until hello is answered, constant afterwards
	logins    map[uint64]chan grant // under mu: login requests without a reply, by id
	lastLogin uint64                // under mu: id of the last login request
}

// signing is a signature to make, with the id of its sign frame.
type signing struct {
	id uint64
	keystore.Signing
}

// lane makes signatures in batches, in parallel with the other lanes, and sends the answers of a
// batch in one write. With n signatures in the queue, a batch has 1 + (n-1)/(2*lanes), less than
// the lane's share. A larger batch could make one signature after another while other lanes idle.
func (w *server) lane(ctx context.Context, lanes int) {
	for {
		var batch []signing
		select {
		case s := <-w.signQueue:
			batch = append(batch, s)
		case <-ctx.Done():
			return
		}
		for range (len(w.signQueue) - 1) / (2 * lanes) {
			select {
			case s := <-w.signQueue:
				batch = append(batch, s)
			default: // another lane was faster
			}
		}
		w.sign(ctx, batch)
		for _, s := range batch {
			w.enqueueAnswer(s.id, s.Signature, s.Err)
		}
		w.pipe.flush()
		w.tellJournal()
	}
}

// journalEvery is the time between two tellings of the journal's size.
const journalEvery = 5 * time.Second

// tellJournal tells the pool the size of the journal, at most every journalEvery. Only a key worker
// can: the daemon may have no right to the journal.
func (w *server) tellJournal() {
	journal, ok := w.store.(interface{ JournalSize() (uint64, error) })
	last, now := w.told.Load(), time.Now().UnixNano()
	if !ok || last != 0 && now-last < int64(journalEvery) || !w.told.CompareAndSwap(last, now) {
		return
	}
	if size, err := journal.JournalSize(); err == nil {
		w.pipe.send(size, journaled)
	}
}

// sign sets Signature or Err of each element, with one call to the store if the store can batch.
func (w *server) sign(ctx context.Context, batch []signing) {
	if store, ok := w.store.(keystore.BatchSigner); ok {
		all := make([]*keystore.Signing, len(batch))
		for i := range batch {
			all[i] = &batch[i].Signing
		}
		store.SignBatch(ctx, all)
		return
	}
	for i := range batch {
		s := &batch[i]
		s.Signature, s.Err = s.Key.Sign(ctx, s.Message, nil)
	}
}

// answer sends an answer. An error of the pipe also reaches the reading goroutine, which ends
// Serve.
func (w *server) answer(id uint64, body []byte, err error) {
	w.enqueueAnswer(id, body, err)
	w.pipe.flush()
}

// enqueueAnswer enqueues an answer for the next flush. In place of an answer above maxFrame the
// pool gets a failure, or the pool would wait until the deadline.
func (w *server) enqueueAnswer(id uint64, body []byte, err error) {
	if err == nil {
		err = w.pipe.enqueue(id, result, body)
	}
	if err != nil {
		w.pipe.enqueue(id, failure, encodeError(err))
	}
}

// do carries out the operation of a request frame and encodes its answer.
func (w *server) do(ctx context.Context, c call) ([]byte, error) {
	var answer any
	var err error
	var key keystore.Key
	switch c.Op {
	case opKey:
		key, err = w.store.Key(ctx, c.Ref)
	case opKeys:
		answer, err = w.store.Keys(ctx)
	case opCompare:
		var faults []error
		faults, err = w.store.Compare(ctx, c.Infos)
		answer = encodeErrors(faults)
	case opGenerate:
		key, err = w.store.Generate(ctx, c.Ref, c.Algorithm, c.Tag)
	case opImport:
		key, err = w.store.Import(ctx, c.Ref, c.Path, c.Tag)
	case opSeal:
		answer, err = w.seal(ctx, c)
	case opOpen:
		key, err = w.open(ctx, c)
	case opDestroy:
		err = w.store.Destroy(ctx, c.Ref, c.Tag)
	case opInspect:
		answer, err = w.store.Inspect(ctx, c.Prove)
	case opTry:
		if store, ok := w.store.(interface{ TryJournal() error }); ok {
			err = store.TryJournal()
		}
	case opRecords:
		if store, ok := w.store.(keystore.Recorder); ok {
			answer, err = store.Records(ctx, c.Path)
		}
	case opDefine, opRead, opIncrement, opUndefine:
		answer, err = w.counterOp(ctx, c.Op, c.Owner)
	case opEvict:
		err = fmt.Errorf("%w: this device has no storage root key", keystore.ErrRefused)
		if store, ok := w.store.(keystore.Rooted); ok {
			err = store.EvictStorageRoot(ctx)
		}
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

// counterOp carries out an operation of a monotonic counter.
func (w *server) counterOp(ctx context.Context, op string, owner keystore.Owner) (value uint64, err error) {
	counter, ok := w.store.(keystore.Counter)
	switch {
	case !ok:
		err = fmt.Errorf("%w: this device has no counter", keystore.ErrRefused)
	case op == opDefine:
		err = counter.DefineCounter(ctx, owner)
	case op == opUndefine:
		err = counter.UndefineCounter(ctx, owner)
	case op == opRead:
		value, err = counter.ReadCounter(ctx, owner)
	default:
		value, err = counter.IncrementCounter(ctx, owner)
	}
	return value, err
}

// logIn is the LogIn of the worker. The pool grants the login or denies the login: another worker
// may know of a wrong PIN, and a further attempt could lock the token.
func (w *server) logIn(ctx context.Context, logIn func(lastTry bool) error) error {
	w.loginMu.Lock()
	defer w.loginMu.Unlock()
	reply := make(chan grant, 1)
	w.mu.Lock()
	w.lastLogin++
	id := w.lastLogin
	w.logins[id] = reply
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		delete(w.logins, id)
		w.mu.Unlock()
	}()
	if err := w.pipe.send(id, loginRequest); err != nil {
		return fmt.Errorf("%w: %w", keystore.ErrUnavailable, err)
	}
	var answer grant
	select {
	case answer = <-reply:
		if answer == denied {
			return fmt.Errorf("%w: a login was refused before", keystore.ErrAuth) // the pool knows more
		}
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
	}
	err := logIn(answer == grantedLastTry)
	var refused []byte
	if errors.Is(err, keystore.ErrAuth) {
		refused = encodeError(err)
	}
	w.pipe.send(id, loginEnded, refused)
	return err
}

// close waits until the device is open and closes the device, for at most closeTimeout in all. A
// process killed during a login can leave its token broken: SoftHSM's token file is half written
// then.
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
	case <-time.After(closeTimeout):
	}
}
