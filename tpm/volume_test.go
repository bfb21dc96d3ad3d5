package tpm_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"countersign/internal/keystore"
	"countersign/internal/secret"
	"countersign/tpm"
	"countersign/tpm/tpmtest"
)

// disk is a machine with a sealed disk, and the signer of its images.
type disk struct {
	t      *testing.T
	e      *tpmtest.Emulator
	signer *ecdsa.PrivateKey
	tpm.Volumes
}

const diskKey = "the key of the disk, 32 bytes ..."

func newDisk(t *testing.T) *disk {
	e := tpmtest.New(t)
	return &disk{t, e, newSigner(t), tpm.Volumes{Config: tpm.Config{Device: e.Socket, Deadline: 5 * time.Second}}}
}

func newSigner(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (d *disk) approver() []byte {
	point, err := d.signer.PublicKey.Bytes()
	if err != nil {
		d.t.Fatal(err)
	}
	return point
}

func (d *disk) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	d.t.Cleanup(cancel)
	return ctx
}

func (d *disk) seal(minimum uint64, next bool) tpm.VolumeKey {
	d.t.Helper()
	v, err := d.Seal(d.ctx(), secret.Of(diskKey), d.approver(), minimum, next)
	if err != nil {
		d.t.Fatal(err)
	}
	return v
}

// image is the image that has booted, with the rollback version version.
func (d *disk) image(by *ecdsa.PrivateKey, version uint64) []tpm.ImageState {
	d.t.Helper()
	var minima []uint64
	for m := uint64(1); m <= version; m++ {
		minima = append(minima, m)
	}
	signed, err := tpm.SignImage(by, d.e.PCR(d.t, 11), d.e.PCR(d.t, 12), minima...)
	if err != nil {
		d.t.Fatal(err)
	}
	return signed
}

func (d *disk) wantOpen(v tpm.VolumeKey, signed []tpm.ImageState) {
	d.t.Helper()
	key, err := d.Unseal(d.ctx(), v, signed)
	if err != nil || string(key.Expose()) != diskKey {
		d.t.Fatalf("unseal: %v", err)
	}
}

func (d *disk) wantRefused(v tpm.VolumeKey, signed []tpm.ImageState, want error, words string) {
	d.t.Helper()
	key, err := d.Unseal(d.ctx(), v, signed)
	if !errors.Is(err, want) || !strings.Contains(err.Error(), words) || !key.Empty() {
		d.t.Fatalf("unseal: %v, want %v with %q", err, want, words)
	}
}

// TestVolume seals a disk, opens it in the images that may, and in no other one.
func TestVolume(t *testing.T) {
	d := newDisk(t)
	v := d.seal(2, false)
	d.wantOpen(v, d.image(d.signer, 2))
	d.wantOpen(v, d.image(d.signer, 5))
	d.wantRefused(v, d.image(d.signer, 1), tpm.ErrOldImage, "rollback version 1, and the minimum is 2")
	d.wantRefused(v, nil, tpm.ErrForeignImage, "no signature")
	d.wantRefused(v, d.image(newSigner(t), 2), tpm.ErrForeignImage, "not signed by")
	if n := d.e.Handles(t); n != 0 {
		t.Fatalf("%d handles are left in the TPM", n)
	}
}

// TestVolumeEnd opens a disk no more in this boot, also with the signature of the image that runs.
func TestVolumeEnd(t *testing.T) {
	d := newDisk(t)
	v, image := d.seal(1, false), d.image(d.signer, 1)
	d.wantOpen(v, image)
	if err := d.End(d.ctx()); err != nil {
		t.Fatal(err)
	}
	d.wantRefused(v, image, tpm.ErrStateMeasured, "unified kernel image")
	if n := d.e.Handles(t); n != 0 {
		t.Fatalf("%d handles are left in the TPM", n)
	}
}

// TestVolumeOfAnotherState changes each register of the policy, one at a time.
func TestVolumeOfAnotherState(t *testing.T) {
	for register, words := range map[int]string{
		7: "Secure Boot", 11: "unified kernel image", 12: "command line", 13: "extensions",
	} {
		d := newDisk(t)
		v, image := d.seal(1, false), d.image(d.signer, 1)
		d.e.Extend(t, register)
		d.wantRefused(v, image, tpm.ErrStateMeasured, words)
		if register != 7 {
			continue
		}
		d.wantRefused(v, d.image(d.signer, 1), tpm.ErrStateMeasured, words)
	}
}

// TestVolumeRaised raises the minimal version: the seal of before, of which a thief may have a
// copy, opens no more.
func TestVolumeRaised(t *testing.T) {
	d := newDisk(t)
	old := d.seal(1, false)
	next := d.seal(2, true)
	d.wantOpen(old, d.image(d.signer, 1))
	d.wantRefused(next, d.image(d.signer, 2), tpm.ErrStaleSeal, "its counter is")
	for range 2 { // the second time does nothing
		if err := d.Raise(d.ctx(), old.Counter); err != nil {
			t.Fatal(err)
		}
	}
	d.wantOpen(next, d.image(d.signer, 2))
	d.wantRefused(old, d.image(d.signer, 1), tpm.ErrStaleSeal, "its counter is")
	d.wantRefused(old, d.image(d.signer, 2), tpm.ErrStaleSeal, "its counter is")
	d.wantRefused(next, d.image(d.signer, 1), tpm.ErrOldImage, "")
}

// TestForgedSeal edits each field of a seal, so that the TPM has to refuse what the text allows.
func TestForgedSeal(t *testing.T) {
	d := newDisk(t)
	old := d.seal(2, false)
	next := d.seal(2, true)
	if err := d.Raise(d.ctx(), old.Counter); err != nil {
		t.Fatal(err)
	}
	thief := &disk{t, d.e, newSigner(t), d.Volumes}
	edited := func(v tpm.VolumeKey, edit func(*tpm.VolumeKey)) tpm.VolumeKey {
		edit(&v)
		return v
	}
	for name, c := range map[string]struct {
		seal  tpm.VolumeKey
		image []tpm.ImageState
	}{
		"minimum": {edited(next, func(v *tpm.VolumeKey) { v.Minimum = 1 }), d.image(d.signer, 1)},
		"counter": {edited(old, func(v *tpm.VolumeKey) { v.Counter = next.Counter }), d.image(d.signer, 2)},
		"approver": {edited(next, func(v *tpm.VolumeKey) { v.Approver = thief.approver() }),
			d.image(thief.signer, 2)},
		"object": {edited(next, func(v *tpm.VolumeKey) { v.Public, v.Private = old.Public, old.Private }),
			d.image(d.signer, 2)},
	} {
		key, err := d.Unseal(d.ctx(), c.seal, c.image)
		if err == nil || !key.Empty() {
			t.Errorf("%s: the forged seal opens", name)
		} else if !strings.Contains(err.Error(), "TPM_RC_POLICY_FAIL") {
			t.Errorf("%s: %v", name, err)
		}
	}
	d.wantOpen(next, d.image(d.signer, 2))
	d.e.Extend(t, 7) // and the registers of the seal
	forged := edited(next, func(v *tpm.VolumeKey) {
		b, _ := json.Marshal(d.seal(2, false))
		var now tpm.VolumeKey
		json.Unmarshal(b, &now)
		v.PCRs = now.PCRs
	})
	if key, err := d.Unseal(d.ctx(), forged, d.image(d.signer, 2)); err == nil || !key.Empty() {
		t.Error("a seal with edited registers opens")
	}
}

// TestVolumePowerCuts cuts the TPM's power after each use: no try may count as a failed one.
func TestVolumePowerCuts(t *testing.T) {
	d := newDisk(t)
	v := d.seal(1, false)
	for range 10 {
		d.wantOpen(v, d.image(d.signer, 1))
		d.wantRefused(v, d.image(newSigner(t), 1), tpm.ErrForeignImage, "")
		d.e.Stop()
		d.e.Start()
	}
	d.wantOpen(v, d.image(d.signer, 1))
	if n := d.e.FailedTries(t); n != 0 {
		t.Fatalf("the TPM has counted %d failed tries", n)
	}
}

// TestForget resets a machine: no seal of before opens, and the counters of its ledgers are gone,
// but not an index of another program.
func TestForget(t *testing.T) {
	d := newDisk(t)
	if err := d.Forget(d.ctx()); err != nil { // of a TPM that was never used
		t.Fatal(err)
	}
	v := d.seal(1, false)
	d.e.Tool(t, "tpm2_nvdefine", "0x1800c53", "-s", "8")
	c := config(t, d.e)
	s := open(t, c)
	defer s.Close()
	owner := keystore.Owner{1}
	if err := s.DefineCounter(d.ctx(), owner); err != nil {
		t.Fatal(err)
	}
	if free, err := d.FreeLedgerIndex(d.ctx()); err != nil || free != 0x1800c54 {
		t.Errorf("%#x, %v", free, err)
	}
	if err := d.Forget(d.ctx()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ReadCounter(d.ctx(), owner); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("the ledger's counter: %v", err)
	}
	if free, err := d.FreeLedgerIndex(d.ctx()); err != nil || free != 0x1800c51 {
		t.Errorf("%#x, %v", free, err)
	}
	d.wantRefused(v, d.image(d.signer, 1), tpm.ErrStaleSeal, "")
	if listed := d.e.Tool(t, "tpm2_getcap", "handles-nv-index"); !strings.Contains(listed, "0x1800C53") {
		t.Errorf("the index of another program is gone: %s", listed)
	}
}

// TestVolumeOfAnotherTPM takes a disk to another machine.
func TestVolumeOfAnotherTPM(t *testing.T) {
	a, b := newDisk(t), newDisk(t)
	b.signer = a.signer
	v := a.seal(1, false)
	b.wantRefused(v, b.image(b.signer, 1), keystore.ErrReplaced, "")
	b.seal(1, false)
	b.wantRefused(v, b.image(b.signer, 1), keystore.ErrReplaced, "another TPM")
}
