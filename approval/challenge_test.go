package approval

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func sampleChallenge(purpose string) *Challenge {
	c := &Challenge{
		Purpose: purpose, Appliance: "countersign/0011223344556677", Operator: "anna", Channel: ChannelUnix,
		Expires: time.Date(2026, 11, 24, 8, 2, 0, 0, time.UTC), Nonce: "000102030405060708090a0b0c0d0e0f",
	}
	if purpose == ForPresence {
		c.Key = "payments"
	}
	return c
}

// TestChallengeHasOneText changes, adds and removes bytes and lines of a text. ParseChallenge must
// refuse the result, or the result must be the canonical text of another challenge.
func TestChallengeHasOneText(t *testing.T) {
	for _, purpose := range []string{ForSignIn, ForPresence} {
		c := sampleChallenge(purpose)
		text := c.Text()
		if again, err := ParseChallenge(text); err != nil || *again != *c {
			t.Errorf("%q is read as %+v: %v", text, again, err)
		}
		try := func(changed string) {
			again, err := ParseChallenge(changed)
			if err == nil && again.Text() != changed {
				t.Errorf("%q is read as %q", changed, again.Text())
			} else if err != nil && !errors.Is(err, ErrInvalid) {
				t.Errorf("%q: %v", changed, err)
			}
		}
		for i := range text {
			try(text[:i] + text[i+1:])
			for _, piece := range []string{" ", "\n", "\r", "\t", ":", "0", "a", "\x00", "\xff", "nonce: 0\n"} {
				try(text[:i] + piece + text[i:])
				try(text[:i] + piece + text[i+1:])
			}
		}
		lines := strings.SplitAfter(text, "\n")
		for i, l := range lines[:len(lines)-1] {
			without := strings.Join(lines[:i], "") + strings.Join(lines[i+1:], "")
			twice := strings.Join(lines[:i+1], "") + l + strings.Join(lines[i+1:], "")
			for _, changed := range []string{without, twice} {
				if c, err := ParseChallenge(changed); err == nil {
					t.Errorf("%q is read as %+v", changed, c)
				}
			}
		}
	}
	for _, purpose := range []string{ForProposal, "", "countersign-sign-in-v2"} {
		c := sampleChallenge(ForSignIn)
		c.Purpose = purpose
		if _, err := ParseChallenge(c.Text()); err == nil {
			t.Errorf("a challenge for %q is read", purpose)
		}
	}
	if _, err := ParseChallenge(sampleProposal().Text()); err == nil {
		t.Error("a proposal is read as a challenge")
	}
}

// TestChallengeMustMatch changes each field that a signer wants, and the time.
func TestChallengeMustMatch(t *testing.T) {
	c := sampleChallenge(ForPresence)
	now := c.Expires.Add(-ChallengeLife)
	want := Challenge{
		Purpose: ForPresence, Appliance: c.Appliance, Operator: "anna", Key: "payments", Channel: ChannelUnix,
	}
	if err := c.Matches(want, now); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Challenge){
		"purpose":   func(w *Challenge) { w.Purpose = ForSignIn },
		"appliance": func(w *Challenge) { w.Appliance = "countersign/8899aabbccddeeff" },
		"operator":  func(w *Challenge) { w.Operator = "bert" },
		"key":       func(w *Challenge) { w.Key = "invoices" },
		"channel":   func(w *Challenge) { w.Channel = ChannelHTTPS },
	} {
		other := want
		change(&other)
		if err := c.Matches(other, now); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("another %s: %v", name, err)
		}
	}
	want.Appliance = "" // unknown before the first use
	if err := c.Matches(want, now); err != nil {
		t.Error(err)
	}
	for _, off := range []time.Duration{-maxSkew - time.Second, ChallengeLife + maxSkew + time.Second} {
		if err := c.Matches(want, now.Add(off)); err == nil {
			t.Errorf("a challenge is signed %v after it was made", off)
		}
	}
}
