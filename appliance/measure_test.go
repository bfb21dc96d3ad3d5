package appliance

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/internal/keyring"
	"countersign/internal/meter"
	"countersign/internal/mirror"
	"countersign/noise"
	"countersign/wire"
)

// TestMeasuredValues compares the values of labels with the tables of the packages that they come
// from. A value that a table lacks would be counted as other.
func TestMeasuredValues(t *testing.T) {
	fixed := func(s *meter.Series) []string { return s.Labels[len(s.Labels)-1].Values }
	for reason := range refusalAdvice {
		if !slices.Contains(fixed(meter.Handshakes), string(reason)) {
			t.Errorf("no result of handshakes is %q", reason)
		}
	}
	for _, c := range []Condition{Operational, Degraded, LockedUp, RolledBack} {
		if !slices.Contains(fixed(meter.State), string(c)) {
			t.Errorf("no state is %q", c)
		}
	}
	for _, step := range keyring.Transitions {
		if step.To != "" && !slices.Contains(fixed(meter.Keys), string(step.To)) {
			t.Errorf("no state of a key is %q", step.To)
		}
	}
}

// TestEverySeriesIsServed scrapes an appliance: each series of the table has a value, except those
// that other packages set, and those of tokens without key workers.
func TestEverySeriesIsServed(t *testing.T) {
	r := newRig(t)
	shop := r.shop
	shop.walk = r.meter.Begin()
	r.sign(t, shop, message(1, "x"))
	shop.walk.End("sign", "")
	r.backedUp(t)
	r.backups.Mirror = mirror.New(r.backups.Folder, mirror.Server{}, slog.New(slog.DiscardHandler))
	if _, err := r.Backup(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	drill := r.goodDrill(t)
	drill.Holders = []string{"ann", "bob"}
	if _, err := r.Drilled(t.Context(), operator, drill); err != nil {
		t.Fatal(err)
	}
	_, body, err := r.meter.Expose("")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range meter.All {
		elsewhere := []*meter.Series{
			meter.Proposals, meter.Sessions, meter.ProofsRefused, meter.WorkerUp, meter.WorkerCalls, meter.WorkerErrors,
			meter.WorkerRestarts, meter.WorkerSuccess, meter.WorkerMemory, meter.Sandbox, meter.OneUser, meter.Exposed,
			meter.LogDropped, meter.HistoryFailing, meter.SinkSent, meter.SinkDropped, meter.SinkBehind,
		}
		if !slices.Contains(elsewhere, s) && !strings.Contains(string(body), "# TYPE "+s.Name+" "+string(s.Kind)+"\n") {
			t.Errorf("%s is not served", s.Name)
		}
	}
	for _, line := range []string{
		`countersign_requests_total{op="sign",result="ok"} 1`,
		`countersign_ledger_nonces{use="sign"} 1`,
		`countersign_state{state="operational"} 1`,
		`countersign_peers{state="enrolled"} 2`,
		`countersign_requests_waiting{lane="peers",queue="processor"} 0`,
		`countersign_stage_seconds_count{stage="ledger"} 1`,
	} {
		if !strings.Contains(string(body), "\n"+line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
}

// counted waits until the metrics have lines.
func (e *edge) counted(lines ...string) {
	e.t.Helper()
	for _, line := range lines {
		eventually(e.t, "the metrics have "+line, func() bool {
			_, body, err := e.meter.Expose("")
			return err == nil && strings.Contains(string(body), "\ncountersign_"+line+"\n")
		})
	}
}

// TestRequestsAreCounted: each request and each item of a batch is counted once, with its result,
// from its answer's point of view.
func TestRequestsAreCounted(t *testing.T) {
	e := newEdge(t, nil)
	conn := e.session("127.0.0.1", e.shop)
	answers(t, conn, request(1, "aaaa"), "")
	answers(t, conn, request(1, "aaaa"), "") // a repetition, which does not ask the device
	answers(t, conn, request(1, "bbbb"), wire.CodeReplay)
	answers(t, conn, batchOf(numbered(2, "cccc"), numbered(3, "dddd")), "")
	answers(t, conn, `{"id":"k","op":"sign","body":7}`, wire.CodeMalformed)
	answers(t, conn, `{"id":"k","op":"keys"}`, "")
	e.counted(
		`requests_total{op="ping",result="ok"} 1`, `requests_total{op="sign",result="ok"} 4`,
		`requests_total{op="sign",result="refused"} 1`, `requests_total{op="none",result="refused"} 1`,
		`requests_total{op="keys",result="ok"} 1`, `replays_total{op="sign"} 1`, `refusals_total{code="replay"} 1`,
		`refusals_total{code="malformed"} 1`, `request_seconds_count{op="sign"} 5`,
		`stage_seconds_count{stage="device"} 3`, `stage_seconds_count{stage="turn"} 3`,
		`stage_seconds_count{stage="verify"} 3`, `stage_seconds_count{stage="ledger"} 5`,
		`handshakes_total{result="done"} 1`, `handshake_seconds_count{result="done"} 1`,
		`connections{state="proven"} 1`,
	)
}

// TestHandshakesAreCounted: each handshake has one result.
func TestHandshakesAreCounted(t *testing.T) {
	e := newEdge(t, func(l *Limits) { l.HandshakeTimeout = 2 * time.Second })
	e.staysOut("127.0.3.1", newIdentity(t))
	e.counted(`handshakes_total{result="unknown"} 1`, `handshake_seconds_count{result="refused"} 1`)
	closes(t, e.raw("127.0.3.2", noise.CountersignV1)) // says nothing
	e.counted(`handshakes_total{result="timeout"} 1`, `handshake_seconds_count{result="timeout"} 1`)
	e.raw("127.0.3.3", noise.CountersignV1).Close()
	e.counted(`handshakes_total{result="closed"} 1`)
	conn, err := e.shake("127.0.3.4", e.shop)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	e.counted(`handshakes_total{result="unused"} 1`)
	e.session("127.0.3.5", e.shop)
	e.counted(`handshakes_total{result="done"} 1`, `handshake_seconds_count{result="done"} 1`,
		`handshake_seconds_count{result="refused"} 1`, `handshake_seconds_count{result="timeout"} 1`)
	for range e.limits.Handshakes.PerSource + 1 {
		e.staysOut("127.0.3.6", newIdentity(t))
	}
	e.counted(`handshakes_total{result="rate_limited"} 1`, `handshakes_total{result="unknown"} 6`,
		`rate_limited_total{at="handshake"} 1`)
}

// TestPeersGrowNoSeries has peers with many names, and strangers, use many invented operations,
// keys and types of documents. The metrics have the same time series after 60 such peers as after
// two, and no invented text.
func TestPeersGrowNoSeries(t *testing.T) {
	e := newEdge(t, func(l *Limits) { l.Handshakes.PerSource = 1000 })
	use := func(from, to int) {
		for n := from; n < to; n++ {
			invented := fmt.Sprintf("invented-%d", n)
			conn, err := e.getsIn("127.0.4.1", e.enrol(invented))
			if err != nil {
				t.Fatal(err)
			}
			for _, document := range []string{
				`{"id":"1","op":"INVENTED"}`, `{"id":"1","op":"keys","INVENTED":1}`, `INVENTED`,
				`{"id":"1","op":"line","key":"INVENTED","from":1}`,
				strings.Replace(request(n, "aaaa"), `"message-v1"`, `"INVENTED"`, 1),
				request(n, "aaaa"),
			} {
				if _, err := exchange(conn, strings.ReplaceAll(document, "INVENTED", invented)); err != nil {
					t.Fatalf("%s: %v", document, err)
				}
			}
			conn.Close()
			e.staysOut("127.0.4.2", newIdentity(t))
		}
	}
	series := func() (names []string) {
		_, body, err := e.meter.Expose("")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(body)) {
			if name, _, _ := strings.Cut(line, " "); strings.HasPrefix(name, "countersign_") {
				names = append(names, name)
			}
		}
		if strings.Contains(string(body), "invented") {
			t.Error("the metrics have an invented text")
		}
		slices.Sort(names)
		return names
	}
	use(0, 2)
	few := series()
	use(2, 60)
	for _, name := range series() {
		if _, known := slices.BinarySearch(few, name); !known {
			t.Errorf("%s is new", name)
		}
	}
	e.counted(`requests_total{op="none",result="refused"} 180`)
}
