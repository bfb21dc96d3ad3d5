// Package disktest finds out what a power cut does to a program's files. A Disk is a folder that writes down what is
// done to the files in it, and Explore rebuilds from that record every disk that a cut could have left, and has each
// judged. Begin reading at New and Explore; what may be lost in a cut is said in model.go.
//
// The folder is a FUSE file system in memory. It is served by a process of its own, which is the test binary run again:
// a program that waits for a page of a mapped file can't be stopped by Go's garbage collector, so a file system in the
// same process would wait for it, and it for the file system. A package that uses Disk therefore says
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
	Mkdir                      // a new folder
	Rename                     // from Path to To, in place of what was there
	Unlink                     // of a file
	Rmdir                      // of an empty folder
	Write                      // Data at Offset
	Truncate                   // to Size bytes, which may be longer
	Allocate                   // Size bytes at Offset; the file grows unless KeepSize
	Sync                       // fsync of a file
	Datasync                   // fdatasync of a file
	FailedSync                 // fsync or fdatasync that Fail refused
	SyncDir                    // fsync of a folder
)

var kinds = [...]string{"", "create", "mkdir", "rename", "unlink", "rmdir", "write", "truncate", "allocate", "fsync",
	"fdatasync", "failed fsync", "fsync of folder"}

func (k Kind) String() string { return kinds[k] }

// Op is one operation that changes what is on the disk or makes it durable.
type Op struct {
	Kind         Kind
	Path, To     string // as they were named at the time, relative to the folder, which is itself "."
	Node         uint64 // the file or folder, whatever it is called; 1 is the folder itself; 0 where it is yet to be made
	Dir, ToDir   uint64 // the folders that hold Path and To, where a name changes
	Offset, Size int64
	KeepSize     bool
	Data         []byte
	Mode         uint32 // of a new file or folder: permissions
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

// Record is what was done, in order, and where in it the marks are: a mark of n lies before Ops[n].
type Record struct {
	Ops   []Op
	Marks []int
}

// Disk is a recorded folder. It is safe for concurrent use.
//
// Operations are carried out one at a time, in the order of the record, and are in it before their system call returns.
// One that fails changes nothing and is not recorded, but for FailedSync. A write of more than a mebibyte comes as
// several. There are no links, and no holes can be made.
type Disk struct {
	t       testing.TB
	dir     string
	process *exec.Cmd
	server  *rpc.Client
	fail    atomic.Pointer[func(Op) syscall.Errno]
	record  *Record // after Unmount
}

// New mounts an empty Disk until the test ends. Where that can't be done it skips the test, or fails it if
// REQUIRE_DEVICES=1.
func New(t testing.TB) *Disk {
	t.Helper()
	d := &Disk{t: t, dir: t.TempDir()}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d.process = exec.Command(exe, "-test.run=^$") // runs no test if TestMain forgets Serve
	d.process.Env = append(os.Environ(), serveEnv+"="+d.dir)
	d.process.Stderr = os.Stderr
	toServer, served := socketpair(t)
	toTest, asked := socketpair(t)
	d.process.ExtraFiles = []*os.File{served, asked}
	if err := d.process.Start(); err != nil {
		t.Fatal(err)
	}
	served.Close()
	asked.Close()
	d.server = rpc.NewClient(conn(t, toServer))
	questions := rpc.NewServer()
	if err := questions.RegisterName("Test", (*test)(d)); err != nil {
		t.Fatal(err)
	}
	go questions.ServeConn(conn(t, toTest))
	t.Cleanup(d.end)

	err = d.server.Call("Server.Ready", 0, new(int))
	var mount rpc.ServerError
	switch {
	case errors.As(err, &mount) && os.Getenv("REQUIRE_DEVICES") == "1":
		t.Fatalf("a FUSE mount is required (be root with /dev/fuse, or apt-get install fuse3): %v", err)
	case errors.As(err, &mount):
		t.Skipf("no FUSE mount is possible (be root with /dev/fuse, or apt-get install fuse3): %v", err)
	case err != nil:
		t.Fatalf("disktest: no file system: does TestMain call disktest.Serve? %v", err)
	}
	return d
}

// Dir is where the folder is mounted.
func (d *Disk) Dir() string { return d.dir }

// Mark puts a mark into the record and returns the number of operations before it: those whose system calls have
// returned, and perhaps some that are under way. What a test releases after Mark must survive a cut at or after it.
func (d *Disk) Mark() (n int) {
	d.t.Helper()
	d.call("Mark", &n)
	return n
}

// Fail sets what is asked before each operation, in place of what was set before; nil is nothing. Unless the answer is 0
// it is the operation's error, and the operation is not carried out. While it is asked no other operation goes on, and
// it may take its time; but it must not change files of the Disk.
func (d *Disk) Fail(fail func(Op) syscall.Errno) {
	d.t.Helper()
	if fail == nil {
		d.fail.Store(nil)
		d.call("Ask", new(int), 0)
		return
	}
	d.fail.Store(&fail)
	d.call("Ask", new(int), 1)
}

// Record returns what was done until now, or until Unmount.
func (d *Disk) Record() Record {
	d.t.Helper()
	if d.record != nil {
		return *d.record
	}
	var r Record
	d.call("Record", &r)
	return r
}

// Unmount ends the recording. It fails the test while a file of the Disk is open.
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

// end has the server unmount what still is mounted, whoever uses it: it does that when it is alone.
func (d *Disk) end() {
	d.server.Close()
	if err := d.process.Wait(); err != nil {
		d.t.Errorf("disktest: the file system's process: %v", err)
	}
	if unix.Unmount(d.dir, unix.MNT_DETACH) == unix.EPERM { // of a server that died
		exec.Command("fusermount3", "-uzq", d.dir).Run()
	}
}

// test answers the server's questions.
type test Disk

func (d *test) Fail(op Op, errno *syscall.Errno) error {
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
