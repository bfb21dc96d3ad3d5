package audit_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/hex"
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

// memory is a log that a test makes: its files by name. It makes trees with tlog alone.
type memory struct {
	files   map[string][]byte
	private ed25519.PrivateKey
	log     audit.Log
	events  uint64 // of all epochs so far
	epochs  uint32
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

// epoch adds an epoch with these events after its first one, and makes it the present one.
func (m *memory) epoch(t testing.TB, events ...[]byte) {
	t.Helper()
	begin := audit.Event{Type: audit.EpochBegun, Actor: audit.Daemon(), Action: "epoch", Resource: fmt.Sprintf("epoch/%d", m.epochs), Outcome: "ok",
		Metadata: map[string]string{"first": strconv.FormatUint(m.events, 10)}}
	if m.epochs > 0 {
		begin.Metadata["previous_size"], begin.Metadata["previous_root"] = strconv.FormatUint(m.last.Size, 10), m.last.Root.String()
	}
	m.put(t, append([][]byte{begin.Encode(at(0))}, events...))
}

// put writes an epoch's files.
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
			b, err = tile.Hashes(reader)
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
	m.last = audit.Checkpoint{Epoch: m.epochs, Size: size, Root: root}
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

// TestVerifyFollow: who follows a log sees each of its events once, in their order, and can end the reading.
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

const noon = 1_800_000_000 // Unix seconds

func at(second int) time.Time { return time.Unix(noon+int64(second), 0) }

func admitted(second, nonce int) audit.Event {
	return audit.Event{TimeMS: at(second).UnixMilli(), Type: audit.SignatureAdmitted, Actor: audit.Peer("shop", [32]byte{1}), Action: "sign", Resource: "payments/1", Outcome: "ok",
		Metadata: map[string]string{"nonce": fmt.Sprintf("%064x", nonce), "digest": fmt.Sprintf("%064x", nonce), "expires_at": strconv.Itoa(noon + second + 3600), "transcript": "message-v1"}}
}

func created(second int, admission uint64) audit.Event {
	return audit.Event{TimeMS: at(second).UnixMilli(), Type: audit.SignatureCreated, Actor: audit.Peer("shop", [32]byte{1}), Action: "sign", Resource: "payments/1", Outcome: "ok",
		Metadata: map[string]string{"admission": strconv.FormatUint(admission, 10)}}
}

func encode(e audit.Event) []byte { return e.Encode(time.UnixMilli(e.TimeMS)) }

// signatures are n admissions with their outcomes, from an event number and a time in seconds on.
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
	m.epoch(t) // with nothing in it
	m.epoch(t, signatures(33_000, m.events+1, 200)...)
	r, err := m.verify(audit.VerifyOptions{Since: since})
	if err != nil {
		t.Fatal(err)
	}
	if r.Events != m.events || r.Epochs != 4 || r.Signatures != 33_710 || r.Unsettled != 0 || r.Checkpoint != m.last {
		t.Errorf("%+v", r)
	}
	// Each file that is changed in one byte is found, and where it is an entry, by its number.
	for _, name := range slices.Sorted(maps.Keys(m.files)) {
		if !strings.HasPrefix(name, "epochs/0/") && name != "tile/2/000.p/1" && name != "tile/1/001.p/1" && name != "checkpoint" && name != "tile/entries/x004/000.p/1" {
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
	// The end of the log is gone, or an older checkpoint was of another tree.
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

// TestRules: what the ledger promises is checked by what the log says, by whoever has signed it.
func TestRules(t *testing.T) {
	edit := func(e audit.Event, change func(*audit.Event)) []byte {
		e.Metadata = maps.Clone(e.Metadata)
		change(&e)
		return encode(e)
	}
	verified := func(second, nonce int, signer byte) []byte {
		return edit(admitted(second, nonce), func(e *audit.Event) {
			e.Type, e.Resource, e.Metadata["signer"] = audit.SignatureVerified, "", hex.EncodeToString(bytes.Repeat([]byte{signer}, 32))
		})
	}
	for name, c := range map[string]struct {
		wrong  int64 // number of the event; -1: none
		events [][]byte
	}{
		"sound":                             {-1, [][]byte{encode(admitted(0, 1)), encode(created(1, 1))}},
		"unsettled":                         {-1, [][]byte{encode(admitted(0, 1))}},
		"failed, then made":                 {-1, [][]byte{encode(admitted(0, 1)), edit(created(1, 1), func(e *audit.Event) { e.Type, e.Outcome = audit.SignatureFailed, "unavailable" }), encode(created(2, 1))}},
		"a nonce twice":                     {2, [][]byte{encode(admitted(0, 1)), encode(admitted(1, 1))}},
		"a nonce twice, by another version": {2, [][]byte{encode(admitted(0, 1)), edit(admitted(1, 1), func(e *audit.Event) { e.Resource = "payments/2" })}},
		"a nonce twice, by two keys":        {-1, [][]byte{encode(admitted(0, 1)), edit(admitted(1, 1), func(e *audit.Event) { e.Resource = "other/1" })}},
		"a nonce twice, after its expiry":   {-1, [][]byte{encode(admitted(0, 1)), encode(admitted(3600*3, 1))}},
		"verified twice":                    {2, [][]byte{verified(0, 1, 1), verified(1, 1, 1)}},
		"verified for two signers":          {-1, [][]byte{verified(0, 1, 1), verified(1, 1, 2)}},
		"no admission":                      {1, [][]byte{encode(created(0, 0))}},
		"of the future":                     {1, [][]byte{encode(created(0, 2)), encode(admitted(0, 1))}},
		"made twice":                        {3, [][]byte{encode(admitted(0, 1)), encode(created(1, 1)), encode(created(2, 1))}},
		"by another peer":                   {2, [][]byte{encode(admitted(0, 1)), edit(created(1, 1), func(e *audit.Event) { e.Actor = audit.Peer("shop", [32]byte{2}) })}},
		"with another version":              {2, [][]byte{encode(admitted(0, 1)), edit(created(1, 1), func(e *audit.Event) { e.Resource = "payments/2" })}},
		"an unknown type":                   {1, [][]byte{edit(admitted(0, 1), func(e *audit.Event) { e.Type = "Whatever" })}},
		"without a nonce":                   {1, [][]byte{edit(admitted(0, 1), func(e *audit.Event) { delete(e.Metadata, "nonce") })}},
		"without a time":                    {1, [][]byte{edit(admitted(0, 1), func(e *audit.Event) { e.TimeMS = 0 })}},
		"without an actor":                  {1, [][]byte{edit(admitted(0, 1), func(e *audit.Event) { e.Actor = audit.Actor{} })}},
		"not JSON":                          {1, [][]byte{[]byte("hello")}},
		"a field too many":                  {1, [][]byte{[]byte(`{"time_ms":1,"type":"Started","actor":{"kind":"daemon","name":"x"},"action":"a","outcome":"ok","amount":1}`)}},
		"a field twice":                     {1, [][]byte{[]byte(`{"time_ms":1,"time_ms":2,"type":"Started","actor":{"kind":"daemon","name":"x"},"action":"a","outcome":"ok"}`)}},
	} {
		m := newMemory(t)
		m.epoch(t, c.events...)
		_, err := m.verify(audit.VerifyOptions{})
		var wrong *audit.Wrong
		if errors.As(err, &wrong); c.wrong < 0 && err != nil || c.wrong >= 0 && (wrong == nil || wrong.Event != uint64(c.wrong)) {
			t.Errorf("%s: %v, want event %d", name, err, c.wrong)
		}
	}
}

// TestEpochs: what one epoch says of the one before is held against its checkpoint, and what is not there must have been
// dropped by the log's own word.
func TestEpochs(t *testing.T) {
	build := func() *memory {
		m := newMemory(t)
		m.epoch(t, signatures(300, 1, 0)...)
		return m
	}
	drop := func(m *memory) {
		maps.DeleteFunc(m.files, func(name string, _ []byte) bool { return strings.HasPrefix(name, "epochs/0/tile/") })
	}
	retention := func(root audit.Hash) []byte {
		return encode(audit.Event{TimeMS: at(0).UnixMilli(), Type: audit.RetentionApplied, Actor: audit.Daemon(), Action: "retention", Resource: "epoch/0", Outcome: "ok",
			Metadata: map[string]string{"root": root.String()}})
	}
	m := build()
	root := m.last.Root
	admission := m.events - 2 // settled in the next epoch
	m.epoch(t, retention(root), encode(created(90, admission)))
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
	m.epoch(t, retention(audit.Hash{1}))
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

func TestProof(t *testing.T) {
	m := newMemory(t)
	events := signatures(300, 1, 0)
	m.epoch(t, events...)
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) (hashes []tlog.Hash, err error) {
		for _, i := range indexes {
			hashes = append(hashes, stored[i])
		}
		return hashes, nil
	})
	var tree audit.Tree
	all := append([][]byte{bytes.Clone(m.files["tile/entries/000"][2:][:binary.BigEndian.Uint16(m.files["tile/entries/000"])])}, events...)
	for _, e := range all {
		tree.Append(audit.LeafHash(e), func(h audit.Hash) { stored = append(stored, h) })
		if uint64(len(stored)) != audit.StoredHashes(tree.Size) {
			t.Fatalf("%d hashes are stored of %d events", len(stored), tree.Size)
		}
		loaded, err := audit.LoadTree(tree.Size, reader)
		if err != nil {
			t.Fatal(err)
		}
		got, err1 := loaded.Root()
		want, err2 := tlog.TreeHash(int64(tree.Size), reader)
		if kept, err := tree.Root(); err != nil || err1 != nil || err2 != nil || got != want || kept != want {
			t.Fatalf("roots of %d events: %v %v %v", tree.Size, got, kept, want)
		}
	}
	for index := range uint64(len(all)) {
		path, err := audit.Prove(tree.Size, index, reader)
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
				if spoil(&q); true {
					if _, _, err := m.log.Check(q); err == nil {
						t.Fatalf("event %d is proven with a wrong %s", index, name)
					}
				}
			}
		}
	}
}

// TestVerifierKey: the key of any epoch tells those of all, and other tools read it.
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
	for _, text := range []string{"", "\n", string(m.files["checkpoint"][1:]), strings.Replace(string(m.files["checkpoint"]), "\n1\n", "\n2\n", 1)} {
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
	for _, name := range []string{"", "tile", "tile/8/0/000", "tile/data/000", "tile/0/0", "tile/0/000.p/256", "tile/0/000.p/0", "tile/-1/000", "tile/00/000", "tile/0/000/", "tile/entries/../000", "../tile/0/000", "tile/entries/x000/000"} {
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
		if r, err := m.log.Verify(t.Context(), audit.Folder(dir), audit.VerifyOptions{}); err != nil || r.Events != m.events {
			t.Fatalf("%+v, %v", r, err)
		}
		m.epoch(t, signatures(300, m.events+1, 100*int(m.epochs))...)
	}
}

// BenchmarkVerify checks a log of 200,000 events, which is in memory, on one core.
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
