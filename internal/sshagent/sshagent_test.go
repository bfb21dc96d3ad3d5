package sshagent

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign/approval"

	"golang.org/x/crypto/ssh/agent"
)

const text = approval.ForSignIn + "\nappliance: countersign/0011223344556677\noperator: anna\nchannel: unix\n" +
	"expires at: 2026-11-24T08:02:00Z\nnonce: 000102030405060708090a0b0c0d0e0f\n"

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// program finds a program of OpenSSH.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatalf("%s is missing: install openssh-client", name)
		}
		t.Skipf("%s is missing: install openssh-client", name)
	}
	return path
}

// accepted has ssh-keygen verify a credential's signature over the text.
func accepted(t *testing.T, c approval.Credential, sshsig string) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{"signers": "anna " + c.PublicKey + "\n", "sig": sshsig} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(program(t, "ssh-keygen"),
		"-Y", "verify", "-f", "signers", "-I", "anna", "-n", approval.ForSignIn, "-s", "sig")
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("ssh-keygen refuses it: %v\n%s%s", err, out, sshsig)
	}
}

// startAgent starts an ssh-agent of OpenSSH and connects to it.
func startAgent(t *testing.T) agent.ExtendedAgent {
	t.Helper()
	path := program(t, "ssh-agent")
	dir, err := os.MkdirTemp("", "agent") // the path of a Unix socket has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	cmd := exec.Command(path, "-D", "-a", socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for deadline := time.Now().Add(10 * time.Second); ; {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			t.Cleanup(func() { conn.Close() })
			return agent.NewClient(conn)
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// TestRefusedKeyLeavesTheTurn has an ssh-agent whose first key must be confirmed by a person, and
// there is none. The next key signs.
func TestRefusedKeyLeavesTheTurn(t *testing.T) {
	t.Setenv("SSH_ASKPASS", "/bin/false")
	a := startAgent(t)
	for i, confirm := range []bool{true, false} {
		private := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{byte(i)}, 32))
		if err := a.Add(agent.AddedKey{PrivateKey: private, ConfirmBeforeUse: confirm}); err != nil {
			t.Fatal(err)
		}
	}
	all, err := Credentials(a, nil)
	if err != nil || len(all) != 2 {
		t.Fatal(all, err)
	}
	p, err := SignWithAny(a, all, approval.ForSignIn, text)
	if err != nil || p.Credential != all[1].ID {
		t.Errorf("%+v, %v", p, err)
	}
	accepted(t, all[1], p.SSHSIG)
	_, err = SignWithAny(a, all[:1], approval.ForSignIn, text)
	if err == nil || !strings.Contains(err.Error(), all[0].ID) {
		t.Errorf("only a key that the agent refuses: %v", err)
	}
	if _, err := SignWithAny(a, nil, approval.ForSignIn, text); err == nil {
		t.Error("no key signs")
	}
}

// TestSSHAgent signs with the keys of an ssh-agent of OpenSSH.
func TestSSHAgent(t *testing.T) {
	a := startAgent(t)
	for _, private := range []any{
		ed25519.NewKeyFromSeed(make([]byte, 32)),
		must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)),
		must(rsa.GenerateKey(rand.Reader, 2048)),
	} {
		if err := a.Add(agent.AddedKey{PrivateKey: private}); err != nil {
			t.Fatal(err)
		}
	}
	all, err := Credentials(a, nil)
	if err != nil || len(all) != 2 {
		t.Fatalf("%d of 3 keys can be used, want 2 without RSA's: %v", len(all), err)
	}
	for _, c := range all {
		if p, err := Sign(a, c, approval.ForSignIn, text); err != nil {
			t.Error(err)
		} else {
			accepted(t, c, p.SSHSIG)
		}
	}
	known := all[1]
	known.PublicKey = all[0].PublicKey // an appliance that lies gets no signature by another key
	found, err := Credentials(a, []approval.Credential{{ID: "another", Kind: approval.SSH}, known})
	if err != nil || len(found) != 1 || found[0] != all[1] {
		t.Errorf("%+v, %v", found, err)
	}
	keyring := agent.NewKeyring()
	if err := keyring.Add(agent.AddedKey{PrivateKey: ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, 32))}); err != nil {
		t.Fatal(err)
	}
	strangers, err := Credentials(keyring, nil)
	if err != nil || len(strangers) != 1 {
		t.Fatalf("%+v, %v", strangers, err)
	}
	stranger := strangers[0]
	if found, err := Credentials(a, []approval.Credential{stranger}); err != nil || len(found) != 0 {
		t.Errorf("%+v, %v", found, err)
	}
	if _, err := Sign(a, stranger, approval.ForSignIn, text); err == nil {
		t.Error("an agent signs with a key that it has not")
	}
	if _, err := Sign(a, approval.Credential{Kind: approval.Passkey}, approval.ForSignIn, text); err == nil {
		t.Error("an agent signs with a passkey")
	}
}
