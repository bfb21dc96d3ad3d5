package ledger_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
)

// TestNothingIsAdmittedTwiceAfterARestore is a model of the rule of RestoredAfter. An appliance
// admits documents by its clock; a backup is made at any moment; another appliance, whose clock
// differs by at most the skew, restores it. Whatever was admitted before, in the backup or not, is
// never fresh again, and a document of a later time is.
func TestNothingIsAdmittedTwiceAfterARestore(t *testing.T) {
	const skew = 30 * time.Second
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 19))
			between := func(least, most time.Duration) time.Duration {
				return least + time.Duration(random.Int64N(int64(most-least)+1))
			}
			begin := time.Unix(1_800_000_000, int64(random.IntN(1e9)))
			now := begin // the true time; each clock has an error
			options := func(off time.Duration) ledger.Options {
				return ledger.Options{
					Wall:    func() time.Time { return now.Add(off) },
					Elapsed: func() time.Duration { return now.Sub(begin) },
				}
			}
			oldOff := between(-time.Hour, time.Hour)
			newOff := oldOff + between(-skew, skew)
			path := filepath.Join(t.TempDir(), "ledger.db")
			if err := ledger.Create(path, options(oldOff)); err != nil {
				t.Fatal(err)
			}
			l, err := ledgertest.Open(t, path, options(oldOff))
			if err != nil {
				t.Fatal(err)
			}
			made := byte(0)
			// document has any timestamp that an appliance with this clock admits.
			document := func(off time.Duration) ledger.Admission {
				made++
				clock := now.Add(off).Unix()
				timestamp := clock - int64(random.IntN(3600)) + int64(skew/time.Second)
				if random.IntN(3) == 0 { // the latest one
					timestamp = clock + int64(skew/time.Second)
				}
				return ledger.Admission{
					Scope: ledger.KeyScope("payments"), Nonce: [32]byte{made}, Digest: [32]byte{made}, Peer: "shop",
					KeyVersion: 1, Timestamp: timestamp, ExpiresAt: clock + 7200,
				}
			}
			var known, lost []ledger.Admission
			admit := func(n int) (all []ledger.Admission) {
				for range n {
					a := document(oldOff)
					mustAdmit(t, l, a, ledger.Fresh)
					all = append(all, a)
					now = now.Add(between(0, 20*time.Second))
				}
				return all
			}
			known = admit(random.IntN(6))
			backup := filepath.Join(t.TempDir(), "backup.db")
			f, err := os.Create(backup)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(l.Snapshot(f), f.Close()); err != nil {
				t.Fatal(err)
			}
			lost = admit(random.IntN(6)) // up to the moment of the restore
			l.Close()

			r, err := ledgertest.Open(t, backup, options(newOff))
			if err != nil {
				t.Fatal(err)
			}
			after := ledger.RestoredAfter(now.Add(newOff), skew)
			note := func(tx *ledger.Tx) error { return tx.Append(note("restored")) }
			if err := r.Restore(t.Context(), after, audit.Daemon(), note); err != nil {
				t.Fatal(err)
			}
			for range 4 {
				for _, a := range lost {
					_, err := r.Admit(t.Context(), a, event)
					if restored := new(ledger.RestoredError); !errors.As(err, &restored) || restored.After != after ||
						!errors.Is(err, ledger.ErrRestored) {
						t.Errorf("a document with the timestamp %d, restored at %d: %v", a.Timestamp, after, err)
					}
					a.Digest = [32]byte{255} // another document with the same nonce
					if _, err := r.Admit(t.Context(), a, event); !errors.Is(err, ledger.ErrRestored) {
						t.Errorf("a nonce of before on another document: %v", err)
					}
				}
				for _, a := range known {
					mustAdmit(t, r, a, ledger.Repeated)
				}
				r.Close()
				now = now.Add(between(0, 40*time.Second))
				if r, err = ledgertest.Open(t, backup, options(newOff)); err != nil { // the mark outlives a restart
					t.Fatal(err)
				}
			}
			a := document(newOff)
			a.Timestamp = after
			if _, err := r.Admit(t.Context(), a, event); !errors.Is(err, ledger.ErrRestored) {
				t.Errorf("the last refused timestamp: %v", err)
			}
			a.Timestamp = after + 1
			mustAdmit(t, r, a, ledger.Fresh)
			if epoch, _, _ := r.Head(); epoch != 1 {
				t.Errorf("the restored log is in epoch %d", epoch)
			}
			// A second restore of something older does not take the mark back.
			if err := r.Restore(t.Context(), after-100, audit.Daemon(), note); err != nil {
				t.Fatal(err)
			}
			a.Nonce, a.Timestamp = [32]byte{254}, after
			if _, err := r.Admit(t.Context(), a, event); !errors.Is(err, ledger.ErrRestored) {
				t.Errorf("after a second restore: %v", err)
			}
			r.Close()
			checkFile(t, backup)
		})
	}
}
