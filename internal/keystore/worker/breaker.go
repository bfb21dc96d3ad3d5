package worker

import (
	"errors"
	"slices"

	"countersign/internal/keystore"
)

type note struct {
	up    bool
	cause error
}

func (p *Pool) Status() keystore.Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := keystore.Status{Up: !p.down && len(p.sealed) == 0}
	if !st.Up && p.cause != nil {
		st.Cause = p.cause.Error()
	}
	for _, s := range p.slots {
		w := keystore.Worker{Restarts: s.restarts}
		if s.process != nil {
			w.PID, w.Served = s.process.cmd.Process.Pid, s.process.served.Load()
		}
		st.Workers = append(st.Workers, w)
	}
	return st
}

// settle is called, under mu, whenever a worker has come or gone: it sees whether there are workers at all, and gives those
// that wait what there is.
func (p *Pool) settle() {
	down := true
	for _, s := range p.slots {
		down = down && s.process == nil && !s.starting
	}
	p.down = down
	if down && p.open && !p.told.Load() {
		p.told.Store(true)
		p.note(note{false, p.cause})
	}
	p.waiting = slices.DeleteFunc(p.waiting, func(w *waiter) bool {
		proc, coming := p.choose(w.tried)
		if proc != nil || !coming {
			w.process <- proc
		}
		return proc != nil || !coming
	})
}

// noteSealed keeps count of the keys that the device does not give out to this machine as it is. The first of them is an
// outage, and the last one's return its end.
func (p *Pool) noteSealed(ref keystore.Ref, err error) {
	sealed := errors.Is(err, keystore.ErrSealed)
	if !sealed && (err != nil || p.sealing.Load() == 0) {
		return
	}
	p.mu.Lock()
	if sealed {
		p.sealed[ref] = true
	} else {
		delete(p.sealed, ref)
	}
	p.sealing.Store(int64(len(p.sealed)))
	if sealed && !p.told.Load() {
		p.told.Store(true)
		p.cause = err
		p.note(note{false, err})
	}
	p.mu.Unlock()
	if !sealed {
		p.back()
	}
}

// back says that the device serves again, unless the call that shows it was the last one before the end.
func (p *Pool) back() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.told.Load() && !p.down && len(p.sealed) == 0 {
		p.told.Store(false)
		p.note(note{up: true})
	}
}

// maxNotes is how many wait for a listener that takes its time.
const maxNotes = 64

// note leaves word for tell, under mu. It never waits.
func (p *Pool) note(n note) {
	if n.up && len(p.notes) >= maxNotes {
		p.notes = p.notes[:len(p.notes)-1] // nobody has listened for a long time: this outage has not been
		return
	}
	p.notes = append(p.notes, n)
	select {
	case p.noted <- struct{}{}:
	default:
	}
}

// tell passes on, in order, what the pool has to say.
func (p *Pool) tell() {
	for {
		select {
		case <-p.noted:
		case <-p.closed:
			return
		}
		p.mu.Lock()
		notes := p.notes
		p.notes = nil
		p.mu.Unlock()
		for _, n := range notes {
			if p.isClosed() {
				return
			}
			if n.up {
				p.config.Log.Info("the token serves again", "token", p.config.Name)
			} else {
				p.config.Log.Error("the token does not serve: its keys are unavailable until it is back", "token", p.config.Name, "err", n.cause)
			}
			if p.config.OnChange != nil {
				p.config.OnChange(n.up, n.cause)
			}
		}
	}
}
