package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"countersign/audit"
	"countersign/wire"
)

// logMemory has the newest checkpoint that the client has seen, by epoch and size.
//
// The invariant: each checkpoint that a call has relied on is one of the newest checkpoint, or is
// proven to be a part of it. Trees only grow, so a checkpoint that was proven to be a part of any
// remembered one stays a part of all later ones. The largest checkpoint of an earlier epoch needs
// no record: the first event of the next epoch names the final tree, and so the newest checkpoint
// stands for all epochs before.
type logMemory struct {
	log  audit.Log
	file string // "" for none

	mu     sync.Mutex
	newest *audit.Checkpoint // nil before the first one; never changed in place
}

// openMemory reads the file of a memory. A missing file is an empty memory.
func openMemory(log audit.Log, file string) (*logMemory, error) {
	m := &logMemory{log: log, file: file}
	if file == "" {
		return m, nil
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	} else if err != nil {
		return nil, err
	}
	c, err := log.Open(text)
	if err != nil {
		return nil, fmt.Errorf("%s has no checkpoint of this log: %w", file, err)
	}
	m.newest = &c
	return m, nil
}

func (m *logMemory) load() *audit.Checkpoint {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.newest
}

// replace remembers a newer checkpoint, or returns false if another caller has replaced before. The
// checkpoint is on the disk when replace returns: after a restart, the client must still know each
// tree that it has relied on.
func (m *logMemory) replace(before *audit.Checkpoint, c audit.Checkpoint, text []byte) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.newest != before {
		return false, nil
	}
	if m.file != "" {
		if err := replace(m.file, text); err != nil {
			return false, fmt.Errorf("can't remember the checkpoint of the audit log: %w", err)
		}
	}
	m.newest = &c
	return true, nil
}

// earlier reports whether the tree of a is from an earlier time than that of b.
func earlier(a, b audit.Checkpoint) bool {
	return a.Epoch < b.Epoch || a.Epoch == b.Epoch && a.Size < b.Size
}

// remember holds a checkpoint against the memory. A checkpoint that is not a part of the remembered
// one, and does not continue it, is ErrForkedLog. Callers wait for the appliance at the same time,
// and only then compare the memory with the state before.
func (c *Client) remember(ctx context.Context, shown audit.Checkpoint, text []byte) error {
	for {
		newest := c.memory.load()
		if newest != nil {
			first, second := *newest, shown
			if earlier(shown, *newest) {
				first, second = shown, *newest
			}
			if err := c.continues(ctx, first, second); err != nil {
				return err
			}
			if !earlier(*newest, shown) {
				return nil
			}
		}
		if done, err := c.memory.replace(newest, shown, text); done || err != nil {
			return err
		}
	}
}

// continues has the appliance show that the log at one checkpoint continues the log at an earlier
// one, through all epochs in between.
func (c *Client) continues(ctx context.Context, before, after audit.Checkpoint) error {
	for before.Epoch < after.Epoch {
		next := before.Epoch + 1
		p, err := c.proof(ctx, func(id string) any { return wire.Epoch{ID: id, Op: wire.OpEpoch, Epoch: next} })
		if err != nil {
			return notShown(before, after, err)
		}
		final, begun, err := c.memory.log.CheckEpoch(p, next)
		if err != nil {
			return forked(before, after, err)
		}
		if final.Size < before.Size {
			return forked(before, after, &LostEvents{final.Epoch, final.Size, before.Size})
		}
		if err := c.continuesTree(ctx, before, final); err != nil {
			return err
		}
		before = begun
	}
	if earlier(after, before) { // the proof of the epoch's first event may have a newer checkpoint
		before, after = after, before
	}
	return c.continuesTree(ctx, before, after)
}

// continuesTree is continues within one epoch.
func (c *Client) continuesTree(ctx context.Context, before, after audit.Checkpoint) error {
	var path []audit.Hash
	if before.Size < after.Size {
		var found wire.Consistent
		if err := c.call(ctx, true, func(id string) any {
			return wire.Consistency{
				ID: id, Op: wire.OpConsistency, Epoch: after.Epoch, From: before.Size, To: after.Size,
			}
		}, &found); err != nil {
			return notShown(before, after, err)
		}
		path = hashes(found.Path)
	}
	if err := after.Continues(before, path); err != nil {
		return forked(before, after, err)
	}
	return nil
}

// notShown is the error of a request for a proof. A refusal for good means that the appliance can't
// show the proof; every other error may pass.
func notShown(before, after audit.Checkpoint, err error) error {
	if errors.Is(err, ErrDenied) {
		return forked(before, after, err)
	}
	return err
}

func forked(before, after audit.Checkpoint, err error) error {
	return fmt.Errorf("%w: epoch %d with %d events and root %v, epoch %d with %d events and root %v: %w",
		ErrForkedLog, before.Epoch, before.Size, before.Root, after.Epoch, after.Size, after.Root, err)
}

func hashes(path []wire.Bytes32) []audit.Hash {
	all := make([]audit.Hash, len(path))
	for i, h := range path {
		all[i] = audit.Hash(h)
	}
	return all
}
