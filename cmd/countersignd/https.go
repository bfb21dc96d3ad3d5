package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os/user"

	"countersign/admin/certs"
	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// httpsKeys are the names of the keys of the HTTPS listener: of its authority and of its
// certificate.
var httpsKeys = []string{keyring.CAName, keyring.AdminName}

// makeHTTPSKeys makes the missing keys of the HTTPS listener.
func makeHTTPSKeys(ctx context.Context, c Config, app *appliance.Appliance, who audit.Actor, stderr io.Writer) error {
	if c.AdminHTTPS == "" {
		return nil
	}
	for _, name := range httpsKeys {
		if _, err := app.Keys.Active(name); err == nil {
			made, err := app.Keys.ReplaceLost(ctx, who, name)
			if err != nil {
				return err
			}
			if made != nil {
				fmt.Fprintf(stderr, "created the key %v of the HTTPS listener in the place of a lost one: "+
					"its certificates are new\n", made.Ref())
			}
			continue
		}
		if _, err := makeOwn(ctx, c, app, who, name, c.LogToken); err != nil {
			return err
		}
		fmt.Fprintf(stderr, "created the key %s of the HTTPS listener in the token\n", name)
	}
	return nil
}

// certificates returns the certificates of the HTTPS listener, or nil without admin_https.
func certificates(c Config, p parts, log *slog.Logger) (*certs.Manager, error) {
	if c.AdminHTTPS == "" {
		return nil, nil
	}
	var keys []keystore.Key
	for _, name := range httpsKeys {
		k, err := p.app.Keys.Active(name)
		if errors.Is(err, manage.ErrNotFound) {
			return nil, errors.New("the HTTPS listener has no keys: run countersignd init")
		} else if err != nil {
			return nil, err
		}
		keys = append(keys, k.In(keyring.Own))
	}
	store := certificateStore{p.ledger}
	return certs.New(keys[0], keys[1], store, p.app.RecordCertificateSigned, []string{c.AdminName}, log)
}

// warning returns the cause of a certificate that needs an operator; nil is no HTTPS listener.
func warning(m *certs.Manager) []cause.Cause {
	if m == nil {
		return nil
	}
	if text := m.Status().Warning; text != "" {
		return []cause.Cause{cause.Certificate.Of("", "%s", text)}
	}
	return nil
}

// certificateStore stores certificates in the ledger.
type certificateStore struct{ *ledger.Ledger }

// certificatePrefix is the prefix of the records' keys.
const certificatePrefix = "certificate "

// Load returns a certificate, or nil if there is none.
func (s certificateStore) Load(name string) ([]byte, error) {
	return s.Get(ledger.Meta, certificatePrefix+name)
}

// Save stores a certificate. An empty value deletes the certificate.
func (s certificateStore) Save(ctx context.Context, name string, value []byte) error {
	return s.Update(ctx, func(tx *ledger.Tx) error {
		if len(value) == 0 {
			return tx.Delete(ledger.Meta, certificatePrefix+name)
		}
		return tx.Put(ledger.Meta, certificatePrefix+name, value)
	})
}

// adminNetworks returns the networks of operators.
func (c *Config) adminNetworks() (all []netip.Prefix) {
	for _, network := range c.AdminHTTPSFrom {
		all = append(all, netip.MustParsePrefix(network)) // checked by Config.check
	}
	return all
}

// httpsPort returns the port of the HTTPS listener, or "".
func (c *Config) httpsPort() string {
	_, port, _ := net.SplitHostPort(c.AdminHTTPS) // checked by Config.check
	return port
}

// adminOrigin returns the web origin of the admin API. Browsers may call the API from pages of this
// origin only.
func (c *Config) adminOrigin() string {
	if c.AdminHTTPS == "" {
		return "https://" + c.AdminName
	}
	return "https://" + net.JoinHostPort(c.AdminName, c.httpsPort())
}

// adminGroup returns the id of the admin socket's group, or "" without admin_group.
func (c *Config) adminGroup() (string, error) {
	if c.AdminGroup == "" {
		return "", nil
	}
	g, err := user.LookupGroup(c.AdminGroup)
	if err != nil {
		return "", fmt.Errorf("admin_group: %w", err)
	}
	return g.Gid, nil
}
