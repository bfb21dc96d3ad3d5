package appliance

import (
	"errors"
	"regexp"
	"slices"
	"strings"
	"testing"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/wire"
)

// eventsOf returns the events that a search for the id of a request finds.
func (e *edge) eventsOf(request string) (all []audit.Event) {
	e.t.Helper()
	if err := e.Find(ledger.Query{Request: request}, ledger.Span{}, func(_ uint64, event audit.Event) bool {
		all = append(all, event)
		return true
	}); err != nil {
		e.t.Fatal(err)
	}
	return all
}

// TestRequestID follows the ids of requests from the answer to the audit log and to the daemon's
// log: of a signature, its repetition, refusals, messages that are no requests, and the items of a
// batch.
func TestRequestID(t *testing.T) {
	e := newEdge(t, nil)
	conn := e.session("127.0.0.1", e.shop)
	seen := map[string]bool{}
	ask := func(document string) wire.Answer {
		t.Helper()
		a, err := exchange(conn, document)
		if err != nil {
			t.Fatal(err)
		}
		if !regexp.MustCompile(`^[a-z2-7]{16}$`).MatchString(a.Request) || seen[a.Request] {
			t.Errorf("%.60s: the id %q has another form, or came before", document, a.Request)
		}
		seen[a.Request] = true
		return a
	}
	// The outcome comes with a later commit, and the line after the answer's making.
	finds := func(request string, want ...audit.Type) {
		t.Helper()
		eventually(t, "the events of "+request, func() bool {
			var types []audit.Type
			for _, each := range e.eventsOf(request) {
				types = append(types, each.Type)
			}
			return slices.Equal(types, want)
		})
	}
	logs := func(request, message string) {
		t.Helper()
		line := regexp.MustCompile("(?m)^.*msg=" + message + " .*request=" + regexp.QuoteMeta(request) + " .*$")
		eventually(t, "a line of "+request, func() bool { return line.MatchString(e.log.String()) })
	}

	first := ask(encoded(numbered(1, "one")))
	finds(first.Request, audit.SignatureAdmitted, audit.SignatureCreated)
	logs(first.Request, "served")

	again := ask(encoded(numbered(1, "one")))
	var signed wire.Signed
	if err := again.Into(&signed); err != nil || !signed.Repeated {
		t.Fatalf("%+v, %v", signed, err)
	}
	logs(again.Request, "served")
	finds(again.Request) // the event of the result has the first id
	only := ledger.Span{From: signed.Event, Before: signed.Event + 1}
	e.Find(ledger.Query{}, only, func(_ uint64, event audit.Event) bool {
		if event.Actor.Request != first.Request {
			t.Errorf("the admission has the id %q, want %q", event.Actor.Request, first.Request)
		}
		return true
	})

	replay := ask(encoded(numbered(1, "two")))
	finds(replay.Request, audit.ReplayRefused)
	logs(replay.Request, "refused")
	var refusal *wire.Error
	err := replay.Into(new(wire.Signed))
	if !errors.As(err, &refusal) || !strings.Contains(err.Error(), replay.Request) {
		t.Errorf("the refusal does not say its id: %v", err)
	}

	malformed := ask(`{"id":"1","op":"sign"`)
	finds(malformed.Request)
	logs(malformed.Request, "refused")

	batch := ask(batchOf(numbered(2, "a"), numbered(1, "three"), numbered(3, "b")))
	finds(batch.Request+".0", audit.SignatureAdmitted, audit.SignatureCreated)
	finds(batch.Request+".1", audit.ReplayRefused)
	logs(batch.Request+".1", "refused")
	finds(batch.Request+".2", audit.SignatureAdmitted, audit.SignatureCreated)
	logs(batch.Request+".2", "served")
	if n := len(e.eventsOf(batch.Request)); n != 5 {
		t.Errorf("the id of the batch finds %d events, want 5", n)
	}

	e.restart()
	finds(first.Request, audit.SignatureAdmitted, audit.SignatureCreated)
	id := regexp.MustCompile(` request=[a-z2-7]{16}`)
	for _, line := range strings.Split(e.log.String(), "\n") {
		for _, message := range []string{"served", "refused", `"not served"`, `"an answer is withheld"`} {
			if strings.Contains(line, "msg="+message+" ") && !id.MatchString(line) {
				t.Errorf("no id: %s", line)
			}
		}
	}
}
