package softhsmtests

import (
	"testing"

	"countersign/keystore"
	"countersign/keystore/keystoretest"

	"github.com/miekg/pkcs11"
)

// TestConformance holds the process boundary to the contract of a keystore, with two of the daemon's own key workers on a
// token.
func TestConformance(t *testing.T) {
	keystoretest.Run(t, func(t *testing.T) keystore.Store {
		s := newSystem(t)
		s.token(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { deleteAll(t, m, h, "") })
		return s.pool(t, s.hsmConfig(softHSM, 4), 2, 1<<30)
	})
}
