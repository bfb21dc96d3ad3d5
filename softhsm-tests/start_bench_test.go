package softhsmtests

import (
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	bolt "go.etcd.io/bbolt"
)

// BenchmarkStart measures a start with 2,000 versions of signing keys on a SoftHSM token, alone and
// beside 9,000 objects of other programs: 3,000 key pairs under the PIN, and 3,000 data objects
// without. The objects are in memory if the machine has /dev/shm: to make them on a disk takes
// minutes.
func BenchmarkStart(b *testing.B) {
	if memory, err := os.MkdirTemp("/dev/shm", "countersign"); err == nil {
		b.Cleanup(func() { os.RemoveAll(memory) })
		b.Setenv("TMPDIR", memory)
	}
	const keys, pairs, data = 2000, 3000, 3000
	s := newSystem(b)
	s.serve().stop()
	records := map[string]string{}
	s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) {
		for i := range keys {
			name, state := fmt.Sprintf("key%d/%d", i/2, i%2+1), []string{"active", "pending"}[i%2]
			tag := fmt.Sprintf("tag of a key %03x", i)
			public := s.generateKept(m, h, name, tag)
			records[name] = fmt.Sprintf(`{"token":"main","algorithm":"ed25519","state":%q,"created":1,"activates":%d,`+
				`"public_key":"%x","custody":"hsm-resident","tag":"%x","provenance":{"local":true,`+
				`"always_sensitive":true,"never_extractable":true}}`, state, (i+1)%2, public, tag)
		}
	})
	s.changeLedger(func(tx *bolt.Tx) error {
		for name, record := range records {
			if err := tx.Bucket([]byte("keys")).Put([]byte(name), []byte(record)); err != nil {
				return err
			}
		}
		return nil
	})
	s.measureStart(b, keys, 0)
	s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) {
		for i := range pairs {
			generate(b, m, h, fmt.Sprintf("foreign %d", i))
		}
		for i := range data {
			object := []*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
				pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false), pkcs11.NewAttribute(pkcs11.CKA_LABEL, fmt.Sprint(i)),
			}
			if _, err := m.CreateObject(h, object); err != nil {
				b.Fatal(err)
			}
		}
	})
	s.measureStart(b, keys, 2*pairs+data)
}

// measureStart prints the time from the start of a daemon with so many versions of signing keys to
// its readiness.
func (s *system) measureStart(b *testing.B, keys, foreign int) {
	b.Helper()
	began := time.Now()
	p := s.serve()
	took := time.Since(began)
	all, err := s.admin().Keys(b.Context())
	if err != nil || len(all) != keys+2 {
		b.Fatalf("%d keys, %v", len(all), err)
	}
	if state := s.must("admin", "state"); !strings.Contains(state, "operational") {
		b.Fatal(state)
	}
	fmt.Printf("start softhsm keys %d, foreign objects %d: %.1f s\n", keys, foreign, took.Seconds())
	p.stop()
}

// generateKept makes a key pair as the appliance does and returns the public key.
func (s *system) generateKept(m *pkcs11.Ctx, h pkcs11.SessionHandle, name, id string) []byte {
	s.t.Helper()
	common := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "countersign/"+name),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, 0x40),
	}
	curve, _ := hex.DecodeString("06032b6570")
	public := append([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curve)}, common...)
	private := append([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
	}, common...)
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(0x1055, nil)}
	made, _, err := m.GenerateKeyPair(h, mechanism, public, private)
	if err != nil {
		s.t.Fatal(err)
	}
	point, err := m.GetAttributeValue(h, made, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil)})
	if err != nil || len(point[0].Value) != 34 {
		s.t.Fatalf("CKA_EC_POINT: %v", err)
	}
	return point[0].Value[2:]
}
