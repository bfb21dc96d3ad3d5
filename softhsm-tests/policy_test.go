package softhsmtests

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/client"

	"go.etcd.io/bbolt"
)

// threeADay has its rules in the lines 2 and 5, which TestPolicyCommands looks for.
const threeADay = `// For tests; three a day.
@id("three")
permit (principal == Peer::"demo", action == Action::"sign", resource == Key::"payments")
when { context.used.peer.day.signatures <= 3 };
@id("no-login") forbid (principal, action, resource)
when { context has message_context && context.message_context == "login" };
`

// TestPolicyCommands runs the policy commands of an operator: explain a decision, try out a change,
// activate the change, and verify exported decisions on another machine.
func TestPolicyCommands(t *testing.T) {
	s := newSystem(t)
	s.write("policy.cedar", threeADay)
	p := s.serve()
	s.enrol()
	c := s.dial()
	var signed []uint64
	for i := range 3 {
		got, err := c.Sign(t.Context(), "payments", message(fmt.Sprintf("%04d", i)))
		if err != nil {
			t.Fatal(err)
		}
		signed = append(signed, got.Event)
	}
	login := client.Document{Type: "message-v1", Payload: []byte(`{"context":"login","message":"AA"}`)}
	for _, d := range []client.Document{message("four"), login} {
		var refusal *client.Error
		if _, err := c.Sign(t.Context(), "payments", d); !errors.As(err, &refusal) || refusal.Code != "denied" {
			t.Fatal(err)
		}
	}
	var denied []uint64
	for _, e := range s.events() {
		if e.Type == "SignatureRejected" {
			denied = append(denied, e.Index)
		}
	}
	if len(denied) != 2 {
		t.Fatalf("%v", denied)
	}
	says := func(out string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("%q is not in\n%s", w, out)
			}
		}
	}
	number := func(n uint64) string { return strconv.FormatUint(n, 10) }
	fails := func(status int, want string, args ...string) {
		t.Helper()
		out, errOut, code := s.cli("", args...)
		if code != status || !strings.Contains(errOut, want) || strings.Count(errOut, "\n") > 2 {
			t.Errorf("%s: %d, %s%s; want %d, %s", strings.Join(args, " "), code, out, errOut, status, want)
		}
	}

	says(s.must("policy", "explain", number(signed[2])),
		"by line 2", `"demo"`, "used.peer.day", "3 signatures", "replayed", "the same in the audit log")
	says(s.must("policy", "explain", number(denied[0])), "no rule permits it", "4 signatures")
	says(s.must("policy", "explain", number(denied[1])), "by line 5", "login")
	var why struct {
		Record struct{ Allowed bool }
		Rules  []struct {
			Line int
			ID   string
		}
		Replayed bool
	}
	err := json.Unmarshal([]byte(s.must("policy", "explain", "--json", number(denied[1]))), &why)
	if err != nil || why.Record.Allowed || len(why.Rules) != 1 || why.Rules[0].ID != "no-login" || !why.Replayed {
		t.Errorf("%+v, %v", why, err)
	}
	// The next event is an outcome: the error text names the event of the admission.
	fails(1, "policy explain "+number(signed[0]), "policy", "explain", number(signed[0]+1))
	fails(1, "has no decision: policy was not asked", "policy", "explain", "1")
	fails(1, "there is no event 100000", "policy", "explain", "100000")
	fails(2, "is not the number of an event", "policy", "explain", "first")
	fails(2, "--since", "policy", "diff", "policy.cedar", "--since", "soon")
	fails(1, "no such file", "policy", "check", "none.cedar")
	fails(3, "none.sock", "policy", "explain", "1", "--socket", "none.sock")

	// A change of the policy is tried out: policy diff replays the recorded decisions.
	s.write("stricter.cedar", strings.Replace(threeADay, "<= 3", "<= 1", 1))
	s.write("looser.cedar", strings.Replace(threeADay, "<= 3", "<= 4", 1))
	s.write("broken.cedar", strings.Replace(threeADay, "signatures <=", "signatrues <=", 1))
	changes := func(args ...string) (events []uint64) {
		t.Helper()
		var diff struct {
			Decisions int
			Changes   []struct {
				Event   uint64
				Was, Is string
			}
		}
		out := s.must(append([]string{"policy", "diff", "--json"}, args...)...)
		if err := json.Unmarshal([]byte(out), &diff); err != nil || diff.Decisions != 5 {
			t.Fatalf("%+v, %v", diff, err)
		}
		for _, c := range diff.Changes {
			events = append(events, c.Event)
		}
		return events
	}
	same := func(got, want []uint64) {
		t.Helper()
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%v would change, want %v", got, want)
		}
	}
	same(changes("policy.cedar"), nil)
	same(changes("stricter.cedar"), signed[1:])
	same(changes("looser.cedar", "--since", "1h"), denied[:1])
	says(s.must("policy", "diff", "stricter.cedar", "--since", "30d"),
		"5 decisions replayed, 2 would change", "no rule permits it")
	fails(1, "broken.cedar:2: ", "policy", "diff", "broken.cedar")
	fails(1, "broken.cedar:2: ", "policy", "check", "broken.cedar")
	says(s.must("policy", "check", "looser.cedar"), "2 rules")
	const typo = `forbid (principal, action, resource) when { context has mesage_context && context.hour < 8 };`
	s.write("typo.cedar", typo)
	fails(1, "typo.cedar:1: context has mesage_context can never hold", "policy", "check", "typo.cedar")
	s.write("names.cedar", `permit (principal == Peer::"demmo", action, resource == Key::"payments");`)
	says(s.must("policy", "check", "names.cedar", "--names"), `line 1: there is no Peer::"demmo"`)
	says(s.must("policy", "schema"), "message_context?: String")
	s.write("cases.csv", "name,expect,peer,key,used.peer.day.signatures\n"+
		"three,allow,demo,payments,3\nfour,deny,demo,payments,4\n")
	says(s.must("policy", "test", "policy.cedar", "cases.csv"), "2 cases, 0 wrong", "line 2 three")
	fails(1, "1 of 2 are wrong", "policy", "test", "looser.cedar", "cases.csv")
	s.write("cases.csv", "name,expect,peer,key\nthree,maybe,demo,payments\n")
	fails(1, "cases.csv:2: expect is allow or deny", "policy", "test", "looser.cedar", "cases.csv")

	// Another machine has a file of exported decisions and no admin socket.
	s.write("records", s.must("policy", "export"))
	elsewhere := []string{"--records", "records", "--socket", "none.sock"}
	says(s.must(append([]string{"policy", "explain", number(denied[1])}, elsewhere...)...),
		"by line 5", "metadata.inputs")
	same(changes(append([]string{"stricter.cedar"}, elsewhere...)...), signed[1:])
	s.write("other", `{"cases":[]}`)
	fails(1, "other: it is not what policy export writes", "policy", "diff", "policy.cedar", "--records", "other")
	fails(1, "records has no decision of event 1", append([]string{"policy", "explain", "1"}, elsewhere...)...)
	exported := s.must("policy", "export")
	for what, c := range map[string][2]string{
		"input":    {`\"message_context\":\"login\"`, `\"message_context\":\"logout\"`},
		"decision": {`\"allowed\":false`, `\"allowed\":true`},
		"policy":   {"signatures <= 3", "signatures <= 9"},
		"form":     {`{\"policy\"`, `{\"x\":1,\"policy\"`},
	} {
		changed := strings.ReplaceAll(exported, c[0], c[1])
		if c[0] == "signatures <= 3" {
			changed = strings.ReplaceAll(exported, `signatures \u003c= 3`, `signatures \u003c= 9`)
		}
		if s.write("records", changed); changed == exported {
			t.Fatalf("%s: nothing is changed in %s", what, exported)
		}
		if out, _, code := s.cli("", append([]string{"policy", "diff", "policy.cedar"}, elsewhere...)...); code != 1 {
			t.Errorf("a changed %s is not noticed: %s", what, out)
		}
	}

	// The policy is activated.
	fails(1, "in force already, as version 1", "admin", "policy", "reload")
	says(s.must("admin", "policy", "list"), "VERSION", "1 ")
	s.write("policy.cedar", strings.Replace(threeADay, "signatures <=", "signatrues <=", 1))
	before := len(s.events())
	fails(1, "policy.cedar:2: ", "admin", "policy", "reload")
	s.write("policy.cedar", threeADay+typo)
	fails(1, "can never hold", "admin", "policy", "reload")
	if _, err := c.Sign(t.Context(), "payments", message("stillfourAAA")); err == nil {
		t.Error("a broken policy has changed something")
	}
	if after := s.events(); len(after) != before+1 || after[before].Type != "SignatureRejected" {
		t.Errorf("%v", after[before:])
	}
	s.write("policy.cedar", strings.Replace(threeADay, "<= 3", "<= 1000", 1)+
		`permit (principal, action, resource == Key::"x");`)
	out, errOut, code := s.cli("", "admin", "policy", "reload")
	if code != 0 || !strings.Contains(out, ": done") || !strings.Contains(errOut, `there is no Key::"x"`) {
		t.Errorf("%d: %s%s", code, out, errOut)
	}
	if _, err := c.Sign(t.Context(), "payments", message("fouratlastAA")); err != nil {
		t.Error(err)
	}
	if s.must("admin", "policy", "show", "1") != threeADay {
		t.Error("version 1 has another text")
	}
	fails(1, "policy version", "admin", "policy", "show", "3")
	fails(2, "is not a version", "admin", "policy", "show", "last")
	activated := slices.DeleteFunc(s.events()[before:], func(e api.Event) bool { return e.Type != "PolicyChanged" })
	if len(activated) != 1 || activated[0].Metadata["version"] != "2" || activated[0].Actor.Name != "root" ||
		activated[0].Actor.Proposal == 0 {
		t.Errorf("%+v", activated)
	}

	// An attacker with access to the disk changes an input of a recorded decision.
	p.stop()
	db, err := bbolt.Open(s.path("ledger.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Update(func(tx *bbolt.Tx) error {
		b, key := tx.Bucket([]byte("decisions")), binary.BigEndian.AppendUint64(nil, signed[0])
		return b.Put(key, bytes.Replace(b.Get(key), []byte(`"lifetime":3600`), []byte(`"lifetime":3601`), 1))
	}); err != nil {
		t.Fatal(err)
	}
	db.Close()
	s.serve()
	fails(1, "one of them was changed", "policy", "explain", number(signed[0]))
	fails(1, "one of them was changed", "policy", "diff", s.path("policy.cedar"))
	fails(1, "one of them was changed", "policy", "export")
	says(s.must("policy", "explain", number(signed[1])), "the same in the audit log")
}

// TestLongTextOfADecision has policy judge a long endpoint. The record has SHA-256 and length of
// the text, a small ledger holds many denials, and the decision is explained with the text of the
// document only.
func TestLongTextOfADecision(t *testing.T) {
	s := newSystem(t)
	s.write("policy.cedar", `@id("pays-here") permit (principal, action, resource)
when { context has endpoint && context.endpoint like "https://pay.example/*" };`)
	p := s.serve()
	s.enrol()
	c := s.dial()
	keys, err := c.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var payer string
	for _, k := range keys {
		if k.Name == "payments" && k.State == "active" {
			payer = fmt.Sprintf("%x", k.PublicKey)
		}
	}
	pay := func(endpoint string) (*client.Signed, error) {
		payload, err := json.Marshal(map[string]string{
			"payer": payer, "amount": "1", "currency": "SAT", "method": "m", "endpoint": "@",
		})
		if err != nil {
			t.Fatal(err)
		}
		return c.Sign(t.Context(), "payments", client.Document{
			Type: "payment-request-v1", Payload: bytes.Replace(payload, []byte("@"), []byte(endpoint), 1),
		})
	}
	endpoint := "https://pay.example/" + strings.Repeat("<", 64_800)
	signed, err := pay(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(s.path("ledger.db"))
	if err != nil {
		t.Fatal(err)
	}
	const denials = 100
	for range denials {
		var refusal *client.Error
		if _, err := pay(strings.Repeat("<", 64_800)); !errors.As(err, &refusal) || refusal.Code != "denied" {
			t.Fatal(err)
		}
	}
	number := strconv.FormatUint(signed.Event, 10)
	_, errOut, code := s.cli("", "policy", "explain", number)
	if code != 1 || !strings.Contains(errOut, "--text endpoint=FILE") {
		t.Errorf("%d: %s", code, errOut)
	}
	s.write("endpoint.txt", endpoint)
	out := s.must("policy", "explain", number, "--text", "endpoint=endpoint.txt")
	if !strings.Contains(out, "pays-here") ||
		!strings.Contains(out, `"bytes":64820`) || !strings.Contains(out, "the same in the audit log") {
		t.Error(out)
	}
	s.write("endpoint.txt", endpoint+"\n")
	if _, errOut, code := s.cli("", "policy", "explain", number, "--text", "endpoint=endpoint.txt"); code != 1 ||
		!strings.Contains(errOut, "64821 bytes") {
		t.Errorf("%d: %s", code, errOut)
	}
	if out := s.must("policy", "diff", "policy.cedar"); !strings.Contains(out, "101 decisions not replayed") {
		t.Error(out)
	}
	p.stop()
	after, err := os.Stat(s.path("ledger.db"))
	if err != nil {
		t.Fatal(err)
	}
	if grown := (after.Size() - before.Size()) / denials; grown > 16<<10 {
		t.Errorf("a denial takes %d bytes of the ledger", grown)
	}
}

// TestPolicyChangesUnderLoad activates 20 policies while a peer sends sign requests. Each event has
// the hash of the policy that decided, and a replay of every decision has the recorded result.
func TestPolicyChangesUnderLoad(t *testing.T) {
	s := newSystem(t)
	s.write("policy.cedar", threeADay)
	s.serve()
	s.enrol()
	c := s.dial()
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for i := range 4 {
		asking.Go(func() {
			for n := 0; ctx.Err() == nil; n++ { // each request outlives ctx, so that its answer comes
				c.Sign(t.Context(), "payments", message(fmt.Sprintf("%08d", i*1_000_000+n)))
			}
		})
	}
	for n := range 20 {
		s.write("policy.cedar", strings.Replace(threeADay, "<= 3", fmt.Sprint("<= ", n%2*1000000), 1))
		s.proposeAndApprove("policy activate", "")
	}
	cancel()
	asking.Wait()
	hashes := map[string]string{}
	for _, e := range s.events() {
		if e.Metadata["inputs"] != "" {
			hashes[strconv.FormatUint(e.Index, 10)] = e.Metadata["policy"]
		}
	}
	if len(hashes) < 20 {
		t.Errorf("only %d decisions", len(hashes))
	}
	for text := range strings.Lines(s.must("policy", "export")) {
		var l struct {
			Decision struct {
				Event  json.Number
				Record string
			}
		}
		if err := json.NewDecoder(bytes.NewReader([]byte(text))).Decode(&l); err != nil {
			t.Fatal(err)
		}
		if l.Decision.Record == "" {
			continue
		}
		if hash := hashes[l.Decision.Event.String()]; hash == "" || !strings.Contains(l.Decision.Record, hash) {
			t.Errorf("event %s: %q is not the policy of %s", l.Decision.Event, hash, l.Decision.Record)
		}
		delete(hashes, l.Decision.Event.String())
	}
	if len(hashes) != 0 {
		t.Errorf("%d decisions are missing", len(hashes))
	}
	// policy diff fails if the replay of a decision differs from the record.
	if out := s.must("policy", "diff", "policy.cedar"); !strings.Contains(out, " replayed, ") {
		t.Errorf("%s", out)
	}
}

// TestSinceIsByTheClockOfTheAnswer sets the ledger's time an hour back, as after a night without
// the daemon: the ledger's time then catches up at 9/8. The last minute of decisions is that of the
// ledger, and the last minute of events that of the system's clock.
func TestSinceIsByTheClockOfTheAnswer(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	p.stop()
	db, err := bbolt.Open(s.path("ledger.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(func(tx *bbolt.Tx) error {
		at := binary.BigEndian.AppendUint64(nil, uint64(time.Now().Add(-time.Hour).UnixNano()))
		return tx.Bucket([]byte("meta")).Put([]byte("time"), at)
	}), db.Close()); err != nil {
		t.Fatal(err)
	}
	p = s.serve()
	signed := must(s.dial().Sign(t.Context(), "payments", message("AAAA")))(t)
	s.write("nothing.cedar", `forbid (principal, action, resource);`)
	if out := s.must("policy", "diff", "nothing.cedar", "--since", "1m"); !strings.Contains(out, ", 1 would change") {
		t.Errorf("diff of the last minute: %s", out)
	}
	if out := s.must("policy", "export", "--since", "1m"); strings.Count(out, `{"decision":`) != 1 {
		t.Errorf("export of the last minute: %s", out)
	}
	number := strconv.FormatUint(signed.Event, 10)
	if out := s.must("admin", "audit", "list", "--since", "1m"); !strings.Contains(out, "\n"+number+" ") {
		t.Errorf("events of the last minute: %s", out)
	}
	p.stop()
}
