package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os/user"

	"countersign/admin/certs"
	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// httpsKeys are those of the HTTPS listener.
var httpsKeys = []string{keyring.CAName, keyring.AdminName}

// makeHTTPSKeys makes those that are not there.
func makeHTTPSKeys(ctx context.Context, c Config, app *appliance.Appliance, who audit.Actor, stderr io.Writer) error {
	if c.AdminHTTPS == "" {
		return nil
	}
	for _, name := range httpsKeys {
		if _, err := app.Keys.Active(name); err == nil {
			continue
		}
		if _, err := app.Keys.CreateOwn(ctx, who, name, c.NoiseToken); err != nil {
			return err
		}
		fmt.Fprintf(stderr, "created the key %s of the HTTPS listener in the token\n", name)
	}
	return nil
}

// certificates are those of the HTTPS listener; nil where there is none.
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
	return certs.New(keys[0], keys[1], certificateStore{p.ledger}, []string{c.AdminName}, log)
}

// certificateStore keeps certificates in the ledger.
type certificateStore struct{ *ledger.Ledger }

const certificatePrefix = "certificate "

func (s certificateStore) Load(name string) (found []byte, err error) {
	err = s.All(ledger.Meta, func(key string, value []byte) error {
		if key == certificatePrefix+name {
			found = append([]byte{}, value...)
		}
		return nil
	})
	return found, err
}

func (s certificateStore) Save(ctx context.Context, name string, value []byte) error {
	return s.Update(ctx, func(tx *ledger.Tx) error {
		if len(value) == 0 {
			return tx.Delete(ledger.Meta, certificatePrefix+name)
		}
		return tx.Put(ledger.Meta, certificatePrefix+name, value)
	})
}

// httpsPort is the port that browsers call.
func (c *Config) httpsPort() string {
	_, port, _ := net.SplitHostPort(c.AdminHTTPS) // checked when it was read
	return port
}

// adminOrigin is that of the pages that browsers may call it from.
func (c *Config) adminOrigin() string {
	if c.AdminHTTPS == "" {
		return "https://" + c.AdminName
	}
	return "https://" + net.JoinHostPort(c.AdminName, c.httpsPort())
}

// adminGroup is the number of the group of the admin socket; "" where there is none.
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
