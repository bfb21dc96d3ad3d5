package api

import (
	"context"
	"fmt"
	"net/http"
	"net/url"

	"countersign/wire"
)

// Line is how a key is rotated, and how that goes. Durations are seconds, times Unix seconds, 0 where there is none.
type Line struct {
	Settings
	// NextRotation is when it is rotated by itself, as far as a clock can tell, and why: age, uses or window.
	NextRotation int64  `json:"next_rotation"`
	NextReason   string `json:"next_reason,omitempty"`
	// Rotation is what peers are told of: the newest version that was announced. Unacknowledged are the peers that have not acknowledged it.
	Rotation       *wire.Rotation `json:"rotation,omitempty"`
	Unacknowledged []string       `json:"unacknowledged"`
	Confirmed      int64          `json:"confirmed" doc:"until when an operator's confirmation lets it sign"`
}

// Settings say how a key is rotated, and whether an operator must confirm its use.
type Settings struct {
	Every       int64    `json:"every" minimum:"0" doc:"seconds after which a version is rotated: an hour to ten years; 0: not by age"`
	Window      string   `json:"window" maxLength:"100" doc:"cron, five fields, UTC: it is rotated within an hour of a tick only; alone: at each tick"`
	Uses        uint64   `json:"uses" doc:"signatures after which a version is rotated; 0: however many"`
	Announce    int64    `json:"announce" minimum:"0" doc:"seconds between the announcement of a version and its activation"`
	Grace       int64    `json:"grace" minimum:"0" doc:"seconds for which the version before is accepted; 0: as long as a document may live"`
	Acknowledge []string `json:"acknowledge" maxItems:"100" doc:"peers that must have acknowledged a rotation so that the version before is archived ahead of its grace time; all: each one; none: it is not"`
	Presence    int64    `json:"presence" minimum:"0" maximum:"86400" doc:"seconds for which an operator's confirmation lets it sign; 0: none is needed. Less of it needs an approved proposal: key presence"`
}

// Change changes settings: those that are there.
type Change struct {
	Every       *int64    `json:"every,omitempty" minimum:"0"`
	Window      *string   `json:"window,omitempty" maxLength:"100"`
	Uses        *uint64   `json:"uses,omitempty"`
	Announce    *int64    `json:"announce,omitempty" minimum:"0"`
	Grace       *int64    `json:"grace,omitempty" minimum:"0"`
	Acknowledge *[]string `json:"acknowledge,omitempty" maxItems:"100"`
	Presence    *int64    `json:"presence,omitempty" minimum:"0" maximum:"86400"`
}

// Rotate asks for the next version.
type Rotate struct {
	At int64 `json:"at,omitempty" minimum:"0" maximum:"253402300799" doc:"when it is to be active, Unix seconds; 0: after the line's time of announcement"`
	// Now goes before At.
	Now bool `json:"now,omitempty" doc:"at once"`
}

// Confirmed says until when a key may sign.
type Confirmed struct {
	Until int64 `json:"until"` // Unix seconds
}

func keyPath(name, rest string) string { return "/v1/keys/" + url.PathEscape(name) + rest }

// Line says how a key is rotated.
func (c *Client) Line(ctx context.Context, name string) (l Line, err error) {
	return l, c.do(ctx, http.MethodGet, keyPath(name, "/line"), nil, &l)
}

func (c *Client) SetLine(ctx context.Context, name string, change Change) (l Line, err error) {
	return l, c.do(ctx, http.MethodPatch, keyPath(name, "/line"), change, &l)
}

// RotateKey announces the next version of a key, and returns it.
func (c *Client) RotateKey(ctx context.Context, name string, r Rotate) (k Key, err error) {
	return k, c.do(ctx, http.MethodPost, keyPath(name, "/rotate"), r, &k)
}

// ArchiveKey takes a version out of use that is verify-only, ahead of its time.
func (c *Client) ArchiveKey(ctx context.Context, name string, version uint32) error {
	return c.do(ctx, http.MethodPost, keyPath(name, fmt.Sprintf("/versions/%d/archive", version)), nil, nil)
}

// ConfirmKey lets a key sign for its time of presence, by a proof over a challenge for it.
func (c *Client) ConfirmKey(ctx context.Context, name string, p Proven) (done Confirmed, err error) {
	return done, c.do(ctx, http.MethodPost, keyPath(name, "/confirm"), p, &done)
}

// AuthorizeNoiseKey has the identity's key sign for the Noise key that is in use.
func (c *Client) AuthorizeNoiseKey(ctx context.Context) (k Key, err error) {
	return k, c.do(ctx, http.MethodPost, "/v1/noise-key/authorize", nil, &k)
}
