// Package manage has the common parts of management acts: the errors of refused acts, a lock that
// runs acts one at a time, and the rules for names and reasons.
package manage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"

	"countersign/internal/ijson"
	"countersign/internal/keystore"
)

// The errors of refused acts.
var (
	ErrExists   = errors.New("already exists")
	ErrNotFound = errors.New("does not exist")
	ErrInvalid  = errors.New("not valid")
	ErrConflict = errors.New("not possible now")
	// ErrUnavailable allows a retry by the caller. For errors.Is the error is also
	// keystore.ErrUnavailable.
	ErrUnavailable error = unavailable{}
	// ErrNotApproved refuses an act outside an approved proposal.
	ErrNotApproved = errors.New("an approved proposal is required")
)

type unavailable struct{}

func (unavailable) Error() string { return "not available now" }

func (unavailable) Is(target error) bool { return target == keystore.ErrUnavailable }

// Lock is a mutex with a timeout.
type Lock chan struct{}

// NewLock returns an unlocked Lock.
func NewLock() Lock { return make(Lock, 1) }

// Acquire locks the mutex, or returns ErrUnavailable if ctx ends first.
func (l Lock) Acquire(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: another act of management has not ended yet: %w", ErrUnavailable, ctx.Err())
	}
}

// Release unlocks the mutex.
func (l Lock) Release() { <-l }

// Run runs a management act under the lock. Once begun, the act runs to its end, because the ledger
// or the device may carry out a request without a waiting caller, and memory must then follow. If
// ctx ends first, Run returns ErrUnavailable and the act goes on. An error of the act then goes to
// the log.
func (l Lock) Run(ctx context.Context, log *slog.Logger, act string, do func(context.Context) error) error {
	if err := l.Acquire(ctx); err != nil {
		return err
	}
	done := make(chan error) // without a buffer: either the caller gets an error, or the log
	go func() {
		defer l.Release()
		err := do(context.WithoutCancel(ctx))
		select {
		case done <- err:
		case <-ctx.Done():
			if err != nil {
				log.Error("an act of management failed after its caller had left", "act", act, "err", err)
			}
		}
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s: %w: the act goes on; look later for its result", act, ErrUnavailable)
	}
}

// maxReason is the longest reason of an operator, in bytes.
const maxReason = 500

// CheckReason returns ErrInvalid unless a reason has 1 to 500 bytes, on one line. Without control
// and format characters, a reason can't forge a line of a list, of a log, or of an approver's text.
func CheckReason(reason string) error {
	if at := strings.IndexFunc(reason, func(r rune) bool { return unicode.In(r, unicode.Cc, unicode.Cf) }); at >= 0 {
		return fmt.Errorf("%w: the reason %q has a control character at byte %d: write one line of plain text",
			ErrInvalid, reason, at)
	}
	if reason == "" || len(reason) > maxReason {
		return fmt.Errorf("%w: the reason has %d bytes: give one of 1 to %d bytes for the audit log",
			ErrInvalid, len(reason), maxReason)
	}
	return nil
}

// Encode encodes a record of the ledger as JSON. Encode panics on a value without a JSON form.
func Encode(record any) []byte {
	b, err := json.Marshal(record)
	if err != nil {
		panic("manage: encode a record: " + err.Error())
	}
	return b
}

// Seconds returns a duration in whole seconds, the unit of records.
func Seconds(d time.Duration) int64 { return int64(d / time.Second) }

// Duration is the inverse of Seconds.
func Duration(seconds int64) time.Duration { return time.Duration(seconds) * time.Second }

// Tokens has the PKCS#11 tokens and TPMs of the configuration by name.
type Tokens map[string]keystore.Store

// Get returns a token by name, or ErrNotFound.
func (t Tokens) Get(name string) (keystore.Store, error) {
	if store := t[name]; store != nil {
		return store, nil
	}
	return nil, fmt.Errorf("token %q: %w: the configuration has %s", ijson.Clip(name), ErrNotFound, t.Names())
}

// Names returns the names in alphabetical order, separated by commas.
func (t Tokens) Names() string { return strings.Join(slices.Sorted(maps.Keys(t)), ", ") }
