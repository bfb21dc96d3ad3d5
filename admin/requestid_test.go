package admin

import (
	"errors"
	"net/http"
	"regexp"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/audit"
)

// TestRequestID sees an id of its own in each answer, also of a refusal and of an address that does
// not exist, and the same id in the error for people and in the events of the request.
func TestRequestID(t *testing.T) {
	r := newRig(t)
	root := r.root()
	seen := map[string]bool{}
	for _, path := range []string{"/health/alive", "/v1/keys", "/nowhere", "/v1/health/state"} {
		resp, err := r.unixHTTP().Get("http://countersign" + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		id := resp.Header.Get(api.RequestHeader)
		if !regexp.MustCompile("^[a-z2-7]{16}$").MatchString(id) || seen[id] {
			t.Errorf("%s: %d with the id %q", path, resp.StatusCode, id)
		}
		seen[id] = true
	}
	var refusal *api.Error
	if _, err := root.Peer(t.Context(), "nobody"); !errors.As(err, &refusal) ||
		!regexp.MustCompile(`\(request [a-z2-7]{16}\)$`).MatchString(err.Error()) {
		t.Errorf("the refusal does not say its id: %v", err)
	}
	if err := root.Lock(t.Context(), "a test"); err != nil {
		t.Fatal(err)
	}
	found, _, err := root.FindEvents(t.Context(), api.EventQuery{Type: audit.Locked})
	if err != nil || len(found) != 1 || found[0].Actor.Request == "" {
		t.Fatalf("%+v, %v", found, err)
	}
	same, _, err := root.FindEvents(t.Context(), api.EventQuery{Request: found[0].Actor.Request})
	if err != nil || len(same) != 1 || same[0].Index != found[0].Index {
		t.Errorf("the id finds %+v, %v", same, err)
	}
	for _, each := range []audit.Type{audit.OperatorSignedIn} {
		if found, _, err := root.FindEvents(t.Context(), api.EventQuery{Type: each}); err != nil || len(found) == 0 ||
			found[0].Actor.Request == "" {
			t.Errorf("%s: %+v, %v", each, found, err)
		}
	}
}

// TestLogLevel sets the level of the log for a time and back, with the events, and refuses levels
// and times that there are not.
func TestLogLevel(t *testing.T) {
	r := newRig(t)
	root := r.root()
	ctx := t.Context()
	is, err := root.LogLevel(ctx)
	if err != nil || is != (api.LogLevel{Level: "info", Configured: "info"}) {
		t.Fatalf("%+v, %v", is, err)
	}
	begin := time.Now()
	if is, err = root.SetLogLevel(ctx, api.SetLogLevel{Level: "debug", Seconds: 60}); err != nil ||
		is.Level != "debug" || is.Configured != "info" || is.Until < begin.Unix()+60 {
		t.Errorf("%+v, %v", is, err)
	}
	if is, err = root.SetLogLevel(ctx, api.SetLogLevel{Level: "error"}); err != nil || is.Until < begin.Unix()+3600 {
		t.Errorf("%+v, %v", is, err)
	}
	if is, err = root.SetLogLevel(ctx, api.SetLogLevel{Level: api.LevelConfigured}); err != nil ||
		is != (api.LogLevel{Level: "info", Configured: "info"}) {
		t.Errorf("%+v, %v", is, err)
	}
	for _, bad := range []api.SetLogLevel{
		{Level: "loud"}, {Level: "debug", Seconds: -1}, {Level: "debug", Seconds: 604801},
	} {
		var refusal *api.Error
		if _, err := root.SetLogLevel(ctx, bad); !errors.As(err, &refusal) || refusal.Status != http.StatusBadRequest {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	found, _, err := root.FindEvents(ctx, api.EventQuery{Type: audit.LogLevelChanged})
	if err != nil || len(found) != 3 {
		t.Fatalf("%d events, %v", len(found), err)
	}
	for i, want := range []string{"debug", "error", "configured"} {
		if m := found[i].Metadata; m["level"] != want || (m["until"] == "") != (want == "configured") {
			t.Errorf("%v", m)
		}
	}
}
