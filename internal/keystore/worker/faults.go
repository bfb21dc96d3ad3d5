package worker

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"countersign/internal/keystore"
)

const (
	// A pool whose workers have ended manyEnds times within endsTime has the fault FaultRestarts.
	// Renewed workers don't count.
	manyEnds = 5
	endsTime = 10 * time.Minute

	// probeFactor is the number of deadlines between two probes.
	probeFactor = 3
)

// outage is the error of an open breaker. The caller holds mu. A refused PIN comes before the end
// of the last worker, since the refusal is why no other worker starts.
func (p *Pool) outage() error {
	if refused := p.barred(); refused != nil {
		return refused
	}
	return p.cause
}

// trackMissing keeps the set of keys that the device has lost, by the result of a use of the key.
// The loss is one change, and so is the return.
func (p *Pool) trackMissing(k *key, err error) {
	missing := errors.Is(err, keystore.ErrNotFound) || errors.Is(err, keystore.ErrUnfit) ||
		errors.Is(err, keystore.ErrAmbiguous)
	if !missing && (err != nil || p.missingCount.Load() == 0) {
		return // the usual case, without a lock
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	_, known := p.missing[k]
	switch {
	case missing && !known:
		p.missing[k] = err
		p.enqueueChange(change{k.info.Ref.String(), false, err})
		select {
		case p.probeNow <- struct{}{}:
		default:
		}
	case !missing && known:
		delete(p.missing, k)
		p.listed, p.emptied = len(p.missing), false
		p.enqueueChange(change{resource: k.info.Ref.String(), up: true})
	}
	p.missingCount.Store(int64(len(p.missing)))
}

// trackJournal notes that the workers can't write their journal, by the result of a signature.
func (p *Pool) trackJournal(err error) {
	switch {
	case errors.Is(err, keystore.ErrJournal):
		if p.journalErr.Swap(&err) == nil {
			p.config.Log.Error("nothing is signed, because the journal of the key workers can't be written",
				"token", p.config.Name, "err", err)
		}
	case err == nil && p.journalErr.Load() != nil && p.journalErr.Swap(nil) != nil:
		p.config.Log.Info("the journal of the key workers is written again", "token", p.config.Name)
	}
}

func (p *Pool) missingKeys() []*key {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Keys(p.missing))
}

// probe looks after states that end outside the pool, until Close: a lost key is restored, the
// machine is in the right state again, the PIN file is corrected. Without a probe, such a state
// would last until somebody asks for the key.
func (p *Pool) probe() {
	ticker := time.NewTicker(probeFactor * p.config.Deadline)
	defer ticker.Stop()
	for {
		select {
		case <-p.probeNow:
		case <-ticker.C:
			p.watchPINFile()
		case <-p.closed:
			return
		}
		ctx, cancel := p.withTimeout(context.Background(), slowFactor*p.config.Deadline)
		p.probeKeys(ctx)
		if p.journalErr.Load() != nil {
			p.trackJournal(p.request(ctx, false, call{Op: opTry}, nil))
		}
		cancel()
	}
}

// probeKeys asks the device for each lost key and each sealed key. When a key is lost, probeKeys
// also lists the keys: a device with none of them was initialised again, or exchanged.
func (p *Pool) probeKeys(ctx context.Context) {
	missing := p.missingKeys()
	p.mu.Lock()
	sealed := slices.Collect(maps.Keys(p.sealed))
	list := len(missing) > 0 && (p.emptied || len(missing) > p.listed)
	p.listed = len(missing)
	p.mu.Unlock()
	for _, ref := range sealed {
		p.Key(ctx, ref) // updates the set
	}
	if len(missing) > 0 {
		p.probeMissing(ctx, missing)
	}
	if !list {
		return
	}
	if refs, err := p.Keys(ctx); err == nil {
		p.mu.Lock()
		p.emptied = len(refs) == 0 && len(p.missing) > 0
		p.mu.Unlock()
	}
}

// probeMissing compares the lost keys with the device. A key that is there, and in whose place a
// use has found another key, must also show its public key.
func (p *Pool) probeMissing(ctx context.Context, missing []*key) {
	var infos []keystore.Info
	for _, k := range missing {
		infos = append(infos, k.info)
	}
	faults, err := p.Compare(ctx, infos)
	if err != nil {
		return
	}
	for i, fault := range faults {
		k := missing[i]
		p.mu.Lock()
		other := errors.Is(p.missing[k], keystore.ErrUnfit)
		p.mu.Unlock()
		if fault == nil && other {
			var info keystore.Info
			fault = p.request(ctx, false, call{Op: opKey, Ref: k.info.Ref}, decodeInfo(k.info.Ref, &info))
			if fault == nil && !bytes.Equal(info.PublicKey, k.info.PublicKey) {
				continue
			}
		}
		if fault == nil {
			p.trackMissing(k, nil)
		}
	}
}

// countEnd notes the end of a worker that was not renewed. The caller holds mu.
func (p *Pool) countEnd(now time.Time) {
	p.ends = append(p.ends, now)
	p.ends = p.ends[max(0, len(p.ends)-manyEnds):]
}

// Status gives the breaker's state, the workers' processes, and the faults.
func (p *Pool) Status() keystore.Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := keystore.Status{
		Up:           !p.down && len(p.sealed) == 0,
		JournalBytes: p.journalBytes.Load(), JournalFailures: p.journalFailures.Load(),
	}
	add := func(kind keystore.FaultKind, key keystore.Ref, format string, args ...any) {
		st.Faults = append(st.Faults, keystore.Fault{Kind: kind, Key: key, Text: fmt.Sprintf(format, args...)})
	}
	serving := 0
	for _, s := range p.slots {
		w := keystore.Worker{Restarts: s.restarts, Calls: s.calls, Errors: s.errors}
		if proc := s.process; proc != nil {
			w.PID, w.Served, w.Memory = proc.child.PID(), proc.served.Load(), int(proc.resident.Load())
			w.Calls, w.Errors = w.Calls+w.Served, w.Errors+proc.failed.Load()
			if last := proc.succeeded.Load(); last != 0 {
				w.Succeeded = time.Unix(0, last)
			}
		}
		if s.process != nil || s.starting {
			serving++
		}
		st.Workers = append(st.Workers, w)
	}
	reason := p.outage()
	switch {
	case p.down && reason != nil:
		st.Cause = reason.Error()
		add(keystore.FaultOf(reason), keystore.Ref{}, "%v", reason)
	case p.down:
		add(keystore.FaultUnavailable, keystore.Ref{}, "no key worker has started yet")
	case serving < len(p.slots):
		add(keystore.FaultRedundancy, keystore.Ref{}, "%d of %d key workers serve: %v", serving, len(p.slots), reason)
	}
	if p.authErr != nil && !p.down { // the workers of before serve on, and no other one can start
		add(keystore.FaultPINRefused, keystore.Ref{}, "%v", p.authErr)
	}
	if err := p.journalErr.Load(); err != nil {
		add(keystore.FaultJournal, keystore.Ref{}, "%v", *err)
	}
	for ref, err := range p.sealed {
		if p.authErr == nil || !errors.Is(err, keystore.ErrAuth) { // the refused PIN is one fault, above
			add(keystore.FaultOf(err), ref, "%v", err)
		}
		st.Cause = cmp.Or(st.Cause, err.Error())
	}
	if p.emptied {
		add(keystore.FaultReplaced, keystore.Ref{},
			"none of the keys is on the token: it was initialised again, or is another one")
	}
	for k, err := range p.missing {
		add(keystore.FaultKeyMissing, k.info.Ref, "%v", err)
	}
	if len(p.ends) == manyEnds && time.Since(p.ends[0]) < endsTime {
		add(keystore.FaultRestarts, keystore.Ref{}, "%d key workers have ended within %v; the last one: %v",
			manyEnds, time.Since(p.ends[0]).Round(time.Second), p.cause)
	}
	slices.SortStableFunc(st.Faults, func(x, y keystore.Fault) int {
		return cmp.Or(strings.Compare(string(x.Kind), string(y.Kind)), strings.Compare(x.Key.String(), y.Key.String()))
	})
	return st
}
