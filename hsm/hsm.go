// Package hsm implements keystore.Store on a PKCS#11 token. Private keys are generated in the token
// or imported once, and never leave the token. Begin reading at Open and at Store.withSession, the
// path of every use of the token.
//
// The module is C code and may be faulty, slow or absent. A failed operation is retried after a
// recovery step, at most three times: a new session, a new login, a re-initialised module. Object
// handles are looked up again after each step.
//
// Package hsm can't recover from a call hanging in the module or from a crash of the module: both
// cost the process. Package worker runs the module in a process of its own, replaces the process
// and bounds every wait by a context. Package hsm checks a context before a call into the module
// and never during the call.
package hsm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"countersign/internal/keystore"

	"github.com/miekg/pkcs11"
)

// Config names a token. Zero values are not defaults: the caller sets every field on purpose.
type Config struct {
	URI      string // the token, RFC 7512
	Module   string // path of the module's shared object, unless the URI has module-path
	PINFile  string // path of the file with the user PIN, unless the URI has pin-source
	Sessions int    // limit of concurrent operations
	Share    int    // number of processes sharing the token's session limit
	Quirks   Quirks // overrides of the token's row in knownTokens

	Parameters string // given to the module in pReserved of CK_C_INITIALIZE_ARGS; "": a null pointer

	// LogIn wraps each login together with the calls before the login, and may refuse the login.
	// Nil allows every login. LogIn has two purposes. A refused PIN must not be tried again by any
	// process. One process at a time may log in: SoftHSM rewrites the token's file at a login, and
	// another process initialising its module at the same time may miss the token.
	//
	// lastTry permits a login with one try left until the token locks.
	LogIn func(ctx context.Context, logIn func(lastTry bool) error) error `json:"-"`
}

// restartBackoff is the least time between two re-initialisations of the module.
const restartBackoff = time.Second

// errRestarted refuses a re-initialisation so soon after the last one.
var errRestarted = fmt.Errorf("%w: the last initialisation of the module was less than %v ago",
	keystore.ErrUnavailable, restartBackoff)

// Store is a keystore.Store on one token.
type Store struct {
	config  Config
	uri     tokenURI
	pinFile string
	path    string
	module  *pkcs11.Ctx
	direct  *direct
	quirks  quirks

	// sessions is the pool of idle sessions: one entry for each operation allowed in flight. An
	// entry may be the zero session, to be opened at its first use.
	sessions chan session
	open     atomic.Int64 // number of open sessions, without the login session

	// moduleMu is read-locked during every call into the module and write-locked while the module
	// is initialised or finalised: C_Finalize during another thread's C_Sign crashes the process.
	moduleMu   sync.RWMutex
	slot       uint   // guarded by moduleMu
	generation uint64 // guarded by moduleMu; sessions of an earlier generation are invalid
	closed     bool   // guarded by moduleMu

	// logins counts the logins. The handle of a private object is valid during one login. After
	// the next login the same number may denote another key.
	logins atomic.Uint64

	recoverMu   sync.Mutex
	nextRestart time.Time // guarded by recoverMu; no re-initialisation before this time
	authFailed  error     // guarded by recoverMu; set once the token has refused the PIN

	triesLow atomic.Bool // a wrong PIN was tried before the last login (CKF_USER_PIN_COUNT_LOW)

	login  atomic.Uint64 // handle of the login session; owner of the login and of copied keys
	copyMu sync.Mutex    // held during C_CopyObject in the login session

	handles sync.Map // keystore.Tag -> *handle
	seen    sync.Map // keystore.Tag -> seen
}

// session is a PKCS#11 session. A session of an earlier generation than the store's is invalid.
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
	// SoftHSM misses a token while another process rewrites the token's file: try three times.
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
		s.sessions <- session{}
	}
	return s, nil
}

// load checks the configuration and loads the module without initialising the module.
func load(c Config) (*Store, error) {
	fail := func(format string, args ...any) (*Store, error) { return nil, fmt.Errorf("hsm: "+format, args...) }
	s := &Store{config: c, sessions: make(chan session, c.Sessions)}
	var err error
	if s.uri, err = parseURI(c.URI); err != nil {
		return fail("%w", err)
	}
	if err := c.Quirks.Check(); err != nil {
		return fail("%w", err)
	}
	if s.path, err = exactlyOne("module", c.Module, "module-path", s.uri.module); err != nil {
		return fail("%w", err)
	}
	if s.pinFile, err = exactlyOne("pin_file", c.PINFile, "pin-source", s.uri.source); err != nil {
		return fail("%w", err)
	}
	pin, err := readPIN(s.pinFile)
	if err != nil {
		return fail("%w", err)
	}
	pin.Wipe()
	if _, err := os.Stat(s.path); err != nil {
		return fail("PKCS#11 module: %w", err)
	}
	if s.module, s.direct, err = loadModule(s.path); err != nil {
		return fail("%w", err)
	}
	return s, nil
}

func (s *Store) unload() {
	s.direct.close()
	s.module.Destroy()
}

// exactlyOne returns the setting of a configuration field or of its URI attribute, and an error for
// none or both.
func exactlyOne(field, value, attr, fromURI string) (string, error) {
	if (value == "") == (fromURI == "") {
		return "", fmt.Errorf("exactly one of %s and the URI's %s must be set", field, attr)
	}
	return value + fromURI, nil
}

// sessionLimit returns the limit of concurrent operations: Config.Sessions, or less if this
// process's share of the token's session limit is smaller. The share includes the login session.
// Example: 9 sessions shared by 2 processes give 9/2 - 1 = 3 operations.
func (s *Store) sessionLimit() int {
	n := uint(s.config.Sessions)
	info, err := s.module.GetTokenInfo(s.slot)
	// The store's sessions are read-write and count against both limits. CK_UNAVAILABLE_INFORMATION
	// and the 2^64-2 of openCryptoki are no limits either, as large as they are.
	for _, most := range []uint{info.MaxSessionCount, info.MaxRwSessionCount} {
		if err == nil && most != pkcs11.CK_EFFECTIVELY_INFINITE {
			n = min(n, max(2, most/uint(max(1, s.config.Share)))-1)
		}
	}
	return int(n)
}

// restart initialises the module and logs in, unless another caller has done so since the given
// generation. restart waits for the end of all calls into the module. A hanging call blocks restart
// until package worker ends the process.
func (s *Store) restart(ctx context.Context, since uint64) error {
	s.recoverMu.Lock()
	defer s.recoverMu.Unlock()
	if s.authFailed != nil {
		return s.authFailed
	}
	s.moduleMu.Lock()
	defer s.moduleMu.Unlock()
	if s.closed {
		return errClosed
	} else if s.generation != since {
		return nil
	}
	if since != 0 {
		if time.Now().Before(s.nextRestart) {
			return errRestarted
		}
		s.nextRestart = time.Now().Add(restartBackoff)
		s.module.Finalize()
		s.open.Store(0)
	}
	err := s.guardedLogIn(ctx, func(lastTry bool) error {
		if err := s.direct.initialize(s.config.Parameters); err != nil {
			return err
		}
		slot, token, err := findSlot(s.module, s.uri)
		if err == nil {
			s.slot, s.quirks = slot, s.quirksOf(token)
			err = s.logIn(lastTry)
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

// PINPath is the path of the file with the user PIN, or "" for a faulty configuration.
func (c Config) PINPath() string {
	uri, err := parseURI(c.URI)
	if err != nil {
		return c.PINFile
	}
	return cmp.Or(c.PINFile, uri.source)
}

// ModulePath is the path of the module, or "" for a faulty configuration.
func (c Config) ModulePath() string {
	uri, err := parseURI(c.URI)
	if err != nil {
		return c.Module
	}
	return cmp.Or(c.Module, uri.module)
}

// guardedLogIn runs a login through Config.LogIn and remembers a refused PIN. The caller holds
// recoverMu.
func (s *Store) guardedLogIn(ctx context.Context, logIn func(lastTry bool) error) (err error) {
	if s.config.LogIn != nil {
		err = s.config.LogIn(ctx, logIn)
	} else {
		err = logIn(false)
	}
	if errors.Is(err, keystore.ErrAuth) {
		s.authFailed = err
	}
	return err
}

// logInAgain logs in if the token has dropped the login, unless another caller has logged in since.
// The first result reports a new login.
func (s *Store) logInAgain(ctx context.Context, since uint64) (bool, error) {
	s.recoverMu.Lock() // before moduleMu, as in restart
	defer s.recoverMu.Unlock()
	s.moduleMu.RLock()
	defer s.moduleMu.RUnlock()
	if s.authFailed != nil {
		return false, s.authFailed
	} else if s.closed {
		return false, errClosed
	} else if s.logins.Load() != since {
		return true, nil
	}
	info, err := s.module.GetSessionInfo(s.loginSession())
	if err == nil && info.State == pkcs11.CKS_RW_USER_FUNCTIONS {
		return false, nil
	}
	s.module.CloseSession(s.loginSession())
	s.login.Store(0) // the module may give the number to another session from here on
	return true, s.guardedLogIn(ctx, s.logIn)
}

// logIn logs in for all sessions of the process. The login session stays open, since the token ends
// the login with the last open session. The caller holds recoverMu, and moduleMu for reading or
// writing.
func (s *Store) logIn(lastTry bool) error {
	if err := s.checkTries(lastTry); err != nil {
		return err
	}
	login, err := s.module.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return deviceError("C_OpenSession", err)
	}
	s.login.Store(uint64(login))
	pin, err := readPIN(s.pinFile)
	if errors.Is(err, fs.ErrPermission) {
		// The file was replaced, and the sandbox has the right to the former file only. A new key
		// worker has the right to the new one.
		return fmt.Errorf("hsm: %w: %w", keystore.ErrUnavailable, err)
	} else if err != nil {
		return fmt.Errorf("hsm: %w", err)
	}
	s.logins.Add(1) // before C_Login: from then on the module may reuse old handles for other objects
	err = s.module.Login(login, pkcs11.CKU_USER, string(pin.Expose()))
	pin.Wipe()
	if err != nil && !isCode(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
		return deviceError("C_Login", err)
	}
	return nil
}

// checkTries refuses a login that the token would not take, or that could lock the token: a PIN
// file is not always right, and an operator may still know the PIN. Flags of a token are read, not
// believed: a token without counts sets none.
func (s *Store) checkTries(lastTry bool) error {
	info, err := s.module.GetTokenInfo(s.slot)
	if err != nil {
		return deviceError("C_GetTokenInfo", err)
	}
	s.triesLow.Store(info.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0)
	switch {
	case info.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return fmt.Errorf("hsm: %w: the user PIN is locked (CKF_USER_PIN_LOCKED); the security officer sets a new "+
			"one: pkcs11-tool --module MODULE --login --login-type so --init-pin", keystore.ErrLastTry)
	case info.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0 && !lastTry:
		return fmt.Errorf("hsm: %w: one more wrong PIN locks the token (CKF_USER_PIN_FINAL_TRY), so the PIN is not "+
			"tried; make sure of the PIN file, then run countersign admin token retry, "+
			"or countersignd check --retry-pin", keystore.ErrLastTry)
	}
	return nil
}

func (s *Store) loginSession() pkcs11.SessionHandle { return pkcs11.SessionHandle(s.login.Load()) }

// findSlot returns the slot of the one initialised token that matches uri.
func findSlot(module *pkcs11.Ctx, uri tokenURI) (uint, pkcs11.TokenInfo, error) {
	ids, err := module.GetSlotList(true)
	if err != nil {
		return 0, pkcs11.TokenInfo{}, deviceError("C_GetSlotList", err)
	}
	var found []uint
	var token pkcs11.TokenInfo
	for _, id := range ids {
		info, err := module.GetTokenInfo(id)
		if err != nil || info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		if slot, err := module.GetSlotInfo(id); err == nil && uri.matches(id, slot, info) {
			found, token = append(found, id), info
		}
	}
	switch len(found) {
	case 1:
		return found[0], token, nil
	case 0:
		return 0, token, fmt.Errorf("hsm: %w: %w %q (tokens present: %d); "+
			"look with: pkcs11-tool --module MODULE --list-slots",
			keystore.ErrUnavailable, ErrNoToken, uri.text, len(ids))
	}
	return 0, token, fmt.Errorf("hsm: %d tokens match %q; name one by its serial", len(found), uri.text)
}

// acquire takes a session from the pool; the session may not be open yet. release gives the session
// back.
func (s *Store) acquire(ctx context.Context) (held session, err error) {
	if ctx.Err() == nil {
		select {
		case held = <-s.sessions:
			return held, nil
		case <-ctx.Done():
		}
	}
	return held, fmt.Errorf("%w: all sessions are busy: %w", keystore.ErrUnavailable, ctx.Err())
}

func (s *Store) release(held *session) {
	s.sessions <- *held
	// The runtime takes a goroutine for hanging if the goroutine calls C in a loop without
	// yielding. Every 10 ms the runtime then takes the goroutine's processor away, and its monitor
	// polls at the highest rate for a while. Gosched avoids both.
	runtime.Gosched()
}

// withSessionOnce runs use with a session of the token, without recovery.
func (s *Store) withSessionOnce(ctx context.Context, use func(session) error) error {
	held, err := s.acquire(ctx)
	if err != nil {
		return err
	}
	defer s.release(&held)
	return s.attempt(ctx, &held, use)
}

// withSession runs use with a session of the token, at most four times: in a pooled session, in a
// new session, after a new login, and after a re-initialisation of the module. A retry is safe:
// operations with keys are deterministic or idempotent, and Generate and Import check first for
// existing objects.
func (s *Store) withSession(ctx context.Context, operation string, use func(session) error) error {
	fail := func(err error) error { return fmt.Errorf("hsm: %s: %w", operation, err) }
	held, err := s.acquire(ctx)
	if err != nil {
		return fail(err)
	}
	defer s.release(&held)
	logins := s.logins.Load()
	err = s.attempt(ctx, &held, use)
	for step := 1; step <= 3 && retryable(err); step++ {
		// A caller gone by now does not justify re-initialising the module under all other callers.
		if ctx.Err() != nil {
			return fail(fmt.Errorf("%w: %w: %v", keystore.ErrUnavailable, ctx.Err(), err))
		}
		switch step {
		case 1: // a new session: enter has closed the failed one
		case 2:
			loggedIn, failed := s.logInAgain(ctx, logins)
			if errors.Is(failed, keystore.ErrAuth) {
				return fail(failed)
			} else if !loggedIn || failed != nil {
				continue // the login is not the cause
			}
		case 3:
			failed := s.restart(ctx, held.generation)
			if errors.Is(err, errLost) && errors.Is(failed, errRestarted) {
				continue // a module this new does not lose keys: the key is missing, the device works
			} else if failed != nil {
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

// errLost reports a key missing from the token although the key was there before. The cause may be
// a fault of the device or a lost login, so recovery may help.
var errLost = errors.New("the key is not on the token any more")

// retryable reports whether a further recovery step may help.
func retryable(err error) bool {
	return errors.Is(err, keystore.ErrUnavailable) || errors.Is(err, errLost)
}

// attempt runs use once. If the token has no session left, attempt waits for the session of another
// operation; the pool is one entry smaller for a while. attempt holds no lock during the wait,
// because the other operation may need the write lock to re-initialise the module.
func (s *Store) attempt(ctx context.Context, held *session, use func(session) error) error {
	err := s.enter(ctx, held, use)
	for isCode(err, pkcs11.CKR_SESSION_COUNT) && s.open.Load() > 0 {
		select {
		case *held = <-s.sessions:
		case <-ctx.Done():
			return fmt.Errorf("%w: the token has no more sessions: %w", keystore.ErrUnavailable, ctx.Err())
		}
		// Restore the pool's entry later: another program may hold the token's sessions for a
		// while.
		time.AfterFunc(restartBackoff, func() { s.sessions <- session{} })
		err = s.enter(ctx, held, use)
	}
	return err
}

// enter runs use with a session of the current generation. A failure closes the session.
func (s *Store) enter(ctx context.Context, held *session, use func(session) error) error {
	s.moduleMu.RLock()
	defer s.moduleMu.RUnlock()
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
		// The handle may have denoted another key by the time of the call.
		err = errNewLogin
	}
	if err != nil {
		s.module.CloseSession(held.handle)
		s.open.Add(-1)
		held.handle = 0
	}
	return err
}

// errNewLogin reports a login during a call: the object handle may have denoted another key.
var errNewLogin = fmt.Errorf("%w: a new login has invalidated the key's handle", keystore.ErrUnavailable)

// openSession opens a session of the current generation.
func (s *Store) openSession(held *session) error {
	*held = session{0, s.generation}
	// Count the session before C_OpenSession: an operation finding the token full at the same time
	// then waits for this session rather than fail.
	s.open.Add(1)
	handle, err := s.module.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		s.open.Add(-1)
		return deviceError("C_OpenSession", err)
	}
	held.handle = handle
	return nil
}

var errClosed = fmt.Errorf("%w: the store is closed", keystore.ErrUnavailable)

// Close logs out and unloads the module, after the end of all calls into the module.
func (s *Store) Close() error {
	s.moduleMu.Lock()
	defer s.moduleMu.Unlock()
	if !s.closed {
		s.closed = true
		s.module.Finalize() // closes all sessions and logs out
		s.unload()
	}
	return nil
}

// Status reports whether the token accepts the PIN.
func (s *Store) Status() keystore.Status {
	s.recoverMu.Lock()
	defer s.recoverMu.Unlock()
	st := keystore.Status{Up: s.authFailed == nil}
	if !st.Up {
		st.Cause = s.authFailed.Error()
	}
	return st
}

// Retry allows the next login after a refused PIN.
func (s *Store) Retry() {
	s.recoverMu.Lock()
	defer s.recoverMu.Unlock()
	s.authFailed = nil
}

// deviceError maps a return value of the module to the keystore's error classes. No other place
// does so.
func deviceError(call string, err error) error {
	class := keystore.ErrUnavailable
	switch {
	case isCode(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE,
		pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LOCKED):
		class = keystore.ErrAuth
	case isCode(err, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID,
		pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_KEY_TYPE_INCONSISTENT, pkcs11.CKR_KEY_SIZE_RANGE,
		pkcs11.CKR_DOMAIN_PARAMS_INVALID, ckrCurveNotSupported, pkcs11.CKR_FUNCTION_NOT_SUPPORTED,
		ckrActionProhibited, pkcs11.CKR_DATA_INVALID, pkcs11.CKR_DATA_LEN_RANGE,
		pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID,
		pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_TEMPLATE_INCOMPLETE, pkcs11.CKR_TEMPLATE_INCONSISTENT,
		pkcs11.CKR_TOKEN_WRITE_PROTECTED):
		class = keystore.ErrRefused // the request is at fault, not the device's state: a retry can't help
	}
	if isCode(err, pkcs11.CKR_USER_PIN_NOT_INITIALIZED) {
		return fmt.Errorf("%w: %s: %w", class, call, ErrNoUserPIN)
	}
	return fmt.Errorf("%w: %s: %w", class, call, err)
}

// Errors of Open for which InitToken is the remedy.
var (
	ErrNoToken   = errors.New("no token matches")
	ErrNoUserPIN = errors.New("the token has no user PIN yet")
)

func isCode(err error, codes ...uint) bool {
	var e pkcs11.Error
	return errors.As(err, &e) && slices.Contains(codes, uint(e))
}
