package webhook

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// book writes down what a sender tells its owner and its log.
type book struct {
	key ed25519.PublicKey

	mu    sync.Mutex
	lines []string
	log   bytes.Buffer
}

func (b *book) write(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, fmt.Sprintf(format, args...))
}

func (b *book) read() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.lines)
}

func (b *book) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.log.Write(p)
}

func newSender(t *testing.T, targets ...Target) (*Sender, *book) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &book{key: public}
	s, err := New(Config{
		Targets:   targets,
		Sign:      func(_ context.Context, m []byte) ([]byte, error) { return ed25519.Sign(private, m), nil },
		Log:       slog.New(slog.NewTextHandler(b, nil)),
		Delivered: func(target, id string) { b.write("%s has %s", target, id) },
		GaveUp: func(target, id string, err error) {
			for _, known := range []error{ErrFull, ErrLate, ErrGone} {
				if errors.Is(err, known) {
					b.write("%s lost %s: %v", target, id, known)
				}
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, b
}

func same(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestTargets(t *testing.T) {
	for url, ok := range map[string]bool{
		"https://example.com/hook?a=b":       true,
		"https://10.0.0.1:8443":              true,
		"http://localhost:80/hook":           true,
		"http://127.9.0.1":                   true,
		"http://[::1]:8080/":                 true,
		"http://example.com/":                false,
		"http://localhost.example.com/":      false,
		"http://127.0.0.1.example.com/":      false,
		"http://10.0.0.1/":                   false,
		"https://secret@example.com/":        false,
		"https://user:secret@example.com/":   false,
		"http://localhost@example.com/":      false,
		"https://example.com/#secret":        false,
		"https:///secret":                    false,
		"https:example.com":                  false,
		"ftp://secret.example.com/":          false,
		"secret.example.com":                 false,
		"https://example.com:secret/":        false,
		"https://exa mple.com/secret":        false,
		"":                                   false,
		"https://example.com/secret\x00hook": false,
	} {
		_, err := New(Config{Targets: []Target{{Name: "shop", URL: url}}})
		if (err == nil) != ok {
			t.Errorf("%q: %v", url, err)
		} else if err != nil && (strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), `"shop"`)) {
			t.Errorf("%q: the error shows it, or does not name the target: %v", url, err)
		}
	}
	good := Target{Name: "shop", URL: "https://example.com/"}
	if _, err := New(Config{Targets: []Target{good, good}}); err == nil {
		t.Error("two targets of one name")
	}
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, []byte("nothing\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{empty, empty + "-absent"} {
		if _, err := New(Config{Targets: []Target{{Name: "shop", URL: good.URL, CAFile: path}}}); err == nil {
			t.Errorf("%s is taken for authorities", path)
		}
	}
}

// TestSend is one try over real TLS, as a receiver sees it.
func TestSend(t *testing.T) {
	const body = `{"type":"key.rotated"}`
	got := make(chan error, 1)
	var b *book
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		read, err := io.ReadAll(r.Body)
		if err == nil {
			err = Verify(b.key, r.Header, read, time.Now(), Tolerance)
		}
		if err == nil && (r.Method != "POST" || r.URL.RequestURI() != "/hook?token=secret" || string(read) != body || r.Header.Get("Content-Type") != "application/json") {
			err = fmt.Errorf("%s %s %s %q", r.Method, r.URL, r.Header, read)
		}
		got <- err
	}))
	defer server.Close()
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	alike := &x509.Certificate{Subject: server.Certificate().Subject, IsCA: true, BasicConstraintsValid: true, NotAfter: server.Certificate().NotAfter}
	stranger, err := x509.CreateCertificate(rand.Reader, alike, alike, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	authority, other := filepath.Join(t.TempDir(), "ca.pem"), filepath.Join(t.TempDir(), "other.pem")
	for path, der := range map[string][]byte{authority: server.Certificate().Raw, other: stranger} {
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	url := server.URL + "/hook?token=secret"
	var s *Sender
	s, b = newSender(t, Target{Name: "trusting", URL: url, CAFile: authority}, Target{Name: "system", URL: url}, Target{Name: "other", URL: url, CAFile: other})
	if err := s.Send(t.Context(), "trusting", "msg_1", []byte(body)); err != nil {
		t.Error(err)
	} else if err := <-got; err != nil {
		t.Error(err)
	}
	for _, target := range []string{"system", "other"} {
		if err := s.Send(t.Context(), target, "msg_1", []byte(body)); err == nil || !strings.Contains(err.Error(), "x509") || strings.Contains(err.Error(), "secret") {
			t.Errorf("a server that the authorities of %q do not vouch for: %v", target, err)
		}
	}
	if err := s.Send(t.Context(), "nobody", "msg_1", nil); !errors.Is(err, ErrUnknown) {
		t.Error(err)
	}
	if err := s.Send(t.Context(), "trusting", "msg.1", nil); err == nil {
		t.Error("an ID with a dot is sent")
	}
	server.Close()
	if err := s.Send(t.Context(), "trusting", "msg_1", nil); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("nobody is there: %v", err)
	}
}

func TestAnswers(t *testing.T) {
	redirected := false
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var status int
		if fmt.Sscanf(r.URL.Path, "/%d", &status); status == 0 {
			redirected = true
			return
		}
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(status)
	}))
	defer server.Close()
	for status, want := range map[int]error{
		200: nil, 202: nil, 204: nil, 299: nil, 301: ErrRefused, 302: ErrRefused, 304: ErrRefused, 307: ErrRefused, 308: ErrRefused, 400: ErrRefused,
		401: ErrRefused, 404: ErrRefused, 409: ErrRefused, 410: ErrGone, 429: ErrRefused, 500: ErrRefused, 503: ErrRefused,
	} {
		s, _ := newSender(t, Target{Name: "shop", URL: fmt.Sprintf("%s/%d", server.URL, status)})
		if err := s.Send(t.Context(), "shop", "msg_1", nil); !errors.Is(err, want) {
			t.Errorf("%d: %v", status, err)
		}
		if again := s.Send(t.Context(), "shop", "msg_2", nil); errors.Is(again, ErrGone) != (status == 410) {
			t.Errorf("after %d: %v", status, again)
		}
	}
	if redirected {
		t.Error("a redirect was followed")
	}
}

// TestLocalhost: without TLS nothing leaves this machine, whatever its name is said to be.
func TestLocalhost(t *testing.T) {
	s, _ := newSender(t, Target{Name: "shop", URL: "http://localhost/"})
	dial := s.targets["shop"].client.Transport.(*http.Transport).DialContext
	if _, err := dial(t.Context(), "tcp", "192.0.2.1:80"); err == nil || !strings.Contains(err.Error(), "only to this machine") {
		t.Error(err)
	}
}

func TestSignerFails(t *testing.T) {
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked++ }))
	defer server.Close()
	away := errors.New("away")
	s, _ := newSender(t, Target{Name: "shop", URL: server.URL})
	s.c.Sign = func(context.Context, []byte) ([]byte, error) { return nil, away }
	if err := s.Send(t.Context(), "shop", "msg_1", nil); !errors.Is(err, away) {
		t.Error(err)
	}
	s.c.Sign = func(context.Context, []byte) ([]byte, error) { return make([]byte, 63), nil }
	if err := s.Send(t.Context(), "shop", "msg_1", nil); err == nil || asked != 0 {
		t.Errorf("sent without a signature: %v", err)
	}
}

// wire is a network in memory, for tests in which time stands still.
type wire chan net.Conn

func (w wire) Accept() (net.Conn, error) {
	if c, ok := <-w; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (w wire) Close() error   { close(w); return nil }
func (w wire) Addr() net.Addr { return &net.TCPAddr{} }

// run lets s deliver to handler until the bubble ends.
func run(t *testing.T, s *Sender, handler http.HandlerFunc) {
	w := make(wire)
	for _, q := range s.targets {
		q.client.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) {
			here, there := net.Pipe()
			w <- there
			return here, nil
		}
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // only then it notices that the other end has gone
		r.Body = io.NopCloser(bytes.NewReader(body))
		handler(w, r)
	})}
	go server.Serve(w)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { s.Run(ctx); close(done) }()
	t.Cleanup(func() {
		stop()
		<-done
		server.Close()
	})
}

func queueUp(t *testing.T, s *Sender, target string, ids ...string) {
	t.Helper()
	for _, id := range ids {
		time.Sleep(time.Nanosecond) // none is as old as another
		if err := s.Queue(target, Message{ID: id, Body: []byte("{}")}); err != nil {
			t.Fatal(err)
		}
	}
}

func local(names ...string) (all []Target) {
	for _, n := range names {
		all = append(all, Target{Name: n, URL: "http://localhost/" + n + "?token=secret"})
	}
	return all
}

func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, local("shop")...)
		begin := time.Now()
		var tries []time.Duration
		run(t, s, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			if err := Verify(b.key, r.Header, body, time.Now(), time.Second); err != nil {
				t.Errorf("after %v: %v", time.Since(begin), err) // each try is signed anew
			}
			tries = append(tries, time.Since(begin))
			w.WriteHeader(500)
		})
		queueUp(t, s, "shop", "msg_1")
		time.Sleep(80 * time.Hour)
		synctest.Wait()
		same(t, b.read(), "shop lost msg_1: "+ErrLate.Error())
		if tries[0] > time.Millisecond || tries[len(tries)-1] < 70*time.Hour || tries[len(tries)-1] > 72*time.Hour {
			t.Errorf("tried first after %v, last after %v", tries[0], tries[len(tries)-1])
		}
		for i, low := 1, 5*time.Second; i < len(tries); i, low = i+1, min(2*low, 30*time.Minute) {
			if pause := tries[i] - tries[i-1]; pause < low || pause >= 2*low {
				t.Errorf("a pause of %v after try %d", pause, i)
			}
		}
		if strings.Contains(b.log.String(), "secret") || !strings.Contains(b.log.String(), "answered 500") {
			t.Errorf("the log:\n%s", b.log.String())
		}
	})
}

func TestPausesDiffer(t *testing.T) {
	seen := map[time.Duration]bool{}
	for range 20 {
		seen[pauseAfter(1_000_000)] = true
	}
	if len(seen) < 10 {
		t.Errorf("20 pauses have %d lengths", len(seen))
	}
}

func TestDelivery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, local("shop", "bank")...)
		up := false
		run(t, s, func(w http.ResponseWriter, r *http.Request) {
			if id := r.Header.Get(headerID); !up || id == "bad" {
				w.WriteHeader(503)
			}
		})
		queueUp(t, s, "shop", "bad", "msg_1", "msg_2")
		time.Sleep(time.Second)
		synctest.Wait()
		up = true
		queueUp(t, s, "shop", "msg_3")
		synctest.Wait()
		same(t, b.read(), "shop has msg_3") // at once
		time.Sleep(time.Minute)
		synctest.Wait()
		got := b.read()
		slices.Sort(got)
		same(t, got, "shop has msg_1", "shop has msg_2", "shop has msg_3") // one that is not taken holds up nobody
		if err := s.Queue("nobody", Message{ID: "msg_1"}); !errors.Is(err, ErrUnknown) {
			t.Error(err)
		}
		if err := s.Queue("shop", Message{ID: "msg.1"}); err == nil {
			t.Error("an ID with a dot is queued")
		}
	})
}

// TestSilence: a target that does not answer costs ten seconds a try, and costs the others nothing.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, local("silent", "slow", "shop")...)
		begin := time.Now()
		var silent []time.Duration
		run(t, s, func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/silent":
				silent = append(silent, time.Since(begin))
				<-r.Context().Done()
				silent = append(silent, time.Since(begin))
			case "/slow": // an answer without an end
				for chunk := make([]byte, 4096); ; {
					if _, err := w.Write(chunk); err != nil {
						return
					}
				}
			}
		})
		for _, target := range []string{"silent", "slow", "shop"} {
			queueUp(t, s, target, "msg_1")
		}
		synctest.Wait()
		got := b.read()
		slices.Sort(got)
		same(t, got, "shop has msg_1", "slow has msg_1")
		if time.Since(begin) > time.Millisecond {
			t.Errorf("it took %v", time.Since(begin))
		}
		time.Sleep(12 * time.Second)
		synctest.Wait()
		if len(silent) != 2 || silent[1]-silent[0] != tryTime {
			t.Errorf("the silent one was asked, and let go, after %v", silent)
		}
	})
}

func TestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, local("shop")...)
		asked, status := 0, 500
		run(t, s, func(w http.ResponseWriter, r *http.Request) {
			asked++
			w.WriteHeader(status)
		})
		queueUp(t, s, "shop", "msg_1")
		synctest.Wait()
		status = 410
		queueUp(t, s, "shop", "msg_2")
		synctest.Wait()
		queueUp(t, s, "shop", "msg_3")
		synctest.Wait()
		same(t, b.read(), "shop lost msg_2: "+ErrGone.Error(), "shop lost msg_1: "+ErrGone.Error(), "shop lost msg_3: "+ErrGone.Error())
		if asked != 2 {
			t.Errorf("it was asked %d times", asked)
		}
	})
}

func TestFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, local("shop", "bank")...)
		queueUp(t, s, "bank", "msg_0")
		for i := range maxQueue + 2 {
			queueUp(t, s, "shop", fmt.Sprintf("msg_%d", i))
		}
		full := ErrFull.Error()
		same(t, b.read(), "shop lost msg_0: "+full, "shop lost msg_1: "+full)
		if err := s.Queue("shop", Message{ID: "old", Born: time.Now().Add(-time.Hour)}); err != nil {
			t.Fatal(err)
		}
		same(t, b.read()[2:], "shop lost old: "+full) // handed in again, and older than all
		release := make(chan struct{})
		run(t, s, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/shop" {
				<-release
				w.WriteHeader(500)
			}
		})
		synctest.Wait() // one is under way
		queueUp(t, s, "shop", "last")
		same(t, b.read()[3:], "bank has msg_0")
		close(release)
		synctest.Wait()
		same(t, b.read()[4:], "shop lost msg_2: "+full) // it was under way, and its place was taken
		if n := len(s.targets["shop"].waiting); n != maxQueue {
			t.Errorf("%d wait", n)
		}
	})
}

// TestStop: what is under way is left to the owner, who is told nothing.
func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, local("shop")...)
		t.Cleanup(func() { same(t, b.read()) })
		run(t, s, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		if err := s.Queue("shop", Message{ID: "msg_1", Born: time.Now().Add(-tryFor)}); err != nil { // its last try
			t.Fatal(err)
		}
		synctest.Wait()
	})
}

// TestBorn: who is handed in again at every start does not live for ever.
func TestBorn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, local("shop")...)
		run(t, s, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) })
		for id, born := range map[string]time.Duration{"old": -73 * time.Hour, "future": 1000 * time.Hour} {
			if err := s.Queue("shop", Message{ID: id, Born: time.Now().Add(born)}); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		same(t, b.read(), "shop lost old: "+ErrLate.Error())
		time.Sleep(tryFor)
		synctest.Wait()
		same(t, b.read()[1:], "shop lost future: "+ErrLate.Error())
	})
}
