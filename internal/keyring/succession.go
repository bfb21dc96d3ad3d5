package keyring

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/transcript"
	"countersign/wire"
)

// The appliance signs two types of documents of its own: steps from a version to the next version,
// and authorizations of Noise keys.

func (n newVersion) digest() [32]byte { return sha256.Sum256(n.info.PublicKey) }

func base64url(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// endorse has a version sign the step to the next version. The step names the digest of the version
// after the next. A recovery successor signs the step to itself.
func (r *Ring) endorse(
	ctx context.Context, who audit.Actor, old, next *Key, after [32]byte, at time.Time,
) (*wire.Succession, error) {
	fields := map[string]any{
		"key": old.Name, "version": next.Version, "time": at.Unix(), "next": base64url(after[:]),
		"old_public_key": base64url(old.Info().PublicKey), "new_public_key": base64url(next.Info().PublicKey),
	}
	signer := old
	if next.Recovery {
		signer, fields["recovered"] = next, true
	} else if recovery, ok := r.RecoveryCommitment(old.Name); ok {
		fields["recovery"] = base64url(recovery[:])
	}
	payload, err := json.Marshal(fields)
	if err != nil {
		return nil, err
	}
	doc, signature, err := r.signOwn(ctx, who, signer, successionType, payload)
	if err != nil {
		return nil, err
	}
	return &wire.Succession{
		Payload: doc.Payload, Nonce: doc.Nonce, Timestamp: doc.Timestamp, ExpiresAt: doc.ExpiresAt,
		Signature: signature,
	}, nil
}

const (
	successionType    = "key-succession-v1"
	authorizationType = "paykit-noise-key-authorization-v1"
)

// authorize has the identity's key sign the authorization of a Noise key.
func (r *Ring) authorize(ctx context.Context, who audit.Actor, noise keystore.Info) (*wire.Authorization, error) {
	identity, err := r.Signing(r.Identity)
	if err != nil {
		return nil, fmt.Errorf("the identity that authorises the Noise key: %w: "+
			"make it, or take noise_identity out of the configuration", err)
	}
	owner := base64url(identity.Info().PublicKey)
	last, err := r.Ledger.LastNumber(GenerationSeries(authorizationType, r.Identity))
	if err != nil {
		return nil, err
	}
	// The generation must be higher than the last one, whatever the clock does.
	generation := max(time.Now().Unix(), int64(min(last, math.MaxInt64-1))+1)
	payload, err := json.Marshal(map[string]any{
		"owner": owner, "noise_public_key": owner, "noise_static_public_key": base64url(noise.PublicKey),
		"key_generation": generation,
	})
	if err != nil {
		return nil, err
	}
	_, signature, err := r.signOwn(ctx, who, identity, authorizationType, payload)
	if err != nil {
		return nil, err
	}
	return &wire.Authorization{Payload: payload, Signature: signature}, nil
}

// GenerationSeries names the monotonic series of generations of a document type that a key signs:
// each generation must be higher than all generations before.
func GenerationSeries(kind, key string) string { return "generation\x00" + kind + "\x00" + key }

// DocumentOf is the part of a document that an event keeps.
func DocumentOf(doc *transcript.Document) audit.Document {
	return audit.Document{Transcript: doc.Type, Digest: doc.Digest(), Nonce: doc.Nonce, ExpiresAt: doc.ExpiresAt}
}

// signOwn makes, admits and signs a document of the appliance's own. The admission is on disk
// before the signature, as for peers. Policy has no rules for the appliance itself.
func (r *Ring) signOwn(
	ctx context.Context, who audit.Actor, k *Key, kind string, payload []byte,
) (*transcript.Document, []byte, error) {
	now := time.Now().Unix()
	request := transcript.Request{Type: kind, Payload: payload, Timestamp: now, ExpiresAt: now + 3600}
	rand.Read(request.Nonce[:])
	doc, err := transcript.Parse(request)
	if err != nil {
		return nil, nil, err
	}
	if err := doc.CheckSigner(k.Info().PublicKey); err != nil {
		return nil, nil, err
	}
	key := k.Ref().String()
	wait, cancel := context.WithTimeout(ctx, r.RequestTimeout)
	defer cancel()
	admission := ledger.Admission{
		Scope: ledger.KeyScope(k.Name), Nonce: doc.Nonce, Digest: doc.Digest(), KeyVersion: k.Version,
		Timestamp: doc.Timestamp, ExpiresAt: doc.ExpiresAt,
	}
	if doc.Generation != nil {
		admission.Monotonic = &ledger.Monotonic{Series: GenerationSeries(doc.Type, k.Name), Value: *doc.Generation}
		// Without Decide, the ledger ignores Monotonic.
		admission.Decide = func([]ledger.Used) ([]byte, error) { return nil, nil }
	}
	got, err := r.Ledger.Admit(wait, admission, func(v ledger.Verdict) []byte {
		e := audit.NewAdmission(who, key, DocumentOf(doc))
		if v == ledger.Denied {
			e = e.AsRejected(wire.CodeDenied)
		}
		return e.Encode(time.Now())
	})
	switch {
	case err != nil:
		return nil, nil, err
	case got.Verdict == ledger.Denied:
		return nil, nil, got.Denial
	case got.Verdict != ledger.Fresh:
		return nil, nil, fmt.Errorf("%w: the nonce of the appliance's own document is spent", keystore.ErrUnavailable)
	}
	wait, use := r.Gate.Use(wait, func() error {
		// Even a compromised version signs the step: the log committed to the successor long
		// before.
		if err := r.Gate.Err(); err != nil || kind == successionType {
			return err
		}
		return k.inUse()
	})
	defer use.End()
	verifies := func(signature []byte) bool { return k.Verify(doc.Message, signature) == nil }
	signature, err := k.sign(wait, Own, nil, doc.Input(), verifies, use.Err)
	k.usage.count.Add(1)
	failed := ""
	if err != nil {
		failed, signature = wire.CodeUnavailable, nil
	}
	end := ledger.EventOf(audit.NewOutcome(who, key, kind, got.Event, failed))
	return doc, signature, errors.Join(err, r.Ledger.Settle(context.WithoutCancel(ctx), got, signature, end, nil))
}

// AuthorizeNoise has the identity sign a new authorization of the active Noise key. Keep signs the
// first authorization, and one after each rotation of the identity.
func (r *Ring) AuthorizeNoise(ctx context.Context, who audit.Actor) error {
	if r.Identity == "" {
		return fmt.Errorf("noise key: %w: the configuration has no noise_identity", manage.ErrConflict)
	}
	return r.run(ctx, who, "authorising the Noise key", func(ctx context.Context) error {
		return r.authorizeActive(ctx, who)
	})
}

func (r *Ring) authorizeActive(ctx context.Context, who audit.Actor) error {
	k, err := r.Noise()
	if err != nil {
		return err
	}
	authorization, err := r.authorize(ctx, who, k.Info())
	if err != nil {
		return err
	}
	change := edit{k.Ref(), func(rec *record) { rec.Authorization = authorization }}
	e := audit.NewNoiseKeyAuthorized(who, k.Ref().String(), r.Identity)
	if err := r.change(ctx, who, []edit{change}, e); err != nil {
		return err
	}
	r.notify()
	return nil
}

// unauthorized reports that a Noise key has no authorization by the active version of the
// configured identity, or an older one than the next version: then the announcement of the next
// version was called off, and peers expect a newer one.
func (r *Ring) unauthorized(noise *Key) bool {
	identity, err := r.Signing(r.Identity)
	if r.Identity == "" || err != nil {
		return false // an operator must make the identity first
	}
	owner, generation := authorizationOf(noise)
	next := r.Version(noise.Name, noise.Version+1)
	if next != nil && !next.Announced() {
		if _, later := authorizationOf(next); later >= generation {
			return true
		}
	}
	return owner != base64url(identity.Info().PublicKey)
}

// authorizationOf returns the owner and the generation of a Noise key's authorization, or zero
// values.
func authorizationOf(noise *Key) (owner string, generation int64) {
	var said struct {
		Owner      string `json:"owner"`
		Generation int64  `json:"key_generation"`
	}
	if noise.Authorization == nil || json.Unmarshal(noise.Authorization.Payload, &said) != nil {
		return "", 0
	}
	return said.Owner, said.Generation
}
