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

	"countersign/internal/cause"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/scantest"
	"countersign/internal/secret"
	"countersign/internal/webhook"
	"countersign/wire"
)

// receiver is the receiver of a webhook. The receiver verifies signatures with the audit log's key.
type receiver struct {
	*httptest.Server
	t   *testing.T
	key ed25519.PublicKey

	mu     sync.Mutex
	status []int         // status codes of the next answers; then 204
	hold   chan struct{} // if set, answers wait until hold is closed
	tries  int
	got    []heard
	more   chan struct{}
}

// heard is a received message.
type heard struct {
	id   string
	body hookBody
}

// hookToken is the secret in the URL of each receiver.
const hookToken = "url-secret-of-the-hooks"

func init() { scantest.Secret("the secret in the URL of a webhook", []byte(hookToken)) }

// newReceiver starts a receiver, with status codes for its first answers.
func newReceiver(t *testing.T, status ...int) *receiver {
	h := &receiver{t: t, status: status, more: make(chan struct{}, 1000)}
	h.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if h.hold != nil {
			<-h.hold
		}
		scantest.Saw("a webhook", string(body))
		h.mu.Lock()
		defer h.mu.Unlock()
		h.tries++
		defer func() { h.more <- struct{}{} }()
		if err == nil {
			err = webhook.Verify(h.key, r.Header, body, time.Now(), webhook.Tolerance)
		}
		if err != nil {
			h.t.Errorf("a message without a valid signature: %v", err)
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

// hears waits for n messages, and returns the ids of all messages in alphabetical order.
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

// hearsOf waits for the message with an id.
func (h *receiver) hearsOf(id string) {
	h.t.Helper()
	for n := 1; !slices.Contains(h.hears(n), id); n++ {
	}
}

// heard returns the body of the message with an id.
func (h *receiver) heard(id string) hookBody {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.got {
		if m.id == id {
			return m.body
		}
	}
	h.t.Fatalf("there is no message %s", id)
	return hookBody{}
}

// tell restarts the edge with receivers as its webhooks.
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
		target := webhook.Target{Name: fmt.Sprintf("target-%d", i), URL: secret.Of(h.URL + "/?token=" + hookToken)}
		e.webhooks = append(e.webhooks, target)
	}
	e.serve()
}

// toldOf waits until the ledger has the delivery of a message.
func (e *edge) toldOf(id string) {
	e.t.Helper()
	for end := time.Now().Add(patience); !slices.Contains(slices.Collect(e.marks()), id); {
		if time.Now().After(end) {
			e.t.Fatalf("the ledger does not have the delivery of %s", id)
		}
		if err := e.ledger.Alive(e.t.Context()); err != nil {
			e.t.Fatal(err)
		}
	}
}

// same compares ids.
func same(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// hookID returns the id of a message of this appliance: kind_ID_key_version.
func (e *edge) hookID(kind, key string, version int) string {
	e.t.Helper()
	k, err := e.Keys.LogKey()
	if err != nil {
		e.t.Fatal(err)
	}
	return fmt.Sprintf("%s_%x_%s_%d", kind, k.Info().PublicKey[:8], key, version)
}

// dataOf decodes the event of a message.
func dataOf[T any](t *testing.T, m hookBody) (event T) {
	t.Helper()
	if err := json.Unmarshal(m.Data, &event); err != nil {
		t.Fatalf("%s: %v", m.Data, err)
	}
	return event
}

// TestWebhook: a rotation is one message with a signature of the audit log's key. A restart does
// not send a delivered message again. A compromise is a message of its own, wherever the version is
// in its line. The ids name the appliance.
func TestWebhook(t *testing.T) {
	e := newEdge(t, nil)
	h := newReceiver(t)
	e.tell(h)
	k, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	payments2, noise2 := e.hookID("rotation", "payments", 2), e.hookID("rotation", "noise", 2)
	same(t, h.hears(1), payments2)
	m := h.heard(payments2)
	if d := dataOf[wire.Rotation](t, m); m.Type != "key.rotation" || d.Event != wire.EventRotation ||
		d.Key != "payments" || d.PublicKey != wire.Bytes32(k.Info().PublicKey) || d.Succession == nil {
		t.Errorf("%+v", m)
	}
	if age := time.Since(m.Timestamp); age < -time.Minute || age > time.Minute {
		t.Errorf("the timestamp is %v", m.Timestamp)
	}
	e.toldOf(payments2)
	e.tell(h)
	if _, err := e.Keys.Rotate(t.Context(), operator, keyring.NoiseName, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	same(t, h.hears(2), noise2, payments2)
	e.toldOf(noise2)
	if _, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
		t.Fatal(err)
	}
	payments3 := e.hookID("rotation", "payments", 3)
	same(t, h.hears(3), noise2, payments2, payments3)
	e.toldOf(payments3)
	// The compromise of an earlier version is sent at once, without a new rotation.
	if err := e.Keys.Compromise(t.Context(), approved, "payments", 1, "stolen"); err != nil {
		t.Fatal(err)
	}
	stolen1 := e.hookID("compromise", "payments", 1)
	want := []string{stolen1, noise2, payments2, payments3}
	same(t, h.hears(4), want...)
	m = h.heard(stolen1)
	wanted := wire.Compromise{
		Event: wire.EventCompromise, Key: "payments", Version: 1,
		PublicKey: wire.Bytes32(e.Keys.Version("payments", 1).Info().PublicKey),
	}
	if d := dataOf[wire.Compromise](t, m); m.Type != "key.compromise" || d != wanted {
		t.Errorf("%+v", m)
	}
	e.toldOf(stolen1)
	if err := e.Keys.Compromise(t.Context(), approved, "payments", 3, "stolen"); err != nil {
		t.Fatal(err)
	}
	stolen3, payments4 := e.hookID("compromise", "payments", 3), e.hookID("rotation", "payments", 4)
	want = []string{stolen1, stolen3, noise2, payments2, payments3, payments4}
	same(t, h.hears(6), want...)
	e.toldOf(stolen3)
	e.toldOf(payments4)
	e.tell(h)
	e.stop()
	same(t, h.hears(6), want...)
}

// TestWebhookIsTriedAgain: the refusal of one receiver does not delay another receiver. After a
// restart the message is sent again to the first receiver only.
func TestWebhookIsTriedAgain(t *testing.T) {
	e := newEdge(t, nil)
	fine, ill := newReceiver(t), newReceiver(t, 500)
	e.tell(fine, ill)
	if _, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
		t.Fatal(err)
	}
	same(t, fine.hears(1), e.hookID("rotation", "payments", 2))
	e.toldOf(e.hookID("rotation", "payments", 2))
	<-ill.more // the message has been refused
	eventually(t, "the refusal is a cause", func() bool {
		return slices.Contains(codes(e.Appliance), cause.Webhook.Code)
	})
	e.tell(fine, ill)
	same(t, ill.hears(1), e.hookID("rotation", "payments", 2))
	e.stop()
	same(t, fine.hears(1), e.hookID("rotation", "payments", 2))
	if ill.tries != 2 {
		t.Errorf("tried %d times", ill.tries)
	}
}

// TestWebhookAfterAnError: a refused message is retried without a restart.
func TestWebhookAfterAnError(t *testing.T) {
	e := newEdge(t, nil)
	h := newReceiver(t, 500)
	e.tell(h)
	if _, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
		t.Fatal(err)
	}
	same(t, h.hears(1), e.hookID("rotation", "payments", 2))
	if h.tries != 2 || !strings.Contains(e.log.String(), "not delivered") {
		t.Errorf("tried %d times", h.tries)
	}
	e.toldOf(e.hookID("rotation", "payments", 2))
	if got := codes(e.Appliance); slices.Contains(got, cause.Webhook.Code) {
		t.Errorf("the causes are %v after the delivery", got)
	}
}

// marks yields the ids of delivered messages in the ledger.
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

// TestWebhookThatIsSlow: messages in the queue of a slow receiver are not queued again with later
// news.
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
	e.toldOf(e.hookID("rotation", "noise", 2))
	if _, err := e.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "a-last-one"}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Keys.Rotate(t.Context(), operator, "a-last-one", time.Now()); err != nil {
		t.Fatal(err)
	}
	want := []string{
		e.hookID("rotation", "a-last-one", 2), e.hookID("rotation", "noise", 2), e.hookID("rotation", "payments", 2),
	}
	for _, h := range []*receiver{h, quick} { // messages are sent in order, so none follows the last one
		h.hearsOf(want[0])
		same(t, h.hears(3), want...)
	}
}

// TestWebhookOfTheEnd: a rotation that was moved or called off is a message of its own, also after
// a restart.
func TestWebhookOfTheEnd(t *testing.T) {
	e := newEdge(t, nil)
	h := newReceiver(t)
	e.tell(h)
	at := time.Now().Add(time.Hour)
	rotate := func() {
		t.Helper()
		if _, err := e.Keys.Rotate(t.Context(), operator, "payments", at); err != nil {
			t.Fatal(err)
		}
	}
	first := e.hookID("rotation", "payments", 2)
	moved, ended := first+"_change1", e.hookID("rotation", "payments", 1)+"_change2"
	rotation := func(id string) wire.Rotation { t.Helper(); return dataOf[wire.Rotation](t, h.heard(id)) }
	rotate()
	h.hears(1)
	at = at.Add(time.Hour)
	rotate()
	same(t, h.hears(2), first, moved)
	if d := rotation(moved); d.ActivatesAt != at.Unix() || d.Change != 1 {
		t.Errorf("%+v", d)
	}
	e.toldOf(moved)
	e.tell() // no receiver
	if err := e.Keys.Cancel(t.Context(), operator, "payments"); err != nil {
		t.Fatal(err)
	}
	e.tell(h)
	same(t, h.hears(3), ended, first, moved)
	if d := rotation(ended); d.Cancelled != 2 || d.Version != 1 {
		t.Errorf("%+v", d)
	}
	e.toldOf(ended)
}
