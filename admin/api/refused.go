package api

import (
	"context"
	"net/http"
)

// RefusedHandshake are handshakes that were refused for the same reason, with the same key and from
// the same address. A client can't tell the reasons apart.
type RefusedHandshake struct {
	From     string   `json:"from" doc:"the client's address"`
	Key      string   `json:"key,omitempty" doc:"the client's public key in hex, if message 1 was read"`
	Peer     string   `json:"peer,omitempty" doc:"the peer that is enrolled with the key"`
	Unproven bool     `json:"unproven,omitempty" doc:"any client can claim the key: message 1 did not prove it"`
	Reason   string   `json:"reason"`
	Text     string   `json:"text"`
	Do       string   `json:"do" doc:"what an operator does about it"`
	Count    uint64   `json:"count"`
	First    int64    `json:"first" doc:"Unix seconds"`
	Last     int64    `json:"last" doc:"Unix seconds"`
	Seen     []string `json:"seen,omitempty" doc:"peers whose last session came from the address"`
}

// RefusedHandshakes lists the handshakes refused since the start, the newest first.
func (c *Client) RefusedHandshakes(ctx context.Context) (all []RefusedHandshake, err error) {
	return all, c.do(ctx, http.MethodGet, "/v1/handshakes/refused", nil, &all)
}
