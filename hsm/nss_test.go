package hsm_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"countersign/hsm"
	"countersign/internal/keystore"
)

// TestNSS opens a database of NSS 3.87 (Debian 12), a module that needs a parameter string. NSS
// 3.87 has P-256 and neither Ed25519 nor X25519, and Inspect and Generate say so. NSS does not
// report where it has made a key.
func TestNSS(t *testing.T) {
	found, err := filepath.Glob("/usr/lib/*/libsoftokn3.so")
	certutil, missing := exec.LookPath("certutil")
	if err != nil || len(found) == 0 || missing != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatal("NSS is required and missing: libsoftokn3.so or certutil")
		}
		t.Skip("NSS is not installed (apt-get install libnss3 libnss3-tools)")
	}
	dir := t.TempDir()
	database := "sql:" + filepath.Join(dir, "database")
	if err := os.Mkdir(filepath.Join(dir, "database"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "pin"), "test-user-pin\n")
	make := exec.Command(certutil, "-N", "-d", database, "-f", filepath.Join(dir, "pin"))
	if out, err := make.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c := hsm.Config{
		URI: "pkcs11:token=NSS%20Certificate%20DB;model=NSS%203", Module: found[0], PINFile: filepath.Join(dir, "pin"),
		Sessions: 2, Share: 1,
	}
	if _, err := hsm.Open(t.Context(), c); !errors.Is(err, keystore.ErrRefused) {
		t.Errorf("without parameters: %v, want %v", err, keystore.ErrRefused)
	}
	c.Parameters = "configdir='" + database + "' certPrefix='' keyPrefix='' secmod='secmod.db' flags="
	store := open(t, c)
	defer func() { store.Close() }()
	all, err := store.Inspect(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		ok := f.For == keystore.P256 || f.For == "" && f.What != "import" ||
			strings.Contains(f.Text, "CKM_ECDH1_DERIVE")
		if f.OK != ok {
			t.Errorf("%+v", f)
		}
	}
	_, err = store.Generate(t.Context(), payments, keystore.Ed25519, keystore.Tag{1})
	if !errors.Is(err, keystore.ErrRefused) {
		t.Errorf("Ed25519: %v, want %v", err, keystore.ErrRefused)
	}
	key := generate(t, store, "tls", keystore.P256)
	if p := key.Info().Provenance; p.String() != "unreported" || p.Generated() {
		t.Errorf("provenance: %+v", p)
	}
	signs(t, key)
	store.Close()
	store = open(t, c)
	faults, err := store.Compare(t.Context(), []keystore.Info{key.Info()})
	if err != nil || !slices.Equal(faults, []error{nil}) {
		t.Errorf("Compare: %v, %v", faults, err)
	}
	signs(t, store.Bind(key.Info()))
}
