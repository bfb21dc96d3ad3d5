package softhsmtests

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/client"
	"countersign/policy"
)

// defaultKills is the number of kills in TestKilledUnderLoad. The environment variable KILLS
// overrides the number.
const defaultKills = 100

// TestKilledUnderLoad kills the daemon with SIGKILL at random moments while eight connections sign,
// and compares the answers with the ledger afterwards:
//
//   - the ledger reopens, and its events are numbered without gaps;
//   - every released signature has its admission in the log, for its nonce and its digest;
//   - no nonce has two admissions;
//   - for a request that was admitted, answered or not, an identical request gets the same
//     signature, and a request with other content and the same nonce is a replay;
//   - policy has counted each admission and nothing else: the nth admission was decided with n
//     signatures of this key;
//   - every checkpoint that the daemon has published is a prefix of the audit log, and the log
//     keeps the ledger's rules.
//
// SIGKILL does not lose writes in the kernel's page cache. A power cut does: packages ledger and
// disktest test the fsync that protects against this loss.
func TestKilledUnderLoad(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	rounds := defaultKills
	if v := os.Getenv("KILLS"); v != "" {
		var err error
		if rounds, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
	}

	config := s.clientConfig()
	var mu sync.Mutex
	asked := map[[32]byte]*request{}
	answers := 0
	shown := s.monitor()
	for round := range rounds {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		before := len(shown.checkpoints)
		wg.Go(func() { shown.watch(ctx, s.admin()) })
		for range 8 {
			c, err := client.Dial(ctx, config)
			if err != nil {
				t.Fatal(err)
			}
			for range 4 { // requests in flight on a connection
				wg.Go(func() {
					for ctx.Err() == nil {
						q := newRequest()
						mu.Lock()
						asked[q.document.Nonce] = q
						mu.Unlock()
						signed, err := c.Sign(ctx, "payments", q.document)
						mu.Lock()
						if err == nil {
							q.answer = signed
							answers++
						}
						mu.Unlock()
						if err != nil {
							return
						}
					}
				})
			}
			defer c.Close()
		}
		// The kill comes between the first admission and a few thousand admissions.
		time.Sleep(time.Duration(random.IntN(60_000)) * time.Microsecond)
		p.kill()
		cancel()
		wg.Wait()
		p = s.serve()
		(&monitor{t, shown.log, shown.checkpoints[before:]}).checkConsistent(s.admin())
		if round%5 == 4 || round == rounds-1 {
			s.checkRequests(asked, len(asked))
		}
		if round%10 == 9 {
			s.must("admin", "audit", "end-epoch")
		}
	}
	s.must("admin", "audit", "export", "export")
	shown.checkConsistent(audit.Folder(s.path("export")))
	s.must("audit", "verify", "export", "--key", shown.log.VerifierKey(0))
	if answers < rounds {
		t.Errorf("only %d answers: too few for the test to prove anything", answers)
	}
	if len(shown.checkpoints) < rounds {
		t.Errorf("only %d checkpoints were seen: too few for the test to prove anything", len(shown.checkpoints))
	}
	t.Logf("%d kills, %d requests, %d answers, %d checkpoints", rounds, len(asked), answers, len(shown.checkpoints))
	s.checkPolicyCounts()
	s.mustReconcile()
	p.stop()
	if out, code := s.daemon("check", "--deep"); code != 0 {
		t.Errorf("check --deep: %d, %s", code, out)
	}
}

// checkPolicyCounts checks that the nth admission was decided with a count of n signatures.
func (s *system) checkPolicyCounts() {
	s.t.Helper()
	n := int64(0)
	for after := ""; ; {
		some, next, err := s.admin().Decisions(s.t.Context(), 0, after)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, d := range some {
			r, err := policy.ParseRecord([]byte(d.Record))
			if err != nil || !r.Allowed {
				s.t.Fatalf("event %d: %+v, %v", d.Event, r, err)
			}
			n++
			if got := r.Used[1][len(policy.Windows)-1].Signatures; got != n {
				s.t.Fatalf("event %d is admission %d and was decided with %d", d.Event, n, got)
			}
		}
		if after = next; after == "" {
			break
		}
	}
	admitted := int64(0)
	for _, e := range s.events() {
		if e.Type.Kind() == audit.Admission {
			admitted++
		}
	}
	if n != admitted || n == 0 {
		s.t.Errorf("%d decisions of %d admissions", n, admitted)
	}
}

// request is a sign request with its answer, which is nil when the request had none.
type request struct {
	document client.Document
	answer   *client.Signed
	checked  bool
}

func newRequest() *request {
	q := &request{document: message("AAAA")}
	for i := range q.document.Nonce {
		q.document.Nonce[i] = byte(rand.Uint32())
	}
	q.document.Timestamp = time.Now().Unix()
	q.document.ExpiresAt = q.document.Timestamp + 3600
	return q
}

// checkRequests compares all requests with the log. At most `most` admitted requests are sent
// again, once with other content and once unchanged.
func (s *system) checkRequests(asked map[[32]byte]*request, most int) {
	t := s.t
	t.Helper()
	admissions := map[string]api.Event{}
	for i, e := range s.events() {
		if e.Index != uint64(i) {
			t.Fatalf("event %d stands at %d", e.Index, i)
		}
		if e.Type == "SignatureAdmitted" {
			nonce := e.Metadata["nonce"]
			if other, twice := admissions[nonce]; twice {
				t.Fatalf("nonce %s is admitted by events %d and %d", nonce, other.Index, e.Index)
			}
			admissions[nonce] = e
		}
	}
	c := s.dial()
	for nonce, q := range asked {
		if q.checked {
			continue
		}
		q.checked = true
		admission, admitted := admissions[hex.EncodeToString(nonce[:])]
		if q.answer != nil && (!admitted || admission.Index != q.answer.Event) {
			t.Fatalf("a signature was released as event %d; the log has event %d (%v)",
				q.answer.Event, admission.Index, admitted)
		}
		if !admitted || most <= 0 {
			continue
		}
		most--
		other := q.document
		other.Payload = message("BBBB").Payload
		var refusal *client.Error
		if _, err := c.Sign(t.Context(), "payments", other); !errors.As(err, &refusal) || refusal.Code != "replay" {
			t.Fatalf("a spent nonce with other content: %v", err)
		}
		again, err := c.Sign(t.Context(), "payments", q.document)
		if err != nil {
			t.Fatalf("the same request again: %v", err)
		}
		if !again.Repeated || again.Event != admission.Index ||
			q.answer != nil && !bytes.Equal(again.Signature, q.answer.Signature) {
			t.Fatalf("the same request again: event %d, repeated %v", again.Event, again.Repeated)
		}
	}
}

// TestKilledDuringManagement kills the daemon while keys are created. Afterwards each key exists in
// the ledger and in the token, or in neither, and the name of a lost key can be used again.
func TestKilledDuringManagement(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	random := rand.New(rand.NewPCG(1, 2))
	known := map[string]string{} // public keys by name, of the keys that the API had confirmed
	for round := range 10 {
		names := make(chan string, 100)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				name := fmt.Sprintf("key-%d-%d", round, i)
				names <- name
				k, err := s.admin().CreateKey(ctx, api.NewKey{Name: name})
				if err != nil {
					return
				}
				known[name] = k.PublicKey
			}
		})
		first := <-names
		time.Sleep(time.Duration(random.IntN(40_000)) * time.Microsecond)
		p.kill()
		cancel()
		wg.Wait()
		p = s.serve()
		keys, err := s.admin().Keys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		have := map[string]string{}
		for _, k := range keys {
			if k.Version == 1 {
				have[k.Name] = k.PublicKey
			}
		}
		for name, public := range known {
			if have[name] != public {
				t.Fatalf("key %s was confirmed as %s, the appliance has %q", name, public, have[name])
			}
		}
		if _, exists := have[first]; !exists {
			if _, err := s.admin().CreateKey(t.Context(), api.NewKey{Name: first}); err != nil {
				t.Fatalf("a name whose creation was cut off can't be used: %v", err)
			}
		}
	}
	p.stop()
	if out, code := s.daemon("check"); code != 0 {
		t.Errorf("check: %d, %s", code, out)
	}
}

// TestEventNamesTheNonce reads the event of an admission. The event names the peer, the key and the
// nonce, and has nothing of the document's content.
func TestEventNamesTheNonce(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	signed, err := s.dial().Sign(t.Context(), "payments", message("AAAA"))
	if err != nil {
		t.Fatal(err)
	}
	events, err := s.admin().Events(t.Context(), signed.Event, 1)
	if err != nil || len(events) != 1 {
		t.Fatal(err)
	}
	b, _ := json.Marshal(events[0])
	e, nonce := events[0], hex.EncodeToString(signed.Nonce[:])
	if e.Metadata["nonce"] != nonce || e.Actor.Name != "demo" || e.Resource != "payments/1" {
		t.Errorf("%s for nonce %s", b, base64.RawURLEncoding.EncodeToString(signed.Nonce[:]))
	}
	if bytes.Contains(b, []byte("AAAA")) || bytes.Contains(b, []byte(`"test"`)) {
		t.Errorf("the event has the document's content: %s", b)
	}
	p.stop()
}
