package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"countersign/internal/backup"
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
