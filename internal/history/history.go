// Package history keeps some 50 series of the meter in a file of its own, so that an operator can
// look back without Prometheus: 10 seconds for 2 hours, 1 minute for 2 days, 15 minutes for 90
// days. Begin reading at History.Run, then at file.go for the form of the file.
//
// The invariants:
//
//   - The history stops nothing. No error of the file ends the daemon or delays a request. A file
//     that is lost, full, damaged or foreign costs what was in it, and one line of the log.
//   - The file has a fixed size. The newest step takes the place of the oldest one.
//   - A value is what was measured in its step, or unknown. Each slot has a checksum, its time, and
//     the seconds that were measured. A torn write, a restart and a clock that jumps make gaps, and
//     no other values. Rates are by the monotonic clock.
//   - The slot of a longer step follows from the slots of the shorter ring alone, so a restart in
//     the middle of 15 minutes loses nothing of them.
//
// Nothing is synced: a power cut loses what the kernel had not written.
package history

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign/internal/meter"
)

// ErrInvalid is the class of errors about a query.
var ErrInvalid = errors.New("invalid query")

// MaxValues is the largest number of values of an answer.
const MaxValues = 200_000

// History is safe for concurrent use.
type History struct {
	path   string
	log    *slog.Logger
	layout layout

	mu      sync.Mutex
	f       *os.File // nil: no file at present
	failing error
	said    string // the failure in the log
	closed  bool
}

// Open opens the history in the file at a path. A file that can't be used is tried again at each
// step.
func Open(path string, log *slog.Logger) *History { return open(path, present(), log) }

func open(path string, l layout, log *slog.Logger) *History {
	h := &History{path: path, log: log, layout: l}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.failed(h.reopen())
	return h
}

// Close closes the file.
func (h *History) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	h.drop()
}

func (h *History) drop() {
	if h.f != nil {
		h.f.Close()
		h.f = nil
	}
}

// Failing returns why the history is not written at present, or nil.
func (h *History) Failing() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.failing
}

// Measure is a source of metrics: whether the history can't be written.
func (h *History) Measure(s *meter.Sample) {
	failing := 0.0
	if h.Failing() != nil {
		failing = 1
	}
	s.Set(meter.HistoryFailing, failing)
}

// failed notes an error, or with nil its end. Each new failure is one line of the log. The caller
// holds mu.
func (h *History) failed(err error) {
	h.failing = err
	if err == nil {
		h.said = ""
	} else if text := err.Error(); text != h.said {
		h.said = text
		h.log.Warn("the history is not written; nothing else needs it", "err", err)
	}
}

// reopen opens the file, or again if the path has another file now. The caller holds mu.
func (h *History) reopen() (err error) {
	if h.closed {
		return os.ErrClosed
	}
	if h.f != nil {
		now, err1 := os.Lstat(h.path)
		mine, err2 := h.f.Stat()
		if err1 == nil && err2 == nil && os.SameFile(now, mine) {
			return nil
		}
		h.drop()
	}
	f, err := openFile(h.path, h.layout, h.log)
	if err == nil {
		h.f = f
	}
	return err
}

// Run writes a step every 10 seconds until ctx ends.
func (h *History) Run(ctx context.Context, m *meter.Meter) {
	var d Deriver
	step := time.Duration(Rings[0].Step) * time.Second
	if r, err := m.Read(0); err == nil {
		d.Next(r)
	}
	for {
		// The end of a step by the wall clock. A clock that is set in between moves the next one.
		timer := time.NewTimer(step - time.Duration(time.Now().UnixNano()%int64(step)))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		r, err := m.Read(0)
		if err != nil {
			h.mu.Lock()
			h.failed(err)
			h.mu.Unlock()
			continue
		}
		h.take(r.At, &d, r)
	}
}

// take writes the step that has ended at about now. A step of less than a second is joined to the
// next one.
func (h *History) take(now time.Time, d *Deriver, r *meter.Reading) {
	if !d.at.IsZero() && r.At.Sub(d.at) < time.Second {
		return
	}
	values, elapsed := d.Next(r)
	step := Rings[0].Step
	end := (now.Unix() + step/2) / step * step
	measured := min(int64(elapsed.Round(time.Second)/time.Second), step)
	if measured < 1 || end < step { // too little to tell, or a clock before 1970
		return
	}
	h.write(point{begin: end - step, measured: uint32(measured), values: values})
}

// Put writes the step of the finest ring that begins at a time, as Run would. Series that values
// does not have are unknown. Tests make a past with Put.
func (h *History) Put(begin time.Time, values map[string]float32) {
	p := point{begin: begin.Unix(), measured: uint32(Rings[0].Step), values: make([]float32, len(All))}
	for i, s := range All {
		v, known := values[s.Name]
		if !known {
			v = float32(math.NaN())
		}
		p.values[i] = v
	}
	h.write(p)
}

// write writes a step of the finest ring, and then the steps of the other rings that have the step
// in them.
func (h *History) write(p point) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	err := h.reopen()
	if err == nil {
		err = h.put(0, p)
	}
	rings := h.layout.rings
	for ring := 1; ring < len(rings) && err == nil; ring++ {
		begin, finer := p.begin/rings[ring].Step*rings[ring].Step, rings[ring-1].Step
		var points []point
		points, err = h.layout.points(h.f, ring-1, begin, p.begin/finer*finer+finer)
		if err == nil {
			err = h.put(ring, h.layout.fold(begin, points))
		}
	}
	h.failed(err)
}

// put writes a step into its slot. The caller holds mu.
func (h *History) put(ring int, p point) error {
	_, err := h.f.WriteAt(h.layout.encode(ring, p), h.layout.offset(ring, h.layout.rings[ring].slotOf(p.begin)))
	return err
}

// Query selects values of the history.
type Query struct {
	Series []string // names; none: the main ones
	Since  int64    // Unix seconds
	Until  int64    // Unix seconds, not included
	Step   int64    // seconds, of one of the Rings; 0: the finest that reaches back to Since
}

// Values are the values of one series, one for each step. NaN is unknown.
type Values struct {
	*Series
	Values []float32
}

// Answer has the values of the steps that begin at Since, Since + Step and so on, before Until.
type Answer struct {
	Since, Until, Step int64
	Measured           []int64 // seconds of each step that were measured; 0 is a gap
	Series             []Values
}

// Read answers a query at a time. An error about the query is of class ErrInvalid.
func (h *History) Read(now time.Time, q Query) (a Answer, err error) {
	ring, err := q.ring(now.Unix())
	if err != nil {
		return a, err
	}
	r := Rings[ring]
	var columns []int
	for i, s := range All {
		if slices.Contains(q.Series, s.Name) || len(q.Series) == 0 && s.Main {
			columns = append(columns, i)
			a.Series = append(a.Series, Values{Series: s})
		}
	}
	for _, name := range q.Series {
		if !slices.ContainsFunc(All, func(s *Series) bool { return s.Name == name }) {
			return a, fmt.Errorf("%w: there is no series %.64q: the list has %s", ErrInvalid, name, Names())
		}
	}
	a.Step = r.Step
	ended := now.Unix() / Rings[0].Step * Rings[0].Step // of the newest finest step that has ended
	a.Until = (min(q.Until, ended) + r.Step - 1) / r.Step * r.Step
	a.Since = min(max(q.Since/r.Step*r.Step, a.Until-r.Step*r.Slots, 0), a.Until)
	n := (a.Until - a.Since) / r.Step
	if n*int64(len(columns)) > MaxValues {
		return a, fmt.Errorf("%w: %d steps of %d series are more than %d values: "+
			"ask for fewer series, a shorter time or longer steps", ErrInvalid, n, len(columns), MaxValues)
	}
	a.Measured = make([]int64, n)
	for i := range a.Series {
		a.Series[i].Values = make([]float32, n)
		for at := range a.Series[i].Values {
			a.Series[i].Values[at] = float32(math.NaN())
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.f == nil {
		return a, nil // all is unknown: Failing says why
	}
	points, err := h.layout.points(h.f, ring, a.Since, a.Until)
	if err != nil {
		return a, fmt.Errorf("history: %w", err)
	}
	for _, p := range points {
		at := (p.begin - a.Since) / r.Step
		a.Measured[at] = int64(p.measured)
		for i, column := range columns {
			a.Series[i].Values[at] = p.values[column]
		}
	}
	return a, nil
}

// Names lists the names of the series.
func Names() string {
	var all []string
	for _, s := range All {
		all = append(all, s.Name)
	}
	return strings.Join(all, ", ")
}

// ring returns the ring of a query. A caller who asks for all that a ring has asks a moment before:
// one step more is allowed.
func (q Query) ring(now int64) (int, error) {
	if q.Since < 0 || q.Until < q.Since {
		return 0, fmt.Errorf("%w: the time from %d to %d is none", ErrInvalid, q.Since, q.Until)
	}
	for i, r := range Rings {
		if q.Step == r.Step || q.Step == 0 && (q.Since > now-r.Step*(r.Slots+1) || i == len(Rings)-1) {
			return i, nil
		}
	}
	return 0, fmt.Errorf("%w: there are no steps of %d seconds, but of 10, 60 and 900", ErrInvalid, q.Step)
}
