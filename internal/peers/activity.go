package peers

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign/wire"
)

// ActivityMinutes is the number of minutes of which the answers to a peer are counted.
const ActivityMinutes = 60

// Answers counts answers to a peer.
type Answers struct {
	Signatures, Verifications, Refused, Others uint32
}

// All is the number of answers.
func (a Answers) All() uint64 {
	return uint64(a.Signatures) + uint64(a.Verifications) + uint64(a.Refused) + uint64(a.Others)
}

// Activity has the answers to a peer since the daemon's start, in each of the last ActivityMinutes
// minutes, the present one last.
type Activity struct {
	Name    string
	Since   time.Time // the begin of the first minute
	Minutes [ActivityMinutes]Answers
	Hour    Answers // the sum of Minutes
}

// activity counts in a ring. Its mutex is not the registry's, because each answer counts.
type activity struct {
	mu   sync.Mutex
	ring [ActivityMinutes]Answers
	last int64 // the present minute, in minutes of the Unix time
}

// turn clears the minutes since the last call. A system clock that goes back adds to the last
// minute. The caller holds mu.
func (a *activity) turn(minute int64) *Answers {
	for n := min(minute-a.last, ActivityMinutes); n > 0; n-- {
		a.ring[(minute-n+1)%ActivityMinutes] = Answers{}
	}
	a.last = max(a.last, minute)
	return &a.ring[a.last%ActivityMinutes]
}

// Answered counts an answer to a member at a time: to an operation of package wire, or a refusal.
func (m *Member) Answered(op string, refused bool, now time.Time) {
	m.activity.mu.Lock()
	defer m.activity.mu.Unlock()
	n := m.activity.turn(now.Unix() / 60)
	switch {
	case refused:
		n.Refused++
	case op == wire.OpSign:
		n.Signatures++
	case op == wire.OpVerify:
		n.Verifications++
	default:
		n.Others++
	}
}

func (m *Member) activityAt(now time.Time) Activity {
	m.activity.mu.Lock()
	defer m.activity.mu.Unlock()
	m.activity.turn(now.Unix() / 60)
	first := m.activity.last - ActivityMinutes + 1
	out := Activity{Name: m.Name, Since: time.Unix(60*first, 0)}
	for i := range out.Minutes {
		n := m.activity.ring[(first+int64(i))%ActivityMinutes]
		out.Minutes[i] = n
		out.Hour.Signatures += n.Signatures
		out.Hour.Verifications += n.Verifications
		out.Hour.Refused += n.Refused
		out.Hour.Others += n.Others
	}
	return out
}

// Activity returns the activity of one peer, or manage.ErrNotFound.
func (r *Registry) Activity(name string, now time.Time) (Activity, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	m := r.names[name]
	if m == nil || m.removed {
		return Activity{}, unknown(name)
	}
	return m.activityAt(now), nil
}

// Busiest returns the activity of at most limit peers, those with the most answers first. Peers
// without any are left out.
func (r *Registry) Busiest(limit int, now time.Time) (all []Activity) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, m := range r.names {
		if a := m.activityAt(now); !m.removed && a.Hour.All() > 0 {
			all = append(all, a)
		}
	}
	slices.SortFunc(all, func(x, y Activity) int {
		return cmp.Or(cmp.Compare(y.Hour.All(), x.Hour.All()), strings.Compare(x.Name, y.Name))
	})
	return all[:min(limit, len(all))]
}
