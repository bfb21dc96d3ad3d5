package worker

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
)

// Process is the process of a key worker. The methods are for any number of callers.
type Process interface {
	PID() int
	// Kill sends SIGKILL, and nothing to a process that has been waited for.
	Kill()
	// Wait returns after the end of the process, with the reason of an end without success. Wait
	// is called once.
	Wait() error
	// Memory returns the private memory in bytes (proc(5), statm: resident less shared), or 0 if
	// the size is unknown.
	Memory() int
}

// Exec runs a command as a key worker, with socket as descriptor 3, config as descriptor 4, and
// stderr. A nil config is none. The files stay open in this process.
func Exec(cmd *exec.Cmd, socket, stderr, config *os.File) (*Child, error) {
	cmd.ExtraFiles = []*os.File{socket}
	if config != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, config)
	}
	cmd.Stderr = stderr
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Setpgid = true // Ctrl-C at the terminal is for the daemon only
	// A worker must not outlive the process that has started it: the worker could finish a key
	// after the next daemon has removed the remains of that key.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	if err := OnStarterThread(cmd.Start); err != nil {
		return nil, err
	}
	// The process has not been waited for, so no other process has its id yet.
	statm, _ := os.Open(fmt.Sprintf("/proc/%d/statm", cmd.Process.Pid))
	return &Child{cmd, statm}, nil
}

// Child is a Process that this process has started.
type Child struct {
	cmd   *exec.Cmd
	statm *os.File // nil: not known
}

func (c *Child) PID() int { return c.cmd.Process.Pid }

// Kill sends the signal from the thread that has started the process. Landlock confines each thread
// by itself before ABI 8, and lets signals only reach processes that a thread has started.
func (c *Child) Kill() { OnStarterThread(c.cmd.Process.Kill) }

func (c *Child) Wait() error {
	err := c.cmd.Wait()
	c.statm.Close()
	return err
}

func (c *Child) Memory() int { return ReadStatm(c.statm) }

// Statm returns the open file statm of the process, or nil.
func (c *Child) Statm() *os.File { return c.statm }

// ReadStatm returns the private memory in bytes that a file statm shows, or 0.
func ReadStatm(statm *os.File) int {
	if statm == nil {
		return 0
	}
	text := make([]byte, 256)
	n, _ := statm.ReadAt(text, 0)
	var size, resident, shared int
	if _, err := fmt.Sscan(string(text[:n]), &size, &resident, &shared); err != nil {
		return 0
	}
	return (resident - shared) * os.Getpagesize()
}

// OnStarterThread runs start on an OS thread that never ends. Pdeathsig kills the child at the end
// of the thread that has started the child, and Go ends threads at will.
func OnStarterThread(start func() error) error {
	done := make(chan error)
	starter() <- func() { done <- start() }
	return <-done
}

var starter = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go runStarter(work)
	return work
})

func runStarter(work <-chan func()) {
	runtime.LockOSThread()
	for f := range work {
		f()
	}
}
