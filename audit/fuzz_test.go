package audit

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"
)

var fuzzKey = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))

func fuzzLog() Log { return Log{fuzzKey.Public().(ed25519.PublicKey)} }

// fuzzTime is the time of the events in the seeds.
var fuzzTime = time.Unix(1_800_000_000, 0)

// fuzzSigning returns an event about a signature.
func fuzzSigning(kind Type, metadata map[string]string) []byte {
	return Event{
		Type: kind, Actor: Peer("shop", [32]byte{1}),
		Action: "sign", Resource: "payments/1", Outcome: "ok", Metadata: metadata,
	}.Encode(fuzzTime)
}

func fuzzSign(message []byte) ([]byte, error) { return ed25519.Sign(fuzzKey, message), nil }

// FuzzSplit checks that the entries of a bundle encode to the same bundle again.
func FuzzSplit(f *testing.F) {
	f.Add([]byte("\x00\x01a\x00\x02bc"), 2)
	f.Add([]byte("\x00\x00\x00\x00"), 2)
	f.Add([]byte("\xff\xffa"), 1)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, bundle []byte, n int) {
		n &= 255
		entries, err := split(bundle, n)
		if err != nil {
			if len(entries) > n {
				t.Fatalf("%d entries of %d, and %v", len(entries), n, err)
			}
			return
		}
		var again []byte
		for _, e := range entries {
			again = append(binary.BigEndian.AppendUint16(again, uint16(len(e))), e...)
		}
		if len(entries) != n || !bytes.Equal(again, bundle) {
			t.Fatalf("%x is split into %x", bundle, entries)
		}
	})
}

// FuzzDecode checks that Decode and decodeStrict read an event alike, and that the event is equal
// after Encode and another decodeStrict, unless Encode cuts a text. A cut text is not cut again.
func FuzzDecode(f *testing.F) {
	f.Add(Event{Type: Started, Actor: Daemon(), Action: "serve", Outcome: "ok"}.Encode(fuzzTime))
	f.Add(fuzzSigning(SignatureAdmitted, map[string]string{"nonce": "00", "expires_at": "1"}))
	f.Add([]byte(`{"time_ms":1,"Type":"Started","type":"Stopped",` +
		`"actor":{"kind":"daemon","name":"x"},"action":"a","outcome":"ok"}`))
	f.Add([]byte(`{"time_ms":1e3,"type":"Started",` +
		`"actor":{"kind":"daemon","name":"\ud800"},"action":"a","outcome":"ok","metadata":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeStrict(b)
		if err != nil {
			return
		}
		lax, err := Decode(b)
		if err != nil {
			t.Fatalf("%q is an event for Verify and none for others: %v", b, err)
		}
		written := e.Encode(time.UnixMilli(e.TimeMS))
		again, err := decodeStrict(written)
		long := false
		for _, text := range e.Metadata {
			long = long || len(text) > maxText
		}
		same := fmt.Sprint(lax) == fmt.Sprint(e) && (long || fmt.Sprint(again) == fmt.Sprint(e))
		if err != nil || !same || !bytes.Equal(again.Encode(time.UnixMilli(e.TimeMS)), written) {
			t.Fatalf("%.300q is read as %.300v, as %.300v and then as %.300v, %v", b, e, lax, again, err)
		}
	})
}

// FuzzTile checks that a parsed name has the same path again, and that the tile is in range.
func FuzzTile(f *testing.F) {
	for _, name := range []string{
		"tile/0/000", "tile/entries/x001/x234/067.p/12", "tile/7/000.p/255", "tile/63/000",
		"tile/0/x999/x999/x999/x999/x999/x999/999", "tile/-1/000", "tile/data/000",
	} {
		f.Add(name, uint64(1<<40))
	}
	f.Add("tile/0/x009/x223/x372/x036/x854/x775/808", uint64(1<<62-1))
	f.Fuzz(func(t *testing.T, name string, size uint64) {
		tile, ok := ParseTile(name)
		if !ok {
			return
		}
		if tile.Path() != name || tile.Width < 1 || tile.Width > TileWidth || tile.Level < -1 || tile.Level > 63 {
			t.Fatalf("%q is %+v", name, tile)
		}
		size %= 1 << 62
		if tile.In(size) && (tile.Level > 7 || tile.N*TileWidth+uint64(tile.Width) > size>>(8*max(0, tile.Level))) {
			t.Fatalf("%q is in a tree of %d", name, size)
		}
	})
}

// FuzzVerifierKey checks that the verifier keys of a parsed log belong to the same log.
func FuzzVerifierKey(f *testing.F) {
	f.Add(fuzzLog().VerifierKey(0))
	f.Add(fuzzLog().VerifierKey(1<<32 - 1))
	f.Add("countersign/0000000000000000/0+00000000+AQ==")
	f.Add("a+b")
	f.Fuzz(func(t *testing.T, vkey string) {
		log, err := ParseVerifierKey(vkey)
		if err != nil {
			return
		}
		if again, err := ParseVerifierKey(log.VerifierKey(3)); err != nil || !again.public.Equal(log.public) {
			t.Fatalf("%q is the key of %v, %v", vkey, again, err)
		}
	})
}

// FuzzOpen opens checkpoints with arbitrary content and valid signatures. An opened checkpoint is
// equal after Sign and another Open.
func FuzzOpen(f *testing.F) {
	name := fuzzLog().Name() + "/"
	f.Add(name+"0\n1\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n", "")
	f.Add(name+"0\n1\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\nextension\n", "— other AAAAAAAAAAAAAAAAAA==\n")
	f.Add(name+"4294967296\n4611686018427387904\n\n", "")
	f.Add(name+"00\n01\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB=\n", "\n")
	f.Fuzz(func(t *testing.T, body, more string) {
		log := fuzzLog()
		signature, _ := fuzzSign([]byte(body))
		for epoch := range uint32(2) {
			text := signed(log, epoch, body, signature) + more
			c, err := log.Open([]byte(text))
			if err != nil {
				continue
			}
			if c.Size >= 1<<62 || !bytes.HasPrefix([]byte(body), []byte(c.body(log))) {
				t.Fatalf("%q is read as %+v", text, c)
			}
			if again, err := log.Sign(c, fuzzSign); err != nil {
				t.Fatal(err)
			} else if second, err := log.Open(again); err != nil || second != c {
				t.Fatalf("%+v is read again as %+v, %v", c, second, err)
			}
		}
	})
}

// fuzzFiles are the files of a log by name. fuzzFiles is a Source.
type fuzzFiles map[string][]byte

func (f fuzzFiles) ReadFile(_ context.Context, name string) ([]byte, error) {
	if b, ok := f[name]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
}

// fuzzHashes are the stored hashes of a tree. fuzzHashes is a Reader.
type fuzzHashes []Hash

func (f fuzzHashes) ReadHashes(indexes []int64) (hashes []Hash, err error) {
	for _, i := range indexes {
		hashes = append(hashes, f[i])
	}
	return hashes, nil
}

// FuzzVerify verifies logs with arbitrary events, sizes and changed bytes, and with valid
// signatures. Verify accepts the correct number of events only, and names only events that the log
// has.
func FuzzVerify(f *testing.F) {
	begin := Event{
		Type: EpochBegun, Actor: Daemon(), Action: "epoch", Resource: "epoch/0", Outcome: "ok",
		Metadata: map[string]string{"first": "0"},
	}.Encode(fuzzTime)
	admitted := fuzzSigning(SignatureAdmitted, map[string]string{
		"nonce": strings.Repeat("0", 64), "digest": strings.Repeat("1", 64),
		"expires_at": "1800003600", "transcript": "message-v1",
	})
	created := fuzzSigning(SignatureCreated, map[string]string{"admission": "1"})
	seed := bytes.Join([][]byte{begin, admitted, created}, []byte("\n"))
	f.Add(seed, uint64(3), uint64(0), -1)
	f.Add(seed, uint64(3), uint64(2), 1)
	f.Add(seed, uint64(1<<62-1), uint64(1), 700)
	f.Add(bytes.Repeat(append(admitted, '\n'), 257), uint64(257), uint64(0), 70_000)
	f.Fuzz(func(t *testing.T, text []byte, size, since uint64, spoil int) {
		events := bytes.Split(text, []byte("\n"))
		if len(events) > 600 {
			return
		}
		var stored fuzzHashes
		var tree Tree
		for _, e := range events {
			tree.Append(LeafHash(e), func(h Hash) { stored = append(stored, h) })
		}
		root, err := tree.Root()
		if err != nil {
			t.Fatal(err)
		}
		files := fuzzFiles{}
		if err := Tiles(tree.Size, func(tile Tile) error {
			var b []byte
			if tile.Level >= 0 {
				b, err = tile.Hashes(stored)
			} else {
				for _, e := range events[tile.N*TileWidth:][:tile.Width] {
					b = append(binary.BigEndian.AppendUint16(b, uint16(len(e))), e...)
				}
			}
			if spoil >= 0 && spoil < len(b) {
				b[spoil] ^= 1
			}
			spoil -= len(b)
			files[tile.Path()] = b
			return err
		}); err != nil {
			t.Fatal(err)
		}
		log := fuzzLog()
		if files["checkpoint"], err = log.Sign(Checkpoint{0, size % (1 << 62), root}, fuzzSign); err != nil {
			t.Fatal(err)
		}
		var o VerifyOptions
		if since > 0 {
			if o.Since, err = log.Sign(Checkpoint{0, since % (1 << 62), root}, fuzzSign); err != nil {
				t.Fatal(err)
			}
		}
		r, err := log.Verify(context.Background(), files, o)
		var wrong *Wrong
		switch {
		case err == nil && (r.Events != uint64(len(events)) || r.Checkpoint.Size != tree.Size):
			t.Fatalf("%d events are taken for %d", len(events), r.Events)
		case errors.As(err, &wrong) && wrong.Event > max(size%(1<<62), uint64(len(events))):
			t.Fatalf("of %d events, event %d is said to be wrong: %v", len(events), wrong.Event, err)
		}
	})
}

// signed returns the signed note of a body, which need not be a valid checkpoint.
func signed(log Log, epoch uint32, body string, signature []byte) string {
	vkey := log.VerifierKey(epoch)
	var hash uint32
	fmt.Sscanf(vkey[len(log.Origin(epoch))+1:], "%08x", &hash)
	b := append(binary.BigEndian.AppendUint32(nil, hash), signature...)
	return body + "\n— " + log.Origin(epoch) + " " + base64.StdEncoding.EncodeToString(b) + "\n"
}
