package softhsmtests

import (
	"bytes"
	"context"
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
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/audit"
	"countersign/client"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// subscription is the example with the key's own public key as the subscriber.
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

// signMany has n documents signed, every tenth of them a subscription, by several callers at once.
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
				if _, err := c.Sign(s.t.Context(), "payments", d); err != nil {
					s.t.Errorf("document %d: %v", i, err)
				}
			}
		})
	}
	for i := range n {
		work <- i
	}
	close(work)
	wg.Wait()
}

// monitor are checkpoints that were shown.
type monitor struct {
	t           testing.TB
	log         audit.Log
	checkpoints [][]byte
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

// watch fetches checkpoints over the admin socket until ctx ends.
func (c *monitor) watch(ctx context.Context, from audit.Source) {
	for ctx.Err() == nil {
		if b, err := from.ReadFile(ctx, "checkpoint"); err == nil {
			c.checkpoints = append(c.checkpoints, b)
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// checkConsistent proves with public tools, for each checkpoint that was shown, that the epoch as it is now has grown from it.
func (c *monitor) checkConsistent(from audit.Source) {
	c.t.Helper()
	heads := map[uint32]audit.Checkpoint{}
	sizes := map[uint32]map[uint64]audit.Hash{}
	for _, text := range c.checkpoints {
		shown, err := c.log.Open(text)
		if err != nil {
			c.t.Fatalf("%v in %q", err, text)
		}
		head, known := heads[shown.Epoch]
		if !known {
			newest, err := from.ReadFile(c.t.Context(), fmt.Sprintf("epochs/%d/checkpoint", shown.Epoch))
			if err != nil {
				c.t.Fatal(err)
			}
			if head, err = c.log.Open(newest); err != nil || head.Epoch != shown.Epoch {
				c.t.Fatalf("the checkpoint of epoch %d: %v of epoch %d", shown.Epoch, err, head.Epoch)
			}
			heads[shown.Epoch], sizes[shown.Epoch] = head, map[uint64]audit.Hash{}
		}
		if root, twice := sizes[shown.Epoch][shown.Size]; twice {
			if root != shown.Root {
				c.t.Fatalf("two roots were shown of epoch %d with %d events", shown.Epoch, shown.Size)
			}
			continue
		}
		sizes[shown.Epoch][shown.Size] = shown.Root
		if shown.Size > head.Size {
			c.t.Fatalf("a checkpoint of epoch %d was shown with %d events; now there are %d", shown.Epoch, shown.Size, head.Size)
		}
		hashes := tlog.TileHashReader(tlog.Tree{N: int64(head.Size), Hash: head.Root}, tileReader{c.t, from, shown.Epoch})
		proof, err := tlog.ProveTree(int64(head.Size), int64(shown.Size), hashes)
		if err == nil {
			err = tlog.CheckTree(proof, int64(head.Size), head.Root, int64(shown.Size), shown.Root)
		}
		if err != nil {
			c.t.Fatalf("epoch %d, %d events are shown to have grown to %d: %v", shown.Epoch, shown.Size, head.Size, err)
		}
	}
}

// tileReader gives the tiles of an epoch.
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

// fsck runs the checker of transparency-dev/tessera, of which no code is in here.
func fsck(t *testing.T, vkey string, dirs ...string) {
	t.Helper()
	tool := t.TempDir()
	install := exec.CommandContext(t.Context(), "go", "install", "github.com/transparency-dev/tessera/cmd/fsck@v1.0.4")
	install.Env = append(os.Environ(), "GOBIN="+tool, "GOEXPERIMENT=", "CGO_ENABLED=0")
	if out, err := install.CombinedOutput(); err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatalf("tessera's fsck: %v\n%s", err, out)
		}
		t.Logf("tessera's fsck can't be had, so it was not run: %v\n%s", err, out)
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
		run := exec.CommandContext(t.Context(), filepath.Join(tool, "fsck"), "--storage_url=file://"+dir+"/", "--public_key="+key, "--ui=false")
		if out, err := run.CombinedOutput(); err != nil {
			t.Errorf("fsck %s: %v\n%s", dir, err, out)
		}
	}
}

// TestAuditLog signs, exports and checks, as an operator and an auditor would, through an end of an epoch and a restart.
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
		if err := json.Unmarshal([]byte(s.must(append([]string{"audit", "verify", "--json", "--key", vkey}, args...)...)), &report); err != nil {
			t.Fatal(err)
		}
		return report
	}
	if r := verify("export"); !r.Valid || r.Signatures != 300 || r.Unsettled != 0 || r.Events < 600 || r.Epoch != 0 {
		t.Errorf("%+v", r)
	}
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := note.Open([]byte(must(os.ReadFile(s.path("older")))(t)), note.VerifierList(verifier)); err != nil || len(n.Sigs) != 1 {
		t.Errorf("%v", err)
	}

	// A checkpoint comes by itself. The list of epochs says of how many events it is, and signs none.
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

	// Through the end of an epoch and a restart.
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
	if r := verify("--socket", "admin.sock", "--since", "older"); r.Signatures != 360 || r.Epoch != 1 || r.Epochs != 2 {
		t.Errorf("%+v", r)
	}
	s.must("admin", "audit", "export", "export") // brings it up to date
	r := verify("export", "--since", "older")
	if r.Signatures != 360 || r.Epoch != 1 {
		t.Errorf("%+v", r)
	}
	s.must("admin", "audit", "export", "anew")
	fsck(t, vkey, s.path("export"), s.path("export/epochs/0"), s.path("export/epochs/1"), s.path("anew"), s.path("anew/epochs/0"))
	shown.checkpoints = append(shown.checkpoints, must(os.ReadFile(s.path("older")))(t))
	if len(shown.checkpoints) < 5 {
		t.Errorf("only %d checkpoints were watched", len(shown.checkpoints))
	}
	shown.checkConsistent(audit.Folder(s.path("export")))
	shown.checkConsistent(s.admin())

	// One byte of an entry.
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
	if out, errOut, code := s.cli("", "audit", "verify", "anew", "--key", vkey, "--json"); code != 1 || !strings.HasPrefix(errOut, "countersign: wrong_event: event 300: ") || !strings.Contains(out, `"event": 300`) {
		t.Errorf("event 300 was changed: %d, %s, %s", code, out, errOut)
	}
	// The older state, another log's key, and no log.
	s.write("newer", string(must(s.admin().ReadFile(t.Context(), "checkpoint"))(t)))
	older := s.path("cut")
	if err := os.CopyFS(older, os.DirFS(s.path("export/epochs/0"))); err != nil {
		t.Fatal(err)
	}
	if _, _, code := s.cli("", "audit", "verify", "cut", "--key", vkey); code != 0 {
		t.Errorf("an epoch alone: %d", code)
	}
	if _, errOut, code := s.cli("", "audit", "verify", "cut", "--key", vkey, "--since", "newer"); code != 1 || !strings.Contains(errOut, "cut off") {
		t.Errorf("a log that was cut off: %d, %s", code, errOut)
	}
	if _, _, code := s.cli("", "audit", "verify", "export", "--key", otherLogKey); code != 1 {
		t.Errorf("with another log's key: %d", code)
	}
	for _, args := range [][]string{{"audit", "verify"}, {"audit", "verify", "export", "--socket", "admin.sock", "--key", vkey}, {"audit", "verify", "export"}} {
		if _, _, code := s.cli("", args...); code != 2 {
			t.Errorf("%v: %d", args, code)
		}
	}
	if _, err := s.admin().ReadFile(t.Context(), "tile/../../ledger.db"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a path out of the log: %v", err)
	}
	p.stop()
	if out, code := s.daemon("check", "--deep"); code != 0 || !strings.Contains(out, "every page, event and hash was read") {
		t.Errorf("check --deep: %d, %s", code, out)
	}
	for name, b := range s.readFiles("export", "ledger.db") { // digests and names only
		if bytes.Contains(b, []byte("Lisbon")) || bytes.Contains(b, []byte("sub_demo_0001")) || bytes.Contains(b, []byte("lightning")) && name != "ledger.db" {
			t.Errorf("%s has a document's content", name)
		}
	}
}

// otherLogKey is a verifier key of a log of the same kind.
var otherLogKey = func() string {
	log, err := audit.NewLog(bytes.Repeat([]byte{9}, 32))
	if err != nil {
		panic(err)
	}
	return log.VerifierKey(0)
}()

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// readFiles reads all files below some.
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

// TestProven: the SDK gives out nothing that is not proven to be in the log of its key, and a proof is its peer's own.
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
	again := must(c.Sign(t.Context(), "payments", signed.Document))(t)
	if !again.Repeated || again.Event != signed.Event {
		t.Errorf("%+v", again)
	}
	var wg sync.WaitGroup // proofs that wait for one checkpoint
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
	if signed, err := wrong.Sign(t.Context(), "payments", message("AAAA")); !errors.Is(err, client.ErrUnproven) || signed != nil {
		t.Errorf("a signature of another log: %v", err)
	}
	// The proof of the event, by the command line.
	own := []string{"--server", s.listen, "--server-key", noiseKey, "--identity"}
	number := strconv.FormatUint(signed.Event, 10)
	out := s.must(append([]string{"proof", number, "--log-key", vkey}, append(own, "demo.key")...)...)
	if !strings.Contains(out, "checked") || !strings.Contains(out, "yes") || !strings.Contains(out, hex.EncodeToString(signed.Nonce[:])) {
		t.Errorf("proof: %s", out)
	}
	if _, errOut, code := s.cli("", append([]string{"proof", number, "--log-key", otherLogKey}, append(own, "demo.key")...)...); code != 1 {
		t.Errorf("proof with another log's key: %d, %s", code, errOut)
	}
	// Of another peer's event, of the daemon's, and of none: one and the same answer.
	for _, event := range []string{number, "0", "1", "999999999", "18446744073709551615"} {
		if _, errOut, code := s.cli("", append([]string{"proof", event}, append(own, "other.key")...)...); code != 1 || !strings.Contains(errOut, "denied: event "+event+" is not one of yours") {
			t.Errorf("proof of event %s for another peer: %d, %s", event, code, errOut)
		}
	}
	// Events of ended epochs are proven under these epochs' final checkpoints.
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

// TestReceipts: who asked can open the commitment, the same each time, and nobody else can guess it.
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
	id := hex.EncodeToString(signed.Receipt.ID)
	r := must(s.admin().Receipt(t.Context(), id))(t)
	commitment := sha256.Sum256(append(append([]byte("countersign-receipt-v1\x00"), signed.Receipt.Salt...), "1000 SAT"...))
	if r.Commitment != hex.EncodeToString(commitment[:]) || r.Method != "lightning" || r.Status != "completed" || r.Event != signed.Event || time.Since(time.UnixMilli(r.TimeMS)).Abs() > time.Minute {
		t.Errorf("%+v", r)
	}
	if out := s.must("admin", "receipt", "show", id); !strings.Contains(out, r.Commitment) {
		t.Error(out)
	}
	var list []struct{ ID string }
	if err := json.Unmarshal([]byte(s.must("admin", "receipt", "list", "--from", "2026-01-01", "--json")), &list); err != nil || len(list) != 2 || list[0].ID != id {
		t.Errorf("%v, %v", list, err)
	}
	if err := json.Unmarshal([]byte(s.must("admin", "receipt", "list", "--to", "2026-01-01", "--json")), &list); err != nil || len(list) != 0 {
		t.Errorf("%v, %v", list, err)
	}
	for _, bad := range []string{"00", strings.Repeat("z", 32), ""} {
		if _, errOut, code := s.cli("", "admin", "receipt", "show", bad); code == 0 || !strings.Contains(errOut, "invalid") && bad != "" {
			t.Errorf("receipt %q: %d, %s", bad, code, errOut)
		}
	}
	if _, _, code := s.cli("", "admin", "receipt", "show", strings.Repeat("0", 32)); code != 1 {
		t.Errorf("no receipt: %d", code)
	}
	s.must("admin", "audit", "export", "export")
	p.stop()
	salt := signed.Receipt.Salt
	for name, b := range s.readFiles("export", "ledger.db") {
		for what, secret := range map[string][]byte{
			"the salt": salt, "the salt in hex": []byte(hex.EncodeToString(salt)), "the amount": []byte("1000 SAT"), "the amount in JSON": []byte(`"1000"`), "the currency": []byte(`"SAT"`), "the payload": []byte("sub_demo_0001"),
		} {
			// What policy decided by is in the ledger, and nowhere else, as long as decisions are kept.
			if bytes.Contains(b, secret) && (what != "the currency" || !strings.HasSuffix(name, "ledger.db")) {
				t.Errorf("%s has %s", name, what)
			}
		}
	}
	if strings.Contains(p.stderr.String(), hex.EncodeToString(salt)) || strings.Contains(p.stderr.String(), "sub_demo_0001") {
		t.Error("the daemon's log has the salt or the payload")
	}
}

// waitForOutcomes waits until each admission has its outcome in the log: an answer does not wait for that.
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

// TestStrangersAreCounted: a flood of handshakes is an event or two for the five that were looked at and for the others, whose counts
// add up.
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
		if err := errors.Join(err, errSince, errUntil); err != nil || since > until || time.Since(time.UnixMilli(since)).Abs() > time.Minute {
			t.Errorf("%+v, %v", e, err)
		}
		events[e.Type]++
		count[e.Type] += n
	}
	for what, want := range map[audit.Type]int{audit.HandshakeRefused: 5, audit.RateLimitTriggered: 95} {
		if events[what] < 1 || events[what] > 2 || count[what] != want {
			t.Errorf("of 100 handshakes, %d events of type %s count %d, want %d", events[what], what, count[what], want)
		}
	}
	p.stop()
}

// TestLedgerByHand: holds, preview, stats, and a compaction while peers sign.
func TestLedgerByHand(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	s.must("admin", "audit", "end-epoch")
	if out := s.must("admin", "retention", "preview"); !strings.Contains(out, "is dropped after") || !strings.Contains(out, "present") {
		t.Errorf("preview: %s", out)
	}
	if _, errOut, code := s.cli("", "admin", "retention", "hold", "0"); code == 0 {
		t.Errorf("a hold without a reason: %s", errOut)
	}
	for epoch, want := range map[string]string{"7": "not_found", "x": "usage", "-1": "usage"} {
		if _, errOut, code := s.cli("", "admin", "retention", "hold", "--reason", "r", "--", epoch); code == 0 || !strings.Contains(errOut, want) {
			t.Errorf("epoch %s: %d, %s", epoch, code, errOut)
		}
	}
	s.must("admin", "retention", "hold", "0", "--reason", "case 17")
	if out := s.must("admin", "retention", "preview"); !strings.Contains(out, "held: case 17") {
		t.Errorf("preview of a hold: %s", out)
	}
	s.must("admin", "retention", "release", "0", "--reason", "settled")
	if out := s.must("admin", "retention", "preview"); strings.Contains(out, "held") {
		t.Errorf("preview after the release: %s", out)
	}
	var types []audit.Type
	for _, e := range s.events() {
		if e.Type == audit.LegalHoldSet || e.Type == audit.LegalHoldReleased {
			types = append(types, e.Type)
		}
	}
	if len(types) != 2 || types[0] != audit.LegalHoldSet {
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
	out := s.must("admin", "ledger", "stats")
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
		if again, err := c.Sign(t.Context(), "payments", x.Document); err != nil || !again.Repeated || !bytes.Equal(again.Signature, x.Signature) {
			t.Fatalf("a repetition: %v", err)
		}
	}
	s.must("audit", "verify", "--socket", "admin.sock", "--key", strings.TrimSpace(s.must("admin", "audit", "key")))
	p.stop()
	if out, code := s.daemon("check", "--deep"); code != 0 {
		t.Errorf("check --deep: %d, %s", code, out)
	}
}
