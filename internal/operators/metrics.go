package operators

import (
	"countersign/approval"
	"countersign/internal/meter"
)

// Measure is a source of metrics: the open proposals, the sessions, and the refused proofs.
func (r *Registry) Measure(s *meter.Sample) {
	r.mu.Lock()
	defer r.mu.Unlock()
	open := 0
	for _, rec := range r.proposals {
		if rec.State == Pending && !r.expired(rec) {
			open++
		}
	}
	r.dropExpired()
	s.Set(meter.Proposals, float64(open))
	s.Set(meter.Sessions, float64(len(r.sessions)))
	for purpose, value := range purposes {
		s.Set(meter.ProofsRefused, float64(r.refused[purpose]), value)
	}
}

// purposes has the values of the metric's label, by the purpose of an attempt.
var purposes = map[string]string{
	approval.ForSignIn: "sign-in", approval.ForPresence: "confirmation", approval.ForProposal: "approval",
}
