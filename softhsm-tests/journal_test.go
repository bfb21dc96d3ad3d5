package softhsmtests

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/admin/certs"
	"countersign/internal/form"
	"countersign/internal/journal"
	"countersign/internal/keystore"
	"countersign/transcript"

	"golang.org/x/sys/unix"
)

// reconciliation is a part of the JSON of countersign audit reconcile.
type reconciliation struct {
	Good     bool
	Log      struct{ First, Events uint64 }
	Kinds    map[string]int
	Matched  int
	Repeated int
	Ranges   int
	Counted  int
	Missing  int
	Unlogged []struct {
		Line                      uint64
		Time                      time.Time
		Kind, Key, Detail, Digest string
	}
	Older    []struct{ Signatures int }
	Journals []journal.Report
}

// unlogged returns the kinds of the signatures without an event.
func (r reconciliation) unlogged() (kinds []string) {
	for _, u := range r.Unlogged {
		kinds = append(kinds, u.Kind)
	}
	slices.Sort(kinds)
	return kinds
}

// reconcile copies the journal, exports the log, and compares the two.
func (s *system) reconcile(flags ...string) (r reconciliation) {
	s.t.Helper()
	dir := s.t.TempDir()
	copied, log := filepath.Join(dir, "journal"), filepath.Join(dir, "log")
	if err := os.CopyFS(copied, os.DirFS(s.path("ledger.db.journal"))); err != nil {
		s.t.Fatal(err)
	}
	s.must("admin", "audit", "export", log)
	vkey := strings.TrimSpace(s.must("admin", "audit", "key"))
	args := append([]string{"audit", "reconcile", "--json", log, "--key", vkey, "--journal", copied}, flags...)
	out, stderr, code := s.cli("", args...)
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		s.t.Fatalf("%v: %s%s", err, out, stderr)
	}
	if (code == 0) != r.Good {
		s.t.Errorf("status %d, good: %v\n%s", code, r.Good, stderr)
	}
	return r
}

// mustReconcile compares the journal with the log: each line has its event, and each signed
// document its line. A killed key worker may leave half a line, of a signature that has not left.
func (s *system) mustReconcile() {
	s.t.Helper()
	r := s.reconcile()
	torn := 0
	for _, j := range r.Journals {
		for _, fault := range j.Faults {
			if torn++; !strings.Contains(fault, "were no lines") {
				s.t.Errorf("the journal: %s", fault)
			}
		}
	}
	if len(r.Unlogged) > 0 || r.Missing > 0 || len(r.Older) > 0 && r.Log.First == 0 {
		s.t.Errorf("the journal and the log do not agree: %+v", r)
	}
	s.t.Logf("the journal has %v: %d matched (%d repeated), %d of sinks, %d counted, older %v; %d torn lines",
		r.Kinds, r.Matched, r.Repeated, r.Ranges, r.Counted, r.Older, torn)
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
	r := s.reconcile()
	if want := []string{form.Checkpoint, "message-v1", form.Webhook}; r.Good || !slices.Equal(r.unlogged(), want) {
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
	needRoot(t, "a small disk")
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
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

// TestReconcileAll has all sources of signatures at once on an appliance: documents, a rotation
// with webhooks, alerts that are repeated and tested, a sink, a certificate and a request for one.
// Each line of the journal is matched by what the log has. After retention, lines are older and
// none is found without its event. Then a daemon in other hands signs: each forgery is named, and a
// flood that drops the journal's oldest files does not pass a comparison with a mark.
func TestReconcileAll(t *testing.T) {
	s := newSystem(t)
	r := s.receiver()
	address := newFolder(t).listen
	s.edit("countersign.toml", "admin_socket", fmt.Sprintf("admin_https = %q\nadmin_socket", address))
	s.edit("countersign.toml", "[tokens.main]", fmt.Sprintf(`[retention]
audit_days = 1

[alerts]
repeat = "1m"

[[webhooks]]
name = "ops"
url = %q

[[sinks]]
name = "si-em"
url = %q

[tokens.main]`, r.url+"/ops", r.url+"/siem"))
	if out, code := s.daemon("init"); code != 0 {
		t.Fatalf("init: %d %s", code, out)
	}
	p := s.serve()
	s.enrol()
	c := s.dial()
	d := message("AAAA").Fill(time.Hour)
	signed := must(c.Sign(t.Context(), "payments", d))(t)
	for range 2 {
		if _, err := c.Sign(t.Context(), "payments", d); err != nil { // the same request again
			t.Fatal(err)
		}
	}
	d.Payload = message("BBBB").Payload
	for range 3 {
		if _, err := c.Sign(t.Context(), "payments", d); code(err) != "replay" {
			t.Fatal(err)
		}
	}
	s.must("admin", "key", "rotate", "payments", "--now")
	s.must("admin", "alert", "test")
	s.must("admin", "tls", "csr")
	must(s.admin().TLS(t.Context()))(t) // makes the authority's certificate
	for _, kind := range []string{"alert.test", "alert.firing", "key.rotation", "audit.events"} {
		eventually(t, "the receiver has "+kind, func() bool { return len(r.of(kind)) > 0 })
	}
	mark := s.path("mark")
	got := s.reconcile("--mark", mark)
	if !got.Good || got.Missing != 0 || len(got.Older) != 0 || got.Ranges == 0 ||
		got.Kinds[form.Certificate] != 1 || got.Kinds[form.Request] != 1 || got.Kinds[form.Webhook] < 4 {
		t.Fatalf("%+v", got)
	}
	// Retention drops the epoch with all of it.
	must(s.admin().EndEpoch(t.Context()))(t)
	p.stop()
	s.endedAt(1, func(int) time.Time { return time.Now().Add(-25 * time.Hour) })
	p = s.serve()
	eventually(t, "retention drops an epoch", func() bool {
		first := must(s.admin().Retention(t.Context()))(t).Epochs[0]
		return first.Epoch > 0 || first.Dropped != 0
	})
	if _, err := s.dial().Sign(t.Context(), "payments", message("CCCC")); err != nil {
		t.Fatal(err)
	}
	old := got
	got = s.reconcile()
	if !got.Good || len(got.Older) != 1 || got.Older[0].Signatures < 5 || got.Log.First == 0 ||
		got.Matched+got.Ranges+got.Older[0].Signatures+got.Counted != sum(got.Kinds) || got.Matched >= sum(old.Kinds) {
		t.Fatalf("after retention: %+v", got)
	}
	if got = s.reconcile("--mark", mark); !got.Good { // the older lines were compared in their time
		t.Fatalf("after retention, with a mark: %+v", got)
	}
	test := r.of("alert.test")[0]
	p.stop()

	// A daemon in other hands, with the key workers of the token.
	t.Setenv("SOFTHSM2_CONF", s.path("softhsm2.conf"))
	config := journal.Config{Folder: s.path("ledger.db.journal"), Token: "main", Size: 4096, Files: 1000}
	forge := func(config journal.Config, do func(key func(name string, version uint32) keystore.Key)) {
		pool := openPool(t, map[string]any{"hsm": s.hsmConfig(softHSM, 1), "journal": config}, 2, 1<<30, 16)
		defer pool.Close()
		do(func(name string, version uint32) keystore.Key {
			return must(pool.Key(t.Context(), keystore.Ref{Name: name, Version: version}))(t)
		})
	}
	forge(config, func(key func(string, uint32) keystore.Key) {
		log := key(keystore.LogName, 1)
		id := fmt.Sprintf("%x", log.Info().PublicKey[:8])
		again := must(transcript.Parse(transcript.Request{
			Type: signed.Type, Payload: signed.Payload, Nonce: [32]byte{1},
			Timestamp: signed.Timestamp, ExpiresAt: signed.ExpiresAt,
		}))(t)
		must(key("payments", 1).Sign(t.Context(), again.Input(), nil))(t) // the same content with another nonce
		for _, text := range []string{
			test.id + `.1700000000.{"type":"alert.resolved"}`, // the id of a message, with another body
			"rotation_" + id + `_payments_2.1700000000.{"type":"key.rotation"}`,
			"events_" + id + `_si-em_0_1000000.1700000000.{"type":"audit.events"}`,
			"countersign/" + id + "/0\n2\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n", // another tree
		} {
			must(log.Sign(t.Context(), []byte(text), nil))(t)
		}
		unrecorded := func(context.Context, string, keystore.Ref, [32]byte) error { return nil }
		m := must(certs.New(key(keystore.CAName, 1), key(keystore.AdminName, 1), noStore{}, unrecorded,
			[]string{"evil.example"}, slog.New(slog.DiscardHandler)))(t)
		must(m.Authority(t.Context()))(t)
		must(m.CSR(t.Context()))(t)
	})
	p = s.serve()
	want := []string{
		form.Certificate, form.Request, form.Checkpoint, "message-v1", form.Webhook, form.Webhook, form.Webhook,
	}
	if got = s.reconcile("--mark", mark); got.Good || !slices.Equal(got.unlogged(), want) {
		t.Errorf("forgeries: %q, want %q", got.unlogged(), want)
	}
	if got = s.reconcile(); got.Good || !slices.Equal(got.unlogged(), []string{"message-v1", form.Webhook}) {
		// Without a mark, the others are taken for late ones, for a minute or three days.
		t.Errorf("forgeries without a mark: %q", got.unlogged())
	}
	p.stop()
	config.Files = 2
	forge(config, func(key func(string, uint32) keystore.Key) { // canaries are counted only
		for range 64 {
			must(key("payments", 1).Sign(t.Context(), form.NewCanary(), nil))(t)
		}
	})
	s.serve()
	if got = s.reconcile(); !got.Good || got.Journals[0].First == 0 {
		t.Errorf("a flood without a mark: %+v", got)
	}
	got = s.reconcile("--mark", mark)
	if got.Good || !strings.Contains(fmt.Sprint(got.Journals[0].Faults), "were dropped") {
		t.Errorf("a flood: %+v", got)
	}
}

func sum(of map[string]int) (n int) {
	for _, each := range of {
		n += each
	}
	return n
}

// noStore is a store of certificates that keeps nothing.
type noStore struct{}

func (noStore) Load(string) ([]byte, error) { return nil, nil }

func (noStore) Save(context.Context, string, []byte) error { return nil }
