package admin

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/operators"
)

func (s *server) me(_ context.Context, who caller, _ *none) (api.Me, error) {
	o, err := s.Operators.Operator(who.session.Operator)
	return api.Me{Operator: o, Session: sessionDoc(*who.session, who)}, err
}

func (s *server) challenge(_ context.Context, who caller, in *body[api.NewChallenge]) (api.Challenge, error) {
	n, purpose := in.Body, approval.ForSignIn
	if n.Purpose == "presence" {
		if who.session == nil {
			return api.Challenge{}, operators.ErrSignedOut
		}
		purpose, n.Operator = approval.ForPresence, who.session.Operator
	}
	ch, err := s.Operators.Challenge(purpose, n.Operator, n.Key, who.Channel)
	digest := sha256.Sum256([]byte(ch.Text))
	return api.Challenge{
		ID: ch.ID, Text: ch.Text, Expires: ch.Expires.Unix(),
		PublicKey:   approval.PasskeyRequest(digest[:], ch.RPID, ch.Allowed),
		Credentials: s.Operators.Accepted(n.Operator, n.Credentials),
	}, err
}

func sessionDoc(x operators.Session, who caller) api.Session {
	source := x.Channel.Source
	if x.Channel.Kind == operators.Unix {
		source = connection{Channel: x.Channel}.name()
	}
	return api.Session{
		ID: x.ID, Operator: x.Operator, Roles: x.Roles, Credential: x.Credential,
		Channel: x.Channel.Kind, Source: source,
		Begun: x.Begun.Unix(), LastUsed: x.LastUsed.Unix(), Expires: x.Expires.Unix(),
		Current: who.session != nil && who.session.ID == x.ID,
	}
}

type signInOutput struct {
	SetCookie string `header:"Set-Cookie" doc:"over HTTPS: half of the token, for a browser"`
	Body      api.SignedIn
}

func (s *server) signIn(ctx context.Context, who caller, in *struct {
	Site string `header:"Sec-Fetch-Site" hidden:"true"` // only browsers send the header
	Body api.Proven
}) (*signInOutput, error) {
	session, token, err := s.Operators.SignIn(ctx, who.Channel, in.Body.Challenge, in.Body.Proof)
	if err != nil {
		return nil, err
	}
	who.session = &session
	out := &signInOutput{Body: api.SignedIn{Session: sessionDoc(session, who), Token: string(token.Expose())}}
	if who.Kind == operators.HTTPS {
		var half string
		half, out.Body.Page = splitToken(token)
		out.SetCookie = cookie(half, int(time.Until(session.Expires).Seconds()))
		if in.Site != "" {
			out.Body.Token = "" // a script must not get the token; it can't read the cookie
		}
	}
	return out, nil
}

func (s *server) sessions(_ context.Context, who caller, in *pageInput) (*listed[api.Session], error) {
	all := slices.DeleteFunc(s.Operators.Sessions(), func(x operators.Session) bool {
		return x.Operator != who.session.Operator && !who.has(administrator)
	})
	age := func(x operators.Session) string { return fmt.Sprintf("%020d %s", x.Begun.UnixNano(), x.ID) }
	return paged(in, all, age, func(x operators.Session) api.Session { return sessionDoc(x, who) }), nil
}

type endSessionOutput struct {
	SetCookie string `header:"Set-Cookie" doc:"over HTTPS, of this session: the cookie is forgotten"`
}

func (s *server) endSession(ctx context.Context, who caller, in *struct {
	ID string `path:"id" maxLength:"64"`
}) (*endSessionOutput, error) {
	if in.ID != "current" && in.ID != who.session.ID {
		return &endSessionOutput{}, s.Operators.Revoke(ctx, *who.session, in.ID)
	}
	out := &endSessionOutput{}
	if who.Kind == operators.HTTPS {
		out.SetCookie = cookie("", -1)
	}
	return out, s.Operators.SignOut(ctx, *who.session)
}

// cookie returns the cookie with a browser's half of a token. The prefix __Host- of the name makes
// browsers refuse the cookie from another host or without TLS.
func cookie(half string, maxAge int) string {
	c := http.Cookie{
		Name: cookieName, Value: half, Path: "/", MaxAge: maxAge,
		Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode,
	}
	return c.String()
}

// registrationTimeout is the time to make a passkey.
//
// A registration needs no session, and gives no right: a passkey is a credential only after an
// approved proposal. Strangers can begin registrations, so the server stores none, and strangers
// can evict none: the id of a registration has the expiry and a MAC, and the challenge is SHA-256
// of the id.
const registrationTimeout = 5 * time.Minute

// newRegistration returns the id and the challenge of a new registration.
func (s *server) newRegistration(expires time.Time) (id string, challenge []byte) {
	return s.registration(rand.Text() + "." + strconv.FormatInt(expires.Unix(), 10))
}

// registration returns the id and the challenge for a nonce and an expiry: "nonce.expiry".
func (s *server) registration(fields string) (id string, challenge []byte) {
	m := hmac.New(sha256.New, s.macKey.Expose())
	m.Write([]byte(fields))
	id = fields + "." + hex.EncodeToString(m.Sum(nil))
	digest := sha256.Sum256([]byte(id))
	return id, digest[:]
}

// parseRegistration returns the challenge of an id, if newRegistration has made the id and it has
// not expired.
func (s *server) parseRegistration(id string) (challenge []byte, ok bool) {
	fields := id[:max(0, strings.LastIndexByte(id, '.'))]
	genuine, challenge := s.registration(fields)
	if !hmac.Equal([]byte(genuine), []byte(id)) {
		return nil, false
	}
	_, text, _ := strings.Cut(fields, ".")
	expires, err := strconv.ParseInt(text, 10, 64)
	return challenge, err == nil && time.Now().Unix() < expires
}

func (s *server) passkeyOptions(
	_ context.Context, who caller, in *body[api.NewPasskey],
) (api.PasskeyOptions, error) {
	id, challenge := s.newRegistration(time.Now().Add(registrationTimeout))
	options, err := s.Operators.PasskeyOptions(challenge, in.Body.Operator, who.session)
	return api.PasskeyOptions{Challenge: id, PublicKey: options}, err
}

func (s *server) passkey(_ context.Context, _ caller, in *body[api.Registration]) (approval.Credential, error) {
	challenge, ok := s.parseRegistration(in.Body.Challenge)
	if !ok {
		return approval.Credential{}, notProven.errorf("the challenge is unknown or too old: ask for a new one")
	}
	return approval.NewPasskey(challenge, s.RPID, s.Origin, in.Body.Credential)
}

func (s *server) enrolFirst(ctx context.Context, who caller, in *body[api.NewOperator]) (approval.Operator, error) {
	return s.Operators.EnrolFirst(ctx, who.Channel, in.Body.Name, in.Body.Credential)
}

func (s *server) operators(_ context.Context, _ caller, in *pageInput) (*listed[approval.Operator], error) {
	name := func(o approval.Operator) string { return o.Name }
	same := func(o approval.Operator) approval.Operator { return o }
	return paged(in, s.Operators.Operators(), name, same), nil
}

func (s *server) operator(_ context.Context, _ caller, in *named) (approval.Operator, error) {
	return s.Operators.Operator(in.Name)
}

func (s *server) approvals(context.Context, caller, *none) (api.Approvals, error) {
	a := api.Approvals{
		Needed: s.Operators.Needed(), Hardware: s.Operators.Hardware(), Approvers: []string{},
		Warning: s.Operators.QuorumWarning(),
	}
	for _, o := range s.Operators.Operators() {
		if o.Has(approver) {
			a.Approvers = append(a.Approvers, o.Name)
		}
	}
	return a, nil
}

func proposalDoc(p operators.Proposal) api.Proposal {
	return api.Proposal{
		ID: p.ID, Act: p.Act, Parameters: append([]approval.Parameter{}, p.Parameters...), Proposer: p.Proposer,
		Proposed: p.Proposed.Unix(), Expires: p.Expires.Unix(),
		State: string(p.State), Required: p.Required, Text: p.Text(), Ended: unix(p.Ended), Cause: p.Cause,
		Approvals: docs(p.Approvals, func(a operators.Approval) api.Approval {
			return api.Approval{Operator: a.Operator, Credential: a.Credential, At: a.At.Unix(), Counts: a.Counts}
		}),
	}
}

func (s *server) proposals(_ context.Context, _ caller, in *pageInput) (*listed[api.Proposal], error) {
	newest := func(p operators.Proposal) string { return fmt.Sprintf("%020d", math.MaxUint64-p.ID) }
	return paged(in, s.Operators.Proposals(), newest, proposalDoc), nil
}

type numbered struct {
	ID uint64 `path:"id"`
}

func (s *server) proposal(_ context.Context, _ caller, in *numbered) (api.Proposal, error) {
	p, err := s.Operators.Proposal(in.ID)
	if err != nil {
		return api.Proposal{}, err
	}
	doc := proposalDoc(p)
	doc.Content, doc.Warnings = string(p.Content), s.Operators.Warnings(p)
	return doc, nil
}

func (s *server) propose(ctx context.Context, who caller, in *body[api.NewProposal]) (api.Proposal, error) {
	n := in.Body
	if n.Act == approval.ActPolicyActivate && n.Content == "" { // the present text of the file is approved
		p, err := s.LoadPolicy()
		if err != nil {
			return api.Proposal{}, invalid.errorf("%v", err)
		}
		n.Content = string(p.Text)
	}
	lifetime := time.Duration(n.Lifetime) * time.Second
	p, err := s.Operators.Propose(ctx, *who.session, n.Act, n.Parameters, []byte(n.Content), lifetime)
	if err != nil {
		return api.Proposal{}, err
	}
	doc := proposalDoc(p)
	doc.Warnings = s.Operators.Warnings(p)
	return doc, nil
}

func (s *server) approve(ctx context.Context, who caller, in *struct {
	ID   uint64 `path:"id"`
	Body api.NewApproval
}) (api.Proposal, error) {
	p, err := s.Operators.Approve(ctx, *who.session, in.ID, in.Body.Proof)
	if err != nil {
		return api.Proposal{}, err
	}
	return proposalDoc(p), nil
}

func (s *server) withdraw(ctx context.Context, who caller, in *numbered) error {
	return s.Operators.Withdraw(ctx, *who.session, in.ID)
}
