package appliance

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"countersign/wire"
)

// TestNumbersInAnswers pins the numbers that answers to peers have. The numbers of the log count
// the events of all peers, so each place is a decision that docs/THREAT-MODEL.md names (a hostile
// peer). The refusal of a replay names the event of the peer's own request only.
func TestNumbersInAnswers(t *testing.T) {
	const ofTheLog = "counts the events of all peers"
	want := map[string]string{
		"Signed.event":   ofTheLog,
		"Verified.event": ofTheLog,
		"Proven.event":   ofTheLog,
		"Proven.epoch":   ofTheLog,
		"Proven.index":   ofTheLog, // and the tree's size in Proven.checkpoint

		"Signed.version": "of the key", "Signed.timestamp": "of the document", "Signed.expires_at": "of the document",
		"Pong.time": "the clock", "Error.retry_after": "seconds", "Error.timestamp_after": "the time of a restore",
		"Key.version": "of the key", "Acknowledged.version": "of the key",
		"Rotation.version": "of the key", "Rotation.activates_at": "of the key", "Rotation.retires_at": "of the key",
		"Steps.active": "of the key", "Compromise.version": "of the key",
		"Rotation.change": "of the key", "Rotation.cancelled": "of the key",
		"Succession.timestamp": "of the document", "Succession.expires_at": "of the document",
	}
	got := map[string]bool{}
	for _, answer := range []any{
		wire.Pong{}, wire.KeyList{}, wire.Signed{}, wire.Verified{}, wire.Proven{}, wire.Steps{}, wire.Acknowledged{},
		wire.Consistent{}, wire.Rotation{}, wire.Compromise{}, wire.Error{},
	} {
		numbers(reflect.TypeOf(answer), got)
	}
	for field := range got {
		if want[field] == "" {
			t.Errorf("%s: a number that the threat model does not know", field)
		}
	}
	for field := range want {
		if !got[field] {
			t.Errorf("%s is gone", field)
		}
	}
	r := newRig(t)
	r.permits(t, `permit (principal, action == Action::"sign", resource);`)
	req := message(1, "m")
	v := verifyOf(req, r.sign(t, r.shop, req))
	if _, err := r.Verify(t.Context(), r.shop, v); err != nil {
		t.Fatal(err)
	}
	_, own := r.Verify(t.Context(), r.shop, v)
	_, foreign := r.Verify(t.Context(), r.cafe, v)
	_, other := r.Sign(t.Context(), r.cafe, req)
	for err, names := range map[error]bool{own: true, foreign: false, other: false} {
		_, refusal := refuse(err)
		if refusal.Code != wire.CodeReplay || strings.ContainsAny(refusal.Message, "0123456789") != names {
			t.Errorf("%+v, names an event: want %v", refusal, names)
		}
	}
}

// numbers collects the fields of a document of the package wire that have integers, by the names of
// the type and of the field in JSON.
func numbers(of reflect.Type, all map[string]bool) {
	for slices.Contains([]reflect.Kind{reflect.Pointer, reflect.Slice}, of.Kind()) {
		of = of.Elem()
	}
	if of.Kind() != reflect.Struct {
		return
	}
	for i := range of.NumField() {
		f := of.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Type.Kind() >= reflect.Int && f.Type.Kind() <= reflect.Uint64 {
			all[of.Name()+"."+name] = true
		} else if of != f.Type {
			numbers(f.Type, all)
		}
	}
}
