package manage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"countersign/internal/keystore"
)

var errAct = errors.New("the act failed")

// logTo returns a log that writes to a buffer.
func logTo(b *bytes.Buffer) *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }

// TestRunReturnsTheError: a caller that waits gets the error of the act, and the log gets nothing.
func TestRunReturnsTheError(t *testing.T) {
	var log bytes.Buffer
	l := NewLock()
	for _, want := range []error{nil, errAct} {
		if err := l.Run(t.Context(), logTo(&log), "an act", func(context.Context) error { return want }); err != want {
			t.Errorf("%v, want %v", err, want)
		}
		if err := l.Acquire(t.Context()); err != nil { // Run has released the lock
			t.Fatal(err)
		}
		l.Release()
	}
	if log.Len() > 0 {
		t.Errorf("the log has %q", &log)
	}
}

// TestRunGoesToItsEnd: a caller that leaves gets ErrUnavailable at once. The act goes on under the
// lock, with the values of the caller's context, but not with its deadline and cancellation. Only a
// failure goes to the log.
func TestRunGoesToItsEnd(t *testing.T) {
	for _, result := range []error{nil, errAct} {
		synctest.Test(t, func(t *testing.T) {
			type key struct{}
			var log bytes.Buffer
			l := NewLock()
			ctx, leave := context.WithTimeout(context.WithValue(t.Context(), key{}, "value"), time.Minute)
			defer leave()
			release, ended := make(chan struct{}), false
			called := make(chan error)
			go func() {
				called <- l.Run(ctx, logTo(&log), "an act", func(ctx context.Context) error {
					<-release
					if _, deadline := ctx.Deadline(); deadline || ctx.Err() != nil || ctx.Value(key{}) != "value" {
						t.Errorf("the act's context is %v", ctx)
					}
					ended = true
					return result
				})
			}()
			synctest.Wait()
			leave()
			if err := <-called; !errors.Is(err, ErrUnavailable) || !strings.HasPrefix(err.Error(), "an act: ") {
				t.Errorf("a caller that leaves gets %v", err)
			}
			busy, giveUp := context.WithCancel(t.Context())
			giveUp()
			if err := l.Acquire(busy); !errors.Is(err, ErrUnavailable) {
				t.Errorf("another act begins before the end of the first: %v", err)
			}
			close(release)
			if err := l.Acquire(t.Context()); err != nil || !ended {
				t.Errorf("the lock is free: %v; the act has ended: %v", err, ended)
			}
			l.Release()
			if logged := strings.Contains(log.String(), errAct.Error()); logged != (result != nil) {
				t.Errorf("the act ends with %v, and the log has %q", result, &log)
			}
		})
	}
}

// counting is a log that counts its lines.
type counting struct {
	slog.Handler
	lines atomic.Int64
}

func (c *counting) Enabled(context.Context, slog.Level) bool  { return true }
func (c *counting) Handle(context.Context, slog.Record) error { c.lines.Add(1); return nil }

// TestFailureIsToldOnce: the caller leaves at the moment when the act fails. Either the caller gets
// the failure, or the log.
func TestFailureIsToldOnce(t *testing.T) {
	log := new(counting)
	l := NewLock()
	var returned int64
	const n = 5000
	for range n {
		ctx, leave := context.WithCancel(t.Context())
		begun := make(chan struct{})
		go func() {
			<-begun
			leave()
		}()
		err := l.Run(ctx, slog.New(log), "an act", func(context.Context) error { close(begun); return errAct })
		if errors.Is(err, errAct) {
			returned++
		} else if !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
		leave()
	}
	if err := l.Acquire(t.Context()); err != nil { // the last act has ended
		t.Fatal(err)
	}
	if logged := log.lines.Load(); returned+logged != n {
		t.Errorf("%d failures: %d returned, %d logged", n, returned, logged)
	}
}

// TestOneActAtATime: 100 callers wait 0 to 99 s for a lock, in this order, and each act takes 3 s.
// The acts do not overlap, although some callers leave during their act.
func TestOneActAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLock()
		under, acts := 0, 0 // guarded by the lock
		for n := range 100 {
			go func() {
				ctx, leave := context.WithTimeout(t.Context(), time.Duration(n)*time.Second)
				defer leave()
				l.Run(ctx, slog.New(slog.DiscardHandler), "an act", func(context.Context) error {
					under++
					acts++
					time.Sleep(3 * time.Second)
					if under--; under != 0 {
						t.Errorf("%d acts at once", under+1)
					}
					return nil
				})
			}()
			synctest.Wait() // the callers wait in their order
		}
		time.Sleep(time.Hour)
		if acts != 33 && acts != 34 { // the last caller leaves when the lock is released after 99 s
			t.Errorf("%d acts of 3 s in 99 s", acts)
		}
	})
}

// TestAcquireGivesUp: the error tells that the lock is taken, and why the wait ended.
func TestAcquireGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLock()
		if err := l.Acquire(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		begin := time.Now()
		err := l.Acquire(ctx)
		if took := time.Since(begin); took != time.Minute {
			t.Errorf("gave up after %v", took)
		}
		for _, want := range []error{ErrUnavailable, keystore.ErrUnavailable, context.DeadlineExceeded} {
			if !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
		}
		refused := func(context.Context) error { t.Error("an act without the lock"); return nil }
		if err := l.Run(ctx, slog.New(slog.DiscardHandler), "an act", refused); !errors.Is(err, ErrUnavailable) {
			t.Errorf("Run: %v", err)
		}
		l.Release()
		if err := l.Acquire(t.Context()); err != nil {
			t.Errorf("after Release: %v", err)
		}
	})
}

func TestCheckReason(t *testing.T) {
	for n, valid := range map[int]bool{0: false, 1: true, 500: true, 501: false, 1 << 20: false} {
		err := CheckReason(strings.Repeat("x", n))
		if (err == nil) != valid || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if err := CheckReason(strings.Repeat("é", 251)); !errors.Is(err, ErrInvalid) { // 502 bytes
		t.Errorf("251 characters of 2 bytes: %v", err)
	}
	for _, forged := range []string{"a\nstate  operational", "a\rb", "a\tb", "\x1b[2K", "a\u202eb", "a\x00"} {
		if err := CheckReason(forged); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", forged, err)
		}
	}
}

// TestErrUnavailable: code that knows package keystore only treats ErrUnavailable as a device that
// does not answer.
func TestErrUnavailable(t *testing.T) {
	for _, err := range []error{ErrUnavailable, fmt.Errorf("peer: %w", ErrUnavailable)} {
		if !errors.Is(err, ErrUnavailable) || !errors.Is(err, keystore.ErrUnavailable) {
			t.Errorf("%v is not unavailable", err)
		}
		if errors.Is(err, keystore.ErrNotFound) || errors.Is(err, ErrNotFound) {
			t.Errorf("%v is not found", err)
		}
	}
}

func TestTokens(t *testing.T) {
	tokens := Tokens{"main": struct{ keystore.Store }{}, "backup": struct{ keystore.Store }{}}
	if store, err := tokens.Get("main"); err != nil || store == nil {
		t.Errorf("%v, %v", store, err)
	}
	_, err := tokens.Get("other")
	if !errors.Is(err, ErrNotFound) || !strings.HasSuffix(err.Error(), "the configuration has backup, main") {
		t.Errorf("%v", err)
	}
}
