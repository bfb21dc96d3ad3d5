package keyring

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"countersign/internal/keystore"
	"countersign/internal/manage"
)

// A ring compares the ledger's keys with each token once: at the start, or when the token comes.
// Until then the token's keys are there and unavailable, and all other keys serve. A key that is
// missing or different on its token is unusable, costs itself only, and is one of the Causes. A
// successor that is missing can't become active, see Prove.

// errNotCompared is the state of a token before its comparison.
var errNotCompared = fmt.Errorf("%w: the token's keys have not been compared with the ledger yet",
	keystore.ErrUnavailable)

// compareAll compares the keys with all tokens, all tokens at once, so that a token that hangs does
// not take the time of the others.
func (r *Ring) compareAll(ctx context.Context) {
	r.mu.Lock()
	waiting := slices.Collect(maps.Keys(r.uncompared))
	r.mu.Unlock()
	var comparing sync.WaitGroup
	for _, token := range waiting {
		if store := r.Tokens[token]; store != nil {
			comparing.Go(func() { r.compare(ctx, token, store) })
		}
	}
	comparing.Wait()
}

// keepCompared compares the keys with tokens that have come, until ctx ends.
func (r *Ring) keepCompared(ctx context.Context) {
	ticker := time.NewTicker(keepEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			r.compareAll(ctx)
		}
	}
}

// compare compares the keys of one token with the ledger, and notes the result.
func (r *Ring) compare(ctx context.Context, token string, store keystore.Store) {
	faults := map[keystore.Ref]error{}
	var first error
	for _, k := range r.All() {
		if k.Token != token || k.State == Destroyed {
			continue
		}
		fault, err := r.compareKey(ctx, k, store)
		if err != nil { // the token does not answer, or not with the PIN
			r.mu.Lock()
			r.uncompared[token] = err
			r.mu.Unlock()
			return
		}
		if fault != nil {
			if len(faults) == 0 {
				first = fault
			}
			faults[k.Ref()] = fault
		}
	}
	if len(faults) > 0 {
		r.Log.Error("keys are unusable: see countersign admin state",
			"token", token, "keys", len(faults), "first", first)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.uncompared, token)
	for ref, k := range r.keys {
		if k.Token == token {
			delete(r.lost, ref)
		}
	}
	maps.Copy(r.lost, faults)
}

// compareKey compares one key with its token. A fault is about the key. An error is about the
// token, whose other keys can't be compared either.
func (r *Ring) compareKey(ctx context.Context, k *Key, store keystore.Store) (fault, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.RequestTimeout)
	defer cancel()
	info, ref := k.Info(), k.Ref()
	there, err := store.Key(ctx, ref)
	switch {
	case errors.Is(err, keystore.ErrUnavailable), errors.Is(err, keystore.ErrAuth):
		return nil, err
	case errors.Is(err, keystore.ErrSealed): // the first use of the key compares the key
		r.Log.Warn("a key is not held against its token, which does not give it out now",
			"key", ref.String(), "token", k.Token, "err", err)
		return nil, nil
	case k.State.outOfUse() && err != nil:
		r.Log.Warn("a key that is out of use is not on its token any more",
			"key", ref.String(), "token", k.Token, "err", err)
		return nil, nil
	case errors.Is(err, keystore.ErrNotFound):
		return fmt.Errorf("key %v, which is %s, is not on token %s: is it the right token? Restore the token: %w",
			ref, k.State, k.Token, keystore.ErrNotFound), nil
	case err != nil:
		return fmt.Errorf("key %v, which is %s, on token %s: %w", ref, k.State, k.Token, err), nil
	}
	got := there.Info()
	if !bytes.Equal(got.PublicKey, info.PublicKey) || got.Algorithm != info.Algorithm || got.Tag != info.Tag {
		return fmt.Errorf("key %v on token %s is %s %x, the ledger has %s %x: is it the right token?",
			ref, k.Token, got.Algorithm, got.PublicKey, info.Algorithm, info.PublicKey), nil
	}
	return nil, nil
}

// Listening returns nil if the Noise key can answer handshakes. The error is that of the key's
// token, of class keystore.ErrUnavailable while waiting can help. manage.ErrNotFound is the error
// between a compromise and the activation of the successor.
func (r *Ring) Listening() error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	k := r.active[NoiseName]
	if k == nil {
		return fmt.Errorf("an active version of the Noise key: %w", manage.ErrNotFound)
	}
	if err := r.uncompared[k.Token]; err != nil {
		return fmt.Errorf("the Noise key's token %s: %w", k.Token, err)
	}
	return r.lost[k.Ref()]
}

// compareAgain has the tokens with faults compared again: the right token may be back.
func (r *Ring) compareAgain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for ref := range r.lost {
		if k := r.keys[ref]; k != nil {
			r.uncompared[k.Token] = errNotCompared
		}
	}
}
