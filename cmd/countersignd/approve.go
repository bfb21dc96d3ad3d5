package main

import (
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strconv"

	"countersign/internal/keystore"
	"countersign/tpm"
)

// approveState signs the state of a machine, values of PCRs, and prints the approval.
func approveState(keyPath, bank string, registers map[string]string, stdout io.Writer) error {
	if keyPath == "" || len(registers) == 0 {
		return errors.New("--key and at least one --pcr must be given")
	}
	b, err := keystore.ReadSecret(keyPath, "key file")
	if err != nil {
		return err
	}
	defer b.Wipe()
	block, _ := pem.Decode(b.Expose())
	if block == nil {
		return fmt.Errorf("key file %s: not PEM", keyPath)
	}
	var key any
	if key, err = x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
		key, err = x509.ParseECPrivateKey(block.Bytes)
	}
	signer, ok := key.(crypto.Signer)
	if err != nil || !ok {
		return fmt.Errorf("key file %s: no private key in the form PKCS#8 or SEC 1", keyPath)
	}
	values := map[uint][]byte{}
	for index, value := range registers {
		n, err := strconv.ParseUint(index, 10, 8)
		if err != nil {
			return fmt.Errorf("--pcr: %q is not the number of a register, 0 to 23", index)
		}
		if values[uint(n)], err = hex.DecodeString(value); err != nil {
			return fmt.Errorf("--pcr %d: the value is not hex", n)
		}
	}
	approval, err := tpm.Approve(signer, tpm.Bank(bank), values)
	if err != nil {
		return err
	}
	out := json.NewEncoder(stdout)
	out.SetIndent("", "  ")
	return out.Encode(approval)
}
