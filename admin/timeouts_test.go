package admin

import (
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// pipes is a listener of connections in memory.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if c, ok := <-p; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (p pipes) Close() error   { return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

// TestConnectionsEnd holds connections that do not write, do not finish, or do not read. The server
// ends each of them.
func TestConnectionsEnd(t *testing.T) {
	for name, request := range map[string]string{
		"silent":          "",
		"unfinished head": "GET /health/alive HTTP/1.1\r\n",
		"does not read":   "GET /health/alive HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"unfinished body": "POST /v1/keys HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				listener := make(pipes)
				server := New(Config{})
				go server.Serve(listener)
				here, there := net.Pipe()
				listener <- there
				go io.WriteString(here, request)
				time.Sleep(5 * time.Minute) // of the bubble's clock
				synctest.Wait()
				here.SetReadDeadline(time.Now().Add(time.Second))
				if answer, err := io.ReadAll(here); err != nil {
					t.Errorf("after 5 minutes the connection is open: %v, having read %q", err, answer)
				}
				here.Close()
				close(listener)
				server.Close()
			})
		})
	}
}
