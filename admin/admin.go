// Package admin is the local admin API: what an operator's tools do with a running appliance. It is served on a Unix
// socket whose folder and mode decide who may call it. Begin reading at New.
package admin

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/audit"
	"countersign/ijson"
	"countersign/keystore"
	"countersign/policy"

	"github.com/labstack/echo/v4"
)

// maxBody bounds a request's body, maxEvents the events in one answer, actTime how long a request waits for the device
// and the disk.
const (
	maxBody   = 64 << 10
	maxEvents = 1000
	actTime   = 30 * time.Second
)

// New returns the server of the admin API. loadPolicy reads the policy file again.
func New(a *appliance.Appliance, loadPolicy func() (*policy.Policy, error)) *http.Server {
	e := echo.New()
	e.HTTPErrorHandler = fail
	e.Use(bounded)
	s := server{a, loadPolicy}
	e.POST("/v1/keys", s.createKey)
	e.GET("/v1/keys", s.keys)
	e.GET("/v1/keys/:name", s.key)
	e.GET("/v1/noise-key", s.noiseKey)
	e.GET("/v1/tokens", s.tokens)
	e.POST("/v1/tokens/:name/retry", s.retryToken)
	e.GET("/v1/rollback", s.rollback)
	e.POST("/v1/rollback/accept", s.acceptRollback)
	e.POST("/v1/peers", s.addPeer)
	e.GET("/v1/peers", s.peers)
	e.DELETE("/v1/peers/:name", s.removePeer)
	e.POST("/v1/peers/:name/suspend", s.suspendPeer)
	e.POST("/v1/peers/:name/resume", s.resumePeer)
	e.GET("/v1/policies", s.policies)
	e.GET("/v1/policies/:version", s.policy)
	e.POST("/v1/policies/reload", s.reloadPolicy)
	e.GET("/v1/decisions", s.decisions)
	e.GET("/v1/decisions/:event", s.decision)
	e.GET("/v1/events", s.events)
	e.GET("/v1/log", s.log)
	e.POST("/v1/log/epochs", s.endEpoch)
	e.POST("/v1/log/epochs/:epoch/hold", s.hold)
	e.POST("/v1/log/epochs/:epoch/release", s.release)
	e.GET("/v1/retention", s.retention)
	e.GET("/v1/receipts", s.receipts)
	e.GET("/v1/receipts/:id", s.receipt)
	e.GET("/v1/ledger", s.ledger)
	e.POST("/v1/ledger/compact", s.compact)
	e.POST("/v1/ledger/accept-time", s.acceptTime)
	// The audit log as C2SP tlog-tiles has it, under the names of an export.
	for _, path := range []string{"/checkpoint", "/tile/*", "/epochs/*"} {
		e.GET(path, s.logFile)
	}
	return &http.Server{
		Handler:           http.MaxBytesHandler(e, maxBody),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ConnContext:       withCaller,
	}
}

// Listen makes the socket, for its owner only. A socket that nobody listens on any more is replaced.
func Listen(path string) (net.Listener, error) {
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("admin socket %s: there is a file of another kind", path)
		}
		if conn, err := net.Dial("unix", path); err == nil {
			conn.Close()
			return nil, fmt.Errorf("admin socket %s: another process listens on it", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("admin socket: %w", err)
		}
	}
	old := syscall.Umask(0o177) // the socket must not be open to others even for a moment
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return l, nil
}

type server struct {
	app        *appliance.Appliance
	loadPolicy func() (*policy.Policy, error)
}

func (s server) createKey(c echo.Context) error {
	var r api.NewKey
	if err := decode(c, &r); err != nil {
		return err
	}
	k, err := s.app.CreateKey(c.Request().Context(), caller(c), appliance.NewKey{
		Name: r.Name, Algorithm: keystore.Algorithm(r.Algorithm), Token: r.Token, Seed: r.SeedFile,
	})
	if err != nil {
		return err
	}
	return c.JSON(http.StatusCreated, keyDoc(k))
}

func (s server) keys(c echo.Context) error { return c.JSON(http.StatusOK, keyDocs(s.app.Keys())) }

func (s server) key(c echo.Context) error {
	versions, err := s.app.Key(c.Param("name"))
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, keyDocs(versions))
}

func (s server) noiseKey(c echo.Context) error {
	k, err := s.app.NoiseKey()
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, keyDoc(k))
}

func (s server) tokens(c echo.Context) error {
	docs := []api.Token{}
	for name, status := range s.app.Tokens() {
		docs = append(docs, api.Token{Name: name, Status: status})
	}
	slices.SortFunc(docs, func(x, y api.Token) int { return strings.Compare(x.Name, y.Name) })
	return c.JSON(http.StatusOK, docs)
}

func (s server) retryToken(c echo.Context) error {
	if err := s.app.RetryToken(c.Request().Context(), caller(c), c.Param("name")); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

func (s server) rollback(c echo.Context) error {
	r, err := s.app.Rollback()
	if err != nil {
		return err
	}
	if r == nil {
		return c.JSON(http.StatusOK, api.Rollback{})
	}
	return c.JSON(http.StatusOK, api.Rollback{Detected: true, Reason: r.Reason, Ledger: r.Ledger, Counter: r.Counter, At: r.At.Unix()})
}

func (s server) acceptRollback(c echo.Context) error {
	var r api.AcceptRollback
	if err := decode(c, &r); err != nil {
		return err
	}
	if err := s.app.AcceptRollback(c.Request().Context(), caller(c), r.Reason); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

func (s server) addPeer(c echo.Context) error {
	var r api.NewPeer
	if err := decode(c, &r); err != nil {
		return err
	}
	key, err := hex.DecodeString(r.PublicKey)
	if err != nil {
		return fmt.Errorf("peer %q: %w: its public key must be 64 hex digits", r.Name, appliance.ErrInvalid)
	}
	p, err := s.app.AddPeer(c.Request().Context(), caller(c), r.Name, key)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusCreated, peerDoc(p))
}

func (s server) peers(c echo.Context) error {
	docs := []api.Peer{}
	for _, p := range s.app.Peers() {
		doc := peerDoc(p.Peer)
		if doc.Suspended, doc.Connections = p.Suspended, p.Connections; !p.Seen.IsZero() {
			doc.LastSeen = p.Seen.Unix()
		}
		docs = append(docs, doc)
	}
	return c.JSON(http.StatusOK, docs)
}

func (s server) removePeer(c echo.Context) error {
	if err := s.app.RemovePeer(c.Request().Context(), caller(c), c.Param("name")); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

func (s server) events(c echo.Context) error {
	from, limit := uint64(0), maxEvents
	var err error
	if v := c.QueryParam("from"); v != "" {
		if from, err = strconv.ParseUint(v, 10, 64); err != nil {
			return fmt.Errorf("from: %w: it must be the index of an event", appliance.ErrInvalid)
		}
	}
	if v := c.QueryParam("limit"); v != "" {
		if limit, err = strconv.Atoi(v); err != nil || limit < 1 || limit > maxEvents {
			return fmt.Errorf("limit: %w: it must be 1 to %d", appliance.ErrInvalid, maxEvents)
		}
	}
	docs := []api.Event{}
	err = s.app.Events(from, func(index uint64, e audit.Event) bool {
		docs = append(docs, api.Event{Index: index, Event: e})
		return len(docs) < limit
	})
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, docs)
}

func keyDoc(k *appliance.Key) api.Key {
	info := k.Info()
	return api.Key{
		Name: k.Name, Version: k.Version, Algorithm: string(info.Algorithm), State: string(k.State), Custody: string(info.Custody),
		Token:     k.Token,
		PublicKey: hex.EncodeToString(info.PublicKey), Origin: info.Provenance.String(), Provenance: info.Provenance, Created: k.Created.Unix(),
	}
}

func keyDocs(keys []*appliance.Key) []api.Key {
	docs := []api.Key{}
	for _, k := range keys {
		docs = append(docs, keyDoc(k))
	}
	return docs
}

func peerDoc(p appliance.Peer) api.Peer {
	return api.Peer{Name: p.Name, PublicKey: hex.EncodeToString(p.PublicKey[:]), Added: p.Added.Unix()}
}

// bounded ends a request's wait after actTime.
func bounded(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		ctx, cancel := context.WithTimeout(c.Request().Context(), actTime)
		defer cancel()
		c.SetRequest(c.Request().WithContext(ctx))
		return next(c)
	}
}

// decode reads a body strictly.
func decode(c echo.Context, v any) error {
	b, err := io.ReadAll(c.Request().Body)
	if err == nil {
		err = ijson.Decode(b, v)
	}
	if err != nil {
		return fmt.Errorf("body: %w: %w", appliance.ErrInvalid, err)
	}
	return nil
}

// fail translates an error into a status and an api.Error, once for all routes.
func fail(err error, c echo.Context) {
	status, code := http.StatusServiceUnavailable, "unavailable"
	var route *echo.HTTPError
	switch {
	case errors.As(err, &route) && route.Code == http.StatusNotFound:
		status, code = route.Code, "not_found"
	case errors.As(err, &route) && route.Code < http.StatusInternalServerError:
		status, code = route.Code, "invalid"
	case errors.Is(err, appliance.ErrInvalid):
		status, code = http.StatusBadRequest, "invalid"
	case errors.Is(err, appliance.ErrExists):
		status, code = http.StatusConflict, "exists"
	case errors.Is(err, appliance.ErrNotFound):
		status, code = http.StatusNotFound, "not_found"
	}
	if !c.Response().Committed {
		c.JSON(status, api.Error{Code: code, Message: err.Error()})
	}
}

type callerKey struct{}

// withCaller notes who is at the other end of a Unix connection: net/http has no other place for what belongs to a
// connection. Handlers take it out at once and pass it on as an argument.
func withCaller(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, callerKey{}, peerCredentials(conn))
}

func caller(c echo.Context) audit.Actor {
	name, _ := c.Request().Context().Value(callerKey{}).(string)
	return audit.Operator(name)
}

// peerCredentials names the process at the other end by what the kernel says of it (SO_PEERCRED).
func peerCredentials(conn net.Conn) string {
	unix, ok := conn.(*net.UnixConn)
	if !ok {
		return "unknown"
	}
	raw, err := unix.SyscallConn()
	if err != nil {
		return "unknown"
	}
	name := "unknown"
	raw.Control(func(fd uintptr) {
		if cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			name = fmt.Sprintf("uid:%d", cred.Uid)
		}
	})
	return name
}
