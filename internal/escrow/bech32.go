package escrow

import "strings"

// bech32Charset has the 32 characters of Bech32 by their value (BIP-173).
const bech32Charset = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"

// encodeBech32 encodes bytes as Bech32 (BIP-173) with a lower-case prefix. age writes its keys in
// this form, and has no function that makes a private key of given bytes.
func encodeBech32(prefix string, data []byte) string {
	var values []byte // of 5 bits
	bits, n := uint32(0), 0
	for _, b := range data {
		bits, n = bits<<8|uint32(b), n+8
		for ; n >= 5; n -= 5 {
			values = append(values, byte(bits>>(n-5))&31)
		}
	}
	if n > 0 {
		values = append(values, byte(bits<<(5-n))&31)
	}
	var expanded []byte
	for _, c := range []byte(prefix) {
		expanded = append(expanded, c>>5)
	}
	expanded = append(expanded, 0)
	for _, c := range []byte(prefix) {
		expanded = append(expanded, c&31)
	}
	sum := bech32Sum(append(append(expanded, values...), 0, 0, 0, 0, 0, 0)) ^ 1
	var text strings.Builder
	text.WriteString(prefix + "1")
	for _, v := range values {
		text.WriteByte(bech32Charset[v])
	}
	for i := range 6 {
		text.WriteByte(bech32Charset[sum>>(5*(5-i))&31])
	}
	clear(values)
	return text.String()
}

func bech32Sum(values []byte) uint32 {
	sum := uint32(1)
	for _, v := range values {
		top := sum >> 25
		sum = sum&0x1ffffff<<5 ^ uint32(v)
		for i, g := range []uint32{0x3b6a57b2, 0x26508e6d, 0x1ea119fa, 0x3d4233dd, 0x2a1462b3} {
			if top>>i&1 == 1 {
				sum ^= g
			}
		}
	}
	return sum
}
