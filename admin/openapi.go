package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"

	"countersign/approval"
	"countersign/audit"

	"github.com/danielgtaylor/huma/v2"
)

// descriptions has the descriptions that are too long for a struct tag, by schema and property.
var descriptions = map[string]string{
	"Challenge.public_key": "PublicKeyCredentialRequestOptionsJSON of WebAuthn level 3: " +
		"what navigator.credentials.get takes as publicKey",
	"Line.acknowledge": "peers that must have acknowledged a rotation so that the version before is archived " +
		"ahead of its grace time; all: each one; none: it is not. " +
		"Fewer acknowledgements need an approved proposal: key set",
	"Line.every": "seconds after which a version is rotated: an hour to ten years; 0: not by age",
	"Line.grace": "seconds for which the version before is accepted; 0: as long as a document may live. " +
		"A shorter time needs an approved proposal: key set",
	"Line.presence": "seconds for which an operator's confirmation lets it sign; 0: none is needed. " +
		"Less of it needs an approved proposal: key set",
	"Line.window":         "cron, five fields, UTC: it is rotated within an hour of a tick only; alone: at each tick",
	"NewProposal.content": "policy activate: its text; without it, that of the policy file",
	"Proposal.text": "what is signed to approve it; its first line is the namespace of an SSHSIG, " +
		"and SHA-256 of it the challenge of a passkey",
	"Rotate.at": "when it is to be active, Unix seconds; 0: after the line's time of announcement",
	"SignedIn.page": "over HTTPS, for a browser: sent as Countersign-Page, together with the cookie. " +
		"Each is half of the token",
}

// describe adds the descriptions to the document, and the codes of refusals.
func describe(doc *huma.OpenAPI) {
	schemas := doc.Components.Schemas.Map()
	for name, text := range descriptions {
		schema, property, _ := strings.Cut(name, ".")
		schemas[schema].Properties[property].Description = text
	}
	for _, p := range codes {
		code := schemas["Error"].Properties["code"]
		code.Enum = append(code.Enum, p.code)
	}
}

// openAPI returns the document of all routes: the content of openapi.json.
func (s *server) openAPI() []byte {
	describe(s.api.OpenAPI())
	b, err := json.Marshal(s.api.OpenAPI())
	if err != nil {
		panic("admin: the OpenAPI document is no JSON: " + err.Error())
	}
	var doc map[string]any // a map has sorted names
	if err := json.Unmarshal(b, &doc); err != nil {
		panic("admin: " + err.Error())
	}
	proposers := map[string][]approval.Role{}
	for _, act := range approval.Acts() {
		proposers[act] = approval.Proposers(act)
	}
	doc["x-acts"], doc["x-events"] = proposers, audit.Types()
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	if err := e.Encode(doc); err != nil {
		panic("admin: " + err.Error())
	}
	return out.Bytes()
}

// responses returns the documented responses of an operation that huma does not document.
func (s *server) responses(status, contentType string, schema *huma.Schema) map[string]*huma.Response {
	of := func(description, contentType string, schema *huma.Schema) *huma.Response {
		content := map[string]*huma.MediaType{contentType: {Schema: schema}}
		return &huma.Response{Description: description, Content: content}
	}
	all := map[string]*huma.Response{status: of("OK", contentType, schema)}
	for _, code := range statuses {
		all[strconv.Itoa(code)] = of(http.StatusText(code), "application/problem+json",
			&huma.Schema{Ref: "#/components/schemas/Error"})
	}
	return all
}

type document struct {
	ContentType string `header:"Content-Type"`
	Body        []byte
}

func (s *server) openapi(context.Context, caller, *none) (*document, error) {
	return &document{"application/openapi+json", s.document}, nil
}
