package main

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/windows"
)

// errConnRefused is the error of a port or a socket where no program listens.
const errConnRefused = windows.WSAECONNREFUSED

// stateFolder is the folder for sessions without XDG_RUNTIME_DIR: %LocalAppData%.
func stateFolder() (string, error) { return os.UserCacheDir() }

const (
	noSocketHint = "OpenSSH for Windows makes no sockets: forward the port of the admin API " +
		"(ssh -L 7780:localhost:7780 HOST), and add --url (COUNTERSIGN_URL)"
	noAgentHint = "start the service (as an administrator, in PowerShell: Set-Service ssh-agent " +
		"-StartupType Automatic; Start-Service ssh-agent), and add your key (ssh-add)"
)

// The agent of OpenSSH for Windows listens at a named pipe.
const (
	pipes     = `\\.\pipe\`
	agentPipe = pipes + "openssh-ssh-agent"
)

// agentAddress is the address of the user's SSH agent, or "".
func agentAddress() string {
	if address := os.Getenv("SSH_AUTH_SOCK"); address != "" {
		return address
	}
	pipe, err := dialAgent(agentPipe)
	if err != nil {
		return ""
	}
	pipe.Close()
	return agentPipe
}

// dialAgent connects to an agent at a named pipe or at a Unix socket. A pipe is busy for a moment
// after another program has connected. A program that listens in the agent's place gets no right to
// act as the user (SECURITY_ANONYMOUS).
func dialAgent(address string) (io.ReadWriteCloser, error) {
	if !strings.HasPrefix(strings.ReplaceAll(address, "/", `\`), pipes) {
		return net.Dial("unix", address)
	}
	name, err := windows.UTF16PtrFromString(address)
	if err != nil {
		return nil, err
	}
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		pipe, err := windows.CreateFile(name, windows.GENERIC_READ|windows.GENERIC_WRITE, 0, nil,
			windows.OPEN_EXISTING, windows.SECURITY_SQOS_PRESENT|windows.SECURITY_ANONYMOUS, 0)
		if err == nil {
			return os.NewFile(uintptr(pipe), address), nil
		}
		if !errors.Is(err, windows.ERROR_PIPE_BUSY) || time.Since(begin) > 2*time.Second {
			return nil, &os.PathError{Op: "open", Path: address, Err: err}
		}
	}
}

// ansi has a console understand the colours of ECMA-48, and reports that the console does.
func ansi(console *os.File) bool {
	handle := windows.Handle(console.Fd())
	var mode uint32
	return windows.GetConsoleMode(handle, &mode) == nil &&
		windows.SetConsoleMode(handle, mode|windows.ENABLE_VIRTUAL_TERMINAL_PROCESSING) == nil
}
