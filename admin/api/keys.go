package api

import (
	"context"
	"net/http"
	"net/url"

	"countersign/wire"
)

// Line has the settings of a line of keys, and the state of its rotation. Durations are seconds,
// times Unix seconds; 0: none.
type Line struct {
	Settings
	// NextRotation is the time of the next rotation, as far as known. NextReason is age, uses or
	// window; announced; or requested: then the appliance tries to announce it.
	NextRotation int64  `json:"next_rotation"`
	NextReason   string `json:"next_reason,omitempty"`
	// Rotation is the newest announced version, as peers see it. Acknowledged and Unacknowledged
	// list the peers that have acknowledged that version, and those that have not.
	Rotation       *wire.Rotation `json:"rotation,omitempty"`
	Acknowledged   []string       `json:"acknowledged"`
	Unacknowledged []string       `json:"unacknowledged"`
	Compromises    []Compromise   `json:"compromises"`
	// Requested is what an operator has asked for, and what could not be announced yet.
	Requested *Requested `json:"requested,omitempty"`
	// Recovery is the recovery successor, with which the line goes on after the loss of its token.
	Recovery  *Recovery `json:"recovery,omitempty"`
	Confirmed int64     `json:"confirmed" doc:"until when an operator's confirmation lets it sign"`
}

// Requested is a rotation that an operator has asked for. Times are Unix seconds.
type Requested struct {
	By        string `json:"by"`
	Asked     int64  `json:"asked"`
	Activates int64  `json:"activates"`
	Until     int64  `json:"until"` // tried until then
	// Ended is the reason why the appliance has given the rotation up; empty: it is tried again.
	Ended string `json:"ended,omitempty"`
}

// Recovery is the recovery successor of a line.
type Recovery struct {
	Version    uint32 `json:"version"`
	Token      string `json:"token"`
	Absent     bool   `json:"absent" doc:"the configuration does not have the token: it may lie in a safe"`
	Created    int64  `json:"created"` // Unix seconds
	Commitment string `json:"commitment" doc:"of the line, for peers to pin (hex)"`
}

// Compromise is a compromised version, with the peers that have not acknowledged the compromise.
// The appliance tells these peers at each of their connections.
type Compromise struct {
	Version        uint32   `json:"version"`
	Unacknowledged []string `json:"unacknowledged"`
}

// Settings are the settings of a line of keys: its rotation, and the presence of an operator.
type Settings struct {
	// Every is the age at which a version is rotated, in seconds: an hour to ten years. 0 is no
	// rotation by age.
	Every int64 `json:"every" minimum:"0"`
	// Window is a cron expression of five fields, UTC. The key is rotated only within an hour after
	// a tick. Without Every and Uses, the key is rotated at each tick, and at most once an hour.
	Window   string `json:"window" maxLength:"100"`
	Uses     uint64 `json:"uses" doc:"signatures after which a version is rotated; 0: however many"`
	Announce int64  `json:"announce" minimum:"0" doc:"seconds between the announcement of a version and its activation"`
	// Grace is the time for which the previous version is accepted, in seconds. 0 is the maximum
	// lifetime of a document.
	Grace int64 `json:"grace" minimum:"0"`
	// Acknowledge lists peers. When all of them have acknowledged a rotation, the previous version
	// is archived before the end of its grace time. "all" means each peer. An empty list means
	// never.
	Acknowledge []string `json:"acknowledge" maxItems:"100"`
	// Presence is the time for which an operator's confirmation lets the key sign, in seconds. 0
	// means that no confirmation is needed. A smaller value needs an approved proposal: key
	// presence.
	Presence int64 `json:"presence" minimum:"0" maximum:"86400"`
}

// Change changes settings. A nil field leaves the setting as it is.
type Change struct {
	Every       *int64    `json:"every,omitempty" minimum:"0"`
	Window      *string   `json:"window,omitempty" maxLength:"100"`
	Uses        *uint64   `json:"uses,omitempty"`
	Announce    *int64    `json:"announce,omitempty" minimum:"0"`
	Grace       *int64    `json:"grace,omitempty" minimum:"0"`
	Acknowledge *[]string `json:"acknowledge,omitempty" maxItems:"100"`
	Presence    *int64    `json:"presence,omitempty" minimum:"0" maximum:"86400"`
}

// Rotate asks for the next version of a key. At the most one of At, In and Now is set. Without all
// of them, the version is active at the end of the line's time of announcement.
type Rotate struct {
	// At is the time of the activation, in Unix seconds; a time in the past is refused.
	At  int64 `json:"at,omitempty" minimum:"0" maximum:"253402300799"`
	In  int64 `json:"in,omitempty" minimum:"0" maximum:"31622400" doc:"seconds from now, by the appliance's clock"`
	Now bool  `json:"now,omitempty" doc:"at once"`
	// Within is the time after the activation's time for which the rotation still makes sense, in
	// seconds: a rotation that fails is tried again until then. 0 is an hour.
	Within int64 `json:"within,omitempty" minimum:"0" maximum:"2592000"`
}

// Confirmed is the answer to a confirmation of presence.
type Confirmed struct {
	Until int64 `json:"until"` // the key may sign before; Unix seconds
}

func keyPath(name, rest string) string { return "/v1/keys/" + url.PathEscape(name) + rest }

// Line returns the settings of a key and the state of its rotation.
func (c *Client) Line(ctx context.Context, name string) (l Line, err error) {
	return l, c.do(ctx, http.MethodGet, keyPath(name, "/line"), nil, &l)
}

// SetLine changes the settings of a key.
func (c *Client) SetLine(ctx context.Context, name string, change Change) (l Line, err error) {
	return l, c.do(ctx, http.MethodPatch, keyPath(name, "/line"), change, &l)
}

// RotateKey announces the next version of a key, and returns that version. An earlier announcement
// is replaced.
func (c *Client) RotateKey(ctx context.Context, name string, r Rotate) (k Key, err error) {
	return k, c.do(ctx, http.MethodPost, keyPath(name, "/rotate"), r, &k)
}

// CancelRotation calls off the announced or requested rotation of a key.
func (c *Client) CancelRotation(ctx context.Context, name string) (l Line, err error) {
	return l, c.do(ctx, http.MethodPost, keyPath(name, "/rotate/cancel"), nil, &l)
}

// ConfirmKey lets a key sign for its time of presence. The proof is over a challenge for that key.
func (c *Client) ConfirmKey(ctx context.Context, name string, p Proven) (done Confirmed, err error) {
	return done, c.do(ctx, http.MethodPost, keyPath(name, "/confirm"), p, &done)
}

// AuthorizeNoiseKey has the identity key sign for the active Noise key.
func (c *Client) AuthorizeNoiseKey(ctx context.Context) (k Key, err error) {
	return k, c.do(ctx, http.MethodPost, "/v1/noise-key/authorize", nil, &k)
}
