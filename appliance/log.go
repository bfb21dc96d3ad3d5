package appliance

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/resource"
	"countersign/wire"
)

// checkpointEvery is the time between checkpoints while there are new events.
const checkpointEvery = 2 * time.Second

// retainEvery is the time between runs of retention.
const retainEvery = time.Minute

// Log returns the audit log, which is named by the key of its checkpoints, and the number of the
// present epoch.
func (a *Appliance) Log() (audit.Log, uint32, error) {
	key, err := a.Keys.LogKey()
	if err != nil {
		return audit.Log{}, 0, err
	}
	log, err := audit.NewLog(key.Info().PublicKey)
	epoch, _, _ := a.ledger.Head()
	return log, epoch, err
}

// checkpoint returns an epoch with a signed checkpoint over at least size events. Concurrent
// callers share one signature.
func (a *Appliance) checkpoint(ctx context.Context, epoch uint32, size uint64) (ledger.Epoch, error) {
	e, err := a.ledger.Epoch(epoch)
	if err != nil || e.Signed >= size {
		return e, err
	}
	if err := a.signing.Acquire(ctx); err != nil {
		return e, err
	}
	defer a.signing.Release()
	if e, err = a.ledger.Epoch(epoch); err != nil || e.Signed >= size {
		return e, err
	}
	head := audit.Checkpoint{Epoch: epoch, Size: e.Size}
	if e.Ended != 0 {
		copy(head.Root[:], e.Root)
	} else {
		now, _, tree := a.ledger.Head()
		if now != epoch {
			return e, fmt.Errorf("%w: the epoch has just ended", keystore.ErrUnavailable)
		}
		head.Size = tree.Size
		if head.Root, err = tree.Root(); err != nil {
			return e, err
		}
	}
	key, err := a.Keys.LogKey()
	if err != nil {
		return e, err
	}
	log, err := audit.NewLog(key.Info().PublicKey)
	if err != nil {
		return e, err
	}
	// The signature waits in the appliance's own lane, not in the lane of the asking peer. Other
	// callers need this checkpoint too, and must not wait for all requests of a busy peer.
	text, err := log.Sign(head, func(message []byte) ([]byte, error) {
		verifies := func(signature []byte) bool { return key.Verify(message, signature) == nil }
		return key.Sign(ctx, keyring.Own, message, verifies)
	})
	if err != nil {
		return e, fmt.Errorf("sign the checkpoint of %d events: %w", head.Size, err)
	}
	// The tree is on disk. The checkpoint must be on disk before a caller gets it.
	if err := a.ledger.SetCheckpoint(ctx, epoch, head.Size, text); err != nil {
		return e, err
	}
	a.signed.Store(time.Now().UnixNano())
	return a.ledger.Epoch(epoch)
}

// LastCheckpoint returns the time of the last checkpoint, or of the start.
func (a *Appliance) LastCheckpoint() time.Time { return time.Unix(0, a.signed.Load()) }

// Proof returns the proof that an event of the calling peer is in the log.
func (a *Appliance) Proof(ctx context.Context, who Caller, event uint64) (*wire.Proven, error) {
	none := fmt.Errorf("%w: event %d is not one of yours", errNotYours, event)
	e, err := a.ledger.EpochOf(event)
	if errors.Is(err, ledger.ErrNotFound) {
		return nil, none
	} else if err != nil {
		return nil, err
	}
	if e.Dropping != 0 {
		return nil, fmt.Errorf("event %d: %w", event, ledger.ErrDropped)
	}
	leaves, err := a.eventsOf(event, 1)
	if errors.Is(err, ledger.ErrNotFound) {
		return nil, none
	} else if err != nil {
		return nil, err
	}
	said, err := audit.Decode(leaves[0])
	if err != nil {
		return nil, err
	}
	if said.Actor.Kind != "peer" || said.Actor.Name != who.Name {
		return nil, none
	}
	return a.prove(ctx, e, event, leaves[0], 0)
}

// EventProof returns the proof for operators that an event is in the log. The checkpoint has at
// least seen leaves: those of the last checkpoint of the epoch that the caller has seen, or 0. The
// second result proves that the tree continues the tree of seen leaves.
func (a *Appliance) EventProof(ctx context.Context, event, seen uint64) (*wire.Proven, *wire.Consistent, error) {
	e, err := a.ledger.EpochOf(event)
	if errors.Is(err, ledger.ErrNotFound) || err == nil && e.Dropping != 0 {
		return nil, nil, fmt.Errorf("event %d: %w in the log", event, manage.ErrNotFound)
	} else if err != nil {
		return nil, nil, err
	}
	if seen > a.size(e) {
		return nil, nil, fmt.Errorf("%w: epoch %d has fewer than %d events: the caller has seen another log, "+
			"or an older ledger was put back", manage.ErrConflict, e.Number, seen)
	}
	leaves, err := a.eventsOf(event, 1)
	if err != nil {
		return nil, nil, err
	}
	p, err := a.prove(ctx, e, event, leaves[0], seen)
	if err != nil || seen == 0 {
		return p, &wire.Consistent{Path: []wire.Bytes32{}}, err
	}
	log, _, err := a.Log()
	if err != nil {
		return nil, nil, err
	}
	head, err := log.Open([]byte(p.Checkpoint))
	if err != nil {
		return nil, nil, err
	}
	c, err := a.Consistency(ctx, e.Number, seen, head.Size)
	return p, c, err
}

// prove returns the inclusion proof of an event in its epoch, under a checkpoint of at least seen
// leaves.
func (a *Appliance) prove(
	ctx context.Context, e ledger.Epoch, event uint64, leaf []byte, seen uint64,
) (*wire.Proven, error) {
	index := event - e.First
	e, err := a.checkpoint(ctx, e.Number, max(index+1, seen))
	if err != nil {
		return nil, err
	}
	p := &wire.Proven{
		Event: event, Epoch: e.Number, Index: index, Leaf: leaf, Path: []wire.Bytes32{}, Checkpoint: e.Checkpoint,
	}
	return p, a.ledger.Hashes(e.Number, func(stored audit.Reader) error {
		path, err := audit.Prove(e.Signed, index, stored)
		p.Path = hashes(path)
		return err
	})
}

func hashes(path []audit.Hash) []wire.Bytes32 {
	all := make([]wire.Bytes32, len(path))
	for i, h := range path {
		all[i] = wire.Bytes32(h)
	}
	return all
}

// EpochStart returns the proof of the first event of an epoch. Each peer may have the proof, since
// the event has nothing of a peer: only the number of the epoch, and the end of the epoch before.
func (a *Appliance) EpochStart(ctx context.Context, epoch uint32) (*wire.Proven, error) {
	e, err := a.keptEpoch(epoch)
	if err != nil {
		return nil, err
	}
	leaves, err := a.eventsOf(e.First, 1)
	if err != nil {
		return nil, err
	}
	return a.prove(ctx, e, e.First, leaves[0], 0)
}

// Consistency returns the proof that the tree of to leaves of an epoch continues the tree of from
// leaves. Both trees are under a checkpoint, which is signed if necessary: an epoch can have ended
// before its final tree is signed.
func (a *Appliance) Consistency(ctx context.Context, epoch uint32, from, to uint64) (*wire.Consistent, error) {
	e, err := a.keptEpoch(epoch)
	if err != nil {
		return nil, err
	}
	if to > a.size(e) {
		return nil, fmt.Errorf("%w: epoch %d has no tree of %d leaves", errNoTree, epoch, to)
	}
	if _, err := a.checkpoint(ctx, epoch, to); err != nil {
		return nil, err
	}
	c := new(wire.Consistent)
	return c, a.ledger.Hashes(epoch, func(stored audit.Reader) error {
		path, err := audit.ProveConsistency(from, to, stored)
		c.Path = hashes(path)
		return err
	})
}

// size returns the number of events of an epoch now.
func (a *Appliance) size(e ledger.Epoch) uint64 {
	if number, _, tree := a.ledger.Head(); e.Ended == 0 && number == e.Number {
		return tree.Size
	}
	return e.Size
}

// keptEpoch returns an epoch that retention has not dropped.
func (a *Appliance) keptEpoch(epoch uint32) (ledger.Epoch, error) {
	e, err := a.ledger.Epoch(epoch)
	switch {
	case errors.Is(err, ledger.ErrNotFound):
		return e, fmt.Errorf("%w: there is no epoch %d", errNoTree, epoch)
	case err == nil && e.Dropping != 0:
		return e, fmt.Errorf("epoch %d: %w", epoch, ledger.ErrDropped)
	}
	return e, err
}

// eventsOf returns the encoded bytes of n events beginning at the index first, or ErrNotFound if
// one is missing.
func (a *Appliance) eventsOf(first uint64, n int) (some [][]byte, err error) {
	err = a.ledger.Events(first, func(index uint64, b []byte) bool {
		if index != first+uint64(len(some)) {
			return false // one is missing
		}
		some = append(some, b)
		return len(some) < n
	})
	if err == nil && len(some) < n {
		err = fmt.Errorf("event %d: %w", first+uint64(len(some)), ledger.ErrNotFound)
	}
	return some, err
}

// LogFile returns a file of the log's static form (C2SP tlog-tiles). The files are checkpoint and
// tile/… of the present epoch, and epochs/N/checkpoint and epochs/N/tile/… of every epoch. The
// error wraps fs.ErrNotExist for other names, and for tiles of a dropped epoch.
func (a *Appliance) LogFile(ctx context.Context, path string) ([]byte, error) {
	number, _, _ := a.ledger.Head()
	rest := path
	if inside, ok := strings.CutPrefix(path, "epochs/"); ok {
		var text string
		text, rest, _ = strings.Cut(inside, "/")
		n, err := strconv.ParseUint(text, 10, 32)
		if err != nil || text != strconv.FormatUint(n, 10) {
			return nil, fmt.Errorf("%s: %w", path, fs.ErrNotExist)
		}
		number = uint32(n)
	}
	e, err := a.ledger.Epoch(number)
	if errors.Is(err, ledger.ErrNotFound) {
		return nil, fmt.Errorf("%s: %w", path, fs.ErrNotExist)
	} else if err != nil {
		return nil, err
	}
	size := a.size(e)
	if rest == "checkpoint" {
		if newest, err := a.checkpoint(ctx, e.Number, size); err == nil {
			e = newest
		} else if e.Signed == 0 {
			return nil, err
		}
		return []byte(e.Checkpoint), nil // the last checkpoint if the key can't sign now
	}
	tile, ok := audit.ParseTile(rest)
	if !ok || e.Dropping != 0 || !tile.In(size) {
		return nil, fmt.Errorf("%s: %w", path, fs.ErrNotExist)
	}
	if tile.Level >= 0 {
		var b []byte
		err := a.ledger.Hashes(e.Number, func(stored audit.Reader) (err error) {
			b, err = tile.Hashes(stored)
			return err
		})
		return b, err
	}
	entries, err := a.eventsOf(e.First+tile.N*audit.TileWidth, tile.Width)
	if err != nil {
		return nil, err
	}
	var bundle []byte
	for _, b := range entries {
		bundle = append(binary.BigEndian.AppendUint16(bundle, uint16(len(b))), b...)
	}
	return bundle, nil
}

// The resources of admissions beside the tokens.
var (
	diskResource = resource.Resource{
		Name: "ledger", Failed: audit.DeviceUnavailable, Recovered: audit.DeviceRecovered,
		FailedText:    "nothing is admitted: the disk takes no writes",
		RecoveredText: "admissions go on: the disk takes writes again",
	}
	clockResource = resource.Resource{
		Name: "clock", Failed: audit.ClockRefused, Recovered: audit.ClockRecovered,
		FailedText:    "nothing is admitted: the clock is wrong",
		RecoveredText: "admissions go on: the clock is right again",
	}
)

// keepLog does the periodic work of the log until ctx ends: checkpoints, epochs, retention, and the
// events of the disk and the clock.
func (a *Appliance) keepLog(ctx context.Context) {
	ticker := time.NewTicker(checkpointEvery)
	defer ticker.Stop()
	check := func(failure string, err error) { // the first of several failures is a line of the log
		if ctx.Err() == nil {
			a.upkeep.set(failure, err)
			a.monitor.Check(ctx, resource.Resource{Name: failure, FailedText: failure}, err)
		}
	}
	var retained time.Time
	for {
		check(checkpointFailure, a.signLog(ctx))
		a.refusals.flushDue(ctx, a)
		if a.ledger.Trouble() != nil {
			a.ledger.Alive(ctx) // tries the disk again
		}
		a.monitor.Check(ctx, diskResource, a.ledger.Trouble())
		_, _, behind := a.ledger.Clock()
		a.monitor.Check(ctx, clockResource, behind)
		a.monitor.Flush(ctx)
		a.policies.look(a.log)
		check("the index of the audit log is not written", a.index(ctx))
		check("the quotas of peers are not written", a.Peers.WriteGreedy(ctx))
		if time.Since(retained) >= retainEvery {
			check("the times of peers' last sessions are not written", a.Peers.WriteSeen(ctx))
			check("the number of uses of keys is not written", a.Keys.WriteUses(ctx))
			more, err := a.retain(ctx)
			check("retention could not be applied; a retry follows", err)
			if !more {
				retained = time.Now()
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// indexAtOnce is the largest number of segments that one run of index writes.
const indexAtOnce = 64

// index writes the missing indexes of the audit log, which make searches fast.
func (a *Appliance) index(ctx context.Context) error {
	for range indexAtOnce {
		if more, err := a.ledger.Index(ctx); err != nil || !more {
			return err
		}
	}
	return nil
}

// signLog ends an epoch whose period is over, and signs the missing checkpoints. The final
// checkpoints of ended epochs come first.
func (a *Appliance) signLog(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, a.limits.RequestTimeout)
	defer cancel()
	present, _, tree := a.ledger.Head()
	e, err := a.ledger.Epoch(present)
	if err != nil {
		return err
	}
	if tree.Size > 1 && a.retentionInForce().over(time.UnixMilli(e.Begun), a.ledger.Time()) {
		if _, err := a.EndEpoch(ctx, audit.Daemon()); err != nil {
			return err
		}
		present, _, tree = a.ledger.Head()
	}
	if present > 0 {
		if err := a.signEnded(ctx, present); err != nil {
			return err
		}
	}
	_, err = a.checkpoint(ctx, present, tree.Size)
	return err
}

// signEnded signs the missing final checkpoints, the oldest first.
func (a *Appliance) signEnded(ctx context.Context, present uint32) error {
	missing := present // the first epoch without a final checkpoint: all before have one
	for ; missing > 0; missing-- {
		if e, err := a.ledger.Epoch(missing - 1); err != nil {
			return err
		} else if e.Final() {
			break
		}
	}
	for ; missing < present; missing++ {
		e, err := a.ledger.Epoch(missing)
		if err != nil {
			return err
		}
		if _, err := a.checkpoint(ctx, e.Number, e.Size); err != nil {
			return err
		}
	}
	return nil
}
