package keyring

import (
	"strings"
	"time"

	"countersign/internal/meter"
)

// Measure is a source of metrics: the versions by state, the rotations, and the callers that wait
// for a token.
func (r *Ring) Measure(s *meter.Sample) {
	states := map[string]int{}
	rotations := map[string]int{}
	now := time.Now()
	for _, k := range r.All() {
		states[string(k.State)]++
		switch {
		case k.State == Active && rotates(k.Name):
			if due, _, _ := k.due(r.settingsOf(k.Name).Plan, now); due {
				rotations["due"]++
			}
		case k.State == Pending && k.Announced() && now.Before(k.Activates):
			rotations["announced"]++
		case k.State == Pending && k.Announced():
			rotations["overdue"]++
		}
	}
	r.mu.RLock()
	rotations["failing"] = len(r.retries)
	s.Set(meter.RotationsFailed, float64(r.failed))
	r.mu.RUnlock()
	s.SetAll(meter.Keys, states)
	s.SetAll(meter.Rotations, rotations)
	for token, turns := range r.turns {
		MeasureLanes(s, token, turns.Waiting())
	}
}

// MeasureLanes sets the numbers of callers that wait in a queue. The peers' lanes share one count,
// so that no series has a peer's name.
func MeasureLanes(s *meter.Sample, queue string, waiting map[string]int) {
	callers, peers := map[string]int{"own": 0, "handshakes": 0, "peers": 0}, 0
	for lane, n := range waiting {
		switch {
		case lane == string(Own):
			callers["own"] += n
		case strings.HasPrefix(lane, string(LaneOf(""))):
			callers["peers"] += n
			peers++
		default:
			callers[lane] += n
		}
	}
	for lane, n := range callers {
		s.Set(meter.Waiting, float64(n), queue, lane)
	}
	s.Set(meter.PeersWaiting, float64(peers), queue)
}
