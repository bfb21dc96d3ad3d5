package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net"
	"os"
	"testing"

	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/sys/windows"
)

// TestAgentPipe signs with the key of an agent at a named pipe, which serves one program at a time.
func TestAgentPipe(t *testing.T) {
	name := pipes + "countersign-" + rand.Text()
	t.Setenv("SSH_AUTH_SOCK", name)
	if _, _, err := sshAgent(); !errors.Is(err, errNoAgent) {
		t.Errorf("no agent: %v", err)
	}
	keys := agent.NewKeyring()
	if err := keys.Add(agent.AddedKey{PrivateKey: ed25519.NewKeyFromSeed(make([]byte, 32))}); err != nil {
		t.Fatal(err)
	}
	path, err := windows.UTF16PtrFromString(name)
	if err != nil {
		t.Fatal(err)
	}
	const buffer, instances = 4096, 1
	pipe, err := windows.CreateNamedPipe(path, windows.PIPE_ACCESS_DUPLEX, windows.PIPE_TYPE_BYTE, instances,
		buffer, buffer, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	const programs = 3
	go func() {
		at := os.NewFile(uintptr(pipe), name)
		for range programs {
			windows.ConnectNamedPipe(pipe, nil)
			agent.ServeAgent(keys, at)
			windows.DisconnectNamedPipe(pipe)
		}
	}()
	for range programs {
		a, closer, err := sshAgent()
		if err != nil {
			t.Fatal(err)
		}
		all, err := a.List()
		if err != nil || len(all) != 1 {
			t.Fatalf("%v, %v", all, err)
		}
		if _, err := a.Sign(all[0], []byte("text")); err != nil {
			t.Error(err)
		}
		closer.Close()
	}
}

// TestRefusedPort: a port where nobody listens is one to try again.
func TestRefusedPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	_, err = net.Dial("tcp", l.Addr().String())
	if code, status := classify(failed{err}); code != "unreachable" || status != 3 {
		t.Errorf("%v: %s, %d", err, code, status)
	}
}
