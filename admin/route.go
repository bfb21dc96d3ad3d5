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

// operation declares a route: all that is asked of a caller before its handler runs is here, and in the OpenAPI document.
type operation struct {
	route   string // method and path
	id      string
	summary string
	roles   []approval.Role // of which the caller needs one; everyone: being signed in is enough; anyone: not even that
	refused []refusal       // the states in which it is refused
	status  int             // of success, where it is not 200, or 204 without a document
	body    int64           // bound of the request's body, where it is not maxBody
	hidden  bool            // from the document, where another one stands for it
}

// refusal is a state of the appliance, and the code of what is refused in it.
type refusal struct {
	State string `json:"state"`
	Code  string `json:"code"`
}

var (
	anyone   = []approval.Role{}
	everyone = []approval.Role{"*"}

	never  = []refusal{}
	always = []refusal{{stateUninitialised, uninitialised.code}} // as long as there is nobody who could be allowed to do it
	making = []refusal{{stateUninitialised, uninitialised.code}, {stateLocked, locked.code}, {stateRolledBack, rolledBack.code}}
)

const (
	administrator = approval.Administrator
	operator      = approval.OperatorRole
	auditor       = approval.Auditor
	backup        = approval.Backup
	metrics       = approval.Metrics
	approver      = approval.Approver
)

func of(roles ...approval.Role) []approval.Role { return roles }

// caller is who calls, and over what.
type caller struct {
	connection
	session *operators.Session // nil: signed out
}

func (c caller) actor() audit.Actor {
	if c.session == nil {
		return audit.Operator(c.name())
	}
	return audit.Operator(c.session.Operator)
}

func (c caller) has(roles ...approval.Role) bool {
	return c.session != nil && slices.ContainsFunc(roles, func(r approval.Role) bool { return slices.Contains(c.session.Roles, r) })
}

// raw registers an operation whose answer is a whole output of huma.
func raw[I, O any](s *server, o operation, do func(context.Context, caller, *I) (*O, error)) {
	method, path, ok := strings.Cut(o.route, " ")
	if !ok || o.roles == nil || o.refused == nil || o.summary == "" {
		panic("admin: " + o.route + " does not say who may call it and when")
	}
	if o.body == 0 {
		o.body = maxBody
	}
	huma.Register(s.api, huma.Operation{
		Method: method, Path: path, OperationID: o.id, Summary: o.summary, DefaultStatus: o.status, MaxBodyBytes: o.body, Hidden: o.hidden,
		Errors: statuses, Extensions: o.extensions(), Security: o.security(), RejectUnknownQueryParameters: true,
		Middlewares: huma.Middlewares{func(c huma.Context, next func(huma.Context)) {
			ctx, cancel := context.WithTimeout(c.Context(), actTime)
			defer cancel()
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

// callerKey is where the middleware leaves the caller for the wrapper of the handler, which passes it on as an argument.
type callerKey struct{}

func (o operation) extensions() map[string]any {
	return map[string]any{"x-roles": o.roles, "x-refused-in": o.refused}
}

func (o operation) security() []map[string][]string {
	if len(o.roles) == 0 {
		return []map[string][]string{}
	}
	return []map[string][]string{{"session": {}}, {"cookie": {}, "page": {}}}
}

type answer[D any] struct{ Body D }

// route registers an operation that answers with a document.
func route[I, D any](s *server, o operation, do func(context.Context, caller, *I) (D, error)) {
	raw(s, o, func(ctx context.Context, who caller, in *I) (*answer[D], error) {
		d, err := do(ctx, who, in)
		return &answer[D]{d}, err
	})
}

// act registers an operation that answers with nothing.
func act[I any](s *server, o operation, do func(context.Context, caller, *I) error) {
	raw(s, o, func(ctx context.Context, who caller, in *I) (*struct{}, error) { return nil, do(ctx, who, in) })
}

// What handlers read.
type (
	none  struct{}
	named struct {
		Name string `path:"name" maxLength:"200"`
	}
	body[D any] struct{ Body D }
)

// authorise is what each request must pass before anything of it but its head is read.
func (s *server) authorise(o operation, c huma.Context) (caller, error) {
	who := caller{connection: c.Context().Value(connectionKey{}).(connection)}
	if err := o.refusedIn(!s.Operators.Initialised(), uninitialised, "root enrols the first administrator: countersign admin operator first"); err != nil {
		return who, err
	}
	token, byCookie := token(c)
	if !safe(c.Method()) && who.Kind == operators.HTTPS && (s.foreign(c) || byCookie && !s.sameOrigin(c)) {
		return who, notAllowed.errorf("a browser asks for that from pages of the appliance only")
	}
	session, err := s.Operators.Session(token, who.Channel)
	if err == nil {
		who.session = &session
	}
	if len(o.roles) > 0 { // else some know more of who is signed in
		if err != nil {
			return who, err
		}
		if o.roles[0] != everyone[0] && !who.has(o.roles...) {
			return who, notAllowed.errorf("that is for operators with one of the roles %s", join(o.roles))
		}
	}
	h := s.Appliance.Health()
	if err := o.refusedIn(h.Condition == appliance.RolledBack, rolledBack, rolledBackAdvice); err != nil {
		return who, err
	}
	return who, o.refusedIn(h.Lock != nil, locked, "unlock it first: countersign admin unlock")
}

const rolledBackAdvice = "the ledger is older than its counter: put the newest one back, or accept it (countersign admin rollback)"

// refusedIn is the error of an operation that is refused in a state, if the appliance is in it.
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
