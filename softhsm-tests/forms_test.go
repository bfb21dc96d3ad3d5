package softhsmtests

import (
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"time"

	"countersign/internal/form"
	"countersign/internal/keystore"
	"countersign/tpm"
	"countersign/tpm/tpmtest"

	"github.com/miekg/pkcs11"
)

// TestHostileDaemonGetsNoOtherForm is a daemon in other hands. The test speaks to key workers of
// the built countersignd as the daemon does, on a SoftHSM token and on a TPM. A key signs
// documents, and the log's key checkpoints and webhooks. Nothing else is signed, whatever name the
// daemon gives to the key, and whatever was signed before.
func TestHostileDaemonGetsNoOtherForm(t *testing.T) {
	for backend, open := range map[string]func(t *testing.T) keystore.Store{
		"softhsm": func(t *testing.T) keystore.Store {
			s := newSystem(t)
			s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { deleteAll(t, m, h, "") })
			return s.pool(t, s.hsmConfig(softHSM, 4), 2, 1<<30)
		},
		"tpm": func(t *testing.T) keystore.Store {
			c := tpm.Config{
				Device: tpmtest.New(t).Socket, State: t.TempDir(), PCRs: []uint{7}, Deadline: 5 * time.Second,
			}
			if err := tpm.Provision(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			return openPool(t, map[string]any{"tpm": c}, 2, 1<<30, 256)
		},
	} {
		t.Run(backend, func(t *testing.T) {
			store := open(t)
			keys := map[string]keystore.Key{}
			for i, name := range []string{"payments", "raw-x", keystore.LogName, keystore.AdminName, keystore.CAName} {
				alg := keystore.Ed25519
				if i > 2 {
					alg = keystore.P256
				}
				ref := keystore.Ref{Name: name, Version: 1}
				k, err := store.Generate(t.Context(), ref, alg, keystore.Tag{byte(i + 1)})
				if err != nil {
					t.Fatal(err)
				}
				keys[name] = k
			}
			doc := parsedDocument(t, "message-v1", `{"context":"test","message":"AAAA"}`)
			raw := parsedDocument(t, "raw", `{"message":"AAAA"}`)
			noted := fmt.Appendf(nil, "countersign/%x/0\n1\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n",
				keys[keystore.LogName].Info().PublicKey[:8])
			hook := []byte(`id_1.1700000000.{}`)
			good := map[string][]byte{"payments": doc.Input(), "raw-x": raw.Input(), keystore.LogName: noted}
			for name, k := range keys {
				if input := good[name]; input != nil {
					if _, err := k.Sign(t.Context(), input, nil); err != nil {
						t.Fatalf("%s: %v", name, err)
					}
				}
				if _, err := k.Sign(t.Context(), form.NewCanary(), nil); err != nil {
					t.Fatalf("%s: a canary: %v", name, err)
				}
			}
			random := make([]byte, 32) // such as the hash of a subscription, or of a handshake
			rand.Read(random)
			foreign := map[string][]byte{
				"doc": doc.Input(), "raw": raw.Input(), "checkpoint": noted, "webhook": hook, "hash": random,
				"bytes of a document": doc.Message, "empty": nil,
			}
			own := map[string]string{"payments": "doc", "raw-x": "raw"}
			for name, k := range keys {
				for kind, input := range foreign {
					if own[name] == kind || name == keystore.LogName && (kind == "checkpoint" || kind == "webhook") {
						continue
					}
					if sig, err := k.Sign(t.Context(), input, nil); !errors.Is(err, keystore.ErrForm) || sig != nil {
						t.Errorf("%s signs %s: %v", name, kind, err)
					}
				}
			}
			// The daemon gives another name to the same object.
			for name, k := range keys {
				for alias, input := range good {
					if alias == name || k.Info().Algorithm == keystore.P256 {
						continue
					}
					info := k.Info()
					info.Ref.Name = alias
					if alias == keystore.LogName { // a checkpoint of the log that this key would have
						input = hook
					}
					sig, err := store.Bind(info).Sign(t.Context(), input, nil)
					if !errors.Is(err, keystore.ErrUnfit) && !errors.Is(err, keystore.ErrNotFound) || sig != nil {
						t.Errorf("%s as %s: %v", name, alias, err)
					}
				}
			}
			if _, err := keys["payments"].Sign(t.Context(), doc.Input(), nil); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}
