package ledger

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// TestGroupThatNobodyWaitsFor checks a group whose contexts end while the disk hangs and the queue
// is full. The group is abandoned, as a single request is, and no nonce is spent.
func TestGroupThatNobodyWaitsFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "ledger.db")
		if err := Create(path, Options{}); err != nil {
			t.Fatal(err)
		}
		l, err := Open(path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		hang := make(chan struct{})
		go l.Update(t.Context(), func(*Tx) error { <-hang; return errors.New("no change") })
		synctest.Wait()
		for range cap(l.requests) {
			l.requests <- &request{apply: func(*txn) error { return nil }}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		member := l.Group(1).Member()
		scope, nonce := KeyScope("payments"), [32]byte{1}
		a := Admission{Scope: scope, Nonce: nonce, ExpiresAt: time.Now().Unix() + 60, Member: member}
		_, err = l.Admit(ctx, a, func(Verdict) []byte { return []byte("{}") })
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		member.Leave(ctx)
		synctest.Wait()
		close(hang)
		if _, err := l.Spent(t.Context(), scope, nonce); !errors.Is(err, ErrNotFound) {
			t.Errorf("the nonce of an abandoned group is spent: %v", err)
		}
	})
}
