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
	"math/big"
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

	"countersign/internal/scantest"
	"countersign/internal/secret"
)

func TestMain(m *testing.M) { os.Exit(scantest.Run(m)) }

// recorder records a sender's callbacks and log.
type recorder struct {
	key ed25519.PublicKey

	mu    sync.Mutex
	lines []string
	log   bytes.Buffer
}

func (b *recorder) write(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	scantest.Saw("a callback", fmt.Sprintf(format, args...))
	b.lines = append(b.lines, fmt.Sprintf(format, args...))
}

func (b *recorder) read() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.lines)
}

func (b *recorder) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.log.Write(p)
}

func newSender(t *testing.T, targets ...Target) (*Sender, *recorder) {
	t.Helper()
	scantest.Secret("the secret in the URL of a webhook", []byte("secret-in-a-url"))
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &recorder{key: public}
	s, err := New(Config{
		Targets:   targets,
		Sign:      func(_ context.Context, m []byte) ([]byte, error) { return ed25519.Sign(private, m), nil },
		Log:       slog.New(slog.NewTextHandler(scantest.Tee("the log", b), nil)),
		Delivered: func(target string, m Message) { b.write("%s has %s", target, m.ID) },
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

func wantLines(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestTargets checks which URLs are accepted. The error must not show the URL.
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
		_, err := New(Config{Targets: []Target{{Name: "shop", URL: secret.Of(url)}}})
		if (err == nil) != ok {
			t.Errorf("%q: %v", url, err)
		} else if err != nil && (strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), `"shop"`)) {
			t.Errorf("%q: the error shows the URL, or does not name the target: %v", url, err)
		}
	}
	good := Target{Name: "shop", URL: secret.Of("https://example.com/")}
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

// TestSend makes one attempt over real TLS and checks the request at the receiver.
func TestSend(t *testing.T) {
	const body = `{"type":"key.rotated"}`
	got := make(chan error, 1)
	var b *recorder
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		read, err := io.ReadAll(r.Body)
		if err == nil {
			err = Verify(b.key, r.Header, read, time.Now(), Tolerance)
		}
		if err == nil && (r.Method != "POST" || r.URL.RequestURI() != "/hook?token=secret-in-a-url" ||
			string(read) != body || r.Header.Get("Content-Type") != "application/json") {
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
	alike := &x509.Certificate{
		Subject: server.Certificate().Subject, NotAfter: server.Certificate().NotAfter,
		IsCA: true, BasicConstraintsValid: true,
	}
	stranger, err := x509.CreateCertificate(rand.Reader, alike, alike, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	authority, other := filepath.Join(t.TempDir(), "ca.pem"), filepath.Join(t.TempDir(), "other.pem")
	for path, der := range map[string][]byte{authority: server.Certificate().Raw, other: stranger} {
		block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		if err := os.WriteFile(path, block, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	url := server.URL + "/hook?token=secret-in-a-url"
	var s *Sender
	at := secret.Of(url)
	s, b = newSender(t, Target{Name: "trusting", URL: at, CAFile: authority}, Target{Name: "system", URL: at},
		Target{Name: "other", URL: at, CAFile: other})
	if err := s.Send(t.Context(), "trusting", "msg_1", []byte(body)); err != nil {
		t.Error(err)
	} else if err := <-got; err != nil {
		t.Error(err)
	}
	for _, target := range []string{"system", "other"} {
		err := s.Send(t.Context(), target, "msg_1", []byte(body))
		if err == nil || !strings.Contains(err.Error(), "x509") || strings.Contains(err.Error(), "secret") {
			t.Errorf("a server with a certificate not signed by the authorities of %q: %v", target, err)
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
		t.Errorf("the server is down: %v", err)
	}
}

// TestAnswers checks the error for each HTTP status. A redirect must not be followed.
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
		200: nil, 202: nil, 204: nil, 299: nil,
		301: ErrRefused, 302: ErrRefused, 304: ErrRefused, 307: ErrRefused, 308: ErrRefused,
		400: ErrRefused, 401: ErrRefused, 404: ErrRefused, 409: ErrRefused, 410: ErrGone, 429: ErrRefused,
		500: ErrRefused, 503: ErrRefused,
	} {
		s, _ := newSender(t, Target{Name: "shop", URL: secret.Of(fmt.Sprintf("%s/%d", server.URL, status))})
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

// TestLocalhost checks that a target without TLS connects to this machine only, even if localhost
// resolves to another address.
func TestLocalhost(t *testing.T) {
	s, _ := newSender(t, Target{Name: "shop", URL: secret.Of("http://localhost/")})
	dial := s.targets["shop"].client.Transport.(*http.Transport).DialContext
	_, err := dial(t.Context(), "tcp", "192.0.2.1:80")
	if err == nil || !strings.Contains(err.Error(), "only to this machine") {
		t.Error(err)
	}
}

// TestSignerFails checks that nothing is sent without a valid signature.
func TestSignerFails(t *testing.T) {
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked++ }))
	defer server.Close()
	away := errors.New("away")
	s, _ := newSender(t, Target{Name: "shop", URL: secret.Of(server.URL)})
	s.c.Sign = func(context.Context, []byte) ([]byte, error) { return nil, away }
	if err := s.Send(t.Context(), "shop", "msg_1", nil); !errors.Is(err, away) {
		t.Error(err)
	}
	s.c.Sign = func(context.Context, []byte) ([]byte, error) { return make([]byte, 63), nil }
	if err := s.Send(t.Context(), "shop", "msg_1", nil); err == nil || asked != 0 {
		t.Errorf("sent without a signature: %v", err)
	}
}

// memoryListener is a listener in memory, for tests with synctest's fake clock.
type memoryListener chan net.Conn

func (w memoryListener) Accept() (net.Conn, error) {
	if c, ok := <-w; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (w memoryListener) Close() error   { close(w); return nil }
func (w memoryListener) Addr() net.Addr { return &net.TCPAddr{} }

// run runs s with handler as the receiver until the end of the synctest bubble.
func run(t *testing.T, s *Sender, handler http.HandlerFunc) {
	w := make(memoryListener)
	for _, q := range s.targets {
		q.client.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) {
			here, there := net.Pipe()
			w <- there
			return here, nil
		}
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // net/http detects a closed connection only after reading the body
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

func enqueue(t *testing.T, s *Sender, target string, ids ...string) {
	t.Helper()
	for _, id := range ids {
		time.Sleep(time.Nanosecond) // all messages have different ages
		if err := s.Queue(target, Message{ID: id, Body: []byte("{}")}); err != nil {
			t.Fatal(err)
		}
	}
}

func localTargets(names ...string) (all []Target) {
	for _, n := range names {
		all = append(all, Target{Name: n, URL: secret.Of("http://localhost/" + n + "?token=secret-in-a-url")})
	}
	return all
}

// TestRetry checks the backoff and the age limit of retries.
func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, localTargets("shop")...)
		begin := time.Now()
		var tries []time.Duration
		run(t, s, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			if err := Verify(b.key, r.Header, body, time.Now(), time.Second); err != nil {
				t.Errorf("after %v: %v", time.Since(begin), err) // each attempt has a new signature
			}
			tries = append(tries, time.Since(begin))
			w.WriteHeader(500)
		})
		enqueue(t, s, "shop", "msg_1")
		time.Sleep(80 * time.Hour)
		synctest.Wait()
		wantLines(t, b.read(), "shop lost msg_1: "+ErrLate.Error())
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

// TestPausesDiffer checks that the backoff has a random part.
func TestPausesDiffer(t *testing.T) {
	seen := map[time.Duration]bool{}
	for range 20 {
		seen[backoff(1_000_000)] = true
	}
	if len(seen) < 10 {
		t.Errorf("20 pauses have %d lengths", len(seen))
	}
}

// TestDelivery checks that a refused message does not delay other messages of the target.
func TestDelivery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, localTargets("shop", "bank")...)
		up := false
		run(t, s, func(w http.ResponseWriter, r *http.Request) {
			if id := r.Header.Get(headerID); !up || id == "bad" {
				w.WriteHeader(503)
			}
		})
		enqueue(t, s, "shop", "bad", "msg_1", "msg_2")
		time.Sleep(time.Second)
		synctest.Wait()
		if f := s.Failures(); len(f) != 1 || !errors.Is(f["shop"], ErrRefused) {
			t.Errorf("failures: %v", f)
		}
		up = true
		enqueue(t, s, "shop", "msg_3")
		synctest.Wait()
		wantLines(t, b.read(), "shop has msg_3") // without waiting for the retries of the others
		if f := s.Failures(); len(f) != 0 {
			t.Errorf("failures after a success: %v", f)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		got := b.read()
		slices.Sort(got)
		wantLines(t, got, "shop has msg_1", "shop has msg_2", "shop has msg_3") // "bad" is still in the queue
		if err := s.Queue("nobody", Message{ID: "msg_1"}); !errors.Is(err, ErrUnknown) {
			t.Error(err)
		}
		if err := s.Queue("shop", Message{ID: "msg.1"}); err == nil {
			t.Error("an ID with a dot is queued")
		}
	})
}

// TestSilence checks that an attempt at an unresponsive target ends after ten seconds and does not
// delay other targets.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, localTargets("silent", "slow", "shop")...)
		begin := time.Now()
		var silent []time.Duration
		run(t, s, func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/silent":
				silent = append(silent, time.Since(begin))
				<-r.Context().Done()
				silent = append(silent, time.Since(begin))
			case "/slow": // an endless response
				for chunk := make([]byte, 4096); ; {
					if _, err := w.Write(chunk); err != nil {
						return
					}
				}
			}
		})
		for _, target := range []string{"silent", "slow", "shop"} {
			enqueue(t, s, target, "msg_1")
		}
		synctest.Wait()
		got := b.read()
		slices.Sort(got)
		wantLines(t, got, "shop has msg_1", "slow has msg_1")
		if time.Since(begin) > time.Millisecond {
			t.Errorf("it took %v", time.Since(begin))
		}
		time.Sleep(12 * time.Second)
		synctest.Wait()
		if len(silent) != 2 || silent[1]-silent[0] != attemptTimeout {
			t.Errorf("the silent one was asked, and let go, after %v", silent)
		}
	})
}

// TestGone checks that 410 Gone drops all messages of the target.
func TestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, localTargets("shop")...)
		asked, status := 0, 500
		run(t, s, func(w http.ResponseWriter, r *http.Request) {
			asked++
			w.WriteHeader(status)
		})
		enqueue(t, s, "shop", "msg_1")
		synctest.Wait()
		status = 410
		enqueue(t, s, "shop", "msg_2")
		synctest.Wait()
		enqueue(t, s, "shop", "msg_3")
		synctest.Wait()
		gone := ErrGone.Error()
		wantLines(t, b.read(), "shop lost msg_2: "+gone, "shop lost msg_1: "+gone, "shop lost msg_3: "+gone)
		if asked != 2 {
			t.Errorf("it was asked %d times", asked)
		}
		if f := s.Failures(); !errors.Is(f["shop"], ErrGone) {
			t.Errorf("failures: %v", f)
		}
	})
}

// TestFull checks that a full queue drops its oldest message.
func TestFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, localTargets("shop", "bank")...)
		enqueue(t, s, "bank", "msg_0")
		for i := range maxQueue + 2 {
			enqueue(t, s, "shop", fmt.Sprintf("msg_%d", i))
		}
		full := ErrFull.Error()
		wantLines(t, b.read(), "shop lost msg_0: "+full, "shop lost msg_1: "+full)
		if err := s.Queue("shop", Message{ID: "old", Born: time.Now().Add(-time.Hour)}); err != nil {
			t.Fatal(err)
		}
		wantLines(t, b.read()[2:], "shop lost old: "+full) // a message from before a restart, older than all others
		release := make(chan struct{})
		run(t, s, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/shop" {
				<-release
				w.WriteHeader(500)
			}
		})
		synctest.Wait() // msg_2 is in flight
		enqueue(t, s, "shop", "last")
		wantLines(t, b.read()[3:], "bank has msg_0")
		close(release)
		synctest.Wait()
		wantLines(t, b.read()[4:], "shop lost msg_2: "+full) // the queue was filled during msg_2's attempt
		if n := len(s.targets["shop"].waiting); n != maxQueue {
			t.Errorf("%d wait", n)
		}
	})
}

// TestStop checks that an attempt interrupted by the end of Run has no callback: the caller queues
// the message again.
func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, localTargets("shop")...)
		t.Cleanup(func() { wantLines(t, b.read()) })
		run(t, s, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		// The message is at its age limit, so a failed attempt would be the last one.
		if err := s.Queue("shop", Message{ID: "msg_1", Born: time.Now().Add(-maxAge)}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
	})
}

// TestBorn checks that the age limit counts from Message.Born, also for a message queued again
// after a restart.
func TestBorn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := newSender(t, localTargets("shop")...)
		run(t, s, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) })
		for id, born := range map[string]time.Duration{"old": -73 * time.Hour, "future": 1000 * time.Hour} {
			if err := s.Queue("shop", Message{ID: id, Born: time.Now().Add(born)}); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		wantLines(t, b.read(), "shop lost old: "+ErrLate.Error())
		time.Sleep(maxAge)
		synctest.Wait()
		wantLines(t, b.read()[1:], "shop lost future: "+ErrLate.Error())
	})
}

// TestAuthorityRenewed exchanges the file of certificate authorities: the next attempt trusts the
// authorities of the new file, without a new sender.
func TestAuthorityRenewed(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	server.StartTLS()
	defer server.Close()
	file := filepath.Join(t.TempDir(), "ca.pem")
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(anotherAuthority(t))
	s, _ := newSender(t, Target{Name: "shop", URL: secret.Of(server.URL), CAFile: file})
	if err := s.Send(t.Context(), "shop", "msg_1", nil); err == nil {
		t.Fatal("a receiver of another authority is trusted")
	}
	write([]byte("half a file"))
	if err := s.Send(t.Context(), "shop", "msg_1", nil); err == nil || !strings.Contains(err.Error(), "ca_file") {
		t.Fatalf("with a broken file: %v", err)
	}
	write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	if err := s.Send(t.Context(), "shop", "msg_1", nil); err != nil {
		t.Errorf("with the receiver's authority: %v", err)
	}
}

// anotherAuthority returns a self-signed certificate in PEM.
func anotherAuthority(t *testing.T) []byte {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true}
	b, err := x509.CreateCertificate(rand.Reader, c, c, public, private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: b})
}
