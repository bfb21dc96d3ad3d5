package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign/internal/backup"
	"countersign/internal/form"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
)

// TestMovedPaths: each path of a configuration is moved once, by the longest folder that it is in,
// and to where its file is put.
func TestMovedPaths(t *testing.T) {
	for _, c := range []struct {
		moved    map[string]string
		old, new string
	}{
		{map[string]string{"/a": "/b", "/b": "/a"}, `x = "/a/1"; y = '/b'; z = "/a"`, `x = "/b/1"; y = '/a'; z = "/b"`},
		{map[string]string{"/v/cs": "/srv/cs", "/srv": "/mnt"}, `"/v/cs/l" "/srv/l"`, `"/srv/cs/l" "/mnt/l"`},
		{map[string]string{"/a": "/b", "/a/c": "/d"}, `"/a/c/1" "/a/1" "/ab/1"`, `"/d/1" "/b/1" "/ab/1"`},
		{map[string]string{"/a": "/b"}, `# /a/1 "a/1" "pkcs11:x=/a/1"`, `# /a/1 "a/1" "pkcs11:x=/a/1"`},
		{nil, `"/a/1"`, `"/a/1"`},
	} {
		r := restoring{moved: c.moved}
		for range 20 { // maps have no order
			if got := string(r.configuration([]byte(c.old))); got != c.new {
				t.Fatalf("%v moves %s to %s, want %s", c.moved, c.old, got, c.new)
			}
		}
	}
}

// TestPutFiles puts the files of a backup back that its configuration names. Another file, or a
// token's file outside of the token's folder, is refused, and none is executable.
func TestPutFiles(t *testing.T) {
	here, scratch := t.TempDir(), t.TempDir()
	config := least + "module = \"m\"\npin_file = \"pin\"\n[tokens.tpm]\ntpm = \"/dev/tpmrm0\"\nstate = \"keys\"\n"
	opened := func(more ...backup.File) (b openedBackup) {
		files := append([]backup.File{
			{Kind: backup.Ledger, Path: "/old/ledger.db"},
			{Kind: backup.Configuration, Path: "/old/c.toml", Mode: 0o644},
		}, more...)
		for _, f := range files {
			content := f.Path
			if f.Kind == backup.Configuration {
				content = config
			}
			at := filepath.Join(scratch, "file")
			if f.Kind == backup.Configuration {
				at = filepath.Join(scratch, "configuration")
			}
			if err := os.WriteFile(at, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			b.Contents.Files = append(b.Contents.Files, at)
		}
		b.Manifest.Files = files
		return b
	}
	r := restoring{moved: map[string]string{"/old": here}}
	tokens := backup.File{Kind: backup.TokenFile, Path: "/old/keys/tpm.json", Mode: 0o777}
	at, err := r.putFiles(opened(tokens), io.Discard)
	if err != nil || at != filepath.Join(here, "c.toml") {
		t.Fatal(at, err)
	}
	info, err := os.Stat(filepath.Join(here, "keys/tpm.json"))
	if err != nil || info.Mode()&0o113 != 0 {
		t.Errorf("%v, %v", info, err)
	}
	policy := backup.File{Kind: backup.Policy, Path: "/old/policy.cedar"}
	if _, err := r.putFiles(opened(policy), io.Discard); err != nil {
		t.Errorf("the policy: %v", err)
	}
	for _, f := range []backup.File{
		{Kind: backup.Policy, Path: "/old/cron.d/x"}, {Kind: backup.Authority, Path: "/etc/ld.so.preload"},
		{Kind: backup.TokenFile, Path: "/old/tpm.json"}, {Kind: backup.TokenFile, Path: "/old/keys/more/tpm.json"},
		{Kind: backup.Configuration, Path: "/old/other.toml"},
	} {
		if _, err := r.putFiles(opened(f), io.Discard); !errors.Is(err, backup.ErrDamaged) {
			t.Errorf("%+v: %v", f, err)
		}
		if _, err := os.Stat(r.place(f.Path)); err == nil {
			t.Errorf("%s was written", r.place(f.Path))
		}
	}
}

// TestRestoreWithAWrongClock: a clock behind the backup, or behind the ledger in it, is refused.
func TestRestoreWithAWrongClock(t *testing.T) {
	made := time.Unix(1_800_000_000, 0)
	for _, c := range []struct {
		now, ledgers time.Time
		good         bool
	}{
		{made, made, true}, {made.Add(time.Hour), made, true}, {made.Add(-30 * time.Second), made, true},
		{made.Add(-31 * time.Second), made, false}, {made, made.Add(time.Minute), false},
		{time.Unix(0, 0), made, false},
	} {
		if err := checkClock(c.now, 30*time.Second, made, c.ledgers); (err == nil) != c.good {
			t.Errorf("now %v, ledger %v: %v", c.now, c.ledgers, err)
		}
	}
}

// TestRestoreNamesRecovery: the facts of a restore say of a recovery successor what is true.
func TestRestoreNamesRecovery(t *testing.T) {
	key := func(version uint32, token, state string, recovery bool) backup.Key {
		return backup.Key{Ref: keystore.Ref{Name: "payments", Version: version}, Token: token, State: state,
			Algorithm: keystore.Ed25519, PublicKey: "00", Recovery: recovery}
	}
	lost := key(1, "main", "active", false)
	const goesOn, ends, another = "can go on", "its line ends", "make another one"
	for name, c := range map[string]struct {
		keys         []backup.Key
		says, hushes []string
	}{
		"replaced, then used": {
			[]backup.Key{key(1, "main", "archived", false), key(1_000_000, "safe", "archived", false),
				key(1_000_001, "safe", "archived", false), key(2_000_000, "bank", "active", false)},
			[]string{ends}, []string{goesOn, "for the recovery"},
		},
		"in a safe": {
			[]backup.Key{lost, key(1_000_000, "safe", "pending", true), key(1_000_001, "safe", "pending", true)},
			[]string{goesOn, "for the recovery"}, []string{ends},
		},
		"half of it": {
			[]backup.Key{lost, key(1_000_000, "bank", "pending", true), key(1_000_001, "safe", "pending", true)},
			[]string{ends, another}, []string{goesOn},
		},
		"another device in its place": {
			[]backup.Key{key(1_000_000, "bank", "pending", true), key(1_000_001, "bank", "pending", true)},
			[]string{another}, []string{goesOn, ends},
		},
	} {
		var b openedBackup
		b.Manifest.Keys = c.keys
		text := []byte(least + "module = \"m\"\npin_file = \"pin\"\n")
		conf, err := parseConfig(filepath.Join(t.TempDir(), "c.toml"), text)
		if err != nil {
			t.Fatal(err)
		}
		conf.Ledger = filepath.Join(t.TempDir(), "ledger.db")
		store := form.Guard(keystoretest.NewMemory(), nil)
		f, err := restoring{}.look(t.Context(), b, conf, map[string]keystore.Store{"main": store, "bank": store})
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		f.print(&out)
		for _, text := range c.says {
			if !strings.Contains(out.String(), text) {
				t.Errorf("%s: no %q in\n%s", name, text, out.String())
			}
		}
		for _, text := range c.hushes {
			if strings.Contains(out.String(), text) {
				t.Errorf("%s: %q in\n%s", name, text, out.String())
			}
		}
	}
}
