// Package console serves the web console: the built assets of this folder, which the binary embeds.
// The console is a client of the admin API and has no rights of its own. Begin reading at Handler;
// README.md describes the pages and the build.
package console

import (
	"embed"
	"io/fs"
	"net/http"
	"path"
	"strings"
)

// dist has index.html and assets/, each file with its compressed forms. A plain go build without
// the build step of the console embeds no index.html.
//
//go:embed all:dist
var dist embed.FS

// Built reports whether the binary has the console.
func Built() bool {
	_, err := fs.Stat(dist, "dist/index.html")
	return err == nil
}

// policy is the Content-Security-Policy of all pages. Scripts, styles and requests are those of the
// appliance. The Trusted Types forbid each way from a text to markup or to a script.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; " +
	"frame-ancestors 'none'; base-uri 'none'; form-action 'self'; require-trusted-types-for 'script'; " +
	"trusted-types 'none'"

// notBuilt is the page of a binary without the console.
const notBuilt = `This countersignd was built without its web console.

Build it with "make build" in the source folder, which needs nodejs and npm,
or use the command "countersign admin", which needs no console.
`

// Is reports whether a request is for the console, and not for the admin API: a page that a browser
// opens, or an asset. A program that asks for an unknown address gets the API's answer.
func Is(r *http.Request) bool {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return false
	}
	switch first, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/"); first {
	case "v1", "health", "checkpoint", "tile", "epochs":
		return false
	case "", "assets":
		return true
	}
	return strings.Contains(r.Header.Get("Accept"), "text/html")
}

// Handler serves the assets, and for each other address the one page that reads the address.
func Handler() http.Handler { return http.HandlerFunc(serve) }

func serve(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Security-Policy", policy)
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Add("Vary", "Accept-Encoding")
	name := "index.html"
	if asset, is := strings.CutPrefix(r.URL.Path, "/assets/"); is {
		name = path.Join("assets", asset)
	}
	b, encoding := read(name, r.Header.Get("Accept-Encoding"))
	switch {
	case b != nil:
	case name == "index.html":
		h.Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusNotImplemented)
		w.Write([]byte(notBuilt))
		return
	default: // a page of an earlier version asks for its assets
		h.Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusNotFound)
		w.Write([]byte("This version of the console has no such file: load the page again.\n"))
		return
	}
	if encoding != "" {
		h.Set("Content-Encoding", encoding)
	}
	h.Set("Content-Type", types[path.Ext(name)])
	if name != "index.html" { // the name has the hash of the content
		h.Set("Cache-Control", "public, max-age=31536000, immutable")
	}
	w.Write(b)
}

// types has the content types of the files by their endings.
var types = map[string]string{
	".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
	".svg": "image/svg+xml",
}

// read returns a file in the best encoding that the browser accepts, or nil if there is no such
// file.
func read(name, accepted string) (b []byte, encoding string) {
	if types[path.Ext(name)] == "" { // a compressed form has no address of its own
		return nil, ""
	}
	for _, each := range []struct{ encoding, ending string }{{"br", ".br"}, {"gzip", ".gz"}, {"", ""}} {
		if !strings.Contains(accepted, each.encoding) {
			continue
		}
		if b, err := dist.ReadFile("dist/" + name + each.ending); err == nil {
			return b, each.encoding
		}
	}
	return nil, ""
}
