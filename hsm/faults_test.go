package hsm_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"countersign/hsm"
	"countersign/internal/keystore"

	"github.com/miekg/pkcs11"
)

// TestEveryCode injects each return value once into each call: where doing it again can help, the operation goes well all
// the same; the session in which it happened is closed.
func TestEveryCode(t *testing.T) {
	codes := map[string]uint{
		"CKR_HOST_MEMORY": 0x02, "CKR_SLOT_ID_INVALID": 0x03, "CKR_GENERAL_ERROR": 0x05, "CKR_FUNCTION_FAILED": 0x06, "CKR_CANT_LOCK": 0x0a,
		"CKR_DEVICE_ERROR": 0x30, "CKR_DEVICE_MEMORY": 0x31, "CKR_DEVICE_REMOVED": 0x32, "CKR_FUNCTION_CANCELED": 0x50,
		"CKR_KEY_HANDLE_INVALID": 0x60, "CKR_OBJECT_HANDLE_INVALID": 0x82, "CKR_OPERATION_ACTIVE": 0x90, "CKR_OPERATION_NOT_INITIALIZED": 0x91,
		"CKR_SESSION_CLOSED": 0xb0, "CKR_SESSION_COUNT": 0xb1, "CKR_SESSION_HANDLE_INVALID": 0xb3, "CKR_TOKEN_NOT_PRESENT": 0xe0,
		"CKR_TOKEN_NOT_RECOGNIZED": 0xe1, "CKR_USER_NOT_LOGGED_IN": 0x101, "CKR_BUFFER_TOO_SMALL": 0x150,
		"CKR_CRYPTOKI_NOT_INITIALIZED": 0x190, "CKR_MUTEX_BAD": 0x1a0, "CKR_VENDOR_DEFINED": 0x80000001,
	}
	refused := map[string]uint{ // doing it again can't help
		"CKR_ARGUMENTS_BAD": 0x07, "CKR_ACTION_PROHIBITED": 0x1b, "CKR_DATA_INVALID": 0x20, "CKR_DATA_LEN_RANGE": 0x21, "CKR_FUNCTION_NOT_SUPPORTED": 0x54,
		"CKR_KEY_SIZE_RANGE": 0x62, "CKR_KEY_TYPE_INCONSISTENT": 0x63, "CKR_KEY_FUNCTION_NOT_PERMITTED": 0x68, "CKR_MECHANISM_INVALID": 0x70,
		"CKR_MECHANISM_PARAM_INVALID": 0x71, "CKR_DOMAIN_PARAMS_INVALID": 0x130, "CKR_CURVE_NOT_SUPPORTED": 0x140,
	}
	s := newShim(t, 1)
	store := open(t, s.config)
	defer store.Close()
	signing, exchange := generate(t, store, "payments", keystore.Ed25519), generate(t, store, "noise", keystore.X25519)
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
				s.meets(fault{function: function, kind: "code", argument: of[name], count: 1})
				err := use(function)
				if _, definite := refused[name]; definite != errors.Is(err, keystore.ErrRefused) || !definite && err != nil {
					t.Errorf("%s of function %d: %v", name, function, err)
				}
				calls := s.calls()[before:]
				met := slices.IndexFunc(calls, func(c call) bool { return c.function == function && c.code == int(of[name]) })
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
	s.meets(fault{function: sign, kind: "code", argument: ckrDeviceError, count: 2})
	if err := use(sign); err != nil || s.count(initialize) != began+1 {
		t.Errorf("an error that only a new start mends: %v, %d starts", err, s.count(initialize)-began)
	}
}

// TestSessionLimit: no more sessions are opened than the token says that this process may have.
func TestSessionLimit(t *testing.T) {
	s := newShim(t, 8)
	for _, tc := range []struct {
		most        string // ulMaxSessionCount and ulMaxRwSessionCount; 0 is CK_EFFECTIVELY_INFINITE
		share, want int
	}{
		{"0 0", 1, 8},
		{"18446744073709551615 18446744073709551615", 1, 8}, // CK_UNAVAILABLE_INFORMATION
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
		if n := store.IdleSlots(); n != tc.want {
			t.Errorf("%q shared by %d: %d places, want %d", tc.most, tc.share, n, tc.want)
		}
		store.Close()
	}
	t.Setenv("SHIM_MOST", "4 4")
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.meets(fault{function: openSession, kind: "limit", argument: 4})
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() { signs(t, key) })
	}
	wg.Wait()
	if n := s.count(openSession, ckrSessionCount); n != 0 {
		t.Errorf("the token's limit was met %d times", n)
	}
}

// TestSessionsTaken: others use most of the token's sessions. Operations wait for one another; when the others are done,
// as many are in flight as before.
func TestSessionsTaken(t *testing.T) {
	s := newShim(t, 4)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.closeSessions(store)
	s.meets(fault{function: openSession, kind: "limit", argument: 2}, fault{function: signInit, kind: "held", count: 1})
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() { signs(t, key) })
	}
	eventually(t, "one signs and three wait for its session", func() bool {
		return s.count(signInit, isHeld) == 1 && s.count(openSession, ckrSessionCount) == 3
	})
	s.meets(fault{function: openSession, kind: "limit", argument: 2})
	wg.Wait()
	if n := s.openSessions(); n != 2 {
		t.Errorf("%d sessions", n)
	}

	s.meets()
	eventually(t, "all places are back", func() bool { return store.IdleSlots() == 4 })
	s.meets(fault{function: signInit, kind: "held"})
	for range 4 {
		wg.Go(func() { signs(t, key) })
	}
	eventually(t, "four sign at the same time", func() bool { return s.count(signInit, isHeld) == 1+4 })
	s.meets()
	wg.Wait()
}

// TestNoSession: when there is nobody to wait for, nobody waits.
func TestNoSession(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.closeSessions(store)
	s.meets(fault{function: openSession, kind: "limit", argument: 1})
	if _, err := key.Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("%v, want %v", err, keystore.ErrUnavailable)
	}
	s.meets()
	signs(t, key)
}

// TestWaitingForASessionHoldsNothingUp: one operation has the token's only session, and must have the module initialised
// anew, while another one waits for that session.
func TestWaitingForASessionHoldsNothingUp(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.closeSessions(store)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	limit := fault{function: openSession, kind: "limit", argument: 2}
	s.meets(limit, fault{function: signInit, kind: "held", argument: ckrDeviceError, count: 1})
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
	s.meets(limit, fault{function: signInit, kind: "code", argument: ckrDeviceError, count: 1})
	wg.Wait()
	if n := s.count(initialize); n != 2 {
		t.Errorf("the module was initialised %d times", n)
	}
}

// TestCallerLeaves: for a caller that has left nothing is tried again, and the module is not initialised anew under the
// others.
func TestCallerLeaves(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.meets(fault{function: signInit, kind: "held", argument: ckrDeviceError, count: 1})
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		_, err := key.Sign(ctx, []byte("m"), nil)
		failed <- err
	}()
	eventually(t, "it signs", func() bool { return s.count(signInit, isHeld) == 1 })
	cancel()
	s.meets()
	if err := <-failed; !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("%v, want %v", err, keystore.ErrUnavailable)
	}
	if n := s.count(initialize); n != 1 {
		t.Errorf("the module was initialised %d times", n)
	}
	signs(t, key)
}

// TestWrongPINCostsOneLogin counts what the token counts.
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
					_, err = store.Generate(t.Context(), keystore.Ref{Name: "other", Version: uint32(i)}, keystore.X25519, keystore.Tag{byte(i)})
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
	s.meets(fault{function: signInit, kind: "code", argument: ckrDeviceError}) // which a new start would mend
	refused()
	s.meets()
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

// TestAlreadyLoggedIn: the session of the login is lost, and the login is not, since another session keeps it.
func TestAlreadyLoggedIn(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	s.meets(fault{function: signInit, kind: "held", count: 1})
	var wg sync.WaitGroup
	wg.Go(func() { signs(t, key) })
	eventually(t, "a second session is needed", func() bool { return s.count(signInit, isHeld) == 1 })
	signs(t, key)
	s.meets()
	wg.Wait()
	// The key is looked for again before the second error, which asks for the state twice; then the login is looked at.
	s.meets(fault{function: signInit, kind: "code", argument: ckrDeviceError, count: 2}, fault{function: getSessionInfo, kind: "code", argument: 0xb3, count: 1, skip: 2})
	signs(t, key)
	if s.count(login, ckrAlreadyLoggedIn) != 1 || s.count(initialize) != 1 {
		t.Errorf("CKR_USER_ALREADY_LOGGED_IN was met %d times, and the module initialised %d times", s.count(login, ckrAlreadyLoggedIn), s.count(initialize))
	}
	signs(t, key)
	if n := s.openSessions(); n > 3 {
		t.Errorf("%d sessions are open", n)
	}
}

// TestLoggedOutIsNotGone: who is not logged in sees no private objects, and must not take that for an answer.
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

// TestRefusedMeanwhile: a handle goes stale while it is on its way to the module, and the number stands for another key
// by then. The refusal is about that one.
func TestRefusedMeanwhile(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	key := generate(t, store, "payments", keystore.Ed25519)
	signs(t, key)
	s.meets(fault{function: signInit, kind: "held", argument: ckrTypeInconsistent, count: 1})
	var wg sync.WaitGroup
	wg.Go(func() { signs(t, key) })
	eventually(t, "it signs", func() bool { return s.count(signInit, isHeld) == 1 })
	store.LogOut()
	signs(t, key) // logs in
	s.meets()
	wg.Wait()
}

// TestAmbiguous puts a second object beside a key's. None of them is used, whichever way the key is asked for.
func TestAmbiguous(t *testing.T) {
	ours := keystore.Tag{}
	copy(ours[:], "payments")
	other := keystore.Tag{9}
	for _, tc := range []struct {
		name           string
		label          string
		id             keystore.Tag
		keep           uint // the class of the objects that stay; 0 for both
		byRef, byBound error
	}{
		{"same label, other CKA_ID", "countersign/payments/1", other, 0, keystore.ErrAmbiguous, nil},
		{"same label and CKA_ID", "countersign/payments/1", ours, 0, keystore.ErrAmbiguous, keystore.ErrAmbiguous},
		{"a second private object", "countersign/payments/1", ours, pkcs11.CKO_PRIVATE_KEY, keystore.ErrAmbiguous, keystore.ErrAmbiguous},
		{"a second public object", "countersign/payments/1", ours, pkcs11.CKO_PUBLIC_KEY, keystore.ErrAmbiguous, keystore.ErrAmbiguous},
		{"same CKA_ID, other label", "countersign/refunds/1", ours, 0, nil, keystore.ErrAmbiguous},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := newToken(t)
			store := open(t, c)
			info := generate(t, store, "payments", keystore.Ed25519).Info()
			store.Close()
			raw(t, c, func(m *pkcs11.Ctx, s pkcs11.SessionHandle) {
				common := []*pkcs11.Attribute{
					pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, tc.label),
					pkcs11.NewAttribute(pkcs11.CKA_ID, tc.id[:]), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, 0x40),
				}
				public := append([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, []byte{6, 3, 0x2b, 0x65, 0x70})}, common...)
				private := append([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true)}, common...)
				pub, prv, err := m.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(0x1055, nil)}, public, private)
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

// TestBatchMeetsAFault: what one signature of a batch meets is not another's error, and no signature stands in another's
// place.
func TestBatchMeetsAFault(t *testing.T) {
	s := newShim(t, 2)
	store := open(t, s.config)
	defer store.Close()
	keys := []keystore.Key{generate(t, store, "payments", keystore.Ed25519), generate(t, store, "refunds", keystore.Ed25519), generate(t, store, "tls", keystore.P256)}
	const size = 20 // more than one crossing makes
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
			{function: sign, kind: "short"}, {function: sign, kind: "code", argument: ckrDeviceError}, {function: signInit, kind: "code", argument: ckrDeviceError},
			{function: signInit, kind: "code", argument: ckrMechanismInvalid}, {function: signInit, kind: "logout"},
		} {
			f.count, f.skip = 1, at
			s.meets(f)
			what := fmt.Sprintf("%+v", f)
			before := s.count(sign) + s.count(signInit)
			if failed, err := batch(what); err != nil { // it was met once, and each was then made by itself
				t.Errorf("%s: %v failed: %v", what, failed, err)
			}
			if n := s.count(sign) + s.count(signInit) - before; n <= 2*size {
				t.Errorf("%s was not met", what)
			}
		}
		// What goes on failing is one signature's error: the first that is made by itself.
		s.meets(fault{function: signInit, kind: "code", argument: ckrMechanismInvalid, count: 2, skip: at})
		if failed, err := batch(fmt.Sprintf("refused at %d", at)); !slices.Equal(failed, []int{0}) || !errors.Is(err, keystore.ErrRefused) {
			t.Errorf("refused at %d: %v failed, %v", at, failed, err)
		}
	}
	s.meets()
	if n := s.openSessions(); n > 3 {
		t.Errorf("%d sessions are open", n)
	}
}

// TestBatchesWhileLoginsComeAndGo: numbers of keys change under batches that are being made.
func TestBatchesWhileLoginsComeAndGo(t *testing.T) {
	c := newToken(t)
	store := open(t, c)
	defer store.Close()
	keys := []keystore.Key{generate(t, store, "payments", keystore.Ed25519), generate(t, store, "refunds", keystore.Ed25519)}
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
					all = append(all, &keystore.Signing{Key: keys[i%2], Message: fmt.Appendf(nil, "%d %d %d", g, round, i)})
				}
				store.SignBatch(t.Context(), all)
				for _, b := range all {
					if b.Err == nil && !b.Key.Info().Verify(b.Message, b.Signature) || b.Err != nil && !errors.Is(b.Err, keystore.ErrUnavailable) {
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
