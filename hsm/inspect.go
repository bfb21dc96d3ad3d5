package hsm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"strings"

	"countersign/internal/keystore"
	"countersign/internal/secret"

	"github.com/miekg/pkcs11"
)

// throwAway is the reference of the keys of Inspect. A leading hyphen is in no valid name, so no
// listing takes a key left by a crash for a key of the appliance.
var throwAway = keystore.Ref{Name: "-throw-away", Version: 1}

// Inspect reports the module, the token, the quirks and the mechanisms. With prove, Inspect tests
// each algorithm with a token object, as the appliance's keys are: some tokens refuse session
// objects, and others make session objects only.
func (st *Store) Inspect(ctx context.Context, prove bool) (found []keystore.Finding, err error) {
	report := func(what string, alg keystore.Algorithm, ok bool, format string, args ...any) {
		found = append(found, keystore.Finding{What: what, For: alg, OK: ok, Text: fmt.Sprintf(format, args...)})
	}
	err = st.withSession(ctx, "inspect", func(s session) error {
		found = nil
		info, err := st.module.GetInfo()
		if err != nil {
			return deviceError("C_GetInfo", err)
		}
		token, err := st.module.GetTokenInfo(st.slot)
		if err != nil {
			return deviceError("C_GetTokenInfo", err)
		}
		mechanisms, err := st.mechanisms()
		if err != nil {
			return err
		}
		report("module", "", true, "%s, %s %d.%d, PKCS#11 %d.%d, %s", info.ManufacturerID, info.LibraryDescription,
			info.LibraryVersion.Major, info.LibraryVersion.Minor,
			info.CryptokiVersion.Major, info.CryptokiVersion.Minor, st.path)
		report("token", "", true, "%s, %s %s, serial %s, firmware %d.%d, "+
			"at most %s sessions, %d open in this process, up to %d used by it",
			token.Label, token.ManufacturerID, token.Model, token.SerialNumber,
			token.FirmwareVersion.Major, token.FirmwareVersion.Minor,
			limitText(token.MaxSessionCount), st.open.Load()+1, st.sessionLimit())
		report("pin", "", true, "%s", map[bool]string{
			false: "accepted; the token told of no wrong PIN before", // or counts none
			true:  "accepted; before that a wrong PIN was tried (CKF_USER_PIN_COUNT_LOW): who tries one?",
		}[st.triesLow.Load()])
		q := st.quirks
		report("quirks", "", true, "ec_params %s, ec_point %s, x25519 %s, copies %s, allowed_mechanisms %s (%s)",
			q.ECParams, q.ECPoint, q.X25519, q.Copies, q.AllowedMechanisms, q.source)
		for _, alg := range keystore.Algorithms {
			c, err := st.curveFor(alg)
			if err != nil {
				return err
			}
			for _, m := range []uint{c.keygen, c.operation} {
				text := mechanismName(m)
				if !mechanisms[m] {
					text += " is missing"
				}
				if !mechanisms[m] && m == ckmECMontgomeryKeyPairGen && mechanisms[ckmECEdwardsKeyPairGen] {
					text += "; if the device makes X25519 keys by CKM_EC_EDWARDS_KEY_PAIR_GEN, " +
						`set quirks.x25519 = "edwards"`
				}
				report("mechanism", alg, mechanisms[m], "%s", text)
			}
		}
		if !prove {
			return nil
		}
		if err := st.clearThrowAways(s); err != nil {
			return err
		}
		for _, alg := range keystore.Algorithms {
			c, _ := st.curveFor(alg)
			if provenance, err := st.testThrowAway(s, c, false); err != nil {
				report("proof", alg, false, "a throw-away key: %v", oneLine(err))
			} else {
				report("proof", alg, true, "a throw-away key was made and used, and the result is right; provenance %v",
					provenance)
			}
		}
		c, _ := st.curveFor(keystore.Ed25519)
		if _, err := st.testThrowAway(s, c, true); err != nil {
			report("import", "", false, "a throw-away seed: %v", oneLine(err))
		} else {
			report("import", "", true, "a throw-away seed became a key that can't be taken out, and signs right")
		}
		return nil
	})
	return found, err
}

// clearThrowAways removes what an interrupted Inspect has left on the token.
func (st *Store) clearThrowAways(s session) error {
	left, err := st.find(s, labelOf(throwAway))
	for _, o := range left {
		if err := st.module.DestroyObject(s.handle, o); err != nil {
			return deviceError("C_DestroyObject", err)
		}
	}
	return err
}

// testThrowAway makes a key on the token, uses the key once and destroys the key.
func (st *Store) testThrowAway(s session, c curve, imported bool) (provenance keystore.Provenance, err error) {
	info := keystore.Info{Ref: throwAway, Algorithm: c.alg}
	rand.Read(info.Tag[:])
	if imported {
		seed := make([]byte, 32)
		rand.Read(seed)
		info.PublicKey, err = st.importSeed(s, throwAway, c, info.Tag, secret.New(seed))
	} else {
		info.PublicKey, err = st.generate(s, throwAway, c, info.Tag)
	}
	defer func() { err = errors.Join(err, st.destroy(s, throwAway, info.Tag)) }()
	if err != nil {
		return provenance, err
	}
	private, err := st.verifyCreated(s, &info, !imported)
	if err != nil {
		return provenance, err
	}
	value, err := st.direct.attributes(s.handle, private, pkcs11.CKA_VALUE)
	if err == nil && value[0] != nil {
		err = errors.New("the private key can be read")
	}
	return info.Provenance, err
}

func limitText(n uint) string {
	switch {
	case n == pkcs11.CK_EFFECTIVELY_INFINITE:
		return "any number of"
	case n == pkcs11.CK_UNAVAILABLE_INFORMATION:
		return "an unknown number of"
	case n > math.MaxInt:
		return "any number of" // openCryptoki's 2^64-2
	}
	return fmt.Sprint(n)
}

func mechanismName(m uint) string {
	return map[uint]string{
		ckmECEdwardsKeyPairGen:     "CKM_EC_EDWARDS_KEY_PAIR_GEN",
		ckmECMontgomeryKeyPairGen:  "CKM_EC_MONTGOMERY_KEY_PAIR_GEN",
		ckmEdDSA:                   "CKM_EDDSA",
		pkcs11.CKM_ECDH1_DERIVE:    "CKM_ECDH1_DERIVE",
		pkcs11.CKM_EC_KEY_PAIR_GEN: "CKM_EC_KEY_PAIR_GEN",
		pkcs11.CKM_ECDSA:           "CKM_ECDSA",
	}[m]
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
