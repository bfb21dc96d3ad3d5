package escrow_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"countersign/internal/escrow"
	"countersign/internal/escrow/escrowtest"
	"countersign/internal/keystore"
	"countersign/internal/recipient"
	"countersign/internal/secret"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"golang.org/x/crypto/ssh"
)

var payments = keystore.Ref{Name: "payments", Version: 1}

// newPeople makes n holders of the third set of an appliance.
func newPeople(t *testing.T, needed, n int) escrowtest.People {
	t.Helper()
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("holder-%d", i+1))
	}
	p := escrowtest.New(t, needed, names...)
	p.Set.Number = 3
	return p
}

func newSeed() secret.Bytes {
	seed := make([]byte, 32)
	rand.Read(seed)
	return secret.New(seed)
}

func seal(t *testing.T, ref keystore.Ref, seed secret.Bytes, to escrow.Set) []byte {
	t.Helper()
	b, err := escrow.Seal(ref, keystore.Ed25519, seed, to)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestAnyEnoughOpen: for each size of a set, any M holders open the seed, in any order, and M-1 do
// not, nor does one share several times.
func TestAnyEnoughOpen(t *testing.T) {
	for _, size := range [][2]int{{2, 2}, {2, 3}, {3, 3}, {3, 5}, {2, 9}, {9, 9}} {
		p, seed := newPeople(t, size[0], size[1]), newSeed()
		envelope := seal(t, payments, seed, p.Set)
		for subset := range 1 << size[1] {
			var who []int
			for i := range size[1] {
				if subset>>i&1 == 1 {
					who = append(who, i)
				}
			}
			if n := len(who); n < size[0]-1 || n > size[0]+1 {
				continue
			}
			slices.Reverse(who)
			got, err := escrow.Open(envelope, p.Shares(t, envelope, who...))
			if len(who) < size[0] && !errors.Is(err, escrow.ErrShares) {
				t.Errorf("%v of %d, %d needed: %v", who, size[1], size[0], err)
			} else if len(who) >= size[0] && (err != nil || !got.Equal(seed)) {
				t.Errorf("%v of %d, %d needed: %v", who, size[1], size[0], err)
			}
		}
		one := slices.Repeat(p.Shares(t, envelope, 0), size[0])
		if _, err := escrow.Open(envelope, one); !errors.Is(err, escrow.ErrShares) {
			t.Errorf("one share %d times: %v", size[0], err)
		}
	}
}

// TestFewerAreNotEnough: an envelope that says that fewer shares are needed opens with no fewer, so
// it is the polynomial that keeps the key, and not the count.
func TestFewerAreNotEnough(t *testing.T) {
	for _, size := range [][2]int{{3, 3}, {3, 5}, {4, 6}, {9, 9}} {
		p := newPeople(t, size[0], size[1])
		envelope := seal(t, payments, newSeed(), p.Set)
		var e map[string]any
		if err := json.Unmarshal(envelope, &e); err != nil {
			t.Fatal(err)
		}
		e["needed"] = size[0] - 1
		lying, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var who []int
		for i := range size[0] - 1 {
			who = append(who, i)
		}
		if _, err := escrow.Open(lying, p.Shares(t, envelope, who...)); !errors.Is(err, escrow.ErrEnvelope) {
			t.Errorf("%d shares of %d needed: %v, want %v", size[0]-1, size[0], err, escrow.ErrEnvelope)
		}
	}
}

// TestDamagedShare: a share that can't be opened costs its own key only, and is named.
func TestDamagedShare(t *testing.T) {
	p := newPeople(t, 2, 2)
	second := keystore.Ref{Name: "payments", Version: 2}
	var e escrow.Envelope
	if err := json.Unmarshal(seal(t, payments, newSeed(), p.Set), &e); err != nil {
		t.Fatal(err)
	}
	e.Shares[0].Sealed[len(e.Shares[0].Sealed)-1] ^= 1
	damaged, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	c, err := escrow.Begin(escrow.ForDrill, "countersign/abc", "host", [][]byte{
		damaged, seal(t, second, newSeed(), p.Set),
	})
	if err != nil {
		t.Fatal(err)
	}
	_, g, err := escrow.Give(c.Request(), escrow.Code(c.Request()), p.Keys[0])
	if err != nil || !slices.Equal(g.Keys, []keystore.Ref{second}) ||
		!slices.Equal(g.Damaged, []keystore.Ref{payments}) {
		t.Errorf("%+v, %v", g, err)
	}
}

// TestSharesAreFresh: a seed that is sealed again has other shares, each a number below the order.
func TestSharesAreFresh(t *testing.T) {
	p := newPeople(t, 2, 3)
	order, _ := new(big.Int).SetString("27742317777372353535851937790883648493", 10)
	order.Add(order, new(big.Int).Lsh(big.NewInt(1), 252))
	first := map[string]bool{}
	for range 8 {
		envelope := seal(t, payments, secret.New(bytes.Repeat([]byte{7}, 32)), p.Set)
		fields := strings.Fields(p.Shares(t, envelope, 0)[0])
		value, err := hex.DecodeString(fields[4])
		if err != nil {
			t.Fatal(err)
		}
		slices.Reverse(value)
		if new(big.Int).SetBytes(value).Cmp(order) >= 0 {
			t.Errorf("a share is no number below the order: %x", value)
		}
		if first[fields[4]] {
			t.Error("two envelopes have the same share")
		}
		first[fields[4]] = true
	}
}

// TestForeignOpen opens an envelope without this program, by age and Python, as docs/SPEC.md says.
func TestForeignOpen(t *testing.T) {
	spec, err := os.ReadFile("../../docs/SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	_, script, found := strings.Cut(string(spec), "```python\n# open an envelope")
	script, _, closed := strings.Cut(script, "```")
	if !found || !closed {
		t.Fatal("docs/SPEC.md has no script that opens an envelope")
	}
	folder, seed, p := t.TempDir(), newSeed(), newPeople(t, 3, 5)
	envelope := seal(t, payments, seed, p.Set)
	args := []string{"-c", "# open an envelope" + script, filepath.Join(folder, "envelope.json")}
	if err := os.WriteFile(args[2], envelope, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{4, 0, 2} {
		file := filepath.Join(folder, fmt.Sprint(i))
		text := fmt.Sprintln(p.Keys[i][0].(*age.X25519Identity))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, file)
	}
	python := exec.Command("python3", args...)
	python.Stderr = os.Stderr
	out, err := python.Output()
	if want := hex.EncodeToString(seed.Expose()); err != nil || strings.TrimSpace(string(out)) != want {
		t.Errorf("Python has %s, %v; want %s", out, err, want)
	}
}

var write = flag.Bool("write", false, "write an envelope of the present format into testdata, if there is none")

// TestOldEnvelopes opens an envelope of each format that a version has written: backups keep
// envelopes for years.
func TestOldEnvelopes(t *testing.T) {
	derived := func(name string) []byte {
		sum := sha256.Sum256([]byte("countersign, internal/escrow/testdata: " + name))
		return sum[:]
	}
	var p escrowtest.People
	p.Set = escrow.Set{Number: 4, Needed: 2}
	for _, name := range []string{"ann", "bob", "cy"} {
		private := ed25519.NewKeyFromSeed(derived(name))
		public, err := ssh.NewPublicKey(private.Public())
		if err != nil {
			t.Fatal(err)
		}
		h, err := escrow.NewHolder(name, string(ssh.MarshalAuthorizedKey(public)))
		if err != nil {
			t.Fatal(err)
		}
		id, err := agessh.NewEd25519Identity(private)
		if err != nil {
			t.Fatal(err)
		}
		p.Set.Holders, p.Keys = append(p.Set.Holders, h), append(p.Keys, []age.Identity{id})
	}
	seed := secret.New(derived("seed"))
	present := "testdata/format-1.json"
	if _, err := os.Stat(present); errors.Is(err, fs.ErrNotExist) && *write {
		if err := os.WriteFile(present, seal(t, payments, seed, p.Set), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	all, err := filepath.Glob("testdata/format-*.json")
	if err != nil || !slices.Contains(all, present) {
		t.Fatalf("%v, %v: go test ./internal/escrow -args -write", all, err)
	}
	for _, file := range all {
		envelope, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, who := range [][]int{{0, 1}, {2, 0}, {1, 2}} {
			got, err := escrow.Open(envelope, p.Shares(t, envelope, who...))
			if err != nil || !got.Equal(seed) {
				t.Errorf("%s, by %v: %v", file, who, err)
			}
		}
	}
}

// TestEveryByteOfAnEnvelope flips each byte: the envelope opens to the same seed or not at all.
func TestEveryByteOfAnEnvelope(t *testing.T) {
	p, seed := newPeople(t, 2, 2), newSeed()
	envelope := seal(t, payments, seed, p.Set)
	lines, opened := p.Shares(t, envelope, 0, 1), 0
	for i := range envelope {
		changed := bytes.Clone(envelope)
		changed[i] ^= 1
		if got, err := escrow.Open(changed, lines); err == nil {
			if opened++; !got.Equal(seed) {
				t.Fatalf("byte %d: another seed", i)
			}
		}
	}
	// The sealed forms of shares and the names of holders are no part of what Open reads.
	if opened == 0 || opened == len(envelope) {
		t.Errorf("%d of %d changes are of no consequence", opened, len(envelope))
	}
	for _, n := range []int{0, 1, len(envelope) - 1} {
		if _, err := escrow.Open(envelope[:n], lines); !errors.Is(err, escrow.ErrEnvelope) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
}

// TestShares: a share of another key, of the same key sealed again, or with another number is
// refused, and the error names the holder but no digit of the share.
func TestShares(t *testing.T) {
	p, seed := newPeople(t, 2, 3), newSeed()
	envelope, again := seal(t, payments, seed, p.Set), seal(t, payments, seed, p.Set)
	other := seal(t, keystore.Ref{Name: "other", Version: 1}, newSeed(), p.Set)
	good := p.Shares(t, envelope, 0)[0]
	second := p.Shares(t, envelope, 1)[0]
	for name, bad := range map[string]string{
		"another key": p.Shares(t, other, 1)[0], "sealed again": p.Shares(t, again, 1)[0],
		"another number": strings.Replace(second, " 2 ", " 3 ", 1),
		"no number":      strings.Replace(second, " 2 ", " x ", 1),
		"number 0":       strings.Replace(second, " 2 ", " 0 ", 1), "beyond": strings.Replace(second, " 2 ", " 4 ", 1),
		"cut": second[:len(second)-2], "more": second + "\n", "empty": "", "capitals": strings.ToUpper(second),
	} {
		_, err := escrow.Open(envelope, []string{good, bad})
		if !errors.Is(err, escrow.ErrShare) {
			t.Errorf("%s: %v", name, err)
		} else if fields := strings.Fields(bad); len(fields) == 5 && strings.Contains(err.Error(), fields[4][:8]) {
			t.Errorf("%s: the error shows the share: %v", name, err)
		}
	}
}

// TestSets: what is no set is refused, and each form of a key is brought into one form.
func TestSets(t *testing.T) {
	good := newPeople(t, 2, 3).Set
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	change := func(do func(s *escrow.Set)) escrow.Set {
		s := good
		s.Holders = slices.Clone(good.Holders)
		do(&s)
		return s
	}
	for name, bad := range map[string]escrow.Set{
		"one is enough":  change(func(s *escrow.Set) { s.Needed = 1 }),
		"none is needed": change(func(s *escrow.Set) { s.Needed = 0 }),
		"too many":       change(func(s *escrow.Set) { s.Needed = 4 }),
		"nobody":         change(func(s *escrow.Set) { s.Holders = nil }),
		"a name twice":   change(func(s *escrow.Set) { s.Holders[1].Name = s.Holders[0].Name }),
		"a key twice":    change(func(s *escrow.Set) { s.Holders[1].Recipient = s.Holders[0].Recipient }),
		"a name":         change(func(s *escrow.Set) { s.Holders[1].Name = "Bob\x1b[2J" }),
		"a key":          change(func(s *escrow.Set) { s.Holders[1].Recipient = "age1x" }),
		"another form":   change(func(s *escrow.Set) { s.Holders[1].Recipient += " " }),
		"ten holders":    newPeople(t, 2, 10).Set,
	} {
		if err := bad.Check(); !errors.Is(err, escrow.ErrSet) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := escrow.Seal(payments, keystore.Ed25519, newSeed(), bad); !errors.Is(err, escrow.ErrSet) {
			t.Errorf("%s is sealed for: %v", name, err)
		}
	}
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
	h, err := escrow.NewHolder("bob", "  "+line+" bob@example.org \n")
	if err != nil || h.Recipient != line || h.Fingerprint() != "ssh-ed25519 "+ssh.FingerprintSHA256(key) {
		t.Errorf("%+v, %v", h, err)
	}
	for _, text := range []string{line + "\n" + line, "from=\"x\" " + line, ""} {
		if h, err := escrow.NewHolder("bob", text); err == nil {
			t.Errorf("%q is the key %q", text, h.Recipient)
		}
	}
}

// TestCeremony: holders with age and SSH keys answer a request for two keys of two sets. An answer
// counts once, for its request only, and as a whole.
func TestCeremony(t *testing.T) {
	p := newPeople(t, 2, 3)
	folder := t.TempDir()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKeyWithPassphrase(private, "", []byte("open"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(folder, "ssh")
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	if p.Set.Holders[2], err = escrow.NewHolder("carol", string(ssh.MarshalAuthorizedKey(key))); err != nil {
		t.Fatal(err)
	}
	opens := func() ([]byte, error) { return []byte("open"), nil }
	if p.Keys[2], err = recipient.ReadIdentities(file, opens); err != nil {
		t.Fatal(err)
	}
	old := p.Set
	old.Number, old.Holders = 1, []escrow.Holder{p.Set.Holders[0], p.Set.Holders[2]}
	seeds := []secret.Bytes{newSeed(), newSeed()}
	second := keystore.Ref{Name: "payments", Version: 2}
	envelopes := [][]byte{seal(t, payments, seeds[0], p.Set), seal(t, second, seeds[1], old)}
	begin := func() *escrow.Ceremony {
		c, err := escrow.Begin(escrow.ForDrill, "countersign/abc", "host", envelopes)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := begin()
	if bytes.Contains(c.Request(), []byte(`"seed":"`)) {
		t.Error("the request has a seed")
	}
	give := func(c *escrow.Ceremony, who int) []byte {
		t.Helper()
		answer, given, err := escrow.Give(c.Request(), " "+strings.ToUpper(escrow.Code(c.Request())), p.Keys[who])
		if err != nil {
			t.Fatal(err)
		}
		if want := []int{2, 1, 2}[who]; len(given.Keys) != want || given.Holders[0] != p.Set.Holders[who].Name {
			t.Errorf("holder %d gives %+v", who, given)
		}
		return answer
	}
	_, _, err = escrow.Give(c.Request(), escrow.Code(begin().Request()), p.Keys[0])
	if !errors.Is(err, escrow.ErrCode) {
		t.Errorf("the code of another request: %v", err)
	}
	_, _, err = escrow.Give(c.Request(), escrow.Code(c.Request()), newPeople(t, 2, 2).Keys[0])
	if !errors.Is(err, escrow.ErrNone) {
		t.Errorf("a stranger gives: %v", err)
	}
	if n, keys := c.Wanting(); n != 2 || len(keys) != 2 {
		t.Errorf("wanting %d of %v", n, keys)
	}
	first := give(c, 0)
	if g, err := c.Take(first); err != nil || len(g.Keys) != 2 || !slices.Equal(g.Holders, []string{"holder-1"}) {
		t.Errorf("%+v, %v", g, err)
	}
	if _, err := c.Take(first); !errors.Is(err, escrow.ErrTwice) {
		t.Errorf("the same answer: %v", err)
	}
	if _, err := c.Take(give(c, 0)); !errors.Is(err, escrow.ErrTwice) {
		t.Errorf("the same holder: %v", err)
	}
	if _, err := c.Take(give(begin(), 2)); !errors.Is(err, escrow.ErrAnswer) {
		t.Errorf("an answer to another request: %v", err)
	}
	lines, holders, ready := c.Shares(envelopes[0])
	if _, err := escrow.Open(envelopes[0], lines); !errors.Is(err, escrow.ErrShares) || ready {
		t.Errorf("one holder opens: %v, %v", ready, err)
	}
	if !slices.Equal(holders, []string{"holder-1"}) {
		t.Errorf("shares of %v", holders)
	}
	if _, err := c.Take(give(c, 1)); err != nil {
		t.Fatal(err)
	}
	if n, keys := c.Wanting(); n != 1 || !slices.Equal(keys, []keystore.Ref{second}) {
		t.Errorf("wanting %d of %v", n, keys)
	}
	if _, err := c.Take(give(c, 2)); err != nil {
		t.Fatal(err)
	}
	if n, keys := c.Wanting(); n != 0 || keys != nil {
		t.Errorf("wanting %d of %v", n, keys)
	}
	for i, envelope := range envelopes {
		lines, holders, ready := c.Shares(envelope)
		if got, err := escrow.Open(envelope, lines); err != nil || !got.Equal(seeds[i]) || !ready {
			t.Errorf("key %d: %v, %v", i, ready, err)
		}
		want := [][]string{{"holder-1", "holder-2", "carol"}, {"holder-1", "carol"}}[i]
		if !slices.Equal(holders, want) {
			t.Errorf("key %d: shares of %v, want %v", i, holders, want)
		}
	}
}

// TestAnswersAreWorthNothing: the answers of all holders open nothing in another ceremony for the
// same keys, not even with all private keys of the holders but without their use.
func TestAnswersAreWorthNothing(t *testing.T) {
	p := newPeople(t, 2, 2)
	envelope := seal(t, payments, newSeed(), p.Set)
	c, err := escrow.Begin(escrow.ForDrill, "countersign/abc", "host", [][]byte{envelope})
	if err != nil {
		t.Fatal(err)
	}
	later, err := escrow.Begin(escrow.ForRecovery, "countersign/abc", "host", [][]byte{envelope})
	if err != nil {
		t.Fatal(err)
	}
	for i, keys := range p.Keys {
		b, _, err := escrow.Give(c.Request(), escrow.Code(c.Request()), keys)
		if err != nil {
			t.Fatal(err)
		}
		var a escrow.Answer
		if err := json.Unmarshal(b, &a); err != nil {
			t.Fatal(err)
		}
		for _, other := range p.Keys {
			if _, err := age.Decrypt(bytes.NewReader(a.Shares), other...); err == nil {
				t.Errorf("a holder opens the answer of holder %d", i+1)
			}
		}
		a.Request = escrow.Digest(later.Request()) // forged
		if b, err = json.Marshal(a); err != nil {
			t.Fatal(err)
		}
		if _, err := later.Take(b); !errors.Is(err, escrow.ErrAnswer) {
			t.Errorf("a later ceremony takes the answer: %v", err)
		}
	}
}

// TestRequests: what is no request is refused before anything is decrypted, and cannot fool a
// terminal.
func TestRequests(t *testing.T) {
	p := newPeople(t, 2, 2)
	envelope := seal(t, payments, newSeed(), p.Set)
	c, err := escrow.Begin(escrow.ForDrill, "countersign/abc", "host\x1b[2J", [][]byte{envelope})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := escrow.ParseRequest(c.Request()); err != nil || r.Machine != "unnamed" {
		t.Errorf("%q, %v", r.Machine, err)
	}
	for name, change := range map[string]func(r *escrow.Request){
		"a newer one": func(r *escrow.Request) { r.Format = 2 },
		"no purpose":  func(r *escrow.Request) { r.Purpose = "fun" },
		"a terminal":  func(r *escrow.Request) { r.Appliance = "a\x1b[2Jb" },
		"long":        func(r *escrow.Request) { r.Machine = strings.Repeat("a", 201) },
		"no keys":     func(r *escrow.Request) { r.Keys = nil },
		"a key twice": func(r *escrow.Request) { r.Keys = append(r.Keys, r.Keys[0]) },
		"its key":     func(r *escrow.Request) { r.Recipient = "age1x" },
		"a holder":    func(r *escrow.Request) { r.Keys[0].Shares[0].Name = "\x1b" },
		"one needed":  func(r *escrow.Request) { r.Keys[0].Needed = 1 },
		"a version":   func(r *escrow.Request) { r.Keys[0].Key.Version = 0 },
		"a public key": func(r *escrow.Request) {
			r.Keys[0].PublicKey = strings.ToUpper(r.Keys[0].PublicKey) + "00"
		},
	} {
		var r escrow.Request
		if err := json.Unmarshal(c.Request(), &r); err != nil {
			t.Fatal(err)
		}
		change(&r)
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := escrow.Give(b, escrow.Code(b), p.Keys[0]); !errors.Is(err, escrow.ErrRequest) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, text := range map[string]string{
		"a field twice":     `{"format":1,"format":1}`,
		"another case":      `{"Format":1}`,
		"an unknown field":  `{"format":1,"more":1}`,
		"something behind":  `{"format":1}{}`,
		"no object":         `[]`,
		"an invalid letter": "{\"purpose\":\"\xff\"}",
	} {
		if _, err := escrow.ParseRequest([]byte(text)); !errors.Is(err, escrow.ErrRequest) ||
			strings.Contains(err.Error(), "purpose or no key") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := escrow.Begin(escrow.ForDrill, "countersign/abc", "host", nil); !errors.Is(err, escrow.ErrRequest) {
		t.Errorf("a ceremony for nothing: %v", err)
	}
}
