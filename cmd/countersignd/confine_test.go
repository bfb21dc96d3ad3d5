package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestRightsOfKeyWorkers compares the rights of a token with its configuration. No file that the
// module may write is read for rights, and no right is for the root of all files.
func TestRightsOfKeyWorkers(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"tokens", "folder", "config", "state"} {
		if err := os.Mkdir(path(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("SOFTHSM2_CONF", "")
	t.Setenv("XDG_CONFIG_HOME", path("config"))
	for name, text := range map[string]string{
		"softhsm2.conf": "log.level = ERROR\n directories.tokendir = " + path("tokens") + " \n", "file": "",
		"bad.conf": "directories.tokendir = /\n", "relative.conf": "directories.tokendir = tokens\n",
	} {
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	softHSM := func(variables map[string]string) *Token {
		return &Token{
			URI: "pkcs11:token=x", Module: "/opt/vendor/module.so", PINFile: path("pin"), Environment: variables,
		}
	}
	network := softHSM(nil)
	network.Network = []string{"192.0.2.1:1792", "hsm.example:1792"}
	more := softHSM(nil)
	more.Files = []string{path("more")}
	for name, c := range map[string]struct {
		token                         *Token
		read, write, devices, sockets []string
		connect                       []uint16
	}{
		"a module": {
			token: softHSM(map[string]string{
				"SOFTHSM2_CONF": path("softhsm2.conf"), "A": path("file"), "B": path("folder"), "C": path("missing"),
				"D": "/", "E": "file", "F": "a:" + path("file"),
			}),
			read: []string{
				path("config/pkcs11"), path("file"), path("pin"), path("seed"), path("softhsm2.conf"), "/opt/vendor",
			},
			write: []string{path("folder"), path("tokens")},
		},
		"a token's folder that is the root": {
			token: softHSM(map[string]string{"SOFTHSM2_CONF": path("bad.conf")}),
			read:  []string{path("bad.conf"), path("config/pkcs11"), path("pin"), path("seed"), "/opt/vendor"},
		},
		"a token's folder without a place": {
			token: softHSM(map[string]string{"SOFTHSM2_CONF": path("relative.conf")}),
			read:  []string{path("config/pkcs11"), path("pin"), path("relative.conf"), path("seed"), "/opt/vendor"},
		},
		"a TPM": {
			token: &Token{TPM: "/dev/tpmrm0", State: path("state"), PolicyKey: path("key")},
			read:  []string{path("key"), path("seed")}, write: []string{path("state")},
			devices: []string{"/dev/tpmrm0"},
		},
		"a simulator": {
			token: &Token{TPM: path("tpm/socket"), State: path("state"), PINFile: path("pin")},
			read:  []string{path("pin"), path("seed")}, write: []string{path("state")}, sockets: []string{path("tpm")},
		},
	} {
		got := c.token.rights(path("seed"), "")
		ours := func(all []string) []string {
			all = slices.DeleteFunc(slices.Clone(all), func(path string) bool {
				return slices.Contains(systemFiles, path) || path == "/dev/null"
			})
			slices.Sort(all)
			return all
		}
		slices.Sort(c.read)
		if read := ours(got.Read); !slices.Equal(read, c.read) {
			t.Errorf("%s: reads %q, want %q", name, read, c.read)
		}
		if write := ours(got.Write); !slices.Equal(write, c.write) {
			t.Errorf("%s: writes %q, want %q", name, write, c.write)
		}
		if !slices.Equal(got.Devices, c.devices) || !slices.Equal(got.Sockets, c.sockets) || len(got.Connect) > 0 {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got := network.rights().Connect; !slices.Equal(got, []uint16{53, 1792}) {
		t.Errorf("a network HSM: ports %d", got)
	}
	if got := more.rights().Write; !slices.Contains(got, path("more")) {
		t.Errorf("with files: writes %q", got)
	}
}

// TestConfinementFields refuses files and addresses that are none.
func TestConfinementFields(t *testing.T) {
	for _, token := range []Token{
		{URI: "pkcs11:token=x", Files: []string{"/"}}, {URI: "pkcs11:token=x", Files: []string{""}},
		{URI: "pkcs11:token=x", Network: []string{"hsm.example"}},
		{URI: "pkcs11:token=x", Network: []string{"hsm.example:0"}},
		{URI: "pkcs11:token=x", Network: []string{"hsm.example:65536"}},
		{TPM: "/dev/tpmrm0", State: "/s", Network: []string{"hsm.example:1"}},
		{TPM: "/dev/tpmrm0", State: "/s", Files: []string{"/f"}},
	} {
		if err := token.checkBackend(); err == nil {
			t.Errorf("%+v is accepted", token)
		}
	}
	good := Token{URI: "pkcs11:token=x", Files: []string{"/f"}, Network: []string{"[2001:db8::1]:1792"}}
	if err := good.checkBackend(); err != nil {
		t.Error(err)
	}
}
