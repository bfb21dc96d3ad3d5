package api

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"

	"countersign/approval"
)

// NewLink asks for a link by which a person makes a passkey, once.
type NewLink struct {
	Operator string          `json:"operator" maxLength:"64" doc:"the name of the person"`
	Roles    []approval.Role `json:"roles,omitempty" maxItems:"16" doc:"of a new operator; an operator keeps the roles"`
}

// Link is a link by which a person makes a passkey, once. Times are Unix seconds; 0: none.
type Link struct {
	ID       string          `json:"id"`
	Operator string          `json:"operator"`
	Roles    []approval.Role `json:"roles" doc:"of a new operator; none: the operator is enrolled"`
	By       string          `json:"by" doc:"who has made the link"`
	First    bool            `json:"first" doc:"it enrols the first administrator"`
	Expires  int64           `json:"expires"`
	Used     int64           `json:"used" doc:"when the passkey was made"`
	// Credential is the passkey that the person has made. A proposal gives the passkey to the
	// operator.
	Credential *approval.Credential `json:"credential,omitempty" doc:"the passkey; a proposal gives it to the operator"`
}

// MadeLink is a new link with its address. No other answer has the address.
type MadeLink struct {
	Link
	URL string `json:"url" doc:"the secret is behind the #, which browsers do not send"`
}

// OpenLink opens a link.
type OpenLink struct {
	Secret string `json:"secret" maxLength:"128"`
}

// OpenedLink is a link with the options of a passkey's registration.
type OpenedLink struct {
	Link
	Appliance string          `json:"appliance" doc:"its name"`
	Challenge string          `json:"challenge" doc:"its id"`
	PublicKey json.RawMessage `json:"public_key" doc:"PublicKeyCredentialCreationOptionsJSON of WebAuthn level 3"`
}

// UseLink uses a link with the passkey that was made.
type UseLink struct {
	Secret     string          `json:"secret" maxLength:"128"`
	Challenge  string          `json:"challenge" maxLength:"128" doc:"its id"`
	Credential json.RawMessage `json:"credential" doc:"RegistrationResponseJSON of WebAuthn level 3"`
}

// FirstLink makes the link of the first administrator. Only root can call FirstLink, over the Unix
// socket.
func (c *Client) FirstLink(ctx context.Context, operator string) (l MadeLink, err error) {
	return l, c.do(ctx, http.MethodPost, "/v1/operators/first/link", NewLink{Operator: operator}, &l)
}

// NewLink makes a link for a person.
func (c *Client) NewLink(ctx context.Context, n NewLink) (l MadeLink, err error) {
	return l, c.do(ctx, http.MethodPost, "/v1/links", n, &l)
}

// Links lists the links, the newest first.
func (c *Client) Links(ctx context.Context) (all []Link, err error) {
	return all, c.do(ctx, http.MethodGet, "/v1/links", nil, &all)
}

// RemoveLink makes a link worthless.
func (c *Client) RemoveLink(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, "/v1/links/"+url.PathEscape(id), nil, nil)
}
