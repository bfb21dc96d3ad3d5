package main

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const least = `listen = "127.0.0.1:7700"
admin_socket = "admin.sock"
ledger = "ledger.db"
policy = "policy.cedar"
[tokens.main]
uri = "pkcs11:token=countersign"
`

// TestConfig: a small file has the defaults. The error of each mistake is one line, with the field
// or the line of the file.
func TestConfig(t *testing.T) {
	c, err := parseConfig("/etc/c.toml", []byte(least))
	if err != nil || c.Ledger != "/etc/ledger.db" || c.Limits.HandshakesPerSource != 5 ||
		c.Limits.Handshakes != 100 || c.Limits.Sources != 100_000 {
		t.Fatalf("%+v, %v", c, err)
	}
	l := c.limits()
	if l.HandshakeTimeout != 10*time.Second || l.ReadTimeout != 30*time.Second ||
		l.IdleTimeout != 300*time.Second || l.WriteTimeout != 10*time.Second {
		t.Errorf("%+v", l)
	}
	if l.Handshakes.Kept != 25 || l.Calls["main"] != 16 {
		t.Errorf("%+v", l)
	}
	limits := least + "[limits]\n"
	replaced := func(old, new string) string { return strings.Replace(least, old, new, 1) }
	for text, want := range map[string]string{
		"lisssten = \"a:1\"\n" + least:                                    "c.toml:1: unknown field",
		replaced("127.0.0.1:7700", "nowhere"):                             "listen: ",
		replaced("listen", "# listen"):                                    "listen is missing",
		"listen_pubky = \"x\"\n" + least:                                  "listen_pubky: ",
		limits + "handshakes_per_source = 0\n":                            "limits.handshakes_per_source must be 1 to",
		limits + "read_timeout = \"1h\"\n":                                "limits.read_timeout must be",
		limits + "strangers = 2000\n":                                     "limits.strangers must be 1 to 1024",
		limits + "batch_items = 101\n":                                    "limits.batch_items must be 1 to 100",
		limits + "requests_per_peer = 99\n":                               "limits.batch_items must be at most",
		least + "[retention]\ndecision_days = 0\n":                        "retention.decision_days",
		limits + "idle_timeout = 5\n":                                     "limits.idle_timeout must be 1s to 24h0m0s",
		least + "[limits\n":                                               "c.toml:7",
		replaced("[tokens.main]", "[tokens.main]\nworkers = 99999999999"): "workers must be",
	} {
		_, err := parseConfig("/etc/c.toml", []byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// FuzzConfig: any file gives either a configuration within all bounds, or an error on one line.
func FuzzConfig(f *testing.F) {
	f.Add([]byte(least))
	f.Add([]byte(least + "[limits]\nhandshakes = 7\nidle_timeout = \"1m\"\n[retention]\nepoch = \"day\"\n"))
	f.Add([]byte(least + "[tokens.tpm]\ntpm = \"/dev/tpmrm0\"\nstate = \"keys\"\npcrs = [7, 11]\n"))
	f.Add([]byte("[tokens]\nmain = 7\n"))
	f.Add([]byte("[tokens.\"a b\"]\n"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseConfig(filepath.Join(dir, "c.toml"), b)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\n") {
				t.Fatalf("%q: more than one line", err)
			}
			return
		}
		if err := c.check(); err != nil {
			t.Fatalf("an accepted configuration is not valid: %v", err)
		}
		if l := c.limits(); l.Connections < 1 || l.Handshakes.PerSource < 1 ||
			l.Handshakes.Kept > l.Handshakes.Global || l.Strangers > l.Connections || l.IdleTimeout <= 0 {
			t.Fatalf("%+v", l)
		}
		if len(c.Tokens) == 0 {
			t.Fatal("no token")
		}
	})
}
