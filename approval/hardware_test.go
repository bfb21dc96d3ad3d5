package approval

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"countersign/audit"

	"golang.org/x/crypto/ssh"
)

// TestHardwareKeysVerifyTheirUser makes proofs by each kind of credential. Only a FIDO key that has
// verified its user, and a passkey, count as hardware keys.
func TestHardwareKeysVerifyTheirUser(t *testing.T) {
	check := func(what string, c Credential, p Proof, hardware, verified bool) {
		t.Helper()
		v, err := c.Verify(ForSignIn, sampleText, p)
		if err != nil || c.Hardware() != hardware || v.Hardware != verified {
			t.Errorf("%s: hardware %v, verified %v, %v", what, c.Hardware(), v.Hardware, err)
		}
	}
	signer, c := ed25519Person(t, 1)
	check("a key in a file", c, must(signSSH(signer, c, ForSignIn, sampleText)), false, false)
	for _, kind := range []string{ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256} {
		f := newFido(t, kind)
		c := must(NewSSH(string(ssh.MarshalAuthorizedKey(f.public))))
		check(kind+" by a touch", c, must(signSSH(f, c, ForSignIn, sampleText)), true, false)
		f.flags = flagPresent | flagVerified
		check(kind+" by a PIN", c, must(signSSH(f, c, ForSignIn, sampleText)), true, true)
	}
	a := newAuthenticator(t, "ES256")
	c = a.enrol(t)
	check("a passkey", c, a.get(t, c, sampleText), true, true)
}

// TestReplayOfHardwareKeys has approvers with a FIDO key and with a key in a file. From the event
// on that demands hardware keys, only approvals by hardware keys that have verified their user
// count, also of proposals that were open before.
func TestReplayOfHardwareKeys(t *testing.T) {
	scenarioOf := func() (s *scenario, f *fido) {
		s, f = beginning(t), newFido(t, ssh.KeyAlgoSKED25519)
		f.flags = flagPresent | flagVerified
		s.signers["dora"], s.have["dora"] = f, must(NewSSH(string(ssh.MarshalAuthorizedKey(f.public))))
		s.addOperator(both, "dora", Approver)
		s.setNeeded(both, 1)
		return s, f
	}
	demand := func(s *scenario, required string, approvers ...string) {
		e := audit.Event{Type: audit.ApproverKeysChanged, Resource: "approvals", Metadata: with("required", required)}
		s.carryOut(approvers, e, "approvals hardware", "required", required)
	}
	s, _ := scenarioOf()
	demand(s, "yes", "dora")
	s.carryOut([]string{"dora"}, policyChanged("bb", audit.Actor{}), "policy activate", "sha256", "bb")
	r, err := Replay(s.seq(), ReplayOptions{Appliance: testName})
	if err != nil || !r.Hardware || !r.Proposals[len(r.Proposals)-1].Approvals[0].Hardware {
		t.Errorf("%+v, %v", r, err)
	}
	demand(s, "no", "dora")
	s.carryOut([]string{"anna"}, policyChanged("cc", audit.Actor{}), "policy activate", "sha256", "cc")
	if r, err := Replay(s.seq(), ReplayOptions{Appliance: testName}); err != nil || r.Hardware {
		t.Errorf("%+v, %v", r, err)
	}
	for name, act := range map[string]func(s *scenario, f *fido){
		"an approval by a key in a file": func(s *scenario, _ *fido) {
			demand(s, "yes", "dora")
			s.approve(s.propose("anna", "policy activate", "sha256", "bb"), "anna")
		},
		"a demand by a key in a file": func(s *scenario, _ *fido) {
			s.approve(s.propose("anna", "approvals hardware", "required", "yes"), "anna")
		},
		"an approval by a touch alone": func(s *scenario, f *fido) {
			demand(s, "yes", "dora")
			f.flags = flagPresent
			s.approve(s.propose("anna", "policy activate", "sha256", "bb"), "dora")
		},
		"an approval from before": func(s *scenario, _ *fido) {
			id := s.propose("anna", "policy activate", "sha256", "bb")
			s.approve(id, "anna")
			demand(s, "yes", "dora")
			s.run(id)
		},
		"nobody left with a hardware key": func(s *scenario, _ *fido) {
			demand(s, "yes", "dora")
			id := s.propose("anna", "operator remove", "name", "dora")
			s.approve(id, "dora")
			s.run(id)
			e := s.changed("dora", "removed", Operator{})
			e.Actor = by("anna", id)
			s.add(e)
		},
	} {
		s, f := scenarioOf()
		act(s, f)
		wrongAt(t, name, s, uint64(len(s.events)-1), ReplayOptions{Appliance: testName})
	}
}

// TestSignatureMadeElsewhere has ssh-keygen sign a text, as an operator does on a machine without a
// network. NewSSHProof finds the credential in the signature.
func TestSignatureMadeElsewhere(t *testing.T) {
	dir := t.TempDir()
	private, text := filepath.Join(dir, "key"), filepath.Join(dir, "text")
	if out, err := keygen(t, "", "-q", "-t", "ed25519", "-N", "", "-f", private); err != nil {
		t.Fatal(err, out)
	}
	write(t, text, sampleProposal().Text())
	if out, err := keygen(t, "", "-Y", "sign", "-n", ForProposal, "-f", private, text); err != nil {
		t.Fatal(err, out)
	}
	own := must(NewSSH(string(must(os.ReadFile(private + ".pub")))))
	armored := string(must(os.ReadFile(text + ".sig")))
	p, err := NewSSHProof(armored)
	if err != nil || p.Credential != own.ID {
		t.Fatalf("%+v, %v", p, err)
	}
	if _, err := own.Verify(ForProposal, sampleProposal().Text(), p); err != nil {
		t.Error(err)
	}
	for _, wrong := range []string{"", "x", armored[:len(armored)/2], strings.ReplaceAll(armored, "U1NI", "U1NJ")} {
		if p, err := NewSSHProof(wrong); err == nil {
			t.Errorf("%q is a proof: %+v", wrong, p)
		}
	}
}
