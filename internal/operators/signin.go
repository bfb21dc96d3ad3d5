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
	"strconv"
	"strings"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

const challengeLife = 2 * time.Minute

// Challenge is what has to be signed, once, to prove to be an operator.
type Challenge struct {
	ID      string
	Text    string // its first line is the namespace of an SSHSIG; the challenge of a passkey is SHA-256 of it
	Expires time.Time
	RPID    string
	// Allowed are the passkeys that may answer. For a sign-in there are none, since a stranger may ask for it: that is with a discoverable
	// passkey.
	Allowed []approval.Credential
}

// challenge is what its id says. The desk keeps none, only which were used: a stranger who asks for many drives out nobody's.
type challenge struct {
	purpose, operator, subject, nonce string
	expires                           time.Time
}

// Challenge makes one. For approval.ForSignIn there is no subject, and the operator is who the caller says to be: nobody is told
// whether there is such an operator. For approval.ForPresence it is the operator of a session, and the subject a key's name.
func (d *Registry) Challenge(purpose, operator, subject string, ch Channel) (Challenge, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	presence := purpose == approval.ForPresence
	switch {
	case len(d.roster.people) == 0:
		return Challenge{}, ErrUninitialised
	case !presence && purpose != approval.ForSignIn, !nameable(operator), presence != nameable(subject), ch.Kind != Unix && ch.Kind != HTTPS:
		return Challenge{}, fmt.Errorf("challenge: %w: it is for a sign-in or a presence, of an operator by name", ErrInvalid)
	}
	c := challenge{purpose, operator, subject, random(), time.Now().Add(challengeLife)}
	out := Challenge{ID: d.seal(c, ch), Text: d.text(c, ch), Expires: c.expires, RPID: d.RPID}
	if presence {
		p, err := d.roster.get(operator)
		if err != nil {
			return Challenge{}, err
		}
		out.Allowed = passkeys(p)
	}
	return out, nil
}

func (d *Registry) text(c challenge, ch Channel) string {
	lines := []string{c.purpose, "appliance: " + d.Appliance, "operator: " + c.operator}
	if c.subject != "" {
		lines = append(lines, "key: "+c.subject)
	}
	return strings.Join(append(lines, "channel: "+ch.Kind, "expires at: "+c.expires.UTC().Format(time.RFC3339), "nonce: "+c.nonce), "\n") + "\n"
}

// seal makes the id of a challenge: what it is, in lines, under a MAC that also covers whom it is for.
func (d *Registry) seal(c challenge, ch Channel) string {
	said := strings.Join([]string{c.purpose, c.operator, c.subject, c.nonce, strconv.FormatInt(c.expires.UnixNano(), 10)}, "\n")
	return base64.RawURLEncoding.EncodeToString(append(d.mac(said, ch), said...))
}

func (d *Registry) mac(said string, ch Channel) []byte {
	m := hmac.New(sha256.New, d.secret[:])
	fmt.Fprintf(m, "%s\n%d\n%s", ch.Kind, ch.UID, said)
	return m.Sum(nil)
}

// unseal reads an id that seal has made for this caller and this purpose; the challenge may be used or expired.
func (d *Registry) unseal(id, purpose string, ch Channel) (c challenge, ok bool) {
	b, err := base64.RawURLEncoding.DecodeString(id)
	if err != nil || len(b) < sha256.Size || !hmac.Equal(b[:sha256.Size], d.mac(string(b[sha256.Size:]), ch)) {
		return challenge{}, false
	}
	said := strings.Split(string(b[sha256.Size:]), "\n")
	expires, err := strconv.ParseInt(said[4], 10, 64)
	return challenge{said[0], said[1], said[2], said[3], time.Unix(0, expires)}, err == nil && said[0] == purpose
}

func passkeys(p person) (all []approval.Credential) {
	for _, c := range p.Credentials {
		if c.Kind == approval.Passkey {
			all = append(all, c)
		}
	}
	return all
}

// named has a proof name a credential by the id that it has here. A page whose browser has chosen among the passkeys that it found knows
// the passkey's own id and nothing else of it.
func (p person) named(proof approval.Proof) approval.Proof {
	for _, c := range passkeys(p) {
		if proof.Assertion != nil && proof.Credential == c.CredentialID {
			proof.Credential = c.ID
		}
	}
	return proof
}

// prove uses a challenge up, and has the proof name the credential by its id. It returns who has signed it, as memory has him, and the
// number of the signature. The refusal is an event and says nothing about the reason to a stranger.
//
// Nobody guesses a signature: the limit on failures is for the sake of the log, and who can prove to be an operator is never kept out by
// what others have failed in his name.
func (d *Registry) prove(ctx context.Context, ch Channel, id, purpose string, p *approval.Proof) (c challenge, who person, count uint32, err error) {
	c, genuine := d.unseal(id, purpose, ch)
	d.mu.Lock()
	who = d.roster.people[c.operator]
	d.mu.Unlock()
	*p = who.named(*p)
	if genuine {
		count, err = d.verify(who, purpose, d.text(c, ch), *p)
	}
	d.mu.Lock()
	if now := time.Now(); !genuine || d.used.has(c.nonce, now) || !now.Before(c.expires) {
		err = fmt.Errorf("%w: the challenge is unknown, used or expired", approval.ErrNotProven)
	}
	if err != nil {
		if wait := d.failures.take(failureKey{purpose, ch.Kind, ch.UID, c.operator}); wait > 0 {
			err = &Limited{wait}
		}
	}
	if genuine && !errors.Is(err, ErrLimited) {
		d.used[c.nonce] = c.expires // from here on nobody can use it
	}
	d.mu.Unlock()
	if err != nil {
		d.refused(ctx, ch, c.operator, purpose, *p, err)
		if !errors.Is(err, ErrLimited) {
			err = approval.ErrNotProven
		}
		return c, person{}, 0, err
	}
	return c, who, count, nil
}

// used are the nonces of challenges that were used and have not expired: as many as proofs hold or may fail in that time.
type used map[string]time.Time

func (u used) has(nonce string, now time.Time) bool {
	maps.DeleteFunc(u, func(_ string, expires time.Time) bool { return !now.Before(expires) })
	_, has := u[nonce]
	return has
}

// verify holds a proof against a text and one of the operator's credentials.
func (d *Registry) verify(who person, namespace, text string, p approval.Proof) (count uint32, err error) {
	c, there := who.Credential(p.Credential)
	if !there {
		return 0, fmt.Errorf("%w: the operator has no such credential", approval.ErrNotProven)
	}
	if count, err = c.Verify(namespace, text, p); err != nil {
		return 0, err
	}
	if p.Assertion != nil && d.Origin != "" { // another page of this machine may not ask for it
		var from struct{ Origin string }
		b, err := base64.RawURLEncoding.DecodeString(p.Assertion.ClientDataJSON)
		if err := errors.Join(err, json.Unmarshal(b, &from)); err != nil || from.Origin != d.Origin {
			return 0, fmt.Errorf("%w: the passkey was asked by a page of another origin", approval.ErrNotProven)
		}
	}
	return count, nil
}

// refused writes down that a proof was refused, up to as many as the log should have.
func (d *Registry) refused(ctx context.Context, ch Channel, operator, purpose string, p approval.Proof, cause error) {
	d.Log.Warn("a proof was refused", "operator", operator, "purpose", purpose, "channel", ch.String(), "cause", cause)
	d.mu.Lock()
	silent := d.failures.written.take(eventsBurst, eventsEvery) > 0
	d.mu.Unlock()
	if silent {
		return
	}
	credential := p.Credential
	if b, err := hex.DecodeString(credential); err != nil || len(b) != 16 {
		credential = "" // nothing of a stranger's
	}
	outcome := "not_proven"
	if errors.Is(cause, ErrLimited) {
		outcome = "rate_limited"
	}
	e := audit.NewSignInRefused(operator, outcome, audit.Refusal{
		Purpose: purpose, Credential: credential, Channel: ch.String(), Cause: cause.Error(),
	})
	if _, err := d.ledger.Append(ctx, ledger.EventOf(e)); err != nil {
		d.Log.Error("the refusal of a proof was not written down", "err", err)
	}
}

// SignIn begins a session for the operator of a challenge. The token is the caller's to keep; nobody else has it.
func (d *Registry) SignIn(ctx context.Context, ch Channel, challenge string, p approval.Proof) (s Session, token string, err error) {
	c, seen, count, err := d.prove(ctx, ch, challenge, approval.ForSignIn, &p)
	if err != nil {
		return Session{}, "", fmt.Errorf("sign-in: %w", err)
	}
	begun, secret := newSession(ch, p.Credential)
	err = d.write(ctx, "sign-in", func(ctx context.Context) error {
		var who person
		if err := d.ledger.Update(ctx, func(tx *ledger.Tx) (err error) {
			if who, err = d.stillHas(tx, seen, p.Credential, count); err != nil {
				return err
			}
			e := audit.NewOperatorSignedIn(who.Name, begun.ID, p.Credential, joinRoles(who.Roles), ch.String())
			return tx.Append(ledger.EventOf(e))
		}); err != nil {
			return err
		}
		// On disk; and who the operator is can't change before the session is there, to end with that.
		begun.Operator, begun.Roles = who.Name, slices.Clone(who.Roles)
		d.admit(begun, secret)
		return nil
	})
	if errors.Is(err, approval.ErrNotProven) {
		d.refused(ctx, ch, c.operator, approval.ForSignIn, p, err)
		err = fmt.Errorf("sign-in: %w", approval.ErrNotProven)
	}
	if err != nil {
		return Session{}, "", err
	}
	return begun, secret, nil
}

// stillHas returns the operator that the ledger has, who must have the credential that he has proven to have as memory had him, and
// whose count goes on.
func (d *Registry) stillHas(tx *ledger.Tx, seen person, credential string, count uint32) (person, error) {
	value := tx.Get(ledger.Operators, seen.Name)
	if len(value) == 0 {
		return person{}, fmt.Errorf("%w: the operator was removed", approval.ErrNotProven)
	}
	who, err := decodePerson(seen.Name, value)
	if err != nil {
		return person{}, err
	}
	before, _ := seen.Credential(credential)
	if now, there := who.Credential(credential); !there || now != before {
		return person{}, fmt.Errorf("%w: the credential was removed", approval.ErrNotProven)
	}
	changed, err := who.counted(credential, count)
	if err != nil || !changed {
		return who, err
	}
	return who, tx.Put(ledger.Operators, who.Name, manage.Encode(who))
}

// Prove holds a fresh proof of a session's operator against a challenge for approval.ForPresence with that subject. It is good once, for
// what is done now.
func (d *Registry) Prove(ctx context.Context, s Session, challenge, subject string, p approval.Proof) error {
	if _, err := d.alive(s); err != nil {
		return err
	}
	c, seen, count, err := d.prove(ctx, s.Channel, challenge, approval.ForPresence, &p)
	if err != nil {
		return fmt.Errorf("presence: %w", err)
	}
	if c.operator != s.Operator || c.subject != subject {
		return fmt.Errorf("presence: %w: the challenge is another operator's, or for another key", approval.ErrNotProven)
	}
	err = d.write(ctx, "presence", func(ctx context.Context) error {
		return d.ledger.Update(ctx, func(tx *ledger.Tx) error {
			_, err := d.stillHas(tx, seen, p.Credential, count)
			return err
		})
	})
	if errors.Is(err, approval.ErrNotProven) {
		d.refused(ctx, s.Channel, c.operator, approval.ForPresence, p, err)
	}
	return err
}

// random returns 32 hex digits.
func random() string {
	b := make([]byte, 16)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// How many proofs may fail at once, and how soon another one may.
const (
	failuresBurst, failuresEvery       = 5, 12 * time.Second // of an operator, by a channel
	allFailuresBurst, allFailuresEvery = 50, time.Second
	eventsBurst, eventsEvery           = 300, 200 * time.Millisecond // of refusals: 600 in any minute
)

// failures limits how often a failed proof is told to be one, and is written down.
type failures struct {
	each    map[failureKey]*bucket
	all     bucket
	written bucket
}

// failureKey is who has failed, as far as that is known.
type failureKey struct {
	purpose  string
	kind     string
	uid      uint32
	operator string
}

// take counts a failure, or says how long to wait. Nothing is taken of one limit where the other one is reached.
func (f *failures) take(key failureKey) time.Duration {
	maps.DeleteFunc(f.each, func(_ failureKey, b *bucket) bool { b.leak(failuresEvery); return b.spent == 0 }) // no more are left than fail
	b := f.each[key]
	if b == nil {
		b = new(bucket)
		f.each[key] = b
	}
	wait := b.take(failuresBurst, failuresEvery)
	if wait > 0 {
		return wait
	}
	if wait = f.all.take(allFailuresBurst, allFailuresEvery); wait > 0 {
		b.spent = max(0, b.spent-1)
	}
	return wait
}

// bucket counts what leaks out of it with time. Unlike a rate.Limiter it takes back, and says when it is empty.
type bucket struct {
	spent float64
	at    time.Time
}

// take adds one, or says how long to wait, in whole seconds.
func (b *bucket) take(most float64, every time.Duration) time.Duration {
	b.leak(every)
	if over := b.spent + 1 - most; over > 0 {
		return (time.Duration(over*float64(every)) + time.Second - 1).Truncate(time.Second)
	}
	b.spent++
	return 0
}

func (b *bucket) leak(every time.Duration) {
	now := time.Now()
	b.spent = max(0, b.spent-float64(now.Sub(b.at))/float64(every))
	b.at = now
}
