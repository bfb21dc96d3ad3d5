package admin

import (
	"context"

	"countersign/admin/api"
	"countersign/appliance"
)

func (s *server) refusedHandshakes(context.Context, caller, *none) ([]api.RefusedHandshake, error) {
	return docs(s.Appliance.RefusedHandshakes(), func(r appliance.Refused) api.RefusedHandshake {
		return api.RefusedHandshake{
			From: r.From.String(), Key: r.Key, Peer: r.Peer, Unproven: r.Unproven, Reason: string(r.Reason),
			Text: r.Text, Do: r.Do(), Count: r.Count, First: unix(r.First), Last: unix(r.Last), Seen: r.Seen,
		}
	}), nil
}
