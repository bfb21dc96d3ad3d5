// Package disktest finds every disk a power cut can leave behind, and checks a program against
// each. A Disk is a mounted directory with a record of all operations on its files. Explore
// rebuilds the crash states (disks after a cut) from the record and runs a check on each. Begin
// reading at New and Explore. The comment at the top of model.go lists the possible losses.
//
// The directory is a FUSE file system in memory, served by a second process of the test binary. A
// single process would deadlock. A thread in a page fault on a mapped file waits for the file
// system; Go's garbage collector can't stop such a thread and waits for it; the file system waits
// for the garbage collector. A package with a Disk therefore has
//
//	func TestMain(m *testing.M) {
//		disktest.Serve()
//		os.Exit(m.Run())
//	}
package disktest

import (
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Kind is a kind of operation.
type Kind int

const (
	Create     Kind = iota + 1 // a new, empty file
	Mkdir                      // a new directory
	Rename                     // from Path to To; a file at To is replaced
	Unlink                     // of a file
	Rmdir                      // of an empty directory
	Write                      // Data at Offset
	Truncate                   // to Size bytes, shorter or longer than before
	Allocate                   // Size bytes at Offset; the file grows unless KeepSize
	Sync                       // fsync of a file
	Datasync                   // fdatasync of a file
	FailedSync                 // fsync or fdatasync with an error injected by Fail
	SyncDir                    // fsync of a directory
	Link                       // Path becomes another name of a file
)

var kinds = [...]string{
	"", "create", "mkdir", "rename", "unlink", "rmdir", "write", "truncate", "allocate",
	"fsync", "fdatasync", "failed fsync", "fsync of folder", "link",
}

func (k Kind) String() string { return kinds[k] }

// Op is one operation: a change of the disk, or an fsync for the changes before.
type Op struct {
	Kind Kind
	// Path and To are names at the time of the operation, relative to the mounted directory ".".
	Path, To string
	// Node is the number of the file or directory and outlives renames. The mounted directory is 1.
	// Node is 0 in a Create or Mkdir shown to a Fail function, before the node exists.
	Node uint64
	// Dir and ToDir are the nodes of the directories of Path and To. Both are 0 unless a name
	// changes.
	Dir, ToDir   uint64
	Offset, Size int64 // in bytes
	KeepSize     bool
	Data         []byte
	Mode         uint32 // permissions of a new file or directory
}

func (o Op) String() string {
	switch o.Kind {
	case Rename:
		return fmt.Sprintf("%v %s to %s", o.Kind, o.Path, o.To)
	case Write:
		return fmt.Sprintf("%v %s [%d +%d)", o.Kind, o.Path, o.Offset, len(o.Data))
	case Truncate:
		return fmt.Sprintf("%v %s to %d", o.Kind, o.Path, o.Size)
	case Allocate:
		return fmt.Sprintf("%v %s [%d +%d) keep size %v", o.Kind, o.Path, o.Offset, o.Size, o.KeepSize)
	}
	return fmt.Sprintf("%v %s", o.Kind, o.Path)
}

// Record has the operations on a Disk in order, and the marks between them. A mark n lies before
// Ops[n].
type Record struct {
	Ops   []Op
	Marks []int
}

// Disk is a recorded directory. All methods are safe for concurrent use.
//
// Operations run one at a time, in the order of the record, and are recorded before their system
// call returns. A failed operation changes nothing and is not recorded, except as FailedSync. A
// write of more than 1 MiB arrives as several operations. Symbolic links and hole punching are not
// supported.
type Disk struct {
	t       testing.TB
	dir     string
	process *exec.Cmd
	server  *rpc.Client
	fail    atomic.Pointer[func(Op) syscall.Errno]
	record  *Record // set by Unmount
}

// New mounts an empty Disk until the test ends. Without a FUSE mount New skips the test, or fails
// the test if REQUIRE_DEVICES=1.
func New(t testing.TB) *Disk {
	t.Helper()
	d := &Disk{t: t, dir: t.TempDir()}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d.process = exec.Command(exe, "-test.run=^$") // no test runs if TestMain lacks the call of Serve
	d.process.Env = append(os.Environ(), serveEnv+"="+d.dir)
	d.process.Stderr = os.Stderr
	calls, serverCalls := socketpair(t)
	faults, serverFaults := socketpair(t)
	d.process.ExtraFiles = []*os.File{serverCalls, serverFaults}
	if err := d.process.Start(); err != nil {
		t.Fatal(err)
	}
	serverCalls.Close()
	serverFaults.Close()
	d.server = rpc.NewClient(conn(t, calls))
	injector := rpc.NewServer()
	if err := injector.RegisterName("Injector", (*injectorAPI)(d)); err != nil {
		t.Fatal(err)
	}
	go injector.ServeConn(conn(t, faults))
	t.Cleanup(d.end)

	err = d.server.Call("Server.Ready", 0, new(int))
	var mount rpc.ServerError
	switch {
	case errors.As(err, &mount) && os.Getenv("REQUIRE_DEVICES") == "1":
		t.Fatalf("a FUSE mount is required (be root with /dev/fuse, or apt-get install fuse3): %v", err)
	case errors.As(err, &mount):
		t.Skipf("no FUSE mount is possible (be root with /dev/fuse, or apt-get install fuse3): %v", err)
	case err != nil:
		t.Fatalf("disktest: the file system's process does not answer: does TestMain call disktest.Serve? %v", err)
	}
	return d
}

// Dir is the path of the mounted directory.
func (d *Disk) Dir() string { return d.dir }

// Mark puts a mark into the record and returns the number n of operations before the mark: all
// with system calls that have returned, and perhaps some in progress. A result that a program
// reports after Mark must survive every cut after n or more operations.
func (d *Disk) Mark() (n int) {
	d.t.Helper()
	d.call("Mark", &n)
	return n
}

// Fail sets the function for fault injection, called before each operation, in place of an
// earlier one. A nil function ends fault injection. A result other than 0 becomes the operation's
// error, and the operation is not carried out. No other operation runs during a call of fail. The
// function may block, but must not change files of the Disk.
func (d *Disk) Fail(fail func(Op) syscall.Errno) {
	d.t.Helper()
	if fail == nil {
		d.fail.Store(nil)
		d.call("Inject", new(int), 0)
		return
	}
	d.fail.Store(&fail)
	d.call("Inject", new(int), 1)
}

// Record returns the operations and marks until now, or until Unmount.
func (d *Disk) Record() Record {
	d.t.Helper()
	if d.record != nil {
		return *d.record
	}
	var r Record
	d.call("Record", &r)
	return r
}

// Unmount ends the recording. An open file of the Disk fails the test.
func (d *Disk) Unmount() {
	d.t.Helper()
	r := d.Record()
	d.call("Unmount", new(int))
	d.record = &r
}

func (d *Disk) call(method string, answer any, argument ...int) {
	d.t.Helper()
	if err := d.server.Call("Server."+method, append(argument, 0)[0], answer); err != nil {
		d.t.Errorf("disktest: %s: %v", method, err)
	}
}

// end closes the connection to the server. The server then unmounts the directory, even with open
// files, and exits.
func (d *Disk) end() {
	d.server.Close()
	if err := d.process.Wait(); err != nil {
		d.t.Errorf("disktest: the file system's process: %v", err)
	}
	if unix.Unmount(d.dir, unix.MNT_DETACH) == unix.EPERM { // left by a server that died
		exec.Command("fusermount3", "-uzq", d.dir).Run()
	}
}

// injectorAPI has the method that the server calls by RPC.
type injectorAPI Disk

func (d *injectorAPI) Fail(op Op, errno *syscall.Errno) error {
	if fail := d.fail.Load(); fail != nil {
		*errno = (*fail)(op)
	}
	return nil
}

func socketpair(t testing.TB) (ours, theirs *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
}

func conn(t testing.TB, f *os.File) net.Conn {
	t.Helper()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	return c
}
