package hsm

import (
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"
)

// Quirks are the points in which modules read PKCS#11 differently. Every field is a word of a few, or empty for what the
// table says.
type Quirks struct {
	// ECParams is how CKA_EC_PARAMS names the curve of a new key: oid (a DER object identifier, RFC 8410) or name (a DER
	// PrintableString, but for P-256). Both are read.
	ECParams string `toml:"ec_params" json:"ec_params,omitempty"`
	// ECPoint is how the CKA_EC_POINT of an imported key is written: raw (PKCS#11 v3.0 section 2.3.5) or octet-string
	// (DER). Both are read.
	ECPoint string `toml:"ec_point" json:"ec_point,omitempty"`
	// X25519 is the type of an X25519 key: montgomery (CKK_EC_MONTGOMERY, PKCS#11 v3.0 section 2.3.6) or edwards
	// (CKK_EC_EDWARDS, made by the mechanism of Ed25519 keys). Both are read.
	X25519 string `toml:"x25519" json:"x25519,omitempty"`
	// Copies is on where private keys are used through session objects that are copies of them, off where directly. A
	// copy saves what the module does to look at the token's object each time. It stays as sensitive as the key. A key
	// that is deleted on the token by other means goes on signing until the key worker's next look, some seconds later.
	Copies string `toml:"copies" json:"copies,omitempty"`
	// AllowedMechanisms is on where a new key is bound to the one mechanism that it is for, off where the module refuses
	// CKA_ALLOWED_MECHANISMS. Then only the usage flags bind it.
	AllowedMechanisms string `toml:"allowed_mechanisms" json:"allowed_mechanisms,omitempty"`
}

var quirkWords = []struct {
	field string
	value func(*Quirks) *string
	words []string
}{
	{"ec_params", func(q *Quirks) *string { return &q.ECParams }, []string{"oid", "name"}},
	{"ec_point", func(q *Quirks) *string { return &q.ECPoint }, []string{"raw", "octet-string"}},
	{"x25519", func(q *Quirks) *string { return &q.X25519 }, []string{"montgomery", "edwards"}},
	{"copies", func(q *Quirks) *string { return &q.Copies }, []string{"on", "off"}},
	{"allowed_mechanisms", func(q *Quirks) *string { return &q.AllowedMechanisms }, []string{"on", "off"}},
}

// Check refuses words that are not known.
func (q Quirks) Check() error {
	for _, w := range quirkWords {
		if v := *w.value(&q); v != "" && !slices.Contains(w.words, v) {
			return fmt.Errorf("quirks.%s: %q is none of %s", w.field, v, strings.Join(w.words, ", "))
		}
	}
	return nil
}

// table has the modules that are known to differ from the standard, by the beginning of CK_INFO.manufacturerID. The first
// row that fits counts.
var table = []struct {
	manufacturer string
	least        [2]byte // the library's version, from which on
	quirks       Quirks
	source       string
}{
	{"SoftHSM", [2]byte{2, 0}, Quirks{ECParams: "oid", ECPoint: "octet-string", X25519: "edwards", Copies: "off", AllowedMechanisms: "on"}, "SoftHSM 2.6.1, tested"},
	{"Kryoptic", [2]byte{0, 0}, Quirks{ECParams: "oid", ECPoint: "raw", X25519: "montgomery", Copies: "off", AllowedMechanisms: "on"}, "Kryoptic, by its source, not tested"},
	{"Mozilla Foundation", [2]byte{3, 103}, Quirks{ECParams: "oid", ECPoint: "raw", X25519: "montgomery", Copies: "off", AllowedMechanisms: "on"}, "NSS, by its source, not tested"},
	{"Yubico", [2]byte{2, 6}, Quirks{ECParams: "name", ECPoint: "octet-string", X25519: "montgomery", Copies: "off", AllowedMechanisms: "off"}, "YubiHSM 2, by its source, not tested"},
	{"Nitrokey", [2]byte{0, 0}, Quirks{ECParams: "oid", ECPoint: "octet-string", X25519: "montgomery", Copies: "off", AllowedMechanisms: "on"}, "NetHSM, by its source, not tested"},
	{"IBM", [2]byte{3, 27}, Quirks{ECParams: "oid", ECPoint: "raw", X25519: "montgomery", Copies: "off", AllowedMechanisms: "on"}, "openCryptoki, by its source, not tested"},
	{"nCipher", [2]byte{0, 0}, Quirks{ECParams: "name", ECPoint: "raw", X25519: "montgomery", Copies: "off", AllowedMechanisms: "on"}, "nShield, by what its clients say, not tested"},
}

// quirks are Quirks with every field set, and where they come from.
type quirks struct {
	Quirks
	source string
}

// quirksOf chooses the quirks by what the module reports of itself and of its mechanisms, and then by the configuration.
func (s *Store) quirksOf(info pkcs11.Info) (quirks, error) {
	q := quirks{Quirks{ECParams: "oid", ECPoint: "raw", X25519: "montgomery", Copies: "off", AllowedMechanisms: "on"}, "the standard"}
	version := [2]byte{info.LibraryVersion.Major, info.LibraryVersion.Minor}
	for _, row := range table {
		if strings.HasPrefix(info.ManufacturerID, row.manufacturer) && slices.Compare(version[:], row.least[:]) >= 0 {
			q = quirks{row.quirks, row.source}
			break
		}
	}
	mechanisms, err := s.mechanisms()
	if err != nil {
		return q, err
	}
	if !mechanisms[ckmECMontgomeryKeyPairGen] && mechanisms[ckmECEdwardsKeyPairGen] && q.X25519 == "montgomery" {
		q.X25519, q.source = "edwards", q.source+", without CKM_EC_MONTGOMERY_KEY_PAIR_GEN"
	}
	for _, w := range quirkWords {
		if v := *w.value(&s.config.Quirks); v != "" && v != *w.value(&q.Quirks) {
			*w.value(&q.Quirks) = v
			q.source += ", " + w.field + " by configuration"
		}
	}
	return q, nil
}

func (s *Store) mechanisms() (map[uint]bool, error) {
	list, err := s.module.GetMechanismList(s.slot)
	if err != nil {
		return nil, deviceError("C_GetMechanismList", err)
	}
	has := map[uint]bool{}
	for _, m := range list {
		has[m.Mechanism] = true
	}
	return has, nil
}
