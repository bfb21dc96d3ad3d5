package disktest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/signal"
	"path"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// serveEnv is the environment variable that makes a process the file system. The value is the
// path of the directory to mount.
const serveEnv = "DISKTEST_SERVE"

// Serve must be the first call of TestMain. In a process started by New, Serve serves the file
// system and exits; in any other process Serve returns at once.
func Serve() {
	dir := os.Getenv(serveEnv)
	if dir == "" {
		return
	}
	signal.Ignore(os.Interrupt) // the server must outlive the test to unmount the directory
	if err := serve(dir); err != nil {
		fmt.Fprintln(os.Stderr, "disktest:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve(dir string) error {
	calls, err := net.FileConn(os.NewFile(3, "calls"))
	if err != nil {
		return err
	}
	faults, err := net.FileConn(os.NewFile(4, "faults"))
	if err != nil {
		return err
	}
	s := &server{injector: rpc.NewClient(faults)}
	forever := time.Duration(1<<63 - 1)
	// A mapped file and a write agree because both use the kernel's page cache. All changes come
	// through the kernel, so cached pages never expire. A writeback cache would delay writes, so
	// there is none.
	s.mount, s.mountErr = fs.Mount(dir, s.newNode(0o700), &fs.Options{
		MountOptions: fuse.MountOptions{
			FsName: "disktest", Name: "disktest",
			DirectMount:              true, // without root: fusermount3
			DirectMountStrict:        os.Geteuid() == 0,
			ExplicitDataCacheControl: true,
			DisableXAttrs:            true,
			MaxWrite:                 1 << 20,
		},
		EntryTimeout: &forever,
		AttrTimeout:  &forever,
	})
	api := rpc.NewServer()
	if err := api.RegisterName("Server", (*serverAPI)(s)); err != nil {
		return err
	}
	api.ServeConn(calls) // until the test's process closes the connection or dies
	if s.mount == nil || s.mount.Unmount() == nil {
		return nil
	}
	return unix.Unmount(dir, unix.MNT_DETACH)
}

// server is the file system: files in memory, and the record.
type server struct {
	injector *rpc.Client // the test's process
	mount    *fuse.Server
	mountErr error
	inject   atomic.Bool // the injector has a Fail function

	operation sync.Mutex // held by the one operation in progress
	// mu is free during a call of the injector: the test's process may itself wait for a read.
	mu    sync.RWMutex
	nodes uint64
	ops   []Op
	marks []int
}

// apply asks the injector for an error, then carries op out by do and records op.
func (s *server) apply(op Op, do func(*Op)) (errno syscall.Errno) {
	s.operation.Lock()
	defer s.operation.Unlock()
	if s.inject.Load() {
		if err := s.injector.Call("Injector.Fail", op, &errno); err != nil {
			return syscall.EIO // the test's process has ended
		}
	}
	if errno != 0 && (op.Kind == Sync || op.Kind == Datasync) {
		op.Kind = FailedSync
	} else if errno != 0 {
		return errno
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	do(&op)
	s.ops = append(s.ops, op)
	return errno
}

// serverAPI has the methods that the test's process calls by RPC.
type serverAPI server

func (c *serverAPI) Ready(int, *int) error { return c.mountErr }

func (c *serverAPI) Mark(_ int, n *int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	*n = len(c.ops)
	c.marks = append(c.marks, *n)
	return nil
}

func (c *serverAPI) Record(_ int, r *Record) error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	*r = Record{slices.Clone(c.ops), slices.Clone(c.marks)}
	return nil
}

func (c *serverAPI) Inject(on int, _ *int) error {
	c.inject.Store(on == 1)
	return nil
}

func (c *serverAPI) Unmount(int, *int) error {
	if c.mount == nil {
		return errors.New("not mounted")
	}
	err := c.mount.Unmount()
	if err == nil {
		c.mount = nil
	}
	return err
}

// node is a file or a directory. The kernel refuses operations without a method of node, so every
// change is recorded. The tree of names is in go-fuse's fs.Inode.
type node struct {
	fs.Inode
	s         *server
	id        uint64
	mode      uint32
	mtime     time.Time
	data      []byte
	allocated int64 // bytes of disk space; may be more than len(data)
}

// newNode makes a node with the next number. The caller holds s.mu, except for the root.
func (s *server) newNode(mode uint32) *node {
	s.nodes++
	return &node{s: s, id: s.nodes, mode: mode & 0o7777, mtime: time.Now()}
}

func (n *node) path(name string) string { return path.Join(".", n.Path(nil), name) }

// op is an operation on n.
func (n *node) op(kind Kind) Op { return Op{Kind: kind, Path: n.path(""), Node: n.id} }

// nameOp is an operation that changes a name in the directory n.
func (n *node) nameOp(kind Kind, name string) Op {
	op := Op{Kind: kind, Path: n.path(name), Dir: n.id}
	if child := n.GetChild(name); child != nil {
		op.Node = child.Operations().(*node).id
	}
	return op
}

// attr fills in the attributes. The caller holds s.mu.
func (n *node) attr(out *fuse.Attr) {
	out.Mode = n.mode
	out.Size = uint64(len(n.data))
	out.Blocks = uint64(max(n.allocated, int64(len(n.data)))+4095) / 4096 * 8
	out.Blksize = 4096
	out.Nlink = 1
	out.Owner = fuse.Owner{Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())}
	out.SetTimes(nil, &n.mtime, &n.mtime)
}

func (n *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.s.mu.RLock()
	defer n.s.mu.RUnlock()
	n.attr(&out.Attr)
	return 0
}

func (n *node) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok {
		op := n.op(Truncate)
		op.Size = int64(size)
		if errno := n.s.apply(op, func(*Op) { n.resize(op.Size) }); errno != 0 {
			return errno
		}
	}
	n.s.mu.Lock()
	defer n.s.mu.Unlock()
	if mode, ok := in.GetMode(); ok {
		n.mode = mode & 0o7777
	}
	n.attr(&out.Attr)
	return 0
}

// resize changes the length of the data. The caller holds s.mu.
func (n *node) resize(size int64) {
	n.mtime = time.Now()
	if old := int64(len(n.data)); size <= old {
		n.data = slices.Clip(n.data[:size])
		n.allocated = size
	} else {
		n.data = append(n.data, make([]byte, size-old)...)
	}
}

func (n *node) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *node) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n.s.mu.RLock()
	defer n.s.mu.RUnlock()
	if off >= int64(len(n.data)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(dest[:copy(dest, n.data[off:])]), 0
}

func (n *node) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	op := n.op(Write)
	op.Offset, op.Data = off, slices.Clone(data) // go-fuse uses the buffer again
	errno := n.s.apply(op, func(*Op) {
		if end := off + int64(len(data)); end > int64(len(n.data)) {
			n.resize(end)
		}
		n.mtime = time.Now()
		copy(n.data[off:], data)
	})
	return uint32(len(data)), errno
}

func (n *node) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	if mode&^unix.FALLOC_FL_KEEP_SIZE != 0 {
		return syscall.EOPNOTSUPP
	}
	op := n.op(Allocate)
	op.Offset, op.Size, op.KeepSize = int64(off), int64(size), mode != 0
	return n.s.apply(op, func(*Op) {
		end := op.Offset + op.Size
		if end > int64(len(n.data)) && !op.KeepSize {
			n.resize(end)
		}
		n.allocated = max(n.allocated, end)
	})
}

func (n *node) Fsync(_ context.Context, _ fs.FileHandle, flags uint32) syscall.Errno {
	kind := Sync
	if n.IsDir() {
		kind = SyncDir
	} else if flags&1 != 0 {
		kind = Datasync
	}
	return n.s.apply(n.op(kind), func(*Op) {})
}

func (n *node) make(
	ctx context.Context, kind Kind, name string, mode uint32, out *fuse.EntryOut,
) (*fs.Inode, syscall.Errno) {
	op := n.nameOp(kind, name)
	op.Mode = mode & 0o7777
	var child *node
	if errno := n.s.apply(op, func(op *Op) {
		child = n.s.newNode(mode)
		op.Node = child.id
		child.attr(&out.Attr)
	}); errno != 0 {
		return nil, errno
	}
	attr := fs.StableAttr{Mode: syscall.S_IFREG, Ino: child.id}
	if kind == Mkdir {
		attr.Mode = syscall.S_IFDIR
	}
	return n.NewPersistentInode(ctx, child, attr), 0
}

func (n *node) Create(
	ctx context.Context, name string, _, mode uint32, out *fuse.EntryOut,
) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	inode, errno := n.make(ctx, Create, name, mode, out)
	return inode, nil, fuse.FOPEN_KEEP_CACHE, errno
}

func (n *node) Mkdir(
	ctx context.Context, name string, mode uint32, out *fuse.EntryOut,
) (*fs.Inode, syscall.Errno) {
	return n.make(ctx, Mkdir, name, mode, out)
}

func (n *node) Rename(
	_ context.Context, name string, newParent fs.InodeEmbedder, newName string, flags uint32,
) syscall.Errno {
	if flags&^unix.RENAME_NOREPLACE != 0 {
		return syscall.EINVAL
	}
	to := newParent.(*node)
	if there := to.GetChild(newName); there != nil && there.IsDir() && len(there.Children()) > 0 {
		return syscall.ENOTEMPTY
	}
	op := n.nameOp(Rename, name)
	op.To, op.ToDir = to.path(newName), to.id
	return n.s.apply(op, func(*Op) {})
}

func (n *node) Link(
	_ context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut,
) (*fs.Inode, syscall.Errno) {
	file := target.(*node)
	op := n.nameOp(Link, name)
	op.Node = file.id
	if errno := n.s.apply(op, func(*Op) { file.attr(&out.Attr) }); errno != 0 {
		return nil, errno
	}
	return &file.Inode, 0
}

func (n *node) Unlink(_ context.Context, name string) syscall.Errno {
	return n.s.apply(n.nameOp(Unlink, name), func(*Op) {})
}

func (n *node) Rmdir(_ context.Context, name string) syscall.Errno {
	if child := n.GetChild(name); child != nil && len(child.Children()) > 0 {
		return syscall.ENOTEMPTY
	}
	return n.s.apply(n.nameOp(Rmdir, name), func(*Op) {})
}

// Statfs returns the free space of the machine's temporary directory.
func (n *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	var st syscall.Statfs_t
	if err := syscall.Statfs(os.TempDir(), &st); err != nil {
		return fs.ToErrno(err)
	}
	out.FromStatfsT(&st)
	return 0
}
