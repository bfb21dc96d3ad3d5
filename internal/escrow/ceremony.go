package escrow

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/recipient"

	"filippo.io/age"
)

// A ceremony collects the shares of holders, who may be anywhere. The process of the ceremony makes
// an age key of its own, which is never written, and a request with the public key and the
// envelopes. Each holder's tool opens the holder's shares and encrypts them to that public key: the
// answer. An answer is of no use to anybody else, and to nobody after the end of the process.
//
// A holder must know that the request is that of the ceremony, or the shares go to a stranger. So
// the holder types the code of the request, as the people of the ceremony read it out.

// The purposes of a request.
const (
	ForDrill    = "drill"
	ForRecovery = "recovery"
)

// Request asks holders for their shares.
type Request struct {
	Format    int        `json:"format"`  // 1
	Purpose   string     `json:"purpose"` // ForDrill or ForRecovery
	Appliance string     `json:"appliance"`
	Machine   string     `json:"machine"` // host name of the ceremony
	MadeMS    int64      `json:"made_ms"` // Unix milliseconds
	Recipient string     `json:"recipient"`
	Keys      []Envelope `json:"keys"` // without their seeds
}

// Made is the time of the request.
func (r Request) Made() time.Time { return time.UnixMilli(r.MadeMS).UTC() }

// Answer has the shares of a holder for a request.
type Answer struct {
	Format  int    `json:"format"`  // 1
	Request string `json:"request"` // SHA-256 of the request, hexadecimal
	Shares  []byte `json:"shares"`  // age file for the recipient of the request: one share on each line
}

// Errors of requests and answers.
var (
	ErrRequest = errors.New("this is no request for shares")
	ErrCode    = errors.New("the code is that of another request: ask the people of the ceremony again, by a call")
	ErrNone    = errors.New("no share in the request is for this private key")
	ErrAnswer  = errors.New("this is no answer to the request")
	ErrTwice   = errors.New("the shares are there already")
)

// MaxFile is the most bytes of a request or an answer.
const MaxFile = 32 << 20

// Code returns the code of a request: four groups of four characters, 80 bits of SHA-256.
func Code(request []byte) string {
	sum := sha256.Sum256(request)
	text := strings.ToLower(base32.StdEncoding.EncodeToString(sum[:10]))
	return strings.Join([]string{text[:4], text[4:8], text[8:12], text[12:]}, "-")
}

// ParseRequest reads a request and checks its form.
func ParseRequest(b []byte) (r Request, err error) {
	if err := ijson.Decode(b, &r); err != nil {
		return r, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	fail := func(why string) (Request, error) { return r, fmt.Errorf("%w: %s", ErrRequest, why) }
	switch {
	case r.Format > format:
		return fail("it is of a newer version of countersign")
	case r.Format != format || r.Purpose != ForDrill && r.Purpose != ForRecovery || len(r.Keys) == 0:
		return fail("it has no purpose or no key")
	case !oneLine(r.Appliance) || !oneLine(r.Machine):
		return fail("a name in it is not one line of text")
	}
	if _, err := age.ParseX25519Recipient(r.Recipient); err != nil {
		return fail("it has no key for the answers")
	}
	seen := map[keystore.Ref]bool{}
	for _, e := range r.Keys {
		if err := e.check(); err != nil {
			return r, fmt.Errorf("%w: %w", ErrRequest, err)
		}
		if seen[e.Key] {
			return fail("a key is there twice")
		}
		seen[e.Key] = true
	}
	return r, nil
}

// oneLine reports that a text has 1 to 200 printable bytes of ASCII.
func oneLine(text string) bool {
	strange := func(c rune) bool { return c < ' ' || c > '~' }
	return text != "" && len(text) <= 200 && !strings.ContainsFunc(text, strange)
}

// Given says which shares an answer has.
type Given struct {
	Holders []string       // names of the holder: another set of holders may have another name
	Keys    []keystore.Ref // whose shares are in the answer
	Damaged []keystore.Ref // whose shares for the holder can't be opened; of Give
}

// Give opens a holder's shares and makes the answer. The holder has been shown the request, and has
// typed its code.
func Give(request []byte, code string, with []recipient.Identity) (answer []byte, g Given, err error) {
	r, err := ParseRequest(request)
	if err != nil {
		return nil, g, err
	}
	if !strings.EqualFold(strings.TrimSpace(code), Code(request)) {
		return nil, g, ErrCode
	}
	var lines strings.Builder
	for _, e := range r.Keys {
		for i, s := range e.Shares {
			line, err := decrypt(s.Sealed, 1000, with...)
			if no := new(age.NoIdentityMatchError); errors.As(err, &no) {
				continue
			} else if errors.Is(err, recipient.ErrIdentity) {
				return nil, g, err
			}
			if number, _, bad := e.number(string(line)); err != nil || bad != nil || number != i+1 {
				g.Damaged = append(g.Damaged, e.Key) // another holder may make up for it
				continue
			}
			lines.Write(line)
			g.add(s.Name, e.Key)
		}
	}
	if len(g.Keys) == 0 && len(g.Damaged) > 0 {
		return nil, g, fmt.Errorf("the share for %v: %w", g.Damaged[0], ErrShare)
	} else if len(g.Keys) == 0 {
		return nil, g, ErrNone
	}
	to, err := age.ParseX25519Recipient(r.Recipient)
	if err != nil {
		return nil, g, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	shares, err := encrypt(to, lines.String())
	if err != nil {
		return nil, g, err
	}
	answer, err = json.Marshal(Answer{format, Digest(request), shares})
	return answer, g, err
}

func (g *Given) add(holder string, key keystore.Ref) {
	if !slices.Contains(g.Holders, holder) {
		g.Holders = append(g.Holders, holder)
	}
	if !slices.Contains(g.Keys, key) {
		g.Keys = append(g.Keys, key)
	}
}

// Ceremony collects shares. A Ceremony is not safe for concurrent use. Its process must leave no
// core file.
type Ceremony struct {
	request  []byte
	identity *age.X25519Identity
	keys     []*opening
}

// opening is a key of a ceremony.
type opening struct {
	Envelope
	encoded []byte
	shares  map[int]string // by number
}

// Begin begins a ceremony for envelopes.
func Begin(purpose, appliance, machine string, envelopes [][]byte) (*Ceremony, error) {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	r := Request{
		Format: format, Purpose: purpose, Appliance: appliance, Machine: machine, MadeMS: time.Now().UnixMilli(),
		Recipient: identity.Recipient().String(),
	}
	if !oneLine(r.Machine) {
		r.Machine = "unnamed"
	}
	c := &Ceremony{identity: identity}
	for _, b := range envelopes {
		e, err := ParseEnvelope(b)
		if err != nil {
			return nil, err
		}
		c.keys = append(c.keys, &opening{e, b, map[int]string{}})
		e.Seed = nil
		r.Keys = append(r.Keys, e)
	}
	if c.request, err = json.Marshal(r); err != nil {
		return nil, fmt.Errorf("escrow: %w", err)
	}
	if len(c.request) > MaxFile {
		return nil, fmt.Errorf("escrow: a request for %d keys has %d bytes, at most %d: name fewer keys",
			len(envelopes), len(c.request), MaxFile)
	}
	_, err = ParseRequest(c.request)
	return c, err
}

// Request returns the request for the holders.
func (c *Ceremony) Request() []byte { return c.request }

// Take takes the answer of a holder. An answer counts as a whole: after an error no share of it was
// taken.
func (c *Ceremony) Take(answer []byte) (g Given, err error) {
	var a Answer
	if err := ijson.Decode(answer, &a); err != nil {
		return g, fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	if a.Format != format || a.Request != Digest(c.request) {
		return g, fmt.Errorf("%w: it is of another request", ErrAnswer)
	}
	text, err := decrypt(a.Shares, MaxFile, c.identity)
	if err != nil {
		return g, fmt.Errorf("%w: it can't be decrypted", ErrAnswer)
	}
	defer clear(text)
	type taken struct {
		of     *opening
		number int
		line   string
	}
	var all []taken
	fresh := false
	for line := range strings.Lines(string(text)) {
		var number int
		i := slices.IndexFunc(c.keys, func(k *opening) bool {
			return strings.HasPrefix(line, fmt.Sprintf("%s %v %s ", shareDomain, k.Key, k.PublicKey))
		})
		if i < 0 {
			return Given{}, fmt.Errorf("%w: it has a share of another key", ErrAnswer)
		}
		if number, _, err = c.keys[i].number(line); err != nil {
			return Given{}, err
		}
		fresh = fresh || c.keys[i].shares[number] == ""
		all = append(all, taken{c.keys[i], number, line})
		g.add(c.keys[i].Shares[number-1].Name, c.keys[i].Key)
	}
	if !fresh {
		return g, fmt.Errorf("%w: they are those of %s", ErrTwice, strings.Join(g.Holders, ", "))
	}
	for _, t := range all {
		t.of.shares[t.number] = t.line
	}
	return g, nil
}

// Wanting returns the number of shares that a key lacks, at the most over all keys, and the keys
// that lack some.
func (c *Ceremony) Wanting() (shares int, keys []keystore.Ref) {
	for _, k := range c.keys {
		if n := k.Needed - len(k.shares); n > 0 {
			shares, keys = max(shares, n), append(keys, k.Key)
		}
	}
	return shares, keys
}

// Shares returns the shares of an envelope that were taken, and who has given them. ready reports
// that they are enough.
func (c *Ceremony) Shares(envelope []byte) (lines, holders []string, ready bool) {
	for _, k := range c.keys {
		if string(k.encoded) != string(envelope) {
			continue
		}
		for _, number := range slices.Sorted(maps.Keys(k.shares)) {
			lines, holders = append(lines, k.shares[number]), append(holders, k.Envelope.Shares[number-1].Name)
		}
		ready = len(lines) >= k.Needed
	}
	return lines, holders, ready
}
