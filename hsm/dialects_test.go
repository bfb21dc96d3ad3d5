package hsm_test

import (
	"errors"
	"strings"
	"testing"

	"countersign/hsm"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
)

// TestDialects runs the conformance suite on tokens with other interpretations of PKCS#11. The
// store chooses the quirks by CK_TOKEN_INFO, or takes them from the configuration.
func TestDialects(t *testing.T) {
	module := compileShim(t)
	for _, tc := range []struct {
		name, maker, model, dialect string
		config                      hsm.Quirks
		want                        string // Inspect's finding about the quirks
	}{
		{"the standard", "Acme", "A1", "montgomery,point-raw,params-oid,reads-oid", hsm.Quirks{},
			"ec_params oid, ec_point raw, x25519 montgomery, copies off, allowed_mechanisms on (the standard)"},
		{"SoftHSM", "SoftHSM project", "SoftHSM v2", "params-oid,reads-oid,point-bits", hsm.Quirks{},
			"ec_params oid, ec_point octet-string, x25519 edwards, copies off, allowed_mechanisms on " +
				"(SoftHSM 2.6.1, tested)"},
		{"NSS", "Mozilla Foundation", "NSS 3",
			"montgomery,point-raw,params-oid,reads-oid,no-allowed,no-local,sign-64", hsm.Quirks{},
			"ec_params oid, ec_point raw, x25519 montgomery, copies off, allowed_mechanisms off " +
				"(NSS 3.87, tested with P-256)"},
		{"nShield", "nCipher Corp. Ltd", "", "montgomery,point-raw,params-name,reads-oid", hsm.Quirks{},
			"ec_params name, ec_point raw, x25519 montgomery, copies off, allowed_mechanisms on " +
				"(nShield, by what its clients say, not tested)"},
		{"by configuration", "SoftHSM project", "SoftHSM v2", "montgomery,point-raw,params-name,no-allowed",
			hsm.Quirks{ECParams: "name", ECPoint: "raw", X25519: "montgomery", AllowedMechanisms: "off"},
			"ec_params name, ec_point raw, x25519 montgomery, copies off, allowed_mechanisms off " +
				"(SoftHSM 2.6.1, tested, ec_params by configuration, ec_point by configuration, " +
				"x25519 by configuration, allowed_mechanisms by configuration)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("SHIM_MAKER", tc.maker)
			t.Setenv("SHIM_MODEL", tc.model)
			t.Setenv("SHIM_DIALECT", tc.dialect)
			empty := func(t *testing.T) *hsm.Store {
				c := newToken(t)
				c.Module, c.Quirks = module, tc.config
				return open(t, c)
			}
			store := empty(t)
			if got := finding(t, store, "quirks", ""); got.Text != tc.want {
				t.Errorf("quirks: %s, want %s", got.Text, tc.want)
			}
			provenance := "generated"
			if strings.Contains(tc.dialect, "no-local") {
				provenance = "unreported"
			}
			if got := generate(t, store, "payments", keystore.Ed25519).Info().Provenance.String(); got != provenance {
				t.Errorf("provenance %s, want %s", got, provenance)
			}
			proof := finding(t, store, "proof", keystore.P256)
			if !strings.HasSuffix(proof.Text, "provenance "+provenance) {
				t.Errorf("%+v", proof)
			}
			store.Close()
			keystoretest.Run(t, func(t *testing.T) keystore.Store { return empty(t) })
		})
	}
}

// TestTokenChoosesTheRow has one module with tokens of several makers. The row of knownTokens is
// the token's, whatever the module calls itself.
func TestTokenChoosesTheRow(t *testing.T) {
	s := newShim(t, 1)
	for _, tc := range []struct{ maker, model, want string }{
		{"SoftHSM project", "SoftHSM v2", "(SoftHSM 2.6.1, "},
		{"SoftHSM project", "SoftHSM v3", "(the standard"},
		{"A SoftHSM project", "SoftHSM v2", "(the standard"},
		{"Mozilla Foundation", "NSS 3", "(NSS 3.87, "},
		{"Yubico (www.yubico.com)", "YubiHSM", "(the standard"},
		{"Nitrokey", "NetHSM", "(the standard"},
		{"IBM Corp.", "IBM SoftTok", "(the standard"},
	} {
		t.Setenv("SHIM_MAKER", tc.maker)
		t.Setenv("SHIM_MODEL", tc.model)
		store := open(t, s.config)
		if got := finding(t, store, "quirks", ""); !strings.Contains(got.Text, tc.want) {
			t.Errorf("%s %s: %s, want %q", tc.maker, tc.model, got.Text, tc.want)
		}
		store.Close()
	}
}

// TestNoOtherMechanism has a token without the mechanism of its row. The store does not choose
// another mechanism: the key is refused, and Inspect calls neither the mechanism nor the proof ok.
func TestNoOtherMechanism(t *testing.T) {
	s := newShim(t, 1)
	t.Setenv("SHIM_MAKER", "Acme")
	store := open(t, s.config)
	defer store.Close()
	all, err := store.Inspect(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		ok := f.For != keystore.X25519 || strings.Contains(f.Text, "CKM_ECDH1_DERIVE")
		if f.What != "import" && f.OK != ok { // SoftHSM takes no raw CKA_EC_POINT, which is another quirk
			t.Errorf("%+v", f)
		}
		if f.What == "mechanism" && !ok && !strings.Contains(f.Text, `set quirks.x25519 = "edwards"`) {
			t.Errorf("%+v", f)
		}
	}
	_, err = store.Generate(t.Context(), payments, keystore.X25519, keystore.Tag{1})
	if !errors.Is(err, keystore.ErrRefused) {
		t.Errorf("Generate: %v, want %v", err, keystore.ErrRefused)
	}
}

// TestWrongQuirks checks the errors with wrong quirks: Generate makes no key, the error is
// ErrRefused and not ErrUnavailable, and Inspect names the failing algorithm.
func TestWrongQuirks(t *testing.T) {
	for _, tc := range []struct {
		name, dialect string
		alg           keystore.Algorithm
	}{
		{"the curve's form", "params-name", keystore.Ed25519},
		{"X25519 by the mechanism of Ed25519", "montgomery", keystore.X25519},
		{"CKA_ALLOWED_MECHANISMS", "no-allowed", keystore.P256},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("SHIM_DIALECT", tc.dialect)
			s := newShim(t, 2)
			store := open(t, s.config)
			defer store.Close()
			_, err := store.Generate(t.Context(), payments, tc.alg, keystore.Tag{1})
			if !errors.Is(err, keystore.ErrRefused) {
				t.Errorf("Generate: %v, want %v", err, keystore.ErrRefused)
			}
			if got := finding(t, store, "proof", tc.alg); got.OK {
				t.Errorf("Inspect: %+v", got)
			}
			if n := s.count(initialize); n != 1 {
				t.Errorf("the module was initialised %d times", n)
			}
		})
	}
}

// TestWithoutEdDSA checks that Inspect notices a missing CKM_EDDSA, both in the mechanism list and
// in the test with a temporary key.
func TestWithoutEdDSA(t *testing.T) {
	t.Setenv("SHIM_DIALECT", "no-eddsa")
	store := open(t, newShim(t, 2).config)
	defer store.Close()
	found, err := store.Inspect(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	lacking := map[string]string{}
	for _, f := range found {
		if !f.OK {
			lacking[f.What+" "+string(f.For)] = f.Text
		}
	}
	if len(lacking) != 3 || lacking["mechanism ed25519"] != "CKM_EDDSA is missing" ||
		lacking["proof ed25519"] == "" || lacking["import "] == "" {
		t.Errorf("%q", lacking)
	}
	_, err = store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
	if !errors.Is(err, keystore.ErrRefused) {
		t.Errorf("Generate: %v, want %v", err, keystore.ErrRefused)
	}
	// The token makes the key pair, and the proof fails only afterwards: Generate must clean up.
	if _, err := store.Key(t.Context(), payments); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("a key of no use was left behind: %v", err)
	}
	generate(t, store, "noise", keystore.X25519)
}

// finding returns the only finding of a kind for an algorithm.
func finding(t *testing.T, store *hsm.Store, what string, alg keystore.Algorithm) (found keystore.Finding) {
	t.Helper()
	all, err := store.Inspect(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range all {
		if f.What == what && f.For == alg {
			found = f
			n++
		}
	}
	if n != 1 {
		t.Fatalf("%d findings about %s %s: %+v", n, what, alg, all)
	}
	return found
}
