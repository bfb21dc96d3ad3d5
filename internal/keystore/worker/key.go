package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"countersign/internal/keystore"
)

// key is a keystore.Key behind the boundary.
type key struct {
	pool    *Pool
	info    keystore.Info
	number  uint32
	encoded []byte // info, as bind sends it
}

// Bind returns one and the same key for one and the same info.
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

func (k *key) Info() keystore.Info { return k.info }

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

func (k *key) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	if k.info.Algorithm != keystore.X25519 {
		return shared, fmt.Errorf("%v: %w: it is not an exchange key", k.info.Ref, keystore.ErrRefused)
	}
	if keystore.LowOrder(peer) {
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

func (k *key) use(ctx context.Context, what kind, body []byte, check func([]byte) error) ([]byte, error) {
	if len(body) > maxMessage {
		return nil, fmt.Errorf("%v: %w: a message of %d bytes", k.info.Ref, keystore.ErrRefused, len(body))
	}
	p := k.pool
	answer, err := p.do(ctx, false, func(proc *process, done func(error)) ([]byte, error) {
		return proc.use(ctx, p.config.Deadline, done, what, k, body)
	}, check)
	p.noteSealed(k.info.Ref, err)
	return answer, err
}

// request carries out what is not frequent.
func (p *Pool) request(ctx context.Context, once bool, c call, check func(answer []byte) error) error {
	_, err := p.do(ctx, once, func(proc *process, done func(error)) ([]byte, error) {
		return proc.ask(ctx, slowFactor*p.config.Deadline, done, c)
	}, check)
	return err
}

// into reads an answer.
func into[T any](v *T) func(answer []byte) error {
	return func(answer []byte) error {
		var read T
		if err := json.Unmarshal(answer, &read); err != nil {
			return keystore.ErrWrong
		}
		*v = read
		return nil
	}
}

// about reads an answer that describes the key that was asked for.
func about(ref keystore.Ref, info *keystore.Info) func(answer []byte) error {
	return func(answer []byte) error {
		if err := into(info)(answer); err != nil {
			return err
		} else if info.Ref != ref {
			return keystore.ErrWrong
		}
		return nil
	}
}

func (p *Pool) Key(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	var info keystore.Info
	// A worker that does not find it is believed: whoever looks for a key must get an answer when there is none.
	err := p.request(ctx, false, call{Op: opKey, Ref: ref}, about(ref, &info))
	p.noteSealed(ref, err)
	if err != nil {
		return nil, err
	}
	return p.Bind(info), nil
}

func (p *Pool) Keys(ctx context.Context) (infos []keystore.Info, err error) {
	err = p.request(ctx, false, call{Op: opKeys}, into(&infos))
	return infos, err
}

func (p *Pool) Inspect(ctx context.Context) (found []keystore.Finding, err error) {
	err = p.request(ctx, true, call{Op: opLook}, into(&found))
	return found, err
}

func (p *Pool) Generate(ctx context.Context, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag) (keystore.Key, error) {
	var info keystore.Info
	if err := p.request(ctx, true, call{Op: opGenerate, Ref: ref, Algorithm: alg, Tag: tag}, about(ref, &info)); err != nil {
		return nil, err
	}
	return p.Bind(info), nil
}

// Import runs in a worker of its own, which ends afterwards: nothing of the seed stays in a process.
func (p *Pool) Import(ctx context.Context, ref keystore.Ref, path string, tag keystore.Tag) (keystore.Key, error) {
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrUnavailable, ctx.Err())
	}
	p.mu.Lock()
	if p.isClosed() {
		p.mu.Unlock()
		return nil, errClosed
	}
	p.loops.Add(1) // Close waits for it
	p.mu.Unlock()
	defer p.loops.Done()
	proc, err := p.begin(ctx, len(p.slots))
	if err != nil {
		if proc != nil {
			p.loops.Go(func() { proc.close(closeTime) }) // it may be logging in
		}
		return nil, err
	}
	ctx, cancel := p.within(ctx, slowFactor*p.config.Deadline)
	defer cancel()
	var info keystore.Info
	answer, err := proc.ask(ctx, slowFactor*p.config.Deadline, func(error) {}, call{Op: opImport, Ref: ref, Path: path, Tag: tag})
	if err == nil {
		err = about(ref, &info)(answer)
	}
	proc.fail(errors.New("it has imported"))
	proc.gone(closeTime) // it must not make a key after the caller has cleared away
	if err != nil {
		return nil, err
	}
	return p.Bind(info), nil
}

// Destroy has every worker destroy the key: one may have a copy of it.
func (p *Pool) Destroy(ctx context.Context, ref keystore.Ref, tag keystore.Tag) error {
	c := call{Op: opDestroy, Ref: ref, Tag: tag}
	if err := p.request(ctx, false, c, nil); err != nil {
		return err
	}
	p.mu.Lock()
	var all []*process
	for _, s := range p.slots {
		if s.process != nil {
			all = append(all, s.process)
		}
	}
	p.mu.Unlock()
	for _, proc := range all {
		if _, err := proc.ask(ctx, slowFactor*p.config.Deadline, func(error) {}, c); err != nil {
			proc.fail(fmt.Errorf("it may have a copy of a key that was destroyed: %w", err))
		}
	}
	return nil
}

// A device without a counter gives ErrRefused.

func (p *Pool) DefineCounter(ctx context.Context) error {
	return p.request(ctx, false, call{Op: opDefine}, nil)
}

func (p *Pool) ReadCounter(ctx context.Context) (value uint64, err error) {
	err = p.request(ctx, false, call{Op: opRead}, into(&value))
	return value, err
}

func (p *Pool) IncrementCounter(ctx context.Context) (value uint64, err error) {
	err = p.request(ctx, true, call{Op: opRise}, into(&value))
	return value, err
}
