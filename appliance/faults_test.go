package appliance

import (
	"context"
	"slices"
	"sync/atomic"
	"testing"

	"countersign/internal/cause"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
)

// TestFaultsHaveCauses checks that the code of each fault's cause is the kind of the fault.
func TestFaultsHaveCauses(t *testing.T) {
	for _, kind := range []keystore.FaultKind{
		keystore.FaultUnavailable, keystore.FaultPINRefused, keystore.FaultLocked, keystore.FaultReplaced,
		keystore.FaultRedundancy, keystore.FaultRestarts, keystore.FaultKeyMissing,
		keystore.FaultSealed, keystore.FaultJournal,
	} {
		if c := faults[kind]; c == nil || c.Code != string(kind) {
			t.Errorf("the cause of %s is %+v", kind, c)
		}
	}
	if len(faults) != 9 {
		t.Errorf("%d kinds of faults have causes", len(faults))
	}
}

// codes returns the codes of an appliance's causes.
func codes(a *Appliance) (all []string) {
	for _, c := range a.Health().Causes {
		all = append(all, c.Code)
	}
	return all
}

// TestCheckpointCause has the device refuse the log's key: the failure is a cause until a
// checkpoint is signed.
func TestCheckpointCause(t *testing.T) {
	r, _ := logRig(t)
	var broken atomic.Bool
	broken.Store(true)
	r.store.BeforeSign = func(ref keystore.Ref, _ []byte) error {
		if ref.Name == keyring.LogName && broken.Load() {
			return keystore.ErrUnavailable
		}
		return nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { r.keepLog(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	has := func() bool { return slices.Contains(codes(r.Appliance), cause.Checkpoint.Code) }
	eventually(t, "the failure is a cause", has)
	broken.Store(false)
	eventually(t, "the cause is gone", func() bool { return !has() })
}
