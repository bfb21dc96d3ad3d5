package countersign_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"testing"

	"countersign/approval"
	"countersign/audit"
	"countersign/client"
	"countersign/internal/eddsa"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/transcript"
	"countersign/wire"

	"github.com/go-json-experiment/json/jsontext"
)

// blocks returns the fenced blocks of docs/SPEC.md with an info string of "json" and a name.
func blocks(t *testing.T) (found []struct{ name, text string }) {
	t.Helper()
	parts := strings.Split(read(t, "docs/SPEC.md"), "```")
	for i := 1; i < len(parts); i += 2 {
		info, text, _ := strings.Cut(parts[i], "\n")
		if name, ok := strings.CutPrefix(info, "json "); ok {
			found = append(found, struct{ name, text string }{name, strings.TrimSpace(text)})
		}
	}
	return found
}

// TestSpecExamples reads every example of the specification.
func TestSpecExamples(t *testing.T) {
	seen := map[string]int{}
	for _, b := range blocks(t) {
		kind, code, _ := strings.Cut(b.name, " ")
		seen[kind]++
		switch kind {
		case "request":
			_, r, err := wire.Parse([]byte(b.text), 100)
			if err != nil {
				t.Errorf("%s\n%v", b.text, err)
			}
			if batch, is := r.(*wire.Batch); is {
				for _, item := range batch.Items {
					if refusal, bad := item.(*wire.Error); bad {
						t.Errorf("%s\n%v", b.text, refusal)
					}
				}
			}
		case "refused":
			var refusal *wire.Error
			if _, _, err := wire.Parse([]byte(b.text), 100); !errors.As(err, &refusal) || refusal.Code != code {
				t.Errorf("%s\n%v, want %s", b.text, err, code)
			}
		case "answer":
			checkAnswer(t, b.text)
		case "event":
			checkEvent(t, b.text)
		case "line":
			checkLine(t, b.text)
		case "recovered":
			checkRecovered(t, b.text)
		case "proof":
			checkProof(t, b.text, code)
		case "vector":
			checkVector(t, b.text)
		case "approval":
			checkApproval(t, b.text)
		case "noise", "noise-pubky": // a test of package noise has the checks
		default:
			t.Errorf("a block named %q", b.name)
		}
	}
	for kind, least := range map[string]int{
		"request": 8, "refused": 3, "answer": 9, "event": 2, "line": 1, "recovered": 1, "proof": 1, "vector": 12,
		"noise": 1, "noise-pubky": 1, "approval": 4,
	} {
		if seen[kind] < least {
			t.Errorf("%d blocks of kind %q, expected at least %d", seen[kind], kind, least)
		}
	}
}

func checkAnswer(t *testing.T, text string) {
	t.Helper()
	a, err := wire.DecodeAnswer([]byte(text))
	if err != nil {
		t.Errorf("%s\n%v", text, err)
		return
	}
	if a.Error != nil {
		return
	}
	for _, result := range []any{
		new(wire.Pong), new(wire.KeyList), new(wire.Signed), new(wire.Verified), new(wire.Answers),
		new(wire.Acknowledged), new(wire.Steps), new(wire.Consistent),
	} {
		if a.Into(result) == nil {
			return
		}
	}
	t.Errorf("%s\nno operation has this answer", text)
}

// checkEvent decodes an event and verifies the authorization or succession in the event.
func checkEvent(t *testing.T, text string) {
	t.Helper()
	_, event, err := wire.DecodeMessage([]byte(text))
	if _, is := event.(*wire.Compromise); is && err == nil {
		return
	}
	r, is := event.(*wire.Rotation)
	if err != nil || !is {
		t.Errorf("%s\n%v", text, err)
		return
	}
	if r.Key == wire.NoiseKey {
		doc, err := transcript.Parse(transcript.Request{
			Type: "paykit-noise-key-authorization-v1", Payload: r.Authorization.Payload, ExpiresAt: 1,
		})
		if err != nil {
			t.Fatal(err)
		}
		key, _, err := client.AuthorizedServerKey([32]byte(doc.Signers[0]), *r.Authorization, *doc.Generation)
		if err != nil || key != r.PublicKey {
			t.Errorf("%s\n%v", text, err)
		}
		return
	}
	if r.Succession == nil && r.Version == 1 && r.Cancelled == 2 { // the step to version 2 is called off
		return
	}
	doc, err := transcript.Parse(transcript.Request{
		Type: "key-succession-v1", Payload: r.Succession.Payload, Nonce: r.Succession.Nonce,
		Timestamp: r.Succession.Timestamp, ExpiresAt: r.Succession.ExpiresAt,
	})
	if err != nil {
		t.Fatal(err)
	}
	before := client.KeyLine{Key: r.Key, Version: r.Version - 1, PublicKey: doc.Succession.Old}
	if l, err := before.Follow(*r.Succession); err != nil || l.PublicKey != r.PublicKey || l.Version != r.Version {
		t.Errorf("%s\n%+v, %v", text, l, err)
	}
}

// followLine follows the line of a block from the first version to the newest, and returns
// the first version, the steps and the forged part.
func followLine[F any](t *testing.T, text string) (first client.KeyLine, steps []wire.Succession, forged F) {
	t.Helper()
	var d struct {
		First  jsontext.Value    `json:"first"`
		Steps  []wire.Succession `json:"steps"`
		Newest jsontext.Value    `json:"newest"`
		Forged F                 `json:"forged"`
	}
	if err := ijson.Decode([]byte(text), &d, "first", "steps", "newest", "forged"); err != nil {
		t.Fatal(err)
	}
	first, err := client.DecodeKeyLine(d.First)
	if err != nil {
		t.Fatal(err)
	}
	newest, err := client.DecodeKeyLine(d.Newest)
	if err != nil {
		t.Fatal(err)
	}
	if l, err := client.VerifyKeyLine(first, d.Steps); err != nil || l != newest {
		t.Errorf("%+v, %v", l, err)
	}
	return first, d.Steps, d.Forged
}

// refusesStep fails unless the commitment of the line refuses the forged step.
func refusesStep(t *testing.T, l client.KeyLine, forged wire.Succession) {
	t.Helper()
	next, err := l.Follow(forged)
	if !errors.Is(err, client.ErrBrokenLine) || !strings.Contains(err.Error(), "committed") {
		t.Errorf("the forged step leads to %+v, %v", next, err)
	}
}

// checkLine follows a line of versions from the first to the newest. A forged step, signed by a
// stolen key, must fail.
func checkLine(t *testing.T, text string) {
	t.Helper()
	first, steps, forged := followLine[wire.Succession](t, text)
	if len(steps) < 2 {
		t.Errorf("%d steps", len(steps))
	}
	refusesStep(t, first, forged)
	first.Next = [32]byte{} // without the commitment, the forged step is valid
	if _, err := first.Follow(forged); err != nil {
		t.Error(err)
	}
}

// checkRecovered follows a line to its recovery successor. The steps of a thief must fail at the
// last one.
func checkRecovered(t *testing.T, text string) {
	t.Helper()
	first, _, forged := followLine[[]wire.Succession](t, text)
	last := len(forged) - 1
	l, err := first.Follow(forged[:last]...)
	if err != nil {
		t.Fatal(err)
	}
	refusesStep(t, l, forged[last])
	l.Recovery = l.NewRecovery // with the thief's commitment, the step is valid
	if _, err := l.Follow(forged[last]); err != nil {
		t.Error(err)
	}
}

// checkProof verifies an inclusion proof. The block's info string has the log's verifier key.
func checkProof(t *testing.T, text, vkey string) {
	t.Helper()
	log, err := audit.ParseVerifierKey(vkey)
	if err != nil {
		t.Fatal(err)
	}
	a, err := wire.DecodeAnswer([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	var p wire.Proven
	if err := a.Into(&p); err != nil {
		t.Fatal(err)
	}
	proof := audit.Proof{Event: p.Event, Index: p.Index, Leaf: p.Leaf, Checkpoint: []byte(p.Checkpoint)}
	for _, h := range p.Path {
		proof.Path = append(proof.Path, audit.Hash(h))
	}
	if e, c, err := log.Check(proof); err != nil || e.Type != audit.SignatureAdmitted || c.Epoch != p.Epoch {
		t.Errorf("%+v, %+v, %v", e, c, err)
	}
}

func checkApproval(t *testing.T, text string) {
	t.Helper()
	var d struct {
		Credential approval.Credential `json:"credential"`
		Text       string              `json:"text"`
		Proof      approval.Proof      `json:"proof"`
	}
	if err := ijson.Decode([]byte(text), &d); err != nil {
		t.Fatal(err)
	}
	purpose, _, _ := strings.Cut(d.Text, "\n")
	if err := d.Credential.Check(); err != nil {
		t.Errorf("%s\n%v", text, err)
	}
	if _, err := d.Credential.Verify(purpose, d.Text, d.Proof); err != nil {
		t.Errorf("%s\n%v", text, err)
	}
	if _, err := approval.ParseText(d.Text); (err == nil) != (purpose == approval.ForProposal) {
		t.Errorf("%s\n%v", text, err)
	}
}

func checkVector(t *testing.T, text string) {
	t.Helper()
	var d struct {
		wire.Document
		Canonical string       `json:"canonical"`
		Message   string       `json:"message"`
		PublicKey wire.Bytes32 `json:"public_key"`
		Signature wire.Bytes   `json:"signature"`
	}
	if err := ijson.Decode([]byte(text), &d); err != nil {
		t.Fatal(err)
	}
	doc, err := transcript.Parse(transcript.Request{
		Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt,
	})
	if err != nil {
		t.Errorf("%s\n%v", text, err)
		return
	}
	if hex.EncodeToString(doc.Canonical) != d.Canonical || hex.EncodeToString(doc.Message) != d.Message {
		t.Errorf("%s: canonical %x, message %x", d.Type, doc.Canonical, doc.Message)
	}
	if err := eddsa.Verify(d.PublicKey[:], doc.Message, d.Signature); err != nil {
		t.Errorf("%s: %v", d.Type, err)
	}
}

// TestKeyNames compares the key names of key-succession-v1 with the key names of the keystore: both
// must accept and refuse the same names.
func TestKeyNames(t *testing.T) {
	const (
		oldKey = "d04ab232742bb4ab3a1368bd4615e4e6d0224ab71a016baf8520a332c9778737"
		newKey = "a09aa5f47a6759802ff955f8dc2d2a14a5c99d23be97f864127ff9383455a4f0"
	)
	for _, name := range []string{
		"", "a", "-", "a-", "-a", "0", "payments-2", "A", "a.b", "a/1", "a b", "a\u00e9", "a_b",
		strings.Repeat("k", 64), strings.Repeat("k", 65),
	} {
		payload := fmt.Sprintf(`{"key":%q,"version":2,"old_public_key":"%s","new_public_key":"%s","time":0}`,
			name, oldKey, newKey)
		_, err := transcript.Parse(transcript.Request{
			Type: "key-succession-v1", Payload: []byte(payload), ExpiresAt: 1,
		})
		if (err == nil) != (keystore.CheckName(name) == nil) {
			t.Errorf("%q: the transcript says %v, the keystore %v", name, err, keystore.CheckName(name))
		}
	}
}

// TestCodes compares the codes of package wire, the errors of package client, and the table of
// docs/SPEC.md: each code has one error and one row.
func TestCodes(t *testing.T) {
	codes := map[string]string{} // by constant
	constants := regexp.MustCompile(`(?m)^\t(Code\w+)\s+= "(\w+)"`)
	for _, m := range constants.FindAllStringSubmatch(read(t, "wire/wire.go"), -1) {
		codes[m[1]] = m[2]
	}
	errorsOf := map[string]string{} // by code
	refusals := regexp.MustCompile(`(?m)^\t(Err\w+)\s+= refusal\(wire\.(Code\w+)\)`)
	for _, m := range refusals.FindAllStringSubmatch(read(t, "client/errors.go"), -1) {
		if m[1] != "Err"+strings.TrimPrefix(m[2], "Code") {
			t.Errorf("%s is the error of %s", m[1], m[2])
		}
		errorsOf[codes[m[2]]] = m[1]
	}
	rows := map[string]string{}
	_, table, _ := strings.Cut(read(t, "docs/SPEC.md"), "\n### Codes\n")
	table, _, _ = strings.Cut(table, "\n## ")
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\| `(\\w+)` \\|").FindAllStringSubmatch(table, -1) {
		rows[m[1]] = m[2]
	}
	if len(codes) < 17 || len(errorsOf) != len(codes) || !maps.Equal(rows, errorsOf) {
		t.Errorf("%d codes; the errors are %v; the table has %v", len(codes), errorsOf, rows)
	}
}

// TestSpecNamesEveryType looks in docs/SPEC.md for every document type and event type.
func TestSpecNamesEveryType(t *testing.T) {
	spec := read(t, "docs/SPEC.md")
	for _, typ := range transcript.Types() {
		if !strings.Contains(spec, "### "+typ.Name+"\n") {
			t.Errorf("%s is not in docs/SPEC.md", typ.Name)
		}
	}
	for _, event := range audit.Types() {
		if !strings.Contains(spec, "`"+string(event)+"`") {
			t.Errorf("%s is not in docs/SPEC.md", event)
		}
	}
}
