// Package manage has what all acts of management share: the errors that tell why an act was refused,
// the lock that keeps two acts apart, and the rules of names and reasons.
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

	"countersign/internal/ijson"
	"countersign/internal/keystore"
)

// The reasons for which an act of management is refused.
var (
	ErrExists   = errors.New("it exists already")
	ErrNotFound = errors.New("it does not exist")
	ErrInvalid  = errors.New("it is not valid")
	ErrConflict = errors.New("it can't be done now")
	// ErrUnavailable: the caller may try again. It is keystore.ErrUnavailable to errors.Is.
	ErrUnavailable error = unavailable{}
	// ErrNotApproved refuses an act that only an approved proposal may do.
	ErrNotApproved = errors.New("it needs an approved proposal")
)

type unavailable struct{}

func (unavailable) Error() string { return "not available now" }

func (unavailable) Is(target error) bool { return target == keystore.ErrUnavailable }

// Lock is a mutex that a context can give up waiting for.
type Lock chan struct{}

// NewLock returns a lock that is free.
func NewLock() Lock { return make(Lock, 1) }

// Acquire takes the lock, or returns ErrUnavailable when ctx ends first.
func (l Lock) Acquire(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: another act of management is not done yet: %w", ErrUnavailable, ctx.Err())
	}
}

// Release gives the lock back.
func (l Lock) Release() { <-l }

// Run runs an act under the lock to its end, whether the caller waits or not: a request that the
// ledger or the device has taken may be carried out, and memory has to say the same. When ctx ends
// first, the act goes on, and the caller is told so; a failure goes to the log then.
func (l Lock) Run(ctx context.Context, log *slog.Logger, what string, do func(context.Context) error) error {
	if err := l.Acquire(ctx); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		defer l.Release()
		err := do(context.WithoutCancel(ctx))
		if err != nil && ctx.Err() != nil {
			log.Error("an act of management whose caller has left failed", "act", what, "err", err)
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s: %w: it goes on; look later how it ended", what, ErrUnavailable)
	}
}

// CheckReason refuses a reason that is not 1 to 500 bytes.
func CheckReason(reason string) error {
	if reason == "" || len(reason) > 500 {
		return fmt.Errorf("%w: a reason of 1 to 500 bytes must be given; it is written down", ErrInvalid)
	}
	return nil
}

// Encode gives a record of the ledger as JSON. Records are structs that always are JSON.
func Encode(record any) []byte {
	b, err := json.Marshal(record)
	if err != nil {
		panic("manage: a record that is not JSON: " + err.Error())
	}
	return b
}

// Seconds and Duration convert the times of records, which are whole seconds.
func Seconds(d time.Duration) int64 { return int64(d / time.Second) }

func Duration(seconds int64) time.Duration { return time.Duration(seconds) * time.Second }

// Tokens are the PKCS#11 tokens and TPMs of the configuration, by name.
type Tokens map[string]keystore.Store

// Get returns the token of a name, or ErrNotFound.
func (t Tokens) Get(name string) (keystore.Store, error) {
	if store := t[name]; store != nil {
		return store, nil
	}
	return nil, fmt.Errorf("token %q: %w: the configuration has %s", ijson.Clip(name), ErrNotFound, t.Names())
}

// Names lists the names in alphabetical order, with commas.
func (t Tokens) Names() string { return strings.Join(slices.Sorted(maps.Keys(t)), ", ") }
