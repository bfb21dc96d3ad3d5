package hsm

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"countersign/internal/keystore"

	"github.com/miekg/pkcs11"
	pkcs11uri "github.com/stefanberger/go-pkcs11uri"
)

// tokenURI is a PKCS#11 URI (RFC 7512) that names a token: which attributes a slot must match.
type tokenURI struct {
	text   string
	attrs  map[string]string
	slotID *uint
	module string // module-path, if given
	pin    string // the file of pin-source, if given
}

// parseURI accepts the attributes that say which token is meant, and of the query module-path and pin-source.
func parseURI(s string) (u tokenURI, err error) {
	// The PIN must not be in a file that people copy around; the parser's own errors might quote it.
	if strings.Contains(strings.ToLower(s), "pin-value") {
		return u, errors.New("pkcs11 uri: pin-value puts the PIN into the configuration: write it to a file and name that with pin_file")
	}
	parsed := pkcs11uri.New()
	if err := parsed.Parse(s); err != nil {
		return u, fmt.Errorf("pkcs11 uri: %w", err)
	}
	path, query, _ := strings.Cut(strings.TrimPrefix(s, "pkcs11:"), "?")
	u = tokenURI{text: "pkcs11:" + path, attrs: map[string]string{}} // the query may hold what must not be printed
	for _, attr := range strings.Split(path, ";") {
		name, _, _ := strings.Cut(attr, "=")
		value, _ := parsed.GetPathAttribute(name, false)
		switch name {
		case "token", "manufacturer", "model", "serial":
			u.attrs[name] = value
		case "slot-id":
			n, err := strconv.ParseUint(value, 10, 32)
			if err != nil {
				return u, fmt.Errorf("pkcs11 uri %q: slot-id is not a number", u.text)
			}
			id := uint(n)
			u.slotID = &id
		default:
			return u, fmt.Errorf("pkcs11 uri %q: attribute %q does not name a token: use token, serial, manufacturer, model or slot-id", u.text, name)
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
			u.pin = f.Path
		default:
			return u, fmt.Errorf("pkcs11 uri %q: unknown query attribute %q", u.text, name)
		}
	}
	return u, nil
}

func (u tokenURI) matches(slot uint, t pkcs11.TokenInfo) bool {
	if u.slotID != nil && *u.slotID != slot {
		return false
	}
	for name, is := range map[string]string{"token": t.Label, "manufacturer": t.ManufacturerID, "model": t.Model, "serial": t.SerialNumber} {
		if want, ok := u.attrs[name]; ok && want != strings.TrimRight(is, " \x00") {
			return false
		}
	}
	return true
}

// readPIN reads a PIN file: one line, readable by its owner only.
func readPIN(path string) (string, error) {
	b, err := keystore.ReadSecret(path, "PIN file")
	if err != nil {
		return "", err
	}
	pin := strings.TrimRight(string(b), "\r\n")
	clear(b)
	if pin == "" || strings.ContainsAny(pin, "\r\n") {
		return "", fmt.Errorf("PIN file %s: it must have the PIN on one line and nothing else", path)
	}
	return pin, nil
}
