package operators

import "countersign/internal/meter"

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
	s.Set(meter.ProofsRefused, float64(r.refused))
}
