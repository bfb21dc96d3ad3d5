package logqueue

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// A kind of lines, which is a message and a level, has burst lines at once, and perSecond lines a
// second in the long run. At debug, an operator has asked for a line of each request, and a kind
// has more of them: a peer at its full pace would otherwise write some MB a second. The lines left
// out are counted, and told every tellAfter.
const (
	burst          = 50
	perSecond      = 1
	burstDebug     = 5000
	perSecondDebug = 1000
	tellAfter      = time.Minute
	maxKinds       = 1000
)

// Pace is a slog.Handler that limits the lines of each kind. Messages are constants of the program,
// and what a stranger sends is in the attributes: the number of kinds is therefore small.
type Pace struct {
	slog.Handler
	kinds *kinds // shared by all handlers of WithAttrs and WithGroup
}

type kinds struct {
	mu  sync.Mutex
	all map[kind]*count
	out uint64 // lines left out
}

type kind struct {
	level   slog.Level
	message string
}

type count struct {
	limiter rate.Limiter
	left    int // lines left out since the last line about them
}

// NewPace returns a handler that passes at most some lines of each kind to another handler.
func NewPace(to slog.Handler) *Pace {
	return &Pace{to, &kinds{all: map[kind]*count{}}}
}

// Handle passes a line on, or counts the line.
func (p *Pace) Handle(ctx context.Context, r slog.Record) error {
	if !p.take(kind{r.Level, r.Message}) {
		return nil
	}
	return p.Handler.Handle(ctx, r)
}

// take reports whether a line of a kind may be written, and counts the line otherwise.
func (p *Pace) take(k kind) bool {
	p.kinds.mu.Lock()
	defer p.kinds.mu.Unlock()
	c := p.kinds.all[k]
	if c == nil {
		if len(p.kinds.all) >= maxKinds { // a fault of the program: a message that is no constant
			k = kind{slog.LevelWarn, "other lines"}
		}
		if c = p.kinds.all[k]; c == nil {
			c = &count{limiter: *rate.NewLimiter(perSecond, burst)}
			if k.level <= slog.LevelDebug {
				c.limiter = *rate.NewLimiter(perSecondDebug, burstDebug)
			}
			p.kinds.all[k] = c
		}
	}
	if c.limiter.Allow() {
		return true
	}
	p.kinds.out++
	if c.left++; c.left == 1 {
		time.AfterFunc(tellAfter, func() { p.tell(k, c) })
	}
	return false
}

// LeftOut returns the number of all lines that were left out.
func (p *Pace) LeftOut() uint64 {
	p.kinds.mu.Lock()
	defer p.kinds.mu.Unlock()
	return p.kinds.out
}

// tell writes one line about the lines of a kind that were left out.
func (p *Pace) tell(k kind, c *count) {
	p.kinds.mu.Lock()
	left := c.left
	c.left = 0
	p.kinds.mu.Unlock()
	r := slog.NewRecord(time.Now(), k.level, "lines were left out", 0)
	r.AddAttrs(slog.Int("lines", left), slog.String("msg_of_lines", k.message))
	p.Handler.Handle(context.Background(), r)
}

// WithAttrs implements slog.Handler.
func (p *Pace) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &Pace{p.Handler.WithAttrs(attrs), p.kinds}
}

// WithGroup implements slog.Handler.
func (p *Pace) WithGroup(name string) slog.Handler { return &Pace{p.Handler.WithGroup(name), p.kinds} }

// Printer is an io.Writer for a log.Logger of another package, such as net/http. The text is an
// attribute, since strangers can choose parts of it.
type Printer struct {
	Log     *slog.Logger
	Message string
}

// Write logs one text of at most 500 bytes.
func (p Printer) Write(text []byte) (int, error) {
	p.Log.Warn(p.Message, "text", string(text[:min(len(text), 500)]))
	return len(text), nil
}
