package softhsmtests

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/wire"
)

// taken is what a process takes, as the kernel sees it.
type taken struct {
	descriptors, threads int
	anonymous            int64 // bytes of resident memory without the pages of files
}

func (p taken) String() string {
	return fmt.Sprintf("%d descriptors, %d threads, %d KiB resident", p.descriptors, p.threads, p.anonymous>>10)
}

// footprint is what the appliance takes while nothing is asked: with 50 idle connections, two key
// workers, and Prometheus.
type footprint struct {
	taken      // the daemon
	goroutines int
	live       int64 // bytes of the heap that the last collection has found in use
	nonces     int64
	launcher   taken
	workers    []taken // by slot; a slot has had many processes
}

func (f footprint) String() string {
	return fmt.Sprintf("%v, %d goroutines, %d KiB of live heap, %d nonces; launcher: %v; key workers: %v",
		f.taken, f.goroutines, f.live>>10, f.nonces, f.launcher, f.workers)
}

// The bounds of growth from one rest to the next. Go keeps the threads that blocking system calls
// have once needed. A live nonce is some 40 bytes of the heap, and the heap may double between two
// collections of a small one. SoftHSM leaks some 70 bytes in each signature, and the pool replaces
// a key worker that has grown.
const (
	growLauncher    = 8 << 20  // bytes of resident memory
	growWorker      = 32 << 20 // bytes of resident memory
	growDescriptors = 4
	growThreads     = 16
	growGoroutines  = 8
	growLive        = 8 << 20 // bytes beside the nonces
	bytesOfNonce    = 150
	growAnonymous   = 64 << 20 // bytes beside five times the growth of the live heap (GOGC=400)
)

// flat reports whether a later footprint is within the bounds, and if not, says why.
func (f footprint) flat(later footprint) error {
	live := growLive + bytesOfNonce*(later.nonces-f.nonces)
	type bound struct {
		what      string
		was, is   int64
		mayGrowBy int64
	}
	bounds := []bound{
		{"descriptors", int64(f.descriptors), int64(later.descriptors), growDescriptors},
		{"threads", int64(f.threads), int64(later.threads), growThreads},
		{"goroutines", int64(f.goroutines), int64(later.goroutines), growGoroutines},
		{"bytes of live heap", f.live, later.live, live},
		{"bytes of resident memory", f.anonymous, later.anonymous, growAnonymous + 5*live},
	}
	of := func(who string, was, is taken, memory int64) {
		bounds = append(bounds,
			bound{"descriptors of " + who, int64(was.descriptors), int64(is.descriptors), growDescriptors},
			bound{"threads of " + who, int64(was.threads), int64(is.threads), growThreads},
			bound{"bytes of resident memory of " + who, was.anonymous, is.anonymous, memory})
	}
	of("the launcher", f.launcher, later.launcher, growLauncher)
	for i := range f.workers {
		of(fmt.Sprintf("key worker %d", i), f.workers[i], later.workers[i], growWorker)
	}
	for _, b := range bounds {
		if b.is > b.was+b.mayGrowBy && (os.Getenv("RACE") != "1" || !strings.HasPrefix(b.what, "bytes")) {
			return fmt.Errorf("%s: %d, and %d before; at most %d more", b.what, b.is, b.was, b.mayGrowBy)
		}
	}
	return nil
}

// rest stops all actors until nothing is under way, and returns the footprint of the daemon once
// two in succession are alike and, with one before, within its bounds.
func (k *soak) rest(before *footprint) (f footprint) {
	t := k.t
	t.Helper()
	k.acts.Lock()
	defer k.acts.Unlock()
	k.script(time.Now(), nil, 0, nil)
	if err := k.waitForWorkers(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A connection keeps as many goroutines as it has served requests at once. The first new
	// connection tells a peer of rotations, which the peer acknowledges. The second one has nothing
	// to tell.
	for range 2 {
		for _, p := range k.peers {
			k.reconnect(p)
			eventually(t, p.name+" connects", func() bool {
				_, err := p.client.Ping(t.Context())
				k.count("ping", err)
				return err == nil
			})
		}
		eventually(t, "each peer knows the active versions", func() bool { return k.told() })
	}
	// Go collects each 2 minutes without another reason.
	for began := time.Now(); ; {
		last := f
		f = k.lowest()
		var why error
		if before != nil {
			why = before.flat(f)
		}
		if f.goroutines == last.goroutines && f.descriptors == last.descriptors && why == nil {
			return f
		}
		if time.Since(began) > 150*time.Second {
			k.p.cmd.Process.Signal(syscall.SIGQUIT) // the stacks of all goroutines, as the daemon's last words
			<-k.p.ended
			k.p.ended <- errors.New("ended by SIGQUIT")
			os.WriteFile(filepath.Join(os.TempDir(), "soak-daemon.log"), []byte(k.p.stderr.String()), 0o600)
			t.Fatalf("the daemon's footprint is %v, after %v (%v); its stacks are in %s/soak-daemon.log", f, last, why,
				os.TempDir())
		}
	}
}

// told reports that each connected peer has acknowledged the rotations, and no request is served.
func (k *soak) told() bool {
	for _, name := range []string{"payments", "noise"} {
		line := must(k.admin().Line(k.t.Context(), name))(k.t)
		for _, peer := range line.Unacknowledged {
			if strings.HasPrefix(peer, "peer-") {
				return false
			}
		}
	}
	return k.metrics()["countersign_requests_serving"] == 0
}

// lowest reads the footprint five times, and takes the lowest numbers of goroutines and of
// descriptors: scrapes and timers come and go.
func (k *soak) lowest() footprint {
	f := k.footprint()
	for range 4 {
		time.Sleep(300 * time.Millisecond)
		next := k.footprint()
		next.goroutines, next.descriptors = min(next.goroutines, f.goroutines), min(next.descriptors, f.descriptors)
		f = next
	}
	return f
}

// footprint reads the present footprint.
func (k *soak) footprint() (f footprint) {
	t := k.t
	t.Helper()
	f.taken, f.launcher = k.taken(k.p.cmd.Process.Pid), k.taken(k.p.launcher())
	for _, w := range must(k.admin().Tokens(t.Context()))(t)[0].Workers {
		f.workers = append(f.workers, k.taken(w.PID))
	}
	m := k.metrics()
	f.goroutines = int(m["go_goroutines"])
	f.live = int64(m["go_memstats_next_gc_bytes"]) / 5
	f.nonces = int64(m[`countersign_ledger_nonces{use="sign"}`] + m[`countersign_ledger_nonces{use="verify"}`])
	return f
}

// taken reads what a process takes.
func (k *soak) taken(pid int) (p taken) {
	t := k.t
	t.Helper()
	p.descriptors = len(must(os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)))(t))
	for line := range strings.Lines(string(must(os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)))(t))) {
		name, value, _ := strings.Cut(line, ":")
		n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch name {
		case "Threads":
			p.threads = int(n)
		case "RssAnon":
			p.anonymous = n << 10
		}
	}
	return p
}

// metrics scrapes the daemon by its admin socket.
func (s *system) metrics() map[string]float64 {
	s.t.Helper()
	all := map[string]float64{}
	for line := range strings.Lines(string(must(s.admin().Metrics(s.t.Context()))(s.t))) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			all[name], _ = strconv.ParseFloat(value, 64)
		}
	}
	return all
}

// unseen bounds the requests of an operation whose peers have another answer than the appliance's,
// or none: a request may end while its answer is on the way. The answer is given as "sign denied".
func (k *soak) unseen(answer string) int {
	op, _, _ := strings.Cut(answer, " ")
	return k.answers[op+" unavailable"] + k.answers[op+" none"] + 8*k.answers["batch none"]
}

// checkMetrics compares the metrics with the answers that the peers have seen.
func (k *soak) checkMetrics() {
	m := k.metrics()
	for series, answers := range map[string][]string{
		`requests_total{op="sign",result="ok"}`:    {"sign ok", "sign unproven"},
		`requests_total{op="verify",result="ok"}`:  {"verify ok", "verify unproven"},
		`replays_total{op="sign"}`:                 {"sign replay"},
		`replays_total{op="verify"}`:               {"verify replay"},
		`refusals_total{code="denied"}`:            {"sign denied"},
		`refusals_total{code="expired"}`:           {"sign expired"},
		`refusals_total{code="not_confirmed"}`:     {"sign not_confirmed"},
		`refusals_total{code="invalid_signature"}`: {"verify invalid_signature"},
		`refusals_total{code="wrong_signer"}`:      {"sign wrong_signer"},
		`requests_total{op="sign",result="refused"}`: {
			"sign replay", "sign denied", "sign expired", "sign not_confirmed", "sign wrong_signer", "sign unknown_key",
		},
	} {
		want := 0
		for _, a := range answers {
			want += k.answers[a]
		}
		if got := int(m["countersign_"+series]); got < want || got > want+k.unseen(answers[0]) {
			k.t.Errorf("%s is %d, the peers have seen %d", series, got, want)
		}
	}
	// The SDK of the peer that floods acknowledges rotations, too, and is refused as well.
	limited := int(m[`countersign_refusals_total{code="rate_limited"}`])
	if seen := k.answers["ping rate_limited"]; limited < seen || seen == 0 {
		k.t.Errorf("%d requests were rate limited, the peer has seen %d", limited, seen)
	}
	eventually(k.t, "no request is served", func() bool { return k.metrics()["countersign_requests_serving"] == 0 })
}

// walk reads the events of the log from one on, page by page.
func (k *soak) walk(from uint64, each func(api.Event)) {
	k.t.Helper()
	for {
		some := must(k.admin().Events(k.t.Context(), from, 1000))(k.t)
		for _, e := range some {
			if e.Index != from {
				k.t.Fatalf("event %d stands at %d", e.Index, from)
			}
			each(e)
			from++
		}
		if len(some) < 1000 {
			return
		}
	}
}

// checkLog holds the log against the requests: each admission and each verification is one that a
// peer has asked for, each admission has one outcome with its signature, and the refusals are those
// that the peers have seen.
func (k *soak) checkLog() {
	t := k.t
	t.Helper()
	// A request that has ended before its admission was on the disk has no outcome: the log says
	// that a signature may exist, and the peer was told unavailable.
	open := func() (answered, unanswered int) {
		for _, q := range k.asked {
			switch {
			case q.open && q.answered:
				answered++
			case q.open:
				unanswered++
			}
		}
		return answered, unanswered
	}
	admissions := map[string]*soakRequest{} // by the number of the event
	types, refused := map[audit.Type]int{}, map[string]int{}
	from := k.first
	eventually(t, "each admission with an answer has an outcome", func() bool {
		k.walk(from, func(e api.Event) {
			from = e.Index + 1
			types[e.Type]++
			if e.Type == audit.ReplayRefused || e.Type == audit.SignatureRejected {
				n, err := strconv.Atoi(cmp.Or(e.Metadata["count"], "1"))
				if err != nil {
					t.Fatalf("event %d: %v", e.Index, err)
				}
				refused[e.Action+" "+e.Outcome] += n
			}
			var nonce [32]byte
			hex.Decode(nonce[:], []byte(e.Metadata["nonce"]))
			switch {
			case e.Type.Kind() == audit.Admission:
				q := k.asked[nonce]
				if q == nil && e.Actor.Kind != "peer" { // the step of a rotation, with a nonce of the appliance
					q = &soakRequest{peer: e.Actor.Name}
					k.asked[nonce] = q
				}
				if q == nil || q.logged || q.answered && q.event != e.Index || e.Actor.Name != q.peer ||
					!strings.HasPrefix(e.Resource, q.key) {
					t.Fatalf("event %d of %x is not the one of its request: %+v, %+v", e.Index, nonce, e, q)
				}
				q.logged, q.open, q.event = true, true, e.Index
				admissions[strconv.FormatUint(e.Index, 10)] = q
			case e.Type == audit.SignatureVerified:
				q := k.verified[nonce]
				if q == nil || q.logged || q.answered && q.event != e.Index || e.Actor.Name != q.peer {
					t.Fatalf("event %d of %x is not the one of its verification: %+v", e.Index, nonce, q)
				}
				q.logged = true
			case e.Type.Kind() == audit.Outcome:
				q := admissions[e.Metadata["admission"]]
				if q == nil {
					t.Fatalf("event %d is the outcome of no admission: %+v", e.Index, e)
				}
				q.open = false
				if e.Outcome == "ok" {
					q.made++
				}
			}
		})
		answered, unanswered := open()
		return answered == 0 && unanswered <= k.answers["sign unavailable"]
	})
	if _, unanswered := open(); unanswered > 0 {
		t.Logf("%d admissions have no outcome, and their peers no answer", unanswered)
	}
	for nonce, q := range k.asked {
		if q.answered && (!q.logged || q.made == 0) {
			t.Errorf("a signature for %x was released as event %d; the log has %d outcomes", nonce, q.event, q.made)
		}
		if q.made > 1 {
			t.Errorf("event %d has %d outcomes with a signature", q.event, q.made)
		}
	}
	for nonce, q := range k.verified {
		if q.answered && !q.logged {
			t.Errorf("the verification of %x as event %d is not in the log", nonce, q.event)
		}
	}
	for _, each := range []string{
		"sign replay", "verify replay", "sign denied", "sign expired", "sign not_confirmed",
		"verify invalid_signature", "sign wrong_signer",
	} {
		if got := refused[each]; got < k.answers[each] || got > k.answers[each]+k.unseen(each) {
			t.Errorf("the log has %d refusals %s, the peers have seen %d", got, each, k.answers[each])
		}
	}
	if got := int(k.metrics()["countersign_audit_events_total"]); got < int(from) {
		t.Errorf("the metrics have %d events, the log has %d", got, from)
	}
	if types[audit.RetentionApplied] == 0 {
		t.Errorf("retention has dropped nothing")
	}
	// A guest may be removed while its handshake waits for a device that hangs.
	if types[audit.HandshakeRefused] > types[audit.PeerRemoved] {
		t.Errorf("the log has %d events of refused handshakes, and %d peers were removed",
			types[audit.HandshakeRefused], types[audit.PeerRemoved])
	}
	for n := range types {
		switch n {
		case audit.Started, audit.Stopped, audit.ClockRefused, audit.RollbackDetected,
			audit.ProposalExpired:
			t.Errorf("the log has %d events %s without a reason", types[n], n)
		}
	}
	t.Logf("events: %v", types)
}

// checkSpentNonces asks again for some of the admitted signatures with other content.
func (k *soak) checkSpentNonces() {
	left := 500
	for nonce, q := range k.asked {
		if !q.logged || q.key != "payments" {
			continue
		}
		if left--; left == 0 {
			break
		}
		d := message("CCCC")
		d.Nonce = nonce
		for _, p := range k.peers {
			if p.name == q.peer {
				if _, err := p.client.Sign(k.t.Context(), "payments", d); code(err) != wire.CodeReplay {
					k.t.Fatalf("the spent nonce of event %d: %v", q.event, err)
				}
			}
		}
	}
}

// checkReceipts compares the receipts with the payments: each signed payment has one.
func (k *soak) checkReceipts() {
	t := k.t
	t.Helper()
	want, got := map[string]uint64{}, map[string]uint64{}
	payments := 0
	for _, q := range k.asked {
		if q.payment && q.made == 1 {
			payments++
			if q.receipt != "" {
				want[q.receipt] = q.event
			}
		}
	}
	for after := ""; ; {
		some, next, err := k.admin().Receipts(t.Context(), 0, 0, after, 1000)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range some {
			if _, twice := got[r.ID]; twice {
				t.Errorf("receipt %s is there twice", r.ID)
			}
			got[r.ID] = r.Event
		}
		if after = next; after == "" {
			break
		}
	}
	for id, event := range want {
		if got[id] != event {
			t.Errorf("the receipt of event %d is there for event %d", event, got[id])
		}
	}
	if len(got) != payments {
		t.Errorf("%d receipts of %d signed payments", len(got), payments)
	}
}

// checkSink compares the file of the sink with the log.
func (k *soak) checkSink() {
	t := k.t
	t.Helper()
	end := k.next()
	eventually(t, "the sink has all events of before", func() bool {
		all := must(k.admin().Sinks(t.Context()))(t)
		return len(all) == 1 && all[0].Next >= end
	})
	files := must(filepath.Glob(k.path("events.jsonl*")))(t)
	slices.Sort(files)
	files = append(files[1:], files[0]) // the renamed files by their numbers, then the present one
	types := map[uint64]audit.Type{}
	for _, name := range files {
		for line := range bytes.Lines(must(os.ReadFile(name))(t)) {
			var e struct {
				Index *uint64
				Type  audit.Type
			}
			if err := json.Unmarshal(line, &e); err != nil || e.Index == nil {
				t.Fatalf("the sink has %s (%v)", line, err)
			}
			if _, twice := types[*e.Index]; twice {
				t.Fatalf("the sink has event %d twice", *e.Index)
			}
			types[*e.Index] = e.Type
		}
	}
	missing := 0
	k.walk(k.first, func(e api.Event) {
		if e.Index < end && types[e.Index] != e.Type {
			missing++
		}
	})
	if missing > 0 {
		t.Errorf("%d events are not in the sink", missing)
	}
}

// checkByClient verifies the exported log, and each checkpoint that was published.
func (k *soak) checkByClient() {
	k.must("admin", "audit", "export", "export")
	k.must("audit", "verify", "export", "--key", k.log.VerifierKey(0))
	k.checkpoints.checkConsistent(audit.Folder(k.path("export")))
}

// checkAlerts compares the alerts of Prometheus that have fired with what the soak has provoked.
func (k *soak) checkAlerts() {
	t := k.t
	t.Helper()
	must := []string{
		"CountersignReplaysHigh", "CountersignSignatureFailuresHigh", "CountersignRateLimitedHigh",
		"CountersignProofsRefused", "CountersignWorkersRestarting",
	}
	// Rates pass the lower thresholds on their way, for a time that may be short.
	may := []string{"CountersignReplays", "CountersignSignatureFailures", "CountersignRateLimited", "CountersignSlow"}
	if k.lasts >= soakOutages {
		must = append(must, "CountersignTokenDown", "CountersignRotationFailing")
		may = append(may, "CountersignCheckpointLate", "CountersignDegraded")
	}
	if k.metrics()["countersign_rotations_failed_total"] > 0 {
		may = append(may, "CountersignRotationFailing")
	}
	if k.hasCause("sandbox-incomplete") { // an older kernel
		may = append(may, "CountersignSandboxIncomplete", "CountersignDegraded")
	}
	if free := k.metrics()["countersign_ledger_disk_free_bytes"]; free < 1e9 {
		may = append(may, "CountersignDiskSpace", "CountersignDiskSpaceLow")
	}
	// An alert fires a minute after its reason, which the windows of the rates keep for longer.
	fired := map[string]bool{}
	for began := time.Now(); ; time.Sleep(500 * time.Millisecond) {
		const all = `count by (alertname) (count_over_time(ALERTS{alertstate="firing"}[1d]))`
		for _, s := range k.db.query(all) {
			fired[s.Metric["alertname"]] = true
		}
		missing := slices.ContainsFunc(must, func(name string) bool { return !fired[name] })
		if !missing || time.Since(began) > 2*time.Minute {
			break
		}
	}
	for _, name := range must {
		if !fired[name] {
			t.Errorf("%s has not fired", name)
		}
	}
	for name := range fired {
		if !slices.Contains(must, name) && !slices.Contains(may, name) {
			t.Errorf("%s has fired without a reason", name)
		}
	}
	t.Logf("alerts: %v", slices.Sorted(maps.Keys(fired)))
}

// The appliance's own alerts in a soak, as code and level. A rate passes the warning on its way up
// and down. Alerts that may fire have a reason that the soak makes, and that may end before the
// alert is due.
var (
	ownMust = []string{
		"signature-failures critical", "rate-limits critical", "replays critical", "token-restarts warning",
		"locked warning",
	}
	ownMay = []string{
		"signature-failures warning", "rate-limits warning", "replays warning",
		"key-missing critical",      // by the fault lost
		"token-replaced critical",   // by the fault lost, which hides all keys
		"rotation-failing critical", // asked for in a lock, or by a fault
	}
	ownMustInOutage = []string{"token-unavailable critical", "rotation-failing critical"} // see soakOutages
	ownMayInOutage  = []string{
		"token-redundancy warning", "checkpoint-failing warning", "upkeep-failing warning", "webhook-failing warning",
	}
)

// checkOwnAlerts compares the appliance's own alerts with what the soak has provoked: each that
// must fire has fired, and none but those that may. At the end, each alert has resolved whose
// reason is gone. The receiver has a message of each change, once, in order and with the body of
// the event.
func (k *soak) checkOwnAlerts() {
	t := k.t
	t.Helper()
	firing := map[string]bool{}
	eventually := func(what string, holds func() bool) {
		t.Helper()
		for began := time.Now(); !holds(); time.Sleep(500 * time.Millisecond) {
			if time.Since(began) > 3*time.Minute { // the windows of the rates, and the quiet time
				t.Fatalf("%s: not within 3 minutes; firing: %v", what, firing)
			}
		}
	}
	eventually("each alert without a reason has resolved", func() bool {
		reasons := map[string]bool{}
		for _, c := range must(k.admin().Health(t.Context()))(t).Causes {
			reasons[c.Code+" "+c.Subject] = true
		}
		clear(firing)
		resolved := true
		for _, a := range must(k.admin().Alerts(t.Context()))(t).Firing {
			firing[a.Code+" "+a.Subject] = true
			resolved = resolved && reasons[a.Code+" "+a.Subject]
		}
		return resolved
	})
	type change struct {
		message string
		digest  string
	}
	var changes []change
	fired, last := map[string]bool{}, map[string]audit.Type{}
	away := false
	k.walk(k.first, func(e api.Event) {
		switch e.Type {
		case audit.DeviceUnavailable:
			away = true
		case audit.AlertFiring, audit.AlertResolved, audit.AlertRepeated:
			code := strings.TrimPrefix(e.Resource, "alert/")
			of := code + " " + e.Metadata["subject"]
			changes = append(changes, change{e.Metadata["message"], e.Metadata["digest"]})
			if e.Type == audit.AlertFiring {
				fired[code+" "+e.Metadata["level"]] = true
			} else if last[of] == audit.AlertResolved {
				t.Errorf("event %d: alert %s ends a second time", e.Index, of)
			}
			if e.Type != audit.AlertRepeated {
				last[of] = e.Type
			}
		}
	})
	for of, is := range last {
		if (is == audit.AlertFiring) != firing[of] {
			t.Errorf("the last change of the alert %s is %s; it fires: %v", of, is, firing[of])
		}
	}
	must, may := ownMust, ownMay
	if k.lasts >= soakOutages {
		must, may = slices.Concat(must, ownMustInOutage), slices.Concat(may, ownMayInOutage)
	} else if away { // a fault of both key workers, which wait longer after each restart
		may = slices.Concat(may, ownMustInOutage, ownMayInOutage)
	}
	if k.hasCause("sandbox-incomplete") { // an older kernel
		must = append(slices.Clone(must), "sandbox-incomplete warning")
	}
	for _, each := range must {
		if !fired[each] {
			t.Errorf("the appliance's alert %s has not fired", each)
		}
	}
	for each := range fired {
		if !slices.Contains(must, each) && !slices.Contains(may, each) {
			t.Errorf("the appliance's alert %s has fired without a reason", each)
		}
	}
	t.Logf("the appliance's alerts: %v; firing at the end: %v",
		slices.Sorted(maps.Keys(fired)), slices.Sorted(maps.Keys(firing)))

	var got []received
	eventually("the receiver has the last message", func() bool {
		got = append(k.receiver.of("alert.firing"), k.receiver.of("alert.resolved")...)
		return slices.ContainsFunc(got, func(m received) bool { return m.id == changes[len(changes)-1].message })
	})
	has := map[string]received{}
	for _, m := range got {
		has[m.id] = m
	}
	for _, c := range changes {
		m, ok := has[c.message]
		if sum := sha256.Sum256([]byte(m.body)); !ok || hex.EncodeToString(sum[:]) != c.digest || m.attempts != 1 {
			t.Errorf("message %s: there %v, %d attempts, %s", c.message, ok, m.attempts, m.body)
		}
	}
	t.Logf("the receiver has %d messages of %d changes since the begin", len(got), len(changes))
}

// checkJournal compares the journal of the key workers with the log: each signature has its event,
// and each event its signature. A killed key worker may leave half a line, of a signature that has
// not left.
func (k *soak) checkJournal() {
	k.t.Helper()
	k.mustReconcile()
}
