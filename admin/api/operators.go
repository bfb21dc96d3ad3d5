package api

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"

	"countersign/approval"
)

// NewChallenge asks for a challenge.
type NewChallenge struct {
	Purpose  string `json:"purpose" enum:"sign-in,presence"`
	Operator string `json:"operator,omitempty" maxLength:"64" doc:"sign-in: who wants to"`
	Key      string `json:"key,omitempty" maxLength:"64" doc:"presence: for which key"`
	// Credentials are ids of SSH keys with which the caller could sign in. The answer says which of
	// them are the operator's.
	Credentials []string `json:"credentials,omitempty" maxItems:"256" doc:"sign-in: ids of the caller's SSH keys"`
}

// Challenge is a text to be signed once. An SSHSIG is over the text, with its first line as the
// namespace. A passkey signs SHA-256 of the text.
type Challenge struct {
	ID      string `json:"id"`
	Text    string `json:"text"`
	Expires int64  `json:"expires"` // Unix seconds
	// PublicKey is a PublicKeyCredentialRequestOptionsJSON of WebAuthn level 3, for the argument
	// publicKey of navigator.credentials.get.
	PublicKey   json.RawMessage `json:"public_key"`
	Credentials []string        `json:"credentials,omitempty" doc:"sign-in: those asked about that are the operator's"`
}

// Proven is a challenge with its proof.
type Proven struct {
	Challenge string         `json:"challenge" maxLength:"512" doc:"its id"`
	Proof     approval.Proof `json:"proof"`
}

// Session is the session of a signed-in operator. Times are Unix seconds.
type Session struct {
	ID         string          `json:"id"`
	Operator   string          `json:"operator"`
	Roles      []approval.Role `json:"roles"`
	Credential string          `json:"credential"`
	Channel    string          `json:"channel" enum:"unix,https"`
	Source     string          `json:"source" doc:"the user id or the address of the caller"`
	Begun      int64           `json:"begun"`
	LastUsed   int64           `json:"last_used"`
	Expires    int64           `json:"expires" doc:"in any case; without being used it ends sooner"`
	Current    bool            `json:"current" doc:"it is that of this request"`
}

// SignedIn is a new session with its token. No other answer has the token.
type SignedIn struct {
	Session
	Token string `json:"token,omitempty" doc:"sent as Authorization: Bearer; a browser does not get it"`
	// Page is half of the token, for a page in a browser, over HTTPS. The page sends it in the
	// header Countersign-Page, together with the cookie, which is the other half.
	Page string `json:"page,omitempty"`
}

// Me is the caller's operator and session.
type Me struct {
	Operator approval.Operator `json:"operator"`
	Session  Session           `json:"session"`
}

// NewOperator enrols the first administrator.
type NewOperator struct {
	Name       string              `json:"name" maxLength:"64"`
	Credential approval.Credential `json:"credential"`
}

// NewPasskey asks for the options of a passkey's registration.
type NewPasskey struct {
	Operator string `json:"operator" maxLength:"64" doc:"the name that the passkey is to have"`
}

// PasskeyOptions are the argument publicKey of a browser's navigator.credentials.create, and its
// challenge.
type PasskeyOptions struct {
	Challenge string          `json:"challenge" doc:"its id"`
	PublicKey json.RawMessage `json:"public_key" doc:"PublicKeyCredentialCreationOptionsJSON of WebAuthn level 3"`
}

// Registration is a new passkey.
type Registration struct {
	Challenge  string          `json:"challenge" maxLength:"128" doc:"its id"`
	Credential json.RawMessage `json:"credential" doc:"RegistrationResponseJSON of WebAuthn level 3"`
}

// NewProposal asks for an act under approval.
type NewProposal struct {
	Act        string               `json:"act" maxLength:"64" doc:"such as peer add"`
	Parameters []approval.Parameter `json:"parameters,omitempty" maxItems:"16"`
	// Content is the text of the policy, for policy activate. Without Content, the appliance takes
	// the text of the policy file.
	Content  string `json:"content,omitempty" maxLength:"1000000"`
	Lifetime int64  `json:"lifetime,omitempty" minimum:"300" maximum:"604800" doc:"seconds; a day where it is left out"`
}

// Proposal is a proposed act with its approvals. Times are Unix seconds; 0: none.
type Proposal struct {
	ID         uint64               `json:"id"`
	Act        string               `json:"act"`
	Parameters []approval.Parameter `json:"parameters"`
	Proposer   string               `json:"proposer"`
	Proposed   int64                `json:"proposed"`
	Expires    int64                `json:"expires"`
	State      string               `json:"state" enum:"open,running,done,failed,expired,withdrawn,interrupted"`
	Required   int                  `json:"required" doc:"approvals that it takes as of now"`
	Approvals  []Approval           `json:"approvals"`
	// Text is signed by approvers. The first line is the namespace of an SSHSIG. SHA-256 of Text is
	// the challenge of a passkey.
	Text    string `json:"text"`
	Content string `json:"content,omitempty" doc:"where one proposal was asked for, and it has not ended"`
	// Warnings are doubts about an open proposal, such as a rule that names a peer that does not
	// exist, a quorum of all approvers, or an act that would fail as things are now.
	Warnings []string `json:"warnings,omitempty" doc:"where one proposal was asked for or made"`
	Ended    int64    `json:"ended"`
	Cause    string   `json:"cause,omitempty" doc:"why it failed, or ended before its expiry"`
}

// Counting returns the number of valid approvals.
func (p *Proposal) Counting() (n int) {
	for _, a := range p.Approvals {
		if a.Counts {
			n++
		}
	}
	return n
}

// Approval is an approval of a proposal.
type Approval struct {
	Operator   string `json:"operator"`
	Credential string `json:"credential"`
	At         int64  `json:"at"` // Unix seconds
	Counts     bool   `json:"counts" doc:"its operator is still an approver with it; by a hardware key if need be"`
}

// NewApproval approves a proposal.
type NewApproval struct {
	Proof approval.Proof `json:"proof"`
}

// Approvals has the approvers and the rules for approvals.
type Approvals struct {
	Needed    int      `json:"needed"`   // approvals for an act
	Hardware  bool     `json:"hardware"` // approvals must be by FIDO keys with user verification, or passkeys
	Approvers []string `json:"approvers"`
	Warning   string   `json:"warning,omitempty" doc:"without one of the approvers there would be no quorum"`
}

// Health is the state of the appliance.
type Health struct {
	State      string  `json:"state" enum:"uninitialised,locked,operational,degraded,rolled-back"`
	Causes     []Cause `json:"causes" doc:"why it is not operational, the gravest first; for who is signed in"`
	Since      int64   `json:"since" doc:"when it was locked, Unix seconds; 0: it is not"`
	Locked     bool    `json:"locked"`
	Unattended bool    `json:"unattended" doc:"it starts unlocked"`
	Nonces     *Nonces `json:"nonces,omitempty" doc:"for who is signed in"`
	Alerts     []Alert `json:"alerts,omitempty" doc:"firing alerts, the gravest first; for who is signed in"`

	KeyWorkers *KeyWorkers `json:"key_workers,omitempty" doc:"for who is signed in"`
}

// KeyWorkers says how far the key workers are apart from the daemon.
type KeyWorkers struct {
	User    int      `json:"user" doc:"the number of the user that they run as"`
	OwnUser bool     `json:"own_user" doc:"the daemon has another user"`
	Exposed []string `json:"exposed" doc:"PINs, tokens and journals that a daemon in other hands could read or change"`
}

// Nonces are the numbers of live nonces, by use.
type Nonces struct {
	Alive        int          `json:"alive"`
	Max          int          `json:"max"`
	Signing      int          `json:"signing" doc:"for signatures, of all peers"`
	Verifying    int          `json:"verifying" doc:"for verifications, of all peers"`
	VerifyingMax int          `json:"verifying_max"`
	Own          int          `json:"own" doc:"for the appliance's own signatures"`
	OwnReserved  int          `json:"own_reserved"`
	PeerMax      int          `json:"peer_max" doc:"of one peer for one use"`
	Largest      []NonceShare `json:"largest" doc:"at most five"`
}

// NonceShare is the number of live nonces of a peer for one use.
type NonceShare struct {
	Peer  string `json:"peer"`
	Use   string `json:"use" enum:"sign,verify"`
	Alive int    `json:"alive"`
}

// Cause is one reason why the state is not operational. A cause is gone when its reason is.
type Cause struct {
	Code    string `json:"code" doc:"stable; docs/SPEC.md lists all codes"`
	Subject string `json:"subject,omitempty" doc:"the token, key, webhook or file concerned"`
	Text    string `json:"text" doc:"the details"`
	Do      string `json:"do" doc:"what to do"`
	Stops   bool   `json:"stops" doc:"nothing is signed or verified until it is over"`
}

// Lock locks the appliance.
type Lock struct {
	Reason string `json:"reason" maxLength:"500" doc:"it goes into the audit log"`
}

// LevelConfigured is the level of the configuration in SetLogLevel.
const LevelConfigured = "configured"

// LogLevel is the level of the daemon's log.
type LogLevel struct {
	Level      string `json:"level" doc:"in force: debug, info, warn or error"`
	Configured string `json:"configured" doc:"log_level of the configuration"`
	Until      int64  `json:"until" doc:"Unix seconds, when the configured level is in force again by itself; 0: it is"`
}

// SetLogLevel sets the level of the daemon's log for a time.
type SetLogLevel struct {
	Level   string `json:"level" enum:"debug,info,warn,error,configured"`
	Seconds int    `json:"seconds,omitempty" minimum:"1" maximum:"604800" doc:"default: 3600"`
}

// TLS is the certificate of the loopback listener. Times are Unix seconds; 0: no certificate yet.
type TLS struct {
	Installed bool     `json:"installed" doc:"it is the operator's, and not of the appliance's own CA"`
	Names     []string `json:"names"`
	Issuer    string   `json:"issuer"`
	NotBefore int64    `json:"not_before"`
	NotAfter  int64    `json:"not_after"`
	Warning   string   `json:"warning,omitempty" doc:"what should be done about it"`
	CA        string   `json:"ca" doc:"PEM of the appliance's own CA: what to trust where nothing is installed"`
}

// PEM is a certificate with its chain, or a certificate signing request.
type PEM struct {
	PEM string `json:"pem" maxLength:"60000"`
}

// Me returns the caller's operator and session.
func (c *Client) Me(ctx context.Context) (m Me, err error) {
	return m, c.do(ctx, http.MethodGet, "/v1/me", nil, &m)
}

// Challenge returns a new challenge.
func (c *Client) Challenge(ctx context.Context, n NewChallenge) (ch Challenge, err error) {
	return ch, c.do(ctx, http.MethodPost, "/v1/challenges", n, &ch)
}

// SignIn begins a session, and sets its token for the next requests of the client.
func (c *Client) SignIn(ctx context.Context, p Proven) (s SignedIn, err error) {
	if err = c.do(ctx, http.MethodPost, "/v1/sessions", p, &s); err == nil {
		c.SetToken(s.Token)
	}
	return s, err
}

// Sessions lists the caller's own sessions, or for an administrator all sessions.
func (c *Client) Sessions(ctx context.Context) ([]Session, error) {
	return list[Session](ctx, c, "/v1/sessions")
}

// EndSession ends a session. The id "current" is the client's own session.
func (c *Client) EndSession(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, "/v1/sessions/"+url.PathEscape(id), nil, nil)
}

// PasskeyOptions begins the registration of a passkey.
func (c *Client) PasskeyOptions(ctx context.Context, n NewPasskey) (o PasskeyOptions, err error) {
	return o, c.do(ctx, http.MethodPost, "/v1/passkeys/options", n, &o)
}

// RegisterPasskey returns the credential of a new passkey. The credential belongs to no operator
// until a proposal adds it to one.
func (c *Client) RegisterPasskey(ctx context.Context, r Registration) (cred approval.Credential, err error) {
	return cred, c.do(ctx, http.MethodPost, "/v1/passkeys", r, &cred)
}

// Operators lists the operators.
func (c *Client) Operators(ctx context.Context) ([]approval.Operator, error) {
	return list[approval.Operator](ctx, c, "/v1/operators")
}

// Operator returns an operator.
func (c *Client) Operator(ctx context.Context, name string) (o approval.Operator, err error) {
	return o, c.do(ctx, http.MethodGet, "/v1/operators/"+url.PathEscape(name), nil, &o)
}

// EnrolFirst enrols the first administrator. Only root can call EnrolFirst, over the Unix socket,
// once.
func (c *Client) EnrolFirst(ctx context.Context, n NewOperator) (o approval.Operator, err error) {
	return o, c.do(ctx, http.MethodPost, "/v1/operators/first", n, &o)
}

// Propose proposes an act.
func (c *Client) Propose(ctx context.Context, n NewProposal) (p Proposal, err error) {
	return p, c.do(ctx, http.MethodPost, "/v1/proposals", n, &p)
}

// Proposals lists the proposals, the newest first.
func (c *Client) Proposals(ctx context.Context) ([]Proposal, error) {
	return list[Proposal](ctx, c, "/v1/proposals")
}

func proposalPath(id uint64) string { return "/v1/proposals/" + strconv.FormatUint(id, 10) }

// Proposal returns a proposal.
func (c *Client) Proposal(ctx context.Context, id uint64) (p Proposal, err error) {
	return p, c.do(ctx, http.MethodGet, proposalPath(id), nil, &p)
}

// Approve approves a proposal. The last needed approval starts the act; the answer then has the
// outcome.
func (c *Client) Approve(ctx context.Context, id uint64, proof approval.Proof) (p Proposal, err error) {
	return p, c.do(ctx, http.MethodPost, proposalPath(id)+"/approvals", NewApproval{proof}, &p)
}

// Withdraw ends an open proposal.
func (c *Client) Withdraw(ctx context.Context, id uint64) error {
	return c.do(ctx, http.MethodPost, proposalPath(id)+"/withdraw", nil, nil)
}

// Approvals returns the approvers and the rules for approvals.
func (c *Client) Approvals(ctx context.Context) (a Approvals, err error) {
	return a, c.do(ctx, http.MethodGet, "/v1/approvals", nil, &a)
}

// Alive returns nil if the daemon and the writer of its ledger respond.
func (c *Client) Alive(ctx context.Context) error {
	return c.do(ctx, http.MethodGet, "/v1/health/alive", nil, nil)
}

// Ready returns nil if the appliance can sign.
func (c *Client) Ready(ctx context.Context) error {
	return c.do(ctx, http.MethodGet, "/v1/health/ready", nil, nil)
}

// Health returns the state of the appliance.
func (c *Client) Health(ctx context.Context) (h Health, err error) {
	return h, c.do(ctx, http.MethodGet, "/v1/health/state", nil, &h)
}

// Lock locks the appliance: no key is used until Unlock.
func (c *Client) Lock(ctx context.Context, reason string) error {
	return c.do(ctx, http.MethodPost, "/v1/lock", Lock{reason}, nil)
}

// LogLevel returns the level of the daemon's log.
func (c *Client) LogLevel(ctx context.Context) (is LogLevel, err error) {
	return is, c.do(ctx, http.MethodGet, "/v1/log-level", nil, &is)
}

// SetLogLevel sets the level of the daemon's log.
func (c *Client) SetLogLevel(ctx context.Context, to SetLogLevel) (is LogLevel, err error) {
	return is, c.do(ctx, http.MethodPost, "/v1/log-level", to, &is)
}

// Unlock unlocks the appliance.
func (c *Client) Unlock(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/v1/unlock", nil, nil)
}

// TLS returns the certificate of the loopback listener.
func (c *Client) TLS(ctx context.Context) (t TLS, err error) {
	return t, c.do(ctx, http.MethodGet, "/v1/tls", nil, &t)
}

// CSR returns a certificate signing request for the listener's key.
func (c *Client) CSR(ctx context.Context) (p PEM, err error) {
	return p, c.do(ctx, http.MethodPost, "/v1/tls/csr", nil, &p)
}

// InstallCertificate installs a certificate, followed by its chain, that a CA has made from the
// request.
func (c *Client) InstallCertificate(ctx context.Context, pem string) (t TLS, err error) {
	return t, c.do(ctx, http.MethodPut, "/v1/tls/certificate", PEM{pem}, &t)
}

// UninstallCertificate goes back to a certificate of the appliance's own CA.
func (c *Client) UninstallCertificate(ctx context.Context) (t TLS, err error) {
	return t, c.do(ctx, http.MethodDelete, "/v1/tls/certificate", nil, &t)
}
