package softhsmtests

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/client"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// subscription reads examples/subscription.json and puts the public key of the key payments into
// the field subscriber: the signer of a subscription must be a party to it.
func (s *system) subscription() client.Document {
	s.t.Helper()
	example, err := os.ReadFile("../examples/subscription.json")
	if err != nil {
		s.t.Fatal(err)
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(example, &fields); err != nil {
		s.t.Fatal(err)
	}
	versions, err := s.admin().Key(s.t.Context(), "payments")
	if err != nil {
		s.t.Fatal(err)
	}
	fields["subscriber"] = json.RawMessage(strconv.Quote(versions[0].PublicKey))
	payload, err := json.Marshal(fields)
	if err != nil {
		s.t.Fatal(err)
	}
	return client.Document{Type: "paykit-subscription-v2", Payload: payload}
}

// signMany sends n sign requests, at most eight at a time. Every tenth document is a subscription.
func (s *system) signMany(c *client.Client, n int) {
	s.t.Helper()
	subscription := s.subscription()
	var wg sync.WaitGroup
	work := make(chan int)
	for range 8 {
		wg.Go(func() {
			for i := range work {
				d := message("AAAA")
				if i%10 == 0 {
					d = subscription
				}
				signed, err := c.Sign(s.t.Context(), "payments", d)
				if err != nil {
					s.t.Errorf("document %d: %v", i, err)
					continue
				}
				noteReceipt(signed)
			}
		})
	}
	for i := range n {
		work <- i
	}
	close(work)
	wg.Wait()
}

// monitor collects the checkpoints that the daemon publishes and checks that the log only grows.
type monitor struct {
	t           testing.TB
	log         audit.Log
	checkpoints [][]byte // signed notes
}

func (s *system) monitor() *monitor {
	s.t.Helper()
	l, err := s.admin().Log(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	log, err := audit.ParseVerifierKey(l.VerifierKey)
	if err != nil {
		s.t.Fatal(err)
	}
	return &monitor{t: s.t, log: log}
}

// watch fetches the newest checkpoint every 20 ms until ctx ends.
func (m *monitor) watch(ctx context.Context, from audit.Source) {
	for ctx.Err() == nil {
		if b, err := from.ReadFile(ctx, "checkpoint"); err == nil {
			m.checkpoints = append(m.checkpoints, b)
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// checkConsistent checks, for each checkpoint of the monitor, a consistency proof between the
// checkpoint and the epoch's newest checkpoint. The proofs are made by sumdb/tlog from the
// published tiles, without code of the project.
func (m *monitor) checkConsistent(from audit.Source) {
	m.t.Helper()
	heads := map[uint32]audit.Checkpoint{}
	sizes := map[uint32]map[uint64]audit.Hash{}
	for _, text := range m.checkpoints {
		shown, err := m.log.Open(text)
		if err != nil {
			m.t.Fatalf("%v in %q", err, text)
		}
		head, known := heads[shown.Epoch]
		if !known {
			newest, err := from.ReadFile(m.t.Context(), fmt.Sprintf("epochs/%d/checkpoint", shown.Epoch))
			if err != nil {
				m.t.Fatal(err)
			}
			if head, err = m.log.Open(newest); err != nil || head.Epoch != shown.Epoch {
				m.t.Fatalf("the checkpoint of epoch %d: %v of epoch %d", shown.Epoch, err, head.Epoch)
			}
			heads[shown.Epoch], sizes[shown.Epoch] = head, map[uint64]audit.Hash{}
		}
		if root, twice := sizes[shown.Epoch][shown.Size]; twice {
			if root != shown.Root {
				m.t.Fatalf("two roots were shown of epoch %d with %d events", shown.Epoch, shown.Size)
			}
			continue
		}
		sizes[shown.Epoch][shown.Size] = shown.Root
		if shown.Size > head.Size {
			m.t.Fatalf("a checkpoint of epoch %d was shown with %d events; now there are %d",
				shown.Epoch, shown.Size, head.Size)
		}
		tree := tlog.Tree{N: int64(head.Size), Hash: tlog.Hash(head.Root)}
		hashes := tlog.TileHashReader(tree, tileReader{m.t, from, shown.Epoch})
		proof, err := tlog.ProveTree(int64(head.Size), int64(shown.Size), hashes)
		if err == nil {
			now, before := tlog.Hash(head.Root), tlog.Hash(shown.Root)
			err = tlog.CheckTree(proof, int64(head.Size), now, int64(shown.Size), before)
		}
		if err != nil {
			m.t.Fatalf("epoch %d, no consistency between %d and %d events: %v", shown.Epoch, shown.Size, head.Size, err)
		}
	}
}

// tileReader reads the tiles of an epoch for sumdb/tlog.
type tileReader struct {
	t     testing.TB
	from  audit.Source
	epoch uint32
}

func (tileReader) Height() int { return 8 }

func (tileReader) SaveTiles([]tlog.Tile, [][]byte) {}

func (e tileReader) ReadTiles(tiles []tlog.Tile) (content [][]byte, err error) {
	for _, tile := range tiles {
		name := strings.Replace(tile.Path(), "tile/8/", fmt.Sprintf("epochs/%d/tile/", e.epoch), 1)
		b, err := e.from.ReadFile(e.t.Context(), name)
		if err != nil {
			return nil, err
		}
		content = append(content, b)
	}
	return content, nil
}

// fsck runs the checker of transparency-dev/tessera, an implementation that shares no code with
// Countersign.
func fsck(t *testing.T, vkey string, dirs ...string) {
	t.Helper()
	tool := t.TempDir()
	install := exec.CommandContext(t.Context(), "go", "install", "github.com/transparency-dev/tessera/cmd/fsck@v1.0.4")
	install.Env = append(os.Environ(), "GOBIN="+tool, "GOEXPERIMENT=", "CGO_ENABLED=0")
	if out, err := install.CombinedOutput(); err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatalf("tessera's fsck: %v\n%s", err, out)
		}
		t.Logf("tessera's fsck can't be installed, so the check is left out: %v\n%s", err, out)
		return
	}
	log, err := audit.ParseVerifierKey(vkey)
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		text, err := os.ReadFile(filepath.Join(dir, "checkpoint"))
		if err != nil {
			t.Fatal(err)
		}
		head, err := log.Open(text)
		if err != nil {
			t.Fatal(err)
		}
		key := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(key, []byte(log.VerifierKey(head.Epoch)), 0o600); err != nil {
			t.Fatal(err)
		}
		run := exec.CommandContext(t.Context(), filepath.Join(tool, "fsck"),
			"--storage_url=file://"+dir+"/", "--public_key="+key, "--ui=false")
		if out, err := run.CombinedOutput(); err != nil {
			t.Errorf("fsck %s: %v\n%s", dir, err, out)
		}
	}
}

// TestAuditLog signs documents, exports the log as an operator and verifies the log as an auditor,
// across the end of an epoch and a restart.
func TestAuditLog(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	vkey := strings.TrimSpace(s.must("admin", "audit", "key"))
	shown := s.monitor()
	watching, stop := context.WithCancel(t.Context())
	var watched sync.WaitGroup
	watched.Go(func() { shown.watch(watching, s.admin()) })
	c := s.dial()
	s.signMany(c, 300)

	s.waitForOutcomes()
	s.must("admin", "audit", "export", "export")
	s.write("older", string(must(os.ReadFile(s.path("export/checkpoint")))(t)))
	verify := func(args ...string) (report struct {
		Valid                               bool
		Events, Signatures, Unsettled, Size uint64
		Epoch, Epochs                       int
	}) {
		t.Helper()
		out := s.must(append([]string{"audit", "verify", "--json", "--key", vkey}, args...)...)
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatal(err)
		}
		return report
	}
	if r := verify("export"); !r.Valid || r.Signatures != 300 || r.Unsettled != 0 || r.Events < 600 || r.Epoch != 0 {
		t.Errorf("%+v", r)
	}
	older := must(os.ReadFile(s.path("older")))(t)
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := note.Open(older, note.VerifierList(verifier)); err != nil || len(n.Sigs) != 1 {
		t.Errorf("%v", err)
	}

	// The daemon signs a checkpoint within 6 s of new events, without a request for one. The test
	// reads the size of the newest checkpoint from the list of epochs, since a request for the
	// checkpoint itself makes the daemon sign a new one.
	s.signMany(c, 10)
	last := s.events()
	covered := func() uint64 {
		r, err := s.admin().Retention(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		e := r.Epochs[len(r.Epochs)-1]
		return e.First + e.Checkpoint
	}
	stop()
	watched.Wait()
	s.signMany(c, 10)
	want := last[len(last)-1].Index + 20
	for began := time.Now(); covered() < want; time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > 6*time.Second {
			t.Fatalf("6 s after new events the newest checkpoint is of %d, want %d", covered(), want)
		}
	}

	// An epoch ends, then the daemon restarts.
	s.must("admin", "audit", "end-epoch")
	s.signMany(c, 20)
	p.stop()
	p = s.serve()
	if n := covered(); n < want+40 {
		t.Errorf("the checkpoint of the stop is of %d events, want %d at least", n, want+40)
	}
	c = s.dial()
	s.signMany(c, 20)
	s.waitForOutcomes()
	r := verify("--socket", "admin.sock", "--since", "older")
	if r.Signatures != 360 || r.Epoch != 1 || r.Epochs != 2 {
		t.Errorf("%+v", r)
	}
	s.must("admin", "audit", "export", "export") // updates the earlier export
	if r := verify("export", "--since", "older"); r.Signatures != 360 || r.Epoch != 1 {
		t.Errorf("%+v", r)
	}
	s.must("admin", "audit", "export", "anew")
	fsck(t, vkey, s.path("export"), s.path("export/epochs/0"), s.path("export/epochs/1"),
		s.path("anew"), s.path("anew/epochs/0"))
	shown.checkpoints = append(shown.checkpoints, older)
	if len(shown.checkpoints) < 5 {
		t.Errorf("only %d checkpoints were watched", len(shown.checkpoints))
	}
	shown.checkConsistent(audit.Folder(s.path("export")))
	shown.checkConsistent(s.admin())

	// One bit of event 300 is flipped. Entries of a bundle have their length before them, 2 bytes.
	bundle := s.path("anew/epochs/0/tile/entries/001")
	whole := must(os.ReadFile(bundle))(t)
	at, event := 0, 256
	for ; event < 300; event++ {
		at += 2 + int(binary.BigEndian.Uint16(whole[at:]))
	}
	whole[at+2+20] ^= 1
	if err := os.WriteFile(bundle, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	out, errOut, code := s.cli("", "audit", "verify", "anew", "--key", vkey, "--json")
	if code != 1 || !strings.HasPrefix(errOut, "countersign: error: wrong_event: event 300: ") ||
		!strings.Contains(out, `"event": 300`) {
		t.Errorf("event 300 was changed: %d, %s, %s", code, out, errOut)
	}
	// The log is truncated after epoch 0, the key is another log's, or there is no log.
	s.write("newer", string(must(s.admin().ReadFile(t.Context(), "checkpoint"))(t)))
	if err := os.CopyFS(s.path("cut"), os.DirFS(s.path("export/epochs/0"))); err != nil {
		t.Fatal(err)
	}
	if _, _, code := s.cli("", "audit", "verify", "cut", "--key", vkey); code != 0 {
		t.Errorf("an epoch alone: %d", code)
	}
	_, errOut, code = s.cli("", "audit", "verify", "cut", "--key", vkey, "--since", "newer")
	if code != 1 || !strings.Contains(errOut, "cut off") {
		t.Errorf("a log that was cut off: %d, %s", code, errOut)
	}
	if _, _, code := s.cli("", "audit", "verify", "export", "--key", otherLogKey); code != 1 {
		t.Errorf("with another log's key: %d", code)
	}
	for _, args := range [][]string{
		{"audit", "verify"},
		{"audit", "verify", "export", "--socket", "admin.sock", "--key", vkey},
		{"audit", "verify", "export"},
	} {
		if _, _, code := s.cli("", args...); code != 2 {
			t.Errorf("%v: %d", args, code)
		}
	}
	if _, err := s.admin().ReadFile(t.Context(), "tile/../../ledger.db"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a path out of the log: %v", err)
	}
	p.stop()
	checked, code := s.daemon("check", "--deep")
	if code != 0 || !strings.Contains(checked, "every page, event and hash was read") {
		t.Errorf("check --deep: %d, %s", code, checked)
	}
	// The export has digests and names, and the ledger also has the inputs of policy decisions.
	for name, b := range s.readFiles("export", "ledger.db") {
		if bytes.Contains(b, []byte("Lisbon")) || bytes.Contains(b, []byte("sub_demo_0001")) ||
			bytes.Contains(b, []byte("lightning")) && name != "ledger.db" {
			t.Errorf("%s has a document's content", name)
		}
	}
}

// otherLogKey is the verifier key of another appliance's log.
var otherLogKey = func() string {
	log, err := audit.NewLog(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, 32)).Public().(ed25519.PublicKey))
	if err != nil {
		panic(err)
	}
	return log.VerifierKey(0)
}()

// must is used as must(f())(t): the test ends if f returns an error.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// readFiles reads the named files, and all files in the named folders, by their path in the
// system's folder.
func (s *system) readFiles(names ...string) map[string][]byte {
	s.t.Helper()
	all := map[string][]byte{}
	for _, name := range names {
		if err := filepath.WalkDir(s.path(name), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				all[strings.TrimPrefix(path, s.dir+"/")], err = os.ReadFile(path)
			}
			return err
		}); err != nil {
			s.t.Fatal(err)
		}
	}
	return all
}

// TestProven has the SDK demand an inclusion proof for each signature. The SDK returns no signature
// without a proof under the configured log key. A peer gets proofs of its own events only.
func TestProven(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	s.must("admin", "peer", "add", "other", strings.TrimSpace(s.must("keygen", s.path("other.key"))))
	vkey := strings.TrimSpace(s.must("admin", "audit", "key"))
	noiseKey := strings.TrimSpace(s.must("admin", "noise-key"))
	with := func(key string) *client.Client {
		config := s.clientConfig()
		config.LogKey = key
		c := must(client.Dial(t.Context(), config))(t)
		t.Cleanup(func() { c.Close() })
		return c
	}
	c := with(vkey)
	signed := must(c.Sign(t.Context(), "payments", s.subscription()))(t)
	noteReceipt(signed)
	again := must(c.Sign(t.Context(), "payments", signed.Document))(t)
	if !again.Repeated || again.Event != signed.Event {
		t.Errorf("%+v", again)
	}
	var wg sync.WaitGroup // 16 concurrent proofs share one checkpoint
	for range 16 {
		wg.Go(func() {
			if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if _, err := c.Verify(t.Context(), "payments", signed); err != nil {
		t.Error(err)
	}
	wrong := with(otherLogKey)
	unproven, err := wrong.Sign(t.Context(), "payments", message("AAAA"))
	if !errors.Is(err, client.ErrUnproven) || unproven != nil {
		t.Errorf("a signature of another log: %v", err)
	}
	// The CLI fetches and checks the proof of the event.
	own := []string{"--server", s.listen, "--server-key", noiseKey, "--identity"}
	number := strconv.FormatUint(signed.Event, 10)
	out := s.must(append([]string{"proof", number, "--log-key", vkey}, append(own, "demo.key")...)...)
	if !strings.Contains(out, "checked") || !strings.Contains(out, "yes") ||
		!strings.Contains(out, hex.EncodeToString(signed.Nonce[:])) {
		t.Errorf("proof: %s", out)
	}
	// With a file, the CLI remembers the log.
	remember := append([]string{"proof", number, "--log-key", vkey, "--log-checkpoint", s.path("log.checkpoint")},
		append(own, "demo.key")...)
	for range 2 {
		s.must(remember...)
	}
	kept := must(os.ReadFile(s.path("log.checkpoint")))(t)
	if _, err := must(audit.ParseVerifierKey(vkey))(t).Open(kept); err != nil {
		t.Errorf("the remembered checkpoint: %v", err)
	}
	s.write("log.checkpoint", "of another log\n")
	_, errOut, code := s.cli("", remember...)
	if code != 1 || !strings.Contains(errOut, "has no checkpoint of this log") {
		t.Errorf("proof with another checkpoint: %d, %s", code, errOut)
	}
	args := append([]string{"proof", number, "--log-key", otherLogKey}, append(own, "demo.key")...)
	if _, errOut, code := s.cli("", args...); code != 1 {
		t.Errorf("proof with another log's key: %d, %s", code, errOut)
	}
	// The answer is the same for another peer's event, an event of the daemon and a missing event:
	// a peer learns nothing about the log from the difference.
	for _, event := range []string{number, "0", "1", "999999999", "18446744073709551615"} {
		_, errOut, code := s.cli("", append([]string{"proof", event}, append(own, "other.key")...)...)
		if code != 1 || !strings.Contains(errOut, "denied: event "+event+" is not one of yours") {
			t.Errorf("proof of event %s for another peer: %d, %s", event, code, errOut)
		}
	}
	// Events of an ended epoch are proven under the final checkpoint of the epoch.
	s.must("admin", "audit", "end-epoch")
	proof := must(c.Proof(t.Context(), signed.Event))(t)
	log := must(audit.ParseVerifierKey(vkey))(t)
	if e, head, err := log.Check(proof); err != nil || head.Epoch != 0 || e.Resource != "payments/1" {
		t.Errorf("%+v, %+v, %v", e, head, err)
	}
	if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Errorf("in the next epoch: %v", err)
	}
	p.stop()
}

// TestReceipts opens the commitment of a receipt with the salt that the peer gets, and gets the
// same salt for a repeated request. Neither the log nor the ledger has the salt, without which the
// amount can't be guessed from the commitment.
func TestReceipts(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	c := s.dial()
	d := s.subscription()
	signed := must(c.Sign(t.Context(), "payments", d))(t)
	other := must(c.Sign(t.Context(), "payments", d))(t)
	plain := must(c.Sign(t.Context(), "payments", message("AAAA")))(t)
	again := must(c.Sign(t.Context(), "payments", signed.Document))(t)
	if plain.Receipt != nil || signed.Receipt == nil || again.Receipt == nil || other.Receipt == nil {
		t.Fatal("a payment has a receipt, and nothing else has")
	}
	if !bytes.Equal(again.Receipt.ID, signed.Receipt.ID) || !bytes.Equal(again.Receipt.Salt, signed.Receipt.Salt) {
		t.Error("a repetition has another receipt")
	}
	if bytes.Equal(other.Receipt.ID, signed.Receipt.ID) || bytes.Equal(other.Receipt.Salt, signed.Receipt.Salt) {
		t.Error("two payments have one receipt")
	}
	for _, each := range []*client.Signed{signed, other} {
		noteReceipt(each)
	}
	id := hex.EncodeToString(signed.Receipt.ID)
	r := must(s.admin().Receipt(t.Context(), id))(t)
	opened := slices.Concat([]byte("countersign-receipt-v1\x00"), signed.Receipt.Salt, []byte("1000 SAT"))
	commitment := sha256.Sum256(opened)
	if r.Commitment != hex.EncodeToString(commitment[:]) || r.Method != "lightning" || r.Status != "completed" ||
		r.Event != signed.Event || time.Since(time.UnixMilli(r.TimeMS)).Abs() > time.Minute {
		t.Errorf("%+v", r)
	}
	if out := s.must("admin", "receipt", "show", id); !strings.Contains(out, r.Commitment) {
		t.Error(out)
	}
	// The story of the payment, by any of its events, has the receipt and the decision.
	for _, event := range []string{"admission", "outcome"} {
		number := strconv.FormatUint(signed.Event, 10)
		if event == "outcome" {
			found, _, err := s.admin().FindEvents(t.Context(), api.EventQuery{Admission: number})
			if err != nil || len(found) != 1 {
				t.Fatalf("%+v, %v", found, err)
			}
			number = strconv.FormatUint(found[0].Index, 10)
		}
		story := s.must("admin", "audit", "show", number)
		if !regexp.MustCompile(`(?m)^decision +allow, by version 1 of the policy: line 1$`).MatchString(story) ||
			!regexp.MustCompile(`(?m)^receipt +`+id+`, lightning, completed$`).MatchString(story) ||
			strings.Contains(story, "not shown") {
			t.Errorf("the story by the %s: %s", event, story)
		}
	}
	if out := s.must("admin", "audit", "show", strconv.FormatUint(plain.Event, 10)); strings.Contains(out, "receipt") {
		t.Errorf("a message has a receipt: %s", out)
	}
	var list []struct{ ID string }
	out := s.must("admin", "receipt", "list", "--from", "2026-01-01", "--json")
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 2 || list[0].ID != id {
		t.Errorf("%v, %v", list, err)
	}
	out = s.must("admin", "receipt", "list", "--to", "2026-01-01", "--json")
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 0 {
		t.Errorf("%v, %v", list, err)
	}
	for _, bad := range []string{"00", strings.Repeat("z", 32), ""} {
		_, errOut, code := s.cli("", "admin", "receipt", "show", bad)
		if code == 0 || !strings.Contains(errOut, "invalid") && bad != "" {
			t.Errorf("receipt %q: %d, %s", bad, code, errOut)
		}
	}
	if _, _, code := s.cli("", "admin", "receipt", "show", strings.Repeat("0", 32)); code != 1 {
		t.Errorf("no receipt: %d", code)
	}
	s.must("admin", "audit", "export", "export")
	p.stop()
	salt := signed.Receipt.Salt
	secrets := map[string][]byte{
		"the salt":           salt,
		"the salt in hex":    []byte(hex.EncodeToString(salt)),
		"the amount":         []byte("1000 SAT"),
		"the amount in JSON": []byte(`"1000"`),
		"the currency":       []byte(`"SAT"`),
		"the payload":        []byte("sub_demo_0001"),
	}
	for name, b := range s.readFiles("export", "ledger.db") {
		for what, secret := range secrets {
			// The currency is an input of policy decisions. The ledger has the inputs while
			// decisions are retained, and the export does not.
			if bytes.Contains(b, secret) && (what != "the currency" || !strings.HasSuffix(name, "ledger.db")) {
				t.Errorf("%s has %s", name, what)
			}
		}
	}
	log := p.stderr.String()
	if strings.Contains(log, hex.EncodeToString(salt)) || strings.Contains(log, "sub_demo_0001") {
		t.Error("the daemon's log has the salt or the payload")
	}
}

// waitForOutcomes waits until each admission has its outcome in the log, for at most 10 s. An
// answer is sent before its outcome is in the log.
func (s *system) waitForOutcomes() {
	s.t.Helper()
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		open := 0
		for _, e := range s.events() {
			switch e.Type.Kind() {
			case audit.Admission:
				open++
			case audit.Outcome:
				open--
			}
		}
		if open == 0 {
			return
		}
		if time.Since(began) > 10*time.Second {
			s.t.Fatalf("%d admissions have no outcome", open)
		}
	}
}

// TestStrangersAreCounted makes 100 handshakes without an enrolled key. Events HandshakeRefused
// count the 5 handshakes that were processed, events RateLimitTriggered count the other 95. There
// are one or two events of each type: one at the next flush of the counters, one with the rest at
// the stop.
func TestStrangersAreCounted(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.must("keygen", s.path("demo.key")) // not enrolled
	config := s.clientConfig()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 25 {
				if _, err := client.Dial(t.Context(), config); !errors.Is(err, client.ErrHandshake) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	p.stop()
	p = s.serve()
	events, count := map[audit.Type]int{}, map[audit.Type]int{}
	for _, e := range s.events() {
		if e.Type != audit.HandshakeRefused && e.Type != audit.RateLimitTriggered {
			continue
		}
		n, err := strconv.Atoi(e.Metadata["count"])
		since, errSince := strconv.ParseInt(e.Metadata["since"], 10, 64)
		until, errUntil := strconv.ParseInt(e.Metadata["until"], 10, 64)
		err = errors.Join(err, errSince, errUntil)
		if err != nil || since > until || time.Since(time.UnixMilli(since)).Abs() > time.Minute {
			t.Errorf("%+v, %v", e, err)
		}
		events[e.Type]++
		count[e.Type] += n
	}
	for what, want := range map[audit.Type]int{audit.HandshakeRefused: 5, audit.RateLimitTriggered: 95} {
		if events[what] < 1 || events[what] > 2 || count[what] != want {
			t.Errorf("of 100 handshakes, %d events of type %s count %d, want 1 or 2 events that count %d",
				events[what], what, count[what], want)
		}
	}
	p.stop()
}

// TestLedgerByHand runs the operator's commands on the ledger: legal holds, the preview of
// retention, statistics, and compactions while peers sign.
func TestLedgerByHand(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	s.must("admin", "audit", "end-epoch")
	out := s.must("admin", "retention", "preview")
	if !strings.Contains(out, "is dropped after") || !strings.Contains(out, "present") {
		t.Errorf("preview: %s", out)
	}
	if _, errOut, code := s.cli("", "admin", "retention", "hold", "0", "case-17"); code == 0 {
		t.Errorf("a hold without a reason: %s", errOut)
	}
	for epoch, want := range map[string]string{"7": "not_found", "x": "usage", "-1": "usage"} {
		_, errOut, code := s.cli("", "admin", "retention", "hold", "--reason", "r", "--", epoch, "case-17")
		if code == 0 || !strings.Contains(errOut, want) {
			t.Errorf("epoch %s: %d, %s", epoch, code, errOut)
		}
	}
	s.must("admin", "retention", "hold", "0", "case-17", "--reason", "order")
	s.must("admin", "retention", "hold", "0", "case-18", "--reason", "another order")
	out = s.must("admin", "retention", "preview")
	if !strings.Contains(out, "held by case-17, case-18") ||
		!strings.Contains(out, "case-18 on epoch 0: another order") {
		t.Errorf("preview of two holds: %s", out)
	}
	s.must("admin", "retention", "release", "0", "case-17", "--reason", "settled")
	if out := s.must("admin", "retention", "preview"); !strings.Contains(out, "held by case-18\n") {
		t.Errorf("preview after the release of one hold: %s", out)
	}
	s.must("admin", "retention", "release", "0", "case-18", "--reason", "settled")
	if out := s.must("admin", "retention", "preview"); strings.Contains(out, "held") {
		t.Errorf("preview after the release: %s", out)
	}
	var types []audit.Type
	for _, e := range s.events() {
		if e.Type == audit.LegalHoldSet || e.Type == audit.LegalHoldReleased {
			types = append(types, e.Type)
		}
	}
	if len(types) != 4 || types[0] != audit.LegalHoldSet {
		t.Errorf("%v", types)
	}

	// Compactions while peers sign.
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var signed []*client.Signed
	var wg sync.WaitGroup
	for range 4 {
		c := s.dial()
		for range 4 {
			wg.Go(func() {
				for ctx.Err() == nil {
					d := message("AAAA").Fill(time.Hour)
					got, err := c.Sign(t.Context(), "payments", d)
					var refusal *client.Error
					if errors.As(err, &refusal) && refusal.Code == "unavailable" {
						continue
					} else if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					signed = append(signed, got)
					mu.Unlock()
				}
			})
		}
	}
	for range 5 {
		time.Sleep(100 * time.Millisecond)
		if out := s.must("admin", "ledger", "compact"); !strings.Contains(out, "before") {
			t.Errorf("compact: %s", out)
		}
	}
	time.Sleep(100 * time.Millisecond)
	cancel()
	wg.Wait()
	out = s.must("admin", "ledger", "stats")
	if !strings.Contains(out, fmt.Sprintf("%d alive", len(signed))) {
		t.Errorf("%d were signed; stats: %s", len(signed), out)
	}
	c := s.dial()
	for i, x := range signed {
		if i%(1+len(signed)/50) != 0 {
			continue
		}
		other := x.Document
		other.Payload = message("BBBB").Payload
		var refusal *client.Error
		if _, err := c.Sign(t.Context(), "payments", other); !errors.As(err, &refusal) || refusal.Code != "replay" {
			t.Fatalf("a nonce that was spent while the ledger was compacted: %v", err)
		}
		again, err := c.Sign(t.Context(), "payments", x.Document)
		if err != nil || !again.Repeated || !bytes.Equal(again.Signature, x.Signature) {
			t.Fatalf("a repetition: %v", err)
		}
	}
	s.must("audit", "verify", "--socket", "admin.sock", "--key", strings.TrimSpace(s.must("admin", "audit", "key")))
	p.stop()
	if out, code := s.daemon("check", "--deep"); code != 0 {
		t.Errorf("check --deep: %d, %s", code, out)
	}
}

// TestStoryOfAnAct: the story of an act that needed approval has its proposal, by whichever of the
// events it is asked for. A version stays named as compromised after its destruction.
func TestStoryOfAnAct(t *testing.T) {
	s := newSystem(t)
	s.serve()
	s.enrol()
	s.must("admin", "key", "compromise", "payments", "1", "--reason", "stolen")
	s.must("admin", "key", "destroy", "payments", "1")
	found, _, err := s.admin().FindEvents(t.Context(), api.EventQuery{Type: audit.KeyStateChanged})
	if err != nil || len(found) != 2 || found[1].Actor.Proposal == 0 {
		t.Fatalf("%+v, %v", found, err)
	}
	act := found[1]
	want := []audit.Type{
		audit.ProposalMade, audit.ApprovalGiven, audit.ProposalRun, audit.KeyStateChanged, audit.ProposalDone,
	}
	of, _, err := s.admin().FindEvents(t.Context(), api.EventQuery{
		Resource: fmt.Sprintf("proposal/%d", act.Actor.Proposal)})
	if err != nil || len(of) != len(want)-1 {
		t.Fatalf("%+v, %v", of, err)
	}
	for _, e := range append(of, act) {
		var told []api.Event
		story := s.must("admin", "audit", "show", strconv.FormatUint(e.Index, 10), "--json")
		if err := json.Unmarshal([]byte(story), &told); err != nil {
			t.Fatal(err)
		}
		var types []audit.Type
		for _, each := range told {
			types = append(types, each.Type)
		}
		if !slices.Equal(types, want) {
			t.Errorf("the story by %s: %v, want %v", e.Type, types, want)
		}
	}
	noiseKey := strings.TrimSpace(s.must("admin", "noise-key"))
	for _, command := range [][]string{
		{"admin", "key", "list"}, {"admin", "key", "show", "payments"},
		{"keys", "--server", s.listen, "--server-key", noiseKey, "--identity", s.path("demo.key")},
	} {
		if out := s.must(command...); !strings.Contains(out, "destroyed, compromised") {
			t.Errorf("%s: %s", strings.Join(command, " "), out)
		}
	}
}
