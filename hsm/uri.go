package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"countersign/internal/keystore"
	"countersign/internal/secret"

	"github.com/miekg/pkcs11"
	pkcs11uri "github.com/stefanberger/go-pkcs11uri"
)

// tokenURI is a PKCS#11 URI (RFC 7512) naming a token by the attributes of the token and its slot.
type tokenURI struct {
	text   string            // the URI without its query
	attrs  map[string]string // the attributes with a text that are given, without padding
	slotID *uint
	module string // module-path, if given
	source string // path of the file in pin-source, if given
}

// parseURI accepts the path attributes of a token, and the query attributes module-path and
// pin-source.
func parseURI(s string) (u tokenURI, err error) {
	// Configuration files get copied and must not contain the PIN. The check comes before the
	// parser, because the parser's errors might quote the PIN.
	if strings.Contains(strings.ToLower(s), "pin-value") {
		return u, errors.New("pkcs11 uri: pin-value puts the PIN into the configuration: " +
			"write the PIN to a file and set pin_file to its path")
	}
	parsed := pkcs11uri.New()
	if err := parsed.Parse(s); err != nil {
		return u, fmt.Errorf("pkcs11 uri: %w", err)
	}
	path, query, _ := strings.Cut(strings.TrimPrefix(s, "pkcs11:"), "?")
	// Errors print text. The query is left out, because a query may have a secret.
	u = tokenURI{text: "pkcs11:" + path, attrs: map[string]string{}}
	for _, attr := range strings.Split(path, ";") {
		name, _, _ := strings.Cut(attr, "=")
		value, _ := parsed.GetPathAttribute(name, false)
		switch name {
		case "token", "manufacturer", "model", "serial", "slot-description", "slot-manufacturer":
			u.attrs[name] = unpad(value)
		case "slot-id":
			n, err := strconv.ParseUint(value, 10, 32)
			if err != nil {
				return u, fmt.Errorf("pkcs11 uri %q: slot-id %q is not a number", u.text, value)
			}
			id := uint(n)
			u.slotID = &id
		default:
			return u, fmt.Errorf("pkcs11 uri %q: attribute %q does not name a token: "+
				"use token, serial, manufacturer, model, slot-id, slot-description or slot-manufacturer", u.text, name)
		}
	}
	if query == "" {
		return u, nil
	}
	for _, attr := range strings.Split(query, "&") {
		name, _, _ := strings.Cut(attr, "=")
		value, _ := parsed.GetQueryAttribute(name, false)
		switch name {
		case "module-path":
			u.module = value
		case "pin-source":
			f, err := url.Parse(value)
			if err != nil || f.Scheme != "" && f.Scheme != "file" || !filepath.IsAbs(f.Path) {
				return u, fmt.Errorf("pkcs11 uri %q: pin-source must be file: and an absolute path", u.text)
			}
			u.source = f.Path
		default:
			return u, fmt.Errorf("pkcs11 uri %q: unknown query attribute %q", u.text, name)
		}
	}
	return u, nil
}

// matches reports whether a token and its slot have all attributes of the URI.
func (u tokenURI) matches(id uint, slot pkcs11.SlotInfo, token pkcs11.TokenInfo) bool {
	if u.slotID != nil && *u.slotID != id {
		return false
	}
	has := map[string]string{
		"token": token.Label, "manufacturer": token.ManufacturerID, "model": token.Model, "serial": token.SerialNumber,
		"slot-description": slot.SlotDescription, "slot-manufacturer": slot.ManufacturerID,
	}
	for name, want := range u.attrs {
		if want != unpad(has[name]) {
			return false
		}
	}
	return true
}

// unpad removes the padding of a text field: spaces (PKCS#11 v2.40 section 3.2), or the null bytes
// of some modules. A URI names the text without padding (RFC 7512 section 2.3), so that a blank at
// the end of an attribute has no meaning.
func unpad(field string) string { return strings.TrimRight(field, " \x00") }

// readPIN reads a PIN file: one line, readable by the file's owner only.
func readPIN(path string) (pin secret.Bytes, err error) {
	b, err := keystore.ReadSecret(path, "PIN file")
	if err != nil {
		return pin, err
	}
	line := bytes.TrimRight(b.Expose(), "\r\n")
	if len(line) == 0 || bytes.ContainsAny(line, "\r\n") {
		b.Wipe()
		return pin, fmt.Errorf("PIN file %s: it must have the PIN on one line and nothing else", path)
	}
	return secret.New(line), nil
}
