package wire_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"countersign/wire"
)

const nonce = "KioqKioqKioqKioqKioqKioqKioqKioqKioqKioqKio"

// sign returns a sign request with pairs of changes: old text, new text.
func sign(changes ...string) string {
	s := `{"id":"1","op":"sign","key":"payments","type":"message-v1","payload":{"context":"c"},` +
		`"nonce":"` + nonce + `","timestamp":1,"expires_at":2}`
	for i := 0; i < len(changes); i += 2 {
		s = strings.Replace(s, changes[i], changes[i+1], 1)
	}
	return s
}

func TestParse(t *testing.T) {
	id, r, err := wire.Parse([]byte(sign()), 100)
	if err != nil {
		t.Fatal(err)
	}
	s, ok := r.(*wire.Sign)
	if !ok || id != "1" || s.Key != "payments" || s.Type != "message-v1" ||
		string(s.Payload) != `{"context":"c"}` || s.Nonce[31] != 42 || s.ExpiresAt != 2 {
		t.Errorf("id %q, %#v", id, r)
	}
	for _, op := range []string{"ping", "keys"} {
		if _, _, err := wire.Parse([]byte(`{"id":"x","op":"`+op+`"}`), 100); err != nil {
			t.Errorf("%s: %v", op, err)
		}
	}
	verify := sign(`"op":"sign","key":"payments"`, `"op":"verify","signature":"AA","public_key":"`+nonce+`"`)
	if _, r, err := wire.Parse([]byte(verify), 100); err != nil || r.(*wire.Verify).PublicKey[0] != 42 {
		t.Errorf("verify: %v", err)
	}
}

// TestRawMembersAreVerbatim holds a payload to its bytes: neither spaces nor escapes nor the form
// of a number change on the way through Parse and DecodeMessage.
func TestRawMembersAreVerbatim(t *testing.T) {
	const payload = `{ "b" : "\u0041\/<&\u2028", "a":[1.0e5, -0 ,123456789012345678901234567890] }`
	document := sign(`{"context":"c"}`, payload)
	_, r, err := wire.Parse([]byte(document), 100)
	if s, is := r.(*wire.Sign); err != nil || !is || string(s.Payload) != payload {
		t.Errorf("a sign request: %+v, %v", r, err)
	}
	item := strings.Replace(document, `"id":"1",`, "", 1)
	_, r, err = wire.Parse([]byte(`{"id":"1","op":"batch","items":[ `+item+` ]}`), 100)
	if b, is := r.(*wire.Batch); err != nil || !is || string(b.Items[0].(*wire.Sign).Payload) != payload {
		t.Errorf("an item of a batch: %+v, %v", r, err)
	}
	_, e, err := wire.DecodeMessage([]byte(event(`{"key":"payments"}`, payload)))
	if rotation, is := e.(*wire.Rotation); err != nil || !is || string(rotation.Succession.Payload) != payload {
		t.Errorf("a step: %+v, %v", e, err)
	}
	a, err := wire.DecodeAnswer([]byte(`{"id":"1","result":` + payload + `}`))
	if err != nil || string(a.Result) != payload {
		t.Errorf("a result: %+v, %v", a, err)
	}
}

func TestParseRefuses(t *testing.T) {
	deep := strings.Repeat("[", 20) + strings.Repeat("]", 20)
	for name, c := range map[string]struct{ doc, id, code string }{
		"empty":                  {"", "", "malformed"},
		"not JSON":               {"hello", "", "malformed"},
		"an array":               {"[]", "", "malformed"},
		"cut short":              {sign()[:60], "", "malformed"},
		"two documents":          {sign() + sign(), "", "malformed"},
		"trailing byte":          {sign() + "x", "", "malformed"},
		"duplicate field":        {sign(`"id":"1"`, `"id":"1","id":"1"`), "", "malformed"},
		"duplicate in payload":   {sign(`"context":"c"`, `"context":"c","context":"c"`), "", "malformed"},
		"duplicate by escape":    {sign(`"id":"1"`, `"id":"1","\u0069d":"1"`), "", "malformed"},
		"invalid UTF-8":          {sign("payments", "pay\xff"), "", "malformed"},
		"lone surrogate":         {sign("payments", `\ud800`), "", "malformed"},
		"noncharacter":           {sign("payments", "\ufffe"), "", "malformed"},
		"escaped noncharacter":   {sign("payments", `\ufdd0`), "", "malformed"},
		"too deep":               {sign(`"c"`, deep), "", "malformed"},
		"too long":               {sign(`"c"`, `"`+strings.Repeat("c", 65535)+`"`), "", "malformed"},
		"no id":                  {sign(`"id":"1",`, ""), "", "malformed"},
		"id null":                {sign(`"id":"1"`, `"id":null`), "", "malformed"},
		"id a number":            {sign(`"id":"1"`, `"id":1`), "", "malformed"},
		"id empty":               {sign(`"id":"1"`, `"id":""`), "", "malformed"},
		"id too long":            {sign(`"id":"1"`, `"id":"`+strings.Repeat("i", 65)+`"`), "", "malformed"},
		"no op":                  {`{"id":"1"}`, "1", "malformed"},
		"op null":                {`{"id":"1","op":null}`, "1", "malformed"},
		"op empty":               {`{"id":"1","op":""}`, "1", "unsupported"},
		"unknown op":             {`{"id":"1","op":"destroy"}`, "1", "unsupported"},
		"unknown field":          {sign(`"key"`, `"extra":1,"key"`), "1", "malformed"},
		"field in other case":    {sign(`"key"`, `"Key"`), "1", "malformed"},
		"field of another op":    {`{"id":"1","op":"ping","key":"payments"}`, "1", "malformed"},
		"missing field":          {sign(`"key":"payments",`, ""), "1", "malformed"},
		"null field":             {sign(`"payments"`, `null`), "1", "malformed"},
		"null payload":           {sign(`{"context":"c"}`, `null`), "1", "malformed"},
		"wrong type":             {sign(`"payments"`, `7`), "1", "malformed"},
		"nonce too short":        {sign(nonce, nonce[:42]), "1", "malformed"},
		"nonce too long":         {sign(nonce, nonce+"A"), "1", "malformed"},
		"nonce padded":           {sign(nonce, nonce+"="), "1", "malformed"},
		"nonce in base64":        {sign(nonce, "+"+nonce[1:]), "1", "malformed"},
		"nonce, spare bits":      {sign(nonce, nonce[:42]+"p"), "1", "malformed"},
		"nonce with a line feed": {sign(nonce, nonce[:42]+`\n`+nonce[42:]), "1", "malformed"},
		"nonce a number":         {sign(`"`+nonce+`"`, "1"), "1", "malformed"},
		"time as text":           {sign(`:1,"exp`, `:"1","exp`), "1", "malformed"},
		"time a fraction":        {sign(`:1,"exp`, `:1.5,"exp`), "1", "malformed"},
		"time with exponent":     {sign(`:1,"exp`, `:1e3,"exp`), "1", "malformed"},
		"time huge":              {sign(`:1,"exp`, `:99999999999999999999999999,"exp`), "1", "malformed"},
		"time infinite":          {sign(`:1,"exp`, `:1e999999,"exp`), "1", "malformed"},
		"time NaN":               {sign(`:1,"exp`, `:NaN,"exp`), "", "malformed"},
	} {
		id, r, err := wire.Parse([]byte(c.doc), 100)
		var refusal *wire.Error
		if !errors.As(err, &refusal) || r != nil {
			t.Errorf("%s: accepted (%v)", name, err)
			continue
		}
		if refusal.Code != c.code || id != c.id {
			t.Errorf("%s: id %q, %v; want id %q, code %s", name, id, refusal, c.id, c.code)
		}
		message := refusal.Message
		if len(message) > 300 || strings.Contains(message, "wire.") || strings.Contains(message, "Go ") {
			t.Errorf("%s: message %q", name, message)
		}
		// The refusal must itself be a valid answer.
		if _, err := wire.DecodeAnswer(wire.EncodeAnswer(id, "abcdefgh23456723", nil, refusal)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAnswers(t *testing.T) {
	b := wire.EncodeAnswer("7", "", wire.Verified{Valid: true, Event: 12345}, nil)
	if string(b) != `{"id":"7","result":{"valid":true,"event":12345}}` {
		t.Errorf("%s", b)
	}
	b = wire.EncodeAnswer("7", "", nil, &wire.Error{Code: wire.CodeReplay, Message: "the nonce is spent"})
	if string(b) != `{"id":"7","error":{"code":"replay","message":"the nonce is spent"}}` {
		t.Errorf("%s", b)
	}
	a, err := wire.DecodeAnswer(b)
	var v wire.Verified
	if err != nil || a.Into(&v).Error() != "replay: the nonce is spent" {
		t.Errorf("%v, %v", a, err)
	}
	var list wire.KeyList
	for i := range 2000 {
		list.Keys = append(list.Keys, wire.Key{Name: fmt.Sprint("key", i)})
	}
	a, err = wire.DecodeAnswer(wire.EncodeAnswer("7", "", list, nil))
	if err != nil || a.Error == nil || a.Error.Code != wire.CodeTooLarge {
		t.Errorf("an answer that does not fit: %v, %v", a, err)
	}
	for _, bad := range []string{
		`{}`, `[]`, ``, `{"id":"1"}`, `{"id":"1","result":{},"x":1}`,
		`{"id":"1","result":{},"error":{"code":"x","message":"y"}}`,
	} {
		if a, err := wire.DecodeAnswer([]byte(bad)); err == nil {
			t.Errorf("%s: accepted as %v", bad, a)
		}
	}
	a, err = wire.DecodeAnswer([]byte(`{"id":"1","result":{"valid":true,"event":1,"more":2}}`))
	if err != nil || a.Into(&v) == nil {
		t.Error("an unknown field in a result is accepted")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(sign()))
	f.Add([]byte(`{"id":"1","op":"ping"}`))
	f.Add([]byte(`{"id":"1","op":"verify","signature":"AA"}`))
	f.Add([]byte(`{"id":"1","op":"line","key":"payments","from":1}`))
	f.Add([]byte(`{"id":"1","op":"rotation.ack","key":"noise","version":2}`))
	item := strings.Replace(sign(), `"id":"1",`, "", 1)
	f.Add([]byte(`{"id":"1","op":"batch","items":[{"op":"sign","key":"k"},` + item + `,7,{"op":"ping"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, r, err := wire.Parse(b, 100)
		if (r == nil) == (err == nil) {
			t.Fatalf("request %v, error %v", r, err)
		}
		if line, is := r.(*wire.Line); is && line.From == 0 {
			t.Fatal("a line from before its first version")
		}
		if ack, is := r.(*wire.Ack); is && ack.Version == 0 {
			t.Fatal("version 0 is acknowledged")
		}
		var refusal *wire.Error
		if err != nil && !errors.As(err, &refusal) {
			t.Fatalf("%T is not a refusal", err)
		}
		if _, err := wire.DecodeAnswer(wire.EncodeAnswer(id, "", wire.Pong{}, refusal)); err != nil {
			t.Fatal(err)
		}
	})
}
