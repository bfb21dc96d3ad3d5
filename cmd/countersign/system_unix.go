//go:build unix

package main

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// errConnRefused is the error of a port or a socket where no program listens.
const errConnRefused = syscall.ECONNREFUSED

// stateFolder is the folder for sessions without XDG_RUNTIME_DIR.
func stateFolder() (string, error) {
	home, err := os.UserHomeDir()
	return filepath.Join(home, ".local", "state"), err
}

const (
	noSocketHint = "start countersignd, or correct --socket (COUNTERSIGN_SOCKET)"
	noAgentHint  = `start one (eval "$(ssh-agent)"), and add your key (ssh-add)`
)

// agentAddress is the address of the user's SSH agent, or "".
func agentAddress() string { return os.Getenv("SSH_AUTH_SOCK") }

func dialAgent(address string) (io.ReadWriteCloser, error) { return net.Dial("unix", address) }

// ansi reports that a terminal understands the colours of ECMA-48.
func ansi(*os.File) bool { return true }
