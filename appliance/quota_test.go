package appliance

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/peers"
	"countersign/internal/spectest"
	"countersign/wire"
)

// usedBy returns what a peer has used of its quotas.
func (r *rig) usedBy(t *testing.T, name string) peers.Bytes {
	t.Helper()
	for _, p := range r.Peers.All() {
		if p.Name == name {
			return p.Used
		}
	}
	t.Fatalf("there is no peer %s", name)
	return peers.Bytes{}
}

// counted adds up the events of counts that are due, for one peer.
func (r *rig) counted(t *testing.T, event audit.Type, action, peer string) (n int) {
	t.Helper()
	for _, e := range r.refusals.take(true) {
		some, err := strconv.Atoi(e.Metadata["count"])
		if err != nil || e.Type != event || e.Action != action || e.Resource != peer {
			t.Errorf("%+v, %v", e, err)
		}
		n += some
	}
	return n
}

// denied returns a request that policy denies. Denials of one peer have equal sizes.
func denied(n int) string {
	s := numbered(n%1000, "m")
	s.ID = "1"
	s.Payload = fmt.Appendf(nil, `{"context":"forbidden","message":"bQ"}`)
	return encoded(s)
}

// TestRefusalsBeyondTheQuota uses up a peer's quota of refusals. Each further refusal has the same
// answer and no record, and is counted exactly. Another peer has its own quota, and good requests
// of the greedy peer are served. A restart gives nothing back; time does.
func TestRefusalsBeyondTheQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := newRigWith(t, func(*Limits) {})
		handled(t, one.Appliance, one.handler(t, "shop"), denied(0))
		size := one.usedBy(t, "shop").Refused
		one.ledger.Close()
		const most, more = 20, 7
		r := newRigWith(t, func(l *Limits) { l.RefusalBytesPerDay = (most-1)*size + mostRefused })
		defer func() { r.ledger.Close() }()
		refuse := func(peer string, n int) {
			t.Helper()
			s := r.handler(t, peer)
			for i := range n {
				if a := handled(t, r.Appliance, s, denied(i)); codeOf(a.Error) != wire.CodeDenied {
					t.Fatalf("%v", a.Error)
				}
			}
		}
		recorded := func(peer string) (n int) {
			for _, e := range logOf(t, r.Appliance, 1) {
				if e.Type == audit.SignatureRejected && e.Actor.Name == peer {
					n++
				}
			}
			return n
		}
		decisions := func() (n int) {
			if err := r.Decisions(0, time.Unix(0, 0), func(Decision) bool { n++; return true }); err != nil {
				t.Fatal(err)
			}
			return n
		}
		refuse("shop", most)
		if n := recorded("shop"); n != most || r.counted(t, "", "", "") != 0 || decisions() != most {
			t.Errorf("at the limit %d refusals of %d are recorded", n, most)
		}
		refuse("shop", more)
		if n, counted := recorded("shop"), r.counted(t, audit.SignatureRejected, "sign", "shop"); n != most ||
			counted != more || decisions() != most {
			t.Errorf("beyond the limit %d refusals are recorded and %d counted, want %d and %d", n, counted, most, more)
		}
		refuse("cafe", 3)
		if n := recorded("cafe"); n != 3 || r.counted(t, "", "", "") != 0 {
			t.Errorf("of another peer %d refusals of 3 are recorded", n)
		}
		if a := handled(t, r.Appliance, r.handler(t, "shop"), request(2_000, "m")); a.Error != nil {
			t.Errorf("a good request: %v", a.Error)
		}
		if err := r.Peers.WriteGreedy(t.Context()); err != nil { // as two seconds later; then the daemon is killed
			t.Fatal(err)
		}
		r.reopen(t)
		refuse("shop", 2)
		if n := recorded("shop"); n != most {
			t.Errorf("after a restart %d refusals are recorded, want %d", n, most)
		}
		if used := r.usedBy(t, "shop").Refused; used > r.limits.RefusalBytesPerDay {
			t.Errorf("%d bytes are used", used)
		}
		time.Sleep(24 * time.Hour)
		s := r.handler(t, "shop")
		for i := range 3 {
			unknown := numbered(i, "m")
			unknown.Key = "nothing"
			handled(t, r.Appliance, s, encoded(unknown))
		}
		if n := recorded("shop"); n != most+3 {
			t.Errorf("a day later %d refusals are recorded, want %d", n, most+3)
		}
	})
}

// TestBytesBeyondTheQuota uses up a peer's quota of what served requests keep. The next request is
// busy, has no effect and is counted exactly; requests that keep nothing are served, and so is
// another peer. A restart gives nothing back; time does.
func TestBytesBeyondTheQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigWith(t, func(l *Limits) { l.BytesPerDay = 64 << 10 })
		defer func() { r.ledger.Close() }()
		shop := r.handler(t, "shop")
		served := 0
		for ; r.usedBy(t, "shop").Kept+mostKept <= r.limits.BytesPerDay; served++ {
			if a := handled(t, r.Appliance, shop, request(served, "m")); a.Error != nil {
				t.Fatalf("request %d, with %d bytes used: %v", served, r.usedBy(t, "shop").Kept, a.Error)
			}
		}
		if served < 10 {
			t.Errorf("%d requests were served", served)
		}
		if !slices.Contains(codes(r.Appliance), cause.BytesFull.Code) {
			t.Errorf("the causes are %v", codes(r.Appliance))
		}
		r.permits(t, `permit (principal, action, resource);`)
		before := len(logOf(t, r.Appliance, 1))
		for range 3 {
			began := time.Now()
			a := handled(t, r.Appliance, shop, request(100, "m"))
			if codeOf(a.Error) != wire.CodeBusy || a.Error.RetryAfter < 1 || time.Since(began) < busyTime {
				t.Errorf("beyond the limit: %+v", a.Error)
			}
		}
		if n := r.counted(t, audit.RateLimitTriggered, "quota", "shop"); n != 3 {
			t.Errorf("%d of 3 refusals are counted", n)
		}
		if n := len(logOf(t, r.Appliance, 1)); n != before {
			t.Errorf("%d events of refused requests", n-before)
		}
		if a := handled(t, r.Appliance, shop, ping); a.Error != nil {
			t.Errorf("a request that keeps nothing: %v", a.Error)
		}
		if a := handled(t, r.Appliance, r.handler(t, "cafe"), request(100, "m")); a.Error != nil {
			t.Errorf("another peer: %v", a.Error)
		}
		if err := r.Peers.WriteGreedy(t.Context()); err != nil { // as two seconds later; then the daemon is killed
			t.Fatal(err)
		}
		r.reopen(t)
		shop = r.handler(t, "shop")
		if a := handled(t, r.Appliance, shop, request(200, "m")); codeOf(a.Error) != wire.CodeBusy {
			t.Errorf("after a restart: %v", a.Error)
		}
		time.Sleep(24 * time.Hour)
		again := numbered(200, "m")
		again.Timestamp, again.ExpiresAt = time.Now().Unix(), time.Now().Unix()+3600
		if a := handled(t, r.Appliance, shop, encoded(again)); a.Error != nil {
			t.Errorf("a day later: %v", a.Error)
		}
		if slices.Contains(codes(r.Appliance), cause.BytesFull.Code) {
			t.Errorf("a day later the causes are %v", codes(r.Appliance))
		}
	})
}

// TestKeptIsBounded makes the largest records of each kind of request, and compares them with the
// reservation of the request and with what is on disk.
func TestKeptIsBounded(t *testing.T) {
	r := newRig(t)
	long := strings.Repeat("n", 64)
	k, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: long})
	if err != nil {
		t.Fatal(err)
	}
	public := k.Info().PublicKey
	greedy := r.enrol(t, strings.Repeat("p", 64), 9)
	greedy.Identity = strings.Repeat("f", 64)
	rules := func(effect string) string {
		var b strings.Builder
		for i := range 100 {
			fmt.Fprintf(&b, "@id(\"%03d%s\") %s (principal, action, resource);\n", i, strings.Repeat("x", 61), effect)
		}
		return b.String()
	}
	for _, text := range []string{"<", "\"", "\u2028", "x"} {
		s := message(0, "")
		s.Key = long
		endpoint, err := json.Marshal(strings.Repeat(text, 256/len(text)))
		if err != nil {
			t.Fatal(err)
		}
		s.Type = "payment-request-v1"
		s.Payload = fmt.Appendf(nil, `{"payer":"%x","payee":%q,"amount":"7922816251.4264337593543950335",`+
			`"currency":%q,"method":%q,"endpoint":%s}`,
			public, payeeOne, strings.Repeat("C", 16), strings.Repeat("m", 64), endpoint)
		for _, effect := range []string{"forbid", "permit"} {
			r.permits(t, rules(effect))
			who := greedy
			who.bill = new(bill)
			before := r.written(t)
			copy(s.Nonce[:], text+effect)
			signed, err := r.Sign(t.Context(), who, s)
			if (err == nil) != (effect == "permit") {
				t.Fatal(effect, err)
			}
			if err := r.Alive(t.Context()); err != nil { // the outcome is on disk
				t.Fatal(err)
			}
			grown := r.written(t) - before
			got := who.bill.Kept + who.bill.Refused
			t.Logf("%s %q: %d bytes, of them %d in events and decisions", effect, text, got, grown)
			if who.bill.Kept > mostKept || who.bill.Refused > mostRefused || got < grown ||
				(err == nil) != (who.bill.Kept > 0) {
				t.Errorf("%s %q: the bill is %+v, the disk has %d", effect, text, who.bill.Bytes, grown)
			}
			if signed == nil {
				continue
			}
			who.bill = new(bill)
			before = r.written(t)
			v := verifyOf(s, signed)
			if _, err := r.Verify(t.Context(), who, v); err != nil {
				t.Fatal(err)
			}
			grown = r.written(t) - before
			t.Logf("verify: %d bytes", who.bill.Kept)
			if who.bill.Kept > mostKept || who.bill.Kept < grown || who.bill.Refused != 0 {
				t.Errorf("verify: the bill is %+v, the disk has %d", who.bill.Bytes, grown)
			}
		}
	}
}

// TestRefusedNameIsBounded refuses requests for keys with the worst names that a request may have.
// The name is in the event, and the event has a bound.
func TestRefusedNameIsBounded(t *testing.T) {
	r := newRig(t)
	greedy := r.enrol(t, strings.Repeat("p", 64), 9)
	greedy.Identity = strings.Repeat("f", 64)
	for _, text := range []string{"\x01", "<", "\"", "\\", "\u2028", "\U0001f600", "\xff", "x"} {
		who := greedy
		who.bill = new(bill)
		key := strings.Repeat(text, 70_000/len(text))
		err := r.recordRefusal(t.Context(), who, "rotation.ack", key, wire.CodeLifetimeTooLong, errNotYours)
		if err != nil {
			t.Fatal(err)
		}
		if who.bill.Refused == 0 || who.bill.Refused > 1536 {
			t.Errorf("%q: an event of %d bytes", text, who.bill.Refused)
		}
	}
}

// TestTableOfKept measures what each kind of request makes the ledger keep, and holds the table of
// docs/OPERATIONS.md against the figures.
func TestTableOfKept(t *testing.T) {
	r := newRig(t)
	r.permits(t, `permit (principal == Peer::"shop", action, resource);`)
	defaults := DefaultLimits()
	var rows strings.Builder
	row := func(what string, bytes, most, perDay int64, limit string) {
		measured := (bytes + 20 + 99) / 100 * 100 // the hour in a record has one digit or two
		if bytes == 0 || bytes > most {
			t.Errorf("%s: %d bytes, at most %d", what, bytes, most)
		}
		fmt.Fprintf(&rows, "| %s | %d | %d | %s | %d |\n", what, measured, most, limit, perDay/measured)
	}
	ask := func(do func(who Caller) error, who Caller) peers.Bytes {
		who.bill = new(bill)
		err := do(who)
		if err != nil && who.bill.Refused == 0 {
			if err := r.recordRefusal(t.Context(), who, "sign", "payments", wire.CodeUnknownKey, err); err != nil {
				t.Fatal(err)
			}
		}
		return who.bill.Bytes
	}
	sign := func(s *wire.Sign) func(Caller) error {
		return func(who Caller) error { _, err := r.Sign(t.Context(), who, s); return err }
	}
	const kept, refused = "`bytes_per_day`", "`refusal_bytes_per_day`"
	row("a signature (`message-v1`)", ask(sign(message(1, "m")), r.shop).Kept, mostKept, defaults.BytesPerDay, kept)
	payment := r.payment(2, "10.5", "SAT", payeeOne)
	row("a payment (`payment-request-v1`)", ask(sign(payment), r.shop).Kept, mostKept, defaults.BytesPerDay, kept)
	signed := r.sign(t, r.shop, message(3, "m"))
	row("a verification", ask(func(who Caller) error {
		_, err := r.Verify(t.Context(), who, verifyOf(message(3, "m"), signed))
		return err
	}, r.shop).Kept, mostKept, defaults.BytesPerDay, kept)
	row("a payment that policy denies", ask(sign(r.payment(4, "10.5", "SAT", payeeOne)), r.cafe).Refused, mostRefused,
		defaults.RefusalBytesPerDay, refused)
	unknown := message(5, "m")
	unknown.Key = "nothing"
	row("another refusal", ask(sign(unknown), r.cafe).Refused, mostRefused, defaults.RefusalBytesPerDay, refused)
	span := audit.Span{Count: 1 << 40, Since: time.Now(), Until: time.Now()}
	count := ledger.EventOf(audit.NewCount(audit.SignatureRejected, "sign", "shop", wire.CodeLifetimeTooLong, span))
	const kinds, minutes = 30, 24 * 60
	bytes := (int64(count.Size()+hashKept) + 99) / 100 * 100
	fmt.Fprintf(&rows, "| a count of refusals | %d | 600 | one a minute for each operation and code: some %d | %d |\n",
		bytes, kinds, kinds*minutes)
	spectest.Table(t, "../docs/OPERATIONS.md", "| what | bytes | at most | bounded by | a day, by default |\n"+
		"| --- | --- | --- | --- | --- |\n", rows.String())
}

// written returns the bytes of all events and decisions.
func (r *rig) written(t *testing.T) (n int64) {
	t.Helper()
	if err := r.ledger.Events(0, func(_ uint64, b []byte) bool { n += int64(len(b)); return true }); err != nil {
		t.Fatal(err)
	}
	visit := func(d ledger.Decision) bool { n += int64(len(d.Record)); return true }
	if err := r.ledger.Decisions(0, 0, visit); err != nil {
		t.Fatal(err)
	}
	return n
}
