package tpm_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/tpm"
	"countersign/tpm/tpmtest"
)

var payments = keystore.Ref{Name: "payments", Version: 1}

// TestConformance runs the conformance suite of a keystore on a TPM, without and with a PIN.
func TestConformance(t *testing.T) {
	e := tpmtest.New(t)
	keystoretest.Run(t, func(t *testing.T) keystore.Store { return open(t, config(t, e)) })
	t.Run("PIN", func(t *testing.T) {
		keystoretest.Run(t, func(t *testing.T) keystore.Store {
			return open(t, withPIN(t, config(t, e), "a-pin-of-the-test"))
		})
	})
}

func withPIN(t testing.TB, c tpm.Config, pin string) tpm.Config {
	t.Helper()
	c.PINFile = filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(c.PINFile, []byte(pin+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

func generate(t testing.TB, s *tpm.Store, ref keystore.Ref, alg keystore.Algorithm) keystore.Key {
	t.Helper()
	k, err := s.Generate(t.Context(), ref, alg, keystore.Tag{byte(ref.Version), byte(len(ref.Name))})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// signs checks that a key makes a valid signature.
func signs(t testing.TB, k keystore.Key) {
	t.Helper()
	m := []byte("a message")
	if sig, err := k.Sign(t.Context(), m, nil); err != nil || !k.Info().Verify(m, sig) {
		t.Errorf("%v: %v, or the signature does not verify", k.Info().Ref, err)
	}
}

// TestBusShowsNoSecret records all traffic on the bus. Neither a seed nor the PIN may cross the bus
// in plaintext.
func TestBusShowsNoSecret(t *testing.T) {
	e := tpmtest.New(t)
	p := newTap(t, e.Socket)
	const pin = "pin-not-for-the-bus"
	c := withPIN(t, config(t, e), pin)
	c.Device = p.path
	s := open(t, c)
	defer s.Close()
	seed := bytes.Repeat([]byte{0xc5, 0x3a, 0x91, 0x07}, 8)
	path := filepath.Join(t.TempDir(), "seed")
	if err := os.WriteFile(path, seed, 0o600); err != nil {
		t.Fatal(err)
	}
	imported, err := s.Import(t.Context(), payments, path, keystore.Tag{9})
	if err != nil {
		t.Fatal(err)
	}
	made := generate(t, s, keystore.Ref{Name: "made", Version: 1}, keystore.Ed25519)
	resident := generate(t, s, keystore.Ref{Name: "resident", Version: 1}, keystore.P256)
	s.Close()
	if s, err = tpm.Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, k := range []keystore.Key{imported, made, resident} {
		signs(t, s.Bind(k.Info())) // unsealed again
	}
	seen := p.bytes()
	if len(seen) < 4000 {
		t.Fatalf("only %d bytes were seen", len(seen))
	}
	secrets := map[string][]byte{"the seed": seed, "a part of the seed": seed[:8], "the PIN": []byte(pin)}
	for what, secret := range secrets {
		if bytes.Contains(seen, secret) {
			t.Errorf("%s crosses the bus", what)
		}
	}
}

// TestStateChanged extends a register. The error names the register and its usual contents, and the
// key is usable again after a return to the former state.
func TestStateChanged(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	s := open(t, c)
	sealed := generate(t, s, payments, keystore.Ed25519)
	resident := generate(t, s, keystore.Ref{Name: "tls", Version: 1}, keystore.P256)
	signs(t, sealed)
	e.Extend(t, 11)
	signs(t, sealed) // unsealed before the change
	s.Close()
	s, err := tpm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, k := range []keystore.Key{sealed, resident} {
		_, err := s.Bind(k.Info()).Sign(t.Context(), []byte("m"), nil)
		if !errors.Is(err, keystore.ErrSealed) {
			t.Errorf("%v: %v", k.Info().Ref, err)
			continue
		}
		text := err.Error()
		if !strings.Contains(text, "PCR 11, which measures the unified kernel image") ||
			strings.Contains(text, "PCR 7") {
			t.Errorf("%v: the error does not name PCR 11: %v", k.Info().Ref, err)
		}
	}
	generate(t, s, keystore.Ref{Name: "new", Version: 1}, keystore.Ed25519) // sealed to the new state
	e.Stop()                                                                // a power cycle resets the registers
	e.Start()
	signs(t, s.Bind(sealed.Info()))
	signs(t, s.Bind(resident.Info()))
}

// TestRecordsAreBound checks that a record with a changed name, tag, provenance or public key is
// refused.
func TestRecordsAreBound(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	s := open(t, c)
	defer s.Close()
	path := filepath.Join(t.TempDir(), "seed")
	if err := os.WriteFile(path, bytes.Repeat([]byte{3}, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := s.Import(t.Context(), payments, path, keystore.Tag{1})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(c.State, "payments.1.key.json")
	sound, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	info := k.Info()
	for what, change := range map[string][2]string{
		"another name":       {`"payments/1"`, `"payments/2"`},
		"another tag":        {`"tag": "01`, `"tag": "02`},
		"generated":          {`"local": false`, `"local": true`},
		"another public key": {`"public_key": "`, `"public_key": "AAAA`},
	} {
		if !bytes.Contains(sound, []byte(change[0])) {
			t.Fatalf("%s: the record has no %s", what, change[0])
		}
		changed := bytes.Replace(sound, []byte(change[0]), []byte(change[1]), 1)
		ref := payments
		if what == "another name" {
			ref.Version = 2
		}
		name := strings.ReplaceAll(ref.String(), "/", ".") + ".key.json"
		if err := os.WriteFile(filepath.Join(c.State, name), changed, 0o600); err != nil {
			t.Fatal(err)
		}
		other, err := tpm.Open(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := other.Key(t.Context(), ref); !errors.Is(err, keystore.ErrUnfit) {
			t.Errorf("%s: %v, %v", what, got, err)
		}
		other.Close()
		if err := os.WriteFile(file, sound, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	signs(t, s.Bind(info))
}

// TestAnotherTPM opens the state directory of one TPM with another TPM. Open fails, and the sealed
// keys stay sealed.
func TestAnotherTPM(t *testing.T) {
	e, other := tpmtest.New(t), tpmtest.New(t)
	c := config(t, e)
	s := open(t, c)
	k := generate(t, s, payments, keystore.Ed25519)
	s.Close()
	c.Device = other.Socket
	if err := tpm.Provision(t.Context(), c); err != nil { // must not change a provisioned directory
		t.Fatal(err)
	}
	_, err := tpm.Open(t.Context(), c)
	if err == nil || !strings.Contains(err.Error(), "another TPM") &&
		!strings.Contains(err.Error(), "no storage root key") {
		t.Errorf("opened with another TPM: %v", err)
	}
	// An attacker replaces the recorded name by the other TPM's: the seal still does not open.
	theirs := config(t, other)
	open(t, theirs).Close()
	pin, err := os.ReadFile(filepath.Join(theirs.State, "tpm.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.State, "tpm.json"), pin, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err = tpm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Bind(k.Info()).Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrUnfit) {
		t.Errorf("a seal of another TPM: %v", err)
	}
}

// TestNoPCRs seals a key to the TPM without registers: the key is usable in every state.
func TestNoPCRs(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	c.PCRs = nil
	s := open(t, c)
	k := generate(t, s, payments, keystore.Ed25519)
	s.Close()
	e.Extend(t, 7)
	s, err := tpm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	signs(t, s.Bind(k.Info()))
}

// TestManyOperations checks that no operation leaves an object or a session in the TPM, which has
// room for three objects. TPM_OPERATIONS sets the number of operations, 300 by default.
func TestManyOperations(t *testing.T) {
	n := 300
	if v := os.Getenv("TPM_OPERATIONS"); v != "" {
		var err error
		if n, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}
	e := tpmtest.New(t)
	s := open(t, config(t, e))
	defer s.Close()
	resident := generate(t, s, payments, keystore.P256)
	sealed := generate(t, s, keystore.Ref{Name: "sealed", Version: 1}, keystore.Ed25519)
	for i := range n {
		signs(t, resident)
		if i%10 == 0 {
			s.Lock()
			signs(t, sealed) // unsealed again
		}
		if t.Failed() {
			t.Fatalf("operation %d", i)
		}
	}
	if n := e.Handles(t); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// TestApprovedStates seals keys to an approver. The keys are usable in each approved state, also
// after an update, and in no other state. An approval signed by another key is ignored.
func TestApprovedStates(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	approver, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(approver.Public())
	if err != nil {
		t.Fatal(err)
	}
	c.PolicyKey = filepath.Join(t.TempDir(), "update.pub")
	block := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	if err := os.WriteFile(c.PolicyKey, block, 0o600); err != nil {
		t.Fatal(err)
	}
	approve := func(name string, key *ecdsa.PrivateKey) {
		t.Helper()
		a, err := tpm.Approve(key, "", map[uint][]byte{7: e.PCR(t, 7), 11: e.PCR(t, 11)})
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(c.State, name+".approval.json"), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, c)
	defer func() { s.Close() }()
	again := func() { // opens the store again, as after a restart
		t.Helper()
		s.Close()
		if s, err = tpm.Open(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	_, err = s.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
	if !errors.Is(err, keystore.ErrSealed) || !strings.Contains(err.Error(), "approve-state") {
		t.Errorf("a key that can't be used was made: %v", err)
	}
	approve("first", approver)
	sealed := generate(t, s, payments, keystore.Ed25519)
	resident := generate(t, s, keystore.Ref{Name: "tls", Version: 1}, keystore.P256)
	e.Extend(t, 11) // an update
	again()
	refused := func(what string) {
		t.Helper()
		for _, k := range []keystore.Key{sealed, resident} {
			_, err := s.Bind(k.Info()).Sign(t.Context(), []byte("m"), nil)
			if !errors.Is(err, keystore.ErrSealed) {
				t.Errorf("%s: %v: %v", what, k.Info().Ref, err)
			}
		}
	}
	refused("a state that nobody has approved")
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	approve("second", stranger)
	refused("a state that a stranger has approved")
	approve("second", approver)
	signs(t, s.Bind(sealed.Info()))
	signs(t, s.Bind(resident.Info()))
	e.Stop()
	e.Start() // the update is rolled back; the first approval still exists
	again()
	signs(t, s.Bind(sealed.Info()))
	signs(t, s.Bind(resident.Info()))
	if n := e.Handles(t); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// TestQuote checks the signature, the nonce and the registers of quotes, and that all quotes have
// the same attestation key.
func TestQuote(t *testing.T) {
	e := tpmtest.New(t)
	s := open(t, config(t, e))
	defer s.Close()
	var key []byte
	for i, nonce := range []string{"a nonce", "another nonce"} {
		q, err := s.Quote(t.Context(), []uint{7, 11}, []byte(nonce))
		if err != nil {
			t.Fatal(err)
		}
		if key == nil {
			key = q.PublicKey
		}
		info := keystore.Info{Algorithm: keystore.P256, PublicKey: key}
		if !info.Verify(q.Attested, q.Signature) {
			t.Errorf("quote %d does not verify", i)
		}
		registers := sha256.Sum256(append(e.PCR(t, 7), e.PCR(t, 11)...))
		if !bytes.HasPrefix(q.Attested, []byte("\xffTCG")) || !bytes.Contains(q.Attested, []byte(nonce)) ||
			!bytes.Contains(q.Attested, registers[:]) {
			t.Errorf("quote %d lacks the nonce or the registers: %x", i, q.Attested)
		}
		e.Extend(t, 11)
	}
	if _, err := s.Quote(t.Context(), []uint{7}, make([]byte, 33)); !errors.Is(err, keystore.ErrRefused) {
		t.Errorf("a nonce of 33 bytes: %v", err)
	}
	for _, registers := range [][]uint{nil, {}, {24}, {7, 24}, {1 << 20}} {
		if _, err := s.Quote(t.Context(), registers, []byte("n")); !errors.Is(err, keystore.ErrRefused) {
			t.Errorf("a quote over %v: %v, want %v", registers, err, keystore.ErrRefused)
		}
	}
}

// TestCrowdedTPM fills the TPM's object slots, locks the TPM by wrong PINs and fills the NV memory.
// Each condition has a clear error, and the store works again after its end.
func TestCrowdedTPM(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	s := open(t, c)
	defer s.Close()
	k := generate(t, s, payments, keystore.P256)
	for range 3 {
		e.LeakObject(t)
	}
	// The store flushes the objects, as after an interrupted process.
	if _, err := k.Sign(t.Context(), []byte("m"), nil); err != nil {
		t.Errorf("with no slot free: %v", err)
	}
	signs(t, k)

	withPIN := withPIN(t, c, "right")
	p, err := tpm.Open(t.Context(), withPIN)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	guarded := generate(t, p, keystore.Ref{Name: "guarded", Version: 1}, keystore.P256)
	if err := os.WriteFile(withPIN.PINFile, []byte("wrong\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 5 { // the emulator locks after three wrong PINs
		p.Retry()
		if _, err = guarded.Sign(t.Context(), []byte("m"), nil); err == nil {
			t.Fatal("signed with a wrong PIN")
		}
	}
	if !errors.Is(err, keystore.ErrLockedOut) || errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("in lockout: %v", err)
	}
	signs(t, k) // a key without a PIN is exempt from the lockout
	e.Unlock(t)
	if err := os.WriteFile(withPIN.PINFile, []byte("right\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	signs(t, guarded)

	e.FillNV(t)
	err = s.DefineCounter(t.Context(), keystore.Owner{1})
	if !errors.Is(err, keystore.ErrRefused) || !strings.Contains(err.Error(), "no room") {
		t.Errorf("a counter where there is no room: %v", err)
	}
	signs(t, k)
}

// TestNotProvisioned checks that Open without Provision names countersignd init.
func TestNotProvisioned(t *testing.T) {
	e := tpmtest.New(t)
	_, err := tpm.Open(t.Context(), config(t, e))
	if !errors.Is(err, tpm.ErrNotProvisioned) || !strings.Contains(err.Error(), "countersignd init") {
		t.Errorf("opened: %v", err)
	}
}

// TestWrongPIN checks that the store sends a refused PIN once, and then refuses every use of the
// PIN until Retry.
func TestWrongPIN(t *testing.T) {
	e := tpmtest.New(t)
	c := withPIN(t, config(t, e), "right")
	s := open(t, c)
	k := generate(t, s, payments, keystore.Ed25519)
	s.Close()
	wrong := withPIN(t, c, "wrong")
	s, err := tpm.Open(t.Context(), wrong)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for range 20 { // the emulator locks after three wrong PINs
		if _, err := s.Bind(k.Info()).Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrAuth) {
			t.Fatalf("with a wrong PIN: %v", err)
		}
	}
	if err := os.WriteFile(wrong.PINFile, []byte("right\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Bind(k.Info()).Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrAuth) {
		t.Errorf("tried again without Retry: %v", err)
	}
	s.Retry()
	signs(t, s.Bind(k.Info()))
}

// TestIdleLock checks that an idle seed is wiped, and unsealed again at the next use.
func TestIdleLock(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	c.IdleLock = 50 * time.Millisecond
	s := open(t, c)
	defer s.Close()
	k := generate(t, s, payments, keystore.Ed25519)
	signs(t, k)
	e.Extend(t, 7) // the key can't be unsealed in the new state, so a wiped seed shows as ErrSealed
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * c.IdleLock) {
		if _, err := k.Sign(t.Context(), []byte("m"), nil); errors.Is(err, keystore.ErrSealed) {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the seed was not wiped: %v", err)
		}
	}
}

// TestSickTPM kills, hangs and restarts the TPM. Each operation fails with ErrUnavailable in
// bounded time, and the store works again with the TPM's return. No handle stays in the TPM.
func TestSickTPM(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	c.Deadline = 300 * time.Millisecond
	s := open(t, c)
	defer s.Close()
	k := generate(t, s, payments, keystore.P256)
	unavailable := func(what string) {
		t.Helper()
		began := time.Now()
		if _, err := k.Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrUnavailable) {
			t.Errorf("%s: %v", what, err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s: the error took %v", what, took)
		}
	}
	e.Stop()
	unavailable("killed")
	e.Start()
	signs(t, k)
	e.Freeze()
	unavailable("hung")
	e.Thaw()
	for deadline := time.Now().Add(20 * time.Second); ; {
		if _, err := k.Sign(t.Context(), []byte("m"), nil); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the store has not recovered: %v", err)
		}
	}
	e.Freeze()
	asked := make(chan error)
	go func() {
		_, err := k.Sign(t.Context(), []byte("m"), nil)
		asked <- err
	}()
	e.Stop() // before or during the command
	if err := <-asked; !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("restarted meanwhile: %v", err)
	}
	e.Start()
	signs(t, k)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.Sign(ctx, []byte("m"), nil); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("with a context that has ended: %v", err)
	}
	signs(t, k)
	if n := e.Handles(t); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// TestDestroyedWhileItIsUnsealed has another key worker destroy a key, and then this one, after the
// key's record was read and before its seed is in the vault: the key signs neither then nor later.
func TestDestroyedWhileItIsUnsealed(t *testing.T) {
	e := tpmtest.New(t)
	c := withPIN(t, config(t, e), "a-pin-of-the-test")
	s := open(t, c)
	made := generate(t, s, payments, keystore.Ed25519)
	s.Close()
	other, err := tpm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	destroy := func() {}
	c.LogIn = func(_ context.Context, logIn func(bool) error) error {
		destroy()
		return logIn(false)
	}
	if s, err = tpm.Open(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	destroy = func() {
		destroy = func() {}
		for _, each := range []*tpm.Store{other, s} {
			if err := each.Destroy(t.Context(), payments, made.Info().Tag); err != nil {
				t.Error(err)
			}
		}
	}
	for range 2 {
		_, err := s.Bind(made.Info()).Sign(t.Context(), []byte("a message"), nil)
		if !errors.Is(err, keystore.ErrNotFound) {
			t.Errorf("a destroyed key signs: %v", err)
		}
	}
}
