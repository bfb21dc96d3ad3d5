package operators

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/requestid"
	"countersign/internal/secret"
)

// Challenge is a text that an operator signs once, as a proof of identity.
type Challenge struct {
	ID      string
	Text    string // the first line is the namespace of an SSHSIG; SHA-256 of Text is the challenge of a passkey
	Expires time.Time
	RPID    string
	// Allowed are the operator's passkeys. A challenge for a sign-in lists none, because strangers
	// may ask for one: a sign-in needs a discoverable passkey.
	Allowed []approval.Credential
}

// Challenge makes a challenge. For approval.ForSignIn the subject is empty, and the operator is the
// caller's claim: the answer does not reveal whether such an operator exists. For
// approval.ForPresence the operator is the operator of a session, and the subject is the name of a
// key.
func (r *Registry) Challenge(purpose, operator, subject string, ch Channel) (Challenge, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	presence := purpose == approval.ForPresence
	switch {
	case len(r.roster.people) == 0:
		return Challenge{}, ErrUninitialised
	case !presence && purpose != approval.ForSignIn, !validName(operator), presence != validName(subject),
		ch.Kind != Unix && ch.Kind != HTTPS:
		return Challenge{}, fmt.Errorf("challenge: %w: it is for a sign-in or a presence, of an operator by name",
			ErrInvalid)
	}
	c := approval.Challenge{
		Purpose: purpose, Appliance: r.Appliance, Operator: operator, Key: subject, Channel: ch.Kind,
		Expires: time.Now().Add(approval.ChallengeLife).UTC().Truncate(time.Second), Nonce: randomHex(),
	}
	out := Challenge{ID: r.challengeID(c.Text(), ch), Text: c.Text(), Expires: c.Expires, RPID: r.RPID}
	if presence {
		p, err := r.roster.operator(operator)
		if err != nil {
			return Challenge{}, err
		}
		out.Allowed = passkeys(p)
	}
	return out, nil
}

// Accepted returns the ids among some that are of SSH keys of an operator, in the order of the
// Registry. The operator's tool asks before it signs, as an SSH client does: it names the keys that
// it has, and learns which of them the appliance accepts. A stranger learns whether a known public
// key is one of the operator's, and neither the other keys nor whether such an operator exists.
func (r *Registry) Accepted(operator string, some []string) (accepted []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.roster.people[operator].Credentials {
		if c.Kind == approval.SSH && slices.Contains(some, c.ID) {
			accepted = append(accepted, c.ID)
		}
	}
	return accepted
}

// challengeID returns the id of a challenge: its text, after an HMAC-SHA-256 of 32 bytes over the
// text and the caller's channel. The Registry stores only the nonces of used challenges, so that a
// stranger who asks for many challenges evicts no other challenge.
func (r *Registry) challengeID(text string, ch Channel) string {
	return base64.RawURLEncoding.EncodeToString(append(r.mac(text, ch), text...))
}

func (r *Registry) mac(text string, ch Channel) []byte {
	m := hmac.New(sha256.New, r.macKey.Expose())
	fmt.Fprintf(m, "%s\n%d\n%s", ch.Kind, ch.UID, text)
	return m.Sum(nil)
}

// parseChallengeID authenticates and parses an id for this caller and this purpose. The challenge
// may be used or expired.
func (r *Registry) parseChallengeID(id, purpose string, ch Channel) (c approval.Challenge, ok bool) {
	b, err := base64.RawURLEncoding.DecodeString(id)
	if err != nil || len(b) < sha256.Size || !hmac.Equal(b[:sha256.Size], r.mac(string(b[sha256.Size:]), ch)) {
		return c, false
	}
	parsed, err := approval.ParseChallenge(string(b[sha256.Size:]))
	if err != nil || parsed.Purpose != purpose {
		return c, false
	}
	return *parsed, true
}

func passkeys(p person) (all []approval.Credential) {
	for _, c := range p.Credentials {
		if c.Kind == approval.Passkey {
			all = append(all, c)
		}
	}
	return all
}

// PasskeyOptions returns the options for a browser that makes a passkey for an operator: see
// approval.PasskeyOptions. The operator who is signed in gets no second passkey on an authenticator
// that has one. Anyone else learns nothing of the operator's passkeys, nor whether there is such an
// operator.
func (r *Registry) PasskeyOptions(challenge []byte, operator string, s *Session) (json.RawMessage, error) {
	if !validName(operator) {
		return nil, fmt.Errorf("passkey: %w: it is for an operator by name, which the browser shows", ErrInvalid)
	}
	var have []approval.Credential
	if s != nil && s.Operator == operator {
		r.mu.Lock()
		have = passkeys(r.roster.people[operator])
		r.mu.Unlock()
	}
	return approval.PasskeyOptions(challenge, r.RPID, r.Appliance, operator, have), nil
}

// resolveCredential replaces a passkey's own id in a proof by the id of the credential. A page
// knows only the passkey's own id if the browser has offered discoverable passkeys.
func (p person) resolveCredential(proof approval.Proof) approval.Proof {
	for _, c := range passkeys(p) {
		if proof.Assertion != nil && proof.Credential == c.CredentialID {
			proof.Credential = c.ID
		}
	}
	return proof
}

// attempt is an attempt to prove something: a sign-in, a presence or an approval. subject is what
// else the proof is for: the name of a key, or a proposal ("proposal/7").
type attempt struct {
	Channel
	purpose, operator, subject string
}

// verifyChallenge verifies the proof of a challenge for an attempt, and uses the challenge up.
// verifyChallenge resolves the id of the credential in the proof, and returns the operator's record
// in memory and the signature counter. Each refusal goes to recordRefusal.
//
// A signature can't be guessed. The limit on failures only says that something is wrong: a valid
// proof is accepted, whatever failures others have caused in the operator's name.
func (r *Registry) verifyChallenge(
	ctx context.Context, of attempt, id string, p *approval.Proof,
) (who person, count uint32, err error) {
	c, genuine := r.parseChallengeID(id, of.purpose, of.Channel)
	if of.purpose == approval.ForSignIn {
		of.operator = c.Operator // whoever signs in claims to be an operator
	}
	r.mu.Lock()
	who = r.roster.people[of.operator]
	r.mu.Unlock()
	*p = who.resolveCredential(*p)
	switch {
	case !genuine: // below
	case c.Operator != of.operator || c.Key != of.subject:
		err = fmt.Errorf("%w: the challenge is for operator %s and key %s", approval.ErrNotProven, c.Operator, c.Key)
	default:
		var v approval.Verified
		v, err = r.verifyProof(who, of.purpose, c.Text(), *p)
		count = v.SignCount
	}
	r.mu.Lock()
	if now := time.Now(); !genuine || r.used.contains(c.Nonce, now) || !now.Before(c.Expires) {
		err = fmt.Errorf("%w: the challenge is unknown, used or expired", approval.ErrNotProven)
	}
	if err != nil {
		if wait := r.failures.take(failureKey{of.purpose, of.Kind, of.UID, of.operator}); wait > 0 {
			err = &Limited{wait}
		}
	}
	if genuine && !errors.Is(err, ErrLimited) {
		r.used[c.Nonce] = c.Expires // the challenge is used up
	}
	r.mu.Unlock()
	if err != nil {
		r.recordRefusal(ctx, of, *p, err)
		return person{}, 0, err
	}
	return who, count, nil
}

// usedNonces are the nonces of used challenges, with the time of their expiry. The size is bounded
// by the valid proofs and the permitted failures within approval.ChallengeLife.
type usedNonces map[string]time.Time

func (u usedNonces) contains(nonce string, now time.Time) bool {
	maps.DeleteFunc(u, func(_ string, expires time.Time) bool { return !now.Before(expires) })
	_, used := u[nonce]
	return used
}

// verifyProof verifies a proof over a text by one of the operator's credentials.
func (r *Registry) verifyProof(who person, namespace, text string, p approval.Proof) (approval.Verified, error) {
	c, exists := who.Credential(p.Credential)
	if !exists {
		return approval.Verified{}, fmt.Errorf("%w: the operator has no such credential", approval.ErrNotProven)
	}
	v, err := c.Verify(namespace, text, p)
	if err != nil {
		return v, err
	}
	// A page on another port of this machine must not use the passkey.
	if p.Assertion != nil && r.Origin != "" && v.Origin != r.Origin {
		return v, fmt.Errorf("%w: the passkey was asked by a page of another origin", approval.ErrNotProven)
	}
	return v, nil
}

// recordRefusal writes the refusal of a proof to the daemon's log and to the audit log. Refusals
// beyond the pace of events are counted for RecordCount.
func (r *Registry) recordRefusal(ctx context.Context, of attempt, p approval.Proof, cause error) {
	r.Log.Warn("a proof was refused", "operator", of.operator, "purpose", of.purpose, "for", of.subject,
		"channel", of.Channel.String(), requestid.Attr(of.Request), "cause", cause)
	prover := of.operator
	if of.purpose == approval.ForSignIn {
		prover = "" // nobody is signed in: all strangers together have one pace
	}
	r.mu.Lock()
	r.refused[of.purpose]++
	written := r.refusals.take(prover)
	r.mu.Unlock()
	if !written {
		return
	}
	credential := p.Credential
	if b, err := hex.DecodeString(credential); err != nil || len(b) != 16 {
		credential = "" // no text of a stranger goes into the audit log
	}
	outcome := "not_proven"
	if errors.Is(cause, ErrLimited) {
		outcome = "rate_limited"
	}
	e := audit.NewSignInRefused(of.operator, outcome, audit.Refusal{
		Purpose: of.purpose, Subject: of.subject, Credential: credential, Channel: of.Channel.String(),
		Cause: cause.Error(), Request: of.Request,
	})
	if _, err := r.ledger.Append(ctx, ledger.EventOf(e)); err != nil {
		r.Log.Error("the refusal of a proof was not written down", requestid.Attr(of.Request), "err", err)
	}
}

// refusals is the pace of events for refused proofs. Each operator who is signed in has a leaky
// bucket, and all strangers have one together, so that strangers hide no refusal of an operator. No
// door fills the disk: each has at most 7,200 events a day after its burst.
type refusals struct {
	pace  map[string]*leakyBucket // by the operator who is signed in; "": nobody
	count audit.Span              // of the refusals without an event
}

const eventsBurst, eventsEvery = 100, 12 * time.Second

// take reports whether a refusal may be an event, and otherwise counts the refusal.
func (f *refusals) take(prover string) bool {
	// Empty buckets go: the map has at most as many buckets as recent refusals.
	maps.DeleteFunc(f.pace, func(_ string, b *leakyBucket) bool { b.leak(eventsEvery); return b.level == 0 })
	if f.pace[prover] == nil {
		f.pace[prover] = new(leakyBucket)
	}
	if f.pace[prover].take(eventsBurst, eventsEvery) == 0 {
		return true
	}
	f.count.Until = time.Now()
	if f.count.Count == 0 {
		f.count.Since = f.count.Until
	}
	f.count.Count++
	return false
}

// RecordCount writes one event with the number of refused proofs that have no event of their own,
// if there are any. The daemon calls RecordCount once a minute.
func (r *Registry) RecordCount(ctx context.Context) error {
	r.mu.Lock()
	span := r.refusals.count
	r.mu.Unlock()
	if span.Count == 0 {
		return nil
	}
	e := audit.NewCount(audit.SignInRefused, "sign in", "", "not_proven", span)
	if _, err := r.ledger.Append(ctx, ledger.EventOf(e)); err != nil {
		return fmt.Errorf("the number of refused proofs is not written down: %w", err)
	}
	r.mu.Lock()
	r.refusals.count.Count -= span.Count // some may have been refused meanwhile
	r.refusals.count.Since = span.Until
	r.mu.Unlock()
	return nil
}

// SignIn begins a session for the operator of a challenge. SignIn returns the only copy of the
// token.
func (r *Registry) SignIn(
	ctx context.Context, ch Channel, challenge string, p approval.Proof,
) (s Session, token secret.Bytes, err error) {
	of := attempt{Channel: ch, purpose: approval.ForSignIn}
	seen, count, err := r.verifyChallenge(ctx, of, challenge, &p)
	if errors.Is(err, approval.ErrNotProven) {
		err = approval.ErrNotProven // a stranger learns no cause
	}
	if err != nil {
		return Session{}, token, fmt.Errorf("sign-in: %w", err)
	}
	of.operator = seen.Name
	begun, token := newSession(ch, p.Credential)
	err = r.write(ctx, ch.Request, "sign-in", func(ctx context.Context) error {
		var who person
		if err := r.ledger.Update(ctx, func(tx *ledger.Tx) (err error) {
			if who, err = r.recheckCredential(tx, seen, p.Credential, count); err != nil {
				return err
			}
			e := audit.NewOperatorSignedIn(audit.Operator(who.Name).In(ch.Request), begun.ID, p.Credential,
				joinRoles(who.Roles), ch.String())
			return tx.Append(ledger.EventOf(e))
		}); err != nil {
			return err
		}
		// The event is on disk. The lock writing keeps the operator unchanged until the session
		// exists: a later change ends the session.
		begun.Operator, begun.Roles = who.Name, slices.Clone(who.Roles)
		r.addSession(begun, token)
		return nil
	})
	if errors.Is(err, approval.ErrNotProven) {
		r.recordRefusal(ctx, of, p, err)
		err = fmt.Errorf("sign-in: %w", approval.ErrNotProven)
	}
	if err != nil {
		return Session{}, token, err
	}
	return begun, token, nil
}

// recheckCredential returns the operator's record in the ledger, and writes the signature counter.
// The credential must be the same as in the record in memory, by which the proof was verified; the
// counter must be higher than the one in the ledger.
func (r *Registry) recheckCredential(tx *ledger.Tx, seen person, credential string, count uint32) (person, error) {
	value := tx.Get(ledger.Operators, seen.Name)
	if len(value) == 0 {
		return person{}, fmt.Errorf("%w: the operator was removed", approval.ErrNotProven)
	}
	who, err := decodePerson(seen.Name, value)
	if err != nil {
		return person{}, err
	}
	before, _ := seen.Credential(credential)
	if now, exists := who.Credential(credential); !exists || now != before {
		return person{}, fmt.Errorf("%w: the credential was removed", approval.ErrNotProven)
	}
	changed, err := who.advanceCounter(credential, count)
	if err != nil || !changed {
		return who, err
	}
	return who, tx.Put(ledger.Operators, who.Name, manage.Encode(who))
}

// VerifyPresence verifies a fresh proof of a session's operator, over a challenge for
// approval.ForPresence with the same subject. A proof is valid once.
func (r *Registry) VerifyPresence(ctx context.Context, s Session, challenge, subject string, p approval.Proof) error {
	if _, err := r.requireSession(s); err != nil {
		return err
	}
	of := attempt{s.Channel, approval.ForPresence, s.Operator, subject}
	seen, count, err := r.verifyChallenge(ctx, of, challenge, &p)
	if err != nil {
		return fmt.Errorf("presence: %w", err)
	}
	err = r.write(ctx, s.Channel.Request, "presence", func(ctx context.Context) error {
		return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			_, err := r.recheckCredential(tx, seen, p.Credential, count)
			return err
		})
	})
	if errors.Is(err, approval.ErrNotProven) {
		r.recordRefusal(ctx, of, p, err)
	}
	return err
}

// randomHex returns 32 random hex digits.
func randomHex() string {
	b := make([]byte, 16)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// Limits of failed proofs: a burst, and the time after which a leaky bucket has room for one more.
const (
	failuresBurst, failuresEvery       = 5, 12 * time.Second // for one failureKey
	allFailuresBurst, allFailuresEvery = 50, time.Second     // for all callers together
)

// failures limits the failed proofs. Above the limit the answer is ErrLimited, not ErrNotProven.
type failures struct {
	each map[failureKey]*leakyBucket
	all  leakyBucket
}

// failureKey identifies the caller of a failed proof, as far as possible.
type failureKey struct {
	purpose  string
	kind     string
	uid      uint32
	operator string
}

// take counts a failure, or returns the time to wait. A failure above one of the two limits counts
// for neither limit.
func (f *failures) take(key failureKey) time.Duration {
	// Empty buckets go, so that the map has at most as many buckets as recent failures.
	maps.DeleteFunc(f.each, func(_ failureKey, b *leakyBucket) bool { b.leak(failuresEvery); return b.level == 0 })
	b := f.each[key]
	if b == nil {
		b = new(leakyBucket)
		f.each[key] = b
	}
	wait := b.take(failuresBurst, failuresEvery)
	if wait > 0 {
		return wait
	}
	if wait = f.all.take(allFailuresBurst, allFailuresEvery); wait > 0 {
		b.level = max(0, b.level-1)
	}
	return wait
}

// leakyBucket is a leaky bucket. Unlike a rate.Limiter, a leakyBucket can take a count back, and
// shows when it is empty.
type leakyBucket struct {
	level float64
	at    time.Time // of the level
}

// take adds 1 to the level, or returns the time to wait, in whole seconds.
func (b *leakyBucket) take(capacity float64, every time.Duration) time.Duration {
	b.leak(every)
	if over := b.level + 1 - capacity; over > 0 {
		return (time.Duration(over*float64(every)) + time.Second - 1).Truncate(time.Second)
	}
	b.level++
	return 0
}

func (b *leakyBucket) leak(every time.Duration) {
	now := time.Now()
	b.level = max(0, b.level-float64(now.Sub(b.at))/float64(every))
	b.at = now
}
