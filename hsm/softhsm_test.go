package hsm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"countersign/hsm"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// newToken makes a SoftHSM token in a directory of its own. Tests with a token can't run in
// parallel: SoftHSM reads the directory from the environment of the process.
func newToken(t testing.TB) hsm.Config {
	t.Helper()
	if _, err := os.Stat(softHSM); err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatalf("SoftHSM is required and missing: %v", err)
		}
		t.Skipf("SoftHSM is not installed (apt-get install softhsm2): %v", err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	conf := fmt.Sprintf("directories.tokendir = %s/tokens\nlog.level = ERROR\n", dir)
	write(t, filepath.Join(dir, "softhsm2.conf"), conf)
	write(t, filepath.Join(dir, "pin"), "test-user-pin\n")
	write(t, filepath.Join(dir, "so-pin"), "test-so-pin\n")
	t.Setenv("SOFTHSM2_CONF", filepath.Join(dir, "softhsm2.conf"))
	c := hsm.Config{
		URI:      "pkcs11:token=countersign%20test",
		Module:   softHSM,
		PINFile:  filepath.Join(dir, "pin"),
		Sessions: 4,
	}
	if err := hsm.InitToken(t.Context(), c, filepath.Join(dir, "so-pin")); err != nil {
		t.Fatal(err)
	}
	return c
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, c hsm.Config) *hsm.Store {
	t.Helper()
	s, err := hsm.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
