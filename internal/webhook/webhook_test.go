package webhook

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"
)

// A message signed with OpenSSL.
const (
	vectorKey       = "whpk_FMstNQVap2EgDPGzQvUS26GIacRQZ2I4l1eliBZmRB8="
	vectorSignature = "v1a,jQbWi620DW/l0ljjtxup8JAM90e812MNEk7h9AhY15/QMT5g+QXoXp6nn4MDGE1A7lu0qxstDHRBav7n/0frDg=="
	vectorBody      = `{"type":"key.rotated"}`
)

func vectorHeader() http.Header {
	h := http.Header{}
	h.Set("webhook-id", "msg_1")
	h.Set("webhook-timestamp", "1700000000")
	h.Set("webhook-signature", vectorSignature)
	return h
}

// TestVerify changes headers, body, key and time of a signed message.
func TestVerify(t *testing.T) {
	key, err := ParseKey(vectorKey)
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	set := func(name, value string) func(http.Header) { return func(h http.Header) { h.Set(name, value) } }
	wrong := signaturePrefix + base64.StdEncoding.EncodeToString(make([]byte, 64))
	for _, c := range []struct {
		name   string
		key    ed25519.PublicKey
		change func(http.Header)
		body   string
		late   time.Duration
		want   error
	}{
		{name: "as it is"},
		{name: "at the edge", late: Tolerance},
		{name: "at the other edge", late: -Tolerance},
		{name: "too late", late: Tolerance + 1, want: ErrTime},
		{name: "too early", late: -Tolerance - 1, want: ErrTime},
		{name: "another key", key: other, want: ErrSignature},
		{name: "another body", body: vectorBody + " ", want: ErrSignature},
		{name: "another ID", change: set(headerID, "msg_2"), want: ErrSignature},
		{name: "another time", change: set(headerTimestamp, "1700000001"), want: ErrSignature},
		{name: "the border moved", change: set(headerID, "msg_1.1700000000"), want: ErrMalformed},
		{name: "no ID", change: set(headerID, ""), want: ErrMalformed},
		{name: "a long ID", change: set(headerID, strings.Repeat("x", 129)), want: ErrMalformed},
		{name: "two IDs", change: func(h http.Header) { h.Add(headerID, "msg_1") }, want: ErrMalformed},
		{name: "no time", change: func(h http.Header) { h.Del(headerTimestamp) }, want: ErrMalformed},
		{name: "time with a sign", change: set(headerTimestamp, "+1700000000"), want: ErrMalformed},
		{name: "time with a zero", change: set(headerTimestamp, "01700000000"), want: ErrMalformed},
		{name: "the end of time", change: set(headerTimestamp, "9223372036854775807"), want: ErrTime},
		{name: "the beginning of time", change: set(headerTimestamp, "-9223372036854775808"), want: ErrTime},
		{name: "two times", change: func(h http.Header) { h.Add(headerTimestamp, "1700000000") }, want: ErrMalformed},
		{name: "no signature", change: func(h http.Header) { h.Del(headerSignature) }, want: ErrMalformed},
		{name: "an empty signature", change: set(headerSignature, ""), want: ErrSignature},
		{name: "two signature headers", want: ErrMalformed,
			change: func(h http.Header) { h.Add(headerSignature, vectorSignature) }},
		{name: "among others", change: set(headerSignature, "v1,K5oZ "+wrong+" "+vectorSignature+" v2,x")},
		{name: "others only", change: set(headerSignature, "v1,K5oZ "+wrong), want: ErrSignature},
		{name: "as another scheme", change: set(headerSignature, "v1,"+vectorSignature[4:]), want: ErrSignature},
		{name: "cut", change: set(headerSignature, vectorSignature[:len(vectorSignature)-4]), want: ErrSignature},
		{name: "bits left over", want: ErrSignature,
			change: set(headerSignature, vectorSignature[:len(vectorSignature)-3]+"h==")},
		{name: "nine signatures", want: ErrMalformed,
			change: set(headerSignature, strings.Repeat(wrong+" ", 8)+vectorSignature)},
		{name: "eight signatures", change: set(headerSignature, strings.Repeat(wrong+" ", 7)+vectorSignature)},
	} {
		header := vectorHeader()
		if c.change != nil {
			c.change(header)
		}
		if c.key == nil {
			c.key = key
		}
		if c.body == "" {
			c.body = vectorBody
		}
		err := Verify(c.key, header, []byte(c.body), time.Unix(1700000000, 0).Add(c.late), Tolerance)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if err := Verify(nil, vectorHeader(), []byte(vectorBody), time.Unix(1700000000, 0), Tolerance); err == nil {
		t.Error("the message verifies without a key")
	}
}

// TestKeyText formats and parses public keys.
func TestKeyText(t *testing.T) {
	key, err := ParseKey(vectorKey)
	if err != nil || FormatKey(key) != vectorKey {
		t.Errorf("%s becomes %s, %v", vectorKey, FormatKey(key), err)
	}
	for _, s := range []string{
		"", "whpk_", vectorKey[5:], "whsk_" + vectorKey[5:], vectorKey + "\n",
		vectorKey[:20] + "\n" + vectorKey[20:], vectorKey[:len(vectorKey)-1],
		"whpk_FMstNQVap2EgDPGzQvUS26GIacRQZ2I4l1eliBZmRB9=", // non-zero padding bits
		"whpk_" + base64.StdEncoding.EncodeToString(make([]byte, 33)),
	} {
		if _, err := ParseKey(s); err == nil {
			t.Errorf("%q is taken for a key", s)
		}
	}
}

// TestNobodysKey parses and uses keys of small order, under which a constant is the signature of
// every message, and a key that is no point.
func TestNobodysKey(t *testing.T) {
	constant := signaturePrefix + base64.StdEncoding.EncodeToString(append([]byte{1}, make([]byte, 63)...))
	header := vectorHeader()
	header.Set(headerSignature, constant)
	for _, first := range []byte{0, 1, 2} { // order 4, order 1, no point
		key := append(ed25519.PublicKey{first}, make([]byte, 31)...)
		if _, err := ParseKey(FormatKey(key)); err == nil {
			t.Errorf("%x is a key", key)
		}
		if err := Verify(key, header, []byte(vectorBody), time.Unix(1700000000, 0), Tolerance); err == nil {
			t.Errorf("%x: a constant is a signature", key)
		}
	}
}
