package audit

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// ruleChecker checks the rules of the ledger over the events of a log: no nonce is spent twice
// before its expiry, each outcome has its admission, and each epoch is dropped once.
//
// Expired nonces are forgotten, so that the memory does not grow with the log. The time for the
// expiry is the latest time in the log so far, less one hour. The log's time can go back, and a
// later event can then spend a nonce that has been forgotten and whose expiry lies ahead.
// regressions has such events. A second reading takes the regressions of the first as known and
// forgets no nonce too early.
type ruleChecker struct {
	first  uint64 // number of the first event that retention has left
	nonces map[fingerprint]spentNonce
	byHour map[int64][]fingerprint // nonces by the hour of their expiry
	open   map[uint64]admission    // by the number of the event
	drops  map[uint32]drop         // by the epoch

	now         int64        // nonces that expired before this hour are forgotten
	latest      int64        // the latest hour of an event
	regressions []regression // events of this reading that spend nonces before now
	known       []regression // regressions of the previous reading, from the present event on

	signatures uint64
	unsettled  uint64
}

// fingerprint is a truncated SHA-256 of texts.
type fingerprint [16]byte

// admission is an admission that may get an outcome. A failed admission may get another outcome:
// the identical request may succeed later.
type admission struct {
	owner           fingerprint
	created, failed Type // types of the possible outcomes
	settled         bool // an outcome is in the log
}

// spentNonce has the event that spent a nonce, and the nonce's expiry in hours since 1970.
type spentNonce struct {
	event uint64
	hour  int64
}

// drop is an event about a dropped epoch.
type drop struct {
	event uint64
	root  string // root of the epoch, in base64
}

// regression is an event at which the log's time has gone back, and the hour of the event's time.
type regression struct {
	event uint64
	hour  int64
}

func newRuleChecker(known []regression) *ruleChecker {
	return &ruleChecker{
		nonces: map[fingerprint]spentNonce{}, byHour: map[int64][]fingerprint{},
		open: map[uint64]admission{}, drops: map[uint32]drop{}, known: known,
	}
}

const (
	hourMS = 3_600_000
	// maxLifetime is an upper bound for the lifetime of a document, in seconds: 400 days.
	maxLifetime = 400 * 24 * 3600
)

// check checks the next event.
func (r *ruleChecker) check(index uint64, e Event) error {
	hour := e.TimeMS / hourMS
	r.latest = max(r.latest, hour)
	for len(r.known) > 0 && r.known[0].event < index {
		r.known = r.known[1:]
	}
	now := r.latest - 1
	if len(r.known) > 0 { // the hours increase: no later event goes back further than the first one
		now = min(now, r.known[0].hour)
	}
	r.expire(now)
	switch e.Type.Kind() {
	case Admission, Spent:
		if hour < r.now {
			// regressions keeps increasing hours: an earlier event with a later hour is redundant.
			for len(r.regressions) > 0 && r.regressions[len(r.regressions)-1].hour >= hour {
				r.regressions = r.regressions[:len(r.regressions)-1]
			}
			r.regressions = append(r.regressions, regression{index, hour})
		}
		return r.spend(index, e)
	case Outcome:
		return r.settle(e)
	}
	if text, ok := strings.CutPrefix(e.Resource, "epoch/"); ok && e.Type == RetentionApplied {
		epoch, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return fmt.Errorf("%s of epoch %q, want a number", e.Type, text)
		}
		if d, twice := r.drops[uint32(epoch)]; twice {
			return fmt.Errorf("epoch %d was dropped by event %d", epoch, d.event)
		}
		r.drops[uint32(epoch)] = drop{index, e.Metadata["root"]}
	}
	return nil
}

// expire forgets the nonces that expired before an hour. Such a nonce may be spent again.
func (r *ruleChecker) expire(now int64) {
	if now <= r.now {
		return
	}
	r.now = now
	for hour, keys := range r.byHour {
		if hour >= now {
			continue
		}
		for _, key := range keys {
			if r.nonces[key].hour == hour { // otherwise the nonce was spent again, with a later expiry
				delete(r.nonces, key)
			}
		}
		delete(r.byHour, hour)
	}
}

// hashTexts returns the fingerprint of a list of texts. Each text is preceded by its length, so
// that ("ab", "c") and ("a", "bc") have different fingerprints.
func hashTexts(texts ...string) fingerprint {
	var b []byte
	for _, t := range texts {
		b = append(binary.AppendUvarint(b, uint64(len(t))), t...)
	}
	h := sha256.Sum256(b)
	return fingerprint(h[:16])
}

// owner returns the fingerprint of an event's actor and resource. An outcome has the owner of its
// admission: the same peer by name, since a repetition may come by another key of the peer.
func owner(e Event) fingerprint {
	peer := ""
	if e.Actor.Kind == "peer" {
		peer = e.Actor.Name
	}
	return hashTexts(peer, e.Resource)
}

// isHash reports whether a text is 32 bytes in lower-case hex.
func isHash(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return len(s) == 64
}

// spend checks an event that spends a nonce.
func (r *ruleChecker) spend(index uint64, e Event) error {
	expires, err := strconv.ParseInt(e.Metadata["expires_at"], 10, 64)
	if err != nil || !isHash(e.Metadata["nonce"]) || !isHash(e.Metadata["digest"]) {
		return fmt.Errorf("%s without nonce, digest and expires_at", e.Type)
	}
	// An expiry of up to one hour ago is no fault: the clock may have been set.
	if now := e.TimeMS / 1000; expires < now-3600 || expires > now+maxLifetime {
		return fmt.Errorf("%s at %d of a document that expires at %d, want %d to %d",
			e.Type, now, expires, now-3600, now+maxLifetime)
	}
	scope := "signer " + e.Metadata["signer"]
	admitted, created, failed := OfDocument(e.Metadata["transcript"])
	if e.Type.Kind() == Admission {
		name, version, _ := strings.Cut(e.Resource, "/") // the scope has no version: all versions share the nonces
		if scope = "key " + name; name == "" || version == "" {
			return fmt.Errorf("%s of resource %q, want KEY/VERSION", e.Type, e.Resource)
		}
		if e.Type != admitted || e.Outcome != "ok" {
			return fmt.Errorf("%s with outcome %q of a document of type %q, want %s with outcome \"ok\"",
				e.Type, e.Outcome, e.Metadata["transcript"], admitted)
		}
	} else if !isHash(e.Metadata["signer"]) {
		return fmt.Errorf("%s without a signer", e.Type)
	}
	key := hashTexts(scope, e.Metadata["nonce"])
	if before, spent := r.nonces[key]; spent && before.hour >= e.TimeMS/hourMS {
		return fmt.Errorf("its nonce was spent by event %d", before.event)
	}
	hour := expires / 3600
	r.nonces[key] = spentNonce{index, hour}
	r.byHour[hour] = append(r.byHour[hour], key)
	if e.Type.Kind() == Admission {
		r.open[index] = admission{owner(e), created, failed, false}
		r.unsettled++
	}
	return nil
}

// settle checks an outcome against its admission.
func (r *ruleChecker) settle(e Event) error {
	number, err := strconv.ParseUint(e.Metadata["admission"], 10, 64)
	if err != nil {
		return fmt.Errorf("%s names no admission", e.Type)
	}
	if number < r.first {
		return nil // the admission was dropped with its epoch
	}
	a, ok := r.open[number]
	switch {
	case !ok:
		return fmt.Errorf("%s: event %d is not an admission without a signature", e.Type, number)
	case a.owner != owner(e):
		return fmt.Errorf("%s: event %d is the admission of another peer or key", e.Type, number)
	case e.Type != a.created && e.Type != a.failed || (e.Type == a.created) != (e.Outcome == "ok"):
		return fmt.Errorf("%s with outcome %q: event %d can have %s with outcome \"ok\", or %s",
			e.Type, e.Outcome, number, a.created, a.failed)
	}
	if !a.settled {
		r.unsettled--
	}
	if e.Type == a.created {
		r.signatures++
		delete(r.open, number)
	} else {
		a.settled = true
		r.open[number] = a
	}
	return nil
}
