package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/internal/history"
	"countersign/internal/ledger"
	"countersign/internal/requestid"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humaecho"
)

// Bounds of streams.
const (
	maxStreams   = 64       // in all, so that other callers have the most HTTPS connections
	maxOwn       = 16       // of one operator
	maxRecent    = 512      // events in memory, for all streams together
	maxRecentB   = 1 << 20  // bytes of these events
	maxWrite     = 64 << 10 // bytes of one write, unless one event has more
	streamTurn   = 250 * time.Millisecond
	figuresEvery = 4 // turns
	keepAlive    = 15 * time.Second
	streamLook   = 4096 // events that one reading of the log looks at
	// streamBreath is the pause after a reading for streams that were away: all of them together
	// take less than a tenth of a processor.
	streamBreath = 50 * time.Millisecond
)

// streamWrite is the time limit of one write: a slower reader is cut. Tests have a shorter one.
var streamWrite = 10 * time.Second

// topicOf returns the topic of events of a type, or "" for events that are not streamed: those that
// peers' requests cause. Every other type is streamed, also one that is new.
func topicOf(t audit.Type) string {
	switch t {
	case audit.SignatureAdmitted, audit.SignatureCreated, audit.SignatureFailed, audit.SubscriptionCreated,
		audit.PaymentInitiated, audit.PaymentCompleted, audit.PaymentFailed, audit.SignatureVerified,
		audit.SignatureRejected, audit.ReplayRefused, audit.RateLimitTriggered, audit.HandshakeRefused, "":
		return ""
	case audit.KeyCreated, audit.KeyImported, audit.KeyCreationFailed, audit.KeyRotated, audit.KeyRotationFailed,
		audit.KeyStateChanged, audit.KeyCommitted, audit.KeyRecovered, audit.KeyReturned, audit.RotationRequested,
		audit.RotationAnnounced, audit.RotationCancelled, audit.LineChanged, audit.NoiseKeyAuthorized:
		return api.TopicRotation
	case audit.RotationKnown, audit.CompromiseKnown:
		return api.TopicAcknowledgement
	case audit.ProposalMade, audit.ApprovalGiven, audit.ProposalWithdrawn, audit.ProposalExpired,
		audit.ProposalRun, audit.ProposalDone:
		return api.TopicProposal
	}
	if strings.HasPrefix(string(t), "Alert") {
		return api.TopicAlert
	}
	return api.TopicChange
}

// topicsOf returns the topics that a caller may have: what the routes show that the same roles may
// call. GET /v1/health/state is for all operators, the others are as named.
func (c caller) topicsOf() (all []string) {
	all = append(all, api.TopicState)
	if c.has(meterReaders...) { // GET /v1/metrics
		all = append(all, api.TopicTick)
	}
	if c.has(eventReaders...) { // GET /v1/events
		all = append(all, api.TopicAlert, api.TopicRotation, api.TopicAcknowledgement, api.TopicProposal,
			api.TopicChange)
	}
	return all
}

// streams reads the log, the state and the figures for all streams. The invariants:
//
//   - Nothing waits for a reader. The streams have positions in the log, and no queues. A write has
//     a time limit, after which the reader is cut.
//   - The id of an event is its number in the log. A reader that comes back with the id of its last
//     event gets each later event of its topics once, also after a restart, or is told which
//     numbers the log does not have any more.
//   - No event of a time after the end of a session is written to the session's stream. A change of
//     an operator or of its roles ends its sessions, and so its streams.
//   - The numbers of streams are bounded, in all and for each operator.
type streams struct {
	*server
	mu      sync.Mutex
	open    map[string]int // streams by operator
	running bool
	ended   bool
	wake    chan struct{} // closed at the end of each turn

	first, end uint64 // recent has all events of topics with the numbers first <= number < end
	recent     []streamed
	recentB    int
	state      figures
	tick       figures

	replaying chan struct{} // has one place, for the stream that reads the log
}

// streamed is an event of a topic with its JSON.
type streamed struct {
	index uint64
	topic string
	data  []byte
}

// figures is a document that replaces the one before. version grows with each change; 0: none yet.
type figures struct {
	data    []byte
	version uint64
}

func newStreams(s *server) *streams {
	return &streams{server: s, open: map[string]int{}, wake: make(chan struct{}), replaying: make(chan struct{}, 1)}
}

// enter takes a place for a stream of an operator.
func (s *streams) enter(operator string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := 0
	for _, n := range s.open {
		all += n
	}
	switch {
	case s.ended:
		return unavailable.errorf("the daemon stops")
	case all >= maxStreams:
		return limited("all operators together have %d streams, as many as there may be", maxStreams)
	case s.open[operator] >= maxOwn:
		return limited("operator %s has %d streams, as many as one may have: end one of them", operator, maxOwn)
	}
	s.open[operator]++
	if !s.running {
		s.running = true
		s.first = s.Appliance.EventsEnd()
		s.end, s.recent, s.recentB, s.state, s.tick = s.first, nil, 0, figures{}, figures{}
		go s.run()
	}
	return nil
}

// limited is a refusal that a reader may try again after the time limit of a write, when a stream
// that is dead has lost its place.
func limited(format string, args ...any) error {
	e := rateLimited.document(fmt.Sprintf(format, args...))
	e.RetryAfter = int(streamWrite / time.Second)
	return e
}

func (s *streams) leave(operator string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[operator]--; s.open[operator] == 0 {
		delete(s.open, operator)
	}
}

// run does turns until there is no stream.
func (s *streams) run() {
	ticker := time.NewTicker(streamTurn)
	defer ticker.Stop()
	var d history.Deriver
	for turn := 0; s.turn(&d, turn%figuresEvery == 0); turn++ {
		<-ticker.C
	}
}

// turn reads what is new, and wakes the streams. The result is false at the end of the last stream.
func (s *streams) turn(d *history.Deriver, full bool) bool {
	var state, tick []byte
	if full {
		state = encode(s.healthDoc(true))
		tick = s.figures(d)
	}
	s.mu.Lock()
	end := s.end
	s.mu.Unlock()
	var found []streamed
	for range 16 { // at most 65536 events in a turn: more come in the next one
		f, err := s.Appliance.ReadEvents(end, part(func(string) bool { return true }))
		if err != nil {
			s.Log.Error("the stream of events can't read the log", "err", err)
		}
		found = append(found, documents(f)...)
		done := f.After == end || err != nil
		if end = f.After; done {
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end = end
	for _, e := range found {
		s.recent, s.recentB = append(s.recent, e), s.recentB+len(e.data)
	}
	for len(s.recent) > maxRecent || s.recentB > maxRecentB {
		s.first, s.recentB = s.recent[0].index+1, s.recentB-len(s.recent[0].data)
		s.recent = slices.Delete(s.recent, 0, 1)
	}
	if state != nil && string(state) != string(s.state.data) {
		s.state = figures{state, s.state.version + 1}
	}
	if tick != nil {
		s.tick = figures{tick, s.tick.version + 1}
	}
	close(s.wake)
	s.wake = make(chan struct{})
	s.running = len(s.open) > 0
	return s.running
}

// part is what one reading of the log takes for streams.
func part(wants func(topic string) bool) ledger.Part {
	return ledger.Part{
		Wants: func(t audit.Type) bool {
			topic := topicOf(t)
			return topic != "" && wants(topic)
		},
		Events: maxRecent, Bytes: maxWrite, Look: streamLook,
	}
}

func documents(f ledger.Found) []streamed {
	return docs(f.Events, func(e ledger.Entry) streamed {
		return streamed{e.Index, topicOf(e.Event.Type), encode(api.Event{Index: e.Index, Event: e.Event})}
	})
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("admin: a document that is no JSON: " + err.Error())
	}
	return b
}

// figures returns the main figures of the history over the last second, or nil.
func (s *streams) figures(d *history.Deriver) []byte {
	if s.Meter == nil {
		return nil
	}
	r, err := s.Meter.Read(streamTurn) // a collection of now serves others too
	if err != nil {
		s.Log.Error("the figures of the stream can't be read", "err", err)
		return nil
	}
	values, elapsed := d.Next(r)
	if elapsed <= 0 {
		return nil // rates need two readings
	}
	doc := api.Tick{TimeMS: r.At.UnixMilli(), Figures: map[string]*float32{}}
	for i, of := range history.All {
		if of.Main {
			doc.Figures[of.Name] = valueDoc(values[i])
		}
	}
	return encode(doc)
}

type streamInput struct {
	Topics      string `query:"topics" maxLength:"200" doc:"with commas in between; none: all that the caller may have"`
	LastEventID string `header:"Last-Event-ID" maxLength:"20" doc:"the id of the last event that the caller has"`
}

// stream is one stream.
type stream struct {
	who     caller
	topics  []string
	events  bool   // there is a topic of events
	next    uint64 // number of the next event to look at
	state   uint64 // version of the last state that was written
	tick    uint64
	idSent  time.Time
	written time.Time
}

func (st *stream) has(topic string) bool { return slices.Contains(st.topics, topic) }

// follow answers with a stream that begins after the last event that the caller has, or without one
// with the next event.
func (s *server) follow(ctx context.Context, who caller, in *streamInput) (*huma.StreamResponse, error) {
	st := &stream{who: who, topics: who.topicsOf()}
	if in.Topics != "" {
		asked := strings.Split(in.Topics, ",")
		for _, topic := range asked {
			switch {
			case !slices.Contains(api.Topics, topic):
				return nil, invalid.errorf("topics: there is no topic %.20q; there are %s", topic,
					strings.Join(api.Topics, ", "))
			case !st.has(topic):
				return nil, notAllowed.errorf("the topic %s is for operators with other roles: "+
					"omit topics to get all that is for you", topic)
			}
		}
		st.topics = asked
	}
	st.events = slices.ContainsFunc(st.topics, func(name string) bool {
		return name != api.TopicState && name != api.TopicTick
	})
	begin := []byte("retry: 2000\n\n")
	end := s.Appliance.EventsEnd()
	st.next = end
	if in.LastEventID != "" && st.events {
		last, err := numberAfter(in.LastEventID)
		if err != nil {
			return nil, invalid.errorf("Last-Event-ID: %.20q is not the id of an event", in.LastEventID)
		}
		if st.next = last + 1; st.next > end { // the ledger is an older one
			gap := api.StreamGap{From: end, Before: st.next, Why: api.GapAhead}
			begin = appendSSE(begin, api.TopicGap, end-1, encode(gap))
			st.next = end
		}
	} else {
		begin = appendID(begin, end-1) // a log has at least one event
	}
	if err := s.streams.enter(who.session.Operator); err != nil {
		return nil, err
	}
	return &huma.StreamResponse{Body: func(c huma.Context) {
		defer s.streams.leave(who.session.Operator)
		c.SetHeader("Content-Type", "text/event-stream")
		c.SetStatus(http.StatusOK)
		if head, _ := ctx.Value(headKey{}).(bool); !head {
			s.streams.serve(c, st, begin)
		}
	}}, nil
}

// serve writes a stream until it ends: by the reader, by the end of the session, by a shutdown, or
// because the reader is too slow.
func (s *streams) serve(c huma.Context, st *stream, begin []byte) {
	w := humaecho.Unwrap(c).Response()
	control := http.NewResponseController(w.Writer) // echo's own Flush has no error
	control.SetReadDeadline(time.Time{})            // the time limit of a request is over; nothing more is read
	write := func(b []byte) error {
		control.SetWriteDeadline(time.Now().Add(streamWrite))
		_, err := w.Write(b)
		return errors.Join(err, control.Flush())
	}
	err := write(begin)
	st.written, st.idSent = time.Now(), time.Now()
	for err == nil {
		b, wake := s.take(st)
		var broken error
		if b == nil && wake != nil && s.behind(st) {
			b, broken = s.replay(c.Context(), st)
		}
		code := ""
		switch {
		case broken != nil:
			s.Log.Error("a stream of events can't read the log", requestid.Attr(st.who.Request), "err", broken)
			code = unavailable.code
		case !s.Operators.Live(*st.who.session): // after the reading of b
			code = signedOut.code
		case wake == nil:
			code = api.EndStopping
		}
		if code != "" {
			if c.Context().Err() != nil {
				return
			}
			write(appendSSE(nil, api.TopicEnd, math.MaxUint64, encode(api.StreamEnd{Code: code})))
			return
		}
		if len(b) > 0 {
			err = write(b)
			st.written = time.Now()
			continue
		}
		select {
		case <-c.Context().Done():
			return
		case <-wake:
		}
	}
	if c.Context().Err() == nil {
		s.Log.Warn("a stream of events was cut: its reader is too slow", "operator", st.who.session.Operator,
			"channel", st.who.Channel.String(), requestid.Attr(st.who.Request))
	}
}

// behind reports whether memory does not have all events that a stream needs.
func (s *streams) behind(st *stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return st.events && st.next < s.first
}

// replay reads the next part of the log for a stream that was away. One stream at a time reads.
func (s *streams) replay(ctx context.Context, st *stream) (b []byte, err error) {
	select {
	case s.replaying <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer time.AfterFunc(streamBreath, func() { <-s.replaying })
	f, err := s.Appliance.ReadEvents(st.next, part(st.has))
	if f.Dropped > 0 {
		b = appendSSE(b, api.TopicGap, st.next+f.Dropped-1,
			encode(api.StreamGap{From: st.next, Before: st.next + f.Dropped, Why: api.GapDropped}))
	}
	for _, e := range documents(f) {
		b = appendSSE(b, e.topic, e.index, e.data)
	}
	st.idSent = time.Now()
	if st.next = f.After; len(b) == 0 && err == nil { // a long way without an event of the topics
		b = appendID(b, st.next-1)
	}
	return b, err
}

// take returns what memory has for a stream; nothing: the stream is behind, or waits for wake.
// Without a wake, all streams end.
func (s *streams) take(st *stream) (b []byte, wake <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, nil
	}
	wake = s.wake
	if st.events && st.next < s.first {
		return nil, wake
	}
	at, _ := slices.BinarySearchFunc(s.recent, st.next, func(e streamed, next uint64) int {
		return cmp.Compare(e.index, next)
	})
	for _, e := range s.recent[at:] {
		if len(b) > maxWrite {
			return b, wake
		}
		if st.next = e.index + 1; st.has(e.topic) {
			b = appendSSE(b, e.topic, e.index, e.data)
			st.idSent = time.Now()
		}
	}
	st.next = max(st.next, s.end)
	if st.has(api.TopicState) && st.state != s.state.version {
		st.state = s.state.version
		b = appendSSE(b, api.TopicState, math.MaxUint64, s.state.data)
	}
	if st.has(api.TopicTick) && st.tick != s.tick.version {
		st.tick = s.tick.version
		b = appendSSE(b, api.TopicTick, math.MaxUint64, s.tick.data)
	}
	if time.Since(st.idSent) >= keepAlive { // a position in the log, and a sign of life
		b, st.idSent = appendID(b, st.next-1), time.Now()
	}
	return b, wake
}

// shut ends all streams: the server shuts down.
func (s *streams) shut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	close(s.wake)
	s.wake = make(chan struct{})
}

// appendSSE appends an event of the topic, without an id for the number math.MaxUint64. data is
// JSON on one line.
func appendSSE(b []byte, topic string, id uint64, data []byte) []byte {
	if id != math.MaxUint64 {
		b = append(strconv.AppendUint(append(b, "id: "...), id, 10), '\n')
	}
	b = append(append(append(b, "event: "...), topic...), "\ndata: "...)
	return append(append(b, data...), "\n\n"...)
}

// appendID appends an id without an event: the reader keeps the id as that of its last event.
func appendID(b []byte, id uint64) []byte {
	return append(strconv.AppendUint(append(b, "id: "...), id, 10), "\n\n"...)
}
