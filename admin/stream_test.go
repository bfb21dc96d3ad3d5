package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/history"
	"countersign/internal/ledger"
	"countersign/internal/spectest"
)

// within is the time for something that happens by itself.
const within = time.Minute

// reading is a stream that a test reads.
type reading struct {
	t      *testing.T
	events chan api.Streamed
	ended  chan error // has the result of Stream
	last   string     // id to go on from; valid after ended
	stop   context.CancelFunc
}

func read(t *testing.T, c *api.Client, after string, topics ...string) *reading {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r := &reading{t: t, events: make(chan api.Streamed, 10_000), ended: make(chan error, 1), stop: cancel}
	t.Cleanup(cancel)
	go func() {
		var err error
		r.last, err = c.Stream(ctx, topics, after, func(e api.Streamed) error { r.events <- e; return nil })
		close(r.events)
		r.ended <- err
	}()
	return r
}

// next returns the next event of some topics; none: of any.
func (r *reading) next(topics ...string) api.Streamed {
	r.t.Helper()
	timeout := time.After(within)
	for {
		select {
		case e, open := <-r.events:
			if !open {
				r.t.Fatalf("the stream has ended: %v", <-r.ended)
			}
			if len(topics) == 0 || slices.Contains(topics, e.Topic) {
				return e
			}
		case <-timeout:
			r.t.Fatalf("there was no event of %q", topics)
		}
	}
}

// rest returns the topics that come until the end.
func (r *reading) rest() (topics []string) {
	r.t.Helper()
	timeout := time.After(within)
	for {
		select {
		case e, open := <-r.events:
			if !open {
				return topics
			}
			topics = append(topics, e.Topic)
		case <-timeout:
			r.t.Fatal("the stream has no end")
		}
	}
}

// append adds events to the log, and returns the number of the first.
func (r *rig) append(events ...audit.Event) (first uint64) {
	r.t.Helper()
	for i, e := range events {
		at := must(r.ledger.Append(r.t.Context(), ledger.EventOf(e)))(r.t)
		if i == 0 {
			first = at
		}
	}
	return first
}

var (
	asDaemon = audit.Daemon()
	// noise are events that are not streamed.
	noise = slices.Repeat([]audit.Event{
		audit.NewCount(audit.HandshakeRefused, "handshake", "", "unknown", audit.Span{Count: 1}),
	}, 100)
	committed = audit.NewKeyCommitted(asDaemon, "payments", [32]byte{}, audit.KeyFacts{})
)

// TestStreamHasEachEventOnce reads a stream in pieces, each begun with the last id of the piece
// before, while events come. Each event of a topic comes once and in order, from memory and from
// the log, with the number as its id.
func TestStreamHasEachEventOnce(t *testing.T) {
	r := newRig(t)
	root := r.root()
	first := read(t, root, "", api.TopicChange, api.TopicState)
	first.next(api.TopicState)
	var want, got []string
	add := func(n int) {
		for range n {
			at := r.append(audit.NewPeerSuspended(asDaemon, "shop"))
			want = append(want, strconv.FormatUint(at, 10))
		}
	}
	add(3)
	for range 3 {
		got = append(got, first.next(api.TopicChange).ID)
	}
	first.stop()
	<-first.ended
	last := first.last
	for round := range 6 {
		r.append(noise...)
		add(2)
		if round%2 == 1 {
			add(maxRecent + 50) // more than memory has
		}
		var s *reading
		if round%3 == 0 { // a stream that is open keeps the events in memory
			other := read(t, root, last, api.TopicChange)
			defer other.stop()
			other.next()
		}
		s = read(t, root, last, api.TopicChange)
		for len(got) < len(want)-1 { // one is left for the next piece
			e := s.next()
			got = append(got, e.ID)
			var event api.Event
			if err := json.Unmarshal(e.Data, &event); err != nil || fmt.Sprint(event.Index) != e.ID {
				t.Fatalf("%s: %s, %v", e.ID, e.Data, err)
			}
		}
		s.stop()
		<-s.ended
		last = got[len(got)-1] // the reader may have seen more than it has taken
	}
	s := read(t, root, last, api.TopicChange)
	got = append(got, s.next().ID)
	if !slices.Equal(got, want) {
		t.Errorf("%d events, want %d:\n%q\n%q", len(got), len(want), got, want)
	}
}

// TestStreamPositions: the id moves on with events that the reader does not get, so that a reader
// that comes back does not have the log searched from the begin.
func TestStreamPositions(t *testing.T) {
	r := newRig(t)
	root := r.root()
	at := r.append(noise...)
	s := read(t, root, fmt.Sprint(at), api.TopicRotation, api.TopicState)
	s.next(api.TopicState)
	s.stop()
	<-s.ended
	if end := r.app.EventsEnd(); s.last != fmt.Sprint(at) && s.last != fmt.Sprint(end-1) {
		t.Errorf("the last id is %s, want %d or %d", s.last, at, end-1)
	}
	fresh := read(t, root, "", api.TopicState)
	fresh.next()
	fresh.stop()
	<-fresh.ended
	if end := r.app.EventsEnd(); fresh.last != fmt.Sprint(end-1) {
		t.Errorf("the first id is %q, want %d", fresh.last, end-1)
	}
}

// TestStreamGaps begins after an event that the log does not have: dropped, or ahead of the log.
func TestStreamGaps(t *testing.T) {
	r := newRig(t)
	root := r.root()
	must(r.app.EndEpoch(t.Context(), asDaemon))(t)
	must(r.app.LogFile(t.Context(), "epochs/0/checkpoint"))(t) // signs the final checkpoint
	begins := r.app.EventsEnd() - 1
	if err := r.ledger.Drop(t.Context(), 0, ledger.EventOf(audit.NewStopped())); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		after string
		gap   api.StreamGap
	}{
		{"0", api.StreamGap{From: 1, Before: begins, Why: api.GapDropped}},
		{fmt.Sprint(begins - 2), api.StreamGap{From: begins - 1, Before: begins, Why: api.GapDropped}},
		{fmt.Sprint(begins - 1), api.StreamGap{}},
		{fmt.Sprint(r.app.EventsEnd() - 1), api.StreamGap{}},
		{fmt.Sprint(r.app.EventsEnd()), api.StreamGap{
			From: r.app.EventsEnd(), Before: r.app.EventsEnd() + 1, Why: api.GapAhead,
		}},
		{"18446744073709551613", api.StreamGap{
			From: r.app.EventsEnd(), Before: 18446744073709551614, Why: api.GapAhead,
		}},
	} {
		s := read(t, root, c.after)
		var gap api.StreamGap
		e := s.next()
		if e.Topic == api.TopicGap {
			if err := json.Unmarshal(e.Data, &gap); err != nil {
				t.Error(err)
			}
		}
		if gap != c.gap {
			t.Errorf("after %s: %s %s, want %+v", c.after, e.Topic, e.Data, c.gap)
		}
		if e.Topic == api.TopicGap {
			s.next(api.TopicState) // and the stream goes on
		}
		s.stop()
	}
	for _, wrong := range []string{"x", "-1", "1.0", "01", "18446744073709551615", "18446744073709551616"} {
		_, err := root.Stream(t.Context(), nil, wrong, func(api.Streamed) error { return nil })
		wants(t, "after "+wrong, "invalid", err)
	}
}

// TestStreamRoles reads the stream as each role, and holds the stream against the routes that show
// the same.
func TestStreamRoles(t *testing.T) {
	r := newRig(t)
	root := r.root()
	clients := r.enrol(root, r.https())
	for _, role := range approval.Roles() {
		c := clients[role]
		_, noEvents := c.Events(t.Context(), 0, 1)
		_, noMetrics := c.Metrics(t.Context())
		may := map[string]bool{api.TopicState: true, api.TopicTick: noMetrics == nil}
		for _, topic := range []string{
			api.TopicAlert, api.TopicRotation, api.TopicAcknowledgement, api.TopicProposal, api.TopicChange,
		} {
			may[topic] = noEvents == nil
		}
		for _, topic := range api.Topics {
			s := read(t, c, "", topic)
			if may[topic] {
				defer s.stop()
				continue
			}
			select {
			case err := <-s.ended:
				wants(t, fmt.Sprintf("%s asks for %s", role, topic), "not_allowed", err)
			case <-time.After(within): // the stream goes on
				t.Fatalf("%s gets a stream of %s", role, topic)
			}
		}
		// Without topics, each role has what it may have, and nothing else.
		end := r.app.EventsEnd() - 1
		s := read(t, c, fmt.Sprint(end))
		r.append(audit.NewPeerSuspended(asDaemon, "shop"),
			audit.NewProposalWithdrawn(asDaemon, audit.ProposalRef{}), committed)
		seen := map[string]bool{}
		for _, topic := range api.Topics {
			if topic == api.TopicAlert || topic == api.TopicAcknowledgement {
				continue // no such event
			}
			if may[topic] {
				for !seen[topic] {
					seen[s.next().Topic] = true
				}
			}
		}
		// The reason makes the state another one than that of the role before, within one second.
		if err := r.app.Lock(t.Context(), asDaemon, "test of "+string(role)); err != nil {
			t.Fatal(err)
		}
		s.next(api.TopicState) // of a later turn, which has brought all that was to come
		if err := r.app.Unlock(t.Context(), asDaemon); err != nil {
			t.Fatal(err)
		}
		s.stop()
		for _, topic := range s.rest() {
			seen[topic] = true
		}
		for topic := range seen {
			if !may[topic] {
				t.Errorf("role %s gets the topic %s", role, topic)
			}
		}
	}
	_, err := root.Stream(t.Context(), []string{"nothing"}, "", func(api.Streamed) error { return nil })
	wants(t, "an unknown topic", "invalid", err)
	_, err = r.unix().Stream(t.Context(), nil, "", func(api.Streamed) error { return nil })
	wants(t, "a stranger", "signed_out", err)
}

// TestStreamEndsWithItsSession ends a session in each way. The stream ends, and has nothing of what
// happens afterwards.
func TestStreamEndsWithItsSession(t *testing.T) {
	for name, end := range map[string]func(r *rig, root, c *api.Client) error{
		"sign out": func(r *rig, _, c *api.Client) error { return c.EndSession(r.t.Context(), "current") },
		"revoked": func(r *rig, root, c *api.Client) error {
			return root.EndSession(r.t.Context(), must(c.Me(r.t.Context()))(r.t).Session.ID)
		},
		"removed": func(r *rig, root, _ *api.Client) error {
			r.carryOut(root, "operator remove", "name", "auditor")
			return nil
		},
		"another role": func(r *rig, root, _ *api.Client) error {
			r.carryOut(root, "operator roles", "name", "auditor", "roles", "metrics")
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			root := r.root()
			c := r.enrol(root, r.unix())[approval.Auditor]
			s := read(t, c, "", api.TopicState, api.TopicAlert, api.TopicRotation)
			s.next(api.TopicState)
			if err := end(r, root, c); err != nil {
				t.Fatal(err)
			}
			r.append(committed)
			topics := s.rest()
			if !slices.Contains(topics, api.TopicEnd) || slices.Contains(topics, api.TopicRotation) {
				t.Errorf("%q, %v", topics, <-s.ended)
			}
		})
	}
}

// TestStreamEndsAtShutdown: a stream does not keep the server from its end, and the reader is told.
func TestStreamEndsAtShutdown(t *testing.T) {
	r := newRig(t)
	s := read(t, r.root(), "", api.TopicState)
	s.next()
	if err := r.http.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if topics := s.rest(); !slices.Equal(topics, []string{api.TopicEnd}) {
		t.Errorf("%q", topics)
	}
}

// TestStreamsAreBounded opens as many streams as an operator and all together may have, and one
// more each. A place is free again after a stream has ended.
func TestStreamsAreBounded(t *testing.T) {
	r := newRig(t)
	root := r.root()
	clients := r.enrol(root, r.unix())
	full := func(c *api.Client) []*reading {
		var all []*reading
		for range maxOwn {
			s := read(t, c, "", api.TopicState)
			s.next()
			all = append(all, s)
		}
		return all
	}
	refused := func(what string, c *api.Client) {
		t.Helper()
		_, err := c.Stream(t.Context(), nil, "", func(api.Streamed) error { return nil })
		refusal, _ := errors.AsType[*api.Error](err)
		if refusal == nil || refusal.Code != "rate_limited" || refusal.RetryAfter < 1 {
			t.Errorf("%s: %v", what, err)
		}
	}
	mine := full(root)
	refused("one more of an operator", root)
	roles := []approval.Role{approval.Auditor, approval.Metrics, approval.Backup}
	for _, role := range roles[:maxStreams/maxOwn-1] {
		full(clients[role])
	}
	refused("one more of all", clients[approval.Approver])
	if _, err := root.Me(t.Context()); err != nil {
		t.Error(err)
	}
	mine[0].stop()
	<-mine[0].ended
	deadline := time.Now().Add(within)
	for {
		s := read(t, clients[approval.Approver], "", api.TopicState)
		if _, open := <-s.events; open {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no place is free: %v", <-s.ended)
		}
	}
}

// TestSlowReaderIsCut has ten readers, of which one does not read. The nine get all events; the one
// is cut and loses its place, and comes back with its last id.
func TestSlowReaderIsCut(t *testing.T) {
	old := streamWrite
	streamWrite = 3 * time.Second
	t.Cleanup(func() { streamWrite = old }) // runs after the server's end
	r := newRig(t)
	root := r.root()
	token := r.token(r.unix(), "root")
	conn := must(net.Dial("unix", r.socket))(t)
	defer conn.Close()
	fmt.Fprintf(conn, "GET /v1/stream HTTP/1.1\r\nHost: countersign\r\nAuthorization: Bearer %s\r\n\r\n", token)
	var others []*reading
	for range 9 {
		s := read(t, root, "", api.TopicChange, api.TopicState)
		s.next(api.TopicState)
		others = append(others, s)
	}
	if n := r.streams("root"); n != 10 {
		t.Fatalf("%d streams", n)
	}
	members := strings.Repeat("abcdefghi,", 4000)
	var want []uint64
	for range 100 { // some 4 MB: more than the buffers of a connection
		want = append(want, r.append(audit.NewGroupChanged(asDaemon, "all", "peers", members, "none")))
	}
	var reading sync.WaitGroup
	for _, s := range others {
		reading.Go(func() {
			for _, index := range want {
				if e := s.next(api.TopicChange); e.ID != fmt.Sprint(index) {
					t.Errorf("%s, want %d", e.ID, index)
					return
				}
			}
		})
	}
	reading.Wait()
	deadline := time.Now().Add(within)
	for r.streams("root") != 9 {
		if time.Now().After(deadline) {
			t.Fatalf("%d streams: the reader that does not read is not cut", r.streams("root"))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// streams returns the number of streams of an operator.
func (r *rig) streams(operator string) int {
	r.live.streams.mu.Lock()
	defer r.live.streams.mu.Unlock()
	return r.live.streams.open[operator]
}

// TestStreamHead answers HEAD at once.
func TestStreamHead(t *testing.T) {
	r := newRig(t)
	r.root()
	token := r.token(r.unix(), "root")
	req := must(http.NewRequestWithContext(t.Context(), http.MethodHead, "http://countersign/v1/stream", nil))(t)
	req.Header.Set("Authorization", "Bearer "+token)
	resp := must(r.unixHTTP().Do(req))(t)
	resp.Body.Close()
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Errorf("%s %v", resp.Status, resp.Header)
	}
}

// TestStreamFigures: a tick has the main series of the history, and the state comes again when it
// changes.
func TestStreamFigures(t *testing.T) {
	r := newRig(t)
	s := read(t, r.root(), "", api.TopicTick, api.TopicState)
	var tick api.Tick
	if err := json.Unmarshal(s.next(api.TopicTick).Data, &tick); err != nil {
		t.Fatal(err)
	}
	main := 0
	for _, each := range history.All {
		if !each.Main {
			continue
		}
		main++
		if _, has := tick.Figures[each.Name]; !has {
			t.Errorf("%s is missing", each.Name)
		}
	}
	if len(tick.Figures) != main || tick.Figures["tokens_up"] == nil || *tick.Figures["tokens_up"] != 2 {
		t.Errorf("%d figures, want %d", len(tick.Figures), main)
	}
	if err := r.app.Lock(t.Context(), asDaemon, "test"); err != nil {
		t.Fatal(err)
	}
	for {
		var h api.Health
		if err := json.Unmarshal(s.next(api.TopicState).Data, &h); err != nil {
			t.Fatal(err)
		}
		if h.State == stateLocked {
			break
		}
	}
}

// TestTopics writes the table of docs/SPEC.md: each type of events is on one topic, or on none
// because peers' requests cause it.
func TestTopics(t *testing.T) {
	of := map[string][]string{}
	for _, kind := range audit.Types() {
		topic := topicOf(kind)
		if kind.Kind() != audit.Other && topic != "" {
			t.Errorf("%s is caused by each request of a peer, and is on the topic %s", kind, topic)
		}
		of[topic] = append(of[topic], "`"+string(kind)+"`")
	}
	rows := ""
	for _, topic := range append(slices.Clone(api.Topics[2:]), "") {
		name := "`" + topic + "`"
		if topic == "" {
			name = "none"
		}
		rows += fmt.Sprintf("| %s | %s |\n", name, strings.Join(of[topic], " "))
	}
	spectest.Table(t, "../docs/SPEC.md", "| topic | types of events |\n| --- | --- |\n", rows)
	if topicOf("AlertFired") != api.TopicAlert || topicOf("SomethingNew") != api.TopicChange {
		t.Error("a new type of events is on no topic")
	}
}

// TestHistoryRoute reads the history of an appliance: each state has a value.
func TestHistoryRoute(t *testing.T) {
	r := newRig(t)
	root := r.root()
	series := must(root.HistorySeries(t.Context()))(t)
	var names []string
	for _, s := range series {
		names = append(names, s.Name)
	}
	if len(series) != len(history.All) {
		t.Errorf("%d series", len(series))
	}
	var d history.Deriver
	d.Next(must(r.live.Meter.Read(0))(t)) // rates need two readings
	values, _ := d.Next(must(r.live.Meter.Read(0))(t))
	for i, s := range history.All {
		if s.Unit == "s" && s.Fold == history.Max && s.Name != "checkpoint_age" || strings.HasPrefix(s.Name, "worker") {
			continue // no quantile without an observation, and no key workers in this test
		}
		if values[i] != values[i] {
			t.Errorf("%s is unknown", s.Name)
		}
	}
	h := must(root.History(t.Context(), api.HistoryQuery{Series: names, Step: 60}))(t)
	if h.Step != 60 || h.Until-h.Since < 7200 || len(h.Series) != len(names) ||
		len(h.Measured) != len(h.Series[0].Values) {
		t.Errorf("%d to %d, %d series", h.Since, h.Until, len(h.Series))
	}
	for _, q := range []api.HistoryQuery{{Series: []string{"nothing"}}, {Since: 10, Until: 5}} {
		_, err := root.History(t.Context(), q)
		wants(t, fmt.Sprintf("%+v", q), "invalid", err)
	}
	r.live.History = nil
	_, err := root.History(t.Context(), api.HistoryQuery{})
	wants(t, "no history", "not_found", err)
}
