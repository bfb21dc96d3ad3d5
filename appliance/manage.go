package appliance

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"countersign/audit"
	"countersign/internal/keystore"
)

// What a management act is refused for.
var (
	ErrExists   = errors.New("it exists already")
	ErrNotFound = errors.New("it does not exist")
	ErrInvalid  = errors.New("it is not valid")
	ErrConflict = errors.New("it can't be done now")
	ErrLocked   = errors.New("the appliance is locked")
	// ErrNotApproved refuses what only an approved proposal may do.
	ErrNotApproved = errors.New("it needs an approved proposal")
)

// Tokens says how each token is, by name.
func (a *Appliance) Tokens() map[string]keystore.Status {
	all := map[string]keystore.Status{}
	for name, store := range a.tokens {
		all[name] = store.Status()
	}
	return all
}

// RetryToken lets a token be asked for a login again after its PIN was refused.
func (a *Appliance) RetryToken(ctx context.Context, who audit.Actor, name string) error {
	store, err := a.token(name)
	if err != nil {
		return err
	}
	if err := a.record(ctx, audit.Event{Type: audit.TokenRetried, Actor: who, Action: "token retry", Resource: name, Outcome: "ok"}); err != nil {
		return err
	}
	store.Retry()
	a.hasten()
	return nil
}

// RecordCertificate writes down that an operator is about to give the admin API another certificate. What comes of it depends on the certificate.
func (a *Appliance) RecordCertificate(ctx context.Context, who audit.Actor, action string, certificate []byte) error {
	e := audit.Event{Type: audit.CertificateChanged, Actor: who, Action: action, Resource: AdminName, Outcome: "ok", Metadata: map[string]string{}}
	if certificate != nil {
		e.Metadata["sha256"] = fmt.Sprintf("%x", sha256.Sum256(certificate))
	}
	return a.record(ctx, e)
}

// TokenChanged writes down that a token does not serve any more, or serves again.
func (a *Appliance) TokenChanged(name string, up bool, cause error) {
	if up {
		a.hasten()
	}
	e := audit.Event{Type: audit.DeviceRecovered, Actor: audit.Daemon(), Action: "serve", Resource: name, Outcome: "ok"}
	if !up {
		e.Type, e.Outcome = audit.DeviceUnavailable, "unavailable"
		if cause != nil {
			e.Metadata = map[string]string{"cause": cause.Error()}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	if err := a.record(ctx, e); err != nil {
		a.log.Error("the event of a token's change is not written down", "token", name, "up", up, "err", err)
	}
}

// Events calls visit for each event of the audit log from index from on, until visit returns false.
func (a *Appliance) Events(from uint64, visit func(index uint64, e audit.Event) bool) error {
	var broken error
	err := a.ledger.Events(from, func(index uint64, b []byte) bool {
		e, err := audit.Decode(b)
		if err != nil {
			broken = fmt.Errorf("event %d: %w", index, err)
			return false
		}
		return visit(index, e)
	})
	return errors.Join(err, broken)
}
