package admin

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"countersign/approval"
	"countersign/audit"
)

// TestScraper: the token of a scraper is good for GET /v1/metrics over HTTPS, for no other
// operation, and not on the socket. A restart does not end the token, and a removal does at once.
func TestScraper(t *testing.T) {
	r := newRig(t)
	root := r.root()
	r.enrol(root, r.unix())
	b := make([]byte, 32)
	rand.Read(b)
	token := base64.RawURLEncoding.EncodeToString(b)
	sum := sha256.Sum256([]byte(token))
	digest := hex.EncodeToString(sum[:])
	bearer := map[string]string{"Authorization": "Bearer " + token}
	get := func(client *http.Client, url string) (int, string) {
		t.Helper()
		resp, _, text := call(t, client, "GET", url, "", bearer)
		return resp.StatusCode, text
	}
	if status, _ := get(r.httpsHTTP(), r.url+"/v1/metrics"); status != http.StatusUnauthorized {
		t.Errorf("before the act: %d", status)
	}
	r.done(root, approval.ActScraperAdd, "name", "prometheus", "token_sha256", digest, "expires", inDays(9))
	for range 2 {
		if status, text := get(r.httpsHTTP(), r.url+"/v1/metrics"); status != 200 ||
			!strings.Contains(text, "countersign_build_info") {
			t.Errorf("GET /v1/metrics: %d %.200s", status, text)
		}
	}
	if status, _ := get(r.unixHTTP(), "http://countersign/v1/metrics"); status != http.StatusUnauthorized {
		t.Errorf("on the socket: %d", status)
	}
	fill := strings.NewReplacer("{name}", "prometheus", "{id}", "77", "{epoch}", "77", "{version}", "77",
		"{event}", "7777777", "{path}", "none/77", "{key}", strings.Repeat("0a", 32))
	tried := 0
	for _, o := range operationsOf(t, r.server.document) {
		if len(*o.Roles) == 0 || o.OperationID == "metrics" {
			continue
		}
		tried++
		body := ""
		if o.method != "GET" {
			body = "{}"
		}
		resp, refusal, _ := call(t, r.httpsHTTP(), o.method, r.url+fill.Replace(o.path), body, bearer)
		if refusal.Code != signedOut.code {
			t.Errorf("%s %s: %d %q", o.method, o.path, resp.StatusCode, refusal.Code)
		}
	}
	if tried < 50 {
		t.Errorf("%d operations", tried)
	}
	for _, other := range []string{"", token[1:], digest, "A" + token, token + "="} {
		resp, _, _ := call(t, r.httpsHTTP(), "GET", r.url+"/v1/metrics", "",
			map[string]string{"Authorization": "Bearer " + other})
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("with another token: %d", resp.StatusCode)
		}
	}
	all := must(root.Scrapers(t.Context()))(t)
	if len(all) != 1 || all[0].Name != "prometheus" || all[0].SHA256 != digest || all[0].Expires <= all[0].Added {
		t.Errorf("%+v", all)
	}
	if err := root.RemoveScraper(t.Context(), "prometheus"); err != nil {
		t.Fatal(err)
	}
	wants(t, "removed twice", "not_found", root.RemoveScraper(t.Context(), "prometheus"))
	if status, _ := get(r.httpsHTTP(), r.url+"/v1/metrics"); status != http.StatusUnauthorized {
		t.Errorf("after the removal: %d", status)
	}
	var events []string
	for _, e := range must(root.Events(t.Context(), 0, 0))(t) {
		if e.Type == audit.ScraperAdded || e.Type == audit.ScraperRemoved {
			events = append(events, fmt.Sprint(e.Type, " ", e.Resource, " ", e.Metadata["token_sha256"] == digest))
		}
		if strings.Contains(fmt.Sprint(e), token) {
			t.Error("the log has the token")
		}
	}
	if got := strings.Join(events, "\n"); got != "ScraperAdded prometheus true\nScraperRemoved prometheus false" {
		t.Errorf("the events are\n%s", got)
	}
}
