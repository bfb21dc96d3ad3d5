package keyring

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

// part is a part of the keys of a token: the versions of the Noise key, or all others. The Noise
// key is compared first, so that peers can connect however many other keys the token has.
type part struct {
	token string
	noise bool
}

func partOf(k *Key) part { return part{k.Token, k.Name == NoiseName} }

// compareAll compares the keys with all tokens, all tokens at once, so that a token that hangs does
// not take the time of the others.
func (r *Ring) compareAll(ctx context.Context) {
	var comparing sync.WaitGroup
	for token, store := range r.Tokens {
		comparing.Go(func() { r.compareToken(ctx, token, store) })
	}
	comparing.Wait()
}

// compareToken compares the parts of a token that are not compared yet.
func (r *Ring) compareToken(ctx context.Context, token string, store keystore.Store) {
	var all []error
	for _, p := range []part{{token, true}, {token, false}} {
		r.mu.Lock()
		waits := r.uncompared[p] != nil
		r.mu.Unlock()
		if !waits {
			continue
		}
		faults, compared := r.compare(ctx, p, store)
		all = append(all, faults...)
		if !compared {
			break
		}
	}
	if len(all) > 0 {
		r.Log.Error("keys are unusable: see countersign admin state",
			"token", token, "keys", len(all), "first", all[0])
	}
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

// compare compares a part of the keys with their token, notes the result, and returns the keys'
// faults. A token that does not answer, or not with the PIN, has no result.
func (r *Ring) compare(ctx context.Context, p part, store keystore.Store) (all []error, compared bool) {
	var keys []*Key
	var infos []keystore.Info
	for _, k := range r.All() {
		if partOf(k) == p && k.State != Destroyed {
			keys, infos = append(keys, k), append(infos, k.Info())
		}
	}
	lost := map[keystore.Ref]error{}
	for len(infos) > 0 {
		faults, err := r.compareSome(ctx, store, infos)
		if err != nil {
			r.mu.Lock()
			r.uncompared[p] = err
			r.mu.Unlock()
			return nil, false
		}
		for i, fault := range faults {
			if fault = r.faultOf(keys[i], fault); fault != nil {
				all, lost[keys[i].Ref()] = append(all, fault), fault
			}
		}
		keys, infos = keys[len(faults):], infos[len(faults):]
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.uncompared, p)
	for ref, k := range r.keys {
		if partOf(k) == p {
			delete(r.lost, ref)
		}
	}
	maps.Copy(r.lost, lost)
	return all, true
}

// compareSome compares the first keys of a list.
func (r *Ring) compareSome(ctx context.Context, store keystore.Store, infos []keystore.Info) ([]error, error) {
	ctx, cancel := context.WithTimeout(ctx, r.RequestTimeout)
	defer cancel()
	return store.Compare(ctx, infos)
}

// faultOf is the fault of a key for an operator, from the result of its comparison. A missing key
// that is out of use is no fault.
func (r *Ring) faultOf(k *Key, err error) error {
	switch {
	case err == nil:
	case errors.Is(err, keystore.ErrSealed): // the first use of the key compares the key
		r.Log.Warn("a key is not held against its token, which does not give it out now",
			"key", k.Ref().String(), "token", k.Token, "err", err)
	case k.State.outOfUse():
		r.Log.Warn("a key that is out of use is not on its token any more",
			"key", k.Ref().String(), "token", k.Token, "err", err)
	case errors.Is(err, keystore.ErrNotFound):
		return fmt.Errorf("key %v, which is %s, is not on token %s: is it the right token? Restore the token: %w",
			k.Ref(), k.State, k.Token, keystore.ErrNotFound)
	default:
		return fmt.Errorf("key %v, which is %s, on token %s: is it the right token? %w", k.Ref(), k.State, k.Token, err)
	}
	return nil
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
	if err := r.uncompared[partOf(k)]; err != nil {
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
			r.uncompared[partOf(k)] = errNotCompared
		}
	}
}
