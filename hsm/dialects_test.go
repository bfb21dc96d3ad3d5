package hsm_test

import (
	"errors"
	"strings"
	"testing"

	"countersign/hsm"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
)

// TestDialects runs the conformance suite on modules with other interpretations of PKCS#11. The
// store chooses the quirks by the module's CK_INFO, or takes them from the configuration.
func TestDialects(t *testing.T) {
	module := compileShim(t)
	for _, tc := range []struct {
		name, maker, version, dialect string
		config                        hsm.Quirks
		want                          string // beginning of Inspect's finding about the quirks
	}{
		{"the standard", "Acme", "1.0", "montgomery,point-raw,params-oid,reads-oid", hsm.Quirks{},
			"ec_params oid, ec_point raw, x25519 montgomery, copies off, allowed_mechanisms on (the standard)"},
		{"no montgomery", "Acme", "1.0", "point-raw,params-oid", hsm.Quirks{},
			"ec_params oid, ec_point raw, x25519 edwards, copies off, allowed_mechanisms on " +
				"(the standard, without CKM_EC_MONTGOMERY_KEY_PAIR_GEN)"},
		{"SoftHSM", "SoftHSM", "2.6", "params-oid,reads-oid,point-bits", hsm.Quirks{},
			"ec_params oid, ec_point octet-string, x25519 edwards, copies off, allowed_mechanisms on " +
				"(SoftHSM 2.6.1, tested)"},
		{"Kryoptic", "Kryoptic", "1.2", "montgomery,point-raw,params-oid", hsm.Quirks{},
			"ec_params oid, ec_point raw, x25519 montgomery, copies off, allowed_mechanisms on " +
				"(Kryoptic, by its source, not tested)"},
		{"NSS", "Mozilla Foundation", "3.103", "montgomery,point-raw,params-oid,reads-oid", hsm.Quirks{},
			"ec_params oid, ec_point raw, x25519 montgomery, copies off, allowed_mechanisms on " +
				"(NSS, by its source, not tested)"},
		{"YubiHSM", "Yubico (www.yubico.com)", "2.6", "montgomery,params-name,no-allowed", hsm.Quirks{},
			"ec_params name, ec_point octet-string, x25519 montgomery, copies off, allowed_mechanisms off " +
				"(YubiHSM 2, by its source, not tested)"},
		{"Nitrokey", "Nitrokey GmbH", "2.0", "montgomery,params-oid,reads-oid", hsm.Quirks{},
			"ec_params oid, ec_point octet-string, x25519 montgomery, copies off, allowed_mechanisms on " +
				"(NetHSM, by its source, not tested)"},
		{"nShield", "nCipher Corp. Ltd", "13.4", "montgomery,point-raw,params-name,reads-oid", hsm.Quirks{},
			"ec_params name, ec_point raw, x25519 montgomery, copies off, allowed_mechanisms on " +
				"(nShield, by what its clients say, not tested)"},
		{"by configuration", "SoftHSM", "2.6", "montgomery,point-raw,params-name",
			hsm.Quirks{ECParams: "name", ECPoint: "raw", X25519: "montgomery"},
			"ec_params name, ec_point raw, x25519 montgomery, copies off, allowed_mechanisms on " +
				"(SoftHSM 2.6.1, tested, " +
				"ec_params by configuration, ec_point by configuration, x25519 by configuration)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Setenv("SHIM_MAKER", tc.maker)
			t.Setenv("SHIM_VERSION", tc.version)
			t.Setenv("SHIM_DIALECT", tc.dialect)
			empty := func(t *testing.T) *hsm.Store {
				c := newToken(t)
				c.Module, c.Quirks = module, tc.config
				return open(t, c)
			}
			store := empty(t)
			if got := finding(t, store, "quirks", ""); !strings.HasPrefix(got.Text, tc.want) {
				t.Errorf("quirks: %s, want %s", got.Text, tc.want)
			}
			store.Close()
			keystoretest.Run(t, func(t *testing.T) keystore.Store { return empty(t) })
		})
	}
}

// TestTableRows checks that a row of knownModules applies only to the row's library versions.
func TestTableRows(t *testing.T) {
	s := newShim(t, 1)
	for _, tc := range []struct{ maker, version, want string }{
		{"Mozilla Foundation", "3.102", "(the standard, "},
		{"Mozilla Foundation", "3.103", "(NSS, "},
		{"Mozilla Foundation", "4.0", "(NSS, "},
		{"Yubico (www.yubico.com)", "2.5", "(the standard, "},
		{"Yubico (www.yubico.com)", "2.6", "(YubiHSM 2, "},
		{"IBM", "3.26", "(the standard, "},
		{"IBM", "3.27", "(openCryptoki, "},
		{"SoftHSMish", "2.0", "(SoftHSM 2.6.1, "},
		{"A SoftHSM", "2.0", "(the standard, "},
	} {
		t.Setenv("SHIM_MAKER", tc.maker)
		t.Setenv("SHIM_VERSION", tc.version)
		store := open(t, s.config)
		if got := finding(t, store, "quirks", ""); !strings.Contains(got.Text, tc.want) {
			t.Errorf("%s %s: %s, want %q", tc.maker, tc.version, got.Text, tc.want)
		}
		store.Close()
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
