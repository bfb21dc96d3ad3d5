package softhsmtests

import (
	"io"
	"net"
	"strings"
	"sync"
)

// tap returns the path of a socket in front of the admin socket. The answers of the admin API on
// the way are searched for secrets, each connection at its end. A sign-in gives the caller a token,
// so a caller that signs in uses the admin socket itself.
func (s *system) tap() string {
	path := s.path("tap.sock")
	s.tapped.Do(func() {
		l, err := net.Listen("unix", path)
		if err != nil {
			s.t.Fatal(err)
		}
		var open sync.WaitGroup
		conns := map[net.Conn]bool{}
		var mu sync.Mutex
		s.t.Cleanup(func() {
			l.Close()
			mu.Lock()
			for c := range conns {
				c.Close()
			}
			mu.Unlock()
			open.Wait()
		})
		open.Go(func() {
			for {
				client, err := l.Accept()
				if err != nil {
					return
				}
				mu.Lock()
				conns[client] = true
				mu.Unlock()
				open.Go(func() { s.search(client) })
			}
		})
	})
	return path
}

// search copies a connection to the admin socket, and searches what comes back.
func (s *system) search(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("unix", s.path("admin.sock"))
	if err != nil {
		return // the daemon is down
	}
	defer server.Close()
	var asked, answers strings.Builder
	left := make(chan struct{})
	go func() {
		defer close(left)
		io.Copy(io.MultiWriter(server, &asked), client)
		server.Close() // the client has left
	}()
	io.Copy(io.MultiWriter(client, &answers), server)
	client.Close()
	<-left
	of := "an answer of the admin API"
	if strings.Contains(asked.String(), " /v1/decisions") {
		of = "decisions, as for countersign policy export"
	}
	s.checkOutput(of, answers.String())
}
