package softhsmtests

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"time"

	"countersign/internal/webhook"
)

// receiver is a receiver of webhooks, which checks the signature of each message.
type receiver struct {
	s   *system
	url string

	mu  sync.Mutex
	all []received // in their order
}

// received is a message, in all its attempts.
type received struct {
	id, body string
	attempts int
	kind     string
	data     struct {
		Code, Subject, Level string
		Repeated             bool
	}
}

// receiver starts a receiver.
func (s *system) receiver() *receiver {
	r := &receiver{s: s}
	server := httptest.NewServer(r)
	s.t.Cleanup(server.Close)
	r.url = server.URL
	return r
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	body, err := io.ReadAll(q.Body)
	if err != nil {
		return // the daemon was killed
	}
	r.s.checkOutput("the body of a webhook", string(body))
	logged, err := r.s.admin().Log(q.Context())
	if err != nil {
		http.Error(w, "later", http.StatusServiceUnavailable)
		return
	}
	key, err := webhook.ParseKey(logged.WebhookKey)
	if err == nil {
		err = webhook.Verify(key, q.Header, body, time.Now(), webhook.Tolerance)
	}
	m := received{id: q.Header.Get("Webhook-Id"), body: string(body), attempts: 1}
	parts := struct{ Type, Data any }{&m.kind, &m.data}
	if err == nil {
		err = json.Unmarshal(body, &parts)
	}
	if err != nil {
		r.s.t.Errorf("a webhook: %v\n%s", err, body)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, before := range r.all {
		if before.id == m.id {
			if before.body != m.body && m.kind != "audit.events" {
				r.s.t.Errorf("message %s has two bodies:\n%s\n%s", m.id, before.body, m.body)
			}
			r.all[i].attempts++
			return
		}
	}
	r.all = append(r.all, m)
}

// of returns the messages of a type.
func (r *receiver) of(kind string) (some []received) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.all {
		if m.kind == kind {
			some = append(some, m)
		}
	}
	return some
}
