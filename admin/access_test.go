package admin

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"countersign/appliance"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/spectest"

	"github.com/labstack/echo/v4"
)

// TestOpenAPI compares openapi.json with the document of the types and routes.
func TestOpenAPI(t *testing.T) {
	s, e := newServer(Config{})
	if spectest.Writing() {
		if err := os.WriteFile("openapi.json", s.document, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile("openapi.json"); err != nil || string(b) != string(s.document) {
		t.Errorf("openapi.json is not what the types and routes say (%v): "+
			"look at the difference after go generate ./admin", err)
	}
	shown := map[string]bool{}
	routes := strings.NewReplacer("/tile/{path}", "/tile/*", "/epochs/{path}", "/epochs/*", "{", ":", "}", "")
	for _, o := range operationsOf(t, s.document) {
		shown[o.method+" "+routes.Replace(o.path)] = true
		if o.Summary == "" || o.OperationID == "" || o.Roles == nil || o.Refused == nil {
			t.Errorf("%s %s does not say what it is, who may call it and when: %+v", o.method, o.path, o)
		}
		for _, r := range *o.Roles {
			if r != "*" && !r.Known() {
				t.Errorf("%s %s: there is no role %q", o.method, o.path, r)
			}
		}
		for _, name := range regexp.MustCompile(`{(.*?)}`).FindAllStringSubmatch(o.path, -1) {
			used := func(p parameter) bool { return p.In == "path" && p.Name == name[1] && p.Required }
			if !slices.ContainsFunc(o.Parameters, used) {
				t.Errorf("%s %s: %s is not read", o.method, o.path, name[0])
			}
		}
		good := 0
		for status, response := range o.Responses {
			if status[0] == '2' {
				good++
			} else if response.Content["application/problem+json"].Schema.Ref != "#/components/schemas/Error" {
				t.Errorf("%s %s: %s is not answered with a problem", o.method, o.path, status)
			}
		}
		if good != 1 || len(o.Responses) < len(statuses)+1 {
			t.Errorf("%s %s: it has the answers %v", o.method, o.path, o.Responses)
		}
	}
	for _, r := range e.Routes() {
		if !shown[r.Method+" "+r.Path] && r.Method != echo.RouteNotFound {
			t.Errorf("%s %s is not in the document, so nobody says who may call it", r.Method, r.Path)
		}
	}
}

type parameter struct {
	Name, In string
	Required bool
}

type shownOperation struct {
	method, path string
	Summary      string
	OperationID  string
	Roles        *[]approval.Role `json:"x-roles"`
	Refused      *[]refusal       `json:"x-refused-in"`
	Parameters   []parameter
	Responses    map[string]struct {
		Content map[string]struct {
			Schema struct {
				Ref string `json:"$ref"`
			}
		}
	}
}

func operationsOf(t *testing.T, document []byte) (all []shownOperation) {
	t.Helper()
	var doc struct {
		OpenAPI string
		Paths   map[string]map[string]shownOperation
	}
	if err := json.Unmarshal(document, &doc); err != nil || !strings.HasPrefix(doc.OpenAPI, "3.1.") {
		t.Fatalf("%q, %v", doc.OpenAPI, err)
	}
	for path, methods := range doc.Paths {
		for method, o := range methods {
			o.method, o.path = strings.ToUpper(method), path
			all = append(all, o)
		}
	}
	if len(all) < 50 {
		t.Fatalf("%d operations", len(all))
	}
	slices.SortFunc(all, func(x, y shownOperation) int { return strings.Compare(x.path+x.method, y.path+y.method) })
	return all
}

// TestAccess calls each operation of the document with each role and signed out, in each state,
// over both channels.
func TestAccess(t *testing.T) {
	empty := newRig(t)
	roles := append(approval.Roles(), "")
	type inState struct {
		*rig
		tokens map[string]map[approval.Role]string // by channel
	}
	newState := func(r *rig) inState {
		return inState{r, map[string]map[approval.Role]string{"unix": {"": ""}, "https": {"": ""}}}
	}
	const operational = string(appliance.Operational)
	rigs := map[string]inState{stateUninitialised: newState(empty)}
	for _, state := range []string{operational, stateLocked, stateRolledBack, stateDegraded} {
		r := newState(newRigIn(t, state))
		r.enrol(r.root(), r.unix())
		for _, role := range approval.Roles() {
			r.tokens["unix"][role] = r.token(r.unix(), string(role))
			r.tokens["https"][role] = r.token(r.https(), string(role))
		}
		rigs[state] = r
	}
	fill := strings.NewReplacer("{name}", "nothing", "{id}", "77", "{epoch}", "77", "{version}", "77",
		"{event}", "7777777", "{path}", "none/77")
	calls := 0
	for _, o := range operationsOf(t, rigs[operational].server.document) {
		want := func(state string, role approval.Role) string {
			i := slices.IndexFunc(*o.Refused, func(r refusal) bool { return r.State == state })
			switch {
			case i >= 0 && state == stateUninitialised:
				return (*o.Refused)[i].Code
			case len(*o.Roles) > 0 && role == "":
				return signedOut.code
			case len(*o.Roles) > 0 && (*o.Roles)[0] != "*" && !slices.Contains(*o.Roles, role):
				return notAllowed.code
			case i >= 0:
				return (*o.Refused)[i].Code
			}
			return ""
		}
		guards := []string{signedOut.code, notAllowed.code, uninitialised.code, locked.code, rolledBack.code}
		check := func(channel, state string, role approval.Role) {
			calls++
			r := rigs[state]
			if state == stateLocked { // the previous call may have unlocked the appliance
				if err := r.app.Lock(t.Context(), audit.Operator("test"), "test"); err != nil {
					t.Fatal(err)
				}
			}
			client, url := r.unixHTTP(), "http://countersign"
			if channel == "https" {
				client, url = r.httpsHTTP(), r.url
			}
			defer client.CloseIdleConnections()
			headers, body := map[string]string{}, ""
			if token := r.tokens[channel][role]; token != "" {
				headers["Authorization"] = "Bearer " + token
			}
			if o.method != "GET" {
				body = "{}"
			}
			resp, refusal, text := call(t, client, o.method, url+fill.Replace(o.path), body, headers)
			got := refusal.Code
			expected := want(state, role)
			unexpected := slices.Contains(guards, got) && !known[o.OperationID+" "+got]
			if expected == "" && unexpected || expected != "" && got != expected {
				t.Errorf("%s %s over %s, %s, as %q: %d %q, want %q\n%.300s",
					o.method, o.path, channel, state, role, resp.StatusCode, got, expected, text)
			}
			plain := o.method == "GET" && !strings.Contains(o.path, "{") && o.path != "/checkpoint"
			if expected == "" && state == operational && plain && resp.StatusCode != 200 {
				t.Errorf("%s %s: %d %.300s", o.method, o.path, resp.StatusCode, text)
			}
			if resp.StatusCode >= 400 && (resp.Header.Get("Content-Type") != "application/problem+json" ||
				refusal.Type != "urn:countersign:error:"+got || refusal.Status != resp.StatusCode ||
				refusal.Title == "" || refusal.Detail == "") {
				t.Errorf("%s %s: %s %s", o.method, o.path, resp.Header, text)
			}
		}
		for state := range rigs {
			for _, role := range roles {
				if state == stateUninitialised && role != "" {
					continue // no operator exists
				}
				check("unix", state, role)
				if state == operational || state == stateLocked || state == stateUninitialised {
					check("https", state, role)
				}
			}
		}
	}
	if calls < 2000 {
		t.Errorf("%d calls", calls)
	}
}

// known are refusals by an operation itself, with the code of a refusal by authorise.
var known = map[string]bool{
	"first-operator not_allowed": true, // for all callers except root on the Unix socket
}
