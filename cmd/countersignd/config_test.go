package main

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/internal/alert"
	"countersign/internal/backup"
	"countersign/internal/ledger"
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
	if c.History != "/etc/ledger.db.history" {
		t.Errorf("the history is %s", c.History)
	}
	for text, want := range map[string]string{"none": "", "h": "/etc/h", "/var/h": "/var/h"} {
		c, err := parseConfig("/etc/c.toml", []byte("history = \""+text+"\"\n"+least))
		if err != nil || c.History != want {
			t.Errorf("history %s: %q, %v", text, c.History, err)
		}
	}
	for _, same := range []string{"ledger.db", "policy.cedar", "/etc/ledger.db", "x/../ledger.db"} {
		_, err := parseConfig("/etc/c.toml", []byte("history = \""+same+"\"\n"+least))
		if err == nil || !strings.Contains(err.Error(), "history: /etc/") {
			t.Errorf("the history in %s: %v", same, err)
		}
	}
	limits := least + "[limits]\n"
	replaced := func(old, new string) string { return strings.Replace(least, old, new, 1) }
	for text, want := range map[string]string{
		"lisssten = \"a:1\"\n" + least:                                    "c.toml:1: unknown field",
		replaced("127.0.0.1:7700", "nowhere"):                             "listen: ",
		replaced("listen", "# listen"):                                    "listen is missing",
		"listen_pubky = \"x\"\n" + least:                                  "listen_pubky: ",
		limits + "handshakes_per_source = 0\n":                            "limits.handshakes_per_source must be 1 to",
		limits + "bytes_per_day = 100000\n":                               "limits.bytes_per_day and limits.refusal",
		limits + "refusal_bytes_per_day = 0\n":                            "limits.refusal_bytes_per_day must be 1 to",
		limits + "read_timeout = \"1h\"\n":                                "limits.read_timeout must be",
		limits + "strangers = 2000\n":                                     "limits.strangers must be 1 to 1024",
		limits + "batch_items = 101\n":                                    "limits.batch_items must be 1 to 100",
		limits + "requests_per_peer = 99\n":                               "limits.batch_items must be at most",
		least + "[retention]\ndecision_days = 0\n":                        "retention.decision_days",
		limits + "idle_timeout = \"5ms\"\n":                               "limits.idle_timeout must be 1s to 1d",
		least + "[limits\n":                                               "c.toml:7",
		replaced("[tokens.main]", "[tokens.main]\nworkers = 99999999999"): "workers must be",
		limits + "nonces = 2\n":                                           "limits.nonces must be at least 3",
	} {
		_, err := parseConfig("/etc/c.toml", []byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// TestConfigMeansWhatItSays: a name in another case, a name that is written twice, a duration
// without a unit, a byte order mark and an address that can't be are errors with their line or
// field. The last of two values never wins.
func TestConfigMeansWhatItSays(t *testing.T) {
	table := func(name, line string) string { return least + "[" + name + "]\n" + line + "\n" }
	token := func(line string) string { return least + line + "\n" }
	replaced := func(old, new string) string { return strings.Replace(least, old, new, 1) }
	idle := "tpm = \"/dev/tpmrm0\"\nstate = \"s\"\nidle_lock = \"5ns\""
	for text, want := range map[string]string{
		"Unattended_Start = true\n" + least:                           `c.toml:1: unknown field "Unattended_Start"`,
		"unattended_start = false\nUNATTENDED_START = true\n" + least: `c.toml:2: unknown field "UNATTENDED_START"`,
		"log_level = \"info\"\nlog_level = \"warn\"\n" + least:        "c.toml:2: ",
		replaced("[tokens.main]", "[Tokens.main]"):                    `c.toml:5: unknown field "Tokens"`,
		token("PIN_file = \"pin\""):                                   `c.toml:7: unknown field "tokens.main.PIN_file"`,
		table("tokens.main.Quirks", "copies = \"no\""):                `c.toml:7: unknown field "tokens.main.Quirks"`,
		token("quirks = { Copies = \"no\" }"):                         `c.toml:7: unknown field "tokens.main.quirks.`,
		token("quirks.Copies = \"no\""):                               `c.toml:7: unknown field "tokens.main.quirks.`,
		least + "[[webhooks]]\nName = \"x\"\n":                        `c.toml:8: unknown field "webhooks.Name"`,
		"webhooks = [{ Name = \"x\" }]\n" + least:                     `c.toml:1: unknown field "webhooks.Name"`,
		"limits = { Nonces = 1 }\n" + least:                           `c.toml:1: unknown field "limits.Nonces"`,
		table("limits", "clock_skew = 30"):                            `c.toml:8: limits.clock_skew must be a text`,
		table("limits", "clock_skew = 3.5"):                           `c.toml:8: limits.clock_skew must be a text`,
		table("limits", "clock_skew = \"30\""):                        "c.toml:8: ",
		table("limits", "clock_skew = 07:32:00"):                      `c.toml:8: limits.clock_skew must be a text`,
		"limits.clock_skew = 30\n" + least:                            `c.toml:1: limits.clock_skew must be a text`,
		"limits = { clock_skew = 30 }\n" + least:                      `c.toml:1: limits.clock_skew must be a text`,
		token("deadline = 5"):                                         `c.toml:7: tokens.main.deadline must be a text`,
		"rollback_interval = 3600\n" + least:                          `c.toml:1: rollback_interval must be a text`,
		replaced("uri = \"pkcs11:token=countersign\"", idle):          "idle_lock must be",
		"\xef\xbb\xbf" + least:                                        "c.toml:1: the file begins with a byte",
		"\xff\xfel\x00":                                               "c.toml:1: the file begins with a byte",
		replaced(":7700", ":70000"):                                   `listen: "127.0.0.1:70000" has the port "70000"`,
		replaced(":7700", ":http"):                                    `has the port "http"`,
		"admin_https = \"127.0.0.1:70000\"\n" + least:                 `admin_https: "127.0.0.1:70000" has the port`,
		"metrics_listen = \"10.0.0.1:7790\"\n" + least:                `"10.0.0.1:7790" is not a loopback`,
		"metrics_listen = \"127.0.0.1:7700\"\n" + least:               "listen and metrics_listen are both",
		"listen_pubky = \"127.0.0.1:7700\"\n" + least:                 "listen and listen_pubky are both",
		replaced("admin.sock", strings.Repeat("s", 103)):              "admin_socket: the path /etc/sss",
	} {
		_, err := parseConfig("/etc/c.toml", []byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	if _, err := parseConfig("/etc/c.toml", []byte(replaced("admin.sock", strings.Repeat("s", 102)))); err != nil {
		t.Errorf("a socket path of 107 bytes: %v", err)
	}
	path := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(path, []byte("admin_group = \"no-such-group\"\n"+least), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadConfig(path); err == nil || !strings.Contains(err.Error(), "admin_group: ") {
		t.Errorf("a group that is not there: %v", err)
	}
}

// TestKeysStayWhenACounterIsAdded: the token of the counter is no token for keys, unless it is the
// only one. So a TPM that is added for the counter changes neither noise_token nor key create.
func TestKeysStayWhenACounterIsAdded(t *testing.T) {
	const anchor = "\n[tokens.anchor]\ntpm = \"tpm.sock\"\nstate = \"state\"\n"
	const second = "\n[tokens.second]\nuri = \"pkcs11:token=second\"\nmodule = \"m.so\"\npin_file = \"pin\"\n"
	main := least + "module = \"m.so\"\npin_file = \"pin\"\n"
	for _, c := range []struct{ text, noise, signing, rollback, wrong string }{
		{main, "main", "main", "", ""},
		{main + anchor, "main", "main", "anchor", ""},
		{"rollback_token = \"none\"\n" + main + anchor, "", "", "", "noise_token is missing"},
		{"noise_token = \"anchor\"\n" + main + anchor, "anchor", "main", "anchor", ""},
		{main + second, "", "", "", "one of main, second"},
		{"noise_token = \"second\"\n" + main + second, "second", "", "", ""},
		{"noise_token = \"third\"\n" + main + second, "", "", "", "one of main, second"},
		{main + second + anchor, "", "", "", "one of anchor, main, second"},
	} {
		got, err := parseConfig("c.toml", []byte(c.text))
		if c.wrong != "" {
			if err == nil || !strings.Contains(err.Error(), c.wrong) {
				t.Errorf("%s: %v", c.text, err)
			}
			continue
		}
		if err != nil || got.NoiseToken != c.noise || got.LogToken != c.noise ||
			got.appliance().SigningToken != c.signing || got.RollbackToken != c.rollback {
			t.Errorf("%s: noise_token %q, signing %q, rollback_token %q, %v", c.text, got.NoiseToken,
				got.appliance().SigningToken, got.RollbackToken, err)
		}
	}
}

// TestDurationsHaveDays: a duration may be in days and weeks, and has a unit.
func TestDurationsHaveDays(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"10s": 10 * time.Second, "1h30m": 90 * time.Minute, "7d": 7 * 24 * time.Hour, "2w": 14 * 24 * time.Hour,
		"30": -1, "-1s": -1, "7 d": -1, "99999d": -1, "d": -1, "": -1,
	} {
		var d Duration
		if err := d.UnmarshalText([]byte(text)); (err != nil) != (want < 0) || err == nil && d.std() != want {
			t.Errorf("%q: %v, %v", text, d.std(), err)
		}
	}
}

// TestMissingPaths: a variable of a module that names no file is in the error of its token.
func TestMissingPaths(t *testing.T) {
	there := t.TempDir()
	token := Token{Environment: map[string]string{"SOFTHSM2_CONF": "/nowhere/softhsm2.conf", "OTHER": there, "N": "x"}}
	const want = "; SOFTHSM2_CONF names /nowhere/softhsm2.conf, which does not exist: correct environment"
	if got := token.missingPaths(); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestConfigPaths: relative paths of all fields are relative to the directory of the file.
func TestConfigPaths(t *testing.T) {
	dir := t.TempDir()
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := parseConfig(filepath.Join(dir, "c.toml"), []byte("noise_token = \"main\"\n"+least+`module = "m.so"
pin_file = "pin"
[tokens.tpm]
tpm = "tpm.sock"
state = "state"
policy_key = "key.pem"
[[webhooks]]
name = "shop"
url = "https://shop.example/hook"
ca_file = "ca.pem"
`))
	if err != nil {
		t.Fatal(err)
	}
	var paths func(v reflect.Value) int
	paths = func(v reflect.Value) (n int) {
		switch v.Kind() {
		case reflect.Pointer:
			return paths(v.Elem())
		case reflect.Slice:
			for i := range v.Len() {
				n += paths(v.Index(i))
			}
		case reflect.Map:
			for each := v.MapRange(); each.Next(); {
				n += paths(each.Value())
			}
		case reflect.Struct:
			for field, each := range v.Fields() {
				if field.IsExported() { // a field of the file
					n += paths(each)
				}
			}
		case reflect.String:
			if strings.HasPrefix(v.String(), dir+"/") {
				n++
			}
		}
		return n
	}
	if n := paths(reflect.ValueOf(c)); n != 11 {
		t.Errorf("%d paths are in the directory of the file, want 11: %+v", n, c)
	}
}

// TestBoundsOfNonces: the bounds of nonces follow limits.nonces, and each is accepted from 1 to its
// largest value.
func TestBoundsOfNonces(t *testing.T) {
	with := func(lines string) (ledger.Options, error) {
		c, err := parseConfig("/etc/c.toml", []byte(least+"[limits]\n"+lines))
		if err != nil {
			return ledger.Options{}, err
		}
		return c.ledger(), nil
	}
	for lines, want := range map[string]ledger.Bounds{
		"":              {Peer: 5_000_000, Verifying: 10_000_000, Own: 200_000},
		"nonces = 1000": {Peer: 250, Verifying: 500, Own: 10},
		"nonces = 3":    {Peer: 1, Verifying: 1, Own: 1},
		"nonces = 1000\nnonces_per_peer = 1\nnonces_verify = 2\nnonces_own = 3": {Peer: 1, Verifying: 2, Own: 3},
	} {
		if o, err := with(lines); err != nil || o.Bounds != want {
			t.Errorf("%q: %+v, %v; want %+v", lines, o.Bounds, err, want)
		}
	}
	for field, most := range map[string]int{"nonces_per_peer": 990, "nonces_verify": 989, "nonces_own": 499} {
		for n, ok := range map[int]bool{0: false, 1: true, most: true, most + 1: false, -1: false} {
			_, err := with(fmt.Sprintf("nonces = 1000\n%s = %d\n", field, n))
			if (err == nil) != ok || err != nil && !strings.Contains(err.Error(), "limits."+field+" must be 1 to") &&
				!strings.Contains(err.Error(), "limits.nonces_verify must be 1 to") {
				t.Errorf("%s = %d: %v", field, n, err)
			}
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

// TestAlertsConfig: the tables [alerts] and [mail], and the types of webhooks, are strict, and each
// error has its field.
func TestAlertsConfig(t *testing.T) {
	mail := func(lines ...string) string {
		return least + "[mail]\nserver = \"mail.example.com:465\"\nfrom = \"a@example.com\"\n" +
			"to = [\"ops@example.com\"]\n" + strings.Join(lines, "\n")
	}
	c, err := parseConfig("/etc/c.toml", []byte(mail("user = \"u\"", "password_file = \"p\"")))
	if err != nil || c.mail().TLS != "implicit" || c.mail().PasswordFile != "/etc/p" {
		t.Fatalf("%+v, %v", c.Mail, err)
	}
	if a := c.alerts(); a != alert.Defaults() {
		t.Errorf("%+v", a)
	}
	alerts := least + "[alerts]\n"
	hook := least + "[[webhooks]]\nname = \"ops\"\nurl = \"https://example.com/\"\n"
	for text, want := range map[string]string{
		alerts + "replay_warning = 1":                                       "c.toml:8: unknown field",
		alerts + "replays_warning = 11":                                     "alerts.replays_critical must be 11 to",
		alerts + "replays_warning = -1":                                     "alerts.replays_warning must be 0 to",
		alerts + "replays_window = 60":                                      "alerts.replays_window must be a text",
		alerts + "replays_window = \"2d\"":                                  "alerts.replays_window must be 1s to 1d",
		alerts + "handshake_timeouts_critical = 100":                        "handshake_timeouts_critical must be",
		alerts + "handshakes_least = 0":                                     "alerts.handshakes_least must be 1 to",
		alerts + "quiet = \"0s\"":                                           "alerts.quiet must be 1s to 1d",
		alerts + "after = \"2h\"":                                           "alerts.after must be",
		alerts + "repeat = \"8d\"":                                          "alerts.repeat must be 1m to",
		alerts + "disk_mib = -1":                                            "alerts.disk_mib must be 0 to",
		hook + "types = [\"alerts\"]":                                       "ops.types: \"alerts\" is none of",
		least + "[mail]\nserver = \"a:25\"":                                 "mail.to is missing",
		mail("tls = \"maybe\""):                                             "mail.tls: ",
		mail("tls = \"none\""):                                              "mail.tls: without TLS only",
		mail("user = \"u\""):                                                "mail.user and password_file",
		strings.Replace(mail(), "a@example.com", "A <a@b.c>", 1):            "mail.from: ",
		strings.Replace(mail(), "ops@example.com", "ops", 1):                "mail.to: ",
		strings.Replace(mail(), "mail.example.com:465", "mail", 1):          "mail.server: ",
		strings.Replace(mail(), "[\"ops", "[\"ops@example.com\", \"ops", 1): "\"ops@example.com\" is there twice",
	} {
		_, err := parseConfig("/etc/c.toml", []byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// TestOldConfigurations: a configuration of each version can be used, and each field that a version
// had is still a field. The fields of the present version are among those.
func TestOldConfigurations(t *testing.T) {
	whole := func(path string, b []byte) error { _, err := parseConfig(path, b); return err }
	known := func(path string, b []byte) error { return decodeTOML(path, b, new(defaults())) }
	var all []byte
	for pattern, read := range map[string]func(path string, b []byte) error{
		"testdata/configuration-*.toml": whole, "testdata/fields-*.toml": known,
	} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		for _, path := range files {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := read(path, b); err != nil {
				t.Error(err)
			}
			all = append(all, b...)
		}
	}
	reference, err := os.ReadFile("reference.toml")
	if err != nil {
		t.Fatal(err)
	}
	fields := regexp.MustCompile(`(?m)^#?(\w+ =)`).FindAllSubmatch(reference, -1)
	for _, field := range fields {
		if !bytes.Contains(all, append([]byte{'\n'}, field[1]...)) {
			t.Errorf("no file of testdata has the field %s", field[1])
		}
	}
	if len(fields) < 100 {
		t.Errorf("reference.toml has %d fields", len(fields))
	}
}

const aRecipient = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"

// TestBackupConfig checks the errors of the table of backups.
func TestBackupConfig(t *testing.T) {
	folder := "[backup]\nfolder = \"b\"\nrecipients = [\"" + aRecipient + "\"]\n"
	server := "sftp = \"sftp://u@backup.example.com:2222/f\"\nsftp_host_keys = [\"" +
		"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGPHSpuA2hgXhsrWNYjN9sJ7y3vD9v8rVdHnVnqZk5lH\"]\n"
	keys := t.TempDir()
	server += fmt.Sprintf("sftp_key_file = %q\n", filepath.Join(keys, "k"))
	for config, want := range map[string]string{
		"[backup]\nfolder = \"b\"\n":                            "backup.recipients are missing",
		"[backup]\nrecipients = [\"" + aRecipient + "\"]\n":     "backup.recipients are for a folder",
		"[backup]\nfolder = \"b\"\nrecipients = [\"x\"]\n":      "backup.recipients: ",
		folder + "schedule = \"nightly\"\n":                     "backup.schedule: ",
		folder + "schedule = \"61 * * * *\"\n":                  "backup.schedule: ",
		folder + "daily = -1\n":                                 "backup.daily must be",
		folder + "weekly = 10001\n":                             "backup.weekly must be",
		folder + "sftp_key_file = \"k\"\n":                      "backup.sftp is missing",
		folder + strings.Replace(server, "ssh-ed25519 ", "", 1): "sftp_host_keys",
		"[backup]\n" + server:                                   "backup.folder is missing",
		folder + "sftp = \"sftp://a@b/c\"\n":                    "backup.sftp_key_file is missing",
		folder + "sftp = \"sftp://a:secret@b/c\"\n":             "backup.sftp: a password is not used",
	} {
		if _, err := parseConfig("/etc/c.toml", []byte(least+config)); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", config, err, want)
		}
	}
	c, err := parseConfig("/etc/c.toml", []byte(least+"pin_file = \"pin\"\n"+folder+"schedule = \"none\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	b := c.backup()
	if b.Folder != "/etc/b" || len(b.To) != 1 || b.Schedule != "" || b.Keep.Daily != 7 || len(b.Files) != 3 ||
		len(b.Left) != 1 || b.Left[0].Path != "/etc/pin" {
		t.Errorf("%+v", b)
	}
	c, err = parseConfig("/etc/c.toml", []byte(least+"pin_file = \"pin\"\n"+folder+server))
	if err != nil {
		t.Fatal(err)
	}
	secret := func(l backup.Left) bool { return l.Path == filepath.Join(keys, "k") }
	if left := c.backup().Left; !slices.ContainsFunc(left, secret) {
		t.Errorf("left out: %+v", left)
	}
	r := c.rights("/etc/c.toml", nil, nil)
	if !r.Names || !slices.Contains(r.Connect, 2222) || !slices.Contains(r.Read, keys) {
		t.Errorf("the daemon can't reach the server: %+v", r)
	}
}
