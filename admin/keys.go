package admin

import (
	"context"
	"encoding/hex"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/manage"
	"countersign/internal/schedule"
)

func (s *server) rotate(ctx context.Context, who caller, in *struct {
	Name string `path:"name" maxLength:"200"`
	Body api.Rotate
}) (api.Key, error) {
	l, err := s.Appliance.Keys.Settings(in.Name)
	if err != nil {
		return api.Key{}, err
	}
	at, within, err := askedTime(in.Body, time.Now(), l.Announce)
	if err != nil {
		return api.Key{}, err
	}
	k, err := s.Appliance.Keys.RotateWithin(ctx, who.actor(), in.Name, at, within)
	if err != nil {
		return api.Key{}, err
	}
	return s.keyDoc(k), nil
}

// askedTime returns the time of the activation, and the time after it for which the rotation still
// makes sense.
func askedTime(r api.Rotate, now time.Time, announce time.Duration) (at time.Time, within time.Duration, err error) {
	within = keyring.DefaultWithin
	if r.Within != 0 {
		within = time.Duration(r.Within) * time.Second
	}
	switch {
	case r.At != 0 && r.In != 0 || r.At != 0 && r.Now || r.In != 0 && r.Now:
		return at, 0, invalid.errorf("say one of at, in and now")
	case r.At != 0 && r.At < now.Unix():
		return at, 0, invalid.errorf("at: %s is in the past: say now for at once",
			time.Unix(r.At, 0).UTC().Format(time.RFC3339))
	case r.At != 0:
		return time.Unix(r.At, 0), within, nil
	case r.In != 0:
		return now.Add(time.Duration(r.In) * time.Second), within, nil
	case r.Now:
		return now, within, nil
	}
	return now.Add(announce), within, nil
}

func (s *server) cancelRotation(ctx context.Context, who caller, in *named) (api.Line, error) {
	if err := s.Appliance.Keys.Cancel(ctx, who.actor(), in.Name); err != nil {
		return api.Line{}, err
	}
	return s.line(ctx, who, in)
}

func (s *server) line(_ context.Context, _ caller, in *named) (api.Line, error) {
	l, err := s.Appliance.Keys.Settings(in.Name)
	return s.lineDoc(in.Name, l), err
}

func (s *server) lineDoc(name string, l keyring.Settings) api.Line {
	doc := api.Line{Settings: api.Settings{
		Every: seconds(l.Plan.Every), Window: l.Plan.Window, Uses: l.Plan.Uses,
		Announce: seconds(l.Announce), Grace: seconds(l.Grace),
		Acknowledge: append([]string{}, l.Acknowledge...), Presence: seconds(l.Presence),
	}, Unacknowledged: []string{}, Acknowledged: []string{}, Compromises: []api.Compromise{},
		Rotation: s.Appliance.Keys.Rotation(name)}
	at, reason := s.Appliance.Keys.NextRotation(name)
	doc.NextRotation, doc.NextReason, doc.Confirmed = unix(at), reason, unix(s.Appliance.Keys.Confirmed(name))
	if q, ok := s.Appliance.Keys.Requested(name); ok {
		doc.Requested = &api.Requested{
			By: q.By.Name, Asked: unix(q.Asked), Activates: unix(q.Activates), Until: unix(q.Until), Ended: q.Ended,
		}
	}
	if k := s.Appliance.Keys.Recovery(name); k != nil {
		commitment, _ := s.Appliance.Keys.RecoveryCommitment(name)
		_, absent := s.Appliance.Keys.Tokens.Get(k.Token)
		doc.Recovery = &api.Recovery{
			Version: k.Version, Token: k.Token, Absent: absent != nil, Created: unix(k.Created),
			Commitment: hex.EncodeToString(commitment[:]),
		}
	}
	if doc.Rotation != nil {
		all, version := s.Appliance.Peers, doc.Rotation.Version
		doc.Unacknowledged = append(doc.Unacknowledged, all.Unacknowledged(name, version)...)
		doc.Acknowledged = append(doc.Acknowledged, all.AcknowledgedBy(name, version)...)
	}
	compromises, _ := s.Appliance.Keys.News()
	for _, n := range compromises {
		if n.Name == name {
			doc.Compromises = append(doc.Compromises, api.Compromise{
				Version: n.Version, Unacknowledged: append([]string{}, s.Appliance.Peers.Unwarned(name, n.Version)...),
			})
		}
	}
	return doc
}

func seconds(d time.Duration) int64 { return int64(d / time.Second) }

func (s *server) setLine(ctx context.Context, who caller, in *struct {
	Name string `path:"name" maxLength:"200"`
	Body api.Change
}) (api.Line, error) {
	l, err := s.Appliance.Keys.Set(ctx, who.actor(), in.Name, func(l *keyring.Settings) error {
		changeSettings(l, in.Body)
		return nil
	})
	if err != nil {
		return api.Line{}, err
	}
	return s.lineDoc(in.Name, l), nil
}

// maxSeconds is 100 years. Longer times are cut, so that no duration overflows.
const maxSeconds = 100 * 366 * 24 * 3600

func changeSettings(l *keyring.Settings, c api.Change) {
	for _, each := range []struct {
		from *int64
		to   *time.Duration
	}{{c.Every, &l.Plan.Every}, {c.Announce, &l.Announce}, {c.Grace, &l.Grace}, {c.Presence, &l.Presence}} {
		if each.from != nil {
			*each.to = time.Duration(min(*each.from, maxSeconds)) * time.Second
		}
	}
	if c.Window != nil {
		l.Plan.Window = *c.Window
	}
	if c.Uses != nil {
		l.Plan.Uses = *c.Uses
	}
	if c.Acknowledge != nil {
		l.Acknowledge = *c.Acknowledge
	}
}

// confirm needs a fresh proof, because the proof of the session's sign-in may be an hour old.
func (s *server) confirm(ctx context.Context, who caller, in *struct {
	Name string `path:"name" maxLength:"200"`
	Body api.Proven
}) (api.Confirmed, error) {
	if err := s.Operators.VerifyPresence(ctx, *who.session, in.Body.Challenge, in.Name, in.Body.Proof); err != nil {
		return api.Confirmed{}, err
	}
	until, err := s.Appliance.Keys.Confirm(ctx, who.actor(), in.Name)
	return api.Confirmed{Until: unix(until)}, err
}

func (s *server) authorizeNoise(ctx context.Context, who caller, _ *none) (api.Key, error) {
	if err := s.Appliance.Keys.AuthorizeNoise(ctx, who.actor()); err != nil {
		return api.Key{}, err
	}
	return s.noiseKey(ctx, who, nil)
}

func archiveKey(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, version, err := versionOf(p)
	if err != nil {
		return nil, nil, err
	}
	return list("key", v["key"], "version", v["version"]), func(ctx context.Context, who audit.Actor) error {
		return a.Keys.Archive(ctx, who, v["key"], version)
	}, a.Keys.CheckState(v["key"], version, keyring.Archived)
}

// makeRecovery makes the recovery successor of a key on another token.
func makeRecovery(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, err := values(p, "key", "token")
	if err != nil {
		return nil, nil, err
	}
	return list("key", v["key"], "token", v["token"]), func(ctx context.Context, who audit.Actor) error {
		return a.Keys.MakeRecovery(ctx, who, v["key"], v["token"])
	}, a.Keys.CheckRecovery(v["key"], v["token"])
}

// recoverLine lets a line go on with its recovery successor.
func recoverLine(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, err := values(p, "key", "reason")
	if err != nil {
		return nil, nil, err
	}
	err = a.Keys.CheckRecover(v["key"])
	if err == nil {
		err = manage.CheckReason(v["reason"])
	}
	return list("key", v["key"], "reason", v["reason"]), func(ctx context.Context, who audit.Actor) error {
		return a.Keys.RecoverLine(ctx, who, v["key"], v["reason"])
	}, err
}

func destroyKey(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, version, err := versionOf(p)
	if err != nil {
		return nil, nil, err
	}
	return list("key", v["key"], "version", v["version"]), func(ctx context.Context, who audit.Actor) error {
		return a.Keys.Destroy(ctx, who, v["key"], version)
	}, a.Keys.CheckState(v["key"], version, keyring.Destroyed)
}

func compromiseKey(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, version, err := versionOf(p, "reason")
	if err != nil {
		return nil, nil, err
	}
	p = list("key", v["key"], "version", v["version"], "reason", v["reason"])
	return p, func(ctx context.Context, who audit.Actor) error {
		return a.Keys.Compromise(ctx, who, v["key"], version, v["reason"])
	}, a.Keys.CheckState(v["key"], version, keyring.Compromised)
}

// versionOf returns the values of an act on a version of a key: key, version and more.
func versionOf(p parameters, more ...string) (v map[string]string, version uint32, err error) {
	if v, err = values(p, append([]string{"key", "version"}, more...)...); err != nil {
		return nil, 0, err
	}
	n, err := strconv.ParseUint(v["version"], 10, 32)
	if err != nil || n == 0 {
		return nil, 0, invalid.errorf("version: %q is not the number of one", v["version"])
	}
	v["version"] = strconv.FormatUint(n, 10)
	return v, uint32(n), nil
}

// setKey changes the settings in the parameters: grace and presence in seconds, and the peers that
// must acknowledge, or "none".
func setKey(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, err := values(p, "key", "?grace", "?acknowledge", "?presence")
	if err != nil {
		return nil, nil, err
	}
	p = list("key", v["key"])
	var change api.Change
	for _, each := range []struct {
		name string
		to   **int64
	}{{"grace", &change.Grace}, {"presence", &change.Presence}} {
		text, given := v[each.name]
		if !given {
			continue
		}
		n, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, nil, invalid.errorf("%s: %q is not a number of seconds", each.name, text)
		}
		seconds := int64(n)
		*each.to = &seconds
		p = append(p, approval.Parameter{Name: each.name, Value: strconv.FormatUint(n, 10)})
	}
	if text, given := v["acknowledge"]; given {
		names := []string{}
		if text != "none" {
			names = strings.Split(text, ",")
		}
		change.Acknowledge = &names
		p = append(p, approval.Parameter{Name: "acknowledge", Value: text})
	}
	if len(p) == 1 {
		return nil, nil, invalid.errorf("key %q: say what is to be set: grace, acknowledge or presence", v["key"])
	}
	set := func(l *keyring.Settings) error { changeSettings(l, change); return nil }
	_, _, err = a.Keys.CheckSet(v["key"], set)
	return p, func(ctx context.Context, who audit.Actor) error {
		_, err := a.Keys.Set(ctx, who, v["key"], set)
		return err
	}, err
}

// shortenRetention changes only the times in the parameters.
func shortenRetention(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	names := []string{"audit", "receipts", "decisions", "nonces"}
	v, err := values(p, "?audit", "?receipts", "?decisions", "?nonces")
	if err != nil {
		return nil, nil, err
	}
	var pairs []string
	times, texts := map[string]time.Duration{}, map[string]string{}
	for _, name := range names {
		if v[name] == "" {
			continue
		}
		d, err := schedule.ParseEvery(v[name])
		if err != nil {
			return nil, nil, invalid.errorf("%s: %q is not a time such as 36h, 90d or 52w: an hour at least",
				name, v[name])
		}
		times[name], texts[name] = d, v[name]
		pairs = append(pairs, name, v[name])
	}
	if len(pairs) == 0 {
		return nil, nil, invalid.errorf("say what is to be kept for how long: %s", strings.Join(names, ", "))
	}
	shorten := func(r *appliance.Retention) {
		for name, to := range map[string]*time.Duration{
			"audit": &r.Audit, "receipts": &r.Receipts, "decisions": &r.Decisions, "nonces": &r.Nonces,
		} {
			if d, ok := times[name]; ok {
				*to = d
			}
		}
	}
	return list(pairs...), func(ctx context.Context, who audit.Actor) error {
		return a.ShortenRetention(ctx, who, texts, shorten)
	}, a.CheckShorter(shorten)
}
