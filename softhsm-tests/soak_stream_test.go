package softhsmtests

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"

	"countersign/admin/api"
	"countersign/audit"
)

// soakReaders is the number of readers of the event stream during a soak.
const soakReaders = 10

// streamReader is a reader of GET /v1/stream by plain HTTP. The reader leaves now and then, and
// goes on by Last-Event-ID.
type streamReader struct {
	mu    sync.Mutex
	last  string   // id of the last event
	got   []uint64 // numbers of the events of the log
	begun bool     // the appliance has sent something
	cuts  int
}

// fromPeers are the events of peers' requests, which are not streamed.
var fromPeers = map[audit.Type]bool{
	audit.HandshakeRefused: true, audit.PaymentCompleted: true, audit.PaymentFailed: true,
	audit.PaymentInitiated: true, audit.RateLimitTriggered: true, audit.ReplayRefused: true,
	audit.SignatureAdmitted: true, audit.SignatureCreated: true, audit.SignatureFailed: true,
	audit.SignatureRejected: true, audit.SignatureVerified: true, audit.SubscriptionCreated: true,
}

// readStream starts the readers, and waits until each has begun. An API without the stream has no
// readers.
func (k *soak) readStream() {
	described := must(os.ReadFile("../admin/openapi.json"))(k.t)
	if !strings.Contains(string(described), `"/v1/stream"`) {
		k.t.Log("the API has no stream of events")
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	token := must(k.signIn(ctx, k.root))(k.t)
	var reading sync.WaitGroup
	k.stopReading = func() {
		stop()
		reading.Wait()
	}
	k.t.Cleanup(k.stopReading)
	for n := range soakReaders {
		r := new(streamReader)
		k.readers = append(k.readers, r)
		random := rand.New(rand.NewPCG(k.seed, uint64(1000+n)))
		reading.Go(func() {
			for ctx.Err() == nil {
				err := r.read(ctx, k.path("admin.sock"), token, 20+random.IntN(200))
				if err != nil && ctx.Err() == nil {
					k.surprise("reader %d of the stream: %v", n, err)
					return
				}
			}
		})
	}
	for _, r := range k.readers {
		eventually(k.t, "a reader of the stream begins", func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.begun
		})
	}
}

// read reads up to most events of the log, and leaves.
func (r *streamReader) read(ctx context.Context, socket, token string, most int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet,
		"http://countersign/v1/stream?topics=state,rotation,acknowledgement,proposal,change,alert", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	r.mu.Lock()
	if r.last != "" {
		req.Header.Set("Last-Event-ID", r.last)
	}
	r.mu.Unlock()
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	var topic, id, data string
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	for most > 0 && lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ":")
		switch value = strings.TrimPrefix(value, " "); name {
		case "event":
			topic = value
		case "id":
			id = value
		case "data":
			data += value
		case "": // the end of an event, or a comment
			if lines.Text() != "" {
				break
			}
			if err := r.take(topic, id, data, &most); err != nil {
				return err
			}
			topic, data = "", ""
		}
	}
	r.mu.Lock()
	r.cuts++
	r.mu.Unlock()
	return lines.Err()
}

// take takes one event of the stream.
func (r *streamReader) take(topic, id, data string, most *int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begun = true
	if id != "" {
		r.last = id
	}
	switch topic {
	case "", "state", "tick":
		return nil
	case "gap", "end":
		return fmt.Errorf("%s: %s", topic, data)
	}
	var e api.Event
	if err := json.Unmarshal([]byte(data), &e); err != nil {
		return fmt.Errorf("%s %q: %w", topic, data, err)
	}
	if n := len(r.got); n > 0 && e.Index <= r.got[n-1] {
		return fmt.Errorf("event %d after event %d", e.Index, r.got[n-1])
	}
	r.got = append(r.got, e.Index)
	*most--
	return nil
}

// checkStream compares what each reader has with the log: each event once, in order, across all
// reconnections.
func (k *soak) checkStream() {
	t := k.t
	t.Helper()
	if k.readers == nil {
		return
	}
	var want []uint64
	k.walk(k.first, func(e api.Event) {
		if !fromPeers[e.Type] {
			want = append(want, e.Index)
		}
	})
	cuts := 0
	for n, r := range k.readers {
		eventually(t, fmt.Sprintf("reader %d has the last event", n), func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return len(r.got) > 0 && r.got[len(r.got)-1] >= want[len(want)-1]
		})
		has := map[uint64]bool{}
		for _, index := range r.got {
			has[index] = true
		}
		for _, index := range want {
			if !has[index] {
				t.Errorf("reader %d of the stream has no event %d", n, index)
				break
			}
		}
		cuts += r.cuts
	}
	k.stopReading()
	t.Logf("%d readers have had %d events of the stream each, over %d connections", len(k.readers), len(want), cuts)
}
