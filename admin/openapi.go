package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"strconv"

	"github.com/danielgtaylor/huma/v2"
)

// openAPI is the document of all routes, as it is kept in openapi.json.
func (s *server) openAPI() []byte {
	b, err := json.Marshal(s.api.OpenAPI())
	if err != nil {
		panic("admin: the OpenAPI document is no JSON: " + err.Error())
	}
	var doc map[string]any // by way of a map its names are in order
	if err := json.Unmarshal(b, &doc); err != nil {
		panic("admin: " + err.Error())
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	if err := e.Encode(doc); err != nil {
		panic("admin: " + err.Error())
	}
	return out.Bytes()
}

// responses are those of an operation that huma does not make the document of.
func (s *server) responses(status, contentType string, schema *huma.Schema) map[string]*huma.Response {
	all := map[string]*huma.Response{status: {Description: "OK", Content: map[string]*huma.MediaType{contentType: {Schema: schema}}}}
	for _, code := range statuses {
		all[strconv.Itoa(code)] = &huma.Response{Description: http.StatusText(code), Content: map[string]*huma.MediaType{
			"application/problem+json": {Schema: &huma.Schema{Ref: "#/components/schemas/Error"}}}}
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
