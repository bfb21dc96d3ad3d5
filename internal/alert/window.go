package alert

import (
	"fmt"
	"time"
)

// steps is the number of steps in which a window moves: the counters of a window are kept in so
// many numbers.
const steps = 60

// window has the numbers of a pair of counters within a time. The counters begin with the process.
type window struct {
	last    time.Time // of the newest sample
	samples []sample  // the oldest first; at most steps
}

type sample struct {
	at    time.Time
	n, of float64
}

// add returns the increase of counters since the beginning of the window, and keeps a sample in
// each step.
func (w *window) add(now sample, length time.Duration) (n, of float64) {
	for len(w.samples) > 1 && now.at.Sub(w.samples[1].at) >= length {
		w.samples = w.samples[1:]
	}
	if len(w.samples) == 0 || now.at.Sub(w.last) >= length/steps {
		w.samples = append(w.samples, now)
		w.last = now.at
	}
	oldest := w.samples[0]
	return now.n - oldest.n, now.of - oldest.of
}

// measure returns the reading of a measured kind, for an alert with the level now. A process that
// has not counted for a whole window yet does not know enough for a fall: after a restart, an alert
// stays for a window at least.
func (e *Engine) measure(k *Kind, level Level, now time.Time) reading {
	rate := k.rate(e.c)
	w := e.windows[k]
	if w == nil {
		w = &window{samples: []sample{{at: now}}, last: now} // the counters were zero
		e.windows[k] = w
	}
	n, of := k.count(e.meter)
	n, of = w.add(sample{now, n, of}, rate.Window)
	r := reading{text: fmt.Sprintf(k.text, n, short(rate.Window))}
	if k.share {
		share := 0.0
		if of >= float64(e.c.HandshakesLeast) {
			share = 100 * n / of
		}
		n, r.text = share, fmt.Sprintf(k.text, share, of, short(rate.Window))
	}
	e.mu.Lock()
	e.numbers[k] = n
	e.mu.Unlock()
	r.wants = rate.wants(n, level)
	if r.wants.rank() < level.rank() && now.Sub(e.begun) < rate.Window {
		r.wants = level
	}
	return r
}
