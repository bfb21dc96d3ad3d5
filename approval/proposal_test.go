package approval

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

func sampleProposal() *Proposal {
	return &Proposal{
		ID: 7, Appliance: "countersign/0011223344556677",
		Act: "key destroy", Parameters: []Parameter{{"key", "payments"}, {"version", "1"}},
		Proposer: "anna", Proposed: time.Date(2026, 11, 24, 8, 0, 0, 0, time.UTC),
		Expires: time.Date(2026, 11, 25, 8, 0, 0, 0, time.UTC), Needed: 2, Nonce: "000102030405060708090a0b0c0d0e0f",
	}
}

func TestProposalText(t *testing.T) {
	p := sampleProposal()
	const want = "countersign-proposal-v1\nappliance: countersign/0011223344556677\nproposal: 7\nact: key destroy\n" +
		"  key: payments\n  version: 1\n" +
		"proposed by: anna\nproposed at: 2026-11-24T08:00:00Z\nexpires at: 2026-11-25T08:00:00Z\n" +
		"approvals needed: 2\nnonce: 000102030405060708090a0b0c0d0e0f\n"
	if p.Text() != want {
		t.Errorf("%s", p.Text())
	}
	p.Expires = p.Expires.In(time.FixedZone("", 3600))
	if p.Text() != want {
		t.Errorf("%s", p.Text())
	}
	again, err := ParseText(want)
	if err != nil || again.Text() != want || again.Digest() != p.Digest() ||
		again.Parameter("version") != "1" || again.Parameter("x") != "" {
		t.Errorf("%+v, %v", again, err)
	}
	// A value that looks like another line stays a value.
	p.Parameters = []Parameter{{"reason", "approvals needed: 1"}, {"name", "act: peer add"}, {"x", "  y: z"[2:]}}
	if again, err := ParseText(p.Text()); err != nil || again.Needed != 2 || again.Act != "key destroy" ||
		again.Parameter("reason") != "approvals needed: 1" || again.Parameter("x") != "y: z" {
		t.Errorf("%+v, %v", again, err)
	}
}

// TestParseTextTakesOneForm changes, adds and removes bytes of a text. ParseText must refuse the
// result, or the result must be the canonical text of another proposal.
func TestParseTextTakesOneForm(t *testing.T) {
	text := sampleProposal().Text()
	try := func(b []byte) {
		if p, err := ParseText(string(b)); err == nil && p.Text() != string(b) {
			t.Errorf("%q is read as %q", b, p.Text())
		} else if err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", b, err)
		}
	}
	for i := range text {
		for _, c := range []byte(" \n\r\t:0a\x00\xff") {
			b := []byte(text)
			b[i] = c
			try(b)
			try(bytes.Join([][]byte{[]byte(text[:i]), []byte(text[i:])}, []byte{c}))
		}
		try([]byte(text[:i] + text[i+1:]))
		if _, err := ParseText(text[:i]); err == nil {
			t.Errorf("%q is read", text[:i])
		}
	}
	line := func(old, new string) string { return strings.Replace(text, old, new, 1) }
	for name, text := range map[string]string{
		"nothing":         "",
		"no line end":     strings.TrimSuffix(text, "\n"),
		"two":             text + "\n",
		"CRLF":            strings.ReplaceAll(text, "\n", "\r\n"),
		"another purpose": line(ForProposal, ForSignIn),
		"a line twice":    line("act: key destroy\n", "act: key destroy\nact: key destroy\n"),
		"an unknown line": line("nonce", "note: x\nnonce"),
		"another order": line("appliance: countersign/0011223344556677\nproposal: 7\n",
			"proposal: 7\nappliance: countersign/0011223344556677\n"),
		"a parameter elsewhere":  line("nonce", "  x: y\nnonce"),
		"indented further":       line("  key", "    key"),
		"not indented":           line("  key", "key"),
		"a parameter twice":      line("  version: 1\n", "  version: 1\n  version: 2\n"),
		"parameter without name": line("  version", "  "),
		"+7":                     line("proposal: 7", "proposal: +7"),
		"07":                     line("proposal: 7", "proposal: 07"),
		"number 0":               line("proposal: 7", "proposal: 0"),
		"too large":              line("proposal: 7", "proposal: 18446744073709551616"),
		"no approval":            line("needed: 2", "needed: 0"),
		"-1 approvals":           line("needed: 2", "needed: -1"),
		"another zone":           line("2026-11-25T08:00:00Z", "2026-11-25T09:00:00+01:00"),
		"fractions":              line("2026-11-25T08:00:00Z", "2026-11-25T08:00:00.5Z"),
		"ends before it begins":  line("2026-11-25", "2026-11-23"),
		"lives too long":         line("2026-11-25", "2026-12-25"),
		"large hex":              line("0a0b0c", "0A0B0C"),
		"a short nonce":          line("000102", "0001"),
		"act with hidden text":   line("key destroy", "key destroy\u202e"),
		"hidden text":            line("payments", "pay\u200bments"),
		"a blank letter":         line("payments", "pay\u3164ments"),
		"a blank of Braille":     line("payments", "payments\u2800"),
		"a variation":            line("payments", "payments\ufe0f"),
		"a space at the end":     line("payments", "payments "),
		"a control character":    line("payments", "pay\x1bments"),
		"C1":                     line("payments", "pay\u0085ments"),
		"a line separator":       line("payments", "pay\u2028ments"),
		"not UTF-8":              line("payments", "pay\xffments"),
		"no value":               line("payments", ""),
		"a long value":           line("payments", strings.Repeat("x", 1001)),
		"too long":               line("  key: payments\n", strings.Repeat("  k: v\n", 300)),
		"long, none twice":       line("payments\n", strings.Repeat("x", 999)+"\n  y: "+strings.Repeat("y", 900)+"\n"),
	} {
		if p, err := ParseText(text); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
	if p, err := ParseText(line("payments", strings.Repeat("x", 1000))); err != nil {
		t.Errorf("%+v, %v", p, err)
	}
}

// TestProposalCheck checks that ParseText gives back each proposal that Check accepts.
func TestProposalCheck(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*Proposal)
		good   bool
	}{
		"as it is":                {func(*Proposal) {}, true},
		"no parameters":           {func(p *Proposal) { p.Parameters = nil }, true},
		"a line in a value":       {func(p *Proposal) { p.Parameters[0].Value = "payments\n  version: 2" }, false},
		"a line in a name":        {func(p *Proposal) { p.Parameters[0].Name = "key: x\n  version" }, false},
		"an indented name":        {func(p *Proposal) { p.Parameters[0].Name = "  key" }, false},
		"a name with a colon":     {func(p *Proposal) { p.Parameters[0].Name = "key: x" }, false},
		"a line in the act":       {func(p *Proposal) { p.Act = "key destroy\n  key: x" }, false},
		"an act with a colon":     {func(p *Proposal) { p.Act = "key: destroy" }, false},
		"a line in the proposer":  {func(p *Proposal) { p.Proposer = "anna\nproposed by: bert" }, false},
		"a line in the appliance": {func(p *Proposal) { p.Appliance = "a\nproposal: 8" }, false},
		"no appliance":            {func(p *Proposal) { p.Appliance = "" }, false},
		"a name twice":            {func(p *Proposal) { p.Parameters[1].Name = "key" }, false},
		"half a second":           {func(p *Proposal) { p.Expires = p.Expires.Add(time.Second / 2) }, false},
		"a week":                  {func(p *Proposal) { p.Expires = p.Proposed.Add(MaxLife) }, true},
		"more than a week":        {func(p *Proposal) { p.Expires = p.Proposed.Add(MaxLife + time.Second) }, false},
		"no time":                 {func(p *Proposal) { p.Expires = p.Proposed }, false},
		"after the year 9999": {func(p *Proposal) {
			p.Proposed, p.Expires = p.Proposed.AddDate(9000, 0, 0), p.Expires.AddDate(9000, 0, 0)
		}, false},
		"a credential as value": {func(p *Proposal) { p.Parameters[0].Value = credentialJSON(t) }, true},
		"the longest passkey's": {func(p *Proposal) { p.Parameters[0].Value = passkeyJSON(t) }, true},
		"longer than a text": {func(p *Proposal) {
			p.Parameters[0].Value, p.Parameters[1].Value = strings.Repeat("x", 999), strings.Repeat("x", 999)
		}, false},
		"text of other scripts":    {func(p *Proposal) { p.Parameters[0].Value = "Schlüssel – ключ 鍵" }, true},
		"writing in the other way": {func(p *Proposal) { p.Parameters[0].Value = "a\u202eb" }, false},
	} {
		p := sampleProposal()
		test.change(p)
		if err := p.Check(); (err == nil) != test.good || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		} else if again, parsed := ParseText(p.Text()); err == nil && (parsed != nil || again.Text() != p.Text()) {
			t.Errorf("%s: %+v, %v", name, again, parsed)
		}
	}
}

func credentialJSON(t *testing.T) string {
	_, c := ed25519Person(t, 1)
	return string(must(json.Marshal(c)))
}

// passkeyJSON is the longest possible credential: a passkey with an id of 255 bytes, for a host
// with a name of 253 bytes.
func passkeyJSON(t *testing.T) string {
	a := newAuthenticator(t, "ES256")
	a.id = make([]byte, maxCredentialID)
	c := a.enrol(t)
	c.RPID = strings.Repeat("a", 253)
	if c.Check() != nil {
		t.Error(c.Check())
	}
	return string(must(json.Marshal(c)))
}

// FuzzParseText checks that ParseText accepts canonical texts only.
func FuzzParseText(f *testing.F) {
	f.Add(sampleProposal().Text())
	f.Add(strings.Replace(sampleProposal().Text(), "payments", "  x: y", 1))
	f.Add(strings.Replace(sampleProposal().Text(), "Z", "+00:00", 1))
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParseText(text)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if p.Text() != text || p.Check() != nil || len(text) > MaxText {
			t.Fatalf("%q: %+v, %v", text, p, p.Check())
		}
		// An independent parser: each line is one field, and the fields are those of the proposal.
		lines := strings.Split(text, "\n")
		if len(lines) != 10+len(p.Parameters) || lines[3] != "act: "+p.Act {
			t.Fatalf("%q: %+v", text, p)
		}
		for i, each := range p.Parameters {
			if lines[4+i] != "  "+each.Name+": "+each.Value {
				t.Fatalf("%q: %+v", text, p)
			}
		}
	})
}
