package appliance

import (
	"testing"

	"countersign/internal/keystore"
)

// TestFaultsHaveCauses checks that the code of each fault's cause is the kind of the fault.
func TestFaultsHaveCauses(t *testing.T) {
	for _, kind := range []keystore.FaultKind{
		keystore.FaultUnavailable, keystore.FaultPINRefused, keystore.FaultLocked, keystore.FaultReplaced,
		keystore.FaultRedundancy, keystore.FaultRestarts, keystore.FaultKeyMissing,
	} {
		if c := faults[kind]; c == nil || c.Code != string(kind) {
			t.Errorf("the cause of %s is %+v", kind, c)
		}
	}
	if len(faults) != 7 {
		t.Errorf("%d kinds of faults have causes", len(faults))
	}
}
