package approval

import (
	"fmt"
	"strings"
	"time"
)

// Challenge is a statement of identity that an operator signs once: for a sign-in, or for a
// presence. Operators sign the challenge's Text. ParseChallenge is the one reader of such a text,
// in the appliance and in the tool of the operator.
type Challenge struct {
	Purpose   string // ForSignIn or ForPresence
	Appliance string // the name of its audit log: a proof is valid at one appliance only
	Operator  string
	Key       string    // ForPresence: the key that may sign; otherwise ""
	Channel   string    // ChannelUnix or ChannelHTTPS
	Expires   time.Time // whole seconds
	Nonce     string    // 32 hex digits
}

// The kinds of channels between an operator and an appliance.
const (
	ChannelUnix  = "unix"
	ChannelHTTPS = "https"
)

// ChallengeLife is the time from a challenge to its expiry.
const ChallengeLife = 2 * time.Minute

// Text returns the canonical form of a challenge, with lines as in the text of a proposal.
func (c *Challenge) Text() string {
	var b strings.Builder
	line := func(name, value string) { fmt.Fprintf(&b, "%s: %s\n", name, value) }
	b.WriteString(c.Purpose + "\n")
	line("appliance", c.Appliance)
	line("operator", c.Operator)
	if c.Key != "" {
		line("key", c.Key)
	}
	line("channel", c.Channel)
	line("expires at", c.Expires.UTC().Format(time.RFC3339))
	line("nonce", c.Nonce)
	return b.String()
}

// ParseChallenge parses a text that Text has written, and refuses every other text. The error wraps
// ErrInvalid.
func ParseChallenge(text string) (*Challenge, error) {
	bad := func(reason string) (*Challenge, error) {
		return nil, fmt.Errorf("challenge: %w: %s", ErrInvalid, reason)
	}
	purpose, rest, _ := strings.Cut(text, "\n")
	if len(text) > MaxText || purpose != ForSignIn && purpose != ForPresence {
		return bad("it is not the text of a sign-in or of a presence")
	}
	values := map[string]string{}
	for l := range strings.Lines(rest) {
		name, value, _ := strings.Cut(strings.TrimSuffix(l, "\n"), ": ")
		if checkValue(value) != nil {
			return bad("a line has no value")
		}
		values[name] = value
	}
	c := &Challenge{
		Purpose: purpose, Appliance: values["appliance"], Operator: values["operator"], Key: values["key"],
		Channel: values["channel"], Nonce: values["nonce"],
	}
	var err error
	c.Expires, err = time.Parse(time.RFC3339, values["expires at"])
	switch {
	case err != nil:
		return bad("the time has another form")
	case c.Appliance == "" || c.Operator == "" || (c.Key != "") != (purpose == ForPresence):
		return bad("a line is missing, or is for another purpose")
	case c.Channel != ChannelUnix && c.Channel != ChannelHTTPS:
		return bad("the channel is neither unix nor https")
	case !nonceForm.MatchString(c.Nonce):
		return bad("it has no nonce of 32 hex digits")
	case c.Text() != text: // another order of lines, a further line, or another form of the time
		return bad("its text is not in the canonical form")
	}
	return c, nil
}

// maxSkew is the permitted difference between the clocks of an operator's machine and of an
// appliance.
const maxSkew = 5 * time.Minute

// Matches reports why a challenge is not the one that its signer wants: another purpose, appliance,
// operator, key or channel, or another time than about now. want has neither Expires nor Nonce. A
// signer who does not know the name of the appliance leaves want.Appliance empty. Without this
// check, a relay gets the signer's session on another appliance.
func (c *Challenge) Matches(want Challenge, now time.Time) error {
	for _, each := range []struct{ name, got, want string }{
		{"purpose", c.Purpose, want.Purpose},
		{"appliance", c.Appliance, want.Appliance},
		{"operator", c.Operator, want.Operator},
		{"key", c.Key, want.Key},
		{"channel", c.Channel, want.Channel},
	} {
		if each.got != each.want && (each.name != "appliance" || each.want != "") {
			return fmt.Errorf("the challenge is for the %s %q, and not for %q", each.name, each.got, each.want)
		}
	}
	if left := c.Expires.Sub(now); left < -maxSkew || left > ChallengeLife+maxSkew {
		return fmt.Errorf("the challenge expires at %s, and it is %s here: set the clocks",
			c.Expires.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return nil
}
