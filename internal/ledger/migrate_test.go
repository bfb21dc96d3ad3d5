package ledger_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/ledger/ledgertest"

	bolt "go.etcd.io/bbolt"
)

var write = flag.Bool("write", false, "write a ledger of the present format into testdata, if there is none")

// formatTime is the time of the ledgers in testdata.
var formatTime = time.Unix(1_800_000_000, 0)

func formatOptions() ledger.Options {
	return ledger.Options{Wall: func() time.Time { return formatTime }, Elapsed: func() time.Duration { return 0 }}
}

// formatAdmission is one of the admissions in each ledger of testdata.
func formatAdmission(n byte) ledger.Admission {
	return ledger.Admission{
		Scope: ledger.KeyScope("payments"), Nonce: [32]byte{n}, Digest: [32]byte{n}, Peer: peerName(n % 3),
		KeyVersion: 1, Timestamp: formatTime.Unix(), ExpiresAt: formatTime.Unix() + 1000,
	}
}

// fillFormat writes records of each kind.
func fillFormat(t *testing.T, l *ledger.Ledger) {
	for n := range byte(20) {
		got := mustAdmit(t, l, formatAdmission(n), ledger.Fresh)
		receipt := &ledger.Receipt{ID: ledger.ReceiptID{n}, TimeMS: formatTime.UnixMilli(), Event: got.Event}
		if err := l.Settle(t.Context(), got, bytes.Repeat([]byte{n}, 64), note("settled"), receipt); err != nil {
			t.Fatal(err)
		}
	}
	for table := range slices.Values([]ledger.Table{ledger.Keys, ledger.Peers, ledger.Operators, ledger.Meta}) {
		if err := l.Update(t.Context(), func(tx *ledger.Tx) error {
			return tx.Put(table, "a record", []byte("of "+table))
		}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.EndEpoch(t.Context(), audit.Daemon()); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(t.Context(), note("the last event")); err != nil {
		t.Fatal(err)
	}
}

// formatFile unpacks a ledger of testdata.
func formatFile(t *testing.T, packed string) string {
	t.Helper()
	f, err := os.Open(packed)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	unpacked, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(unpacked)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ledger.db")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestEveryFormat opens a ledger of each format since the first one with a migration. Nothing of
// the content is lost, a copy of the file before is kept, and a migrated ledger is opened again
// without another copy.
func TestEveryFormat(t *testing.T) {
	present := filepath.Join("testdata", fmt.Sprintf("format-%d.db.gz", ledger.Format))
	if _, err := os.Stat(present); *write && errors.Is(err, os.ErrNotExist) {
		path := filepath.Join(t.TempDir(), "ledger.db")
		if err := ledger.Create(path, formatOptions()); err != nil {
			t.Fatal(err)
		}
		l, err := ledgertest.Open(t, path, formatOptions())
		if err != nil {
			t.Fatal(err)
		}
		fillFormat(t, l)
		l.Close()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var packed bytes.Buffer
		w := gzip.NewWriter(&packed)
		w.Write(b)
		w.Close()
		if err := os.WriteFile(present, packed.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	files, err := filepath.Glob("testdata/format-*.db.gz")
	if err != nil || len(files) != ledger.Format-ledger.Oldest+1 {
		t.Fatalf("testdata has %v (%v); run go test -run TestEveryFormat -args -write for a new format", files, err)
	}
	for i, packed := range files {
		of := ledger.Oldest + i
		path := formatFile(t, packed)
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		o := formatOptions()
		o.AsIs = true
		if l, err := ledgertest.Open(t, path, o); of == ledger.Format && err != nil {
			t.Fatal(err)
		} else if err == nil {
			l.Close()
		} else if !errors.Is(err, ledger.ErrOlder) {
			t.Errorf("format %d, without a migration: %v", of, err)
		}
		l, err := ledgertest.Open(t, path, formatOptions())
		if err != nil {
			t.Fatalf("format %d: %v", of, err)
		}
		for n := range byte(20) {
			got := mustAdmit(t, l, formatAdmission(n), ledger.Repeated)
			if !bytes.Equal(got.Signature, bytes.Repeat([]byte{n}, 64)) {
				t.Errorf("format %d: the signature of admission %d is %x", of, n, got.Signature)
			}
		}
		for table := range slices.Values([]ledger.Table{ledger.Keys, ledger.Peers, ledger.Operators, ledger.Meta}) {
			if v, err := l.Get(table, "a record"); err != nil || string(v) != "of "+string(table) {
				t.Errorf("format %d, table %s: %q, %v", of, table, v, err)
			}
		}
		if epoch, first, tree := l.Head(); epoch != 1 || first != 41 || tree.Size != 2 {
			t.Errorf("format %d: epoch %d begins at event %d and has %d", of, epoch, first, tree.Size)
		}
		l.Close()
		checkFile(t, path)
		kept, err := os.ReadFile(fmt.Sprintf("%s.format-%d", path, of))
		if of == ledger.Format {
			if !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a ledger of the present format was copied: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatalf("format %d: the copy: %v", of, err)
		}
		if contents(t, kept) != contents(t, before) {
			t.Errorf("format %d: the copy has another content", of)
		}
	}
}

// contents hashes all records of a ledger's file.
func contents(t *testing.T, file []byte) (sum [32]byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "copy.db")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	h := sha256.New()
	var walk func(b *bolt.Bucket) error
	walk = func(b *bolt.Bucket) error {
		return b.ForEach(func(k, v []byte) error {
			fmt.Fprintf(h, "%q %q\n", k, v)
			if v == nil {
				return walk(b.Bucket(k))
			}
			return nil
		})
	}
	if err := db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error { fmt.Fprintf(h, "%q\n", name); return walk(b) })
	}); err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

// TestPowerCutsDuringAMigration cuts the power at each moment of a migration. Each disk that is
// left has a ledger that can be opened, with everything in it, and either no copy or a whole one.
func TestPowerCutsDuringAMigration(t *testing.T) {
	defer ledger.SmallReserve()()
	old, err := os.ReadFile(formatFile(t, fmt.Sprintf("testdata/format-%d.db.gz", ledger.Oldest)))
	if err != nil {
		t.Fatal(err)
	}
	disk := disktest.New(t)
	path := filepath.Join(disk.Dir(), "ledger.db")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	folder, err := os.Open(disk.Dir())
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(old)
	if err := errors.Join(err, f.Sync(), f.Close(), folder.Sync(), folder.Close()); err != nil {
		t.Fatal(err)
	}
	begin := disk.Mark()
	l, err := ledgertest.Open(t, path, formatOptions())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	disk.Unmount()
	want := contents(t, old)
	var copies atomic.Int64 // disks are judged at the same time
	r := disktest.Explore(t, disk.Record(), disktest.Options{Total: 2000, States: 60}, func(dir string, at int) error {
		if at < begin {
			return nil
		}
		kept, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("ledger.db.format-%d", ledger.Oldest)))
		if err == nil {
			if copies.Add(1); contents(t, kept) != want {
				return errors.New("the copy is not whole")
			}
		} else if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		l, err := ledger.Open(filepath.Join(dir, "ledger.db"), formatOptions()) // without a replica: many times
		if err != nil {
			return err
		}
		defer l.Close()
		for n := range byte(20) {
			got, err := l.Admit(t.Context(), formatAdmission(n), event)
			if err != nil || got.Verdict != ledger.Repeated {
				return fmt.Errorf("admission %d: %v, %w", n, got.Verdict, err)
			}
		}
		return nil
	})
	t.Logf("explored %d states, %d with a copy", r.States, copies.Load())
	if n := int(copies.Load()); r.States < 50 || n == 0 || n == r.States {
		t.Errorf("%d states, %d with a copy", r.States, n)
	}
}
