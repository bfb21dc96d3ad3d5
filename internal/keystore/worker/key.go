package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"countersign/internal/escrow"
	"countersign/internal/keystore"
	"countersign/internal/pubkey"
)

// key is a keystore.Key of a Pool.
type key struct {
	pool    *Pool
	info    keystore.Info
	number  uint32 // the key's number in frames
	encoded []byte // info in JSON, the body of a bind frame
}

// Bind returns the same Key for equal infos, so a key has one number for all workers.
func (p *Pool) Bind(info keystore.Info) keystore.Key {
	encoded, err := json.Marshal(info)
	if err != nil {
		panic("worker: a key's description that is not JSON: " + err.Error())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	k := p.keys[string(encoded)]
	if k == nil {
		k = &key{p, info, uint32(len(p.keys)), encoded}
		p.keys[string(encoded)] = k
	}
	return k
}

// Info returns the description given to Bind.
func (k *key) Info() keystore.Info { return k.info }

// Sign has a worker sign, and another worker after a signature that judge rejects.
func (k *key) Sign(ctx context.Context, message []byte, judge keystore.Judge) ([]byte, error) {
	if k.info.Algorithm == keystore.X25519 {
		return nil, fmt.Errorf("%v: %w: it is not a signing key", k.info.Ref, keystore.ErrRefused)
	}
	return k.use(ctx, sign, message, func(signature []byte) error {
		if !judge.Accepts(signature) {
			return keystore.ErrWrong
		}
		return nil
	})
}

// Exchange has a worker make the X25519 shared secret.
func (k *key) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	if k.info.Algorithm != keystore.X25519 {
		return shared, fmt.Errorf("%v: %w: it is not an exchange key", k.info.Ref, keystore.ErrRefused)
	}
	if pubkey.LowOrder(peer) {
		return shared, keystore.ErrPeerKey
	}
	answer, err := k.use(ctx, exchange, peer[:], func(secret []byte) error {
		if len(secret) != len(shared) {
			return keystore.ErrWrong
		}
		return nil
	})
	if err != nil {
		return shared, err
	}
	defer clear(answer)
	return [32]byte(answer), nil
}

// use sends a sign or exchange frame for the key.
func (k *key) use(ctx context.Context, op kind, body []byte, check func([]byte) error) ([]byte, error) {
	if len(body) > maxMessage {
		return nil, fmt.Errorf("%v: %w: a message of %d bytes, at most %d are allowed",
			k.info.Ref, keystore.ErrRefused, len(body), maxMessage)
	}
	p := k.pool
	answer, err := p.do(ctx, false, func(proc *process, done func(error)) ([]byte, error) {
		return proc.useKey(ctx, p.config.Deadline, done, op, k, body)
	}, check)
	p.trackSealed(k.info.Ref, err)
	p.trackMissing(k, err)
	if op == sign {
		p.trackJournal(err)
		if errors.Is(err, keystore.ErrJournal) {
			p.journalFailures.Add(1)
		}
	}
	return answer, err
}

// request sends an infrequent operation to a worker, with the longer deadline of such operations.
func (p *Pool) request(ctx context.Context, atMostOnce bool, c call, check func(answer []byte) error) error {
	_, err := p.do(ctx, atMostOnce, func(proc *process, done func(error)) ([]byte, error) {
		return proc.request(ctx, slowFactor*p.config.Deadline, done, c)
	}, check)
	return err
}

// decodeInto makes a check for Pool.do: decodes a JSON answer into v. A failed attempt leaves v as
// before.
func decodeInto[T any](v *T) func(answer []byte) error {
	return func(answer []byte) error {
		var decoded T
		if err := json.Unmarshal(answer, &decoded); err != nil {
			return keystore.ErrWrong
		}
		*v = decoded
		return nil
	}
}

// decodeInfo makes a check for Pool.do: decodes the description of a key, which must be the key
// ref.
func decodeInfo(ref keystore.Ref, info *keystore.Info) func(answer []byte) error {
	return func(answer []byte) error {
		if err := decodeInto(info)(answer); err != nil {
			return err
		} else if info.Ref != ref {
			return keystore.ErrWrong
		}
		return nil
	}
}

// Key finds a key. A search for a missing key ends with keystore.ErrNotFound, since Pool.do
// believes an error that all workers agree on.
func (p *Pool) Key(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	var info keystore.Info
	err := p.request(ctx, false, call{Op: opKey, Ref: ref}, decodeInfo(ref, &info))
	p.trackSealed(ref, err)
	if err != nil {
		return nil, err
	}
	return p.Bind(info), nil
}

// Keys lists the keys.
func (p *Pool) Keys(ctx context.Context) (refs []keystore.Ref, err error) {
	err = p.request(ctx, false, call{Op: opKeys}, decodeInto(&refs))
	return refs, err
}

// maxCompared is the number of descriptions that fit into one frame, with some 300 bytes each.
const maxCompared = 2000

// Compare compares the first 2,000 keys.
func (p *Pool) Compare(ctx context.Context, infos []keystore.Info) ([]error, error) {
	infos = infos[:min(len(infos), maxCompared)]
	var encoded [][]byte
	err := p.request(ctx, false, call{Op: opCompare, Infos: infos}, func(answer []byte) error {
		err := decodeInto(&encoded)(answer)
		if err == nil && (len(encoded) > len(infos) || len(encoded) == 0 && len(infos) > 0) {
			err = keystore.ErrWrong
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	faults := decodeErrors(encoded)
	for i, fault := range faults {
		p.trackSealed(infos[i].Ref, fault)
	}
	return faults, nil
}

// Inspect may make throw-away keys, so Inspect is an at-most-once call.
func (p *Pool) Inspect(ctx context.Context, prove bool) (found []keystore.Finding, err error) {
	err = p.request(ctx, true, call{Op: opInspect, Prove: prove}, decodeInto(&found))
	return found, err
}

// Generate makes a key. Generate is an at-most-once call.
func (p *Pool) Generate(
	ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag,
) (keystore.Key, error) {
	var info keystore.Info
	c := call{Op: opGenerate, Ref: ref, Algorithm: alg, Tag: tag}
	if err := p.request(ctx, true, c, decodeInfo(ref, &info)); err != nil {
		return nil, err
	}
	return p.Bind(info), nil
}

// Import runs in an extra worker. The worker ends after the import, so no process keeps a copy of
// the seed.
func (p *Pool) Import(
	ctx context.Context, ref keystore.Ref, path string, tag keystore.Tag,
) (keystore.Key, error) {
	var info keystore.Info
	c := call{Op: opImport, Ref: ref, Path: path, Tag: tag}
	if err := p.inExtraWorker(ctx, path, c, decodeInfo(ref, &info)); err != nil {
		return nil, err
	}
	return p.Bind(info), nil
}

// Seal makes a key of which holders have a sealed copy. As Import, Seal runs in an extra worker.
func (p *Pool) Seal(
	ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag, to escrow.Set,
) (keystore.Key, []byte, error) {
	if err := to.Check(); err != nil {
		return nil, nil, fmt.Errorf("%v: %w: %w", ref, keystore.ErrRefused, err)
	}
	var made sealed
	c := call{Op: opSeal, Ref: ref, Algorithm: alg, Tag: tag, Holders: to}
	err := p.inExtraWorker(ctx, "", c, func(answer []byte) error {
		err := decodeInto(&made)(answer)
		if err != nil || made.Info.Ref != ref {
			return keystore.ErrWrong
		}
		e, err := escrow.Of(made.Envelope, ref, made.Info.PublicKey)
		if err != nil || e.Algorithm != alg || !e.Holders().Equal(to) {
			return keystore.ErrWrong
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	return p.Bind(made.Info), made.Envelope, nil
}

// Open makes the key of an envelope again. As Import, Open runs in an extra worker.
func (p *Pool) Open(
	ctx context.Context, tag keystore.Tag, envelope []byte, shares []string,
) (keystore.Key, error) {
	e, err := escrow.ParseEnvelope(envelope)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrRefused, err)
	}
	var info keystore.Info
	c := call{Op: opOpen, Tag: tag, Envelope: envelope, Shares: shares}
	if err := p.inExtraWorker(ctx, "", c, decodeInfo(e.Key, &info)); err != nil {
		return nil, err
	}
	return p.Bind(info), nil
}

// inExtraWorker has a worker of its own carry out a call. The worker may read a seed file, or "",
// and ends with the call.
func (p *Pool) inExtraWorker(ctx context.Context, seedFile string, c call, check func(answer []byte) error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
	}
	p.mu.Lock()
	if p.isClosed() {
		p.mu.Unlock()
		return errClosed
	}
	p.goroutines.Add(1) // under mu, so Close waits for every call that has begun
	p.mu.Unlock()
	defer p.goroutines.Done()
	proc, err := p.startWorker(ctx, len(p.slots), seedFile)
	if err != nil {
		if proc != nil {
			// The worker may be logging in, so the shutdown takes time. The caller need not wait.
			p.goroutines.Go(func() { proc.shutdown(closeTimeout) })
		}
		return err
	}
	ctx, cancel := p.withTimeout(ctx, slowFactor*p.config.Deadline)
	defer cancel()
	answer, err := proc.request(ctx, slowFactor*p.config.Deadline, ignoreDone, c)
	if err == nil {
		err = check(answer)
	}
	// After an error the caller removes the remains of the key. The process must be gone by then,
	// or the process could still make the key.
	proc.fail(errors.New("the call has ended"))
	proc.waitReaped(closeTimeout)
	return err
}

// Destroy has every worker destroy the key, since each worker may hold a copy of the key.
func (p *Pool) Destroy(ctx context.Context, ref keystore.Ref, tag keystore.Tag) error {
	c := call{Op: opDestroy, Ref: ref, Tag: tag}
	if err := p.request(ctx, false, c, nil); err != nil {
		return err
	}
	for _, k := range p.missingKeys() {
		if k.info.Ref == ref && k.info.Tag == tag {
			p.trackMissing(k, nil) // its loss needs nobody any more
		}
	}
	p.mu.Lock()
	p.destroyed++ // a worker that starts at this moment is none of all
	var all []*process
	for _, s := range p.slots {
		if s.process != nil {
			all = append(all, s.process)
		}
	}
	p.mu.Unlock()
	for _, proc := range all {
		if _, err := proc.request(ctx, slowFactor*p.config.Deadline, ignoreDone, c); err != nil {
			proc.fail(fmt.Errorf("the key worker may have a copy of a destroyed key: %w", err))
		}
	}
	return nil
}

// Records returns files of the keys, which only the key workers can read.
func (p *Pool) Records(ctx context.Context, after string) (all map[string][]byte, err error) {
	err = p.request(ctx, false, call{Op: opRecords, Path: after}, decodeInto(&all))
	return all, err
}

// DefineCounter is one of the methods of keystore.Counter. On a device without a monotonic counter
// all of them give keystore.ErrRefused.
func (p *Pool) DefineCounter(ctx context.Context, owner keystore.Owner) error {
	return p.request(ctx, false, call{Op: opDefine, Owner: owner}, nil)
}

// ReadCounter returns the counter's value.
func (p *Pool) ReadCounter(ctx context.Context, owner keystore.Owner) (value uint64, err error) {
	err = p.request(ctx, false, call{Op: opRead, Owner: owner}, decodeInto(&value))
	return value, err
}

// IncrementCounter is an at-most-once call: a retry could add two.
func (p *Pool) IncrementCounter(ctx context.Context, owner keystore.Owner) (value uint64, err error) {
	err = p.request(ctx, true, call{Op: opIncrement, Owner: owner}, decodeInto(&value))
	return value, err
}

// UndefineCounter gives the counter back to the device.
func (p *Pool) UndefineCounter(ctx context.Context, owner keystore.Owner) error {
	return p.request(ctx, false, call{Op: opUndefine, Owner: owner}, nil)
}

// EvictStorageRoot gives the handle of the storage root key back. A second call would find another
// key there, or none.
func (p *Pool) EvictStorageRoot(ctx context.Context) error {
	return p.request(ctx, true, call{Op: opEvict}, nil)
}
