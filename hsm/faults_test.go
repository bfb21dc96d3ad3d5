package hsm_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/hsm"
	"countersign/internal/keystore"

	"github.com/miekg/pkcs11"
)

// TestEveryCode injects each return value once into each call. The operation succeeds if a retry
// can help, and the store closes the session of the failed call.
func TestEveryCode(t *testing.T) {
	codes := map[string]uint{
		"CKR_HOST_MEMORY":               0x02,
		"CKR_SLOT_ID_INVALID":           0x03,
		"CKR_GENERAL_ERROR":             0x05,
		"CKR_FUNCTION_FAILED":           0x06,
		"CKR_CANT_LOCK":                 0x0a,
		"CKR_DEVICE_ERROR":              0x30,
		"CKR_DEVICE_MEMORY":             0x31,
		"CKR_DEVICE_REMOVED":            0x32,
		"CKR_FUNCTION_CANCELED":         0x50,
		"CKR_KEY_HANDLE_INVALID":        0x60,
		"CKR_OBJECT_HANDLE_INVALID":     0x82,
		"CKR_OPERATION_ACTIVE":          0x90,
		"CKR_OPERATION_NOT_INITIALIZED": 0x91,
		"CKR_SESSION_CLOSED":            0xb0,
		"CKR_SESSION_COUNT":             0xb1,
		"CKR_SESSION_HANDLE_INVALID":    0xb3,
		"CKR_TOKEN_NOT_PRESENT":         0xe0,
		"CKR_TOKEN_NOT_RECOGNIZED":      0xe1,
		"CKR_USER_NOT_LOGGED_IN":        0x101,
		"CKR_BUFFER_TOO_SMALL":          0x150,
		"CKR_CRYPTOKI_NOT_INITIALIZED":  0x190,
		"CKR_MUTEX_BAD":                 0x1a0,
		"CKR_VENDOR_DEFINED":            0x80000001,
	}
	refused := map[string]uint{ // a retry can't help
		"CKR_ARGUMENTS_BAD":              0x07,
		"CKR_ACTION_PROHIBITED":          0x1b,
		"CKR_DATA_INVALID":               0x20,
		"CKR_DATA_LEN_RANGE":             0x21,
		"CKR_FUNCTION_NOT_SUPPORTED":     0x54,
		"CKR_KEY_SIZE_RANGE":             0x62,
		"CKR_KEY_TYPE_INCONSISTENT":      0x63,
		"CKR_KEY_FUNCTION_NOT_PERMITTED": 0x68,
		"CKR_MECHANISM_INVALID":          0x70,
		"CKR_MECHANISM_PARAM_INVALID":    0x71,
		"CKR_DOMAIN_PARAMS_INVALID":      0x130,
		"CKR_CURVE_NOT_SUPPORTED":        0x140,
	}
	s := newShim(t, 1)
	store := open(t, s.config)
	defer store.Close()
	signing := generate(t, store, "payments", keystore.Ed25519)
	exchange := generate(t, store, "noise", keystore.X25519)
	use := func(function int) error {
		if function == deriveKey {
			_, err := exchange.Exchange(t.Context(), [32]byte{9})
			return err
		}
		sig, err := signing.Sign(t.Context(), []byte("m"), nil)
		if err == nil && !signing.Info().Verify([]byte("m"), sig) {
			t.Error("a wrong signature")
		}
		return err
	}
	began := s.count(initialize)
	for _, of := range []map[string]uint{codes, refused} {
		for _, name := range slices.Sorted(maps.Keys(of)) {
			for _, function := range []int{signInit, sign, deriveKey, openSession} {
				if function == openSession {
					s.closeSessions(store)
				}
				before := len(s.calls())
				s.inject(fault{function: function, kind: "code", argument: of[name], count: 1})
				err := use(function)
				_, definite := refused[name]
				if definite != errors.Is(err, keystore.ErrRefused) || !definite && err != nil {
					t.Errorf("%s of function %d: %v", name, function, err)
				}
				calls := s.calls()[before:]
				met := slices.IndexFunc(calls, func(c call) bool {
					return c.function == function && c.code == int(of[name])
				})
				if met < 0 {
					t.Fatalf("%s of function %d was not met", name, function)
				}
				if function != openSession && !slices.Contains(calls[met:], call{closeSession, calls[met].session, 0}) {
					t.Errorf("%s of function %d: session %d was not closed", name, function, calls[met].session)
				}
				if err := use(function); err != nil {
					t.Errorf("after %s of function %d: %v", name, function, err)
				}
				if n := s.openSessions(); n != 2 {
					t.Errorf("after %s of function %d: %d sessions are open", name, function, n)
				}
			}
		}
	}
	if n := s.count(initialize); n != began {
		t.Errorf("the module was initialised %d times for errors that a new session mends", n-began)
	}
	s.inject(fault{function: sign, kind: "code", argument: ckrDeviceError, count: 2})
	if err := use(sign); err != nil || s.count(initialize) != began+1 {
		t.Errorf("an error that only a new start mends: %v, %d starts", err, s.count(initialize)-began)
	}
}

// TestSessionLimit checks that the store opens no more sessions than this process's share of the
// token's session limit.
func TestSessionLimit(t *testing.T) {
	s := newShim(t, 8)
	for _, tc := range []struct {
		most        string // ulMaxSessionCount and ulMaxRwSessionCount; 0 is CK_EFFECTIVELY_INFINITE
		share, want int
	}{
		{"0 0", 1, 8},
		{"18446744073709551615 18446744073709551615", 1, 8}, // CK_UNAVAILABLE_INFORMATION
		{"18446744073709551614 18446744073709551614", 2, 8}, // openCryptoki 3.8
		{"18446744073709551614 9", 2, 3},
		{"100 100", 2, 8},
		{"9 0", 1, 8},
		{"9 9", 2, 3},
		{"0 5", 1, 4},
		{"64 5", 1, 4},
		{"4 4", 4, 1},
		{"1 1", 1, 1},
	} {
		t.Setenv("SHIM_MOST", tc.most)
		c := s.config
		c.Share = tc.share
		store := open(t, c)
		if n := store.IdleSessions(); n != tc.want {
			t.Errorf("%q shared by %d: %d places, want %d", tc.most, tc.share, n, tc.want)
		}
		store.Close()
	}
	t.Setenv("SHIM_MOST", "4 4")
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.inject(fault{function: openSession, kind: "limit", argument: 4})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() { signs(t, key) })
	}
	wg.Wait()
	if n := s.count(openSession, ckrSessionCount); n != 0 {
		t.Errorf("the token's limit was met %d times", n)
	}
}

// TestSessionsTaken has another program use most of the token's sessions. The store's operations
// wait for one another. Later the other program closes its sessions, and the store is back at four
// concurrent operations.
func TestSessionsTaken(t *testing.T) {
	s := newShim(t, 4)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.closeSessions(store)
	limit := fault{function: openSession, kind: "limit", argument: 2}
	s.inject(limit, fault{function: signInit, kind: "held", count: 1})
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() { signs(t, key) })
	}
	eventually(t, "one signs and three wait for its session", func() bool {
		return s.count(signInit, isHeld) == 1 && s.count(openSession, ckrSessionCount) == 3
	})
	s.inject(limit)
	wg.Wait()
	if n := s.openSessions(); n != 2 {
		t.Errorf("%d sessions", n)
	}

	s.inject()
	eventually(t, "all places are back", func() bool { return store.IdleSessions() == 4 })
	s.inject(fault{function: signInit, kind: "held"})
	for range 4 {
		wg.Go(func() { signs(t, key) })
	}
	eventually(t, "four sign at the same time", func() bool { return s.count(signInit, isHeld) == 1+4 })
	s.inject()
	wg.Wait()
}

// TestNoSession checks that an operation fails at once, rather than wait, if another program has
// all of the token's sessions.
func TestNoSession(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.closeSessions(store)
	s.inject(fault{function: openSession, kind: "limit", argument: 1})
	if _, err := key.Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("%v, want %v", err, keystore.ErrUnavailable)
	}
	s.inject()
	signs(t, key)
}

// TestWaitingForASessionHoldsNothingUp has one operation wait for the token's only session. The
// owner of the session must re-initialise the module meanwhile, without a deadlock.
func TestWaitingForASessionHoldsNothingUp(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.closeSessions(store)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	limit := fault{function: openSession, kind: "limit", argument: 2}
	s.inject(limit, fault{function: signInit, kind: "held", argument: ckrDeviceError, count: 1})
	var wg sync.WaitGroup
	sign := func() {
		if _, err := key.Sign(ctx, []byte("m"), nil); err != nil {
			t.Error(err)
		}
	}
	wg.Go(sign)
	eventually(t, "one signs", func() bool { return s.count(signInit, isHeld) == 1 })
	wg.Go(sign)
	eventually(t, "one waits", func() bool { return s.count(openSession, ckrSessionCount) == 1 })
	s.inject(limit, fault{function: signInit, kind: "code", argument: ckrDeviceError, count: 1})
	wg.Wait()
	if n := s.count(initialize); n != 2 {
		t.Errorf("the module was initialised %d times", n)
	}
}

// TestCallerLeaves checks that the store does not retry or re-initialise the module for a caller
// with a cancelled context.
func TestCallerLeaves(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.inject(fault{function: signInit, kind: "held", argument: ckrDeviceError, count: 1})
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		_, err := key.Sign(ctx, []byte("m"), nil)
		failed <- err
	}()
	eventually(t, "it signs", func() bool { return s.count(signInit, isHeld) == 1 })
	cancel()
	s.inject()
	if err := <-failed; !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("%v, want %v", err, keystore.ErrUnavailable)
	}
	if n := s.count(initialize); n != 1 {
		t.Errorf("the module was initialised %d times", n)
	}
	signs(t, key)
}

// TestWrongPINCostsOneLogin counts the C_Login calls, as the token does: a token locks a PIN after
// a few wrong ones.
func TestWrongPINCostsOneLogin(t *testing.T) {
	s := newShim(t, 4)
	write(t, s.config.PINFile, "wrong-pin\n")
	if _, err := hsm.Open(t.Context(), s.config); !errors.Is(err, keystore.ErrAuth) {
		t.Fatalf("%v, want %v", err, keystore.ErrAuth)
	}
	if n := s.count(login); n != 1 {
		t.Errorf("Open logged in %d times with a wrong PIN", n)
	}
	write(t, s.config.PINFile, "test-user-pin\n")
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	before := s.count(login)
	write(t, s.config.PINFile, "wrong-pin\n")
	store.LogOut()
	refused := func() {
		t.Helper()
		var wg sync.WaitGroup
		for i := range 32 {
			wg.Go(func() {
				var err error
				if i%2 == 0 {
					_, err = key.Sign(t.Context(), []byte("m"), nil)
				} else {
					ref := keystore.Ref{Name: "other", Version: uint32(i)}
					_, err = store.Generate(t.Context(), ref, keystore.X25519, keystore.Tag{byte(i)})
				}
				if !errors.Is(err, keystore.ErrAuth) {
					t.Errorf("%v, want %v", err, keystore.ErrAuth)
				}
			})
		}
		wg.Wait()
		if n := s.count(login) - before; n != 1 {
			t.Errorf("%d logins with a wrong PIN", n)
		}
	}
	refused()
	// A re-initialisation would help against this error, and must not happen after a wrong PIN.
	s.inject(fault{function: signInit, kind: "code", argument: ckrDeviceError})
	refused()
	s.inject()
	write(t, s.config.PINFile, "test-user-pin\n")
	refused()
	if st := store.Status(); st.Up || st.Cause == "" {
		t.Errorf("status: %+v", st)
	}
	store.Retry()
	signs(t, key)
	if n := s.count(login) - before; n != 2 {
		t.Errorf("%d logins after Retry, want one more", n)
	}
}

// TestAlreadyLoggedIn has the token drop the login session but not the login, because another
// session keeps the login alive.
func TestAlreadyLoggedIn(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.inject(fault{function: signInit, kind: "held", count: 1})
	var wg sync.WaitGroup
	wg.Go(func() { signs(t, key) })
	eventually(t, "a second session is needed", func() bool { return s.count(signInit, isHeld) == 1 })
	signs(t, key)
	s.inject()
	wg.Wait()
	// Before the second CKR_DEVICE_ERROR the store searches the key again, with one call of
	// C_GetSessionInfo. The second call is the check of the login session.
	s.inject(fault{function: signInit, kind: "code", argument: ckrDeviceError, count: 2},
		fault{function: getSessionInfo, kind: "code", argument: 0xb3, count: 1, skip: 1})
	signs(t, key)
	if in, starts := s.count(login, ckrAlreadyLoggedIn), s.count(initialize); in != 1 || starts != 1 {
		t.Errorf("CKR_USER_ALREADY_LOGGED_IN was met %d times, and the module initialised %d times", in, starts)
	}
	signs(t, key)
	if n := s.openSessions(); n > 3 {
		t.Errorf("%d sessions are open", n)
	}
}

// TestLoggedOutIsNotGone checks that a lost login is not taken for a missing key: the token hides
// private objects without a login.
func TestLoggedOutIsNotGone(t *testing.T) {
	c := newToken(t)
	store := open(t, c)
	ref := generate(t, store, "payments", keystore.Ed25519).Info().Ref
	tag := keystore.Tag{}
	copy(tag[:], "payments")
	store.LogOut()
	if _, err := store.Key(t.Context(), ref); err != nil {
		t.Errorf("Key: %v", err)
	}
	store.LogOut()
	if infos, err := store.Keys(t.Context()); err != nil || len(infos) != 1 {
		t.Errorf("Keys: %v, %v", infos, err)
	}
	store.LogOut()
	if err := store.Destroy(t.Context(), ref, tag); err != nil {
		t.Errorf("Destroy: %v", err)
	}
	store.Close()
	raw(t, c, func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
		if err := m.FindObjectsInit(s, nil); err != nil {
			t.Fatal(err)
		}
		if left, _, err := m.FindObjects(s, 10); err != nil || len(left) != 0 {
			t.Errorf("Destroy has left %d objects, %v", len(left), err)
		}
	})
}

// TestLostKeysCostThemselves destroys two of three keys and goes on using all three. A lost key is
// keystore.ErrNotFound at each use, and never a fault of the device: each has the module
// initialised once at the most, and the third key signs.
func TestLostKeysCostThemselves(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	good := generate(t, store, "good", keystore.Ed25519)
	var lost []keystore.Key
	for _, name := range []string{"payments", "invoices"} {
		key := generate(t, store, name, keystore.Ed25519)
		signs(t, key)
		if err := store.Destroy(t.Context(), key.Info().Ref, key.Info().Tag); err != nil {
			t.Fatal(err)
		}
		lost = append(lost, key)
	}
	began := s.count(initialize)
	for range 20 {
		for _, key := range lost {
			_, err := key.Sign(t.Context(), []byte("m"), nil)
			if !errors.Is(err, keystore.ErrNotFound) || errors.Is(err, keystore.ErrUnavailable) {
				t.Fatalf("%v: %v, want %v", key.Info().Ref, err, keystore.ErrNotFound)
			}
			if _, err := store.Key(t.Context(), key.Info().Ref); !errors.Is(err, keystore.ErrNotFound) {
				t.Fatalf("%v: %v, want %v", key.Info().Ref, err, keystore.ErrNotFound)
			}
			signs(t, good)
		}
	}
	if n := s.count(initialize) - began; n > len(lost) {
		t.Errorf("the module was initialised %d times for %d lost keys", n, len(lost))
	}
	generate(t, store, "payments", keystore.Ed25519)
}

// TestTriesOfThePIN opens tokens that tell how many tries of the PIN are left. The PIN is not tried
// on the last try without an operator's permission, and not at all once the PIN is locked; the
// error is keystore.ErrLastTry. Inspect tells of a wrong PIN before.
func TestTriesOfThePIN(t *testing.T) {
	const getTokenInfo = 6
	for _, c := range []struct {
		name      string
		flags     uint
		permitted bool
		opens     bool
	}{
		{"all tries", 0, false, true},
		{"some tries", pkcs11.CKF_USER_PIN_COUNT_LOW, false, true},
		{"the last try", pkcs11.CKF_USER_PIN_COUNT_LOW | pkcs11.CKF_USER_PIN_FINAL_TRY, false, false},
		{"the last try, permitted", pkcs11.CKF_USER_PIN_COUNT_LOW | pkcs11.CKF_USER_PIN_FINAL_TRY, true, true},
		{"locked", pkcs11.CKF_USER_PIN_LOCKED, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newShim(t, 1)
			s.inject(fault{function: getTokenInfo, kind: "flags", argument: c.flags})
			s.config.LogIn = func(_ context.Context, logIn func(lastTry bool) error) error { return logIn(c.permitted) }
			store, err := hsm.Open(t.Context(), s.config)
			logins := s.count(login)
			if !c.opens {
				if !errors.Is(err, keystore.ErrLastTry) || !errors.Is(err, keystore.ErrAuth) || logins > 0 {
					t.Fatalf("%v, want %v; %d logins", err, keystore.ErrLastTry, logins)
				}
				return
			}
			if err != nil || logins != 1 {
				t.Fatalf("%v, %d logins", err, logins)
			}
			defer store.Close()
			found, err := store.Inspect(t.Context(), false)
			if err != nil {
				t.Fatal(err)
			}
			low := slices.ContainsFunc(found, func(f keystore.Finding) bool {
				return f.What == "pin" && strings.Contains(f.Text, "CKF_USER_PIN_COUNT_LOW")
			})
			if low != (c.flags != 0) {
				t.Errorf("%+v", found)
			}
		})
	}
}

// TestRefusedMeanwhile invalidates a handle between the cache and the module. By the time of the
// call the number denotes another key, and the module's refusal is about the other key.
func TestRefusedMeanwhile(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	signs(t, key)
	s.inject(fault{function: signInit, kind: "held", argument: ckrTypeInconsistent, count: 1})
	var wg sync.WaitGroup
	wg.Go(func() { signs(t, key) })
	eventually(t, "it signs", func() bool { return s.count(signInit, isHeld) == 1 })
	store.LogOut()
	signs(t, key) // logs in
	s.inject()
	wg.Wait()
}

// TestAmbiguous makes a second object with a key's label or CKA_ID. A search finding both objects
// must use neither of them: byRef is the error of a search by label, byBound of a search by CKA_ID.
func TestAmbiguous(t *testing.T) {
	ours := keystore.Tag{}
	copy(ours[:], "payments")
	other := keystore.Tag{9}
	for _, tc := range []struct {
		name           string
		label          string
		id             keystore.Tag
		keep           uint // class of the additional object; 0 for one of each class
		byRef, byBound error
	}{
		{"same label, other CKA_ID", "countersign/payments/1", other, 0, keystore.ErrAmbiguous, nil},
		{"same label and CKA_ID", "countersign/payments/1", ours, 0, keystore.ErrAmbiguous, keystore.ErrAmbiguous},
		{"a second private object", "countersign/payments/1", ours, pkcs11.CKO_PRIVATE_KEY,
			keystore.ErrAmbiguous, keystore.ErrAmbiguous},
		{"a second public object", "countersign/payments/1", ours, pkcs11.CKO_PUBLIC_KEY, nil, nil},
		{"same CKA_ID, other label", "countersign/refunds/1", ours, 0, nil, keystore.ErrAmbiguous},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newToken(t)
			store := open(t, c)
			info := generate(t, store, "payments", keystore.Ed25519).Info()
			store.Close()
			raw(t, c, func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
				common := []*pkcs11.Attribute{
					attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, tc.label),
					attr(pkcs11.CKA_ID, tc.id[:]), attr(pkcs11.CKA_KEY_TYPE, 0x40),
				}
				public := append([]*pkcs11.Attribute{attr(pkcs11.CKA_EC_PARAMS, ed25519OID)}, common...)
				private := append([]*pkcs11.Attribute{
					attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_EXTRACTABLE, false),
					attr(pkcs11.CKA_PRIVATE, true),
				}, common...)
				pub, prv, err := m.GenerateKeyPair(s, edwardsKeygen, public, private)
				switch tc.keep {
				case pkcs11.CKO_PRIVATE_KEY:
					err = errors.Join(err, m.DestroyObject(s, pub))
				case pkcs11.CKO_PUBLIC_KEY:
					err = errors.Join(err, m.DestroyObject(s, prv))
				}
				if err != nil {
					t.Fatal(err)
				}
			})
			store = open(t, c)
			defer store.Close()
			if _, err := store.Key(t.Context(), payments); !errors.Is(err, tc.byRef) {
				t.Errorf("Key: %v, want %v", err, tc.byRef)
			}
			sig, err := store.Bind(info).Sign(t.Context(), []byte("m"), nil)
			if !errors.Is(err, tc.byBound) || err == nil && !info.Verify([]byte("m"), sig) {
				t.Errorf("Sign: %v, want %v", err, tc.byBound)
			}
		})
	}
}

// TestBatchMeetsAFault checks that a fault at one signature of a batch is not reported for another
// one, and that the signatures stay in the order of the batch.
func TestBatchMeetsAFault(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	keys := []keystore.Key{
		generate(t, store, "payments", keystore.Ed25519), generate(t, store, "refunds", keystore.Ed25519),
		generate(t, store, "tls", keystore.P256),
	}
	const size = 20 // more than the 16 of one call from Go to C
	batch := func(what string) (failed []int, why error) {
		t.Helper()
		var all []*keystore.Signing
		for i := range size {
			all = append(all, &keystore.Signing{Key: keys[i%len(keys)], Message: fmt.Appendf(nil, "%s %d", what, i)})
		}
		store.SignBatch(t.Context(), all)
		for i, b := range all {
			if b.Err != nil {
				failed, why = append(failed, i), b.Err
			} else if !b.Key.Info().Verify(b.Message, b.Signature) {
				t.Errorf("%s: number %d does not verify", what, i)
			}
		}
		return failed, why
	}
	if failed, err := batch("no fault"); err != nil {
		t.Fatal(failed, err)
	}
	before := s.count(sign)
	if _, err := batch("in one go"); err != nil || s.count(sign)-before != size {
		t.Fatalf("%v, %d calls", err, s.count(sign)-before)
	}
	for _, at := range []int{0, 1, 7, 15, 16, size - 1} {
		for _, f := range []fault{
			{function: sign, kind: "short"},
			{function: sign, kind: "code", argument: ckrDeviceError},
			{function: signInit, kind: "code", argument: ckrDeviceError},
			{function: signInit, kind: "code", argument: ckrMechanismInvalid},
			{function: signInit, kind: "logout"},
		} {
			f.count, f.skip = 1, at
			s.inject(f)
			what := fmt.Sprintf("%+v", f)
			before := s.count(sign) + s.count(signInit)
			// The fault happens once. The store then makes each signature by itself.
			if failed, err := batch(what); err != nil {
				t.Errorf("%s: %v failed: %v", what, failed, err)
			}
			if n := s.count(sign) + s.count(signInit) - before; n <= 2*size {
				t.Errorf("%s was not met", what)
			}
		}
		// A second fault hits exactly one signature: the first one made by itself.
		s.inject(fault{function: signInit, kind: "code", argument: ckrMechanismInvalid, count: 2, skip: at})
		failed, err := batch(fmt.Sprintf("refused at %d", at))
		if !slices.Equal(failed, []int{0}) || !errors.Is(err, keystore.ErrRefused) {
			t.Errorf("refused at %d: %v failed, %v", at, failed, err)
		}
	}
	s.inject()
	if n := s.openSessions(); n > 3 {
		t.Errorf("%d sessions are open", n)
	}
}

// TestBatchesWhileLoginsComeAndGo invalidates the handles of keys during batches.
func TestBatchesWhileLoginsComeAndGo(t *testing.T) {
	c := newToken(t)
	store := open(t, c)
	defer store.Close()
	keys := []keystore.Key{
		generate(t, store, "payments", keystore.Ed25519), generate(t, store, "refunds", keystore.Ed25519),
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for g := range 3 {
		wg.Go(func() {
			for round := 0; ; round++ {
				select {
				case <-done:
					return
				default:
				}
				var all []*keystore.Signing
				for i := range 8 {
					message := fmt.Appendf(nil, "%d %d %d", g, round, i)
					all = append(all, &keystore.Signing{Key: keys[i%2], Message: message})
				}
				store.SignBatch(t.Context(), all)
				for _, b := range all {
					ok := b.Err == nil && b.Key.Info().Verify(b.Message, b.Signature)
					if !ok && !errors.Is(b.Err, keystore.ErrUnavailable) {
						t.Errorf("%v: %v, or it does not verify", b.Key.Info().Ref, b.Err)
					}
				}
			}
		})
	}
	for range 10 {
		store.LogOut()
		eventually(t, "it signs", func() bool {
			sig, err := keys[0].Sign(t.Context(), []byte("m"), nil)
			return err == nil && keys[0].Info().Verify([]byte("m"), sig)
		})
	}
	close(done)
	wg.Wait()
}
