package tpm_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"countersign/internal/keystore"
	"countersign/tpm"
	"countersign/tpm/tpmtest"
)

// says checks the class and the text of an error.
func says(t *testing.T, what string, err, class error, texts ...string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: %v, want %v", what, err, class)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v; the text lacks %q", what, err, text)
		}
	}
}

// TestForeignStorageRoot provisions TPMs with storage root keys of other software. The error names
// the kind of key and a free handle, and a key of our own is made there.
func TestForeignStorageRoot(t *testing.T) {
	for algorithm, kind := range map[string]string{
		"rsa2048:aes128cfb": "an RSA-2048 key", "ecc384:aes256cfb": "another ECC key",
	} {
		e := tpmtest.New(t)
		e.StorageRoot(t, algorithm)
		c := config(t, e)
		says(t, algorithm, tpm.Provision(t.Context(), c), keystore.ErrUnfit,
			kind, "0x81000001", "storage_root = 0x81000002")
		c.StorageRoot = 0x81000002
		s := open(t, c)
		for _, alg := range []keystore.Algorithm{keystore.Ed25519, keystore.P256} {
			signs(t, generate(t, s, keystore.Ref{Name: string(alg), Version: 1}, alg))
		}
		s.Close()
		c.StorageRoot = 0
		_, err := tpm.Open(t.Context(), c)
		says(t, "opened with another handle", err, keystore.ErrReplaced)
	}
}

// TestOwnerPassword: a TPM whose owner has a password is refused where the owner is needed, with
// advice that can be followed, and is used without the password afterwards.
func TestOwnerPassword(t *testing.T) {
	e := tpmtest.New(t)
	e.OwnerPassword(t, "", "ownerpw")
	c := config(t, e)
	refused := func(what string, err error) {
		t.Helper()
		says(t, what, err, keystore.ErrRefused, "the owner of this TPM has a password", "tpm2_changeauth -c owner")
		if errors.Is(err, keystore.ErrAuth) {
			t.Errorf("%s: an error about a PIN: %v", what, err)
		}
	}
	refused("a storage root key", tpm.Provision(t.Context(), c))
	e.OwnerPassword(t, "ownerpw", "")
	s := open(t, c)
	defer s.Close()
	e.OwnerPassword(t, "", "ownerpw")
	refused("a counter", s.DefineCounter(t.Context(), keystore.Owner{1}))
	e.OwnerPassword(t, "ownerpw", "")
	if err := s.DefineCounter(t.Context(), keystore.Owner{1}); err != nil {
		t.Fatal(err)
	}
	e.OwnerPassword(t, "", "ownerpw")
	if _, err := s.IncrementCounter(t.Context(), keystore.Owner{1}); err != nil {
		t.Error(err)
	}
	signs(t, generate(t, s, payments, keystore.Ed25519))
}

// TestUnmeasuredRegisters: no key is sealed to a register without a measurement, unless the
// configuration names the register for it. Registers 17 to 22 have all bits set.
func TestUnmeasuredRegisters(t *testing.T) {
	e := tpmtest.New(t)
	for _, register := range []uint{4, 18} {
		c := config(t, e)
		c.PCRs = []uint{7, register}
		s := open(t, c)
		for _, alg := range keystore.Algorithms {
			_, err := s.Generate(t.Context(), payments, alg, keystore.Tag{1})
			says(t, "a seal", err, keystore.ErrRefused, "nothing has been measured",
				fmt.Sprintf("zero_pcrs = [%d]", register))
		}
		s.Close()
		c.ZeroPCRs = []uint{register}
		s = open(t, c)
		signs(t, generate(t, s, payments, keystore.Ed25519))
		s.Close()
	}
}

// measuredOf returns the findings about registers that keys are sealed to. All must be good, or one
// is not.
func measuredOf(t *testing.T, s *tpm.Store, good bool) (text string) {
	t.Helper()
	found, err := s.Inspect(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	bad := 0
	for _, f := range found {
		if f.What == "measured" {
			text += f.Text + "\n"
			if !f.OK {
				bad++
			}
		}
	}
	if good != (bad == 0) || !good && bad != 1 {
		t.Errorf("%d registers have changed: %s", bad, text)
	}
	return text
}

// TestBanks seals to each bank that the emulator has, and names the banks.
func TestBanks(t *testing.T) {
	e := tpmtest.New(t)
	for _, bank := range []tpm.Bank{"", "sha256", "sha384", "sha512"} {
		c := config(t, e)
		c.PCRBank = bank
		c.PCRs = []uint{0, 1, 2, 3, 4, 5, 6, 7, 9, 11} // more than fit into one response
		c.ZeroPCRs = []uint{0, 1, 2, 3, 4, 5, 6, 9}
		s := open(t, c)
		k := generate(t, s, payments, keystore.Ed25519)
		signs(t, k)
		q, err := s.Quote(t.Context(), []uint{7}, nil)
		if err != nil || !bytes.HasPrefix(q.Attested, []byte("\xffTCG")) {
			t.Errorf("bank %s: a quote: %v", bank, err)
		}
		found, err := s.Inspect(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		if text := fmt.Sprint(found); !strings.Contains(text, "banks: sha1, sha256, sha384, sha512") ||
			!strings.Contains(text, "PCR 7 (the Secure Boot state and its certificates), bank "+bank.String()) {
			t.Errorf("bank %s: the banks are not named: %s", bank, text)
		}
		if text := measuredOf(t, s, true); strings.Count(text, "as sealed, for all 1 keys") != len(c.PCRs) {
			t.Errorf("bank %s, as sealed: %s", bank, text)
		}
		s.Close()
		e.Extend(t, 11) // of the bank of SHA-256 only
		if s, err = tpm.Open(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		_, err = s.Bind(k.Info()).Sign(t.Context(), []byte("m"), nil)
		sealed := bank.String() == "sha256"
		text := measuredOf(t, s, !sealed)
		if sealed != strings.Contains(text, "bank sha256: another value than sealed for 1 of 1") {
			t.Errorf("bank %s, after a change of the bank sha256: %s", bank, text)
		}
		if errors.Is(err, keystore.ErrSealed) != sealed || !sealed && err != nil {
			t.Errorf("bank %s, after a change of the bank sha256: %v", bank, err)
		}
		s.Close()
	}
	e.Allocate(t, "sha1:none+sha256:all+sha384:all+sha512:none")
	c := config(t, e)
	c.PCRBank = "sha512"
	s := open(t, c)
	defer s.Close()
	_, err := s.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
	says(t, "a bank that is not active", err, keystore.ErrRefused, "no active PCR bank sha512", "pcr_bank")
	for _, bank := range []tpm.Bank{"sha1", "SHA256", "sha3-256", "x"} {
		if err := bank.Check(); err == nil {
			t.Errorf("the bank %q is accepted", bank)
		}
	}
}

// TestCountersOfOthers: the index of the counter can be taken by another program or by another
// appliance. Neither is used as the counter, and another index is free for a counter.
func TestCountersOfOthers(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	s := open(t, c)
	defer s.Close()
	first, second := keystore.Owner{1}, keystore.Owner{2}
	if err := s.DefineCounter(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	refused := func(what string, owner keystore.Owner, text string) {
		t.Helper()
		_, readErr := s.ReadCounter(t.Context(), owner)
		_, incrementErr := s.IncrementCounter(t.Context(), owner)
		for _, err := range []error{s.DefineCounter(t.Context(), owner), readErr, incrementErr} {
			says(t, what, err, keystore.ErrUnfit, text, "counter_index", "tpm2_nvundefine 0x1800c51")
		}
	}
	before := e.Counter(t)
	refused("another appliance's", second, "another countersign appliance")
	refused("a marked one, for a ledger without an identifier", keystore.Owner{}, "another countersign appliance")
	if after := e.Counter(t); after != before {
		t.Errorf("another's counter was incremented from %d to %d", before, after)
	}
	e.UndefineCounter(t)
	e.TakeCounter(t)
	refused("another program's", first, "data of 32 bytes, defined by a program with the owner's authorisation")
	c.CounterIndex = 0x01800c52
	other, err := tpm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.DefineCounter(t.Context(), second); err != nil {
		t.Error(err)
	}
	if value, err := other.ReadCounter(t.Context(), second); err != nil || value == 0 {
		t.Errorf("the counter at another index: %d, %v", value, err)
	}
}

// TestGivenBack gives the counter and the storage root key back. Another's counter stays, a later
// counter begins above the value of the first one, and a call that comes again finds nothing.
func TestGivenBack(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	before := e.Lasting(t)
	s := open(t, c)
	defer s.Close()
	owner := keystore.Owner{1}
	if err := s.DefineCounter(t.Context(), owner); err != nil {
		t.Fatal(err)
	}
	value, err := s.ReadCounter(t.Context(), owner)
	if err != nil {
		t.Fatal(err)
	}
	says(t, "another's", s.UndefineCounter(t.Context(), keystore.Owner{2}), keystore.ErrUnfit, "another countersign")
	if got := e.Counter(t); got != value {
		t.Errorf("the counter is %d after another owner's call, before %d", got, value)
	}
	e.OwnerPassword(t, "", "secret")
	says(t, "with a password", s.UndefineCounter(t.Context(), owner), keystore.ErrRefused, "tpm2_changeauth")
	says(t, "with a password", s.EvictStorageRoot(t.Context()), keystore.ErrRefused, "tpm2_changeauth")
	e.OwnerPassword(t, "secret", "")
	for range 2 {
		if err := s.UndefineCounter(t.Context(), owner); err != nil {
			t.Fatal(err)
		}
	}
	_, err = s.ReadCounter(t.Context(), owner)
	says(t, "the counter", err, keystore.ErrNotFound)
	if err := s.DefineCounter(t.Context(), owner); err != nil {
		t.Fatal(err)
	}
	if again, err := s.ReadCounter(t.Context(), owner); err != nil || again <= value {
		t.Errorf("the next counter is %d (%v), and the one before was %d", again, err, value)
	}
	if err := errors.Join(s.UndefineCounter(t.Context(), owner), s.EvictStorageRoot(t.Context())); err != nil {
		t.Fatal(err)
	}
	if after := e.Lasting(t); !slices.Equal(after, before) {
		t.Errorf("the TPM has %v, before %v", after, before)
	}
	if err := s.EvictStorageRoot(t.Context()); err == nil {
		t.Error("a storage root key that is gone was given back")
	}
}

// TestClearedTPM: a TPM that was cleared, or exchanged, makes its folder's keys unavailable.
func TestClearedTPM(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	s := open(t, c)
	generate(t, s, payments, keystore.Ed25519)
	s.Close()
	e.Clear(t)
	_, err := tpm.Open(t.Context(), c)
	says(t, "opened after a clear", err, keystore.ErrReplaced, "puts them aside", "countersignd init")
	e.StorageRoot(t, "rsa2048:aes128cfb")
	_, err = tpm.Open(t.Context(), c)
	says(t, "opened after a clear and another owner", err, keystore.ErrReplaced, "puts them aside",
		"another software's key")
	c.State += "-new"
	c.StorageRoot = 0x81000002
	s = open(t, c)
	defer s.Close()
	signs(t, generate(t, s, payments, keystore.Ed25519))
}

// TestOwnerDisabled: a TPM whose owner's hierarchy is disabled has its keys and its counter still.
// Neither is taken for lost, and both serve again when the hierarchy is enabled.
func TestOwnerDisabled(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	s := open(t, c)
	defer s.Close()
	owner := keystore.Owner{1}
	if err := s.DefineCounter(t.Context(), owner); err != nil {
		t.Fatal(err)
	}
	k := generate(t, s, payments, keystore.P256)
	e.EnableOwner(t, false)
	disabled := func(what string, err error) {
		t.Helper()
		says(t, what, err, keystore.ErrUnavailable, "hierarchy of this TPM is disabled")
		if errors.Is(err, keystore.ErrReplaced) {
			t.Errorf("%s: the TPM is taken for another: %v", what, err)
		}
	}
	_, err := s.ReadCounter(t.Context(), owner)
	disabled("the counter", err)
	disabled("a new counter", s.DefineCounter(t.Context(), owner))
	_, err = tpm.Open(t.Context(), c)
	disabled("opened", err)
	c.State += "-new"
	disabled("provisioned", tpm.Provision(t.Context(), c))
	if _, err := k.Sign(t.Context(), []byte("m"), nil); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("a signature: %v", err)
	}
	e.EnableOwner(t, true)
	signs(t, k)
	if _, err := s.ReadCounter(t.Context(), owner); err != nil {
		t.Error(err)
	}
}

// TestProvisionedFolder: a folder that belongs to a TPM needs no TPM to be provisioned again.
func TestProvisionedFolder(t *testing.T) {
	e := tpmtest.New(t)
	c := config(t, e)
	open(t, c).Close()
	e.Stop()
	if err := tpm.Provision(t.Context(), c); err != nil {
		t.Error(err)
	}
}

// TestSlotsAreGivenBack uses more keys than a store can have in use at once, one after another:
// destroyed ones, and some that stay. Up to the limit each key is unsealed once.
func TestSlotsAreGivenBack(t *testing.T) {
	const limit = 3
	defer tpm.LimitKeys(limit)()
	e := tpmtest.New(t)
	s := open(t, config(t, e))
	defer s.Close()
	for version := range uint32(2*limit + 1) {
		ref := keystore.Ref{Name: "destroyed", Version: version + 1}
		k := generate(t, s, ref, keystore.Ed25519)
		signs(t, k)
		if err := s.Destroy(t.Context(), ref, k.Info().Tag); err != nil {
			t.Fatal(err)
		}
	}
	var keys []keystore.Key
	for version := range uint32(limit) {
		k := generate(t, s, keystore.Ref{Name: "alive", Version: version + 1}, keystore.Ed25519)
		signs(t, k)
		keys = append(keys, k)
	}
	e.Stop() // all of the keys are unsealed
	for _, k := range keys {
		signs(t, k)
	}
	e.Start()
	keys = append(keys, generate(t, s, keystore.Ref{Name: "alive", Version: limit + 1}, keystore.X25519))
	for range 3 {
		for _, k := range keys[:limit] {
			signs(t, k)
		}
		if _, err := keys[limit].Exchange(t.Context(), [32]byte(keys[limit].Info().PublicKey)); err != nil {
			t.Errorf("an exchange: %v", err)
		}
	}
}
