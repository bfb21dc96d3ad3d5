package limit

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func acquire(t testing.TB, f *Fair, lane string) (release func()) {
	t.Helper()
	release, err := f.Acquire(t.Context(), lane)
	if err != nil {
		t.Fatalf("%s: %v", lane, err)
	}
	return release
}

func granted(p *ticket) bool {
	select {
	case <-p.granted:
		return true
	default:
		return false
	}
}

func idle(t testing.TB, f *Fair) {
	t.Helper()
	if f.held != 0 || f.waiting != 0 || len(f.lanes) != 0 || f.turns.Len() != 0 {
		t.Fatalf("%d held, %d waiting in %d lanes, %d turns", f.held, f.waiting, len(f.lanes), f.turns.Len())
	}
}

// TestTurns lists the order of the grants. A ticket is named by its lane and its number in the
// lane.
func TestTurns(t *testing.T) {
	for _, c := range []struct{ come, gone, want string }{
		{"a1 a2 a3 b1 b2 c1", "", "a1 b1 c1 a2 b2 a3"},
		{"a1 a2 a3 b1", "a2", "a1 b1 a3"},
		{"a1 a2 b1 c1", "a1", "a2 b1 c1"},  // lane a keeps its turn
		{"a1 b1 c1 a2", "a1 a2", "b1 c1"},  // lane a has no caller left
		{"a1 b1 c1", "a1 +a2", "b1 c1 a2"}, // lane a is back, at the end
		{"a1 a2 b1", "a1 +a3", "a2 b1 a3"}, // lane a was never empty and keeps its one turn
		{"a1 b1 b2 c1", "b1", "a1 b2 c1"},
		{"a1 a2 b1", "go a1", "a2 b1"},        // a1 was just granted: the slot stays in lane a
		{"a1 b1 c1", "go a1", "b1 c1"},        // the slot leaves lane a, which is empty
		{"a1 b1 b2", "go a1 +a2", "b1 b2 a2"}, // a2 was too late for the slot
		{"a1 b1 b2", "go +a2 a1", "a2 b1 b2"}, // a2 was in time
	} {
		f := NewFair(1)
		f.enqueue("first", 1)
		tickets := map[string]*ticket{}
		var order []string
		come := func(name string) {
			tickets[name] = f.enqueue(name[:1], 1)
			order = append(order, name)
		}
		for _, name := range strings.Fields(c.come) {
			come(name)
		}
		free := f.release
		for _, name := range strings.Fields(c.gone) {
			if name == "go" {
				f.release()
				free = func() {} // granted already
			} else if back, ok := strings.CutPrefix(name, "+"); ok {
				come(back)
			} else {
				f.cancel(tickets[name])
				delete(tickets, name)
			}
		}
		var got []string
		for free(); len(tickets) > 0; f.release() {
			i := slices.IndexFunc(order, func(name string) bool {
				return tickets[name] != nil && granted(tickets[name])
			})
			if i < 0 {
				t.Fatalf("%v: no ticket is granted after %v", c, got)
			}
			got = append(got, order[i])
			delete(tickets, order[i])
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s, gone %s: %v; want %s", c.come, c.gone, got, c.want)
		}
		idle(t, f)
	}
}

func TestReleaseOnce(t *testing.T) {
	f := NewFair(2)
	a, b := acquire(t, f, "a"), acquire(t, f, "b")
	a()
	a()
	if f.held != 1 {
		t.Fatalf("%d held", f.held)
	}
	b()
	idle(t, f)
}

func TestAcquireEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := NewFair(1)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := f.Acquire(ended, "a"); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		release := acquire(t, f, "a")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := f.Acquire(ctx, "b"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		release()
		idle(t, f)
	})
}

func waiting(f *Fair, lane string) int {
	if l := f.lanes[lane]; l != nil {
		return l.queue.Len()
	}
	return 0
}

// TestFairInvariants runs random operations and checks all invariants after each. Between two turns
// of a waiting lane, every other lane has at most one turn.
func TestFairInvariants(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for round := range 500 {
		slots, lanes := 1+r.IntN(4), 2+r.IntN(5)
		f := NewFair(slots)
		queues := map[string][]*ticket{}     // the waiting tickets, first in first
		turns := map[string]map[string]int{} // turns of other lanes, since the lane's last turn or first ticket
		var fresh *ticket                    // granted by the last operation, so cancel may still come
		for range 300 {
			name := string(rune('a' + r.IntN(lanes)))
			before, heldBefore, handed := fresh, f.held, ""
			fresh = nil
			switch r.IntN(5) {
			case 0, 1, 2:
				p := f.enqueue(name, 1)
				if (p == nil) != (heldBefore < slots) {
					t.Fatalf("%d of %d are held, and it waits: %v", heldBefore, slots, p != nil)
				}
				if p != nil {
					if len(queues[name]) == 0 {
						turns[name] = map[string]int{}
					}
					queues[name] = append(queues[name], p)
				}
			case 3:
				if before != nil && r.IntN(2) == 0 {
					handed = before.lane
					f.cancel(before)
				} else if f.held > 0 {
					f.release()
				}
			case 4:
				if q := queues[name]; len(q) > 0 {
					i := r.IntN(len(q))
					f.cancel(q[i])
					queues[name] = slices.Delete(q, i, i+1)
				}
			}
			for lane, q := range queues {
				for i, p := range q {
					if !granted(p) {
						continue
					}
					if i != 0 || fresh != nil {
						t.Fatalf("%s: ticket %d got a slot", lane, i)
					}
					fresh = p
				}
			}
			if fresh != nil {
				lane := fresh.lane
				queues[lane] = queues[lane][1:]
				turns[lane] = map[string]int{}
				for other := range queues {
					if len(queues[other]) == 0 || other == lane || lane == handed {
						continue
					}
					if turns[other][lane]++; turns[other][lane] > 1 {
						t.Fatalf("round %d: %s had two turns while %s waited for one", round, lane, other)
					}
				}
			}
			in := 0
			for lane, q := range queues {
				if len(q) > 0 {
					in++
				}
				if waiting(f, lane) != len(q) {
					t.Fatalf("%s: %d wait, want %d", lane, waiting(f, lane), len(q))
				}
			}
			if f.held > slots || f.held < 0 || f.waiting > 0 && f.held < slots ||
				f.waiting != all(queues) || len(f.lanes) != in || f.turns.Len() != in {
				t.Fatalf("%d of %d held, %d waiting in %d lanes, %d turns; want %d in %d",
					f.held, slots, f.waiting, len(f.lanes), f.turns.Len(), all(queues), in)
			}
		}
		for f.held > 0 {
			f.release()
		}
		idle(t, f)
	}
}

func all(queues map[string][]*ticket) (n int) {
	for _, q := range queues {
		n += len(q)
	}
	return n
}

// TestFairConcurrent has concurrent callers, and half of them give up at a random moment.
func TestFairConcurrent(t *testing.T) {
	f := NewFair(3)
	var held, got, gone atomic.Int64
	var wg sync.WaitGroup
	for n := range 40 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(5, uint64(n)))
			lane := fmt.Sprint(n % 5)
			for range 1000 {
				ctx, cancel := context.WithCancel(t.Context())
				if r.IntN(2) == 0 {
					time.AfterFunc(time.Duration(r.IntN(100))*time.Microsecond, cancel)
				}
				release, err := f.Acquire(ctx, lane)
				switch {
				case errors.Is(err, context.Canceled):
					gone.Add(1)
				case err != nil:
					t.Error(err)
				default:
					if n := held.Add(1); n > 3 {
						t.Errorf("%d are held", n)
					}
					for range r.IntN(1000) {
						held.Load()
					}
					held.Add(-1)
					got.Add(1)
					release()
					if r.IntN(10) == 0 {
						release()
					}
				}
				cancel()
			}
		})
	}
	wg.Wait()
	idle(t, f)
	t.Logf("%d got a slot, %d gave up", got.Load(), gone.Load())
}

// TestAGreedyLane shares a device of 200 operations a second. The device is serial or has parallel
// slots. One lane sends 100 times its share, other lanes use every slot granted, and a victim sends
// ten calls a second. The victim's wait has a bound, and the device is never idle.
func TestAGreedyLane(t *testing.T) {
	const pace, seconds = 200, 10
	for _, sideBySide := range []bool{true, false} {
		for _, slots := range []int{1, 2, 4, 8} {
			for _, lanes := range []int{2, 5} {
				synctest.Test(t, func(t *testing.T) {
					f := NewFair(slots)
					device := make(chan struct{}, 1)
					var done int
					var mu sync.Mutex
					use := func(release func()) {
						if sideBySide {
							time.Sleep(time.Duration(slots) * time.Second / pace)
						} else {
							device <- struct{}{}
							time.Sleep(time.Second / pace)
							<-device
						}
						release()
						mu.Lock()
						done++
						mu.Unlock()
					}
					stop, cancel := context.WithTimeout(t.Context(), seconds*time.Second)
					defer cancel()
					var all sync.WaitGroup
					all.Go(func() {
						for stop.Err() == nil {
							all.Go(func() {
								if release, err := f.Acquire(stop, "greedy"); err == nil {
									use(release)
								}
							})
							time.Sleep(time.Second * time.Duration(lanes) / (100 * pace))
						}
					})
					for n := range lanes - 2 {
						for range slots + 1 {
							all.Go(func() {
								for stop.Err() == nil {
									if release, err := f.Acquire(stop, fmt.Sprint(n)); err == nil {
										use(release)
									}
								}
							})
						}
					}
					var waits []time.Duration
					time.Sleep(time.Second)
					for range 10 * (seconds - 2) {
						all.Go(func() {
							began := time.Now()
							release := acquire(t, f, "victim")
							mu.Lock()
							waits = append(waits, time.Since(began))
							mu.Unlock()
							use(release)
						})
						time.Sleep(100*time.Millisecond + time.Millisecond/3) // out of step with the device
					}
					all.Wait()
					idle(t, f)
					slices.Sort(waits)
					limit := time.Duration(slots+lanes) * time.Second / pace
					median, worst := waits[len(waits)/2], waits[len(waits)-1]
					t.Logf("side by side %v, %d slots, %d lanes: median %s, worst %s of at most %s; %d done",
						sideBySide, slots, lanes, median, worst, limit, done)
					if worst > limit {
						t.Errorf("%d slots, %d lanes: the victim waited for %s, limit %s", slots, lanes, worst, limit)
					}
					if done < pace*seconds*99/100 {
						t.Errorf("%d operations in %d s: the device was idle", done, seconds)
					}
				})
			}
		}
	}
}

func BenchmarkFairAlone(b *testing.B) {
	f := NewFair(4)
	b.ReportAllocs()
	for b.Loop() {
		release, err := f.Acquire(b.Context(), "peer")
		if err != nil {
			b.Fatal(err)
		}
		release()
	}
}

// BenchmarkFairCrowded has 64 callers in 8 lanes compete for one slot.
func BenchmarkFairCrowded(b *testing.B) {
	f := NewFair(1)
	b.ReportAllocs()
	b.SetParallelism(32)
	var next atomic.Int32
	b.RunParallel(func(pb *testing.PB) {
		lane := fmt.Sprint(next.Add(1) % 8)
		for pb.Next() {
			release, err := f.Acquire(b.Context(), lane)
			if err != nil {
				b.Error(err)
				return
			}
			release()
		}
	})
}

// TestTurnsByCost lists the order of the grants with a quantum of 4. A ticket is named by its lane,
// its number in the lane and its cost.
func TestTurnsByCost(t *testing.T) {
	for _, c := range []struct{ come, gone, want string }{
		{"a1:4 a2:4 b1:4 b2:4", "", "a1 b1 a2 b2"},
		{"a1:1 a2:1 a3:1 a4:1 a5:1 b1:4 b2:1", "", "a1 a2 a3 a4 b1 a5 b2"},
		{"a1:12 b1:1 b2:4 b3:4 b4:4", "", "b1 b2 a1 b3 b4"}, // three turns are one call of 12
		{"a1:5 a2:3 b1:4 b2:4", "", "b1 a1 a2 b2"},          // the rest of a turn is kept for the next one
		{"a1:3 a2:3 b1:4 b2:4", "", "a1 b1 a2 b2"},
		{"a1:64", "", "a1"},
		{"a1:8 a2:1 b1:8", "a1", "a2 b1"},
	} {
		f := NewWeighted(1, 4)
		f.enqueue("first", 1)
		tickets := map[string]*ticket{}
		for _, what := range strings.Fields(c.come) {
			name, cost, _ := strings.Cut(what, ":")
			n, err := strconv.Atoi(cost)
			if err != nil {
				t.Fatal(err)
			}
			tickets[name] = f.enqueue(name[:1], n)
		}
		for _, name := range strings.Fields(c.gone) {
			f.cancel(tickets[name])
			delete(tickets, name)
		}
		var got []string
		for f.release(); len(tickets) > 0; f.release() {
			for name, p := range tickets {
				if granted(p) {
					got = append(got, name)
					delete(tickets, name)
				}
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s, gone %q: %v; want %s", c.come, c.gone, got, c.want)
		}
		idle(t, f)
	}
}

// TestSharesByCost has a lane with calls of the highest cost beside a lane with calls of the
// lowest. While both wait, the sums of their costs differ by one call and one quantum at the most.
func TestSharesByCost(t *testing.T) {
	const quantum, most = 8, 100
	f := NewWeighted(1, quantum)
	f.enqueue("first", 1)
	var large, small []*ticket
	for range 50 {
		large = append(large, f.enqueue("large", most))
	}
	for range 50 * most {
		small = append(small, f.enqueue("small", 1))
	}
	for len(large) > 0 && len(small) > 0 {
		f.release()
		switch {
		case granted(large[0]):
			large = large[1:]
		case granted(small[0]):
			small = small[1:]
		default:
			t.Fatal("no call has the slot")
		}
		if more := (50-len(large))*most - (50*most - len(small)); more > most+quantum || more < -most-quantum {
			t.Fatalf("the lane with large calls is ahead by %d", more)
		}
	}
}
