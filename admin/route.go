package admin

import (
	"context"
	"encoding/json"
	"slices"
	"strings"

	"countersign/appliance"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/operators"

	"github.com/danielgtaylor/huma/v2"
)

// operation declares a route with its rules. authorise enforces the rules before the handler runs,
// and the OpenAPI document shows them.
type operation struct {
	route    string // method and path
	id       string
	summary  string
	roles    []approval.Role // the caller needs one of them; or public, or signedIn
	refused  []refusal       // the states in which the operation is refused
	status   int             // of success; 0: 200, or 204 without a document
	body     int64           // maximum length of the request's body, in bytes; 0: maxBody
	hidden   bool            // not in the OpenAPI document, which has another operation instead
	scrapers bool            // over HTTPS, the token of a scraper does in place of a session
	stream   string          // content type of an answer without an end, and without requestTimeout
}

// refusal is a state of the appliance, and the code of a refusal in that state.
type refusal struct {
	State string `json:"state"`
	Code  string `json:"code"`
}

// The roles of operations for all callers.
var (
	public   = []approval.Role{}    // no session is needed
	signedIn = []approval.Role{"*"} // any role
)

// The states in which operations are refused.
var (
	inNoState = []refusal{}
	// whileUninitialised is for most operations: without operators, no caller can have a role.
	whileUninitialised = []refusal{{stateUninitialised, uninitialised.code}}
	// whileBlocked is for operations that make a key or use a key.
	whileBlocked = []refusal{
		{stateUninitialised, uninitialised.code}, {stateLocked, locked.code}, {stateRolledBack, rolledBack.code},
	}
)

const (
	administrator = approval.Administrator
	operator      = approval.OperatorRole
	auditor       = approval.Auditor
	backup        = approval.Backup
	metrics       = approval.Metrics
	approver      = approval.Approver
)

// The roles of operations that show the same things in several forms.
var (
	eventReaders = of(administrator, operator, auditor, approver)
	meterReaders = of(administrator, operator, auditor, metrics)
)

func of(roles ...approval.Role) []approval.Role { return roles }

// caller is the caller of an operation, with the connection.
type caller struct {
	connection
	session *operators.Session // nil: signed out
}

func (c caller) actor() audit.Actor {
	if c.session == nil {
		return audit.Operator(c.name()).In(c.Request)
	}
	return audit.Operator(c.session.Operator).In(c.Request)
}

func (c caller) has(roles ...approval.Role) bool {
	return c.session != nil && slices.ContainsFunc(roles, func(r approval.Role) bool {
		return slices.Contains(c.session.Roles, r)
	})
}

// routeRaw registers an operation whose handler returns an output struct of huma.
func routeRaw[I, O any](s *server, do func(context.Context, caller, *I) (*O, error), o operation) {
	method, path, ok := strings.Cut(o.route, " ")
	if !ok || o.roles == nil || o.refused == nil || o.summary == "" {
		panic("admin: " + o.route + " does not say who may call it and when")
	}
	if o.body == 0 {
		o.body = maxBody
	}
	var responses map[string]*huma.Response
	if o.stream != "" {
		responses = s.responses("200", o.stream, &huma.Schema{Type: huma.TypeString})
	}
	huma.Register(s.api, huma.Operation{
		Method: method, Path: path, OperationID: o.id, Summary: o.summary, Hidden: o.hidden,
		DefaultStatus: o.status, MaxBodyBytes: o.body, RejectUnknownQueryParameters: true,
		Errors: statuses, Extensions: o.extensions(), Security: o.security(), Responses: responses,
		Middlewares: huma.Middlewares{func(c huma.Context, next func(huma.Context)) {
			ctx := c.Context()
			if o.stream == "" {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, requestTimeout)
				defer cancel()
			}
			who, err := s.authorise(o, c)
			if err != nil {
				e := translate(err)
				for name, values := range e.GetHeaders() {
					c.SetHeader(name, values[0])
				}
				c.SetHeader("Content-Type", e.ContentType(""))
				c.SetStatus(e.Status)
				json.NewEncoder(c.BodyWriter()).Encode(e)
				return
			}
			next(huma.WithValue(huma.WithContext(c, ctx), callerKey{}, who))
		}},
	}, func(ctx context.Context, in *I) (*O, error) {
		out, err := do(ctx, ctx.Value(callerKey{}).(caller), in)
		if err != nil {
			return nil, translate(err)
		}
		return out, nil
	})
}

// callerKey is the context key of the caller, from the middleware to the wrapper of the handler.
// Handlers get the caller as an argument.
type callerKey struct{}

func (o operation) extensions() map[string]any {
	return map[string]any{"x-roles": o.roles, "x-refused-in": o.refused}
}

func (o operation) security() []map[string][]string {
	if len(o.roles) == 0 {
		return []map[string][]string{}
	}
	all := []map[string][]string{{"session": {}}, {"cookie": {}, "page": {}}}
	if o.scrapers {
		all = append(all, map[string][]string{"scraper": {}})
	}
	return all
}

type answer[D any] struct{ Body D }

// route registers an operation that answers with a document.
func route[I, D any](s *server, do func(context.Context, caller, *I) (D, error), o operation) {
	routeRaw(s, func(ctx context.Context, who caller, in *I) (*answer[D], error) {
		d, err := do(ctx, who, in)
		return &answer[D]{d}, err
	}, o)
}

// routeEmpty registers an operation that answers without a document.
func routeEmpty[I any](s *server, do func(context.Context, caller, *I) error, o operation) {
	routeRaw(s, func(ctx context.Context, who caller, in *I) (*struct{}, error) { return nil, do(ctx, who, in) }, o)
}

// The inputs of several handlers.
type (
	none  struct{}
	named struct {
		Name string `path:"name" maxLength:"200"`
	}
	body[D any] struct{ Body D }
)

// authorise applies the rules of an operation to a request. authorise has read the head of the
// request only.
func (s *server) authorise(o operation, c huma.Context) (caller, error) {
	who := caller{connection: c.Context().Value(connectionKey{}).(connection)}
	const enrol = "root enrols the first administrator: countersign admin operator first"
	if err := o.refusedIn(!s.Operators.Initialised(), uninitialised, enrol); err != nil {
		return who, err
	}
	token, byCookie := token(c)
	if !safe(c.Method()) && who.Kind == operators.HTTPS && (s.crossOrigin(c) || byCookie && !s.sameOrigin(c)) {
		return who, notAllowed.errorf("a browser asks for that from pages of the appliance only")
	}
	session, err := s.Operators.Session(token, who.Channel)
	if err == nil {
		who.session = &session
	}
	if err != nil && o.scrapers && !byCookie && s.Operators.Scrapes(token, who.Channel) {
		return who, nil // no state below refuses the operation
	}
	if len(o.roles) > 0 { // a public operation may answer a signed-in caller with more details
		if err != nil {
			return who, err
		}
		if o.roles[0] != signedIn[0] && !who.has(o.roles...) {
			return who, notAllowed.errorf("that is for operators with one of the roles %s", join(o.roles))
		}
	}
	h := s.Appliance.Health()
	if err := o.refusedIn(h.Condition == appliance.RolledBack, rolledBack, rolledBackAdvice); err != nil {
		return who, err
	}
	return who, o.refusedIn(h.Lock != nil, locked, "unlock it first: countersign admin unlock")
}

const rolledBackAdvice = "the ledger is older than its counter, or the counter is gone: " +
	"put the newest one back, or accept it (countersign admin rollback)"

// refusedIn returns an error if the appliance is in a state, and the operation is refused in that
// state.
func (o operation) refusedIn(is bool, p problem, advice string) error {
	if is && slices.ContainsFunc(o.refused, func(r refusal) bool { return r.Code == p.code }) {
		return p.errorf("%s", advice)
	}
	return nil
}

func join(roles []approval.Role) string {
	var names []string
	for _, r := range roles {
		names = append(names, string(r))
	}
	return strings.Join(names, ", ")
}
