package admin

import (
	"strings"
	"testing"
)

// TestRubbish checks that requests against the document are refused, and that the refusal has no
// value of the request.
func TestRubbish(t *testing.T) {
	r := newRig(t)
	token := r.token(r.root(), "root")
	secret := "this-may-be-a-secret"
	seventeen := strings.Repeat(`{"name":"a","value":"b"},`, 16) + `{"name":"a","value":"b"}`
	for _, c := range []struct {
		method, path, body, kind string
		status                   int
	}{
		{"POST", "/v1/keys", ``, "", 400},
		{"POST", "/v1/keys", `{`, "", 400},
		{"POST", "/v1/keys", `[]`, "", 400},
		{"POST", "/v1/keys", `{}`, "", 400},
		{"POST", "/v1/keys", `{"name":"a"} x`, "", 400},
		{"POST", "/v1/keys", `{"NAME":"a"}`, "", 400},
		{"POST", "/v1/keys", `{"name":"a","name":"b"}`, "", 400},
		{"POST", "/v1/keys", `{"name":"a","extra":1}`, "", 400},
		{"POST", "/v1/keys", `{"name":["` + secret + `"]}`, "", 400},
		{"POST", "/v1/keys", `{"name":"a","algorithm":"` + secret + `"}`, "", 400},
		{"POST", "/v1/keys", `{"name":"` + strings.Repeat(secret, 100) + `"}`, "", 400},
		{"POST", "/v1/keys", `{"name":"a"}`, "text/plain", 415},
		{"POST", "/v1/keys", strings.Repeat(" ", maxBody), "", 413},
		{"POST", "/v1/proposals", strings.Repeat(" ", maxProposal), "", 413},
		{"POST", "/v1/proposals", `{"act":"clock accept","lifetime":1}`, "", 400},
		{"POST", "/v1/proposals", `{"act":"clock accept","lifetime":1e9}`, "", 400},
		{"POST", "/v1/proposals", `{"act":"clock accept","parameters":[` + seventeen + `]}`, "", 400},
		{"GET", "/v1/events?limit=0", ``, "", 400},
		{"GET", "/v1/events?limit=1001", ``, "", 400},
		{"GET", "/v1/events?from=-1", ``, "", 400},
		{"GET", "/v1/events?form=1", ``, "", 400},
		{"GET", "/v1/policies/last", ``, "", 400},
		{"GET", "/v1/nothing", ``, "", 404},
		{"PATCH", "/v1/keys", `{}`, "", 405},
		{"POST", "/v1/peers", `{"name":"a"}`, "", 405}, // a new peer needs a proposal
		{"GET", "/tile/../../etc/passwd", ``, "", 404},
	} {
		headers := map[string]string{"Authorization": "Bearer " + token}
		if c.kind != "" {
			headers["Content-Type"] = c.kind
		}
		resp, refusal, text := call(t, r.unixHTTP(), c.method, "http://countersign"+c.path, c.body, headers)
		want := "invalid"
		if c.status == 404 {
			want = "not_found"
		}
		if resp.StatusCode != c.status || refusal.Status != c.status || refusal.Code != want ||
			len(text) > 1000 || strings.Contains(text, secret) {
			t.Errorf("%s %s %.60s: %d %.300s, want %d", c.method, c.path, c.body, resp.StatusCode, text, c.status)
		}
	}
	if keys := r.app.Keys.All(); len(keys) != 2 {
		t.Errorf("%d keys", len(keys))
	}
}
