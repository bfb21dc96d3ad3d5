package softhsmtests

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
)

// TestAdminRubbish sends malformed requests to the admin socket, such as no Countersign tool would.
// The daemon answers each with an error code and changes nothing.
func TestAdminRubbish(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	if st, err := os.Stat(s.path("admin.sock")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket's mode is %v, %v", st.Mode(), err)
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.path("admin.sock"))
	}
	client := &http.Client{Transport: &http.Transport{DialContext: dial}}
	token, err := s.signIn(t.Context(), s.root)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		method, path, body string
		status             int
		code               string
	}{
		{"POST", "/v1/keys", ``, 400, "invalid"},
		{"POST", "/v1/keys", `{`, 400, "invalid"},
		{"POST", "/v1/keys", `[]`, 400, "invalid"},
		{"POST", "/v1/keys", `{"name":"a"}}`, 400, "invalid"},
		{"POST", "/v1/keys", `{"name":"a"} x`, 400, "invalid"},
		{"POST", "/v1/keys", `{"NAME":"a"}`, 400, "invalid"},
		{"POST", "/v1/keys", `{"name":"a","name":"b"}`, 400, "invalid"},
		{"POST", "/v1/keys", `{"name":"a","extra":1}`, 400, "invalid"},
		{"POST", "/v1/keys", `{"name":7}`, 400, "invalid"},
		{"POST", "/v1/keys", `{"name":"noise"}`, 400, "invalid"},
		{"POST", "/v1/keys", `{"name":"` + strings.Repeat("a", 100_000) + `"}`, 413, "invalid"},
		{"POST", "/v1/keys", `{"name":"` + strings.Repeat("a", 10_000_000) + `"}`, 413, "invalid"},
		{"POST", "/v1/proposals",
			`{"act":"peer add","parameters":[{"name":"name","value":"a"},{"name":"public_key","value":"zz"}]}`,
			400, "invalid"},
		{"POST", "/v1/proposals",
			`{"act":"peer add","parameters":[{"name":"name","value":"a","more":1}]}`, 400, "invalid"},
		{"POST", "/v1/proposals", `{"act":"nothing"}`, 400, "invalid"},
		{"POST", "/v1/proposals", `{"act":"clock accept","lifetime":1}`, 400, "invalid"},
		{"POST", "/v1/sessions", `{"challenge":"a","proof":{"credential":"b"}}`, 401, "not_proven"},
		{"POST", "/v1/challenges", `{"purpose":"theft"}`, 400, "invalid"},
		{"GET", "/v1/keys?all=1", ``, 400, "invalid"},
		{"PUT", "/v1/keys", `{}`, 405, "invalid"},
		{"GET", "/v1/nothing", ``, 404, "not_found"},
		{"GET", "/v1/keys/%00%ff", ``, 404, "not_found"},
		{"DELETE", "/v1/peers/nobody", ``, 404, "not_found"},
		{"GET", "/v1/events?from=-1", ``, 400, "invalid"},
		{"GET", "/v1/events?limit=100000", ``, 400, "invalid"},
	} {
		url := "http://countersign" + c.path
		req, err := http.NewRequestWithContext(t.Context(), c.method, url, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		var refusal struct{ Code, Detail string }
		err = json.Unmarshal(b, &refusal)
		if err != nil || resp.StatusCode != c.status || refusal.Code != c.code || len(b) > 1000 {
			t.Errorf("%s %s %.40s: %d %.200s; want %d %s",
				c.method, c.path, c.body, resp.StatusCode, b, c.status, c.code)
		}
	}
	keys, err := s.admin().Keys(t.Context())
	if err != nil || len(keys) != 2 { // the Noise key and the audit log's key
		t.Errorf("%v, %v", keys, err)
	}
	p.stop()
}

// TestStopWithStrangers holds an idle TLS connection open while the daemon stops. An idle
// connection must not use up the time that a stop gives to approved acts in progress.
func TestStopWithStrangers(t *testing.T) {
	s := newSystem(t)
	origin := s.configureHTTPS()
	p := s.serve()
	conn := s.dialTLS(origin) // the finished handshake puts the connection among the daemon's connections
	defer conn.Close()
	p.stop()
	if strings.Contains(p.stderr.String(), "cut off") {
		t.Error("the stop left acts in progress no time to end")
	}
}
