// Package hsm keeps keys in a PKCS#11 token. Private keys are made inside, or imported once, and never leave. Begin
// reading at Open and at Store.do, through which every use of the token goes.
//
// The module is C code that may be wrong, slow or gone. What fails is tried again on a ladder: a new session, a new
// login, the module initialised anew; handles are found again on each rung. The last rung is not here: a call that hangs
// in the module, or a module that crashes, costs the process. Package worker gives it one of its own and replaces it;
// then contexts bound every wait. Here a context is looked at before the module is entered, and not after.
package hsm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"countersign/internal/keystore"

	"github.com/miekg/pkcs11"
)

// Config names a token. Its zero values are not defaults: the caller decides.
type Config struct {
	URI      string // RFC 7512, which token
	Module   string // the module's shared object, unless the URI has module-path
	PINFile  string // the user's PIN, unless the URI has pin-source
	Sessions int    // operations in flight at the most
	Share    int    // how many processes share the sessions that the token allows
	Quirks   Quirks // what is set here goes before what the module's row in the table says

	// LogIn, where it is set, is called around each login and what leads to it, and decides whether there may be one. A
	// PIN that was refused must not be tried again by any process; and while one process logs in, another that just
	// initialises the module may not see the token (SoftHSM, which writes the token's file then).
	LogIn func(ctx context.Context, logIn func() error) error `json:"-"`
}

// restartPause is how long a module that could not be initialised anew is left alone.
const restartPause = time.Second

// Store is a keystore.Store on one token.
type Store struct {
	config  Config
	uri     tokenURI
	pinFile string
	path    string
	module  *pkcs11.Ctx
	direct  *direct
	quirks  quirks

	// slots holds one entry for each operation that may be in flight: a session that waits for use.
	slots chan session
	open  atomic.Int64 // sessions that are open, the login's not counted

	// using is held for reading during every call into the module, and for writing while the module starts or ends:
	// C_Finalize while another thread signs brings the process down.
	using      sync.RWMutex
	slot       uint   // under using
	generation uint64 // under using; sessions of another generation are dead
	closed     bool   // under using

	// logins counts the logins. A handle of a private object is good for one login; a number of another may be another key.
	logins atomic.Uint64

	recovering  sync.Mutex
	nextRestart time.Time // under recovering: not before
	authFailed  error     // under recovering: a wrong PIN is never tried twice

	login   atomic.Uint64 // the session that keeps the login alive, and copies of keys
	copying sync.Mutex

	handles sync.Map // keystore.Tag -> *handle
}

// session is a PKCS#11 session; one with another generation than the store's is none.
type session struct {
	handle     pkcs11.SessionHandle
	generation uint64
}

// Open loads the module, finds the token and logs in.
func Open(ctx context.Context, c Config) (*Store, error) {
	s, err := load(c)
	if err != nil {
		return nil, err
	}
	// A module may miss a token that another process is just changing (SoftHSM does): it is asked a few times.
	for try := 1; ; try++ {
		err := s.restart(ctx, 0)
		if err == nil {
			break
		}
		if try == 3 || !errors.Is(err, keystore.ErrUnavailable) || ctx.Err() != nil {
			s.unload()
			return nil, err
		}
		time.Sleep(100 * time.Millisecond)
	}
	for range s.sessionLimit() {
		s.slots <- session{}
	}
	return s, nil
}

// load reads the configuration and loads the module, which is not initialised yet.
func load(c Config) (*Store, error) {
	fail := func(format string, args ...any) (*Store, error) { return nil, fmt.Errorf("hsm: "+format, args...) }
	s := &Store{config: c, slots: make(chan session, c.Sessions)}
	var err error
	if s.uri, err = parseURI(c.URI); err != nil {
		return fail("%w", err)
	}
	if err := c.Quirks.Check(); err != nil {
		return fail("%w", err)
	}
	if s.path, err = oneOf("module", c.Module, "module-path", s.uri.module); err != nil {
		return fail("%w", err)
	}
	if s.pinFile, err = oneOf("pin_file", c.PINFile, "pin-source", s.uri.pin); err != nil {
		return fail("%w", err)
	}
	if _, err := readPIN(s.pinFile); err != nil {
		return fail("%w", err)
	}
	if _, err := os.Stat(s.path); err != nil {
		return fail("PKCS#11 module: %w", err)
	}
	if s.module = pkcs11.New(s.path); s.module == nil {
		return fail("%s can't be loaded as a PKCS#11 module", s.path)
	}
	if s.direct, err = loadDirect(s.path); err != nil {
		s.module.Destroy()
		return fail("%w", err)
	}
	return s, nil
}

func (s *Store) unload() {
	s.direct.close()
	s.module.Destroy()
}

func oneOf(field, value, attr, fromURI string) (string, error) {
	if (value == "") == (fromURI == "") {
		return "", fmt.Errorf("exactly one of %s and the URI's %s must be set", field, attr)
	}
	return value + fromURI, nil
}

// sessionLimit is how many operations may be in flight: what the configuration says, or this process' share of what the
// token allows, less the session of the login.
func (s *Store) sessionLimit() int {
	n := s.config.Sessions
	info, err := s.module.GetTokenInfo(s.slot)
	for _, most := range []uint{info.MaxSessionCount, info.MaxRwSessionCount} { // ours are read-write, and count for both
		if err == nil && most != pkcs11.CK_EFFECTIVELY_INFINITE && most != pkcs11.CK_UNAVAILABLE_INFORMATION {
			n = min(n, max(1, int(most)/max(1, s.config.Share)-1))
		}
	}
	return n
}

// restart initialises the module and logs in, unless another caller has done so since the given generation. It waits
// for the calls that are in the module; when one of them hangs, this process has had its time.
func (s *Store) restart(ctx context.Context, since uint64) error {
	s.recovering.Lock()
	defer s.recovering.Unlock()
	if s.authFailed != nil {
		return s.authFailed
	}
	s.using.Lock()
	defer s.using.Unlock()
	if s.closed {
		return errClosed
	} else if s.generation != since {
		return nil
	}
	if since != 0 {
		if time.Now().Before(s.nextRestart) {
			return fmt.Errorf("%w: the token could not be reached a moment ago", keystore.ErrUnavailable)
		}
		s.nextRestart = time.Now().Add(restartPause)
		s.module.Finalize()
		s.open.Store(0)
	}
	err := s.gate(ctx, func() error {
		if err := s.module.Initialize(); err != nil {
			return deviceError("C_Initialize", err)
		}
		info, err := s.module.GetInfo()
		if err != nil {
			err = deviceError("C_GetInfo", err)
		} else if s.slot, err = findSlot(s.module, s.uri); err == nil {
			if s.quirks, err = s.quirksOf(info); err == nil {
				err = s.logIn()
			}
		}
		if err != nil {
			s.module.Finalize()
		}
		return err
	})
	if err == nil {
		s.generation = since + 1
	}
	return err
}

// gate runs what ends in a login. The caller holds recovering.
func (s *Store) gate(ctx context.Context, logIn func() error) error {
	gate := s.config.LogIn
	if gate == nil {
		gate = func(_ context.Context, logIn func() error) error { return logIn() }
	}
	err := gate(ctx, logIn)
	if errors.Is(err, keystore.ErrAuth) {
		s.authFailed = err
	}
	return err
}

// logInAgain logs in where the login has been lost behind our back, unless another caller has done so since. It reports
// whether there is a new login.
func (s *Store) logInAgain(ctx context.Context, since uint64) (bool, error) {
	s.recovering.Lock() // before using, as in restart
	defer s.recovering.Unlock()
	s.using.RLock()
	defer s.using.RUnlock()
	if s.authFailed != nil {
		return false, s.authFailed
	} else if s.closed {
		return false, errClosed
	} else if s.logins.Load() != since {
		return true, nil
	}
	if info, err := s.module.GetSessionInfo(s.loginSession()); err == nil && info.State == pkcs11.CKS_RW_USER_FUNCTIONS {
		return false, nil
	}
	s.module.CloseSession(s.loginSession())
	s.login.Store(0) // the number may be another session's from here on
	return true, s.gate(ctx, s.logIn)
}

// logIn logs in for the whole application, in a session that stays open: the login ends with the last one. The caller
// holds recovering, and using in one way or the other.
func (s *Store) logIn() error {
	login, err := s.module.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return deviceError("C_OpenSession", err)
	}
	s.login.Store(uint64(login))
	pin, err := readPIN(s.pinFile)
	if err != nil {
		return fmt.Errorf("hsm: %w", err)
	}
	s.logins.Add(1) // before the module may give old numbers to new objects
	if err := s.module.Login(login, pkcs11.CKU_USER, pin); err != nil && !isCode(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		return deviceError("C_Login", err)
	}
	return nil
}

func (s *Store) loginSession() pkcs11.SessionHandle { return pkcs11.SessionHandle(s.login.Load()) }

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

// acquire takes a session, which may be none yet. release gives it back.
func (s *Store) acquire(ctx context.Context) (held session, err error) {
	if ctx.Err() == nil {
		select {
		case held = <-s.slots:
			return held, nil
		case <-ctx.Done():
		}
	}
	return held, fmt.Errorf("%w: all sessions are busy: %w", keystore.ErrUnavailable, ctx.Err())
}

func (s *Store) release(held *session) {
	s.slots <- *held
	// A goroutine that goes into C again and again without ever giving way is taken for one that hangs: every 10 ms the
	// runtime takes its processor away, and looks for others to take with all its might for a while after that.
	runtime.Gosched()
}

// once runs use with a session as it is.
func (s *Store) once(ctx context.Context, use func(session) error) error {
	held, err := s.acquire(ctx)
	if err != nil {
		return err
	}
	defer s.release(&held)
	return s.attempt(ctx, &held, use)
}

// do runs use with a session of the token. use may run four times, once on each rung of the ladder: as it is, in a new
// session, after a new login, after the module was initialised anew. What keys do is deterministic or harmless to do
// again, so that is safe; Generate and Import look first at what is there.
func (s *Store) do(ctx context.Context, doing string, use func(session) error) error {
	fail := func(err error) error { return fmt.Errorf("hsm: %s: %w", doing, err) }
	held, err := s.acquire(ctx)
	if err != nil {
		return fail(err)
	}
	defer s.release(&held)
	logins := s.logins.Load()
	err = s.attempt(ctx, &held, use)
	for rung := 1; rung <= 3 && again(err); rung++ {
		if ctx.Err() != nil { // who has left is not worth a new start of the module under all others
			return fail(fmt.Errorf("%w: %w: %v", keystore.ErrUnavailable, ctx.Err(), err))
		}
		switch rung {
		case 2:
			in, failed := s.logInAgain(ctx, logins)
			if errors.Is(failed, keystore.ErrAuth) {
				return fail(failed)
			} else if !in || failed != nil {
				continue // the login was not it
			}
		case 3:
			if failed := s.restart(ctx, held.generation); failed != nil {
				return fail(failed)
			}
		}
		logins = s.logins.Load()
		err = s.attempt(ctx, &held, use)
	}
	if errors.Is(err, errLost) {
		err = fmt.Errorf("%w: %w", keystore.ErrNotFound, err)
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

// errLost says that a key which was there is not: the device or the login may be the reason.
var errLost = errors.New("the key is not on the token any more")

// again reports an error after which a higher rung may help.
func again(err error) bool { return errors.Is(err, keystore.ErrUnavailable) || errors.Is(err, errLost) }

// attempt runs use once. Where the token has no more sessions, it waits for one that another operation is done with, and
// there is one place less for a while. It holds nothing meanwhile: who has that session may need all others to be out of
// the module.
func (s *Store) attempt(ctx context.Context, held *session, use func(session) error) error {
	err := s.enter(ctx, held, use)
	for isCode(err, pkcs11.CKR_SESSION_COUNT) && s.open.Load() > 0 {
		select {
		case *held = <-s.slots:
		case <-ctx.Done():
			return fmt.Errorf("%w: the token has no more sessions: %w", keystore.ErrUnavailable, ctx.Err())
		}
		// The place comes back later: another user of the token may have taken the sessions for a while.
		time.AfterFunc(restartPause, func() { s.slots <- session{} })
		err = s.enter(ctx, held, use)
	}
	return err
}

// enter runs use with a session of the current generation. A session in which something failed is closed.
func (s *Store) enter(ctx context.Context, held *session, use func(session) error) error {
	s.using.RLock()
	defer s.using.RUnlock()
	if s.closed {
		return errClosed
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
	}
	if held.generation != s.generation || held.handle == 0 {
		if err := s.openSession(held); err != nil {
			return err
		}
	}
	logins := s.logins.Load()
	err := use(*held)
	if !errors.Is(err, keystore.ErrUnavailable) && s.logins.Load() != logins {
		err = fmt.Errorf("%w: somebody logged in meanwhile: what it was done with may have been another key", keystore.ErrUnavailable)
	}
	if err != nil {
		s.module.CloseSession(held.handle)
		s.open.Add(-1)
		held.handle = 0
	}
	return err
}

// openSession gives held a session.
func (s *Store) openSession(held *session) error {
	*held = session{0, s.generation}
	s.open.Add(1) // before it is there: who finds the token full meanwhile waits for this one
	handle, err := s.module.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		s.open.Add(-1)
		return deviceError("C_OpenSession", err)
	}
	held.handle = handle
	return nil
}

var errClosed = fmt.Errorf("%w: the store is closed", keystore.ErrUnavailable)

// Close logs out and unloads the module. It waits for the calls that are in it.
func (s *Store) Close() error {
	s.using.Lock()
	defer s.using.Unlock()
	if !s.closed {
		s.closed = true
		s.module.Finalize() // closes all sessions and logs out
		s.unload()
	}
	return nil
}

// Status says whether the module is in use.
func (s *Store) Status() keystore.Status {
	s.recovering.Lock()
	defer s.recovering.Unlock()
	st := keystore.Status{Up: s.authFailed == nil}
	if !st.Up {
		st.Cause = s.authFailed.Error()
	}
	return st
}

func (s *Store) Retry() {
	s.recovering.Lock()
	defer s.recovering.Unlock()
	s.authFailed = nil
}

// deviceError classes what the module answered, once, here.
func deviceError(call string, err error) error {
	class := keystore.ErrUnavailable
	switch {
	case isCode(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LOCKED):
		class = keystore.ErrAuth
	case isCode(err, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED,
		pkcs11.CKR_KEY_TYPE_INCONSISTENT, pkcs11.CKR_KEY_SIZE_RANGE, pkcs11.CKR_DOMAIN_PARAMS_INVALID, ckrCurveNotSupported,
		pkcs11.CKR_FUNCTION_NOT_SUPPORTED, ckrActionProhibited, pkcs11.CKR_DATA_INVALID, pkcs11.CKR_DATA_LEN_RANGE,
		pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID,
		pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_TEMPLATE_INCOMPLETE, pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_TOKEN_WRITE_PROTECTED):
		class = keystore.ErrRefused // it is about what was asked, not about the device's state
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
