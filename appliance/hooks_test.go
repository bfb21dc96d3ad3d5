package appliance

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/webhook"
	"countersign/wire"
)

// receiver is somebody with a webhook, who believes what the log's key has signed.
type receiver struct {
	*httptest.Server
	t   *testing.T
	key ed25519.PublicKey

	mu     sync.Mutex
	status []int         // of the next answers; then 204
	hold   chan struct{} // where it is set, no answer comes before it is closed
	tries  int
	got    []heard
	more   chan struct{}
}

type heard struct {
	id   string
	body hookBody
}

func newReceiver(t *testing.T, status ...int) *receiver {
	h := &receiver{t: t, status: status, more: make(chan struct{}, 1000)}
	h.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if h.hold != nil {
			<-h.hold
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.tries++
		defer func() { h.more <- struct{}{} }()
		if err == nil {
			err = webhook.Verify(h.key, r.Header, body, time.Now(), webhook.Tolerance)
		}
		if err != nil {
			h.t.Errorf("a message that nobody should believe: %v", err)
		}
		if len(h.status) > 0 {
			code := h.status[0]
			h.status = h.status[1:]
			w.WriteHeader(code)
			return
		}
		var b hookBody
		if err := json.Unmarshal(body, &b); err != nil {
			h.t.Error(err)
		}
		h.got = append(h.got, heard{r.Header.Get("Webhook-Id"), b})
		w.WriteHeader(http.StatusNoContent)
	}))
	t.Cleanup(h.Close)
	return h
}

// hears waits until so many messages were taken, and returns their ids in alphabetical order.
func (h *receiver) hears(n int) (ids []string) {
	h.t.Helper()
	for {
		h.mu.Lock()
		got := slices.Clone(h.got)
		h.mu.Unlock()
		if len(got) >= n {
			for _, m := range got {
				ids = append(ids, m.id)
			}
			slices.Sort(ids)
			return ids
		}
		select {
		case <-h.more:
		case <-time.After(patience):
			h.t.Fatalf("%d messages, want %d", len(got), n)
		}
	}
}

// hearsOf waits until a message was taken.
func (h *receiver) hearsOf(id string) {
	h.t.Helper()
	for n := 1; !slices.Contains(h.hears(n), id); n++ {
	}
}

func (h *receiver) heard(id string) hookBody {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.got {
		if m.id == id {
			return m.body
		}
	}
	h.t.Fatalf("nothing was heard of %s", id)
	return hookBody{}
}

// tell makes the edge tell a receiver, from its next start on.
func (e *edge) tell(receivers ...*receiver) {
	e.t.Helper()
	e.close()
	e.open()
	k, err := e.Keys.LogKey()
	if err != nil {
		e.t.Fatal(err)
	}
	e.webhooks = nil
	for i, h := range receivers {
		h.key = k.Info().PublicKey
		e.webhooks = append(e.webhooks, webhook.Target{Name: fmt.Sprintf("target-%d", i), URL: h.URL})
	}
	e.serve()
}

// toldOf waits until the ledger says that a target was told.
func (e *edge) toldOf(id string) {
	e.t.Helper()
	for end := time.Now().Add(patience); !slices.Contains(slices.Collect(e.marks()), id); {
		if time.Now().After(end) {
			e.t.Fatalf("it is not written down that %s was told", id)
		}
		if err := e.ledger.Alive(e.t.Context()); err != nil {
			e.t.Fatal(err)
		}
	}
}

func same(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestWebhook: a rotation is told once, with a signature of the log's key; what was delivered is
// not told again after a restart, and what is new is, as is that the version before is compromised.
func TestWebhook(t *testing.T) {
	e := newEdge(t, nil)
	h := newReceiver(t)
	e.tell(h)
	k, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	same(t, h.hears(1), "rotation_payments_2")
	m := h.heard("rotation_payments_2")
	if d := m.Data; m.Type != "key.rotation" || d.Event != wire.EventRotation || d.Key != "payments" || d.PublicKey != wire.Bytes32(k.Info().PublicKey) || d.Succession == nil || d.Compromised {
		t.Errorf("%+v", m)
	}
	if age := time.Since(m.Timestamp); age < -time.Minute || age > time.Minute {
		t.Errorf("it says that it is of %v", m.Timestamp)
	}
	e.toldOf("rotation_payments_2")
	e.tell(h)
	if _, err := e.Keys.Rotate(t.Context(), operator, keyring.NoiseName, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	same(t, h.hears(2), "rotation_noise_2", "rotation_payments_2") // not the other one again
	e.toldOf("rotation_noise_2")
	// A version that has been followed turns out to be compromised: they must hear of it at once.
	if err := e.Keys.Compromise(t.Context(), approved, "payments", 1, "stolen"); err != nil {
		t.Fatal(err)
	}
	same(t, h.hears(3), "rotation_noise_2", "rotation_payments_2", "rotation_payments_2_compromised")
	if d := h.heard("rotation_payments_2_compromised").Data; !d.Compromised || d.RetiresAt != d.ActivatesAt || d.Version != 2 {
		t.Errorf("%+v", d)
	}
	e.toldOf("rotation_payments_2_compromised")
	if err := e.Keys.Compromise(t.Context(), approved, "payments", 2, "stolen"); err != nil {
		t.Fatal(err)
	}
	same(t, h.hears(4), "rotation_noise_2", "rotation_payments_2", "rotation_payments_2_compromised", "rotation_payments_3_compromised")
	e.toldOf("rotation_payments_3_compromised")
	e.tell(h)
	e.stop()
	same(t, h.hears(4), "rotation_noise_2", "rotation_payments_2", "rotation_payments_2_compromised", "rotation_payments_3_compromised")
}

// TestWebhookIsTriedAgain: one that does not take it does not keep it from another, and gets it in
// the end, the last time after a restart.
func TestWebhookIsTriedAgain(t *testing.T) {
	e := newEdge(t, nil)
	fine, ill := newReceiver(t), newReceiver(t, 500)
	e.tell(fine, ill)
	if _, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
		t.Fatal(err)
	}
	same(t, fine.hears(1), "rotation_payments_2")
	e.toldOf("rotation_payments_2")
	<-ill.more // it has refused it
	e.tell(fine, ill)
	same(t, ill.hears(1), "rotation_payments_2")
	e.stop()
	same(t, fine.hears(1), "rotation_payments_2")
	if ill.tries != 2 {
		t.Errorf("tried %d times", ill.tries)
	}
}

// TestWebhookAfterAnError: it is tried again by itself.
func TestWebhookAfterAnError(t *testing.T) {
	e := newEdge(t, nil)
	h := newReceiver(t, 500)
	e.tell(h)
	if _, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
		t.Fatal(err)
	}
	same(t, h.hears(1), "rotation_payments_2")
	if h.tries != 2 || !strings.Contains(e.log.String(), "not delivered") {
		t.Errorf("tried %d times", h.tries)
	}
}

// marks are what the ledger says that targets were told.
func (e *edge) marks() iter.Seq[string] {
	return func(yield func(string) bool) {
		e.ledger.All(ledger.Meta, func(name string, value []byte) error {
			if strings.HasPrefix(name, hookKeys) && !yield(string(value)) {
				return errors.New("enough")
			}
			return nil
		})
	}
}

// TestWebhookThatIsSlow: what waits for it is not handed in once more when there is something else.
func TestWebhookThatIsSlow(t *testing.T) {
	e := newEdge(t, nil)
	h, quick := newReceiver(t), newReceiver(t)
	h.hold = make(chan struct{})
	e.tell(h, quick)
	for i, name := range []string{"payments", keyring.NoiseName} {
		if _, err := e.Keys.Rotate(t.Context(), operator, name, time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		quick.hears(i + 1)
	}
	close(h.hold)
	e.toldOf("rotation_noise_2")
	if _, err := e.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "a-last-one"}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Keys.Rotate(t.Context(), operator, "a-last-one", time.Now()); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*receiver{h, quick} { // the oldest goes first, so that nothing is behind the last one
		h.hearsOf("rotation_a-last-one_2")
		same(t, h.hears(3), "rotation_a-last-one_2", "rotation_noise_2", "rotation_payments_2")
	}
}
