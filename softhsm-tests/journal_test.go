package softhsmtests

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"countersign/internal/form"
	"countersign/internal/journal"
	"countersign/internal/keystore"

	"golang.org/x/sys/unix"
)

// reconciliation is a part of the JSON of countersign audit reconcile.
type reconciliation struct {
	Good     bool                         `json:"good"`
	Kinds    map[string]int               `json:"kinds"`
	Matched  int                          `json:"matched"`
	Missing  int                          `json:"missing"`
	Unlogged []struct{ Kind, Key string } `json:"unlogged"`
	Journals []journal.Report             `json:"journals"`
}

// reconcile copies the journal, exports the log, and compares the two.
func (s *system) reconcile() (r reconciliation) {
	s.t.Helper()
	copied := filepath.Join(s.t.TempDir(), "journal")
	if err := os.CopyFS(copied, os.DirFS(s.path("ledger.db.journal"))); err != nil {
		s.t.Fatal(err)
	}
	s.must("admin", "audit", "export", s.path("log"))
	vkey := strings.TrimSpace(s.must("admin", "audit", "key"))
	out, stderr, code := s.cli("", "audit", "reconcile", "--json", s.path("log"), "--key", vkey, "--journal", copied)
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		s.t.Fatalf("%v: %s%s", err, out, stderr)
	}
	if (code == 0) != r.Good {
		s.t.Errorf("status %d, good: %v\n%s", code, r.Good, stderr)
	}
	return r
}

// TestReconcile: each signature of an appliance has its line, and each line its event: documents,
// checkpoints, certificates, over replaced key workers and a restart. Signatures that a daemon in
// other hands had made have lines and no event, and are named.
func TestReconcile(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	c := s.dial()
	for range 20 {
		if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
			t.Fatal(err)
		}
	}
	s.must("admin", "key", "rotate", "payments", "--now")
	if r := s.reconcile(); !r.Good || r.Missing != 0 || r.Kinds["message-v1"] != 20 ||
		r.Kinds["key-succession-v1"] == 0 || r.Kinds[form.Checkpoint] == 0 || r.Kinds[form.Canary] == 0 {
		t.Fatalf("%+v", r)
	}
	p.stop()
	// A daemon in other hands, with the key workers of the token.
	t.Setenv("SOFTHSM2_CONF", s.path("softhsm2.conf"))
	config := journal.Config{Folder: s.path("ledger.db.journal"), Token: "main", Size: 1 << 20, Files: 16}
	pool := openPool(t, map[string]any{"hsm": s.hsmConfig(softHSM, 1), "journal": config}, 2, 1<<30, 16)
	sign := func(name string, input []byte) {
		t.Helper()
		k, err := pool.Key(t.Context(), keystore.Ref{Name: name, Version: 1})
		if err == nil {
			_, err = k.Sign(t.Context(), input, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	log, err := pool.Key(t.Context(), keystore.Ref{Name: keystore.LogName, Version: 1})
	if err != nil {
		t.Fatal(err)
	}
	sign("payments", parsedDocument(t, "message-v1", `{"context":"stolen","message":"AAAA"}`).Input())
	sign(keystore.LogName, fmt.Appendf(nil, "countersign/%x/0\n2\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n",
		log.Info().PublicKey[:8])) // another tree of two events
	sign(keystore.LogName, []byte("msg_1.1700000000.{}"))
	pool.Close()
	s.serve()
	var got []string
	r := s.reconcile()
	for _, u := range r.Unlogged {
		got = append(got, u.Kind)
	}
	slices.Sort(got)
	if want := []string{form.Checkpoint, "message-v1", form.Webhook}; r.Good || !slices.Equal(got, want) {
		t.Errorf("%+v", r)
	}
	// A journal with a changed line.
	files, err := filepath.Glob(s.path("ledger.db.journal/*.journal"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	before := len(r.Journals[0].Faults)
	s.edit("ledger.db.journal/"+filepath.Base(files[0]), "message-v1", "message-v2")
	if r := s.reconcile(); len(r.Journals[0].Faults) == before {
		t.Errorf("a changed line is not noticed: %+v", r)
	}
}

// TestJournalOnAFullDisk fills the disk of the journal under a running daemon. Nothing is signed,
// the state says why, and no key worker is replaced for it. With room again, the daemon signs by
// itself, and nothing is missing in the journal.
func TestJournalOnAFullDisk(t *testing.T) {
	s := newSystem(t)
	dir := s.path("ledger.db.journal")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s.edit("countersign.toml", "environment = {", "deadline = \"1s\"\nenvironment = {")
	p := s.serve()
	s.enrol()
	c := s.dial()
	if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	filler, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for block := make([]byte, 4096); err == nil; {
		_, err = filler.Write(block)
	}
	filler.Close()
	refused := func() bool { // the last page of the journal may have room for some lines
		_, err := c.Sign(t.Context(), "payments", message("AAAA"))
		return code(err) == "unavailable"
	}
	eventually(t, "signatures are refused", refused)
	for _, name := range []string{"journal_bytes", "journal_failures_total"} {
		eventually(t, "a value of "+name, func() bool {
			value := regexp.MustCompile(`(?m)^` + name + `\s+token="main"\s+[1-9]`)
			return value.MatchString(s.must("admin", "metrics", "journal"))
		})
	}
	if !s.hasCause("journal-unwritable") {
		t.Error("the state does not say why")
	}
	if err := os.Remove(filler.Name()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the cause ends by itself", func() bool { return !s.hasCause("journal-unwritable") })
	if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Error(err)
	}
	if r := s.reconcile(); !r.Good || r.Missing != 0 {
		t.Errorf("%+v", r)
	}
	p.stop()
	if text := p.stderr.String(); strings.Contains(text, "a key worker is given up") ||
		strings.Count(text, "nothing is signed, because the journal") != 1 {
		t.Errorf("the log:\n%s", text)
	}
}
