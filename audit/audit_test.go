package audit_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"countersign/audit"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// memory is a log in memory, with its private key. Trees and tiles are made by package tlog alone,
// independently of package audit.
type memory struct {
	files   map[string][]byte // by name, as a Source has them
	private ed25519.PrivateKey
	log     audit.Log
	events  uint64 // number of events in all epochs
	epochs  uint32 // number of epochs
	last    audit.Checkpoint
}

func (m *memory) ReadFile(_ context.Context, name string) ([]byte, error) {
	if b, ok := m.files[name]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
}

func newMemory(t testing.TB) *memory {
	private := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))
	log, err := audit.NewLog(private.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	return &memory{files: map[string][]byte{}, private: private, log: log}
}

func (m *memory) sign(message []byte) ([]byte, error) { return ed25519.Sign(m.private, message), nil }

// epoch adds an epoch, which becomes the present one. EpochBegun and then the events are its
// entries.
func (m *memory) epoch(t testing.TB, events ...[]byte) {
	t.Helper()
	begin := audit.Event{
		Type: audit.EpochBegun, Actor: audit.Daemon(),
		Action: "epoch", Resource: fmt.Sprintf("epoch/%d", m.epochs), Outcome: "ok",
		Metadata: map[string]string{"first": strconv.FormatUint(m.events, 10)},
	}
	if m.epochs > 0 {
		begin.Metadata["previous_size"] = strconv.FormatUint(m.last.Size, 10)
		begin.Metadata["previous_root"] = m.last.Root.String()
	}
	m.put(t, append([][]byte{begin.Encode(at(0))}, events...))
}

// put writes the files of an epoch with these entries.
func (m *memory) put(t testing.TB, events [][]byte) {
	t.Helper()
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) (hashes []tlog.Hash, err error) {
		for _, i := range indexes {
			hashes = append(hashes, stored[i])
		}
		return hashes, nil
	})
	for i, e := range events {
		more, err := tlog.StoredHashes(int64(i), e, reader)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, more...)
	}
	size := uint64(len(events))
	root, err := tlog.TreeHash(int64(size), reader)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) {
		m.files[name] = b
		m.files[fmt.Sprintf("epochs/%d/%s", m.epochs, name)] = b
	}
	maps.DeleteFunc(m.files, func(name string, _ []byte) bool { return !strings.HasPrefix(name, "epochs/") })
	if err := audit.Tiles(size, func(tile audit.Tile) error {
		b := []byte{}
		if tile.Level >= 0 {
			b, err = tlog.ReadTileData(tlog.Tile{H: 8, L: tile.Level, N: int64(tile.N), W: tile.Width}, reader)
		} else {
			for _, e := range events[tile.N*256:][:tile.Width] {
				b = append(binary.BigEndian.AppendUint16(b, uint16(len(e))), e...)
			}
		}
		write(tile.Path(), b)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	m.last = audit.Checkpoint{Epoch: m.epochs, Size: size, Root: audit.Hash(root)}
	text, err := m.log.Sign(m.last, m.sign)
	if err != nil {
		t.Fatal(err)
	}
	write("checkpoint", text)
	m.events, m.epochs = m.events+size, m.epochs+1
}

func (m *memory) verify(o audit.VerifyOptions) (audit.Report, error) {
	return m.log.Verify(context.Background(), m, o)
}

// TestVerifyFollow checks that a follower gets each event once and in order, and can end the
// reading.
func TestVerifyFollow(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, signatures(200, 1, 0)...)
	m.epoch(t, signatures(10, m.events+1, 100)...)
	var begun int
	var next uint64
	stop := errors.New("stop")
	o := audit.VerifyOptions{Follow: func() func(uint64, audit.Event) error {
		begun, next = begun+1, 0
		return func(index uint64, e audit.Event) error {
			if index != next || !e.Type.Known() {
				t.Fatalf("event %d, %+v, want %d", index, e, next)
			}
			if next++; index == 410 && begun > 1 {
				return stop
			}
			return nil
		}
	}}
	if r, err := m.verify(o); err != nil || next != r.Events || begun != 1 {
		t.Errorf("%d of %d events, %d readings, %v", next, r.Events, begun, err)
	}
	if _, err := m.verify(o); !errors.Is(err, stop) || next != 411 {
		t.Errorf("%v after event %d", err, next-1)
	}
}

const noon = 1_800_000_000 // Unix seconds of the time 0 of the tests

func at(second int) time.Time { return time.Unix(noon+int64(second), 0) }

// admitted returns the admission of a document that expires an hour later. The number nonce stands
// for the nonce and the digest.
func admitted(second, nonce int) audit.Event {
	return audit.Event{
		TimeMS: at(second).UnixMilli(), Type: audit.SignatureAdmitted, Actor: audit.Peer("shop", [32]byte{1}),
		Action: "sign", Resource: "payments/1", Outcome: "ok",
		Metadata: map[string]string{
			"nonce": fmt.Sprintf("%064x", nonce), "digest": fmt.Sprintf("%064x", nonce),
			"expires_at": strconv.Itoa(noon + second + 3600), "transcript": "message-v1",
		},
	}
}

// created returns the successful outcome of the admission with an event number.
func created(second int, admission uint64) audit.Event {
	return audit.Event{
		TimeMS: at(second).UnixMilli(), Type: audit.SignatureCreated, Actor: audit.Peer("shop", [32]byte{1}),
		Action: "sign", Resource: "payments/1", Outcome: "ok",
		Metadata: map[string]string{"admission": strconv.FormatUint(admission, 10)},
	}
}

func encode(e audit.Event) []byte { return e.Encode(time.UnixMilli(e.TimeMS)) }

// changed returns the encoding of a changed copy of an event.
func changed(e audit.Event, change func(*audit.Event)) []byte {
	e.Metadata = maps.Clone(e.Metadata)
	change(&e)
	return encode(e)
}

// signatures returns n admissions, each followed by its outcome. The first admission has the event
// number from and a time in seconds; ten signatures share a second.
func signatures(n int, from uint64, second int) (all [][]byte) {
	for i := range n {
		all = append(all, encode(admitted(second+i/10, int(from)+i)), encode(created(second+i/10, from+uint64(2*i))))
	}
	return all
}

func TestVerify(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, signatures(700, 1, 0)...)
	since := m.files["checkpoint"]
	m.epoch(t, signatures(10, m.events+1, 100)...)
	m.epoch(t) // has its first event only
	m.epoch(t, signatures(33_000, m.events+1, 200)...)
	r, err := m.verify(audit.VerifyOptions{Since: since})
	if err != nil {
		t.Fatal(err)
	}
	if r.Events != m.events || r.Epochs != 4 || r.Signatures != 33_710 || r.Unsettled != 0 || r.Checkpoint != m.last {
		t.Errorf("%+v", r)
	}
	// Verify finds each file with one changed byte, and names the event of a changed entry.
	ofPresentEpoch := []string{"tile/2/000.p/1", "tile/1/001.p/1", "checkpoint", "tile/entries/x004/000.p/1"}
	for _, name := range slices.Sorted(maps.Keys(m.files)) {
		if !strings.HasPrefix(name, "epochs/0/") && !slices.Contains(ofPresentEpoch, name) {
			continue
		}
		whole := m.files[name]
		for _, place := range []int{0, len(whole) / 2, len(whole) - 1} {
			spoilt := bytes.Clone(whole)
			spoilt[place] ^= 1
			m.files[name] = spoilt
			if _, err := m.verify(audit.VerifyOptions{}); err == nil {
				t.Errorf("%s with byte %d changed is believed", name, place)
			}
		}
		m.files[name] = whole
	}
	name := "epochs/0/tile/entries/003"
	whole := m.files[name]
	m.files[name] = bytes.Replace(whole, fmt.Appendf(nil, "%064x", 400), fmt.Appendf(nil, "%064x", 999_999), 1)
	var wrong *audit.Wrong
	if _, err := m.verify(audit.VerifyOptions{}); !errors.As(err, &wrong) || wrong.Event != 799 {
		t.Errorf("event 799 was changed: %v", err)
	}
	m.files[name] = whole
	// A log without its end, and a log whose older checkpoint has another tree, are invalid.
	newest := m.files["checkpoint"]
	m.epochs, m.events = 0, 0
	m.epoch(t, signatures(700, 2, 0)...)
	if _, err := m.verify(audit.VerifyOptions{Since: newest}); err == nil {
		t.Error("a log that was cut off is believed to go on from a newer checkpoint")
	}
	if _, err := m.verify(audit.VerifyOptions{Since: since}); err == nil {
		t.Error("a log with another content is believed to go on from an older checkpoint")
	}
}

// TestSinceInsideAnEpoch verifies an epoch against older checkpoints of that epoch, with an
// unchanged and with a changed last event.
func TestSinceInsideAnEpoch(t *testing.T) {
	events := signatures(700, 1, 0)
	for _, n := range []int{0, 1, 255, 256, 511, 1399} {
		m := newMemory(t)
		m.epoch(t, events[:n]...)
		since := m.files["checkpoint"]
		m.epochs, m.events = 0, 0
		m.epoch(t, events...)
		if _, err := m.verify(audit.VerifyOptions{Since: since}); err != nil {
			t.Errorf("%d events: %v", n, err)
		}
		if n == 0 {
			continue
		}
		other := slices.Clone(events)
		other[n-1] = encode(admitted(0, 123_456_789))
		m.epochs, m.events = 0, 0
		m.epoch(t, other...)
		if _, err := m.verify(audit.VerifyOptions{Since: since}); err == nil {
			t.Errorf("event %d was changed after the checkpoint, and that is believed", n)
		}
	}
}

// TestRules checks that Verify finds violations of the ledger's rules in a log with valid
// signatures.
func TestRules(t *testing.T) {
	verified := func(second, nonce int, signer byte) []byte {
		return changed(admitted(second, nonce), func(e *audit.Event) {
			e.Type, e.Resource = audit.SignatureVerified, ""
			e.Metadata["signer"] = hex.EncodeToString(bytes.Repeat([]byte{signer}, 32))
		})
	}
	resource := func(name string) func(*audit.Event) { return func(e *audit.Event) { e.Resource = name } }
	admission := encode(admitted(0, 1)) // event 1 in most cases
	signature := encode(created(1, 1))
	failure := changed(created(1, 1), func(e *audit.Event) { e.Type, e.Outcome = audit.SignatureFailed, "unavailable" })
	byAnotherPeer := changed(created(1, 1), func(e *audit.Event) { e.Actor = audit.Peer("cafe", [32]byte{1}) })
	byAnotherKey := changed(created(1, 1), func(e *audit.Event) { e.Actor = audit.Peer("shop", [32]byte{2}) })
	start := func(first, last string) []byte {
		const fields = `"type":"Started","actor":{"kind":"daemon","name":"x"},"action":"a","outcome":"ok"`
		return []byte(`{` + first + fields + last + `}`)
	}
	type list [][]byte
	for name, c := range map[string]struct {
		wrong  int64 // number of the wrong event; -1: the log is valid
		events list
	}{
		"valid":                             {-1, list{admission, signature}},
		"unsettled":                         {-1, list{admission}},
		"failed, then made":                 {-1, list{admission, failure, encode(created(2, 1))}},
		"a nonce twice":                     {2, list{admission, encode(admitted(1, 1))}},
		"a nonce twice, by another version": {2, list{admission, changed(admitted(1, 1), resource("payments/2"))}},
		"a nonce twice, by two keys":        {-1, list{admission, changed(admitted(1, 1), resource("other/1"))}},
		"a nonce twice, after its expiry":   {-1, list{admission, encode(admitted(3600*3, 1))}},
		"verified twice":                    {2, list{verified(0, 1, 1), verified(1, 1, 1)}},
		"verified for two signers":          {-1, list{verified(0, 1, 1), verified(1, 1, 2)}},
		"no admission":                      {1, list{encode(created(0, 0))}},
		"of the future":                     {1, list{encode(created(0, 2)), admission}},
		"made twice":                        {3, list{admission, signature, encode(created(2, 1))}},
		"by another peer":                   {2, list{admission, byAnotherPeer}},
		"by another key of the peer":        {-1, list{admission, byAnotherKey}},
		"with another version":              {2, list{admission, changed(created(1, 1), resource("payments/2"))}},
		"an unknown type": {1, list{
			changed(admitted(0, 1), func(e *audit.Event) { e.Type = "Whatever" }),
		}},
		"without a nonce": {1, list{
			changed(admitted(0, 1), func(e *audit.Event) { delete(e.Metadata, "nonce") }),
		}},
		"without a time": {1, list{changed(admitted(0, 1), func(e *audit.Event) { e.TimeMS = 0 })}},
		"without an actor": {1, list{
			changed(admitted(0, 1), func(e *audit.Event) { e.Actor = audit.Actor{} }),
		}},
		"not JSON":         {1, list{[]byte("hello")}},
		"a field too many": {1, list{start(`"time_ms":1,`, `,"amount":1`)}},
		"a field twice":    {1, list{start(`"time_ms":1,"time_ms":2,`, ``)}},
	} {
		m := newMemory(t)
		m.epoch(t, c.events...)
		if _, err := m.verify(audit.VerifyOptions{}); wrongEvent(err) != c.wrong || c.wrong < 0 && err != nil {
			t.Errorf("%s: %v, want event %d", name, err, c.wrong)
		}
	}
}

// TestEpochs checks that the first event of an epoch must agree with the checkpoint of the epoch
// before, and that the log must have an event about each dropped epoch.
func TestEpochs(t *testing.T) {
	build := func() *memory {
		m := newMemory(t)
		m.epoch(t, signatures(300, 1, 0)...)
		return m
	}
	drop := func(m *memory) {
		maps.DeleteFunc(m.files, func(name string, _ []byte) bool { return strings.HasPrefix(name, "epochs/0/tile/") })
	}
	m := build()
	root := m.last.Root
	admission := m.events - 2 // has its outcome in the next epoch
	m.epoch(t, retained(0, root), encode(created(90, admission)))
	drop(m)
	if r, err := m.verify(audit.VerifyOptions{}); err != nil || r.Dropped != 1 || r.First != 601 {
		t.Errorf("an epoch that was dropped: %+v, %v", r, err)
	}
	m = build()
	m.epoch(t)
	drop(m)
	if _, err := m.verify(audit.VerifyOptions{}); err == nil {
		t.Error("an epoch that is missing is taken for dropped")
	}
	m = build()
	m.epoch(t, retained(0, audit.Hash{1}))
	drop(m)
	if _, err := m.verify(audit.VerifyOptions{}); err == nil {
		t.Error("another epoch than the one that was dropped is missing")
	}
	m = build()
	m.last.Root = audit.Hash{1}
	m.epoch(t)
	if _, err := m.verify(audit.VerifyOptions{}); err == nil {
		t.Error("an epoch that names another end of the one before is believed")
	}
	m = build()
	m.events++
	m.epoch(t)
	if _, err := m.verify(audit.VerifyOptions{}); err == nil {
		t.Error("a gap in the numbers is believed")
	}
}

// storedHashes are the stored hashes of a tree. storedHashes is an audit.Reader.
type storedHashes []audit.Hash

func (s storedHashes) ReadHashes(indexes []int64) (hashes []audit.Hash, err error) {
	for _, i := range indexes {
		hashes = append(hashes, s[i])
	}
	return hashes, nil
}

// TestProof proves each event of a log, and checks that no changed proof is valid. The tree is
// compared with that of package tlog at each size.
func TestProof(t *testing.T) {
	m := newMemory(t)
	events := signatures(300, 1, 0)
	m.epoch(t, events...)
	var stored storedHashes
	reader := tlog.HashReaderFunc(func(indexes []int64) (hashes []tlog.Hash, err error) {
		for _, i := range indexes {
			hashes = append(hashes, tlog.Hash(stored[i]))
		}
		return hashes, nil
	})
	var tree audit.Tree
	bundle := m.files["tile/entries/000"]
	begin := bytes.Clone(bundle[2:][:binary.BigEndian.Uint16(bundle)])
	all := append([][]byte{begin}, events...)
	for _, e := range all {
		tree.Append(audit.LeafHash(e), func(h audit.Hash) { stored = append(stored, h) })
		if uint64(len(stored)) != audit.StoredHashes(tree.Size) {
			t.Fatalf("%d hashes are stored of %d events", len(stored), tree.Size)
		}
		loaded, err := audit.LoadTree(tree.Size, stored)
		if err != nil {
			t.Fatal(err)
		}
		got, err1 := loaded.Root()
		want, err2 := tlog.TreeHash(int64(tree.Size), reader)
		grown, err3 := tree.Root()
		if err := errors.Join(err1, err2, err3); err != nil || got != audit.Hash(want) || grown != got {
			t.Fatalf("roots of %d events: %v %v %v, %v", tree.Size, got, grown, want, err)
		}
	}
	for index := range uint64(len(all)) {
		path, err := audit.Prove(tree.Size, index, stored)
		if err != nil {
			t.Fatal(err)
		}
		p := audit.Proof{Event: index, Index: index, Leaf: all[index], Path: path, Checkpoint: m.files["checkpoint"]}
		if _, c, err := m.log.Check(p); err != nil || c != m.last {
			t.Fatalf("event %d: %v", index, err)
		}
		for name, spoil := range map[string]func(*audit.Proof){
			"index": func(p *audit.Proof) { p.Index ^= 1 }, "leaf": func(p *audit.Proof) { p.Leaf = all[index^1] },
			"path": func(p *audit.Proof) { p.Path[0][0] ^= 1 }, "short": func(p *audit.Proof) { p.Path = p.Path[1:] },
			"far": func(p *audit.Proof) { p.Index += 1 << 40 }, "none": func(p *audit.Proof) { p.Path = nil },
		} {
			q := p
			q.Path = slices.Clone(p.Path)
			if index^1 < uint64(len(all)) {
				spoil(&q)
				if _, _, err := m.log.Check(q); err == nil {
					t.Fatalf("event %d is proven with a wrong %s", index, name)
				}
			}
		}
	}
}

// TestHashText checks the base64 form of a hash in JSON.
func TestHashText(t *testing.T) {
	hash := audit.LeafHash([]byte("event"))
	text, err := json.Marshal(hash)
	if err != nil || string(text) != strconv.Quote(hash.String()) {
		t.Fatalf("%s, %v, want the string %q", text, err, hash)
	}
	var again audit.Hash
	if err := json.Unmarshal(text, &again); err != nil || again != hash {
		t.Fatalf("%v, %v, want %v", again, err, hash)
	}
	for _, bad := range []string{"", "AAAA", hash.String() + "AAAA", strings.TrimRight(hash.String(), "=")} {
		if err := again.UnmarshalText([]byte(bad)); err == nil || again != hash {
			t.Errorf("%q is decoded as the hash %v", bad, again)
		}
	}
}

// TestVerifierKey checks that the verifier keys of all epochs follow from one, and that package
// note reads them.
func TestVerifierKey(t *testing.T) {
	m := newMemory(t)
	m.epoch(t)
	for epoch := range uint32(3) {
		vkey := m.log.VerifierKey(epoch)
		log, err := audit.ParseVerifierKey(vkey + "\n")
		if err != nil || log.VerifierKey(7) != m.log.VerifierKey(7) {
			t.Errorf("%s: %v", vkey, err)
		}
		v, err := note.NewVerifier(vkey)
		if err != nil || v.Name() != m.log.Origin(epoch) {
			t.Errorf("%s: %v", vkey, err)
		}
		if _, err := note.Open(m.files["checkpoint"], note.VerifierList(v)); (err == nil) != (epoch == 0) {
			t.Errorf("the checkpoint of epoch 0 under the key of epoch %d: %v", epoch, err)
		}
	}
	other, _ := note.NewEd25519VerifierKey("example.com/log", m.private.Public().(ed25519.PublicKey))
	for _, bad := range []string{"", "x", "a+b+c", other, strings.Replace(m.log.VerifierKey(0), "/0+", "/00+", 1)} {
		if _, err := audit.ParseVerifierKey(bad); err == nil {
			t.Errorf("%q is taken for a key", bad)
		}
	}
	checkpoint := string(m.files["checkpoint"])
	for _, text := range []string{"", "\n", checkpoint[1:], strings.Replace(checkpoint, "\n1\n", "\n2\n", 1)} {
		if _, err := m.log.Open([]byte(text)); err == nil {
			t.Errorf("%q is taken for a checkpoint", text)
		}
	}
}

func TestTileNames(t *testing.T) {
	for _, name := range []string{"tile/0/000", "tile/0/000.p/1", "tile/entries/x001/x234/067", "tile/7/000.p/255"} {
		if tile, ok := audit.ParseTile(name); !ok || tile.Path() != name {
			t.Errorf("%s: %v", name, tile)
		}
	}
	for _, name := range []string{
		"", "tile", "tile/8/0/000", "tile/data/000", "tile/0/0", "tile/0/000.p/256", "tile/0/000.p/0", "tile/-1/000",
		"tile/00/000", "tile/0/000/", "tile/entries/../000", "../tile/0/000", "tile/entries/x000/000",
	} {
		if tile, ok := audit.ParseTile(name); ok {
			t.Errorf("%s is taken for %v", name, tile)
		}
	}
}

func TestMirror(t *testing.T) {
	m := newMemory(t)
	m.epoch(t, signatures(300, 1, 0)...)
	dir := t.TempDir()
	for range 3 {
		c, err := audit.Mirror(t.Context(), m, m.log, dir, nil)
		if err != nil || c != m.last {
			t.Fatal(c, err)
		}
		r, err := m.log.Verify(t.Context(), audit.Folder(dir), audit.VerifyOptions{})
		if err != nil || r.Events != m.events {
			t.Fatalf("%+v, %v", r, err)
		}
		m.epoch(t, signatures(300, m.events+1, 100*int(m.epochs))...)
	}
}

// BenchmarkVerify verifies a log of 200,001 events in memory on one core, nine times. The benchmark
// prints the median rate.
func BenchmarkVerify(b *testing.B) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	m := newMemory(b)
	m.epoch(b, signatures(100_000, 1, 0)...)
	var rates []float64
	for range 9 {
		begin := time.Now()
		if _, err := m.verify(audit.VerifyOptions{}); err != nil {
			b.Fatal(err)
		}
		rates = append(rates, float64(m.events)/time.Since(begin).Seconds())
	}
	slices.Sort(rates)
	fmt.Fprintf(os.Stdout, "audit-verify events=%d cores=1 %.0f events/s\n", m.events, rates[len(rates)/2])
}

// TestLogKeyIsAKey makes logs of points of small order, under which a constant is the signature of
// every checkpoint, of a point of mixed order and of no point, and writes a key in another form.
func TestLogKeyIsAKey(t *testing.T) {
	for _, first := range []byte{0, 1, 2} { // order 4, order 1, no point
		public := append([]byte{first}, make([]byte, 31)...)
		if _, err := audit.NewLog(public); err == nil {
			t.Errorf("%x is the key of a log", public)
		}
		name := fmt.Sprintf("countersign/%x/0", public[:8])
		vkey, err := note.NewEd25519VerifierKey(name, public)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := audit.ParseVerifierKey(vkey); err == nil {
			t.Errorf("%s is a verifier key", vkey)
		}
	}
	vkey := newMemory(t).log.VerifierKey(0)
	for _, other := range []string{
		strings.Replace(vkey, "+", "+0", 1), // no second form of the hash
		vkey[:len(vkey)-4] + "\n" + vkey[len(vkey)-4:],
	} {
		if _, err := audit.ParseVerifierKey(other); err == nil {
			t.Errorf("%q is a verifier key", other)
		}
	}
}

// TestExtensionLines opens checkpoints with extension lines, of which an empty one is none (C2SP
// tlog-checkpoint). The signature is good for all texts.
func TestExtensionLines(t *testing.T) {
	m := newMemory(t)
	v, err := note.NewVerifier(m.log.VerifierKey(0))
	if err != nil {
		t.Fatal(err)
	}
	root := audit.Hash{}.String()
	for extension, good := range map[string]bool{
		"": true, "x\n": true, "x\ny\n": true, " \n": true, "\n": false, "\n\n": false, "x\n\n": false, "\nx\n": false,
		"x\n\ny\n": false,
	} {
		text := m.log.Origin(0) + "\n1\n" + root + "\n" + extension
		signed, err := note.Sign(&note.Note{Text: text}, noteSigner{v, m})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.log.Open(signed); (err == nil) != good {
			t.Errorf("%q: %v", extension, err)
		}
	}
}

// noteSigner signs notes with the key of a log.
type noteSigner struct {
	note.Verifier
	m *memory
}

func (s noteSigner) Sign(message []byte) ([]byte, error) { return s.m.sign(message) }
