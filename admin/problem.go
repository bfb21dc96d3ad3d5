package admin

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"strings"
	"sync"

	"countersign/admin/api"
	"countersign/admin/certs"
	"countersign/appliance"
	"countersign/approval"
	"countersign/internal/anchor"
	"countersign/internal/keystore"
	"countersign/internal/manage"
	"countersign/internal/operators"

	"github.com/danielgtaylor/huma/v2"
	"github.com/labstack/echo/v4"
)

// problem is a kind of refusal. Programs can rely on the code and the title.
type problem struct {
	code   string
	status int
	title  string
}

var (
	invalid       = problem{"invalid", http.StatusBadRequest, "The request is not valid"}
	exists        = problem{"exists", http.StatusConflict, "It exists already"}
	notFound      = problem{"not_found", http.StatusNotFound, "It does not exist"}
	unavailable   = problem{"unavailable", http.StatusServiceUnavailable, "It can't be done now"}
	signedOut     = problem{"signed_out", http.StatusUnauthorized, "Nobody is signed in"}
	notProven     = problem{"not_proven", http.StatusUnauthorized, "The proof does not hold"}
	needsApproval = problem{"needs_approval", http.StatusForbidden, "It needs approval"}
	notAllowed    = problem{"not_allowed", http.StatusForbidden, "The caller may not do that"}
	uninitialised = problem{"uninitialised", http.StatusConflict, "The appliance has no operators"}
	locked        = problem{"locked", http.StatusConflict, "The appliance is locked"}
	rolledBack    = problem{"rolled_back", http.StatusConflict, "The ledger is older than its counter"}
	conflict      = problem{"conflict", http.StatusConflict, "It does not fit what is there"}
	rateLimited   = problem{"rate_limited", http.StatusTooManyRequests, "Too many attempts"}
)

// codes lists all problems, in the order of the OpenAPI document.
var codes = []problem{
	invalid, exists, notFound, unavailable, signedOut, notAllowed, uninitialised, locked, rolledBack, conflict,
	needsApproval, rateLimited, notProven,
}

// statuses lists the HTTP statuses of refusals, for every operation.
var statuses = []int{
	http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusConflict,
	http.StatusRequestEntityTooLarge, http.StatusTooManyRequests, http.StatusServiceUnavailable,
}

// problems maps errors to problems. The first matching row counts. Other errors are unavailable.
var problems = []struct {
	err error
	problem
}{
	{manage.ErrInvalid, invalid}, {approval.ErrInvalid, invalid},
	{certs.ErrUnfit, invalid},
	{keystore.ErrRefused, invalid}, // for example of a seed file; a retry can't help
	{manage.ErrExists, exists}, {operators.ErrExists, exists},
	{manage.ErrNotFound, notFound}, {operators.ErrNotFound, notFound},
	{approval.ErrNotProven, notProven},
	{operators.ErrSignedOut, signedOut},
	{operators.ErrNotAllowed, notAllowed},
	{manage.ErrNotApproved, needsApproval},
	{appliance.ErrLocked, locked},
	{anchor.ErrRolledBack, rolledBack},
	{manage.ErrConflict, conflict}, {operators.ErrConflict, conflict},
	{operators.ErrLimited, rateLimited},
	{operators.ErrUninitialised, uninitialised},
}

// problemError is an error of this package with its problem.
type problemError struct {
	problem
	text string
}

func (e problemError) Error() string { return e.text }

func (p problem) errorf(format string, args ...any) error {
	return problemError{p, fmt.Sprintf(format, args...)}
}

func (p problem) document(detail string) *api.Error {
	return &api.Error{
		Type: "urn:countersign:error:" + p.code, Title: p.title, Status: p.status, Detail: detail, Code: p.code,
	}
}

// translate returns the problem document of an error, for all routes.
func translate(err error) *api.Error {
	if refusal, ok := errors.AsType[*api.Error](err); ok {
		return refusal
	}
	kind := unavailable
	if here, ok := errors.AsType[problemError](err); ok {
		kind = here.problem
	} else if route, ok := errors.AsType[*echo.HTTPError](err); ok && route.Code < http.StatusInternalServerError {
		if kind = invalid; route.Code == http.StatusNotFound {
			kind = notFound
		}
		kind.status = route.Code
	} else {
		for _, p := range problems {
			if errors.Is(err, p.err) {
				kind = p.problem
				break
			}
		}
	}
	doc := kind.document(err.Error())
	switch {
	case errors.Is(err, echo.ErrNotFound):
		doc.Detail = "there is no such address: see /v1/openapi.json"
	case errors.Is(err, echo.ErrMethodNotAllowed):
		doc.Detail = "that address does not take that method: see Allow"
	}
	if limited, ok := errors.AsType[*operators.Limited](err); ok {
		doc.RetryAfter = max(1, int(math.Ceil(limited.RetryAfter.Seconds())))
	}
	return doc
}

func writeProblem(w http.ResponseWriter, e *api.Error) {
	maps.Copy(w.Header(), e.GetHeaders())
	w.Header().Set("Content-Type", e.ContentType(""))
	w.WriteHeader(e.Status)
	json.NewEncoder(w).Encode(e)
}

// writeError answers a request for which there is no operation.
func writeError(err error, c echo.Context) {
	if !c.Response().Committed {
		writeProblem(c.Response(), translate(err))
	}
}

// configureHuma makes huma use problem documents of this package. huma has only global variables
// for that.
var configureHuma = sync.OnceFunc(func() {
	huma.DefaultArrayNullable = false
	huma.NewError = func(status int, text string, errs ...error) huma.StatusError {
		kind := invalid
		switch {
		case status >= http.StatusInternalServerError:
			kind = unavailable
		case status != http.StatusUnprocessableEntity && status != 0:
			kind.status = status
		}
		for i, err := range errs {
			var detail *huma.ErrorDetail
			if !errors.As(err, &detail) || i == 5 {
				break
			}
			if i > 0 {
				text += ";"
			} else {
				text += ":"
			}
			text += " " + strings.TrimSpace(detail.Location+" "+detail.Message) // not the value: it may be a secret
		}
		if len(text) > 500 {
			text = strings.ToValidUTF8(text[:500], "") + "…"
		}
		return kind.document(text)
	}
})
