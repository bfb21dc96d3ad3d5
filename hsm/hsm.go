// Package hsm keeps keys in a PKCS#11 token (PKCS#11 v3.0 mechanisms for edwards and montgomery curves). Private keys
// are made inside and never leave. Begin reading at Open and at Store.do, through which every use of the token goes.
//
// The module is C code that may be wrong, slow or gone. No call waits for it longer than its context; a session that
// failed is closed; when that does not help, the module is initialised anew, and handles are found again. What this
// package can't do in the process that it runs in is survive a crash of the module.
package hsm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"countersign/keystore"

	"github.com/miekg/pkcs11"
)

// Config names a token. Its zero values are not defaults: the caller decides.
type Config struct {
	URI         string            // RFC 7512, which token
	Module      string            // the module's shared object, unless the URI has module-path
	PINFile     string            // the user's PIN, unless the URI has pin-source
	Environment map[string]string // set before the module is loaded: modules are configured that way
	Sessions    int               // operations in flight at the most
}

// recoverEvery bounds how often a token that does not answer is asked to begin anew; busyPause does where a call that
// hangs in the module kept that from happening. drainTime is how long such a call is waited for.
const (
	recoverEvery = time.Second
	busyPause    = 10 * time.Second
	drainTime    = 2 * time.Second
)

// Store is a keystore.Store on one token.
type Store struct {
	uri     tokenURI
	pinFile string
	module  *pkcs11.Ctx

	// slots holds one entry for each operation that may be in flight: a session that waits for use.
	slots chan session

	// using is held for reading during every call into the module, and for writing while the module starts or ends:
	// C_Finalize while another thread signs brings the process down.
	using      sync.RWMutex
	slot       uint   // under using
	generation uint64 // under using; sessions and handles of another generation are dead
	closed     bool   // under using

	// gate, where it is set, is closed when a restart of the module has ended: nobody begins a call before.
	gate atomic.Pointer[chan struct{}]

	recovering  sync.Mutex
	nextRecover time.Time // under recovering: not before
	authFailed  error     // under recovering: a wrong PIN is never tried twice
}

// session is a PKCS#11 session; one with another generation than the store's is none.
type session struct {
	handle     pkcs11.SessionHandle
	generation uint64
}

// Open loads the module, finds the token and logs in.
func Open(ctx context.Context, c Config) (*Store, error) {
	uri, pinFile, module, err := load(c)
	if err != nil {
		return nil, err
	}
	s := &Store{uri: uri, pinFile: pinFile, module: module, slots: make(chan session, c.Sessions)}
	for range c.Sessions {
		s.slots <- session{}
	}
	// The module may hang in its first call too.
	opened := make(chan error, 1)
	go func() { opened <- s.start(ctx) }()
	select {
	case err := <-opened:
		if err != nil {
			s.module.Destroy()
			return nil, err
		}
		return s, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("hsm: %w: the module does not come back from its start: %w", keystore.ErrUnavailable, ctx.Err())
	}
}

// start initialises the module for the first time. A module may miss a token that another process is just changing
// (SoftHSM does): it is asked a few times.
func (s *Store) start(ctx context.Context) error {
	for try := 1; ; try++ {
		err := s.restart(0)
		if err == nil || try == 3 || !errors.Is(err, keystore.ErrUnavailable) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// load reads the configuration and loads the module, which is not initialised yet.
func load(c Config) (uri tokenURI, pinFile string, module *pkcs11.Ctx, err error) {
	fail := func(format string, args ...any) (tokenURI, string, *pkcs11.Ctx, error) {
		return tokenURI{}, "", nil, fmt.Errorf("hsm: "+format, args...)
	}
	if uri, err = parseURI(c.URI); err != nil {
		return fail("%w", err)
	}
	path, err := oneOf("module", c.Module, "module-path", uri.module)
	if err != nil {
		return fail("%w", err)
	}
	if pinFile, err = oneOf("pin_file", c.PINFile, "pin-source", uri.pin); err != nil {
		return fail("%w", err)
	}
	if _, err := readPIN(pinFile); err != nil {
		return fail("%w", err)
	}
	if _, err := os.Stat(path); err != nil {
		return fail("PKCS#11 module: %w", err)
	}
	for name, value := range c.Environment {
		if err := os.Setenv(name, value); err != nil {
			return fail("environment %s: %w", name, err)
		}
	}
	if module = pkcs11.New(path); module == nil {
		return fail("%s can't be loaded as a PKCS#11 module", path)
	}
	return uri, pinFile, module, nil
}

func oneOf(field, value, attr, fromURI string) (string, error) {
	if (value == "") == (fromURI == "") {
		return "", fmt.Errorf("exactly one of %s and the URI's %s must be set", field, attr)
	}
	return value + fromURI, nil
}

// restart initialises the module and logs in, unless another caller has done so since the given generation.
func (s *Store) restart(since uint64) error {
	s.recovering.Lock()
	defer s.recovering.Unlock()
	if s.authFailed != nil {
		return s.authFailed
	}
	s.using.RLock()
	current, closed := s.generation, s.closed
	s.using.RUnlock()
	if closed {
		return errClosed
	} else if current != since {
		return nil
	}
	if since != 0 && time.Now().Before(s.nextRecover) {
		return fmt.Errorf("hsm: %w: the token could not be reached a moment ago", keystore.ErrUnavailable)
	}
	gate := make(chan struct{})
	s.gate.Store(&gate)
	defer func() { s.gate.Store(nil); close(gate) }()
	if !s.lockModule() {
		s.nextRecover = time.Now().Add(busyPause)
		return fmt.Errorf("hsm: %w: another call has not come back from the module", keystore.ErrUnavailable)
	}
	defer s.using.Unlock()
	s.nextRecover = time.Now().Add(recoverEvery)
	if s.closed {
		return errClosed
	}
	if since != 0 {
		s.module.Finalize() // not the first time: this process may use the module elsewhere
	}
	if err := s.module.Initialize(); err != nil {
		return deviceError("C_Initialize", err)
	}
	if err := s.logIn(); err != nil {
		s.module.Finalize()
		return err
	}
	s.generation = since + 1
	return nil
}

// lockModule waits until no call is in the module, but not for ever: one that hangs must not stop those that don't. The
// gate keeps new ones from beginning meanwhile.
func (s *Store) lockModule() bool {
	for deadline := time.Now().Add(drainTime); !s.using.TryLock(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// logIn finds the token and logs in for the whole application. The caller holds recovering, and using for writing.
func (s *Store) logIn() error {
	slot, err := findSlot(s.module, s.uri)
	if err != nil {
		return err
	}
	// Login holds for all sessions of the application, and ends with the last one: this one stays open until C_Finalize.
	login, err := s.module.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return deviceError("C_OpenSession", err)
	}
	pin, err := readPIN(s.pinFile)
	if err != nil {
		return fmt.Errorf("hsm: %w", err)
	}
	if err := s.module.Login(login, pkcs11.CKU_USER, pin); err != nil && !isCode(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		err = deviceError("C_Login", err)
		if errors.Is(err, keystore.ErrAuth) {
			s.authFailed = err
		}
		return err
	}
	s.slot = slot
	return nil
}

func findSlot(module *pkcs11.Ctx, uri tokenURI) (uint, error) {
	ids, err := module.GetSlotList(true)
	if err != nil {
		return 0, deviceError("C_GetSlotList", err)
	}
	var found []uint
	for _, id := range ids {
		info, err := module.GetTokenInfo(id)
		if err == nil && info.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 && uri.matches(id, info) {
			found = append(found, id)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return 0, fmt.Errorf("hsm: %w: %w %q (%d tokens are present); look with: pkcs11-tool --module MODULE --list-slots",
			keystore.ErrUnavailable, ErrNoToken, uri.text, len(ids))
	}
	return 0, fmt.Errorf("hsm: %d tokens match %q; name one by its serial", len(found), uri.text)
}

// do runs use with a session of the token and waits no longer than ctx. The module may keep the session longer than
// that; it comes back into use when the module does.
//
// When ctx has ended, nothing new begins; what has begun goes on behind it.
//
// use may run three times: after a failure that is the device's, with a new session, and then with the module started
// anew. What keys do is deterministic, so that is safe; Generate looks first at what is there.
func (s *Store) do(ctx context.Context, doing string, use func(session) error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("hsm: %s: %w: %w", doing, keystore.ErrUnavailable, ctx.Err())
	}
	var held session
	select {
	case held = <-s.slots:
	case <-ctx.Done():
		return fmt.Errorf("hsm: %s: %w: all sessions are busy: %w", doing, keystore.ErrUnavailable, ctx.Err())
	}
	done := make(chan error, 1)
	go func() {
		defer func() { s.slots <- held }()
		err := s.attempt(ctx, &held, use)
		if errors.Is(err, keystore.ErrUnavailable) { // a new session and fresh handles may do
			err = s.attempt(ctx, &held, use)
			if err != nil && ctx.Err() == nil { // whatever it is: without a login a key seems not to be there
				if again := s.restart(held.generation); again != nil {
					err = again
				} else {
					err = s.attempt(ctx, &held, use)
				}
			}
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("hsm: %s: %w", doing, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("hsm: %s: %w: the device has not come back: %w", doing, keystore.ErrUnavailable, ctx.Err())
	}
}

// attempt runs use once, with a session of the current generation. A session in which something failed is closed.
func (s *Store) attempt(ctx context.Context, held *session, use func(session) error) error {
	if gate := s.gate.Load(); gate != nil {
		select {
		case <-*gate:
		case <-ctx.Done():
		}
	}
	s.using.RLock()
	defer s.using.RUnlock()
	if s.closed {
		return errClosed
	}
	if ctx.Err() != nil { // the caller has been told already that it failed
		return fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
	}
	if held.generation != s.generation || held.handle == 0 {
		held.generation = s.generation
		var err error
		if held.handle, err = s.module.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION); err != nil {
			held.handle = 0
			return deviceError("C_OpenSession", err)
		}
	}
	err := use(*held)
	if errors.Is(err, keystore.ErrUnavailable) {
		s.module.CloseSession(held.handle)
		held.handle = 0
	}
	return err
}

var errClosed = fmt.Errorf("%w: the store is closed", keystore.ErrUnavailable)

// closeWait bounds how long Close waits for calls that the module does not come back from.
const closeWait = 5 * time.Second

// Close logs out and unloads the module. Where the module hangs in a call, it is left as it is and the error says so.
func (s *Store) Close() error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.using.Lock()
		defer s.using.Unlock()
		if !s.closed {
			s.closed = true
			s.module.Finalize() // closes all sessions and logs out
			s.module.Destroy()
		}
	}()
	select {
	case <-done:
		return nil
	case <-time.After(closeWait):
		return errors.New("hsm: close: the module does not come back from a call")
	}
}

// deviceError classes what the module answered, once, here.
func deviceError(call string, err error) error {
	class := keystore.ErrUnavailable
	if isCode(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED,
		pkcs11.CKR_PIN_LOCKED) {
		class = keystore.ErrAuth
	}
	if isCode(err, pkcs11.CKR_USER_PIN_NOT_INITIALIZED) {
		return fmt.Errorf("%w: %s: %w", class, call, ErrNoUserPIN)
	}
	return fmt.Errorf("%w: %s: %w", class, call, err)
}

// What InitToken can mend.
var (
	ErrNoToken   = errors.New("no token matches")
	ErrNoUserPIN = errors.New("the token has no user PIN yet")
)

func isCode(err error, codes ...uint) bool {
	var e pkcs11.Error
	if !errors.As(err, &e) {
		return false
	}
	for _, c := range codes {
		if uint(e) == c {
			return true
		}
	}
	return false
}
