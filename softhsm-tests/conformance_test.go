package softhsmtests

import (
	"testing"
	"time"

	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/tpm"
	"countersign/tpm/tpmtest"

	"github.com/miekg/pkcs11"
)

// TestConformance runs the conformance suite of package keystore against a pool of two key workers
// on a SoftHSM token. The workers are processes of the built countersignd.
func TestConformance(t *testing.T) {
	keystoretest.Run(t, func(t *testing.T) keystore.Store {
		s := newSystem(t)
		s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { deleteAll(t, m, h, "") })
		return s.pool(t, s.hsmConfig(softHSM, 4), 2, 1<<30)
	})
}

// TestConformanceTPM runs the suite against two key workers on a TPM. Each store has a state folder
// of its own.
func TestConformanceTPM(t *testing.T) {
	e := tpmtest.New(t)
	keystoretest.Run(t, func(t *testing.T) keystore.Store {
		c := tpm.Config{Device: e.Socket, State: t.TempDir(), PCRs: []uint{7}, Deadline: 5 * time.Second}
		if err := tpm.Provision(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		return openPool(t, map[string]any{"tpm": c}, 2, 1<<30, 256)
	})
}
