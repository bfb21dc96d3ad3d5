package alert

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/manage"
	"countersign/internal/meter"
	"countersign/internal/scantest"
)

func TestMain(m *testing.M) {
	disktest.Serve()
	os.Exit(scantest.Run(m))
}

// inbox is a receiver that keeps its messages. away is the error of each attempt, if set.
type inbox struct {
	name string
	mu   sync.Mutex
	got  []Message
	away error
	hook func() // called before a message is taken
}

func (b *inbox) Name() string { return b.name }

func (b *inbox) Cause(err error) cause.Cause { return cause.Webhook.Of(b.name, "%v", err) }

func (b *inbox) Send(_ context.Context, m Message) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.hook != nil {
		b.hook()
	}
	if b.away != nil {
		return "", b.away
	}
	scantest.Saw("a message about an alert", fmt.Sprintf("%+v %s", m, m.Text))
	b.got = append(b.got, m)
	return "taken", nil
}

func (b *inbox) set(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.away = err
}

// all returns the messages.
func (b *inbox) all() []Message {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.got)
}

// types returns the messages as code and type.
func (b *inbox) types() (all []string) {
	for _, m := range b.all() {
		all = append(all, strings.TrimSpace(m.Code+" "+m.Subject)+" "+strings.TrimPrefix(m.Type, "alert."))
	}
	return all
}

// rig is an engine on a real ledger, with real counters.
type rig struct {
	*Engine
	t      *testing.T
	c      Config
	path   string
	ledger *ledger.Ledger
	meter  *meter.Meter
	boxes  []Receiver
	in     *inbox
	stop   func()

	mu      sync.Mutex
	present []cause.Cause
}

// slowly makes the engines of a test of days look less often.
func slowly(t *testing.T) {
	lookEvery = time.Minute
	t.Cleanup(func() { lookEvery = time.Second })
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, c: Defaults(), path: filepath.Join(t.TempDir(), "ledger.db"), in: &inbox{name: "webhook/ops"}}
	r.boxes = []Receiver{r.in}
	if err := ledger.Create(r.path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	r.open()
	t.Cleanup(func() { r.close() })
	return r
}

// open starts an engine with new counters, as a start of the daemon does.
func (r *rig) open() {
	r.t.Helper()
	var err error
	if r.ledger, err = ledgertest.Open(r.t, r.path, ledger.Options{}); err != nil {
		r.t.Fatal(err)
	}
	r.meter = meter.New("test")
	log := scantest.Log()
	id := func() string { return "1234" }
	if r.Engine, err = Open(r.t.Context(), r.c, r.ledger, r.meter, r.causes, r.boxes, id, log); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	engine := r.Engine
	if err := r.ledger.Update(r.t.Context(), engine.Begin); err != nil {
		r.t.Fatal(err)
	}
	go func() { defer close(done); engine.Run(ctx) }()
	r.stop = func() { cancel(); <-done }
}

// close ends in order.
func (r *rig) close() {
	r.stop()
	if err := r.ledger.Update(context.Background(), r.End); err != nil {
		r.t.Error(err)
	}
	r.ledger.Close()
}

// kill ends without the last transaction of an orderly end.
func (r *rig) kill() {
	r.stop()
	r.ledger.Close()
}

func (r *rig) restart() {
	r.t.Helper()
	r.close()
	r.open()
}

func (r *rig) causes() []cause.Cause {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.present)
}

func (r *rig) report(all ...cause.Cause) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.present = all
}

// pass lets a time pass, with all that is due in it.
func (r *rig) pass(d time.Duration) {
	time.Sleep(d + time.Millisecond)
	synctest.Wait()
}

func (r *rig) count(n int, s *meter.Series, labels ...string) {
	for range n {
		r.meter.Add(s, labels...)
	}
}

// fires returns the level of the alerts of a code, or "" if none fires.
func (r *rig) fires(code string) Level {
	for _, a := range r.Firing() {
		if a.Code == code {
			return a.Level
		}
	}
	return ""
}

// events returns the events about alerts, as type and level.
func (r *rig) events() (all []string) {
	r.t.Helper()
	if err := r.ledger.Events(0, func(_ uint64, b []byte) bool {
		e, err := audit.Decode(b)
		if err != nil {
			r.t.Fatal(err)
		}
		if strings.HasPrefix(string(e.Type), "Alert") {
			all = append(all, strings.TrimSpace(string(e.Type)+" "+e.Metadata["level"]))
		}
		return true
	}); err != nil {
		r.t.Fatal(err)
	}
	return all
}

func (r *rig) want(what string, got []string, want ...string) {
	r.t.Helper()
	if !slices.Equal(got, want) {
		r.t.Errorf("%s:\n%s\nwant:\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestThresholds counts just below, at and above each threshold of each measured kind.
func TestThresholds(t *testing.T) {
	refused := func(r *rig, n int) { r.count(n, meter.Requests, "sign", "refused") }
	handshakes := func(r *rig, timeouts, done int) {
		r.count(timeouts, meter.Handshakes, meter.HandshakeTimeout)
		r.count(done, meter.Handshakes, meter.HandshakeDone)
	}
	for _, test := range []struct {
		code string
		what string
		add  func(r *rig)
		want Level
	}{
		{"signature-failures", "9", func(r *rig) { refused(r, 9) }, ""},
		{"signature-failures", "10", func(r *rig) { refused(r, 10) }, ""},
		{"signature-failures", "11", func(r *rig) { refused(r, 11) }, Warning},
		{"signature-failures", "50", func(r *rig) { refused(r, 50) }, Warning},
		{"signature-failures", "51", func(r *rig) { refused(r, 51) }, Critical},
		{"signature-failures", "6 and 5", func(r *rig) {
			refused(r, 6)
			r.count(5, meter.Requests, "sign", "unavailable")
		}, Warning},
		{"signature-failures", "others", func(r *rig) {
			r.count(500, meter.Requests, "sign", "ok")
			r.count(500, meter.Requests, "verify", "refused")
		}, ""},
		{"rate-limits", "100", func(r *rig) { r.count(100, meter.RateLimited, "request") }, ""},
		{"rate-limits", "101", func(r *rig) {
			r.count(50, meter.RateLimited, "request")
			r.count(51, meter.RateLimited, "a place that is not in the table")
		}, Warning},
		{"rate-limits", "500", func(r *rig) { r.count(500, meter.RateLimited, "connect") }, Warning},
		{"rate-limits", "501", func(r *rig) { r.count(501, meter.RateLimited, "connect") }, Critical},
		{"replays", "1", func(r *rig) { r.count(1, meter.Replays, "sign") }, ""},
		{"replays", "2", func(r *rig) {
			r.count(1, meter.Replays, "sign")
			r.count(1, meter.Replays, "verify")
		}, Warning},
		{"replays", "10", func(r *rig) { r.count(10, meter.Replays, "sign") }, Warning},
		{"replays", "11", func(r *rig) { r.count(11, meter.Replays, "sign") }, Critical},
		{"handshake-timeouts", "19 of 19", func(r *rig) { handshakes(r, 19, 0) }, ""},
		{"handshake-timeouts", "20 of 20", func(r *rig) { handshakes(r, 20, 0) }, Critical},
		{"handshake-timeouts", "1 of 20", func(r *rig) { handshakes(r, 1, 19) }, ""},
		{"handshake-timeouts", "2 of 20", func(r *rig) { handshakes(r, 2, 18) }, Warning},
		{"handshake-timeouts", "5 of 100", func(r *rig) { handshakes(r, 5, 95) }, ""},
		{"handshake-timeouts", "6 of 100", func(r *rig) { handshakes(r, 6, 94) }, Warning},
		{"handshake-timeouts", "20 of 100", func(r *rig) { handshakes(r, 20, 80) }, Warning},
		{"handshake-timeouts", "21 of 100", func(r *rig) { handshakes(r, 21, 79) }, Critical},
		{"handshake-timeouts", "other failures", func(r *rig) {
			r.count(100, meter.Handshakes, meter.HandshakeClosed)
		}, ""},
	} {
		t.Run(test.code+" "+test.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.pass(2 * time.Second)
				test.add(r)
				r.pass(2 * time.Second)
				if got := r.fires(test.code); got != test.want || len(r.Firing()) > 1 {
					t.Errorf("%q, want %q; firing: %+v", got, test.want, r.Firing())
				}
				n := 0
				if test.want != "" {
					n = 1
				}
				if got := r.events(); len(got) != n || len(r.in.types()) != n {
					t.Errorf("events %q, messages %q", got, r.in.types())
				}
			})
		})
	}
}

// TestConfigured: other thresholds and windows than the default ones count.
func TestConfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.c.Replays = Rate{Warning: 3, Critical: 5, Window: 20 * time.Second}
		r.c.Quiet = 2 * time.Second
		r.restart()
		r.count(3, meter.Replays, "sign")
		r.pass(21 * time.Second)
		r.count(1, meter.Replays, "sign") // the three are out of the window
		r.pass(2 * time.Second)
		r.want("events", r.events())
		r.count(5, meter.Replays, "sign")
		r.pass(2 * time.Second)
		r.want("events", r.events(), "AlertFiring critical")
		r.pass(30 * time.Second)
		r.want("events", r.events(), "AlertFiring critical", "AlertResolved critical")
		r.want("messages", r.in.types(), "replays firing", "replays resolved")
	})
}

// TestLevels: an alert rises at once, and falls by a level after the number was low for the quiet
// time.
func TestLevels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		second := func(n int) {
			r.count(n, meter.Requests, "sign", "refused")
			r.pass(time.Second)
		}
		for range 60 {
			second(1) // above 50 within a minute
		}
		r.want("events", r.events(), "AlertFiring warning", "AlertFiring critical")
		for i := range 15 * 60 {
			second(i / 2 % 2) // some 30 a minute: at the half, neither up nor down
		}
		r.want("events", r.events(), "AlertFiring warning", "AlertFiring critical")
		for i := range 7 * 60 {
			if second(0); i%5 == 0 {
				second(1) // some 10 a minute: still above the half of a warning
			}
		}
		r.want("events", r.events(), "AlertFiring warning", "AlertFiring critical", "AlertFiring warning")
		r.pass(10 * time.Minute)
		r.want("events", r.events(), "AlertFiring warning", "AlertFiring critical", "AlertFiring warning",
			"AlertResolved warning")
	})
}

// TestManyReplaysAreOneAlert: 100,000 replays are one alert, with one event for each level and as
// many messages.
func TestManyReplaysAreOneAlert(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for range 1000 {
			r.count(100, meter.Replays, "sign")
			r.pass(time.Second)
		}
		if n := len(r.Firing()); n != 1 || r.fires("replays") != Critical {
			t.Errorf("%d alerts fire", n)
		}
		r.want("events", r.events(), "AlertFiring critical")
		r.want("messages", r.in.types(), "replays firing")
	})
}

// TestCausesBecomeAlerts: a cause that can end by itself waits, and another one fires at once. The
// alert ends after the cause was away for the quiet time.
func TestCausesBecomeAlerts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		away := cause.TokenUnavailable.Of("main", "no worker answers")
		r.report(away)
		r.pass(20 * time.Second)
		r.report()
		r.pass(2 * time.Minute)
		r.want("events", r.events()) // short
		r.report(away, cause.TokenPIN.Of("other", "refused"))
		r.pass(2 * time.Second)
		r.want("messages", r.in.types(), "token-pin-refused other firing")
		r.pass(30 * time.Second)
		r.report()
		r.pass(4 * time.Minute)
		r.want("messages", r.in.types(), "token-pin-refused other firing", "token-unavailable main firing")
		r.pass(2 * time.Minute)
		got := r.in.types()
		slices.Sort(got)
		r.want("messages", got, "token-pin-refused other firing", "token-pin-refused other resolved",
			"token-unavailable main firing", "token-unavailable main resolved")
		if len(r.Firing()) != 0 {
			t.Errorf("%+v", r.Firing())
		}
	})
}

// TestEveryCauseIsDecided: each cause of the state has an alert, or is known to have none.
func TestEveryCauseIsDecided(t *testing.T) {
	for _, k := range cause.Kinds {
		if (levels[k] != "") == slices.Contains(silent, k) {
			t.Errorf("%s: write the level of its alert, or that it has none", k.Code)
		}
	}
	for _, k := range atOnce {
		if levels[k] == "" {
			t.Errorf("%s is at once without a level", k.Code)
		}
	}
	seen := map[string]bool{}
	for _, k := range Kinds {
		if seen[k.Code] || k.Means == "" || k.Do == "" || k.Threshold(Defaults()) == "" {
			t.Errorf("%+v", k)
		}
		seen[k.Code] = true
	}
}

// TestLesserKernel: a start on a kernel that confines less than the one before alerts, and a start
// on the better kernel ends the alert.
func TestLesserKernel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.pass(time.Hour)
		r.want("messages", r.in.types())
		r.report(cause.Sandbox.Of("daemon", "no Landlock"))
		r.restart()
		r.pass(2 * time.Second)
		r.want("messages", r.in.types(), "sandbox-incomplete daemon firing")
		if l := r.fires(cause.Sandbox.Code); l != Warning {
			t.Errorf("%q", l)
		}
		r.report()
		r.restart()
		r.pass(10 * time.Minute)
		r.want("messages", r.in.types(), "sandbox-incomplete daemon firing", "sandbox-incomplete daemon resolved")
	})
}

// TestFlappingInput: a reason that comes and goes each second is one alert, which ends after the
// reason has stayed away.
func TestFlappingInput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for range 1800 {
			r.report(cause.TokenUnavailable.Of("main", "away"))
			r.pass(time.Second)
			r.report()
			r.pass(time.Second)
		}
		r.want("events", r.events(), "AlertFiring critical")
		r.pass(10 * time.Minute)
		r.want("events", r.events(), "AlertFiring critical", "AlertResolved critical")
	})
	t.Run("at the threshold", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			for i := range 3600 { // 10 and 11 within a minute in turn
				if i%6 == 0 || i%66 == 1 {
					r.count(1, meter.Requests, "sign", "refused")
				}
				r.pass(time.Second)
			}
			r.want("events", r.events(), "AlertFiring warning")
		})
	})
}

// TestRestartWhileFiring: a restart changes nothing, whether the reason goes on, and whether the
// daemon has not counted for a window yet.
func TestRestartWhileFiring(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.count(5, meter.Replays, "sign")
		r.report(cause.KeyMissing.Of("payments/1", "not on the token"))
		r.pass(2 * time.Second)
		before := r.Firing()
		for range 3 {
			r.restart()
			r.pass(10 * time.Minute) // of a window of an hour
		}
		if got := r.Firing(); len(got) != 2 || !slices.EqualFunc(got, before, func(x, y Alert) bool { return x == y }) {
			t.Errorf("%+v, before %+v", got, before)
		}
		r.want("events", r.events(), "AlertFiring critical", "AlertFiring warning")
		if n := len(r.in.types()); n != 2 {
			t.Errorf("%d messages", n)
		}
		r.pass(time.Hour)
		r.want("events", r.events(), "AlertFiring critical", "AlertFiring warning", "AlertResolved warning")
	})
}

// TestKillBetweenEventAndSending copies the ledger's file at the moment of the first attempt, and
// goes on with the copy: the message arrives, with the same id, and no event is there twice.
func TestKillBetweenEventAndSending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		copied := filepath.Join(t.TempDir(), "copy.db")
		var once sync.Once
		r.in.hook = func() {
			once.Do(func() {
				f, err := os.Create(copied)
				if err == nil {
					err = errors.Join(r.ledger.Snapshot(f), f.Close())
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		r.report(cause.KeyMissing.Of("payments/1", "not on the token"))
		r.pass(2 * time.Second)
		first := r.in.got
		r.want("messages", r.in.types(), "key-missing payments/1 firing")
		r.close()
		r.path, r.in.got = copied, nil
		r.open()
		r.pass(2 * time.Second)
		r.want("messages", r.in.types(), "key-missing payments/1 firing", "daemon-ended firing")
		if r.in.got[0] != first[0] {
			t.Errorf("%+v, before %+v", r.in.got, first)
		}
		r.want("events", r.events(), "AlertFiring critical", "AlertFiring critical")
		r.restart()
		r.pass(2 * time.Second)
		if len(r.in.got) != 2 {
			t.Errorf("a message that was delivered was sent again: %+v", r.in.got)
		}
	})
}

// TestAcknowledgement: an acknowledged alert is not repeated. The acknowledgement ends after its
// time, with the alert, and when the level rises.
func TestAcknowledgement(t *testing.T) {
	slowly(t)
	ann := audit.Operator("ann")
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		ack := func(lasts time.Duration) error {
			return r.Acknowledge(t.Context(), ann, "replays", "", lasts, "the shop is being asked")
		}
		if err := ack(time.Hour); !errors.Is(err, manage.ErrNotFound) {
			t.Errorf("an alert that does not fire: %v", err)
		}
		r.count(2, meter.Replays, "sign")
		r.pass(2 * time.Minute)
		for _, lasts := range []time.Duration{0, -time.Hour, MaxAcknowledged + time.Second} {
			if err := ack(lasts); !errors.Is(err, manage.ErrInvalid) {
				t.Errorf("for %v: %v", lasts, err)
			}
		}
		if err := ack(24 * time.Hour); err != nil {
			t.Fatal(err)
		}
		r.restart()
		again := func(d time.Duration) { // the reason stays
			for range int(d / (30 * time.Minute)) {
				r.count(1, meter.Replays, "sign")
				r.pass(30 * time.Minute)
			}
		}
		again(23 * time.Hour)
		if a := r.Firing(); len(a) != 1 || a[0].Ack == nil || a[0].Ack.By != "ann" {
			t.Errorf("%+v", a)
		}
		r.want("messages while acknowledged", r.in.types(), "replays firing")
		again(2 * time.Hour)
		if a := r.Firing(); len(a) != 1 || a[0].Ack != nil {
			t.Errorf("the acknowledgement has not ended: %+v", a)
		}
		r.want("messages afterwards", r.in.types(), "replays firing", "replays firing")
		again(4 * time.Hour)
		if got := r.in.types(); len(got) != 3 || !r.in.got[2].Repeated || r.in.got[2].ID == r.in.got[1].ID {
			t.Errorf("%q", got)
		}
		r.want("events", r.events(), "AlertFiring warning", "AlertAcknowledged", "AlertRepeated warning",
			"AlertRepeated warning")

		if err := ack(time.Hour); err != nil {
			t.Fatal(err)
		}
		r.count(20, meter.Replays, "sign")
		r.pass(2 * time.Minute)
		if a := r.Firing(); len(a) != 1 || a[0].Level != Critical || a[0].Ack != nil {
			t.Errorf("after the rise: %+v", a)
		}
		if err := ack(MaxAcknowledged); err != nil {
			t.Fatal(err)
		}
		r.pass(2 * time.Hour)
		if a := r.Firing(); len(a) != 0 {
			t.Errorf("%+v", a)
		}
		r.count(20, meter.Replays, "sign")
		r.pass(2 * time.Minute)
		if a := r.Firing(); len(a) != 1 || a[0].Ack != nil {
			t.Errorf("the acknowledgement has outlived its alert: %+v", a)
		}
	})
}

// TestReceiverAwayAndBack: messages for a receiver that is away wait over restarts, leave in their
// order, and end the cause. Another receiver does not wait.
func TestReceiverAwayAndBack(t *testing.T) {
	slowly(t)
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		other := &inbox{name: "mail/ops@example.com"}
		r.boxes = append(r.boxes, other)
		r.restart()
		r.in.set(errors.New("connection refused"))
		for _, key := range []string{"a/1", "b/1", "c/1"} {
			r.report(append(r.causes(), cause.KeyMissing.Of(key, "away"))...)
			r.pass(3 * time.Minute)
		}
		want := []string{"key-missing a/1 firing", "key-missing b/1 firing", "key-missing c/1 firing"}
		r.want("the other receiver", other.types(), want...)
		if c := r.Engine.Causes(); len(c) != 1 || c[0].Kind != cause.Webhook {
			t.Errorf("%v", c)
		}
		r.restart()
		r.pass(3 * time.Minute)
		r.want("away", r.in.types())
		r.in.set(nil)
		r.pass(time.Hour)
		r.want("back", r.in.types(), want...)
		r.want("the other receiver", other.types(), want...)
		if c := r.Engine.Causes(); len(c) != 0 {
			t.Errorf("%v", c)
		}
		r.in.set(errors.New("connection refused"))
		r.report()
		r.pass(100 * time.Hour) // longer than maxAge
		r.in.set(nil)
		r.pass(2 * time.Hour)
		r.want("given up", r.in.types(), want...)
	})
}

// TestBounds: many subjects are 17 alerts, and a receiver that is away has at most 256 messages.
// Messages for a receiver that is not configured any more go.
func TestBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.in.set(errors.New("away"))
		var many []cause.Cause
		for i := range 1000 {
			many = append(many, cause.KeyMissing.Of(fmt.Sprintf("key-%d/1", i), "away"))
		}
		for range 12 {
			r.report(slices.Clone(many)...)
			r.pass(2 * time.Second)
			if n := len(r.Firing()); n != maxSubjects+1 {
				t.Fatalf("%d alerts", n)
			}
			rand.Shuffle(len(many), func(i, j int) { many[i], many[j] = many[j], many[i] })
			r.report(slices.Clone(many)...)
			r.pass(time.Minute) // the same subjects fire on
			r.report()
			r.pass(10 * time.Minute)
		}
		waiting := func() (n int) {
			if err := r.ledger.All(ledger.Meta, func(key string, _ []byte) error {
				if strings.HasPrefix(key, messageKeys) {
					n++
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			return n
		}
		if n := waiting(); n != maxMessages {
			t.Errorf("%d messages wait", n)
		}
		if n := len(r.events()); n != 12*2*(maxSubjects+1) {
			t.Errorf("%d events", n)
		}
		r.boxes = []Receiver{&inbox{name: "webhook/new"}}
		r.restart()
		r.report(many[0])
		r.pass(2 * time.Second)
		if n := waiting(); n != 0 {
			t.Errorf("%d messages wait for a receiver that is gone", n)
		}
	})
}

// TestFullDisk: while the disk takes no writes, a critical alert is sent without its event, once.
// The engine goes on, and the event follows when the disk is back.
func TestFullDisk(t *testing.T) {
	disk := disktest.New(t)
	dir, err := os.MkdirTemp(disk.Dir(), "")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, c: Defaults(), path: filepath.Join(dir, "ledger.db"), in: &inbox{name: "webhook/ops"}}
	r.c.Quiet = time.Second
	r.boxes = []Receiver{r.in}
	if err := ledger.Create(r.path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	r.open()
	defer func() { disk.Fail(nil); r.close() }()
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Datasync || op.Kind == disktest.Sync {
			return 0
		}
		return syscall.EROFS
	})
	r.report(cause.KeyMissing.Of("payments/1", "away"), cause.Locked.Of("", "by ann"))
	eventually(t, "the message leaves", func() bool { return len(r.in.types()) == 1 })
	r.want("messages", r.in.types(), "key-missing payments/1 firing")
	if len(r.events()) != 0 || len(r.Firing()) != 0 {
		t.Errorf("%q, %+v", r.events(), r.Firing())
	}
	disk.Fail(nil)
	eventually(t, "the events follow", func() bool { return len(r.events()) == 2 && len(r.in.types()) == 2 })
	r.want("messages", r.in.types(), "key-missing payments/1 firing", "locked firing")
	r.report()
	eventually(t, "both resolve", func() bool { return len(r.events()) == 4 && len(r.in.types()) == 4 })
}

// TestEveryEndIsTold ends runs in each way. A run that was stopped is no alert. Any other end is
// told by the next start, once, with an event, and resolves by itself. Where the daemon could tell
// its end, the message of the next start has the same id.
func TestEveryEndIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		silent := &inbox{name: "mail/ops@example.com"}
		r.boxes = append(r.boxes, silent)
		r.restart()
		r.pass(time.Hour)
		r.want("events after an orderly end", r.events())

		r.kill()
		r.open()
		r.pass(2 * time.Second)
		r.want("events after a kill", r.events(), "AlertFiring critical")
		r.kill() // a crash loop is one alert
		r.open()
		r.pass(2 * time.Second)
		r.want("events after a second kill", r.events(), "AlertFiring critical")
		r.want("messages", r.in.types(), "daemon-ended firing")
		r.pass(10 * time.Minute)
		r.want("events", r.events(), "AlertFiring critical", "AlertResolved critical")

		r.in.got, silent.got = nil, nil
		silent.set(errors.New("away"))
		r.stop()
		r.Ended(errors.New("the launcher has ended"))
		r.ledger.Close()
		r.want("messages before the end", r.in.types(), "daemon-ended firing")
		r.want("messages of a receiver that is away", silent.types())
		silent.set(nil)
		r.open()
		r.pass(2 * time.Second)
		r.want("messages after the end", r.in.types(), "daemon-ended firing", "daemon-ended firing")
		r.want("messages of the other receiver", silent.types(), "daemon-ended firing")
		if r.in.got[0].ID != r.in.got[1].ID || !strings.Contains(r.in.got[0].Text, "the launcher has ended") {
			t.Errorf("%+v", r.in.got)
		}
		if n := len(r.events()); n != 3 {
			t.Errorf("%d events", n)
		}
	})
}

// hung is a receiver that answers nothing.
type hung struct{ inbox }

func (h *hung) Send(ctx context.Context, m Message) (string, error) {
	<-ctx.Done()
	return "", ctx.Err()
}

// TestEndIsToldInTime: a receiver that is silent delays the end for endWithin, and no other
// receiver.
func TestEndIsToldInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.boxes = append(r.boxes, &hung{inbox{name: "mail/ops@example.com"}})
		r.restart()
		r.stop()
		began := time.Now()
		r.Ended(errors.New("the ledger"))
		if took := time.Since(began); took != endWithin {
			t.Errorf("it took %v", took)
		}
		r.want("messages", r.in.types(), "daemon-ended firing")
		r.ledger.Close()
		r.open()
	})
}

// TestLedgerInUnknownState lets the fsync of a meta page fail, after which the ledger takes no
// request. The receivers are told nevertheless, and the next start writes the event.
func TestLedgerInUnknownState(t *testing.T) {
	disk := disktest.New(t)
	r := &rig{t: t, c: Defaults(), path: filepath.Join(disk.Dir(), "ledger.db"), in: &inbox{name: "webhook/ops"}}
	r.boxes = []Receiver{r.in}
	if err := ledger.Create(r.path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	r.open()
	var meta atomic.Bool
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Write && op.Offset < 2*4096 {
			meta.Store(true)
		}
		if meta.Load() && op.Kind == disktest.Datasync {
			return syscall.EIO
		}
		return 0
	})
	r.report(cause.Locked.Of("", "by ann"))
	<-r.ledger.Failed()
	r.stop()
	r.Ended(ledger.ErrUnknownState)
	disk.Fail(nil)
	r.want("messages", r.in.types(), "daemon-ended firing")
	r.ledger.Close()
	r.report()
	r.open()
	defer r.close()
	has := func() (n int) {
		for _, m := range r.in.all() {
			if m.Code == ended.Code {
				n++
			}
		}
		return n
	}
	eventually(t, "the next start sends the alert", func() bool { return has() == 2 })
	if got := r.in.all(); got[0].ID != got[len(got)-1].ID && !slices.ContainsFunc(got[1:], func(m Message) bool {
		return m.ID == got[0].ID
	}) {
		t.Errorf("%+v", got)
	}
	if !slices.Contains(r.events(), "AlertFiring critical") || r.fires(ended.Code) != Critical {
		t.Errorf("events %q", r.events())
	}
}

// TestMeasured: each kind has a series for each of its levels, zero or one. Messages are counted
// while they wait, and when they are given up.
func TestMeasured(t *testing.T) {
	if most := meter.Alerts.Labels[0].Most; len(Kinds) > most {
		t.Errorf("%d kinds, and the series has room for %d", len(Kinds), most)
	}
	slowly(t)
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		has := func(line string, want bool) {
			t.Helper()
			m := meter.New("test")
			m.Source(r.Measure)
			_, states, err1 := m.Expose("")
			_, counts, err2 := r.meter.Expose("")
			if err := errors.Join(err1, err2); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(states)+string(counts), "\ncountersign_"+line+"\n") != want {
				t.Errorf("the line %s: want %v", line, want)
			}
		}
		for _, k := range Kinds {
			for _, level := range k.Levels() {
				has(fmt.Sprintf(`alerts_firing{code=%q,level=%q} 0`, k.Code, level), true)
			}
		}
		has(`messages_waiting{about="alerts"} 0`, true)
		r.in.set(errors.New("away"))
		r.count(2, meter.Replays, "sign")
		r.pass(2 * time.Minute)
		has(`alerts_firing{code="replays",level="warning"} 1`, true)
		has(`alerts_firing{code="replays",level="critical"} 0`, true)
		has(`messages_waiting{about="alerts"} 1`, true)
		has(`messages_dropped_total{about="alerts"} 0`, true)
		r.pass(100 * time.Hour) // longer than maxAge
		has(`messages_dropped_total{about="alerts"} 2`, true)
		has(`messages_waiting{about="alerts"} 0`, true)
	})
}

// patience is the longest wait of a test for an event in another goroutine.
const patience = 20 * time.Second

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// TestNoSecretsInMessages: the form of a secret in the details of a cause does not leave.
func TestNoSecretsInMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		secret := strings.Repeat("5eed", 16)
		r.report(cause.KeyMissing.Of("payments/1", "the device says %s\nstate operational", secret))
		r.pass(2 * time.Second)
		if len(r.in.got) != 1 || strings.Contains(r.in.got[0].Text, secret) ||
			strings.Contains(r.in.got[0].Text, "\n") {
			t.Errorf("%+v", r.in.got)
		}
	})
}

// TestDocumentsHaveKinds: docs/OPERATIONS.md has a section for each code, and no section of a code
// that is gone.
func TestDocumentsHaveKinds(t *testing.T) {
	b, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "\n## Alerts\n")
	text, _, _ = strings.Cut(text, "\n## ")
	sections := map[string]string{}
	for _, s := range strings.Split(text, "\n### ")[1:] {
		title, rest, _ := strings.Cut(s, "\n")
		sections[title] = strings.TrimSpace(rest)
	}
	for _, k := range Kinds {
		if len(sections[k.Code]) < 80 || k.Link() != "docs/OPERATIONS.md#"+k.Code {
			t.Errorf("docs/OPERATIONS.md: the section Alerts has no paragraph %q", k.Code)
		}
		delete(sections, k.Code)
	}
	if len(sections) > 0 {
		t.Errorf("no alert has the codes %q", slices.Sorted(maps.Keys(sections)))
	}
}
