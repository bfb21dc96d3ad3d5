package transcript

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strings"

	"countersign/internal/eddsa"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

const paykitSubscriptionDomain = "PAYKIT_SUBSCRIPTION_V2"

// Limits of a subscription.
const (
	maxSubscriptionID  = 128  // bytes
	maxCurrency        = 16   // characters
	maxMethodID        = 64   // characters
	maxDescription     = 4096 // bytes
	maxMetadataEntries = 64   // entries of one object
	maxMetadataKey     = 64   // bytes of an outer key
	maxInnerKey        = 31   // bytes of an inner key; see checkMetadata for the reason
	maxMetadataText    = 4096 // bytes of one value
	maxAmountScale     = 28   // digits after the point
	maxAmountBits      = 96   // of the amount without its point
)

// The forms of fields that several types have.
const (
	formKey = "32 bytes: an array of numbers, 64 hex digits, 43 characters of base64url " +
		"or 52 characters of z-base-32"
	formAmount      = "text: a positive decimal number, such as \"1000\" or \"0.25\""
	formDescription = "text of up to 4096 bytes; line feed and tab are allowed"
)

var paykitSubscriptionType = Type{
	"paykit-subscription-v2",
	"a subscription, as Paykit's paykit_subscriptions signs it",
	[]Field{
		{"subscription_id", true, "text of 1 to 128 bytes"},
		{"subscriber", true, formKey + "; a signer"},
		{"provider", true, formKey + "; differs from subscriber; a signer"},
		{"terms.amount", true, formAmount},
		{"terms.currency", true, "1 to 16 of A-Z a-z 0-9 . _ -"},
		{"terms.frequency", true, formFrequency},
		{"terms.method", true, "1 to 64 of A-Z a-z 0-9 . _ -"},
		{"terms.max_amount_per_period", false, formAmount},
		{"terms.description", true, formDescription},
		{"metadata", true, "an object of text and of objects of text"},
		{"created_at", true, formTime},
		{"starts_at", true, formTime},
		{"ends_at", false, formTime + ", later than starts_at"},
	},
	paykitSubscription,
	readPaykitSubscription,
}

// subscription is the JSON form of a Paykit subscription, as the serde types of
// paykit_subscriptions write it.
type subscription struct {
	SubscriptionID string         `json:"subscription_id"`
	Subscriber     publicKey      `json:"subscriber"`
	Provider       publicKey      `json:"provider"`
	Terms          terms          `json:"terms"`
	Metadata       map[string]any `json:"metadata"`
	CreatedAt      int64          `json:"created_at"`
	StartsAt       int64          `json:"starts_at"`
	EndsAt         *int64         `json:"ends_at"`
}

type terms struct {
	Amount             string    `json:"amount"`
	Currency           string    `json:"currency"`
	Frequency          frequency `json:"frequency"`
	Method             string    `json:"method"`
	MaxAmountPerPeriod *string   `json:"max_amount_per_period"`
	Description        *string   `json:"description"`
}

// frequency is a serde enum: "Daily", "Weekly", {"Monthly":{"day_of_month":1}},
// {"Yearly":{"month":12,"day":31}} or {"Custom":{"interval_seconds":3600}}. The field encoded has
// the postcard form.
type frequency struct{ encoded []byte }

// frequencies lists the variants in the order of the numbers that postcard gives them.
var frequencies = [...]string{"Daily", "Weekly", "Monthly", "Yearly", "Custom"}

// paykitSubscription builds a paykit-subscription-v2, as paykit_subscriptions signs it:
//
//	canonical = postcard("PAYKIT_SUBSCRIPTION_V2", subscription, nonce, timestamp, expires_at)
//	signed    = SHA-256(canonical)
//
// The signer must be the subscriber or the provider. Two rules are stricter than upstream's:
// amounts must be positive, and metadata must be of a form in which no two documents have the
// same bytes.
func paykitSubscription(d *Document) error {
	var s subscription
	// Upstream writes no bytes for metadata that is null. So metadata is required, and {} stands
	// for none.
	if err := d.decode(&s); err != nil {
		return err
	}
	if err := s.check(); err != nil {
		return err
	}
	d.Payment = &Payment{Amount: s.Terms.Amount, Currency: s.Terms.Currency, Method: s.Terms.Method}
	d.Canonical = s.canonical(d.Request)
	sum := sha256.Sum256(d.Canonical)
	d.Message = sum[:]
	d.Signers = [][]byte{s.Subscriber[:], s.Provider[:]}
	d.Fields = map[string]any{
		"currency":   s.Terms.Currency,
		"method":     s.Terms.Method,
		"subscriber": hex.EncodeToString(s.Subscriber[:]),
		"provider":   hex.EncodeToString(s.Provider[:]),
		"frequency":  frequencies[s.Terms.Frequency.encoded[0]],
		"starts_at":  s.StartsAt,
	}
	if s.EndsAt != nil {
		d.Fields["ends_at"] = *s.EndsAt
	}
	return nil
}

func (s *subscription) check() error {
	if err := checkText("payload.subscription_id", s.SubscriptionID, maxSubscriptionID); err != nil {
		return err
	}
	if err := s.Subscriber.check("payload.subscriber"); err != nil {
		return err
	}
	if err := s.Provider.check("payload.provider"); err != nil {
		return err
	}
	if s.Subscriber == s.Provider {
		return malformed("payload.provider", "must differ from payload.subscriber")
	}
	if err := checkAmount("payload.terms.amount", s.Terms.Amount); err != nil {
		return err
	}
	if s.Terms.MaxAmountPerPeriod != nil {
		if err := checkAmount("payload.terms.max_amount_per_period", *s.Terms.MaxAmountPerPeriod); err != nil {
			return err
		}
	}
	if err := checkToken("payload.terms.currency", s.Terms.Currency, maxCurrency, "._-"); err != nil {
		return err
	}
	if err := checkToken("payload.terms.method", s.Terms.Method, maxMethodID, "._-"); err != nil {
		return err
	}
	if s.Terms.Frequency.encoded == nil {
		return malformed("payload.terms.frequency", "is missing")
	}
	if s.Terms.Description == nil {
		return malformed("payload.terms.description", "is missing; it may be empty")
	}
	if err := checkDescription("payload.terms.description", *s.Terms.Description); err != nil {
		return err
	}
	if err := checkMetadata(s.Metadata); err != nil {
		return err
	}
	if err := checkTime("payload.created_at", s.CreatedAt); err != nil {
		return err
	}
	if err := checkTime("payload.starts_at", s.StartsAt); err != nil {
		return err
	}
	if s.EndsAt != nil {
		if err := checkTime("payload.ends_at", *s.EndsAt); err != nil {
			return err
		}
		if *s.EndsAt <= s.StartsAt {
			return malformed("payload.ends_at", "must be later than payload.starts_at")
		}
	}
	return nil
}

// checkMetadata keeps the canonical form injective. Upstream writes a JSON value without a type
// tag, so that {"k":true} and {"k":1} have the same bytes, and many other pairs, too. Two kinds
// of values are allowed here: text without control characters, and non-empty objects of such text
// whose keys have 1 to 31 bytes.
//
// With these rules the bytes can be parsed in one way only. A value begins with a varint. If the
// varint is zero, the value is the empty text. Otherwise the byte after the varint decides: for
// an object the byte is the length of an inner key (1 to 31), for text the byte is at least 0x20.
func checkMetadata(m map[string]any) error {
	if len(m) > maxMetadataEntries {
		return malformed("payload.metadata", "must have at most %d entries", maxMetadataEntries)
	}
	for key, value := range m {
		if err := checkText("payload.metadata key", key, maxMetadataKey); err != nil {
			return err
		}
		field := fmt.Sprintf("payload.metadata[%q]", key)
		inner, isObject := value.(map[string]any)
		if !isObject {
			if err := checkMetadataText(field, value); err != nil {
				return err
			}
			continue
		}
		if len(inner) == 0 || len(inner) > maxMetadataEntries {
			return malformed(field, "must have 1 to %d entries", maxMetadataEntries)
		}
		for key, value := range inner {
			if err := checkText(field+" key", key, maxInnerKey); err != nil {
				return err
			}
			if err := checkMetadataText(fmt.Sprintf("%s[%q]", field, key), value); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkMetadataText(field string, value any) error {
	s, ok := value.(string)
	switch {
	case !ok:
		return malformed(field, "must be a string or an object of strings: the Paykit layout signs other types alike")
	case len(s) > maxMetadataText:
		return malformed(field, "must have at most %d bytes", maxMetadataText)
	case hasControl(s):
		return malformed(field, "must not contain control characters")
	}
	return nil
}

// checkDescription accepts text for people: empty, or of one or several lines.
func checkDescription(field, s string) error {
	if len(s) > maxDescription {
		return malformed(field, "must have at most %d bytes", maxDescription)
	}
	if hasControl(strings.NewReplacer("\n", "", "\t", "").Replace(s)) {
		return malformed(field, "must not contain control characters other than line feed and tab")
	}
	return nil
}

// checkAmount accepts a positive decimal number in the form that Rust's rust_decimal prints, if
// rust_decimal holds the number exactly: 96 bits without the point, at most 28 digits after the
// point, no sign, no exponent, no leading zeros.
func checkAmount(field, s string) error {
	whole, fraction, point := strings.Cut(s, ".")
	if s == "" {
		return malformed(field, "is missing")
	}
	if !digits(whole) || point && !digits(fraction) || len(whole) > 1 && whole[0] == '0' {
		return malformed(field, "must be a positive decimal number in text, such as \"1000\" or \"0.25\"")
	}
	if len(whole) > 29 || len(fraction) > maxAmountScale {
		return malformed(field, "has more than 29 digits before the point or %d after it", maxAmountScale)
	}
	n, _ := new(big.Int).SetString(whole+fraction, 10)
	switch {
	case n.Sign() == 0:
		return malformed(field, "must be positive")
	case n.BitLen() > maxAmountBits:
		return malformed(field, "overflows a 96-bit decimal")
	}
	return nil
}

func digits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// canonical returns the postcard encoding: varint lengths, zigzag varints for i64, 00 or 01
// before an Option, raw key bytes. canonical does not judge the values: check decides which
// documents may be signed.
func (s *subscription) canonical(r Request) []byte {
	b := appendString(nil, paykitSubscriptionDomain)
	b = appendString(b, s.SubscriptionID)
	b = append(b, s.Subscriber[:]...)
	b = append(b, s.Provider[:]...)
	b = appendString(b, s.Terms.Amount)
	b = appendString(b, s.Terms.Currency)
	b = append(b, s.Terms.Frequency.encoded...)
	b = appendString(b, s.Terms.Method)
	if s.Terms.MaxAmountPerPeriod == nil {
		b = append(b, 0)
	} else {
		b = appendString(append(b, 1), *s.Terms.MaxAmountPerPeriod)
	}
	b = appendString(b, *s.Terms.Description)
	b = appendValue(b, s.Metadata)
	b = binary.AppendVarint(b, s.CreatedAt)
	b = binary.AppendVarint(b, s.StartsAt)
	if s.EndsAt == nil {
		b = append(b, 0)
	} else {
		b = binary.AppendVarint(append(b, 1), *s.EndsAt)
	}
	b = append(b, r.Nonce[:]...)
	b = binary.AppendVarint(b, r.Timestamp)
	return binary.AppendVarint(b, r.ExpiresAt)
}

// appendValue appends a metadata value: text, an object with sorted keys, or a boolean. check
// refuses booleans; appendValue encodes them to reproduce the published test vectors.
func appendValue(b []byte, value any) []byte {
	switch v := value.(type) {
	case string:
		return appendString(b, v)
	case bool:
		if v {
			return append(b, 1)
		}
		return append(b, 0)
	case map[string]any:
		b = binary.AppendUvarint(b, uint64(len(v)))
		for _, key := range slices.Sorted(maps.Keys(v)) {
			b = appendValue(appendString(b, key), v[key])
		}
	}
	return b
}

func (f *frequency) UnmarshalJSON(b []byte) error {
	switch string(b) {
	case `"Daily"`:
		f.encoded = []byte{0}
		return nil
	case `"Weekly"`:
		f.encoded = []byte{1}
		return nil
	}
	var v struct {
		Monthly *struct {
			DayOfMonth uint8 `json:"day_of_month"`
		} `json:"Monthly"`
		Yearly *struct {
			Month uint8 `json:"month"`
			Day   uint8 `json:"day"`
		} `json:"Yearly"`
		Custom *struct {
			IntervalSeconds uint64 `json:"interval_seconds"`
		} `json:"Custom"`
	}
	var members map[string]jsontext.Value
	if json.Unmarshal(b, &members) != nil || len(members) != 1 {
		return errFrequency
	}
	if json.Unmarshal(b, &v, json.RejectUnknownMembers(true)) != nil {
		return errFrequency
	}
	switch {
	case v.Monthly != nil:
		if v.Monthly.DayOfMonth < 1 || v.Monthly.DayOfMonth > 31 {
			return errFrequency
		}
		f.encoded = []byte{2, v.Monthly.DayOfMonth}
	case v.Yearly != nil:
		if m, d := v.Yearly.Month, v.Yearly.Day; m < 1 || m > 12 || d < 1 || d > daysIn[m-1] {
			return errFrequency
		}
		f.encoded = []byte{3, v.Yearly.Month, v.Yearly.Day}
	case v.Custom != nil:
		if v.Custom.IntervalSeconds < 1 || v.Custom.IntervalSeconds > MaxTime {
			return errFrequency
		}
		f.encoded = binary.AppendUvarint([]byte{4}, v.Custom.IntervalSeconds)
	default:
		return errFrequency
	}
	return nil
}

// daysIn has the days of each month in a leap year.
var daysIn = [12]uint8{31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31}

const formFrequency = `"Daily", "Weekly", {"Monthly":{"day_of_month":1 to 31}}, ` +
	`{"Yearly":{"month":1 to 12,"day":1 to 31}} or {"Custom":{"interval_seconds":1 to 253402300799}}`

var errFrequency = errors.New("must be " + formFrequency)

// publicKey is a public key of 32 bytes. In JSON a publicKey is an array of 32 numbers (serde's
// form) or text: hex, base64url without padding, or z-base-32 (Pubky's form).
type publicKey [32]byte

var errPublicKey = errors.New("must be " + formKey)

// zBase32 is the encoding of keys in Pubky: human-oriented base-32, 5 bits a character, no padding.
var zBase32 = base32.NewEncoding("ybndrfg8ejkmcpqxot1uwisza345h769").WithPadding(base32.NoPadding)

// check refuses bytes that are no point on the curve, and points of another order than the prime L.
func (k publicKey) check(field string) error {
	if err := eddsa.CheckPublicKey(k[:]); err != nil {
		return malformed(field, "is not a usable Ed25519 public key: %v", err)
	}
	return nil
}

func (k *publicKey) UnmarshalJSON(b []byte) error {
	if jsontext.Value(b).Kind() == '[' {
		// A slice of uint8 would be read from base64 text. Pointers show a null among the numbers.
		var numbers []*uint16
		if err := json.Unmarshal(b, &numbers); err != nil || len(numbers) != len(k) {
			return errPublicKey
		}
		for i, n := range numbers {
			if n == nil || *n > 255 {
				return errPublicKey
			}
			k[i] = byte(*n)
		}
		return nil
	}
	var text string
	if err := json.Unmarshal(b, &text); err != nil {
		return errPublicKey
	}
	var raw []byte
	var err error
	switch len(text) {
	case 64:
		raw, err = hex.DecodeString(text)
	case 43:
		raw, err = base64.RawURLEncoding.Strict().DecodeString(text)
	case 52:
		// 52 characters have 260 bits, 4 more than a key. Spare bits other than zero would give
		// one key several names.
		if raw, err = zBase32.DecodeString(text); err == nil && zBase32.EncodeToString(raw) != text {
			return errPublicKey
		}
	}
	if err != nil || len(raw) != len(k) {
		return errPublicKey
	}
	copy(k[:], raw)
	return nil
}
