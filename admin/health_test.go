package admin

import (
	"strings"
	"testing"
)

// TestHeadIsGet: each operation that answers GET answers HEAD with the same status and length, and
// without a body. Load balancers ask so for health.
func TestHeadIsGet(t *testing.T) {
	r := newRig(t)
	r.enrol(r.root(), r.unix())
	token := r.token(r.unix(), "administrator")
	asked := 0
	for _, o := range operationsOf(t, r.server.document) {
		if o.method != "GET" || strings.Contains(o.path, "{") || strings.HasSuffix(o.path, "/sessions") {
			continue
		}
		asked++
		headers := map[string]string{"Authorization": "Bearer " + token}
		get, _, _ := call(t, r.unixHTTP(), "GET", "http://countersign"+o.path, "", headers)
		if get.StatusCode != 200 {
			continue // another role
		}
		head, _, body := call(t, r.unixHTTP(), "HEAD", "http://countersign"+o.path, "", headers)
		if head.StatusCode != 200 || body != "" || head.Header.Get("Content-Type") != get.Header.Get("Content-Type") {
			t.Errorf("HEAD %s: %d %q, %v", o.path, head.StatusCode, body, head.Header)
		}
	}
	if asked < 20 {
		t.Errorf("%d operations", asked)
	}
}
